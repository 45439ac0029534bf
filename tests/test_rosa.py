"""Statements about RoAE: which dimensions it moves, what it leaves alone, how it merges, saves and loads."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, random_tokens, randomise_adapters, seed_torch
from rounding import assert_close, assert_greedy, assert_no_worse, of_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import Operators, rope_table, rotate
from rosa import RoAE, adapters, attach, load_adapter, merge, save_adapter

pytestmark = pytest.mark.numeric
# Rows of a projection with 2 heads of d = 8: pairs (i, i + 4), the slow ones last.
LOW = {0.25: [3, 7, 11, 15], 0.5: [2, 3, 6, 7, 10, 11, 14, 15], 0.01: [3, 7, 11, 15], 1.0: list(range(16))}
ALL = "q,k,v,o,gate,up,down"


@pytest.mark.parametrize("ratio", LOW)
def test_only_the_slow_pairs_of_every_head_are_adapted(ratio):
    seed_torch(0)
    linear, x = nn.Linear(5, 16), torch.randn(7, 5)
    adapter = RoAE(linear, num_heads=2, rank=3, alpha=6, low_freq_ratio=ratio)
    assert adapter.rows.tolist() == LOW[ratio] and adapter.B.shape == (len(LOW[ratio]), 3) and adapter.A.shape == (3, 5)
    nn.init.normal_(adapter.B)
    expected = linear(x)
    expected[:, LOW[ratio]] += 2 * x @ adapter.A.T @ adapter.B.T
    assert_close(adapter(x), expected, length=5, depth=3)


@pytest.mark.parametrize("ratio", LOW)
@pytest.mark.parametrize("pairs", ["low", "high", "random"])
def test_the_ablations_adapt_as_many_other_pairs(ratio, pairs):
    adapter = RoAE(nn.Linear(5, 64), 2, rank=3, alpha=6, low_freq_ratio=ratio, pairs=pairs)  # 2 heads of d = 32
    rows = adapter.rows.view(2, 2, -1)  # [heads, halves of a pair, pairs]
    n = max(1, round(ratio * 16))
    assert torch.equal(rows[:, 0] + 16, rows[:, 1]) and rows.numel() == rows.unique().numel() == 4 * n == len(adapter.B)
    chosen = [set((head[0] % 32).tolist()) for head in rows]
    low, high = set(range(16 - n, 16)), set(range(n))
    if pairs != "random":
        assert chosen == [{"low": low, "high": high}[pairs]] * 2
    elif 1 < n < 16:
        assert chosen[0] != chosen[1] and low not in chosen and high not in chosen


def test_pairs_all_is_lora(model):
    other = attach(random_model(), 4, 8, 0.25, pairs="all")
    assert all(adapter.low_freq_ratio == 1 and len(adapter.rows) == adapter.out_features for adapter in adapters(other).values())
    with pytest.raises(ValueError, match="pairs must be low, high or random, not 'slow'"):
        attach(model, pairs="slow")


@pytest.mark.parametrize("pairs", ["high", "random"])
def test_the_ablations_merge_save_and_load(tmp_path, pairs):
    model, tokens = randomise_adapters(attach(random_model(), 4, 8, 0.5, "q,k,v", pairs)), random_tokens(2, 20)
    adapted = model(tokens)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(random_model(), tmp_path)(tokens), adapted)
    with pytest.raises(ValueError, match=rf"pairs {pairs} \(the model has low\)"):
        load_adapter(attach(random_model(), 4, 8, 0.5, "q,k,v"), tmp_path)
    assert_close(merge(model)(tokens), adapted, **of_model(model.config))


@pytest.mark.parametrize("ratio, pairs", [*((ratio, "low") for ratio in LOW), (0.5, "high"), (0.5, "random")])
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_gradients_are_those_of_the_dense_update(ratio, pairs, input_needs_gradient):
    seed_torch(0)
    linear, x = nn.Linear(5, 16).requires_grad_(False), torch.randn(2, 7, 5, requires_grad=input_needs_gradient)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.25, ALL)])
def test_at_step_0_the_adapted_model_is_the_base_model_to_the_bit(dtype, ratio, targets):
    model, tokens = random_model(dtype=dtype), random_tokens(2, 30)
    before = model(tokens)
    attach(model, rank=4, alpha=8, low_freq_ratio=ratio, targets=targets)
    assert torch.equal(model(tokens), before)
    randomise_adapters(model)
    assert not torch.equal(model(tokens), before)


def outputs_of_projections(model, tokens):
    found, handles = {}, []
    for name, module in model.model.layers[0].named_modules():
        if name.endswith("_proj"):
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: found.update({name: out.detach().clone()})))
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def test_trained_adapters_change_the_low_frequency_dimensions_of_q_and_k_alone(model):
    tokens = random_tokens(2, 30)
    before = outputs_of_projections(model, tokens)
    randomise_adapters(attach(model, rank=4, alpha=8, low_freq_ratio=0.25))
    after = outputs_of_projections(model, tokens)
    changed = {name: (after[name] != before[name]).any(dim=(0, 1)).nonzero().flatten().tolist() for name in before}
    assert changed["self_attn.q_proj"] == [3, 7, 11, 15, 19, 23, 27, 31]  # 4 heads of d = 8, one pair each
    assert changed["self_attn.k_proj"] == [3, 7, 11, 15]  # 2 heads
    assert changed["self_attn.v_proj"] == []


def test_scores_depend_on_relative_position_only():
    seed_torch(0)
    model = randomise_adapters(attach(random_model(dtype=torch.float64), rank=4, alpha=8, low_freq_ratio=0.5))
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 10, 32, dtype=torch.float64)

    def scores(first_position):
        cos, sin = rope_table(first_position + torch.arange(10), model.inv_freq)
        heads = [projection(x).view(1, 10, -1, 8).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)]
        q, k = (rotate(h, cos, sin) for h in heads)
        return q @ k.repeat_interleave(2, dim=1).transpose(2, 3)

    # In float32 the angle of position 1,009 is off by 1,009 radians' rounding, and by that much turns q and k against each other.
    off = (scores(0) - scores(1000)).abs().max()
    assert off < 1009 * torch.finfo(torch.float32).eps * scores(0).abs().max()
    assert (scores(0) - scores(0).mean()).abs().max() > 1


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.5, "k,v,down")])
def test_merged_equals_unmerged(changes, ratio, targets):
    model, tokens = random_model(**changes), random_tokens(2, 30)
    base, kinds = model(tokens), [type(module) for module in model.modules()]
    adapted = randomise_adapters(attach(model, 4, 8, ratio, targets))(tokens)
    merged = merge(model)(tokens)
    assert (adapted - base).abs().max() > 0.1
    assert_close(merged, adapted, **of_model(model.config))
    assert not adapters(model) and [type(module) for module in model.modules()] == kinds


def test_merging_into_bfloat16_rounds_each_weight_once():
    exact = randomise_adapters(attach(random_model(), 4, 8, 0.25))
    rounded = attach(random_model(dtype=torch.bfloat16), 4, 8, 0.25)
    with torch.no_grad():
        for a, b in zip(adapters(exact).values(), adapters(rounded).values()):
            a.weight.copy_(b.weight), b.A.copy_(a.A), b.B.copy_(a.B)
    merge(exact), merge(rounded)
    for a, b in zip(exact.parameters(), rounded.parameters()):
        if a.shape == (32, 32) or a.shape == (16, 32):
            assert torch.equal(a.to(torch.bfloat16), b) or (a - b.float()).abs().max() <= a.abs().max() / 2**8
    q = rounded.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(q, exact.model.layers[0].self_attn.q_proj.weight.to(torch.bfloat16))


class Float32Outputs(TorchDispatchMode):
    sizes = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.sizes += (out.numel(),)
        return out


def test_adapters_are_float32_masters_and_activations_are_never_cast():
    linear = nn.Linear(32, 32, dtype=torch.bfloat16).requires_grad_(False)
    adapter = RoAE(linear, 4, rank=2, alpha=4)
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    with Float32Outputs() as seen:
        assert adapter(torch.randn(1, 500, 32).bfloat16()).dtype == torch.bfloat16
    assert [size for size in seen.sizes if size < 500 * 32] and sum(size >= 500 * 2 for size in seen.sizes) == 1  # randn


def test_the_number_of_trainable_parameters(model):
    attach(model, rank=5, alpha=1, low_freq_ratio=0.5)  # D = 32, d = 8, n = 2, H = 4, K = 2
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 3 * 5 * (2 * 32 + 2 * 2 * (4 + 2))
    assert {id(p) for p in trainable} == {id(p) for a in adapters(model).values() for p in (a.A, a.B)}


@pytest.mark.parametrize("arguments, message", [
    ({"rank": 0}, "rank"), ({"rank": 1.5}, "rank"), ({"alpha": 0}, "alpha"), ({"alpha": float("nan")}, "alpha"),
    ({"low_freq_ratio": 0}, "low_freq_ratio"), ({"low_freq_ratio": 1.1}, "low_freq_ratio"), ({"targets": "q,x"}, "target 'x'"),
    ({"targets": ""}, "target ''"),
])
def test_settings_outside_their_range_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(model, **arguments)


def test_the_seed_decides_the_adapters_whatever_the_order_of_the_targets():
    models = []
    for targets in ("q,k,down", "down,k,q"):
        seed_torch(0)
        models.append(attach(random_model(), 4, 8, targets=targets))
    for a, b in zip(*(adapters(model).values() for model in models)):
        assert torch.equal(a.A, b.A)


def test_a_model_takes_one_set_of_adapters(model):
    with pytest.raises(ValueError, match="merge"):
        attach(attach(model))


# --- files ---


@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (1.0, ALL), (0.5, "q,v")])
def test_a_saved_adapter_loads_to_the_bit(tmp_path, ratio, targets):
    trained = randomise_adapters(attach(random_model(), 4, 6.5, ratio, targets))
    save_adapter(trained, tmp_path)
    tokens = random_tokens(2, 20)
    assert torch.equal(load_adapter(random_model(), tmp_path)(tokens), trained(tokens))
    ready = attach(random_model(), 4, 6.5, ratio, targets)
    assert torch.equal(load_adapter(ready, tmp_path)(tokens), trained(tokens))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_file_is_a_peft_lora_with_zero_rows_outside_the_low_frequencies(tmp_path, model):
    save_adapter(randomise_adapters(attach(model, 4, 8, 0.25)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    assert B.shape == (16, 4) and B.any(dim=1).nonzero().flatten().tolist() == [3, 7, 11, 15]
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (4, 32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "k_proj"])
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rosa"]) == {"rank": 4, "alpha": 8, "low_freq_ratio": 0.25, "targets": ["q", "k"],
                                                           "pairs": "low"}


def test_an_adapter_with_other_settings_is_refused_and_the_difference_named(tmp_path):
    save_adapter(attach(random_model(), 4, 8, 0.25), tmp_path)
    with pytest.raises(ValueError, match=r"rank 4 \(the model has 5\).*low_freq_ratio 0.25 \(the model has 0.5\)"):
        load_adapter(attach(random_model(), 5, 8, 0.5), tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 4}, "missing base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"),
    ({"num_hidden_layers": 2}, "unexpected base_model.model.model.layers.2"),
    ({"hidden_size": 16}, r"has shape \[4, 32\], the model needs \[4, 16\]"),
])
def test_an_adapter_for_another_model_is_refused_and_nothing_changed(tmp_path, changes, message):
    save_adapter(randomise_adapters(attach(random_model(), 4, 8)), tmp_path)
    other = random_model(**changes)
    before = other(random_tokens(1, 9))
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)
    assert torch.equal(other(random_tokens(1, 9)), before) and not adapters(other)


def test_a_peft_lora_from_elsewhere_loads(tmp_path, model):
    save_adapter(randomise_adapters(attach(random_model(), 4, 8, 1.0, "q,v")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without our metadata
    load_adapter(model, tmp_path)
    assert {adapter.low_freq_ratio for adapter in adapters(model).values()} == {1.0} and len(adapters(model)) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_compute_the_same_with_and_without_adapters(dtype, tied):
    """Packed where oneDNN takes that dtype on this processor; elsewhere they stay as they are."""
    model = random_model(tie_word_embeddings=tied).to(dtype)
    tokens = random_tokens(3, 20)
    prompts = [row[: 5 + 7 * i].tolist() for i, row in enumerate(tokens)]
    for adapted in (False, True):
        other = copy.deepcopy(model)
        if adapted:
            randomise_adapters(attach(other, rank=4, targets="q,k,up"))
        logits, exact = other(tokens), copy.deepcopy(other).double()(tokens)
        embedding = other.model.embed_tokens.weight.clone()
        other.pack().pack()  # twice is once
        weights = [module.weight for module in other.modules() if isinstance(module, nn.Linear)]
        assert len(weights) == 7 * 3 + 1 and {weight.is_mkldnn for weight in weights} == {dtype in Operators.onednn}
        assert_no_worse(other(tokens), logits, exact)
        assert_greedy(other, prompts, other.generate(prompts, 8, None), 8)
        assert torch.equal(other.model.embed_tokens.weight, embedding)
