"""Exercise 1: RoPE's angles, and its rotation.

A query or key of one head has d = head_dim numbers. RoPE sees them as d/2 pairs, d/2 points in a plane, and turns each
point by an angle that grows with the token's position. In checkpoints as Hugging Face lays them out, pair i is made
of the dimensions i and i + d/2: its two members are half a head apart, not neighbours. Here d = 8:

    dimension     0   1   2   3   4   5   6   7
                  |   |   |   |   |   |   |   |
                  +---|---|---|---+   |   |   |       pair 0: (0, 4), the fastest
                      +---|---|-------+   |   |       pair 1: (1, 5)
                          +---|-----------+   |       pair 2: (2, 6)
                              +---------------+       pair 3: (3, 7), the slowest

1. Frequencies. Pair i turns by this many radians from one position to the next, i = 0, 1, ..., d/2 - 1:

    inv_freq[i] = theta ** (-2 * i / d)         [d/2], float32

   Pair 0 has frequency 1, about six positions for a full turn. The last pairs hardly move: these are the low
   frequencies on which all of RoSA rests.

2. Table. The first token is at position 0, and does not turn.

    angle[t, i] = positions[t] * inv_freq[i]    [T, d/2];  cos and sin of it: [T, d/2] each, float32

3. Rotation. Counterclockwise, as in a school book, with a = x[.., i], b = x[.., i + d/2]:

    a' = a * cos - b * sin
    b' = a * sin + b * cos

   x is [.., T, d], for example [B, heads, T, d]; cos and sin broadcast over what stands before T. The result has the
   shape and the dtype of x. Compute in float32: in bfloat16 angles near 1000 are whole multiples of 4.

To do: the three functions below. `x[..., : d // 2]` is the first half, torch.cat joins halves. No loops.
To avoid: x[..., 0::2], which takes neighbours for pairs (some other implementations store their weights for that);
angles in degrees; changing x itself.
Why it works: the dot product of a query at position m and a key at position n depends on m - n alone; the last test
looks at that.

Run: python -m pytest extras/lesson/exercises -q -k ex1      (pip install pytest, if it is not there)
"""

import torch  # noqa: F401 - for your code


def rope_inverse_frequencies(head_dim, theta=10000.0):
    """Radians per position of each pair: [head_dim / 2], float32."""
    raise NotImplementedError("exercise 1: theta ** (-2i / d) per pair; see 1 in the text")


def rope_table(positions, inv_freq):
    """positions [T], inv_freq [d/2] -> (cos, sin), each [T, d/2]."""
    raise NotImplementedError("exercise 1: cos, sin of position * frequency; see 2 in the text")


def rotate(x, cos, sin):
    """x [.., T, d], cos and sin [T, d/2] -> [.., T, d]."""
    raise NotImplementedError("exercise 1: rotate the pairs (i, i + d/2); see 3 in the text")
