"""Exercise 3, from the shapes to the forward pass in bfloat16."""

import numpy as np
import torch
from checking import check, fail, random_numbers, tensor
from ex3_roae import RoAE
from torch import nn

pytest_plugins = ["short_messages"]

D, OUT, ROWS, RANK, ALPHA = 6, 8, [2, 3, 6, 7], 2, 6  # alpha / rank = 3: neither alpha nor 1


def layer(B=None, dtype=torch.float32):
    """The reader's layer around a random linear one, with this B, or the one that it begins with; weight and bias."""
    W, bias = random_numbers(OUT, D, seed=1), random_numbers(OUT, seed=2)
    linear = nn.Linear(D, OUT, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(tensor(W)), linear.bias.copy_(tensor(bias))
        adapter = RoAE(linear, torch.tensor(ROWS), RANK, ALPHA)
        if B is not None:
            adapter.B.copy_(tensor(B))
    return adapter, W, bias


def test_shapes_of_A_and_B():
    adapter, _, _ = layer()
    for name, shape in (("A", [RANK, D]), ("B", [len(ROWS), RANK])):
        found = list(getattr(adapter, name).shape)
        if found != shape:
            hint = "A [rank, D], B [len(rows), rank]"
            if found == shape[::-1]:
                hint = f"transposed: {hint}"
            if found == [OUT, RANK]:
                hint = "B has a row for each of `rows`, not for each output: the other outputs stay what they are"
            fail(f"{name}: expected shape {shape}, came {found}", hint)


def test_B_begins_at_zero():
    B = layer()[0].B
    if B.any():
        largest = B.abs().max().item()
        fail(
            f"B: expected zeros, the largest number is {largest:.4g}",
            "B is zero at the start, so that the update is; A is the random one",
        )


def test_A_begins_uniform():
    adapter = RoAE(nn.Linear(100, 4), torch.tensor([0]), 16, 16)
    if adapter.A.shape != (16, 100):
        return  # of the shapes the first test speaks
    largest = adapter.A.abs().max().item()  # of 1,600 numbers between -0.1 and 0.1
    if largest == 0:
        fail(
            "A: expected random numbers, came zeros",
            "with A and B both zero no gradient is ever anything else",
        )
    if not 0.09 < largest <= 0.1001:
        hint = "kaiming_uniform_ with a=math.sqrt(5) gives -1/sqrt(D) to 1/sqrt(D)"
        fail(f"the largest number of A [16, 100]: expected nearly 0.1, came {largest:.4g}", hint)


def test_it_begins_as_the_base_layer():
    adapter, W, bias = layer()
    x = random_numbers(5, D, seed=3)
    mistakes = {"the bias is lost: call self.linear": x @ W.T}
    hint = "an update of zero: is B zero? is y = self.linear(x) before it?"
    check("the layer before training", adapter(tensor(x)), x @ W.T + bias, mistakes, hint)


def test_what_trains_is_A_and_B():
    found = {name for name, parameter in layer()[0].named_parameters() if parameter.requires_grad}
    if found != {"A", "B"}:
        base = found & {"linear.weight", "linear.bias"}
        hint = (
            "the base is not frozen: linear.requires_grad_(False)"
            if base
            else "A and B are nn.Parameter"
        )
        fail(f"what trains: expected A, B, came {', '.join(sorted(found)) or 'nothing'}", hint)


def test_the_update_goes_into_the_rows():
    """Number by number, on a batch [2, 5, D]."""
    B, x = random_numbers(len(ROWS), RANK, seed=4), random_numbers(2, 5, D, seed=5)
    adapter, W, bias = layer(B)
    A = adapter.A.detach().double().numpy()
    base, update = x @ W.T + bias, x @ A.T @ B.T  # [2, 5, OUT], [2, 5, len(ROWS)]

    def add(scale, rows=ROWS):
        y = base.copy()
        for number, row in enumerate(rows):
            y[..., row] += scale * update[..., number]
        return y

    mistakes = {
        "scaled by alpha alone: alpha / rank": add(ALPHA),
        "not scaled: alpha / rank": add(1),
        "scaled by rank / alpha: alpha / rank": add(RANK / ALPHA),
        "scaled by alpha / sqrt(rank), which is rsLoRA: alpha / rank": add(ALPHA / RANK**0.5),
        "the update went to the first rows: y[.., rows] += ...": add(
            ALPHA / RANK, range(len(ROWS))
        ),
        "the update went to all rows: y[.., rows] += ...": base
        + ALPHA / RANK * np.tile(update, OUT // len(ROWS)),
        "the bias is lost: call self.linear": add(ALPHA / RANK) - bias,
        "this is the base layer alone: the update is missing": base,
        "the update took the place of the outputs: add it": add(ALPHA / RANK)
        - base * np.isin(np.arange(OUT), ROWS),
    }
    check("y for x [2, 5, D]", adapter(tensor(x)), add(ALPHA / RANK), mistakes)


def test_gradients_reach_A_and_B():
    adapter, _, _ = layer(random_numbers(len(ROWS), RANK, seed=6))
    y = adapter(tensor(random_numbers(5, D, seed=7)))
    if y.requires_grad:
        y.square().sum().backward()
    for name in ("A", "B"):
        gradient = getattr(adapter, name).grad
        if gradient is None or not gradient.any():
            hint = "no detach, no .data, no torch.no_grad() in forward"
            fail(
                f"the gradient of {name} is missing", hint, sure=gradient is None
            )  # it may be zero for other reasons


def test_bfloat16_stays_bfloat16():
    adapter, _, _ = layer(dtype=torch.bfloat16)
    dtypes = {"A": adapter.A.dtype, "B": adapter.B.dtype}
    if set(dtypes.values()) != {torch.float32}:
        fail(
            f"A and B beside a bfloat16 weight: expected float32, came {dtypes}",
            "what trains stays in float32",
        )
    y = adapter(torch.ones(3, D, dtype=torch.bfloat16))
    if y.dtype != torch.bfloat16:
        fail(
            f"y for x in bfloat16: expected torch.bfloat16, came {y.dtype}",
            "cast A and B to x.dtype, and not x",
        )
