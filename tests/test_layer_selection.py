"""Statements about DLS: the active layers change as the scores say, and exactly the active layers
train."""

import pytest
import torch
from helpers import random_model, random_tokens, seed_torch
from rounding import assert_close, of_model

from extras.kernels import accelerate
from rosa import LayerSelector, adapters, attach

pytestmark = pytest.mark.numeric
L = 6


@pytest.fixture(params=["plain", "accelerated"])
def setup(request):
    """A function that makes a model with adapters, an optimiser and a selector. Each test runs with
    the plain model and with an accelerated one."""

    def make(
        k_ratio=0.5, select_every=3, score_ema=0.0, targets="q,k", low_freq_ratio=0.5, select="grad"
    ):
        seed_torch(0)
        model = attach(random_model(num_hidden_layers=L), 4, 8, low_freq_ratio, targets)
        parameters = [p for adapter in adapters(model).values() for p in (adapter.A, adapter.B)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        selector = LayerSelector(model, k_ratio, select_every, score_ema, select)
        if request.param == "accelerated":
            accelerate(model)
        return model, optimizer, selector

    return make


def step(model, optimizer, selector, number, micro_batches=1):
    """One optimiser step on batch `number`, in so many micro-batches."""
    tokens, labels = (
        random_tokens(4, 16, seed=2 * number),
        random_tokens(4, 16, seed=2 * number + 1),
    )
    if selector:
        selector.before_forward(number)
    losses = []
    for part in range(0, 4, 4 // micro_batches):
        rows = slice(part, part + 4 // micro_batches)
        loss = model.loss(tokens[rows], labels[rows]) / 64
        loss.backward()
        losses.append(loss.item())
    if selector:
        selector.after_backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def train(model, optimizer, selector, steps=7):
    return [step(model, optimizer, selector, number, micro_batches=2) for number in range(steps)]


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def amplify(model, layers):
    """Make the gradients of the norms in these layers by far the largest, and undo this in all
    other layers."""
    for i, layer in enumerate(model.model.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight._backward_hooks and norm.weight._backward_hooks.clear()
            if i in layers:
                norm.weight.requires_grad_(True)
                norm.weight.register_hook(lambda gradient: 1e6 * gradient)
                norm.weight.requires_grad_(False)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_scores_are_the_norms_of_the_summed_layernorm_gradients(setup, micro_batches):
    model, optimizer, selector = setup()
    reference = random_model(num_hidden_layers=L)
    (reference.loss(random_tokens(4, 16, seed=0), random_tokens(4, 16, seed=1)) / 64).backward()
    norms = [
        (layer.input_layernorm, layer.post_attention_layernorm) for layer in reference.model.layers
    ]
    expected = torch.stack(
        [torch.cat([norm.weight.grad for norm in both]).norm() for both in norms]
    )
    step(model, optimizer, selector, 0, micro_batches)
    assert_close(selector.scores, expected, **of_model(reference.config, 2))


def test_the_highest_scores_are_active_until_the_next_probe(setup):
    model, optimizer, selector = setup()
    for probe, layers in enumerate(([0, 2, 5], [1, 2, 3], [0, 4, 5])):
        amplify(model, layers)
        for number in range(3 * probe, 3 * probe + 3):
            step(model, optimizer, selector, number)
            assert selector.active == layers == sorted(selector.scores.topk(3).indices.tolist())


@pytest.mark.parametrize(
    "targets, ratio", [("q,k", 0.5), ("q,k,v,o,gate,up,down", 1.0), ("q,k,v", 0.5)]
)
def test_exactly_the_active_adapters_move(setup, targets, ratio):
    model, optimizer, selector = setup(targets=targets, low_freq_ratio=ratio)
    for adapter in adapters(model).values():  # B = 0 gives A no gradient: begin as if trained
        torch.nn.init.normal_(adapter.B, std=0.01)
    for number in range(6):
        before = snapshot(model)
        step(model, optimizer, selector, number)
        names = [name for name in adapters(model) if int(name.split(".")[2]) in selector.active]
        assert len(selector.active) == 3 and len(names) == 3 * len(targets.split(","))
        assert moved(model, before) == {f"{name}.{matrix}" for name in names for matrix in "AB"}


@pytest.mark.parametrize("select", ["grad", "static", "random"])
def test_a_probe_that_is_not_finite_is_repeated_and_until_one_succeeds_all_layers_train(
    setup, select
):
    model, optimizer, selector = setup(select=select)
    norm, active = model.model.layers[1].input_layernorm.weight, []
    for number in range(8):
        norm.requires_grad_(True)
        hook = norm.register_hook(
            lambda gradient, factor=[torch.nan, 1][number not in (0, 1, 6)]: gradient * factor
        )
        norm.requires_grad_(False)
        step(model, optimizer, selector, number)
        hook.remove()
        active.append((list(selector.active), selector.selected))
    assert active[:2] == [(list(range(L)), False)] * 2 and len(active[2][0]) == 3 and active[2][1]
    if select == "static":  # the layers are chosen once and for all
        assert active[3:] == [(active[2][0], False)] * 5
        return
    assert active[3][1] and not active[4][1] and not active[5][1]  # where a probe is due anyway
    assert active[6] == (active[5][0], False) and active[7][1]


def test_k_ratio_1_is_training_without_selection_to_the_bit(setup):
    with_selector, without = setup(k_ratio=1.0), setup()
    assert train(*with_selector) == train(*without[:2], None)
    for a, b in zip(with_selector[0].parameters(), without[0].parameters()):
        assert torch.equal(a, b)  # the same operations on the same values
    assert train(*setup(k_ratio=0.5)) != train(*setup()[:2], None)


def test_layers_frozen_at_first_train_when_their_turn_comes_and_moments_wait(setup):
    model, optimizer, selector = setup(select_every=2)
    parameter = {i: next(iter(adapters(model.model.layers[i]).values())).B for i in range(L)}
    amplify(model, [0, 1, 2])
    step(model, optimizer, selector, 0), step(model, optimizer, selector, 1)
    assert parameter[5] not in optimizer.state
    resting = {key: value.clone() for key, value in optimizer.state[parameter[0]].items()}
    amplify(model, [3, 4, 5])
    step(model, optimizer, selector, 2), step(model, optimizer, selector, 3)
    assert optimizer.state[parameter[5]]["step"] == 2 and parameter[5].any()
    for key, value in resting.items():
        assert torch.equal(optimizer.state[parameter[0]][key], value)
    amplify(model, [0])
    step(model, optimizer, selector, 4)
    assert optimizer.state[parameter[0]]["step"] == 3


def test_nothing_below_the_lowest_active_layer_is_kept_for_the_backward_pass(setup):
    model, optimizer, selector = setup()
    amplify(model, [3, 4, 5])
    needs_gradient = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, args, out, i=i: needs_gradient.update({i: out.requires_grad})
        )
    step(model, optimizer, selector, 0)
    assert all(needs_gradient.values())  # a probe reaches every layer
    step(model, optimizer, selector, 1)
    assert needs_gradient == {0: False, 1: False, 2: False, 3: True, 4: True, 5: True}


def test_norms_measure_and_are_never_updated(setup):
    model, optimizer, selector = setup()
    before = snapshot(model)
    for number in range(5):
        step(model, optimizer, selector, number)
        for norm in (p for name, p in model.named_parameters() if "layernorm" in name):
            assert not norm.requires_grad and norm.grad is None
    assert all(name.endswith((".A", ".B")) for name in moved(model, before))


def test_frozen_adapters_still_act(setup):
    model, optimizer, selector = setup()
    train(model, optimizer, selector)
    tokens = random_tokens(1, 10)
    with_all = model(tokens)
    selector.activate([0])
    # To rounding: another kernel may run where a gradient is needed
    assert_close(model(tokens), with_all, **of_model(model.config))


def test_scores_are_smoothed_over_probes(setup):
    plain, smooth = setup(select_every=1), setup(select_every=1, score_ema=0.75)
    step(*plain, 0), step(*smooth, 0)
    first = plain[2].scores
    # Two equal models have made the same step, and the first scores are not smoothed yet
    assert torch.equal(smooth[2].scores, first)
    smooth[2].activate(plain[2].active)
    step(*plain, 1), step(*smooth, 1)
    assert_close(smooth[2].scores, 0.75 * first + 0.25 * plain[2].scores)


@pytest.mark.parametrize("ratio, count", [(0.01, 1), (0.3, 2), (0.5, 3), (0.99, 6), (1.0, 6)])
def test_the_number_of_active_layers(setup, ratio, count):
    model, optimizer, selector = setup(k_ratio=ratio)
    step(model, optimizer, selector, 0)
    assert len(selector.active) == count


def test_static_selection_keeps_the_first_choice(setup):
    model, optimizer, selector = setup(select="static")
    for number, layers in ((0, [0, 2, 5]), (3, [1, 3, 4])):
        amplify(model, layers)
        step(model, optimizer, selector, number)
        assert selector.active == [0, 2, 5] and selector.probing == (number == 0)


def test_random_selection_is_blind_to_the_gradients_and_repeats_itself(setup):
    chosen = []
    for layers in ([0, 1, 2], [3, 4, 5]):
        model, optimizer, selector = setup(select="random", select_every=1)
        amplify(model, layers)
        chosen.append([])
        for number in range(6):
            step(model, optimizer, selector, number)
            chosen[-1].append(selector.active)
    assert chosen[0] == chosen[1] and len({tuple(active) for active in chosen[0]}) > 2
    assert all(len(active) == 3 for active in chosen[0])


def test_select_all_trains_every_layer(setup):
    model, optimizer, selector = setup(select="all", k_ratio=0.5)
    assert train(model, optimizer, selector) == train(
        *setup()[:2], None
    ) and selector.active == list(range(L))


@pytest.mark.parametrize("faster", [lambda model: None, accelerate], ids=["plain", "accelerated"])
def test_in_full_training_the_active_layers_learn_with_their_norms(faster):
    model = random_model(num_hidden_layers=L)
    optimizer, selector = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0),
        LayerSelector(model, 0.5, 2),
    )
    faster(model)
    for number in range(4):
        before = snapshot(model)
        step(model, optimizer, selector, number)
        active = {
            name
            for name in before
            if "layers." not in name or int(name.split(".")[2]) in selector.active
        }
        assert moved(model, before) == active


def test_what_belongs_to_no_layer_cannot_be_selected():
    model = random_model(num_hidden_layers=L).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="k_ratio must be 1"):
        LayerSelector(model, 0.5)


def test_a_parameter_that_layers_share_trains_with_any_of_them():
    model = random_model(num_hidden_layers=L).requires_grad_(False)
    shared = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight = shared
    selector = LayerSelector(model, 0.5)
    assert selector.candidates == [0, 1]
    for layers, trains in (([0], True), ([1], True), ([], False), ([0, 1], True)):
        selector.activate(layers)
        assert shared.requires_grad == trains


REFUSED = {"k_ratio": (0, 1.1), "select_every": (0,), "score_ema": (1.0, -0.1), "select": ("best",)}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_settings_outside_their_range_are_refused(model, name, value):
    with pytest.raises(ValueError, match=name):
        LayerSelector(attach(model), **{name: value})
