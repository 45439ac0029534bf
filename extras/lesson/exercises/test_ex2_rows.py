"""Exercise 2, from one head with two pairs to any projection."""

import math

import torch
from checking import as_array, check, check_dtype, fail, yours

pytest_plugins = ["short_messages"]

ex2_rows = yours("ex2_rows")
adapted_rows = ex2_rows.adapted_rows

DOWN = "n was rounded down: round(1.6) is 2, int(1.6) is 1"
SHARE_OF_D = "n counts pairs: a share of d/2, not of d"
HALF = "one half only: pair i has the rows i and i + d/2"
NEIGHBOURS = "the end of each head in one piece: pairs are (i, i + d/2), not (2i, 2i + 1)"


def rows_of(chosen, d, heads, halves=(0, 1)):
    """The rows of the chosen pairs of each head, or of one half of them."""
    return sorted(h * d + half * (d // 2) + i for h in heads for half in halves for i in chosen)


def last(n, pairs):
    """The last n pairs, as the slice [-n:] counts them: all of them for n = 0."""
    return range(pairs)[-n:]


def check_rows(num_heads, d, ratio, n):
    """n: how many pairs of a head adapt."""
    pairs, heads, rows = d // 2, range(num_heads), list(range(num_heads * d))
    right = last(n, pairs)

    def with_n(n):
        return rows_of(last(n, pairs), d, heads)

    def ends(length):
        return [row for row in rows if row % d >= d - length]

    one_head = num_heads * d // 2  # the pairs of a projection that is one head
    mistakes = [
        ("these are the first pairs, which turn fast: take the last", rows_of(range(n), d, heads)),
        (HALF, rows_of(right, d, heads, halves=[0])),
        (f"{HALF}; these are the i + d/2", rows_of(right, d, heads, halves=[1])),
        ("these are the rows of head 0 alone: head h begins at h * d", rows_of(right, d, [0])),
        (NEIGHBOURS, ends(2 * n)),
        (NEIGHBOURS, ends(int(ratio * d))),
        (NEIGHBOURS, ends(max(1, round(ratio * d)))),
        (
            "the end of the whole projection: every head has its last pairs",
            rows[-2 * n * num_heads :],
        ),
        (
            "num_heads was not used: d is out_features // num_heads",
            rows_of(last(max(1, round(ratio * one_head)), one_head), 2 * one_head, [0]),
        ),
        (
            "n is the same for every head: it does not depend on num_heads",
            with_n(max(1, round(ratio * one_head))),
        ),
        (SHARE_OF_D, with_n(max(1, round(ratio * d)))),
        (SHARE_OF_D, with_n(max(1, int(ratio * d)))),
        (DOWN, with_n(max(1, int(ratio * pairs)))),
        (DOWN, with_n(max(1, int(ratio * d) // 2))),
        (
            "round(2.5) is 2: Python's round takes the even neighbour of a half",
            with_n(max(1, math.floor(ratio * pairs + 0.5))),
        ),
        # of a half, which is rounded up too, the mistake above is the likely one
        (
            "n was rounded up: round to the nearest",
            with_n(math.ceil(ratio * pairs) if ratio * pairs % 1 != 0.5 else n),
        ),
        ("all rows: with n = 0 the slice [-n:] is everything; n is at least 1", rows),
    ]
    if num_heads % 2 == 0:
        swapped = max(1, round(ratio * (num_heads // 2)))
        swapped = rows_of(last(swapped, num_heads // 2), num_heads, range(d))
        mistakes.append(("num_heads and d are exchanged: d = out_features // num_heads", swapped))
    columns = [  # .view(2, half, heads), in which heads are neighbours
        r for r in rows if r // num_heads % pairs in right
    ]
    mistakes.append(
        ("heads come first: .view(num_heads, 2, d // 2), and then the last n pairs", columns)
    )
    for fixed in (2, 4, 8, 12, 16, 32):
        own = num_heads * d // fixed  # d, were there so many heads
        if fixed != num_heads and own >= 2:
            of_fixed = rows_of(last(max(1, round(ratio * (own // 2))), own // 2), own, range(fixed))
            if of_fixed not in [each for _, each in mistakes]:
                mistakes.append((f"num_heads is fixed at {fixed}: it is an argument", of_fixed))
    mistakes = [(hint, each) for hint, each in mistakes if len(each)]
    mistakes.append(("no row: n is at least 1, max(1, ...)", []))
    expected = rows_of(right, d, heads)
    what = f"{num_heads} head{'s' * (num_heads > 1)} of d = {d}, low_freq_ratio {ratio}"
    found = adapted_rows(num_heads * d, num_heads, ratio)
    numbers = as_array(what, found)
    if numbers.tolist() != expected == sorted(numbers.flatten().tolist()):
        fail(
            f"{what}: the right rows, shape {list(numbers.shape)}",
            "one list in ascending order: flatten, sort",
        )
    if numbers.size and not (0 <= numbers.min() and numbers.max() < len(rows)):
        outside = numbers[(numbers < 0) | (numbers >= len(rows))].flatten()[0]
        fail(
            f"{what}: there are the rows 0 to {len(rows) - 1}, came row {outside:.0f} too",
            "is num_heads or d a fixed number? head h has the rows h * d to h * d + d - 1",
            sure=False,
        )
    check(what, found, expected, mistakes, hint="compare with the drawing in the text")


def test_one_head_of_two_pairs():
    check_rows(1, 4, 0.5, n=1)  # rows 1 and 3


def test_one_head_of_eight_pairs():
    check_rows(1, 16, 0.25, n=2)  # rows 6, 7 and 14, 15


def test_every_head():
    check_rows(3, 8, 0.25, n=1)  # rows 3, 7, 11, 15, 19, 23


def test_more_heads_than_dimensions():
    check_rows(6, 4, 0.5, n=1)  # rows 1, 3, 5, ...


def test_the_drawing():
    check_rows(2, 8, 0.5, n=2)


def test_rounding_up():
    check_rows(2, 16, 0.2, n=2)  # 1.6


def test_rounding_down():
    check_rows(2, 16, 0.3, n=2)  # 2.4


def test_rounding_a_half():
    check_rows(1, 20, 0.25, n=2)  # 2.5: Python's round takes the even neighbour


def test_a_small_ratio_leaves_one_pair():
    check_rows(3, 8, 0.01, n=1)


def test_all_pairs_are_all_rows():
    check_rows(2, 8, 1.0, n=4)


def test_the_sizes_of_real_heads():
    for num_heads, d, ratio, n in ((9, 64, 0.25, 8), (4, 16, 0.5, 4), (1, 128, 0.35, 22)):
        check_rows(num_heads, d, ratio, n)


def test_rows_can_index():
    found = adapted_rows(16, 2, 0.5)
    check_dtype("the rows", found, torch.long, "torch.tensor(rows), or a part of torch.arange(...)")
