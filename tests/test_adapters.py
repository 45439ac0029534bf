"""Statements about the door of all adapter files: which adapters are read, and what decides."""

import json

import pytest
import torch
from helpers import random_model, random_tokens, randomise_adapters
from rounding import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rosa
from data.errors import UserError
from extras.adapters import load_adapter, read_adapter
from extras.merge import updater
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


# --- on a part of the layers or modules ---


def write_part(directory, change=None, **config):
    """Write the adapter on q and v of 3 layers that `config` narrows down, in PEFT's format without
    our metadata, and return the model with it, B zero elsewhere. change: from the tensors to those
    of the file."""
    trained = randomise_adapters(attach(random_model(), 4, 8, 1.0, "q,v"))
    save_adapter(trained, directory)
    whole = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(whole | config))
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    for layer, name in ((1, "q_proj"), (1, "v_proj")):
        getattr(trained.model.layers[layer].self_attn, name).B.data.zero_()
    save_file((change or dict)(kept), directory / "adapter_model.safetensors")
    return trained


NARROWED = {
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "exclude_modules": {"exclude_modules": r".*\.1\..*"},
    "target_modules": {"target_modules": r"model\.layers\.[02]\.self_attn\.[qv]_proj"},
    "full names": {
        "target_modules": [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 2) for x in "qv"]
    },
}


@pytest.mark.parametrize("narrowed", NARROWED)
def test_what_an_adapter_leaves_as_it_is_stays_as_it_is(tmp_path, narrowed):
    trained, tokens = write_part(tmp_path, **NARROWED[narrowed]), random_tokens(2, 9)
    assert torch.equal(load_adapter(random_model(), tmp_path)(tokens), trained(tokens))
    # into adapters that are there already, too
    there = randomise_adapters(attach(random_model(), 4, 8, 1.0, "q,v"))
    assert torch.equal(load_adapter(there, tmp_path)(tokens), trained(tokens))


SPELLINGS = {
    "default": ("weight", "default.weight"),
    "no prefix": ("base_model.model.", ""),
    "of a wrapper": ("base_model.model.model.", "module.model."),
    "of a larger model": ("base_model.model.model.", "base_model.model.language_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_tensor_may_have_another_prefix_and_the_adapters_name(tmp_path, spelling):
    old, new = SPELLINGS[spelling]
    narrowed = {"target_modules": r".*model\.layers\.[02]\.self_attn\.[qv]_proj"}
    trained = write_part(
        tmp_path, lambda held: {name.replace(old, new): held[name] for name in held}, **narrowed
    )
    tokens = random_tokens(2, 9)
    assert torch.equal(load_adapter(random_model(), tmp_path)(tokens), trained(tokens))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.{}weight"
REFUSED_PARTS = [
    (
        {"layers_to_transform": [0, 1, 2]},
        None,
        "by layers_to_transform .* adapts 6 .* nothing of 2",
    ),
    ({"exclude_modules": ["k_proj"]}, None, r"by exclude_modules .*layers.1.self_attn.q_proj"),
    ({"layers_to_transform": [0]}, None, "tensors of layers.2.self_attn.q_proj, which .* not name"),
    ({"layers_to_transform": {"a": 1}}, None, "must be a layer's number"),
    ({"target_modules": 5}, None, "target_modules must be a name or a list of names, not 5"),
    ({}, None, "was trained on another model: .*layers.1.self_attn.q_proj.lora_A.weight is absent"),
    (
        {"layers_to_transform": [0, 2]},
        lambda held: held | {A.format("other."): held[A.format("")] + 0},
        "several adapters",
    ),
]


@pytest.mark.parametrize(
    "config, change, message", REFUSED_PARTS, ids=[r[2] for r in REFUSED_PARTS]
)
def test_a_part_that_is_not_whole_is_refused_by_the_name_of_what_says_so(
    tmp_path, config, change, message
):
    write_part(tmp_path, change, **config)
    model = random_model()
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert not rosa.adapters(model)


def test_a_part_is_merged(tmp_path):
    trained, tokens = write_part(tmp_path / "a", layers_to_transform=[0, 2]), random_tokens(2, 9)
    model = random_model()
    weight = model.model.layers[1].self_attn.v_proj.weight
    updated = updater(random_model(), read_adapter(tmp_path / "a"))
    assert torch.equal(updated("model.layers.1.self_attn.v_proj.weight", weight), weight)
    for name, parameter in model.named_parameters():
        parameter.data = updated(name, parameter.data)
    assert_close(model(tokens), trained(tokens))


def test_a_part_that_peft_has_trained_here_is_merged_too(tmp_path):
    """Its metadata say that it is peft's, and not which layers."""
    write_part(tmp_path / "a", layers_to_transform=[0, 2])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"rosa": json.dumps({"peft": True})})
    weight = random_model().model.layers[1].self_attn.v_proj.weight
    updated = updater(random_model(), read_adapter(tmp_path / "a"))
    assert torch.equal(updated("model.layers.1.self_attn.v_proj.weight", weight), weight)
    assert not torch.equal(updated("model.layers.0.self_attn.v_proj.weight", weight), weight)
