"""Statements about extras/prefix.py: what a batch begins with is computed once, and loss and
gradients are those of computing it for every example."""

import copy

import pytest
import torch
from helpers import random_model, randomise_adapters
from rounding import assert_no_worse

import rosa
from extras import kernels, prefix
from extras.kernels import accelerate
from model import Attention, KVCache, Llama

pytestmark = pytest.mark.numeric


def batch(rows=5, shared=30, own=12, seed=0):
    """Tokens and labels of rows that begin with the same ids; each predicts its last few."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 97, (rows, shared + own), generator=generator)
    tokens[:, :shared] = tokens[0, :shared].clone()
    tokens[:, shared] = torch.arange(rows)  # they differ from here on
    labels = torch.full_like(tokens, -100)
    labels[:, shared + 3 :] = torch.randint(97, (rows, own - 3), generator=generator)
    labels[-1, -4:] = -100  # a row that ends earlier
    return tokens, labels


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def adapted(dtype, random, probing):
    model = rosa.attach(random_model(dtype=dtype), 4, 8)
    if random:
        randomise_adapters(model)
    selector = rosa.LayerSelector(model)
    selector.before_forward(0)
    if not probing:
        selector.activate([1])
    return model


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("probing", [False, True])
def test_loss_and_gradients_are_the_same_in_float64(monkeypatch, random, probing):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # model.py's float32 parts
    model = adapted(torch.float64, random, probing).double()
    model.shares_prefix = True
    for seed in range(3):
        tokens, labels = batch(seed=seed)
        expected = model.loss(tokens, labels)
        x = prefix.hidden_states(model, tokens, labels != -100)
        loss = torch.nn.functional.cross_entropy(
            model.logits(x).double(), labels[labels != -100], reduction="sum"
        )
        assert torch.allclose(loss, expected, rtol=1e-13)
        found, expected = gradients(model, loss), gradients(model, expected)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernels_they_are_as_near_to_the_exact_ones(monkeypatch, dtype):
    tokens, labels = batch()
    model = adapted(dtype, random=True, probing=True)
    exact = copy.deepcopy(model).double()
    accelerate(model)
    assert model.shares_prefix
    shared = gradients(model, model.loss(tokens, labels))
    model.shares_prefix = False
    alone = gradients(model, model.loss(tokens, labels))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = gradients(exact, exact.loss(tokens, labels))
    flat = [
        torch.cat([g[name].flatten().double() for name in exact]) for g in (shared, alone, exact)
    ]
    assert_no_worse(*flat)


def shapes_computed(model, tokens, labels, monkeypatch):
    seen = []
    plain = Llama.hidden_states

    def hidden_states(self, tokens, cache=None):
        seen.append(tuple(tokens.shape))
        return plain(self, tokens, cache)

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "hidden_states", hidden_states)
        model.loss(tokens, labels)
    return seen


def test_what_is_shared_is_computed_for_one_row_and_nothing_that_is_predicted(monkeypatch):
    model = random_model()
    accelerate(model)
    tokens, labels = batch()
    assert shapes_computed(model, tokens, labels, monkeypatch) == [(1, 30), (5, 12)]
    labels[2, 20] = 7  # from here on a state is wanted
    assert shapes_computed(model, tokens, labels, monkeypatch) == [(1, 20), (5, 22)]
    nothing = torch.full_like(labels, -100)
    tokens[:] = tokens[0].clone()
    assert shapes_computed(model, tokens, nothing, monkeypatch) == [(1, 41), (5, 1)]


@pytest.mark.parametrize("rows, shared", [(1, 80), (2, 63), (5, 15)])
def test_where_little_is_saved_there_is_one_pass(monkeypatch, rows, shared):
    model = random_model()
    accelerate(model)
    tokens, labels = batch(rows, shared)
    assert shapes_computed(model, tokens, labels, monkeypatch) == [(rows, shared + 12)]


def test_nothing_is_shared_where_dropout_is_drawn(capsys):
    model = random_model()
    model.model.layers[0].mlp.act = torch.nn.Dropout(0.1)
    accelerate(model)
    assert not model.shares_prefix
    assert (
        "prefix     dropout is drawn for each example: what all examples begin with is computed "
        in (capsys.readouterr().out)
    )


@pytest.mark.parametrize("owner, name", list(prefix.PLAIN))
def test_nothing_is_shared_where_a_method_has_been_edited(monkeypatch, capsys, owner, name):
    plain = getattr(owner, name)

    def edited(*given):
        return plain(*given)

    monkeypatch.setattr(owner, name, edited)
    model = random_model()
    accelerate(model)
    assert not model.shares_prefix
    assert f"prefix     {owner.__name__}.{name} is no longer as it was" in capsys.readouterr().out


def test_an_edited_attend_gets_whole_examples(monkeypatch):
    monkeypatch.setattr(Attention, "attend", lambda self, q, k, v, mask: v)
    model = random_model()
    accelerate(model)
    assert not model.shares_prefix


def test_in_an_evaluation_nothing_is_shared_and_nothing_said(monkeypatch, capsys):
    monkeypatch.setattr(KVCache, "update", lambda *given: None)
    model = random_model()
    accelerate(model, inference=True)
    assert not model.shares_prefix and "prefix" not in capsys.readouterr().out


def test_nothing_is_shared_where_layers_are_computed_twice(capsys):
    model = random_model()
    accelerate(model)
    kernels.checkpoint_activations(model)
    assert not model.shares_prefix
    assert "prefix     --checkpoint-activations" in capsys.readouterr().out
