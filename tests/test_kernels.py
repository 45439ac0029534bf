"""Statements about `extras/kernels.py` and `extras/operators.py`: the same as model.py and rosa.py,
or not at all."""

import copy
import functools
import itertools
import runpy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    generator_of,
    random_model,
    random_tokens,
    randomise_adapters,
    without_operators,
)
from rounding import assert_close, assert_greedy, assert_no_worse, bound, of_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eval as eval_script
import rosa
from extras import inference, kernels, merge
from extras.kernels import KERNELS, SummedCrossEntropy, accelerate
from extras.operators import Operators
from extras.source import fingerprint
from model import MLP, Attention, Llama, RMSNorm
from rosa import attach

pytestmark = pytest.mark.numeric
TOKENS, LABELS = (
    random_tokens(2, 20),
    random_tokens(2, 20, seed=3).index_fill(1, torch.arange(0, 20, 3), -100),
)
PROMPTS = [row[: 5 + 7 * i].tolist() for i, row in enumerate(TOKENS)]


def adapted(ratio=0.5, pairs="low", **changes):
    """A model with adapters. No weight, bias or B in it is 0 or 1, so that each of them matters."""
    return randomise_adapters(attach(random_model(**changes), 4, 8, ratio, "q,k,v,up", pairs))


def results(model):
    """Logits, the loss and its gradients."""
    loss = model.loss(TOKENS, LABELS)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return model(TOKENS).detach(), loss.detach(), *gradients


def assert_same_results(model, expected, before=None):
    """A model computes what is expected; and that is not what it computed `before`, if this is
    given."""
    for result, wanted in zip(results(model), expected, strict=True):
        assert_close(result, wanted, **of_model(model.config, 2))
    assert not before or any(
        (old - new).norm() > 0.1 * old.norm() for old, new in zip(before, expected)
    )


def test_the_fingerprints_are_those_of_the_files():
    tables = [kernel.fingerprints for kernel in KERNELS] + [
        inference.PLAIN,
        inference.LIKELIHOODS,
        merge.MERGED,
    ]
    tables.append({(eval_script, "log_likelihood"): inference.LOG_LIKELIHOOD})
    for (owner, name), expected in itertools.chain(*(table.items() for table in tables)):
        found = fingerprint(getattr(owner, name))
        method = f"{owner.__name__}.{name}"
        advice = (
            f"{method} has been edited, and what stood for it in extras/ stands for it no "
            "longer: it runs as written."
        )
        advice += (
            " That is as it should be. To speed it up again change its kernel too, and "
            f"write {found!r} there"
        )
        assert found == expected, advice


@pytest.mark.parametrize("kind", ["wrapped", "builtin", "partial", "unreadable"])
def test_what_is_no_plain_function_counts_as_edited(tmp_path, monkeypatch, kind):
    wrapped = functools.wraps(RMSNorm.forward)(lambda self, x: x)
    others = {"wrapped": wrapped, "builtin": torch.rsqrt, "partial": partial(RMSNorm.forward)}
    (tmp_path / "file.py").write_text("def method(self, x):\n    return x\n")
    unreadable = runpy.run_path(str(tmp_path / "file.py"))["method"]
    # Somebody is typing in the file: it is no valid Python now
    (tmp_path / "file.py").write_text("\n\ndef method(self, x):\n    return (x\n")
    monkeypatch.setattr(RMSNorm, "forward", others.get(kind) or unreadable)
    exchanged, left = accelerate(random_model())
    assert (
        "RMSNorm.forward" in left
        and "RMSNorm.forward" not in exchanged
        and "MLP.forward" in exchanged
    )


EDITED = [
    *((cls, "forward") for cls in (RMSNorm, MLP, nn.Linear)),
    (Attention, "attend"),
    (Llama, "loss"),
]


@pytest.mark.parametrize("cls, name", [*EDITED, (Llama, "logits")])
def test_an_edited_method_runs_as_written_and_a_line_names_it(monkeypatch, capsys, cls, name):
    Operators.look_up()
    monkeypatch.setattr("platform.machine", lambda: "one of which no line is printed")
    model, plain = adapted(), getattr(cls, name)
    before = results(model)
    monkeypatch.setattr(cls, name, lambda self, *args: -1.5 * plain(self, *args))
    expected = results(model)
    accelerate(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(f"{cls.__name__}.{name} has been edited" in line for line in lines)
    assert_same_results(model, expected, before)
    assert_greedy(model, PROMPTS, inference.generate(model, PROMPTS, 5, None), 5)


def test_what_runs_is_said_in_one_line(capsys):
    kernels.say_what_runs(["MLP.forward", "RMSNorm.forward"], ["Llama.generate"])
    kernels.say_what_runs(["MLP.forward"])
    kernels.say_what_runs([])
    both, one = capsys.readouterr().out.splitlines()
    assert both == (
        "kernels    extras/kernels.py stands for MLP.forward, RMSNorm.forward; "
        "extras/inference.py stands for "
        "Llama.generate. --plain runs them as written"
    )
    assert (
        one == "kernels    extras/kernels.py stands for MLP.forward. --plain runs them as written"
    )


def test_methods_are_exchanged_in_modules_of_this_very_class_alone_and_nothing_else_changes():
    model, outputs = adapted(), []
    first, second, third = model.model.layers
    # A subclass may compute anything
    first.input_layernorm = type("Norm", (RMSNorm,), {})(32, 1e-5)
    # A linear layer inside another module, as the package peft has it, may be called in any way
    second.self_attn.o_proj = nn.Sequential(second.self_attn.o_proj)
    third.mlp.register_forward_hook(lambda *args: None)
    third.self_attn.q_proj.linear.register_forward_hook(lambda module, args, y: outputs.append(y))
    left = [first.input_layernorm, second.self_attn.o_proj[0], third.mlp, third.self_attn.q_proj]
    left.append(third.self_attn.q_proj.linear)
    expected = results(model)
    model.loss(TOKENS, LABELS).backward()
    parameters, state = dict(model.named_parameters()), torch.get_rng_state()
    grads = {name: (p.grad, p.grad.clone()) for name, p in parameters.items() if p.requires_grad}
    exchanged = accelerate(model)[0]
    assert torch.equal(torch.get_rng_state(), state) and isinstance(model.lm_head, nn.Linear)
    for name, parameter in model.named_parameters():
        assert parameter is parameters.pop(name) and parameter.requires_grad == (name in grads)
        assert name not in grads or parameter.grad is grads[name][0] and torch.equal(*grads[name])
    assert not parameters
    for kernel, module in itertools.product(KERNELS, model.modules()):
        if type(module) is kernel.cls and f"{kernel.cls.__name__}.{kernel.name}" in exchanged:
            assert (kernel.name in vars(module)) == all(module is not other for other in left)
    assert not any(
        set(vars(module)) & {"forward", "attend"} for module in (*left, *random_model().modules())
    )
    assert_same_results(model, expected)
    # The hook has seen what the linear layer returned, to which nothing was added in place
    assert_close(outputs[-1], outputs[0], **of_model(model.config))
    forward = model.model.norm.forward
    # A second call changes nothing
    assert accelerate(model)[0] == [] and model.model.norm.forward is forward


CHANGES = {
    "hook": lambda model: model.lm_head.register_forward_hook(lambda module, args, y: -2 * y),
    "bias": lambda model: setattr(
        model.lm_head, "bias", nn.Parameter(torch.linspace(-9, 9, 97), False)
    ),
    "forward": lambda model: setattr(
        model.lm_head, "forward", lambda x: -2 * x @ model.lm_head.weight.T
    ),
    "logits": lambda model: setattr(model, "logits", lambda x: -2 * model.lm_head(x)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_logits_of_this_very_model_decides_its_loss(change):
    model = adapted()
    before = results(model)
    CHANGES[change](model)
    expected = results(model)
    accelerate(model)
    assert_same_results(model, expected, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [adapted, random_model])
def test_packed_weights_compute_the_same_and_are_neither_trained_nor_merged_nor_saved(
    tmp_path, make, tied, dtype
):
    """The weights are packed where oneDNN takes their dtype on this processor; elsewhere they stay
    as they are."""
    model = make(tie_word_embeddings=tied, dtype=dtype)
    logits, exact, embedding = (
        model(TOKENS),
        copy.deepcopy(model).double()(TOKENS),
        model.model.embed_tokens.weight,
    )
    before = embedding.clone()
    for _ in range(2):  # a second call changes nothing
        accelerate(model, inference=True)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 7 * 3 + 1 and {weight.is_mkldnn for weight in weights} == {
        dtype in Operators.onednn
    }
    assert_no_worse(model(TOKENS), logits, exact)
    assert_greedy(model, PROMPTS, inference.generate(model, PROMPTS, 8, None), 8)
    assert model.model.embed_tokens.weight is embedding and torch.equal(embedding, before)
    if dtype in Operators.onednn:
        with pytest.raises(RuntimeError):
            model.loss(TOKENS, LABELS).backward()
        with pytest.raises((RuntimeError, ValueError)):
            rosa.merge(model) if make is adapted else model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def of(name, model, x):
    return model.get_submodule(name)(x)


def loss(rows, model, x):
    SummedCrossEntropy.SLICE, model.hidden_states = rows * 97, lambda tokens: x
    return model.loss(TOKENS, LABELS)


def attend(kind, model, q, k, v):
    T, S = q.shape[2], k.shape[2]
    hidden = torch.ones(2, 1, T, S, dtype=torch.bool).triu(S - T + 1)
    hidden[1, ..., : S - T] = kind == "float"  # in this mask the two rows see different positions
    masks = {
        "bool": ~hidden[:1],
        "float": torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, -torch.inf),
    }
    return model.model.layers[0].self_attn.attend(q, k, v, masks.get(kind))


ATTENTION, MLPS, X = "model.layers.0.self_attn", partial(of, "model.layers.0.mlp"), (2, 20, 32)
CASES = {  # name -> (changes of the model, what is called, the shapes of its inputs)
    "Linear": ({}, partial(of, "lm_head"), X),
    "Linear, bias": ({"attention_bias": True}, partial(of, f"{ATTENTION}.o_proj"), (5, 32)),
    "RMSNorm": ({}, partial(of, "model.norm"), X),
    "MLP": ({}, MLPS, X),
    "MLP, biases": ({"mlp_bias": True}, MLPS, (2, 1, 20, 32)),
    **{f"loss, {rows} rows": ({}, partial(loss, rows), X) for rows in (5, 1000)},
}
for case in ("Linear", "RMSNorm", "MLP"):
    CASES[f"{case}, a vector"] = (*CASES[case][:2], (32,))
# 20 tokens are below kernels.SHORT, and 50 above
for kind, T in itertools.product(("no", "bool", "float"), (20, 50)):
    keys = (2, 2, T if kind == "no" else T + 9, 8)
    CASES[f"attend, {kind} mask, {T}"] = ({}, partial(attend, kind), (2, 4, T, 8), keys, keys)
for heads, T in ((1, 20), (4, 1), (2, 20)):
    CASES[f"attend, {heads} heads of keys, {T}"] = (
        {},
        partial(attend, "no"),
        (2, 4, T, 8),
        *[(2, heads, T, 8)] * 2,
    )


def outcome(model, call, inputs, inputs_ask, weights_ask):
    """The value of a call, and the gradients of all tensors that require one."""
    model.requires_grad_(weights_ask)
    inputs = [x.to(model.dtype, copy=True).requires_grad_(inputs_ask) for x in inputs]
    with torch.inference_mode(not inputs_ask and not weights_ask):
        y = call(model, *inputs)
    wanted = [
        tensor
        for tensor in (*inputs, *model.parameters())
        if tensor.requires_grad and y.requires_grad
    ]
    grad = torch.randn(y.shape, generator=generator_of(9)).to(y.dtype)
    grads = torch.autograd.grad(y, wanted, grad, allow_unused=True) if wanted else ()
    return [y.detach(), *(each for each in grads if each is not None)]


@pytest.mark.parametrize("operators", ["as found", "absent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_its_plain_method(monkeypatch, case, dtype, operators):
    """The kernel's result and gradients are as near to those in float64 as the plain method's are,
    whether inputs, weights, both or neither require a gradient."""
    if operators == "absent":
        without_operators(monkeypatch)
    monkeypatch.setattr(kernels, "SHORT", 40)
    monkeypatch.setattr(SummedCrossEntropy, "SLICE", None)
    changes, call, *shapes = CASES[case]
    plain = adapted(dtype=dtype, num_hidden_layers=1, **changes)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    # Only the kernel of Linear.forward needs something that a machine may lack
    assert set(accelerate(fast)[1]) <= {"Linear.forward"}
    for scale, *asking in itertools.product((0.02, 1, 10), (False, True), (False, True)):
        inputs = [
            (scale * torch.randn(shape, generator=generator_of(i))).to(dtype)
            for i, shape in enumerate(shapes)
        ]
        if "2 heads of keys" in case:
            # A large bias, as Qwen2.5 has
            inputs[1] += 10 * torch.randn(8, generator=generator_of(9))
        outcomes = [outcome(model, call, inputs, *asking) for model in (fast, plain, exact)]
        for result, usual, expected in zip(*outcomes, strict=True):
            off, usual = (
                (tensor.double() - expected.double()).norm() for tensor in (result, usual)
            )
            # The loss is one number: by luck the plain method's error may be zero
            share = bound(dtype if result.numel() == 1 else torch.float32, 97, 3)
            assert off <= 4 * usual + share * expected.double().norm(), (scale, asking, off, usual)


@pytest.mark.parametrize("kind", ["no", "bool", "float"])
def test_attention_takes_a_result_in_any_layout(monkeypatch, kind):
    """On a GPU PyTorch's result [B, H, T, d] may lie in memory as [B, T, H, d]."""
    monkeypatch.setattr(kernels, "SHORT", 0)
    attention = F.scaled_dot_product_attention

    def as_on_a_gpu(*inputs, **options):
        return attention(*inputs, **options).transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator_of(heads)) for heads in (4, 2, 2))
    model = adapted(num_hidden_layers=1)
    accelerate(model)
    expected = attend(kind, model, q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)
    assert torch.equal(attend(kind, model, q, k, v), expected)


def test_the_statistic_of_a_norm_is_float32():
    norm, x = (
        RMSNorm(64, 1e-5).bfloat16(),
        torch.randn(50, 64, generator=generator_of(0)).bfloat16(),
    )
    nn.init.uniform_(norm.weight, generator=generator_of(1))
    expected = (
        x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    ).bfloat16() * norm.weight
    # About one product in 10,000 lies so near the middle between two bfloat16 numbers that float32
    # rounds it to the other one: that is the ratio of the two eps. If the mean of the squares were
    # computed in bfloat16, every second product would be rounded to another number.
    for forward in (RMSNorm.forward, kernels.rms_norm_forward):
        assert (forward(norm, x) != expected).float().mean() < 0.01


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("slice_size", [8 * 5000, 10])  # 8 rows, and one
def test_no_tensor_holds_the_logits_of_all_positions(monkeypatch, slice_size):
    monkeypatch.setattr(SummedCrossEntropy, "SLICE", slice_size)
    model, tokens = (
        attach(random_model(vocab_size=5000), rank=2),
        random_tokens(4, 50, vocab_size=5000),
    )
    expected = model.loss(tokens, tokens)
    accelerate(model)
    with LargestTensor() as largest:
        (loss := model.loss(tokens, tokens)).backward()
    assert largest.numel == 5000 * 32  # the vocabulary projection's weight, transposed
    assert_close(loss, expected, **of_model(model.config, 2))
