"""Exercise 1: RoPE's angles, and its rotation. About 25 minutes.

You write three functions of model.py. They have the same names, arguments and results as there. At
the end the tests put your three functions into a whole Llama, which must compute with them what it
computes with its own.

A query or key of one head has d = head_dim numbers. RoPE sees them as d/2 pairs, which are d/2
points in a plane. It turns each point by an angle that grows with the token's position. In
checkpoints as Hugging Face lays them out, pair i is made of the dimensions i and i + d/2. Its two
members are half a head apart, they are not neighbours. Here d = 8:

    dimension     0   1   2   3   4   5   6   7
                  |   |   |   |   |   |   |   |
                  +---|---|---|---+   |   |   |       pair 0: (0, 4), the fastest
                      +---|---|-------+   |   |       pair 1: (1, 5)
                          +---|-----------+   |       pair 2: (2, 6)
                              +---------------+       pair 3: (3, 7), the slowest

1. Frequencies. Pair i turns by this many radians from one position to the next, for i = 0, 1, ...,
   d/2 - 1:

    inv_freq[i] = theta ** (-2 * i / d)         [d/2], float32

   config.head_dim is d, config.rope_theta is theta. Pair 0 has frequency 1: a full turn takes it
   about six positions. The last pairs hardly move. They are the low frequencies that RoSA adapts.
   (model.py also knows config.rope_scaling. It is not asked for here.)

2. Tables. positions [T] are whole numbers. The first token is at position 0, and does not turn.

    angle[t, i] = positions[t] * inv_freq[i]    [T, d/2], float32

   `rotate` needs two tables, one that says (cos, cos) and one that says (-sin, sin). In each, the
   first half of the columns belongs to the first members of the pairs, and the second half to the
   second members. A dimension of 1 in front stands for the heads, which share the tables:

    first table    (cos, cos)     [1, T, d], float32
    second table   (-sin, sin)    [1, T, d], float32

3. Rotation. It is counterclockwise, as in a school book. With a = x[.., i] and b = x[.., i + d/2]:

    a' = a * cos - b * sin
    b' = b * cos + a * sin

   For all pairs at once this is (a, b) * (cos, cos) + (b, a) * (-sin, sin). The tables are the
   second factors. Hugging Face has the minus in a function, rotate_half, and (sin, sin) in the
   table. Here it is in the table, and nowhere else. x is [B, heads, T, d]. The result has the shape
   and the dtype of x, and x itself stays what it is.

An example: d = 4, theta = 10000, one head, one token at position 2. The pairs are (0, 2), (1, 3).

    inv_freq                     [1, 0.01]
    angle                        [2, 0.02]
    cos table                    [-0.4161, 0.9998, -0.4161, 0.9998]
    sin table                    [-0.9093, -0.0200, 0.9093, 0.0200]
    x = [1, 1, 0, 0] becomes     [-0.4161, 0.9998, 0.9093, 0.0200]

Precision. The angles, the tables and the rotation are float32, also if x is bfloat16: x is cast up,
and the result is cast back. In bfloat16 whole numbers near 1000 are multiples of 4, so the tokens
1001, 1002 and 1003 would be at the positions 1000, 1000 and 1004.

To do: the three functions below. They need no loops. `torch.cat((u, v), -1)` puts two halves side
by side, and `x.roll(d // 2, -1)` exchanges the halves of a head.

To avoid:
- The other convention: pairs of neighbours, x[..., 0::2] and x[..., 1::2], with tables made by
  `repeat_interleave(2, -1)`. Other implementations store their weights for that. Do not mix the
  two.
- Changing x. `x[..., : d // 2]` and the parts of `x.chunk(2, -1)` are views: who writes into them
  writes into x. `x.float()` is x itself where x is float32 already. And when a' is in the first
  half, the a that b' needs is lost.

Why it works: the dot product of a query at position m and a key at position n depends on m - n
alone. One of the last tests looks at that.

Run: python -m pytest extras/lesson/exercises -q -k ex1      (pip install pytest, if it is missing)
"""

import torch  # noqa: F401 - for your code


def rope_inverse_frequencies(config):
    """Radians per position of each pair: [d/2], float32. config has head_dim and rope_theta."""
    raise NotImplementedError("exercise 1: theta ** (-2i / d); see 1 in the text")


def rope_table(positions, inv_freq):
    """positions [T], inv_freq [d/2] -> (cos, cos) and (-sin, sin), each [1, T, d], float32."""
    raise NotImplementedError("exercise 1: cos and sin of the angles; see 2 in the text")


def rotate(x, cos, sin):
    """x [B, heads, T, d], the tables of rope_table -> the rotated x, in its shape and dtype."""
    raise NotImplementedError("exercise 1: turn the pairs (i, i + d/2); see 3 in the text")
