"""Exercise 4, from a merge by hand to bfloat16."""

import numpy as np
import torch
from checking import check, fail, random_numbers, tensor
from ex4_merge import merge
from torch import nn

pytest_plugins = ["short_messages"]

NOT_IN_PLACE = "the weight is what it was: write into linear.weight itself"


def linear_of(W, bias=None, dtype=torch.float32):
    """A frozen linear layer."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias is not None, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(tensor(W))
    if bias is not None:
        linear.bias.copy_(tensor(bias))
    return linear


def add(W, rows, update):
    W = W.copy()
    for number, row in enumerate(rows):
        W[row] += update[number]
    return W


def merged(W, rows, A, B, alpha, bias=None):
    """The layer after the reader's merge. A and B train, as in a program."""
    linear = linear_of(W, bias)
    merge(linear, torch.tensor(rows), nn.Parameter(tensor(A)), nn.Parameter(tensor(B)), alpha)
    return linear


def problem():
    """A random layer: (W [8, 8], rows, A [3, 8], B [4, 3], alpha, bias)."""
    W, A, B, bias = (
        random_numbers(*shape, seed=i) for i, shape in enumerate(((8, 8), (3, 8), (4, 3), (8,)))
    )
    return W, [2, 3, 6, 7], A, B, 6, bias


def test_two_rows_by_hand():
    W, A, B = (
        np.ones((4, 2)),
        np.array([[1.0, 2.0]]),
        np.array([[1.0], [10.0]]),
    )  # rank 1, B A = [[1, 2], [10, 20]]
    update = 3 * np.array([[1.0, 2.0], [10.0, 20.0]])
    mistakes = {
        NOT_IN_PLACE: W,
        "B @ A came transposed": add(W, [1, 3], update.T),
        "the rows were replaced: add to them": [[1, 1], update[0], [1, 1], update[1]],
        "these are the first rows: W[rows]": add(W, [0, 1], update),
    }
    expected = [[1, 1], [4, 7], [1, 1], [31, 61]]
    check("weight of ones, rows 1 and 3", merged(W, [1, 3], A, B, 3).weight, expected, mistakes)


def test_the_scale():
    W, rows, A, B, alpha, bias = problem()
    rank, update = len(A), B @ A
    mistakes = {
        NOT_IN_PLACE: W,
        "scaled by alpha alone: alpha / rank": add(W, rows, alpha * update),
        "not scaled: alpha / rank": add(W, rows, update),
        "merged twice: the update counts double": add(W, rows, 2 * alpha / rank * update),
        "scaled by alpha / len(rows): the rank is len(A)": add(W, rows, alpha / len(B) * update),
        "subtracted: add it": add(W, rows, -alpha / rank * update),
        "these are columns: W[rows], not W[:, rows]": add(W.T, rows, alpha / rank * update).T,
    }
    found = merged(W, rows, A, B, alpha, bias).weight
    check("weight [8, 8], alpha 6, rank 3", found, add(W, rows, alpha / rank * update), mistakes)


def test_other_rows_and_the_bias_stay_bit_for_bit():
    W, rows, A, B, alpha, bias = problem()
    before, after = linear_of(W, bias), merged(W, rows, A, B, alpha, bias)
    others = [row for row in range(len(W)) if row not in rows]
    if not torch.equal(after.weight[others], before.weight[others]):
        fail(
            "rows outside `rows` have changed",
            "other rows changed: write W[rows] alone, and round nothing else",
        )
    if after.bias is None or not torch.equal(after.bias, before.bias):
        fail("the bias has changed", "the update has no bias: leave linear.bias alone")


def test_in_place():
    W, rows, A, B, alpha, bias = problem()
    linear = linear_of(W, bias)
    weight, memory = linear.weight, linear.weight.data_ptr()
    merge(linear, torch.tensor(rows), tensor(A), tensor(B), alpha)
    if linear.weight is not weight or linear.weight.data_ptr() != memory:
        fail(
            "linear.weight is another tensor now",
            "not in place: linear.weight[rows] += ... under torch.no_grad()",
        )


def test_autograd_does_not_see_it():
    linear = merged(*problem())
    if linear.weight.grad_fn is not None or linear.weight.requires_grad:
        fail("the weight is a result of A and B for autograd now", "merge under torch.no_grad()")


def test_the_same_function():
    W, rows, A, B, alpha, bias = problem()
    x = random_numbers(5, 8, seed=20)
    expected = add((x @ W.T + bias).T, rows, alpha / len(A) * (x @ A.T @ B.T).T).T
    hint = "first the tests above; then compare W[rows] x and B (A x)"
    check(
        "merged(x), as linear(x) and the update",
        merged(W, rows, A, B, alpha, bias)(tensor(x)),
        expected,
        hint=hint,
    )


def test_bfloat16_is_rounded_once():
    """From 1 on bfloat16 goes in steps of 1/128. 1 + 1/256 + 1/131072 is just above the middle of the first step; the
    update alone rounds to 1/256, and the sum, now in the middle, to the even neighbour, 1."""
    linear = linear_of(np.ones((2, 1)), dtype=torch.bfloat16)
    merge(linear, torch.tensor([0, 1]), tensor([[1]]), tensor([[1 / 256 + 1 / 131072], [1]]), 1)
    if linear.weight.dtype != torch.bfloat16:
        fail(
            f"weight: expected torch.bfloat16, came {linear.weight.dtype}",
            "a merged weight keeps its dtype",
        )
    mistakes = {"rounded twice: add in float32, then cast the sum": [1, 2], NOT_IN_PLACE: [1, 1]}
    check(
        "1 + a little more than 1/256, and 1 + 1, in bfloat16",
        linear.weight[:, 0],
        [1 + 1 / 128, 2],
        mistakes,
    )
