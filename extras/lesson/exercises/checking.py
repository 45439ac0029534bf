"""What the tests of all exercises compare with. A failure is a line that says what was expected and
what came, and a hint. To find the hint, a test also computes what likely mistakes would give, and
sees which of them the numbers fit."""

import importlib
import os

import numpy as np
import pytest
import torch

SEED = int(os.environ.get("ROSA_TEST_SEED", 0))
# Float32 carries seven digits, and sums here have a few dozen terms of size 10 at most: right
# results are nearer than this to those of float64, wrong ones are not.
TOLERANCE = 1e-5
STORY = []  # lines about what the reader's code did, which short_messages.py prints at the end


def yours(name):
    """The reader's file, a module. Where Python cannot read it, each use of it fails with that
    error, so that the tests of other exercises can run."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return Unreadable(error)


class Unreadable:
    def __init__(self, error):
        self._error, self._traceback = error, error.__traceback__

    def __getattr__(self, name):
        def fails(*arguments, **options):
            raise self._error.with_traceback(self._traceback)

        return fails


def random_numbers(*shape, seed=0):
    """Normally distributed float64 numbers, other ones for each seed."""
    return np.random.default_rng([SEED, seed]).standard_normal(shape)


def tensor(numbers, dtype=torch.float32):
    """A tensor of its own, which shares no memory with `numbers`."""
    return torch.tensor(np.array(numbers), dtype=dtype)


def check(what, found, expected, mistakes=(), hint="compare with the equation in the text"):
    """Fail unless `found` is `expected`. mistakes: a dict, hint -> the numbers that this mistake
    gives, or a list of such pairs; `hint`: for others. Where the numbers fit no mistake, or two,
    the hint is a guess. It begins with what can be seen in the numbers."""
    found, expected = as_array(what, found), as_array(what, expected)
    if same(found, expected):
        return
    if isinstance(mistakes, dict):
        mistakes = mistakes.items()
    fitting = [each for each, numbers in mistakes if same(found, as_array(what, numbers))]
    fitting = list(dict.fromkeys(fitting))
    if not fitting:
        hint = f"{clue(found, expected)}; {hint}"
    elif len(fitting) > 1:
        hint = f"one of these: {'; or: '.join(fitting[:2])}"
    else:
        (hint,) = fitting
    fail(f"{what}: {difference(found, expected)}", hint, len(fitting) == 1, fitting)


def clue(found, expected):
    """What can be seen in numbers that no known mistake gives."""
    if found.shape != expected.shape:
        return clue_of_shapes(found, expected)
    if np.isnan(found).any():
        return "nan comes from 0 / 0 or inf - inf"
    wrong = ~near(found, expected)
    if same(found, expected, 1e-2):
        return "nearly right: something was rounded, as bfloat16 does"
    if same(found, -expected):
        return "the numbers are right, their sign is not"
    if same(np.sort(found, None), np.sort(expected, None)):
        return "these are the right numbers in another order"
    if found.size > 1 and not found.any():
        return "all are 0"
    ratios = found[np.abs(expected) > 1e-3] / expected[np.abs(expected) > 1e-3]
    if ratios.size > 1 and same(ratios, np.full_like(ratios, ratios[0]), 1e-4):
        return f"every number is {short(ratios[0])} times what it should be"
    if found.size > 1 and wrong.mean() <= 0.5:
        return f"{wrong.sum()} of {wrong.size} numbers are wrong, the others are right"
    return "no mistake that we know gives this"


def clue_of_shapes(found, expected):
    if found.size == expected.size:
        return "as many numbers, in another shape"
    if found.ndim == expected.ndim == 1:
        more, less = np.setdiff1d(found, expected), np.setdiff1d(expected, found)
        if more.size and not less.size:
            return f"too many, such as {short(more[0])}"
        if less.size and not more.size:
            return f"some are missing, such as {short(less[0])}"
    return "no mistake that we know gives this shape"


def check_dtype(what, found, expected, hint):
    """Fail unless this tensor has this dtype."""
    dtype = getattr(found, "dtype", type(found).__name__)
    if dtype != expected:
        fail(f"{what}: expected {expected}, came {dtype}", hint)


def fail(message, hint, sure=True, fitting=()):
    """sure: the hint is no guess. fitting: hints that the numbers fit."""
    error = pytest.fail.Exception(f"{message}\nhint: {hint}", pytrace=False)
    error.sure, error.fitting = sure, fitting  # for short_messages.py
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
    if abs(numbers) < 1e-12:  # as the cosine of 90 degrees is
        return "0"
    if float(numbers).is_integer() and abs(numbers) < 1e12:
        return f"{numbers:.0f}"  # counts in full
    return f"{numbers:.4g}"
