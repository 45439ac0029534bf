"""Statements about the door of all adapter files: which adapters are read, and what decides."""

import json

import pytest
import torch
from helpers import random_model, random_tokens, randomise_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rosa
from extras.adapters import load_adapter
from rosa import attach, attach_arguments, save_adapter


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.lora_A.weight"])
def test_an_adapter_that_carries_more_than_updates_of_layers_is_called_that(tmp_path, name):
    """PEFT saves the embeddings where tokens were added, and adapts lm_head if asked to."""
    save_adapter(randomise_adapters(attach(random_model(), 4, 8)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        load_file(file) | {f"base_model.model.{name}": torch.ones(97, 32)}, file, metadata=metadata
    )
    with pytest.raises(
        ValueError, match=f"holds base_model.model.{name}, which is in no layer: let PEFT merge it"
    ):
        load_adapter(random_model(), tmp_path)


def test_a_peft_lora_from_elsewhere_loads_and_of_our_metadata_pairs_and_ratio_alone_count(tmp_path):
    trained, tokens = (
        randomise_adapters(attach(random_model(), 4, 8, 1.0, "q,v")),
        random_tokens(1, 9),
    )
    save_adapter(trained, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    metadata = {"rank": 9, "alpha": 1, "low_freq_ratio": 1.0, "dtype": "x"}
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "pissa-7b"
    }
    config |= {
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for ours in (None, {"rosa": json.dumps(metadata)}):
        save_file(load_file(file), file, metadata=ours)
        model = load_adapter(random_model(), tmp_path)
        assert attach_arguments(model) == attach_arguments(trained) and torch.equal(
            model(tokens), trained(tokens)
        )


def test_rosas_own_adapter_is_read_by_rosa_itself(tmp_path, monkeypatch):
    """So an edit of rosa.load_adapter counts in every script."""
    save_adapter(randomise_adapters(attach(random_model(), 4, 8)), tmp_path)
    read = []
    own = rosa.load_adapter
    monkeypatch.setattr(rosa, "load_adapter", lambda *given: read.append(given) or own(*given))
    assert load_adapter(random_model(), tmp_path) is read[0][0]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2.0}))
    assert attach_arguments(load_adapter(random_model(), tmp_path))["alpha"] == 2.0
    assert len(read) == 1
