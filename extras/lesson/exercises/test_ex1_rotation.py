"""Exercise 1, from one number to the whole rotation."""

import numpy as np
import torch
from checking import check, fail, random_numbers, tensor
from ex1_rotation import rope_inverse_frequencies, rope_table, rotate

pytest_plugins = ["short_messages"]

NEIGHBOURS = "these pairs are neighbours, (2i, 2i + 1); here pair i is (i, i + d/2)"
CLOCKWISE = "this turns clockwise, as by -angle: the minus belongs to b * sin in a'"
BOTH = "neighbours for pairs, and clockwise: see the drawing, then the equations"
READ = "pairs are read as neighbours (0::2, 1::2) and written as halves: in both places they are (i, i + d/2)"
WRITTEN = "pairs are read as halves and written as neighbours: in both places they are (i, i + d/2)"
NO_MINUS = "nothing turns without a minus: a' = a * cos - b * sin"


def turn(x, angles, read="halves", written="halves", signs=(-1, 1)):
    """The rotation, number by number: x [.., T, d], angles [T, d/2]."""
    y, (T, pairs) = np.zeros(x.shape), angles.shape
    for t in range(T):
        for i in range(pairs):
            places = {"halves": (i, i + pairs), "neighbours": (2 * i, 2 * i + 1)}
            cos, sin = np.cos(angles[t, i]), np.sin(angles[t, i])
            a, b = (x[..., t, place] for place in places[read])
            first, second = places[written]
            y[..., t, first], y[..., t, second] = (
                a * cos + signs[0] * b * sin,
                signs[1] * a * sin + b * cos,
            )
    return y


def mistakes_in(x, angles):
    return {
        NEIGHBOURS: turn(x, angles, "neighbours", "neighbours"),
        CLOCKWISE: turn(x, angles, signs=(1, -1)),
        BOTH: turn(x, angles, "neighbours", "neighbours", (1, -1)),
        READ: turn(x, angles, read="neighbours"),
        WRITTEN: turn(x, angles, written="neighbours"),
        NO_MINUS: turn(x, angles, signs=(1, 1)),
    }


def mistakes_in_frequencies(d, theta):
    i, dimensions = np.arange(d // 2), np.arange(d)
    return {
        "in reverse order: pair 0 is the fastest": theta ** (-2 * i[::-1] / d),
        "the exponent is -2i / d, not -i / d: a head has d/2 pairs": theta ** (-i / d),
        "the exponent is negative": theta ** (2 * i / d),
        "pairs are counted from 0": theta ** (-2 * (i + 1) / d),
        "a frequency for each pair, not for each dimension": theta ** (-2 * dimensions / d),
        "a frequency for each pair, not for each dimension: i goes from 0 to d/2 - 1": theta
        ** (-dimensions / d),
        "/ divides; // cuts the fraction off": np.ones(d // 2),
        "/ divides; // cuts the fraction off, downwards": theta ** (-2.0 * i // d),
    }


def test_frequencies_of_a_head_of_8():
    mistakes = mistakes_in_frequencies(8, 10000.0)
    check("inv_freq of d = 8", rope_inverse_frequencies(8), [1, 0.1, 0.01, 0.001], mistakes)


def test_frequencies_depend_on_theta():
    mistakes = {
        "theta is an argument; models have other ones than 10000": 10000.0
        ** (-2 * np.arange(3) / 6)
    }
    mistakes |= mistakes_in_frequencies(6, 1000.0)
    check(
        "inv_freq of d = 6, theta = 1000",
        rope_inverse_frequencies(6, 1000.0),
        [1, 0.1, 0.01],
        mistakes,
    )


def test_the_table_has_a_column_for_each_pair():
    cos, sin = rope_table(torch.tensor([0, 1, 5]), torch.tensor([1.0, 0.5]))
    for name, found in (("cos", cos), ("sin", sin)):
        if found.shape != (3, 2):
            came = list(found.shape)
            fail(
                f"{name} of 3 positions, 2 pairs: expected shape [3, 2], came {came}",
                "[T, d/2]: a column a pair",
            )


def test_the_angle_is_position_times_frequency():
    positions, inv_freq = np.array([0, 3, 10, 11]), np.array([1, 0.3])
    found = rope_table(torch.tensor(positions), tensor(inv_freq))
    right, late, early, row = (
        p[:, None] * inv_freq for p in (positions, positions + 1, positions - 1, np.arange(4))
    )
    for name, numbers, function, other in (
        ("cos", found[0], np.cos, np.sin),
        ("sin", found[1], np.sin, np.cos),
    ):
        mistakes = {
            "cos and sin are exchanged: return (cos, sin)": other(right),
            "positions are off by one: the first is 0": function(late),
            "positions are off by one, by -1: the first is 0": function(early),
            "use the positions given, not 0, 1, 2, ...": function(row),
            "these are degrees: PyTorch's cos and sin want radians": function(np.radians(right)),
        }
        check(f"{name} of positions 0, 3, 10, 11", numbers, function(right), mistakes)


def test_a_point_turns_by_a_right_angle():
    found = rotate(tensor([[1, 0]]), tensor([[0]]), tensor([[1]]))[0]
    check("the pair (1, 0), turned by 90 degrees", found, [0, 1], {CLOCKWISE: [0, -1]})


def test_a_pair_is_half_a_head_apart():
    found = rotate(tensor([[1, 2, 0, 0]]), tensor([[0, 1]]), tensor([[1, 0]]))[
        0
    ]  # pair 0 by 90 degrees, 1 rests
    mistakes = {
        hint: y[0]
        for hint, y in mistakes_in(np.array([[1, 2, 0, 0]]), np.array([[np.pi / 2, 0]])).items()
    }
    check("[1, 2, 0, 0], pair 0 turned by 90 degrees", found, [0, 2, 1, 0], mistakes)


def test_every_number_of_many_heads():
    x, angles = random_numbers(2, 3, 5, 8, seed=1), 3 * random_numbers(5, 4, seed=2)
    found = rotate(tensor(x), tensor(np.cos(angles)), tensor(np.sin(angles)))
    check("x [2, 3, 5, 8]", found, turn(x, angles), mistakes_in(x, angles))


def test_x_itself_stays():
    x = tensor(random_numbers(5, 8, seed=3))
    before = x.clone()
    rotate(x, *[torch.full((5, 4), 0.6), torch.full((5, 4), 0.8)])
    check(
        "x after rotate(x, ...)",
        x,
        before,
        hint="build a new tensor: a' is written where b' still needs a",
    )


def test_the_dtype_of_x_comes_back():
    found = rotate(torch.ones(5, 8, dtype=torch.bfloat16), torch.ones(5, 4), torch.zeros(5, 4))
    if found.dtype != torch.bfloat16:
        fail(f"x in bfloat16: expected torch.bfloat16, came {found.dtype}", "end with .to(x.dtype)")


def test_the_three_functions_together():
    x, positions = random_numbers(2, 4, 16, seed=4), np.array([0, 2, 5, 20])
    cos, sin = rope_table(torch.tensor(positions), rope_inverse_frequencies(16))
    angles = positions[:, None] * 10000.0 ** (-2 * np.arange(8) / 16)
    check(
        "positions 0, 2, 5, 20, d = 16",
        rotate(tensor(x), cos, sin),
        turn(x, angles),
        mistakes_in(x, angles),
    )


def test_only_the_distance_counts():
    q, k = tensor(random_numbers(1, 16, seed=5)), tensor(random_numbers(1, 16, seed=6))

    def product(m, n):
        tables = [rope_table(torch.tensor([p]), rope_inverse_frequencies(16)) for p in (m, n)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    check(
        "q at 9 by k at 7, as q at 2 by k at 0",
        product(9, 7),
        product(2, 0),
        hint="angle = position * frequency",
    )
