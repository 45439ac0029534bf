"""Exercise 1, from one frequency to a whole Llama."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from checking import (
    as_array,
    check,
    check_dtype,
    difference,
    fail,
    random_numbers,
    same,
    tensor,
    yours,
)

import model

pytest_plugins = ["short_messages"]

ex1_rotation = yours("ex1_rotation")
rope_inverse_frequencies = ex1_rotation.rope_inverse_frequencies
rope_table = ex1_rotation.rope_table
rotate = ex1_rotation.rotate

LOW_PRECISION = torch.bfloat16, torch.float16

NEIGHBOURS = "these pairs are neighbours, (2i, 2i + 1); here pair i is (i, i + d/2)"
MIXED = "the pairs are neighbours, the tables are of halves: here pair i is (i, i + d/2)"
CLOCKWISE = (
    "this turns clockwise, as by -angle: the sin table begins with -sin; its second half is sin"
)
BOTH = "neighbours for pairs, and clockwise: see the drawing, then the equations"
READ = (
    "pairs are read as neighbours (0::2, 1::2) and written as halves: in both places they are "
    "(i, i + d/2)"
)
WRITTEN = "pairs are read as halves and written as neighbours: in both places they are (i, i + d/2)"
MINUS = (
    "the minus is there twice: it is in the sin table, (-sin, sin), so it is (b, a) that is "
    "multiplied by it, not (-b, a), and a' = a * cos + b * (-sin)"
)
NO_SWAP = "both tables multiply x: the sin table multiplies (b, a), the halves exchanged"
IN_PLACE = (
    "b' was made of a', not of a: a and b are views, and writing a' into the first half changes "
    "a; make a' and b' first, then torch.cat"
)
INTERLEAVED = (
    "the pairs are halves, (i, i + d/2), the tables are of neighbours, as repeat_interleave makes "
    "them: use those that came"
)
OTHER_AXIS = "rolled along the positions: the dimension of a head is the last, .roll(d // 2, -1)"
ROLLED_BY_1 = "rolled by one: the halves change places, .roll(d // 2, -1)"
FLIPPED = "flip turns the order around: (b, a) are the halves exchanged, .roll(d // 2, -1)"
ROLLED = "roll without a dimension runs through all tokens: .roll(d // 2, -1)"


def turn(x, angles, read="halves", written="halves", signs=(-1, 1)):
    """The rotation, number by number: x [.., T, d], angles [T, d/2]."""
    y, (T, pairs) = np.zeros(x.shape), angles.shape
    for t in range(T):
        for i in range(pairs):
            places = {"halves": (i, i + pairs), "neighbours": (2 * i, 2 * i + 1)}
            cos, sin = np.cos(angles[t, i]), np.sin(angles[t, i])
            a, b = (x[..., t, place] for place in places[read])
            first, second = places[written]
            y[..., t, first] = a * cos + signs[0] * b * sin
            y[..., t, second] = b * cos + signs[1] * a * sin
    return y


def tables(angles):
    """angles [T, d/2] -> the two tables [1, T, d], float64."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((cos, cos), -1)[None], np.concatenate((-sin, sin), -1)[None]


def interleaved(table):
    """The first half of a table as repeat_interleave(2) of its columns."""
    return np.repeat(table[..., : table.shape[-1] // 2], 2, -1)


def mistakes_in(x, angles):
    cos, sin = tables(angles)
    half = x.shape[-1] // 2
    right = turn(x, angles)
    overwritten = right.copy()  # the second half made of the new first half
    overwritten[..., half:] = x[..., half:] * cos[..., half:] + right[..., :half] * sin[..., half:]
    signs, abs_sin = np.repeat([-1, 1], half), sin * np.repeat([-1, 1], half)
    swapped = x.reshape(*x.shape[:-1], half, 2)[..., ::-1].reshape(x.shape)
    return {
        NEIGHBOURS: turn(x, angles, "neighbours", "neighbours"),
        CLOCKWISE: turn(x, angles, signs=(1, -1)),
        BOTH: turn(x, angles, "neighbours", "neighbours", (1, -1)),
        READ: turn(x, angles, read="neighbours"),
        WRITTEN: turn(x, angles, written="neighbours"),
        MINUS: turn(x, angles, signs=(1, 1)),
        MIXED: x * cos + swapped * sin,
        INTERLEAVED: x * interleaved(cos) + np.roll(x, half, -1) * signs * interleaved(abs_sin),
        NO_SWAP: x * cos + x * sin,
        IN_PLACE: overwritten,
        OTHER_AXIS: x * cos + np.roll(x, half, -2) * sin,
        ROLLED_BY_1: x * cos + np.roll(x, 1, -1) * sin,
        FLIPPED: x * cos + x[..., ::-1] * sin,
        ROLLED: x * cos + np.roll(x, half) * sin,
    }


def check_rotation(what, x, angles):
    """Compare with `rotate` for x [B, heads, T, d] and these angles [T, d/2]."""
    found = rotate(tensor(x), *map(tensor, tables(angles)))
    check(what, found, turn(x, angles), mistakes_in(x, angles))


def config_of(head_dim, rope_theta=10000.0):
    return SimpleNamespace(head_dim=head_dim, rope_theta=rope_theta, rope_scaling=None)


def mistakes_in_frequencies(d, theta):
    i, dimensions = np.arange(d // 2), np.arange(d)
    one_each = "a frequency for each pair, not for each dimension"
    return [
        ("in reverse order: pair 0 is the fastest", theta ** (-2 * i[::-1] / d)),
        ("the exponent is -2i / d, not -i / d: a head has d/2 pairs", theta ** (-i / d)),
        ("arange(0, d, 2) is 2i already: the exponent is -2i / d", theta ** (-4 * i / d)),
        ("the exponent is negative", theta ** (2 * i / d)),
        ("pairs are counted from 0", theta ** (-2 * (i + 1) / d)),
        (one_each, theta ** (-2 * dimensions / d)),
        (f"{one_each}: i goes from 0 to d/2 - 1", theta ** (-dimensions / d)),
        (f"{one_each}: no repeat_interleave here", np.repeat(theta ** (-2 * i / d), 2)),
        ("/ divides; // cuts the fraction off", np.ones(d // 2)),
        ("/ divides; // cuts the fraction off, downwards", theta ** (-2.0 * i // d)),
    ]


def test_frequencies_of_a_head_of_8():
    found = rope_inverse_frequencies(config_of(8))
    check("inv_freq of d = 8", found, [1, 0.1, 0.01, 0.001], mistakes_in_frequencies(8, 10000.0))
    check_dtype("inv_freq", found, torch.float32, "torch.arange(...) of whole numbers: .float()")


def test_frequencies_depend_on_theta():
    found = rope_inverse_frequencies(config_of(6, 1000.0))
    ignored = 10000.0 ** (-2 * np.arange(3) / 6)
    mistakes = [("theta is config.rope_theta; models have other ones than 10000", ignored)]
    mistakes += mistakes_in_frequencies(6, 1000.0)
    check("inv_freq of d = 6, theta = 1000", found, [1, 0.1, 0.01], mistakes)


def test_the_shape_of_the_tables():
    found = rope_table(torch.tensor([0, 1, 5]), torch.tensor([1.0, 0.5]))
    if not isinstance(found, tuple | list) or len(found) != 2:
        fail(f"expected two tables, came {type(found).__name__}", "return cos_table, sin_table")
    hints = {
        (3, 2): "a column for each dimension, not for each pair: torch.cat, then unsqueeze(0)",
        (1, 3, 2): "a column for each dimension, not for each pair: torch.cat((cos, cos), -1)",
        (3, 1, 4): "the 1 stands in front of T, for the heads: unsqueeze(0), not unsqueeze(1)",
        (1, 6, 2): "the halves stand below each other: side by side with torch.cat(..., -1)",
        (6, 2): "the halves stand below each other: side by side with torch.cat(..., -1)",
        (3, 4): "a dimension of 1 stands in front, for the heads: unsqueeze(0)",
    }
    for name, table in zip(("cos", "sin"), found):
        if tuple(table.shape) != (1, 3, 4):
            fail(
                f"{name} table of 3 positions, d = 4: expected shape [1, 3, 4], came "
                f"{list(table.shape)}",
                hints.get(tuple(table.shape), "[1, T, d]: see 2 in the text"),
            )
        hint = "angles and tables are float32, whatever the dtype of x"
        check_dtype(f"{name} table", table, torch.float32, hint)


def mistakes_in_table(positions, inv_freq, which):
    """The mistakes in the table 0, (cos, cos), or 1, (-sin, sin), as pairs."""
    angles = positions[:, None] * inv_freq
    name, function = [("cos", np.cos), ("sin", np.sin)][which]
    half, other = function(angles), [np.sin, np.cos][which](angles)

    def table(angles):
        return tables(angles)[which]

    rows = np.arange(len(positions))[:, None] * inv_freq
    interleaved = (
        f"this {name} table is of neighbours, as repeat_interleave makes it: the second half "
        "repeats the first, torch.cat"
    )
    mistakes = [
        ("the tables are exchanged: (cos, cos), then (-sin, sin)", tables(angles)[1 - which]),
        ("positions are off by one: the first is 0", table(angles + inv_freq)),
        ("positions are off by one, by -1: the first is 0", table(angles - inv_freq)),
        ("use the positions given, not 0, 1, 2, ...", table(rows)),
        ("these are degrees: PyTorch's cos and sin want radians", table(np.radians(angles))),
        (
            "a position is multiplied by the frequency, not divided",
            table(positions[:, None] / inv_freq),
        ),
        (interleaved, np.repeat(half, 2, -1)[None]),
        (f"this is {('cos', 'sin')[1 - which]}, and {name} comes here", np.tile(other, 2)[None]),
    ]
    if which == 1:
        sin = half
        mistakes += [
            ("the sign is missing: (-sin, sin), not (sin, sin)", np.tile(sin, 2)[None]),
            (
                "the minus belongs to the first half: (-sin, sin)",
                np.concatenate((sin, -sin), -1)[None],
            ),
            ("the minus belongs to the first half alone: (-sin, sin)", np.tile(-sin, 2)[None]),
            (interleaved, np.stack((-sin, sin), -1).reshape(1, len(sin), -1)),
        ]
    # A position and a frequency rounded before they are multiplied, or their product rounded; and
    # then the cosine rounded or not
    p, f = torch.tensor(positions)[:, None], tensor(inv_freq)
    for dtype in LOW_PRECISION:
        for product in (p.to(dtype) * f.to(dtype), (p.float() * f).to(dtype)):
            for final in (product.float(), product):
                values = getattr(final, name)()
                numbers = torch.cat((values if which == 0 else -values, values), -1)[None]
                hint = f"the angles were made in {dtype}: positions.float() * inv_freq, in float32"
                mistakes.append((hint, numbers))
    return mistakes


def test_the_angle_is_position_times_frequency():
    positions, inv_freq = np.array([0, 3, 10, 11]), np.array([1, 0.3])
    found = rope_table(torch.tensor(positions), tensor(inv_freq))
    expected = tables(positions[:, None] * inv_freq)
    for which, name in enumerate(("cos", "sin")):
        mistakes = mistakes_in_table(positions, inv_freq, which)
        check(f"{name} table of positions 0, 3, 10, 11", found[which], expected[which], mistakes)


def test_angles_of_late_positions_are_as_exact():
    """Float32 has angles near 8000 to a thousandth. Bfloat16 has them to 16 or 32, float16 to 4."""
    early, inv_freq = np.array([0, 1, 2]), np.array([1, 0.9, 0.05])
    for found, expected in zip(
        rope_table(torch.tensor(early), tensor(inv_freq)), tables(early[:, None] * inv_freq)
    ):
        if not same(as_array("table", found), expected, 0.02):
            return  # it is wrong from the start, which the test above says
    positions = np.array([1001, 1003, 8001, 8003])
    found = rope_table(torch.tensor(positions), tensor(inv_freq))
    rounded = [as_array("", torch.tensor(positions).to(dtype)) for dtype in LOW_PRECISION]
    for which, name in enumerate(("cos", "sin")):
        table, exact = as_array(name, found[which]), tables(positions[:, None] * inv_freq)[which]
        if not same(table, exact, 4e-3):
            off = [tables(each[:, None] * inv_freq)[which] for each in rounded]
            fail(
                f"{name} table of positions 1001 to 8003: {difference(table, exact, 4e-3)}",
                "positions or angles were rounded: positions.float() * inv_freq, in float32",
                sure=any(same(table, each, 4e-3) for each in off),
            )


def test_a_point_turns_by_a_right_angle():
    check_rotation("the pair (1, 0), turned by 90 degrees", as_x([1, 0]), np.array([[np.pi / 2]]))


def as_x(numbers):
    """One token of one head of one row: [1, 1, 1, d]."""
    return np.array(numbers, dtype=np.float64).reshape(1, 1, 1, -1)


def test_a_pair_is_half_a_head_apart():
    angles = np.array([[np.pi / 2, 0]])  # pair 0 turns, pair 1 rests
    check_rotation("[1, 2, 0, 0], pair 0 turned by 90 degrees", as_x([1, 2, 0, 0]), angles)


def test_every_number_of_many_heads():
    x, angles = random_numbers(2, 3, 5, 8, seed=1), 3 * random_numbers(5, 4, seed=2)
    check_rotation("x [2, 3, 5, 8]", x, angles)


def test_x_itself_stays():
    x = tensor(random_numbers(1, 1, 5, 8, seed=3))
    before = x.clone()
    rotate(x, *map(tensor, tables(3 * random_numbers(5, 4, seed=4))))
    hint = (
        "x was written into: chunk, slices, and .float() of a float32 x are views of x; build a "
        "new tensor"
    )
    if not torch.equal(x, before):
        fail("x has changed after rotate(x, ...)", hint)


def test_the_dtype_of_x_comes_back():
    for dtype in LOW_PRECISION:
        found = rotate(
            torch.ones(1, 1, 5, 8, dtype=dtype), torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
        )
        check_dtype(f"rotate of an x in {dtype}", found, dtype, "end with .to(x.dtype)")


def test_a_bfloat16_x_is_rotated_in_float32():
    """Rounded once, at the end, a number is off by 1/256 of itself at most. Where a factor or a
    product was rounded too, and the two products nearly cancel, it is off by far more."""
    x = tensor(random_numbers(2, 4, 32, 16, seed=5), torch.bfloat16)
    angles = 3 * random_numbers(32, 8, seed=6)
    exact = turn(as_array("x", x), angles)
    if not same(as_array("x", rotate(x.float(), *map(tensor, tables(angles)))), exact):
        return  # it is wrong in float32 too, which the tests above say
    found = as_array("x", rotate(x, *map(tensor, tables(angles))))
    if found.shape != exact.shape or not (abs(found - exact) <= abs(exact) / 250 + 1e-5).all():
        place = np.unravel_index((abs(found - exact) / (abs(exact) + 1e-3)).argmax(), exact.shape)
        fail(
            f"x in bfloat16: expected {exact[place]:.4g} but for the last rounding, came "
            f"{found[place]:.4g}",
            "computed in the dtype of x: x.float() times the float32 tables, then .to(x.dtype)",
            sure=same(found, exact, 0.1),  # else it is wrong for another reason
        )


def test_the_three_functions_together():
    x, positions = random_numbers(1, 2, 4, 16, seed=7), np.array([0, 2, 5, 20])
    cos, sin = rope_table(torch.tensor(positions), rope_inverse_frequencies(config_of(16)))
    angles = positions[:, None] * 10000.0 ** (-2 * np.arange(8) / 16)
    what, found = "positions 0, 2, 5, 20, d = 16", rotate(tensor(x), cos, sin)
    check(what, found, turn(x, angles), hint="first the tests above")


def test_only_the_distance_counts():
    q, k = (tensor(random_numbers(1, 1, 1, 16, seed=seed)) for seed in (8, 9))

    def product(m, n):
        inv_freq = rope_inverse_frequencies(config_of(16))
        tables = [rope_table(torch.tensor([p]), inv_freq) for p in (m, n)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    what, hint = "q at 9 by k at 7, as q at 2 by k at 0", "angle = position * frequency"
    check(what, product(9, 7), product(2, 0), hint=hint)


def small_llama():
    """Two layers, and a theta of 100. The projections of queries and keys are large, so that what
    attention sees depends on positions."""
    config = model.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=100.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = model.Llama(config)
    with torch.no_grad():
        llama.model.embed_tokens.weight.mul_(50)
        for layer in llama.model.layers:
            for linear in layer.self_attn.children():
                linear.weight.mul_(20)
    return llama


def test_a_whole_llama_computes_the_same_with_your_functions():
    """Logits, and what a training step needs, the gradient of a query projection."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 4, 1, 5, 9]])
    labels = tokens.roll(-1, 1)
    yours = {
        "rope_inverse_frequencies": rope_inverse_frequencies,
        "rope_table": rope_table,
        "rotate": rotate,
    }

    def run():
        llama = small_llama()
        logits = llama(tokens)
        llama.loss(tokens, labels).backward()
        return logits, llama.model.layers[0].self_attn.q_proj.weight.grad

    logits, gradient = run()
    with patch.multiple(model, **yours):
        your_logits, your_gradient = run()
    check("the logits of a Llama", your_logits, logits, hint="first the tests above")
    if your_gradient is None:
        hint = "the gradient goes through rotate: no detach, no .data, no torch.no_grad()"
        fail("the query projection of a Llama gets no gradient", hint)
    what, hint = "the gradient of a Llama's q_proj", "first the tests above"
    check(what, your_gradient, gradient, hint=hint)
