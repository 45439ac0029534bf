"""Statements about the methods that the optional package peft brings: they train in our model, in our loop, and are saved
as PEFT saves them. And about our LoRA, which is PEFT's to rounding."""

import json

import pytest
import torch
from conftest import random_model, random_tokens, seed_torch, smooth_adamw
from rounding import assert_close, near, of_model

import rosa
from extras import peft_methods

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.numeric
METHODS = {"LORA": {}, "IA3": {}, "OFT": {"oft_block_size": 4}, "LN_TUNING": {}, "ADALORA": {"total_step": 100}, "HRA": {}, "MISS": {"r": 4},
           "FOURIERFT": {"n_frequency": 10}, "SHIRA": {"r": 2}, "LORA with DoRA": {"use_dora": True}}


def train(model, parameters, selector=None, steps=5, lr=1e-2, adamw=torch.optim.AdamW):
    optimizer = adamw(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for number in range(steps):
        if selector:
            selector.before_forward(number)
        loss = model.loss(random_tokens(4, 16), random_tokens(4, 16, seed=1)) / 64
        loss.backward()
        losses.append(loss.item())
        if selector:
            selector.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_peft_trains_layer_by_layer_and_comes_back_from_its_files(tmp_path, name, dtype):
    seed_torch(0)
    model, tokens = random_model(dtype=dtype), random_tokens(2, 20)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    peft_methods.attach_peft(model, name.split()[0], METHODS[name])
    selector = rosa.LayerSelector(model, 0.4, select_every=2)  # 1 of 3 layers
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(p.dtype == torch.float32 for p in trainable.values())
    start = {name: p.detach().clone() for name, p in trainable.items()}
    losses = train(model, trainable.values(), selector, steps=2)
    moved = {int(name.split(".")[2]) for name, p in trainable.items()
             if name.startswith("model.layers.") and not torch.equal(p, start[name])}
    assert moved == set(selector.active) and len(moved) == 1
    losses += train(model, trainable.values(), rosa.LayerSelector(model, 1.0), steps=6)
    assert losses[-1] < losses[0] - 0.01
    for name, p in model.named_parameters():
        if (name := name.replace("base_layer.", "")) in frozen:
            assert torch.equal(p, frozen[name])

    peft_methods.save_adapter(model, tmp_path)
    again = peft_methods.load_adapter(random_model(dtype=dtype), tmp_path)
    assert torch.equal(again(tokens), model(tokens)) and not torch.equal(again(tokens), random_model(dtype=dtype)(tokens))
    with pytest.raises(ValueError, match="is an adapter for another model: missing"):
        peft_methods.load_adapter(random_model(num_hidden_layers=4), tmp_path)


@pytest.mark.parametrize("name", ["IA3", "OFT", "LN_TUNING"])
def test_its_files_load_into_a_transformers_model(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model, tokens = random_model(), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "base")
    peft_methods.attach_peft(model, name, METHODS[name])
    train(model, [p for p in model.parameters() if p.requires_grad])
    peft_methods.save_adapter(model, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert_close(model(tokens), theirs(tokens).logits, **of_model(model.config))


@pytest.mark.parametrize("targets", ["q,k", "q,k,v,o,gate,up,down"])
def test_our_lora_is_pefts(targets):
    ours, theirs = random_model(), random_model()
    rosa.attach(ours, rank=4, alpha=8, targets=targets, pairs="all")
    peft_methods.attach_peft(theirs, "LORA", {"r": 4, "lora_alpha": 8,
                                      "target_modules": [rosa.TARGETS[target].split(".")[1] for target in targets.split(",")]})
    with torch.no_grad():
        for name, adapter in rosa.adapters(ours).items():
            theirs.get_submodule(name).lora_A["default"].weight.copy_(adapter.A)
    losses = [train(model, [p for p in model.parameters() if p.requires_grad], adamw=smooth_adamw()) for model in (ours, theirs)]
    assert losses[0] == near(losses[1], **of_model(ours.config, 2 * 5)) and losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("method, options, message", [
    ("LORE", {}, "has no method 'LORE': choose from ADALORA, "),
    ("LORA", {"rank": 4}, "unexpected keyword argument 'rank'"),
    ("LORA", {"target_modules": ["query"]}, "Target modules"),
    ("LORA", {"target_modules": ["lm_head"]}, "lm_head cannot be adapted"),
    ("PREFIX_TUNING", {}, "does not support prompt learning"),
    ("ADALORA", {}, "total_step"),
    ("POLY", {}, "task_ids"),  # which only a forward pass shows
])
def test_what_cannot_run_is_refused_in_a_line(model, method, options, message):
    with pytest.raises(ValueError, match=message) as error:
        peft_methods.attach_peft(model, method, options)
    assert "\n" not in str(error.value)


def test_adapters_from_elsewhere_that_we_do_not_implement_run_by_peft(tmp_path):
    model, tokens = random_model(), random_tokens(2, 20)
    theirs = peft.get_peft_model(random_model(), peft.IA3Config())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    assert_close(peft_methods.load_adapter(model, tmp_path)(tokens), theirs.model(tokens), **of_model(model.config))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
