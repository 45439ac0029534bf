"""Statements about RoAE: which dimensions it moves, what it leaves alone, how it merges, saves and
loads."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OFFSET,
    assert_same_tensors,
    random_model,
    random_tokens,
    randomise_adapters,
    seed_torch,
)
from rounding import assert_close, of_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from extras.kernels import accelerate
from model import rope_table, rotate
from rosa import (
    TARGETS,
    RoAE,
    adapters,
    attach,
    attach_arguments,
    load_adapter,
    merge,
    save_adapter,
)

pytestmark = pytest.mark.numeric
# low_freq_ratio -> the adapted rows of a projection with 2 heads of d = 8. A pair is the rows
# (i, i + 4) of a head, and the slow pairs are the last.
LOW = {
    0.25: [3, 7, 11, 15],
    0.5: [2, 3, 6, 7, 10, 11, 14, 15],
    0.01: [3, 7, 11, 15],
    1.0: list(range(16)),
}
ALL = "q,k,v,o,gate,up,down"


@pytest.mark.parametrize("ratio", LOW)
def test_only_the_slow_pairs_of_every_head_are_adapted(ratio):
    seed_torch(0)
    linear, x = nn.Linear(5, 16), torch.randn(7, 5)
    adapter = RoAE(linear, num_heads=2, rank=3, alpha=6, low_freq_ratio=ratio)
    assert (
        adapter.rows.tolist() == LOW[ratio]
        and adapter.B.shape == (len(LOW[ratio]), 3)
        and adapter.A.shape == (3, 5)
    )
    nn.init.normal_(adapter.B)
    expected = linear(x)
    expected[:, LOW[ratio]] += 2 * x @ adapter.A.T @ adapter.B.T
    assert_close(adapter(x), expected, length=5, depth=3)


@pytest.mark.parametrize("ratio", LOW)
@pytest.mark.parametrize("pairs", ["low", "high", "random"])
def test_the_ablations_adapt_as_many_other_pairs(ratio, pairs):
    # A projection with 2 heads of d = 32
    adapter = RoAE(nn.Linear(5, 64), 2, rank=3, alpha=6, low_freq_ratio=ratio, pairs=pairs)
    rows = adapter.rows.view(2, 2, -1)  # [heads, halves of a pair, pairs]
    n = max(1, round(ratio * 16))
    assert torch.equal(
        rows[:, 0] + 16, rows[:, 1]
    ) and rows.numel() == rows.unique().numel() == 4 * n == len(adapter.B)
    chosen = [set((head[0] % 32).tolist()) for head in rows]
    low, high = set(range(16 - n, 16)), set(range(n))
    if pairs != "random":
        assert chosen == [{"low": low, "high": high}[pairs]] * 2
    elif 1 < n < 16:  # if all 16 pairs are adapted, there is no choice
        assert chosen[0] != chosen[1] and low not in chosen and high not in chosen


@pytest.mark.parametrize("pairs", ["high", "random"])
def test_the_ablations_merge_save_and_load(tmp_path, pairs):
    model, tokens = (
        randomise_adapters(attach(random_model(), 4, 8, 0.5, "q,k,v", pairs)),
        random_tokens(2, 20),
    )
    adapted = model(tokens)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(random_model(), tmp_path)(tokens), adapted)
    with pytest.raises(
        ValueError, match=rf"has .*'pairs': '{pairs}'.*, the adapters of the model have .*'low'"
    ):
        load_adapter(attach(random_model(), 4, 8, 0.5, "q,k,v"), tmp_path)
    assert_close(merge(model)(tokens), adapted, **of_model(model.config))


@pytest.mark.parametrize(
    "ratio, pairs", [*((ratio, "low") for ratio in LOW), (0.5, "high"), (0.5, "random")]
)
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_gradients_are_those_of_the_dense_update(ratio, pairs, input_needs_gradient):
    seed_torch(0)
    linear, x = (
        nn.Linear(5, 16).requires_grad_(False),
        torch.randn(2, 7, 5, requires_grad=input_needs_gradient),
    )
    adapter = RoAE(linear, 2, rank=3, alpha=6, low_freq_ratio=ratio, pairs=pairs)
    nn.init.normal_(adapter.B)
    wanted = [adapter.A, adapter.B] + [x] * input_needs_gradient
    coefficients = torch.randn(2, 7, 16)
    scatter = torch.eye(16)[:, LOW[ratio] if pairs == "low" else adapter.rows]  # [16, rows]
    dense = F.linear(x, linear.weight + 2 * scatter @ adapter.B @ adapter.A, linear.bias)
    expected = torch.autograd.grad((dense * coefficients).sum(), wanted)
    found = torch.autograd.grad((adapter(x) * coefficients).sum(), wanted)
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs, length=16, depth=3)


@pytest.mark.parametrize("faster", [lambda model: None, accelerate], ids=["plain", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.25, ALL)])
def test_at_step_0_the_adapted_model_is_the_base_model_to_the_bit(dtype, ratio, targets, faster):
    base, model, tokens = random_model(dtype=dtype), random_model(dtype=dtype), random_tokens(2, 30)
    attach(model, rank=4, alpha=8, low_freq_ratio=ratio, targets=targets)
    faster(base), faster(model)
    assert torch.equal(model(tokens), base(tokens))  # B = 0: sums of zeros, and y + 0 is y
    randomise_adapters(model)
    assert not torch.equal(model(tokens), base(tokens))


def outputs_of_projections(model, tokens):
    outputs = {}

    def recording(name):
        return lambda module, inputs, output: outputs.update({name: output.detach().clone()})

    projections = [
        (name, m) for name, m in model.model.layers[0].named_modules() if name.endswith("_proj")
    ]
    hooks = [module.register_forward_hook(recording(name)) for name, module in projections]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return outputs


def test_trained_adapters_change_the_low_frequency_dimensions_of_q_and_k_alone(model):
    tokens = random_tokens(2, 30)
    before = outputs_of_projections(model, tokens)
    randomise_adapters(attach(model, rank=4, alpha=8, low_freq_ratio=0.25))
    after = outputs_of_projections(model, tokens)
    changed = {
        name: (after[name] != before[name]).any(dim=(0, 1)).nonzero().flatten().tolist()
        for name in before
    }
    # 4 heads of d = 8, one pair each
    assert changed["self_attn.q_proj"] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert changed["self_attn.k_proj"] == [3, 7, 11, 15]  # 2 heads
    assert changed["self_attn.v_proj"] == []


def test_scores_depend_on_relative_position_only():
    seed_torch(0)
    model = randomise_adapters(
        attach(random_model(dtype=torch.float64), rank=4, alpha=8, low_freq_ratio=0.5)
    )
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 10, 32, dtype=torch.float64)

    def scores(first_position):
        cos, sin = rope_table(first_position + torch.arange(10), model.inv_freq)
        projections = attention.q_proj, attention.k_proj
        q, k = (
            rotate(project(x).view(1, 10, -1, 8).transpose(1, 2), cos, sin)
            for project in projections
        )
        return q @ k.repeat_interleave(2, dim=1).transpose(2, 3)

    # In float32 the angle of position 1,009 is off by 1,009 radians' rounding, and turns q and k
    # apart by that much.
    off = (scores(0) - scores(1000)).abs().max()
    assert off < 1009 * torch.finfo(torch.float32).eps * scores(0).abs().max()
    assert (scores(0) - scores(0).mean()).abs().max() > 1


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "qwen2"}, {"attention_bias": True, "mlp_bias": True}]
)
@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.5, "k,v,down")])
def test_merged_equals_unmerged_and_its_layers_are_those_from_before(changes, ratio, targets):
    model, tokens = random_model(**changes), random_tokens(2, 30)
    base, modules = model(tokens), list(model.named_modules())
    adapted = randomise_adapters(attach(model, 4, 8, ratio, targets))(tokens)
    assert all(adapter.linear is dict(modules)[name] for name, adapter in adapters(model).items())
    merged = merge(model)(tokens)
    assert (adapted - base).abs().max() > 0.1
    assert_close(merged, adapted, **of_model(model.config))
    assert list(model.named_modules()) == modules


def test_merging_into_bfloat16_rounds_each_weight_once():
    exact = randomise_adapters(attach(random_model(), 4, 8, 0.25))
    rounded = attach(random_model(dtype=torch.bfloat16), 4, 8, 0.25)
    with torch.no_grad():
        for a, b in zip(adapters(exact).values(), adapters(rounded).values()):
            a.linear.weight.copy_(b.linear.weight), b.A.copy_(a.A), b.B.copy_(a.B)
    merge(exact), merge(rounded)
    for a, b in zip(exact.parameters(), rounded.parameters()):
        if a.shape == (32, 32) or a.shape == (16, 32):
            assert (
                torch.equal(a.to(torch.bfloat16), b)
                or (a - b.float()).abs().max() <= a.abs().max() / 2**8
            )
    q = rounded.model.layers[0].self_attn.q_proj.weight
    # To the bit: both sums are made in float32
    assert torch.equal(q, exact.model.layers[0].self_attn.q_proj.weight.to(torch.bfloat16))


def test_merging_into_float64_adds_up_in_float64_and_leaves_the_other_rows_as_they_are():
    model = randomise_adapters(attach(random_model(dtype=torch.float64), 4, 8, 0.25))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-12  # digits that float32 does not have
    adapter = next(iter(adapters(model).values()))
    weight, expected = adapter.linear.weight, adapter.linear.weight.clone()
    expected[adapter.rows] += ((adapter.alpha / adapter.rank) * adapter.B @ adapter.A).detach()
    merge(model)
    assert torch.equal(weight, expected)  # the same operations on the same values


class Float32Outputs(TorchDispatchMode):
    sizes = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.sizes += (out.numel(),)
        return out


def test_adapters_are_float32_masters_and_activations_are_never_cast():
    linear = nn.Linear(32, 32, dtype=torch.bfloat16).requires_grad_(False)
    adapter, x = RoAE(linear, 4, rank=2, alpha=4), torch.randn(1, 500, 32).bfloat16()
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    with Float32Outputs() as seen:
        assert adapter(x).dtype == torch.bfloat16
    assert seen.sizes and max(seen.sizes) < 500 * 2


def test_the_number_of_trainable_parameters_and_their_names(model):
    attach(model, rank=5, alpha=1, low_freq_ratio=0.5)  # D = 32, d = 8, n = 2, H = 4, K = 2
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == 3 * 5 * (2 * 32 + 2 * 2 * (4 + 2))
    assert trainable.keys() == {f"{name}.{factor}" for name in adapters(model) for factor in "AB"}


REFUSED = [
    ({"rank": 0}, "rank"),
    ({"rank": 1.5}, "rank"),
    ({"alpha": 0}, "alpha"),
    ({"alpha": math.nan}, "alpha"),
]
REFUSED += [({"low_freq_ratio": 0}, "low_freq_ratio"), ({"low_freq_ratio": 1.1}, "low_freq_ratio")]
REFUSED += [({"targets": "q,x"}, "target 'x'"), ({"targets": ""}, "target ''")]
REFUSED += [
    ({"pairs": pairs}, f"pairs must be low, high or random, not '{pairs}'")
    for pairs in ("slow", "all")
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_settings_outside_their_range_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(model, **arguments)


@pytest.mark.parametrize("targets", ["q,k,down", "down,k,q"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_seed_decides_the_adapters_drawn_on_the_cpu_by_layers_and_targets_whatever_their_order(
    targets, device
):
    model = random_model().to(device)
    seed_torch(0)
    attach(model, 4, targets=targets)
    state = torch.get_rng_state()
    seed_torch(0)
    for layer in model.model.layers:
        for target in (target for target in TARGETS if target in targets.split(",")):
            A = layer.get_submodule(TARGETS[target]).A
            drawn = nn.init.kaiming_uniform_(torch.empty(A.shape), a=math.sqrt(5))
            assert A.is_meta or torch.equal(A, drawn)
    # No other random numbers were drawn, whatever device the model is on
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_takes_one_set_of_adapters(model):
    with pytest.raises(ValueError, match="merge"):
        attach(attach(model))


# --- files ---


@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.5, "q,v")])
def test_a_saved_adapter_loads_to_the_bit(tmp_path, ratio, targets):
    trained = randomise_adapters(attach(random_model(), 4, 6.5, ratio, targets))
    save_adapter(trained, tmp_path)
    tokens = random_tokens(2, 20)
    for model in (random_model(), attach(random_model(), 4, 6.5, ratio, targets)):
        assert_same_tensors(load_adapter(model, tmp_path), trained)
        assert torch.equal(model(tokens), trained(tokens))  # the same operations on the same values
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_file_is_a_peft_lora_with_zero_rows_outside_the_low_frequencies(tmp_path, model):
    save_adapter(randomise_adapters(attach(model, 4, 8, 0.25)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    assert B.shape == (16, 4) and B.any(dim=1).nonzero().flatten().tolist() == [3, 7, 11, 15]
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (
        4,
        32,
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (
        4,
        8,
        ["q_proj", "k_proj"],
    )
    metadata = {
        "rank": 4,
        "alpha": 8,
        "low_freq_ratio": 0.25,
        "targets": ["q", "k"],
        "pairs": "low",
    }
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rosa"]) == metadata == attach_arguments(model)


def test_an_adapter_with_other_settings_is_refused_and_the_difference_named(tmp_path):
    save_adapter(attach(random_model(), 4, 8, 0.25), tmp_path)
    has, have = (
        rf"'rank': {rank}, .*'low_freq_ratio': {ratio}" for rank, ratio in ((4, 0.25), (5, 0.5))
    )
    with pytest.raises(ValueError, match=rf"has .*{has}.* the adapters of the model have .*{have}"):
        load_adapter(attach(random_model(), 5, 8, 0.5), tmp_path)


def test_a_parameter_that_trains_and_would_be_lost_is_refused(tmp_path):
    model = attach(random_model(), 4, 8)
    model.model.layers[1].self_attn.head_scale = nn.Parameter(torch.ones(4))
    with pytest.raises(
        ValueError,
        match="model.layers.1.self_attn.head_scale trains, and save_adapter would lose it",
    ):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.requires_grad_(False)
    save_adapter(model, tmp_path)


OTHER_MODELS = [
    (
        {"num_hidden_layers": 4},
        r"layers.3.self_attn.q_proj.lora_A.weight is absent, this one needs \[4, 32\]",
    ),
    ({"num_hidden_layers": 2}, r"model.model.layers.2.* is \[4, 32\], this one needs absent"),
    ({"hidden_size": 16}, r"is \[4, 32\], this one needs \[4, 16\]"),
]


@pytest.mark.parametrize("changes, message", OTHER_MODELS)
def test_an_adapter_for_another_model_is_refused_and_nothing_changed(tmp_path, changes, message):
    save_adapter(randomise_adapters(attach(random_model(), 4, 8)), tmp_path)
    other = random_model(**changes)
    before = other(random_tokens(1, 9))
    with pytest.raises(ValueError, match=f"was trained on another model: .*{message}"):
        load_adapter(other, tmp_path)
    assert torch.equal(other(random_tokens(1, 9)), before) and not adapters(other)


STRICT = {
    "another alpha": ({"lora_alpha": 9.0}, "adapter_config.json is not what save_adapter has"),
    "a field of PEFT's": ({"use_dora": True}, "adapter_config.json is not what save_adapter has"),
    "no metadata": ({}, "was not written by save_adapter: extras.adapters.load_adapter reads the"),
}


@pytest.mark.parametrize("changes, message", STRICT.values(), ids=STRICT)
def test_what_save_adapter_has_not_written_is_refused(tmp_path, changes, message):
    save_adapter(randomise_adapters(attach(random_model(), 4, 8)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    if not changes:
        file = tmp_path / "adapter_model.safetensors"
        save_file(load_file(file), file)
    with pytest.raises(ValueError, match=message):
        load_adapter(random_model(), tmp_path)
    # The base may be named otherwise: it may have been moved.
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "elsewhere"})
    )
    if changes:
        load_adapter(random_model(), tmp_path)


@pytest.mark.parametrize("pairs", ["low", "high", "random"])
def test_an_adapter_that_the_older_version_wrote_computes_what_it_did_there(pairs):
    """The files in fixtures/ are those of commit 615b3c4, and so are the logits beside them."""
    fixtures = Path(__file__).parent / "fixtures"
    stored, model = load_file(fixtures / "logits.safetensors"), random_model(-OFFSET)
    base = model(stored["tokens"])
    logits = load_adapter(model, fixtures / pairs)(stored["tokens"])
    assert_close(logits, stored[pairs], **of_model(model.config))
    assert (logits - base).abs().max() > 0.1 and attach_arguments(model)["pairs"] == pairs
