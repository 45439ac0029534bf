"""Exercise 6: the labels, then the loss, then the gradients. The model is the smallest there is: a
table of logits, a row for each token, so that every gradient can be computed by hand."""

import math
import weakref

import numpy as np
import torch
from checking import as_array, check, check_dtype, fail, random_numbers, tensor, yours
from torch import nn

pytest_plugins = ["short_messages"]

ex6_micro_batches = yours("ex6_micro_batches")
accumulate_gradients = ex6_micro_batches.accumulate_gradients
collate = ex6_micro_batches.collate

V = 7
NONE = -100
# Two micro-batches: six response tokens, and one.
TOKENS = [[[1, 2, 0, 4], [5, 6, 1, 2]], [[3, 1, 0, 0], [2, 0, 0, 0]]]
LABELS = [[[2, 0, 4, 5], [NONE, NONE, 2, 3]], [[NONE, 6, NONE, NONE], [NONE] * 4]]
NOT_SHIFTED = "not shifted: a position's label is the token after it"
FIRST_LOST = "the first response token is lost: the prompt's last token predicts it"
LEFT = "this is padded on the left"
A_SUM = "a sum: divide by the batch's response tokens"


# --- collate ---


def test_labels_of_one_example():
    _, labels = collate([([5, 6, 7], [8, 9])])
    check(
        "prompt [5, 6, 7], response [8, 9]: labels",
        labels[0],
        [NONE, NONE, 8, 9],
        {
            NOT_SHIFTED: [NONE, NONE, NONE, 8],
            "not shifted, and one too long": [NONE, NONE, NONE, 8, 9],
            "the last position predicts nothing: leave it out": [NONE, NONE, 8, 9, NONE],
            "the prompt is not learnt: -100": [6, 7, 8, 9],
            "the prompt is not learnt: its label is -100, not 0": [0, 0, 8, 9],
            FIRST_LOST: [NONE, NONE, NONE, 9],
            "shifted twice": [NONE, 8, 9, NONE],
        },
    )


def test_tokens_of_one_example():
    tokens, _ = collate([([5, 6, 7], [8, 9])])
    mistakes = {
        "the last id is never an input: leave it out": [5, 6, 7, 8, 9],
        "the response is an input too, but for its last id": [5, 6, 7],
        "the first id is an input too; the last is none": [6, 7, 8, 9],
    }
    check("prompt [5, 6, 7], response [8, 9]: tokens", tokens[0], [5, 6, 7, 8], mistakes)


def test_padding_is_on_the_right_and_not_learnt():
    tokens, labels = collate([([5, 6, 7], [8, 9]), ([5], [3])])
    check(
        "labels of the shorter example",
        labels[1],
        [3, NONE, NONE, NONE],
        {
            "padding is not learnt: its label is -100": [3, 0, 0, 0],
            FIRST_LOST: [NONE] * 4,
            LEFT: [NONE, NONE, NONE, 3],
            NOT_SHIFTED: [NONE, 3, NONE, NONE],
        },
    )
    mistakes = {
        LEFT: [0, 0, 0, 5],
        "tokens are padded with 0; -100 is a label": [5, NONE, NONE, NONE],
    }
    check_tokens("tokens of the shorter example", tokens, [5, 0, 0, 0], 1, 1, mistakes)


def check_tokens(what, tokens, expected, row, length, mistakes=(), hint="see 1 in the text"):
    """A row of tokens. Behind the last label, at `length`, any id may stand."""
    found = as_array(what, tokens)[row]
    if found.shape == (len(expected),) and (found[length:] >= 0).all():
        found[length:] = expected[length:]
    check(what, found, expected, mistakes, hint)


def test_the_longest_example_may_come_last():
    tokens, labels = collate([([5], [3]), ([1, 2], [4, 0]), ([5, 6, 7], [8, 9])])
    hint = "T is the longest example's length - 1"
    for row, (expected, length) in enumerate(
        [([5, 0, 0, 0], 1), ([1, 2, 4, 0], 3), ([5, 6, 7, 8], 4)]
    ):
        check_tokens(f"tokens of example {row} of three", tokens, expected, row, length, hint=hint)
    expected = [[3, NONE, NONE, NONE], [NONE, 4, 0, NONE], [NONE, NONE, 8, 9]]
    by_id = "the id 0 of a response is learnt: where padding is, say the lengths, not the ids"
    mistakes = {by_id: [expected[0], [NONE, 4, NONE, NONE], expected[2]]}
    check("labels of three examples", labels, expected, mistakes, hint)


def test_tokens_and_labels_are_long_and_on_the_device():
    for name, found in zip(("tokens", "labels"), collate([([5, 6], [8, 9]), ([5], [3])], "meta")):
        check_dtype(name, found, torch.long, "torch.tensor of lists of int; or dtype=torch.long")
        if not found.is_meta:
            fail(f"{name} are on the {found.device}, device is meta", "end with .to(device)")


def test_the_examples_stay():
    examples = [([5, 6, 7], [8, 9]), ([5], [3])]
    collate(examples)
    if examples != [([5, 6, 7], [8, 9]), ([5], [3])]:
        hint = (
            "the caller's lists were changed: prompt + response is a new list, += and pop are not"
        )
        fail(f"the examples are {examples} after collate", hint)


# --- accumulate_gradients ---


def model_of(table):
    return nn.Embedding.from_pretrained(tensor(table), freeze=False)


def micro_batches(tokens=TOKENS, labels=LABELS):
    return [(torch.tensor(t), torch.tensor(each)) for t, each in zip(tokens, labels)]


def by_hand(table, tokens, labels):
    """Summed loss of the positions that have a label, and its gradient: softmax minus one, number
    by number."""
    loss, gradient = 0.0, np.zeros_like(table)
    for token, label in zip(np.ravel(tokens), np.ravel(labels)):
        if label != NONE:
            probabilities = np.exp(table[token]) / np.exp(table[token]).sum()
            loss -= math.log(probabilities[label])
            gradient[token] += probabilities - np.eye(V)[label]
    return loss, gradient


def check_loss_and_gradient(table, which):
    """which: 0, the loss; 1, the gradient."""
    model, came = model_of(table), []
    model.weight.register_hook(lambda gradient: came.append(gradient.any().item()))
    loss = accumulate_gradients(model, micro_batches())
    found = [loss, model.weight.grad][which]
    if which == 1 and any(came) and (found is None or not found.any()):
        hint = "zero_grad at the end: the optimizer needs what is in .grad; the caller clears it"
        fail(".grad was there, and is empty after the last pass", hint)
    if found is None:
        fail(
            ["the loss is None", "the weight has no .grad"][which],
            ["return the sum of the losses, a float", "loss.backward() for each micro-batch"][
                which
            ],
        )
    first, second = (by_hand(table, t, each)[which] for t, each in zip(TOKENS, LABELS))
    own = [np.sum(np.array(part) != NONE) for part in LABELS]  # 6 and 1
    N, padded = sum(own), np.size(LABELS)
    with_padding = by_hand(table, TOKENS, np.maximum(LABELS, 0))[which]
    means = first / own[0] + second / own[1]
    no_zero_grad = ["add up the losses", "no zero_grad between the passes"][which]
    again = [  # the labels moved by one once more
        by_hand(table, np.array(t)[:, :-1], np.array(each)[:, 1:])[which]
        for t, each in zip(TOKENS, LABELS)
    ]
    left = np.sum([np.array(part)[:, 1:] != NONE for part in LABELS])
    shifted = "shifted a second time: collate has shifted the labels"
    mistakes = {
        "a mean of means: divide the sums by the batch's tokens": means / 2,
        "a sum of means: divide the sums by the batch's tokens": means,
        "divided by the number of micro-batches: by the batch's response tokens": (
            (first + second) / 2
        ),
        "divided by the tokens and by the number of micro-batches": (first + second) / N / 2,
        A_SUM: first + second,
        shifted: sum(again) / N,
        f"{shifted}, and N counts them all": sum(again) / left,
        "0 is a token like any other: N is the labels that are not -100": (
            (first + second) / sum(np.sum(np.array(part) > 0) for part in LABELS)
        ),
        "padding and prompt were counted: N is the labels that are not -100": (
            (first + second) / padded
        ),
        "positions without a label were learnt as token 0": with_padding / padded,
        "positions without a label were learnt as token 0, over N": with_padding / N,
        f"only the last micro-batch: {no_zero_grad}": second / N,
        f"only the last micro-batch, over its own tokens: {no_zero_grad}": second / own[1],
        "only the first micro-batch": first / N,
        "each loss was added to the ones before, and these went backward again": (
            (2 * first + second) / N
        ),
    }
    what = ["the loss of the batch", "the gradient of the batch"][which]
    check(what, found, (first + second) / N, mistakes)


def test_the_loss_of_a_model_that_knows_nothing():
    model, labels = model_of(np.zeros((V, V))), [[[NONE, 1, 2]], [[4]]]
    found = accumulate_gradients(model, micro_batches([[[1, 2, 3]], [[3]]], labels))
    one = math.log(V)
    mistakes = {
        A_SUM: 3 * one,
        "the prompt was counted: N is the labels that are not -100": 3 / 4 * one,
        "divided by the number of micro-batches: by the batch's response tokens": 3 / 2 * one,
        "a sum of means: divide the sums by the batch's tokens": 2 * one,
        "only the last micro-batch: add up": one / 3,
    }
    check(f"{V} equal logits, 3 response tokens: the loss", found, one, mistakes)


class Kept:
    """What autograd keeps for the backward pass. It lives as long as autograd holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


class Watched(nn.Module):
    """A model that keeps, at each forward pass, the gradient that it has until then, and whether
    something of an earlier pass is still held for its backward pass."""

    def __init__(self, table):
        super().__init__()
        self.table = model_of(table)
        self.gradients, self.holds, self.kept = [], [], []

    def keep(self, tensor):
        kept = Kept(tensor)
        self.kept.append(weakref.ref(kept))
        return kept

    def forward(self, tokens):
        gradient = self.table.weight.grad
        self.gradients.append(None if gradient is None else gradient.clone())
        self.holds.append(any(kept() for kept in self.kept))
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda kept: kept.tensor):
            return self.table(tokens).exp().log()


def test_each_micro_batch_goes_backward_before_the_next_comes():
    table = random_numbers(V, V, seed=5)
    model = Watched(table)
    accumulate_gradients(model, micro_batches())
    gradients = [each is not None and each.any().item() for each in model.gradients]
    if len(gradients) != 2:
        hint = "one forward pass for each micro-batch; N comes from the labels alone"
        fail(f"2 micro-batches: expected 2 forward passes, came {len(gradients)}", hint)
    if not gradients[1]:
        hint = (
            "one backward pass at the end holds the activations of all micro-batches: "
            "loss.backward() belongs into the loop"
        )
        if model.table.weight.grad is None:
            hint = "there was no backward pass: loss.backward() for each micro-batch"
        elif is_last_alone(model, table):
            hint = "only the last micro-batch: no zero_grad between the passes"
        fail("at the second forward pass .grad is still empty", hint)
    if model.holds[1]:
        hint = (
            "no retain_graph: it keeps the activations of a micro-batch after its backward pass, "
            "and losses that are added up go backward again"
        )
        fail("at the second forward pass the activations of the first are still held", hint)


def is_last_alone(model, table):
    """Whether the gradient is a multiple of the last micro-batch's."""
    last = by_hand(table, TOKENS[1], LABELS[1])[1]
    rows = model.table.weight.grad.double().numpy().any(1)
    return (rows == last.any(1)).all()


def test_the_loss_of_two_micro_batches():
    check_loss_and_gradient(random_numbers(V, V, seed=1), 0)


def test_the_gradient_of_two_micro_batches():
    check_loss_and_gradient(random_numbers(V, V, seed=2), 1)


def test_the_loss_is_a_float():
    found = accumulate_gradients(model_of(np.zeros((V, V))), micro_batches())
    if not isinstance(found, float):
        hint = "loss.item(): a tensor would keep the graph, and its activations, alive"
        fail(f"the loss: expected a float, came {type(found).__name__}", hint)


def test_the_size_of_the_micro_batches_does_not_matter():
    table, tokens, labels = random_numbers(V, V, seed=3), sum(TOKENS, []), sum(LABELS, [])
    expected_loss, expected = (each / 7 for each in by_hand(table, tokens, labels))
    hint = "sums of token losses over the tokens of all micro-batches"
    for size in (1, 2, 4):
        model, starts = model_of(table), range(0, 4, size)
        parts = micro_batches(
            [tokens[i : i + size] for i in starts], [labels[i : i + size] for i in starts]
        )
        loss = accumulate_gradients(model, parts)
        what, found = f"the gradient, {size} row(s) at a time", model.weight.grad
        if found is None:
            fail(f"{what}: the weight has no .grad", "first the tests above", sure=False)
        for name, each in (("gradient", found), ("loss", loss)):
            if np.isnan(as_array(name, each)).any():
                no_mean = "0/0: a part without any label adds 0; it has no mean"
                fail(f"the {name}, {size} row(s) at a time: came nan", no_mean)
        check(what, found, expected, hint=hint)
        check(f"the loss, {size} row(s) at a time", loss, expected_loss, hint=hint)


def test_a_large_gradient_stays_large():
    """One token, which is surely wrong: the norm of its gradient is 1.4."""
    table = 9 * np.eye(V)
    model = model_of(table)
    accumulate_gradients(model, micro_batches([[[1]]], [[[2]]]))
    expected = by_hand(table, [1], [2])[1]
    clipped = expected / np.linalg.norm(expected)
    found, hint = model.weight.grad, "no clipping here: that is the caller's"
    if found is not None:
        what = "the gradient of one token, of norm 1.4"
        check(what, found, expected, {hint: clipped}, "no clipping here, and no scaling")


def test_no_step_is_made():
    table = random_numbers(V, V, seed=4)
    model = model_of(table)
    accumulate_gradients(model, micro_batches())
    if not torch.equal(model.weight, tensor(table)):
        fail("the weights have changed", "gradients only: the optimizer's step is the caller's")
