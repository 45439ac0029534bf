"""What the tests of all exercises compare with: a failure is a line that says what was expected and what came, and a
hint. To find it, a test also computes what likely mistakes would give, and sees which of them the numbers fit."""

import os

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("ROSA_TEST_SEED", 0))
# Float32 carries seven digits, and sums here have a few dozen terms of size 10 at most: right results are nearer than
# this to those of float64, wrong ones are not.
TOLERANCE = 1e-5


def random_numbers(*shape, seed=0):
    """Normally distributed float64 numbers, other ones for each seed."""
    return np.random.default_rng([SEED, seed]).standard_normal(shape)


def tensor(numbers, dtype=torch.float32):
    """A tensor of its own, which shares no memory with `numbers`."""
    return torch.tensor(np.array(numbers), dtype=dtype)


def check(what, found, expected, mistakes=None, hint="compare with the equation in the text"):
    """Fail unless `found` is `expected`. mistakes: hint -> the numbers that this mistake gives; `hint`: for others.
    Where the numbers fit no mistake, or two, the hint is a guess."""
    found, expected = as_array(what, found), as_array(what, expected)
    if same(found, expected):
        return
    fitting = [
        hint for hint, numbers in (mistakes or {}).items() if same(found, as_array(what, numbers))
    ]
    fail(f"{what}: {difference(found, expected)}", (fitting or [hint])[0], sure=len(fitting) == 1)


def fail(message, hint, sure=True):
    error = pytest.fail.Exception(f"{message}\nhint: {hint}", pytrace=False)
    error.sure = sure  # for short_messages.py
    raise error


def as_array(what, numbers):
    if numbers is None:
        fail(
            f"{what}: expected numbers, came None",
            "a function gives back what stands after `return`",
        )
    if isinstance(numbers, torch.Tensor):
        return numbers.detach().cpu().double().numpy()
    try:
        return np.array(
            [as_array(what, each) for each in numbers] if np.ndim(numbers) else float(numbers)
        )
    except (TypeError, ValueError):
        fail(
            f"{what}: expected numbers, came {type(numbers).__name__}",
            "return a tensor, or what the text says",
        )


def same(found, expected):
    return found.shape == expected.shape and np.allclose(
        found, expected, rtol=TOLERANCE, atol=TOLERANCE
    )


def difference(found, expected):
    """In so few words: small lists whole, of others the shapes or the first number that is wrong."""
    if max(found.size, expected.size) <= 8 and found.ndim == expected.ndim == 1:
        return f"expected {short(expected)}, came {short(found)}"
    if found.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, came {list(found.shape) if found.ndim else short(found)}"
    place = tuple(
        int(i) for i in np.argwhere(~np.isclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE))[0]
    )
    at = f" at {list(place)}" if place else ""
    return f"expected {short(expected[place])}{at}, came {short(found[place])}"


def short(numbers):
    return (
        f"[{', '.join(map(short, numbers))}]" if np.ndim(numbers) else f"{numbers + 0.0:.4g}"
    )  # + 0.0: no "-0"
