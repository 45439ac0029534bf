"""What the tests of all exercises compare with. A failure is a line that says what was expected and
what came, and a hint. To find the hint, a test also computes what likely mistakes would give, and
sees which of them the numbers fit."""

import os

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("ROSA_TEST_SEED", 0))
# Float32 carries seven digits, and sums here have a few dozen terms of size 10 at most: right
# results are nearer than this to those of float64, wrong ones are not.
TOLERANCE = 1e-5


def random_numbers(*shape, seed=0):
    """Normally distributed float64 numbers, other ones for each seed."""
    return np.random.default_rng([SEED, seed]).standard_normal(shape)


def tensor(numbers, dtype=torch.float32):
    """A tensor of its own, which shares no memory with `numbers`."""
    return torch.tensor(np.array(numbers), dtype=dtype)


def check(what, found, expected, mistakes=(), hint="compare with the equation in the text"):
    """Fail unless `found` is `expected`. mistakes: a dict, hint -> the numbers that this mistake
    gives, or a list of such pairs; `hint`: for others. Where the numbers fit no mistake, or two,
    the hint is a guess."""
    found, expected = as_array(what, found), as_array(what, expected)
    if same(found, expected):
        return
    if isinstance(mistakes, dict):
        mistakes = mistakes.items()
    fitting = [hint for hint, numbers in mistakes if same(found, as_array(what, numbers))]
    sure = len(set(fitting)) == 1
    fail(f"{what}: {difference(found, expected)}", (fitting or [hint])[0], sure)


def check_dtype(what, found, expected, hint):
    """Fail unless this tensor has this dtype."""
    dtype = getattr(found, "dtype", type(found).__name__)
    if dtype != expected:
        fail(f"{what}: expected {expected}, came {dtype}", hint)


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
        if np.ndim(numbers):
            return np.array([as_array(what, each) for each in numbers])
        return np.array(float(numbers))
    except (TypeError, ValueError):
        fail(
            f"{what}: expected numbers, came {type(numbers).__name__}",
            "return a tensor, or what the text says",
        )


def same(found, expected, tolerance=TOLERANCE):
    return found.shape == expected.shape and near(found, expected, tolerance).all()


def near(found, expected, tolerance=TOLERANCE):
    return np.isclose(found, expected, rtol=tolerance, atol=tolerance)


def difference(found, expected, tolerance=TOLERANCE):
    """In so few words: small lists whole, of others the shapes or the first number that is
    wrong."""
    if max(found.size, expected.size) <= 8 and found.ndim == expected.ndim == 1:
        return f"expected {short(expected)}, came {short(found)}"
    if found.shape != expected.shape:
        came = list(found.shape) if found.ndim else short(found)
        return f"expected shape {list(expected.shape)}, came {came}"
    place = tuple(int(i) for i in np.argwhere(~near(found, expected, tolerance))[0])
    at = f" at {list(place)}" if place else ""
    return f"expected {short(expected[place])}{at}, came {short(found[place])}"


def short(numbers):
    if np.ndim(numbers):
        return f"[{', '.join(map(short, numbers))}]"
    return f"{numbers + 0.0:.4g}"  # + 0.0: no "-0"
