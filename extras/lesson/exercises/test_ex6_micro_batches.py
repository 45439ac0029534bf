"""Exercise 6: the labels, then the loss, then the gradients. The model is the smallest there is: a table of logits, a
row for each token, so that every gradient can be computed by hand."""

import math

import numpy as np
import torch
from checking import check, random_numbers, tensor
from ex6_micro_batches import accumulate_gradients, collate
from torch import nn

pytest_plugins = ["short_messages"]

V = 7
NONE = -100
# Two micro-batches: six response tokens, and one.
TOKENS = [[[1, 2, 3, 4], [5, 6, 1, 2]], [[3, 1, 0, 0], [2, 0, 0, 0]]]
LABELS = [[[2, 3, 4, 5], [NONE, NONE, 2, 3]], [[NONE, 6, NONE, NONE], [NONE] * 4]]


def model_of(table):
    return nn.Embedding.from_pretrained(tensor(table), freeze=False)


def micro_batches(tokens=TOKENS, labels=LABELS):
    return [(torch.tensor(t), torch.tensor(each)) for t, each in zip(tokens, labels)]


def by_hand(table, tokens, labels):
    """Summed loss of the positions that have a label, and its gradient: softmax minus one, number by number."""
    loss, gradient = 0.0, np.zeros_like(table)
    for token, label in zip(np.ravel(tokens), np.ravel(labels)):
        if label != NONE:
            probabilities = np.exp(table[token]) / np.exp(table[token]).sum()
            loss -= math.log(probabilities[label])
            gradient[token] += probabilities - np.eye(V)[label]
    return loss, gradient


def check_loss_and_gradient(table, which):
    """which: 0, the loss; 1, the gradient."""
    model = model_of(table)
    found = accumulate_gradients(model, micro_batches())
    found = [found, model.weight.grad][which]
    sizes = np.array([[np.sum(np.array(part) != NONE), np.size(part)] for part in LABELS])
    (first, second), counts = (
        [by_hand(table, t, each)[which] for t, each in zip(TOKENS, LABELS)],
        sizes[:, 0],
    )
    N, padded = sizes.sum(0)
    with_padding = by_hand(table, TOKENS, np.maximum(LABELS, 0))[which]
    mistakes = {
        "a mean of means: divide the sums by the batch's tokens": (
            first / counts[0] + second / counts[1]
        )
        / 2,
        "a sum of means: divide the sums by the batch's tokens": first / counts[0]
        + second / counts[1],
        "divided by the number of micro-batches: by the batch's response tokens": (first + second)
        / 2,
        "divided by the tokens and by the number of micro-batches": (first + second) / N / 2,
        "a sum: divide by the batch's response tokens": first + second,
        "padding and prompt were counted: N is the labels that are not -100": (first + second)
        / padded,
        "positions without a label were learnt as token 0": with_padding / padded,
        "positions without a label were learnt as token 0, over N": with_padding / N,
        "only the last micro-batch: no zero_grad between the passes": second / N,
        "only the last micro-batch, over its own tokens: no zero_grad between the passes": second
        / counts[1],
        "only the first micro-batch": first / N,
    }
    check(
        ["the loss of the batch", "the gradient of the batch"][which],
        found,
        (first + second) / N,
        mistakes,
    )


def test_labels_of_one_example():
    _, labels = collate([([5, 6, 7], [8, 9])])
    check(
        "prompt [5, 6, 7], response [8, 9]: labels",
        labels[0],
        [NONE, NONE, 8, 9],
        {
            "not shifted: a position's label is the token after it": [NONE, NONE, NONE, 8],
            "not shifted, and one too long: a position's label is the token after it": [
                NONE,
                NONE,
                NONE,
                8,
                9,
            ],
            "the last position predicts nothing: leave it out": [NONE, NONE, 8, 9, NONE],
            "the prompt is not learnt: -100": [6, 7, 8, 9],
            "the prompt is not learnt: its label is -100, not 0": [0, 0, 8, 9],
            "the first response token is lost: the prompt's last token predicts it": [
                NONE,
                NONE,
                NONE,
                9,
            ],
        },
    )


def test_tokens_of_one_example():
    tokens, _ = collate([([5, 6, 7], [8, 9])])
    mistakes = {"the last id is never an input: leave it out": [5, 6, 7, 8, 9]}
    check("prompt [5, 6, 7], response [8, 9]: tokens", tokens[0], [5, 6, 7, 8], mistakes)


def test_padding_is_on_the_right_and_not_learnt():
    tokens, labels = collate([([5, 6, 7], [8, 9]), ([5], [3])])
    check(
        "labels of the shorter example",
        labels[1],
        [3, NONE, NONE, NONE],
        {
            "padding is not learnt: its label is -100": [3, 0, 0, 0],
            "the first response token is lost: the prompt's last token predicts it": [NONE] * 4,
            "this is padded on the left": [NONE, NONE, NONE, 3],
            "not shifted: a position's label is the token after it": [NONE, 3, NONE, NONE],
        },
    )
    check(
        "tokens of the shorter example",
        tokens[1],
        [5, 0, 0, 0],
        {
            "this is padded on the left": [0, 0, 0, 5],
            "the last id is never an input: leave it out": [5, 3, 0, 0],
        },
    )


def test_the_loss_of_a_model_that_knows_nothing():
    model, labels = model_of(np.zeros((V, V))), [[[NONE, 1, 2]]]
    found = accumulate_gradients(model, micro_batches([[[1, 2, 3]]], labels))
    check(
        f"{V} equal logits, 2 response tokens: the loss",
        found,
        math.log(V),
        {
            "a sum: divide by the batch's response tokens": 2 * math.log(V),
            "the prompt was counted: N is the labels that are not -100": 2 / 3 * math.log(V),
        },
    )


def test_the_loss_of_two_micro_batches():
    check_loss_and_gradient(random_numbers(V, V, seed=1), 0)


def test_the_gradient_of_two_micro_batches():
    check_loss_and_gradient(random_numbers(V, V, seed=2), 1)


def test_the_size_of_the_micro_batches_does_not_matter():
    table, tokens, labels = random_numbers(V, V, seed=3), sum(TOKENS, []), sum(LABELS, [])
    expected = by_hand(table, tokens, labels)[1] / 7
    hint = "sums of token losses over the tokens of all micro-batches; a part without any label adds 0, not 0/0"
    for size in (1, 2, 4):
        model, starts = model_of(table), range(0, 4, size)
        parts = micro_batches(
            [tokens[i : i + size] for i in starts], [labels[i : i + size] for i in starts]
        )
        accumulate_gradients(model, parts)
        check(f"the gradient, {size} row(s) at a time", model.weight.grad, expected, hint=hint)


def test_no_step_is_made():
    table = random_numbers(V, V, seed=4)
    model = model_of(table)
    accumulate_gradients(model, micro_batches())
    check(
        "the weights afterwards",
        model.weight,
        table,
        hint="gradients only: the optimizer's step is the caller's",
    )
