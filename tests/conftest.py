"""Fixtures: a random tiny model, a toy task of few examples, a checkpoint to run the scripts on."""

import functools
import gc
import os

import pytest
import torch
from helpers import forkserver, random_model, write_tiny_checkpoint

from data import tasks
from extras import source
from extras.operators import Operators

# A second thread gains nothing on models so small. It loses much where anything else computes: the
# threads wait for each other in each product.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
# The tests ask for the fingerprints of the same few methods hundreds of times.
source.fingerprint = functools.cache(source.fingerprint)
# All kernels are tested, also on a processor on which they do not pay.
Operators.is_intel = staticmethod(lambda: False)


def pytest_collection_finish(session):
    for item in session.items:
        for mark in item.iter_markers("ahead"):
            mark.kwargs["start"]()
    # The imported modules are no garbage, and it would take long to look through them each time
    gc.freeze()
    if any(hasattr(item.module, "forkserver") for item in session.items):
        forkserver()  # the server imports torch while other tests run


@pytest.fixture
def model():
    return random_model()


@pytest.fixture(autouse=True)
def few_toy_problems(monkeypatch):
    """The toy task has few problems: drawing hundreds would take longer than a test's own run, and
    would test nothing more."""
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 100)
    monkeypatch.setitem(tasks.TOY_SIZES, "test", 30)


@pytest.fixture
def unflushed(monkeypatch):
    """For the files whose tests save hundreds of states: the disk is not waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- the scripts, as a user runs them ---


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A working directory that holds a tiny checkpoint `ckpt` alone."""
    monkeypatch.chdir(tmp_path)
    write_tiny_checkpoint("ckpt")
    return "ckpt"
