"""Statements about `extras/quantize.py`: rounded once, and from there on exact; it holds what a
frozen weight is for, and refuses the rest by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import (
    SHORT_ROSA_RUN,
    SHORT_RUN,
    generator_of,
    random_model,
    random_tokens,
    randomise_adapters,
    read_log,
    read_steps,
    read_validations,
    run,
    seed_torch,
)
from rounding import assert_close, near, of_model
from torch import nn

import eval as eval_script
import rosa
import train
from data import toy
from data.errors import UserError
from extras import checkpoints, forgetting, inference, kernels, merge
from extras.quantize import Int8Linear, quantize
from model import Llama

INT8 = ("--quantize", "int8")


def random_weight(out, in_, scale=1.0, seed=0):
    """Rows of different sizes, one of them zero."""
    generator = generator_of(seed)
    weight = scale * torch.randn(out, in_, generator=generator)
    weight *= torch.logspace(-3, 1, out)[:, None]
    weight[3] = 0
    return weight


def test_each_row_is_rounded_to_half_a_step_and_its_largest_number_not_at_all():
    weight = random_weight(24, 40)
    layer = Int8Linear(weight, None, torch.float32)
    step = layer.scale / 128  # [out]
    assert layer.integers.dtype == torch.int8 and layer.integers.abs().max() == 127
    assert torch.all((layer.weight - weight).abs() <= 0.51 * step[:, None])
    assert_close(layer.weight.abs().amax(1), weight.abs().amax(1), depth=3)
    assert not layer.weight[3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 1, 10])
def test_results_and_gradients_are_those_of_the_rounded_weight(dtype, scale):
    """In float16 also where a product with the integers themselves would be infinite."""
    seed_torch(0)
    bias = nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)
    layer = Int8Linear(random_weight(24, 640, scale), bias, dtype)
    x = (5 * torch.randn(2, 7, 640)).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, 24).to(dtype)
    y = layer(x)
    y.backward(grad)
    weight = layer.integers.double() * layer.scale.double()[:, None] / 128
    assert y.dtype == x.grad.dtype == dtype
    assert_close(y, x.double() @ weight.T + bias.double(), length=640, depth=3, dtype=dtype)
    assert_close(x.grad, grad.double() @ weight, length=24, depth=3, dtype=dtype)
    layer.dtype = torch.float64
    assert_close(layer.weight, weight, depth=2, dtype=torch.float32)


def test_a_model_computes_what_a_model_of_its_rounded_weights_computes():
    """With biases, tied and not, before and after the kernels have been put in; the backward pass
    keeps no weight in floats."""
    for changes in ({"model_type": "qwen2", "tie_word_embeddings": True}, {}):
        model = random_model(**changes)
        rounded = copy.deepcopy(model)
        quantize(model)
        for name, layer in model.named_modules():
            if isinstance(layer, Int8Linear):
                rounded.get_submodule(name).weight.data = layer.weight
        found = [name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)]
        assert len(found) == 7 * 3 and type(model.lm_head) is nn.Linear
        tokens = random_tokens(2, 20)
        for one in (model, rounded):
            seed_torch(1)
            randomise_adapters(rosa.attach(one, 4, 8))
        for _ in range(2):
            losses, gradients = [], []
            for one in (model, rounded):
                loss = one.loss(tokens, tokens)
                trained = [p for p in one.parameters() if p.requires_grad]
                losses.append(loss.detach())
                gradients.append(torch.autograd.grad(loss, trained))
            assert_close(*losses, **of_model(model.config))
            for pair in zip(*gradients, strict=True):
                assert_close(*pair, **of_model(model.config, 2))
            for one in (model, rounded):
                kernels.accelerate(one)


def test_a_checkpoint_is_quantised_tensor_by_tensor_as_it_is_read(ckpt, monkeypatch):
    """When a weight is read, those before it are integers already. An edited from_pretrained loads
    the whole model first."""
    in_floats = []
    read = checkpoints.read_tensor

    def counting(stored):
        tensors = [*model_of[0].parameters()] if model_of else []
        in_floats.append(
            sum(
                p.numel()
                for p in tensors
                if not p.is_meta and p.is_floating_point() and p.dim() > 1
            )
        )
        return read(stored)

    model_of = []
    meta_model = checkpoints.meta_model
    monkeypatch.setattr(
        checkpoints, "meta_model", lambda config: model_of.append(meta_model(config)) or model_of[0]
    )
    monkeypatch.setattr(checkpoints, "read_tensor", counting)
    model = checkpoints.load_model("ckpt", dtype=torch.float32, quantization="int8")
    whole = Llama.from_pretrained("ckpt")
    embedding_and_head = whole.lm_head.weight.numel() * 2
    assert max(in_floats) == embedding_and_head
    quantize(whole)
    for (name, one), (other_name, other) in zip(model.named_parameters(), whole.named_parameters()):
        assert name == other_name and torch.equal(one, other)
    monkeypatch.setitem(checkpoints.PLAIN, (Llama, "from_pretrained"), "another")
    edited = checkpoints.load_model("ckpt", dtype=torch.float32, quantization="int8")
    assert isinstance(edited.model.layers[0].mlp.up_proj, Int8Linear)


@pytest.mark.parametrize("options", ["", "--method lora --targets q,v,down --plain"])
def test_training_is_that_of_a_checkpoint_of_rounded_weights(ckpt, options):
    options = [*SHORT_ROSA_RUN, *options.split()]
    run(train, *options, *INT8, "--out", "quantised")
    rounded = checkpoints.load_model("ckpt", dtype=torch.float32, quantization="int8")
    plain = Llama.from_pretrained("ckpt")
    for name, layer in rounded.named_modules():
        if isinstance(layer, Int8Linear):
            plain.get_submodule(name).weight.data = layer.weight
    plain.save_pretrained("ckpt")
    run(train, *options, "--out", "rounded")
    for step, other in zip(read_steps("quantised"), read_steps("rounded"), strict=True):
        # The optimiser divides by the size of a gradient: what rounding changes is a part of it.
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert (
        read_log("quantised", "layers.jsonl")
        and "quantize" in Path("quantised/args.json").read_text()
    )


def test_recomputed_activations_are_the_same_run(ckpt):
    for out, options in (("kept", ()), ("recomputed", ("--checkpoint-activations",))):
        run(train, *SHORT_ROSA_RUN, *INT8, *options, "--out", out)
    kept, recomputed = (
        [step["loss"] for step in read_steps(out)] for out in ("kept", "recomputed")
    )
    assert kept == pytest.approx(recomputed, rel=1e-3)


def test_an_adapter_says_on_which_base_it_was_trained(ckpt, capsys):
    """And is evaluated beside the quantised weights; beside others a line says so."""
    run(train, *SHORT_ROSA_RUN, *INT8, "--out", "out")
    capsys.readouterr()
    common = ("--ckpt", "ckpt", "--adapter", "out", "--device", "cpu", "--dtype", "float32")
    few = ("--max-new-tokens", 4)
    run(eval_script, *common, *INT8, "--limit", 3, *few)
    shown = capsys.readouterr().out
    assert "float32, int8 weights on cpu" in shown and "trained on a base" not in shown
    run(eval_script, *common, "--limit", 3, *few)
    shown = capsys.readouterr().out
    assert (
        "out was trained on a base quantised to int8: with --quantize int8 it is here too" in shown
    )
    assert "0%" not in shown.split("examples")[0]  # the other base's answers are not taken over
    origins = json.loads(Path("out/results.json").read_text())
    assert len(origins["others"]) == 1
    # rosa.load_adapter reads it beside any base
    adapted = rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert any(adapter.B.any() for adapter in rosa.adapters(adapted).values())
    # So do the commands that read an adapter
    Path("other.json").write_text(json.dumps(toy.examples("train", 2)))
    forgetting.run(["other.json", *common, *INT8])
    assert "trained on" not in capsys.readouterr().out
    run(train, *SHORT_ROSA_RUN, "--out", "plain")
    capsys.readouterr()
    run(eval_script, *common[:2], "--adapter", "plain", *common[4:], *INT8, "--limit", 1, *few)
    assert "without --quantize it is not here too" in capsys.readouterr().out


def test_merging_goes_into_the_weights_themselves_and_says_what_that_changes(ckpt, capsys):
    run(train, *SHORT_ROSA_RUN, *INT8, "--out", "out")
    capsys.readouterr()
    run(merge, "--ckpt", "ckpt", "--adapter", "out", "--out", "merged")
    rounding, quantised = capsys.readouterr().out.strip().splitlines()
    assert "trained on a quantised base" in quantised and "moved a logit by" in quantised
    expected = rosa.merge(rosa.load_adapter(Llama.from_pretrained("ckpt"), "out"))
    tokens = random_tokens(2, 20)
    merged = Llama.from_pretrained("merged")
    assert_close(merged(tokens), expected(tokens), **of_model(merged.config))
    # What is said is the difference between the two models
    moved = float(quantised.split("moved a logit by ")[1].split()[0])
    _, after, trained = merge.merge_checkpoint(Path("ckpt"), Path("out"), Path("again"))
    assert moved == pytest.approx((after - trained).abs().max().item(), rel=0.1)
    assert moved > 10 * float(rounding.split("moved a logit by ")[1].split()[0])


def test_what_cannot_be_is_refused_by_name(ckpt):
    model = checkpoints.load_model("ckpt", dtype=torch.float32, quantization="int8")
    rosa.attach(model)
    with pytest.raises(ValueError, match="q_proj: an update cannot be merged into a quantised"):
        rosa.merge(model)
    with pytest.raises(ValueError, match="cannot save .*integers, which Llama"):
        checkpoints.load_model("ckpt", quantization="int8").save_pretrained("other")
    with pytest.raises(UserError, match="--quantize int8 freezes the weights that --method full"):
        train.parse_args([*map(str, SHORT_RUN), *INT8, "--method", "full"])


def test_methods_of_peft_that_read_the_weight_read_the_rounded_one(ckpt):
    pytest.importorskip("peft")
    Path("dora.json").write_text(json.dumps({"use_dora": True, "target_modules": ["q_proj"]}))
    for method, options in (("IA3", ()), ("LORA", ("--peft-config", "dora.json"))):
        run(train, *SHORT_RUN, "--method", f"peft:{method}", *options, *INT8, "--out", method)
        losses = read_validations(method)
        assert losses[6] < losses[0]


def test_a_likelihood_beside_the_quantised_weights(ckpt):
    """The faster engine and the plain one score the same."""
    model = checkpoints.load_model("ckpt", dtype=torch.float32, quantization="int8")
    prompt, ids = random_tokens(20).tolist(), random_tokens(5, seed=1).tolist()
    expected = eval_script.OneByOne.log_likelihoods(model, [prompt], [[ids, ids[:2]]])
    kernels.accelerate(model, inference=True)
    found = inference.log_likelihoods(model, [prompt], [[ids, ids[:2]]])
    assert found[0] == near(expected[0], **of_model(model.config))
