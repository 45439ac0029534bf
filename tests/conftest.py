"""Fixtures: a random tiny model, a toy task of few examples, a checkpoint to run the scripts on."""

import functools
import gc
import shutil

import pytest
from helpers import ROOT, forkserver, random_model

from data import tasks
from extras import source

# The same few methods, hundreds of times.
source.fingerprint = functools.cache(source.fingerprint)


def pytest_collection_finish(session):
    for item in session.items:
        for mark in item.iter_markers("ahead"):
            mark.kwargs["start"]()
    gc.freeze()  # what was imported is not garbage, and there is much of it to look through
    if any(hasattr(item.module, "forkserver") for item in session.items):
        forkserver()  # what it imports it imports while other tests run


@pytest.fixture
def model():
    return random_model()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few toy problems: drawing hundreds takes longer than a test's own run, and changes nothing
    in it."""
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 100)
    monkeypatch.setitem(tasks.TOY_SIZES, "test", 30)


# --- the scripts, as a user runs them ---


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 1,024 tokens, 4 layers, a
    context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256).save_pretrained(
        "ckpt"
    )
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    return "ckpt"
