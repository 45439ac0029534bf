"""Exercise 2, from one head with two pairs to any projection."""

import torch
from checking import as_array, check, fail
from ex2_rows import adapted_rows

pytest_plugins = ["short_messages"]


def rows_of(chosen, d, heads, halves=(0, 1)):
    """The rows of the chosen pairs of each head, or of one half of them."""
    return sorted(h * d + half * (d // 2) + i for h in heads for half in halves for i in chosen)


def last(n, pairs):
    return range(pairs - min(n, pairs), pairs)


def check_rows(num_heads, d, ratio, n):
    """n: how many pairs of a head adapt."""
    pairs, heads, rows = d // 2, range(num_heads), list(range(num_heads * d))
    right = last(n, pairs)
    mistakes = {
        "these are the first pairs, which turn fast: take the last": rows_of(range(n), d, heads),
        "one half only: pair i has the rows i and i + d/2": rows_of(right, d, heads, halves=[0]),
        "one half only, the second: pair i has the rows i and i + d/2": rows_of(
            right, d, heads, halves=[1]
        ),
        "these are the rows of head 0 alone: head h begins at row h * d": rows_of(right, d, [0]),
        "the end of each head in one piece: pairs are (i, i + d/2), not (2i, 2i + 1)": [
            r for r in rows if r % d >= d - 2 * n
        ],
        "the end of the whole projection: every head has its last pairs": rows[
            -2 * n * num_heads :
        ],
        "the end of each head in one piece: RoAE adapts pairs, and a pair's rows are i and i + d/2": [
            r for r in rows if r % d >= d - int(ratio * d)
        ],
        "n counts pairs: a share of d/2, not of d": rows_of(
            last(round(ratio * d), pairs), d, heads
        ),
        "no row: n is at least 1, max(1, ...)": [],
        "n was rounded down: round(1.6) is 2, int(1.6) is 1": rows_of(
            last(max(1, n - 1), pairs), d, heads
        ),
        "n was rounded up: round to the nearest": rows_of(last(n + 1, pairs), d, heads),
        "all rows: with n = 0 the slice [-n:] is everything; n is at least 1": rows,
    }
    found = adapted_rows(num_heads * d, num_heads, ratio)
    expected, what = (
        rows_of(right, d, heads),
        f"{num_heads} head(s) of d = {d}, low_freq_ratio {ratio}",
    )
    numbers = as_array(what, found)
    if numbers.tolist() != expected == sorted(numbers.flatten().tolist()):
        fail(
            f"{what}: the right rows, shape {list(numbers.shape)}",
            "one list in ascending order: flatten, sort",
        )
    check(what, found, expected, mistakes, hint="compare with the drawing in the text")


def test_one_head_of_two_pairs():
    check_rows(1, 4, 0.5, n=1)  # rows 1 and 3


def test_one_head_of_four_pairs():
    check_rows(1, 8, 0.5, n=2)  # rows 2, 3 and 6, 7


def test_every_head():
    check_rows(3, 8, 0.25, n=1)  # rows 3, 7, 11, 15, 19, 23


def test_a_small_ratio_leaves_one_pair():
    check_rows(2, 8, 0.01, n=1)


def test_rounding_up():
    check_rows(2, 8, 0.4, n=2)  # 1.6


def test_rounding_down():
    check_rows(2, 8, 0.3, n=1)  # 1.2


def test_all_pairs_are_all_rows():
    check_rows(2, 8, 1.0, n=4)


def test_the_sizes_of_real_heads():
    for num_heads, d, ratio, n in ((9, 64, 0.25, 8), (4, 16, 0.5, 4), (1, 128, 0.35, 22)):
        check_rows(num_heads, d, ratio, n)


def test_rows_can_index():
    found = adapted_rows(16, 2, 0.5)
    if getattr(found, "dtype", None) != torch.long:
        fail(
            f"expected a LongTensor, came {getattr(found, 'dtype', type(found).__name__)}",
            "torch.tensor(rows) makes one",
        )
