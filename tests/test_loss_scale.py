"""Statements about `extras/loss_scale.py` and about float16: small gradients are kept, large ones
are computed again, and a run is float32's but for rounding."""

import math
from pathlib import Path
from types import MethodType

import pytest
import torch
from helpers import (
    SHORT_ROSA_RUN,
    generator_of,
    random_model,
    random_tokens,
    read_log,
    read_steps,
    run,
)
from rounding import assert_close
from safetensors import safe_open

import rosa
import train
from extras import kernels
from extras.loss_scale import LossScale

FLOAT16 = (*SHORT_ROSA_RUN, "--dtype", "float16")


def with_gradients(model, *values):
    """Give the model's first parameters gradients of these values."""
    for parameter, value in zip(model.parameters(), values):
        parameter.grad = torch.full_like(parameter, value)


def test_in_other_dtypes_the_scale_is_1_and_nothing_is_touched():
    model = random_model()
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(model, dtype)
        with_gradients(model, math.inf, 3.0)
        assert scale.value == 1 and scale.unscale(model, 0.5, 1)
        assert [p.grad.max() for p in model.parameters() if p.grad is not None] == [math.inf, 3]


def test_the_rule_is_that_of_pytorchs_gradscaler(monkeypatch):
    """Beside torch.amp.GradScaler, over steps of which some overflow."""
    monkeypatch.setattr(LossScale, "STEPS_TO_DOUBLE", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    model = random_model()
    scale = LossScale(model, torch.float16)
    parameters = list(model.parameters())[:2]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    scaler.scale(torch.ones(()))
    for finite in [True, False, True, True, True, True, False, False, True, True, True, True]:
        value = 4.0 if finite else math.inf
        with_gradients(model, value, value)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        with_gradients(model, 1.0, value)
        before = scale.value
        assert scale.unscale(model, 0.5, 1) == finite
        assert scale.value == scaler.get_scale()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == (2 if finite else 0)
        if finite:
            assert gradients[1].unique() == 4 / before


def test_at_a_scale_of_1_and_where_the_loss_itself_is_not_finite_nothing_is_computed_again():
    model = random_model()
    scale = LossScale(model, torch.float16)
    with_gradients(model, math.inf)
    assert scale.unscale(model, math.nan, 1) and scale.value == LossScale.FIRST
    scale.value = 1.0
    assert scale.unscale(model, 0.5, 1) and scale.value == 1


@pytest.mark.parametrize("kernel", [False, True])
def test_gradients_that_float16_would_round_to_zero_are_kept(kernel):
    """Those of the norms too, which DLS compares. Without a scale most are lost."""
    tokens = random_tokens(2, 20)
    model, exact = random_model(), random_model()
    norms_and_adapters = {}
    for dtype, one in ((torch.float16, model), (torch.float64, exact)):
        one.to(dtype)
        torch.manual_seed(0)
        rosa.attach(one, 4, 8)
        for adapter in rosa.adapters(one).values():
            torch.nn.init.normal_(adapter.B, std=0.1)
        scale = LossScale(one, dtype)
        if kernel and dtype == torch.float16:
            kernels.accelerate(one)
        for layer in one.model.layers:
            layer.input_layernorm.weight.requires_grad_()
        loss = one.loss(tokens, tokens) / 1e9
        (loss * scale.value).backward()
        assert scale.unscale(one, loss.item(), 1)
        norms_and_adapters[dtype] = [p.grad for p in one.parameters() if p.grad is not None]
    found, wanted = norms_and_adapters[torch.float16], norms_and_adapters[torch.float64]
    assert len(found) == len(wanted) > 6
    for gradient, expected in zip(found, wanted):
        assert gradient.dtype == torch.float32 and expected.abs().median() < 6e-8
        assert_close(gradient, expected, length=97, depth=66, dtype=torch.float16)


def test_a_step_with_too_large_a_gradient_is_computed_again_and_logged_once(
    ckpt, monkeypatch, capsys
):
    """It is then the step of a run that began with that scale."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**40)
    run(train, *FLOAT16, "--out", "halved")
    shown = capsys.readouterr().out
    again = [line for line in shown.splitlines() if "too large for float16" in line]
    assert len(again) > 3 and again[0].startswith("step     1 ")
    assert [record["step"] for record in read_steps("halved")] == [1, 2, 3, 4, 5, 6]
    settled = float(again[-1].split()[-1].replace(",", ""))
    if all(line.startswith("step     1 ") for line in again):
        monkeypatch.setattr(LossScale, "FIRST", settled)
        run(train, *FLOAT16, "--out", "settled")
        for file in ("adapter_model.safetensors", "layers.jsonl"):
            assert Path("halved", file).read_bytes() == Path("settled", file).read_bytes()
    with safe_open("halved/state.safetensors", framework="pt") as state:
        assert f'"loss_scale": [{settled}, ' in state.metadata()["progress"]


def test_a_resumed_run_has_the_scale_of_the_one_that_it_continues(ckpt, monkeypatch):
    monkeypatch.setattr(LossScale, "STEPS_TO_DOUBLE", 2)
    options = [*FLOAT16, "--save-every", 3]
    run(train, *options, "--out", "whole")
    with monkeypatch.context() as patch:
        save = train.runs.Run.save_state

        def stop_after_three(self, step):
            save(self, step)
            if step == 3:
                raise KeyboardInterrupt

        patch.setattr(train.runs.Run, "save_state", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(train, *options, "--out", "resumed")
    run(train, *options, "--out", "resumed", "--resume")
    for file in ("state.safetensors", "adapter_model.safetensors", "layers.jsonl"):
        assert Path("whole", file).read_bytes() == Path("resumed", file).read_bytes()


def test_a_run_is_that_of_float32_but_for_rounding(ckpt):
    for dtype in ("float16", "float32"):
        run(train, *SHORT_ROSA_RUN, "--dtype", dtype, "--out", dtype)
    half, full = ([step["loss"] for step in read_steps(d)] for d in ("float16", "float32"))
    assert half == pytest.approx(full, rel=0.02) and half != full


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--plain",), ("--quantize", "int8")])
def test_thirty_steps_are_those_of_float32_within_two_per_cent(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    common = "--ckpt tiny --max-steps 30 --batch-size 2 --val-size 4 --device cpu --rank 8"
    losses = {}
    for dtype in ("float16", "float32"):
        run(train, *common.split(), *options, "--dtype", dtype, "--out", dtype, "--eval-every", 30)
        losses[dtype] = [record["loss"] for record in read_steps(dtype)]
    assert len(losses["float16"]) == 30
    for half, full in zip(losses["float16"], losses["float32"], strict=True):
        assert half == pytest.approx(full, rel=0.02)
    scores = [read_log(dtype, "layers.jsonl")[0]["scores"] for dtype in losses]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_scores_that_float16_cannot_hold_are_computed_in_float32():
    """By the kernel and by the plain method, with a cache and without one."""
    for seed, mask in ((0, None), (1, torch.ones(1, 1, 20, 20, dtype=torch.bool).tril())):
        attention = random_model(seed=seed).model.layers[0].self_attn
        generator = generator_of(seed)
        q, k, v = (torch.randn(2, heads, 20, 8, generator=generator) for heads in (4, 2, 2))
        q, k = 300 * q.half(), 300 * k.half()
        expected = attention.attend(q.double(), k.double(), v.half().double(), mask)
        for attend in (attention.attend, MethodType(kernels.attend, attention)):
            y = attend(q.requires_grad_(), k, v.half(), mask)
            assert_close(y, expected, length=20, depth=4, dtype=torch.float16)
