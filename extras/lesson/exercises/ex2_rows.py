"""Exercise 2: the rows that RoAE adapts. About 10 minutes.

You write one function of rosa.py, `adapted_rows`. Your exercise 3 will call it.

A query is q = W x with W [H * d, D]: H = num_heads, d = head_dim, D = hidden_size. Row r of W makes
number r of q. The rows of the heads lie one after the other: head h has the rows h * d, ...,
h * d + d - 1.

In a head, pair i is the rows i and i + d/2 (exercise 1), and the last pairs turn slowest. RoAE
adapts the last n pairs of every head, both rows of each:

    n = max(1, round(low_freq_ratio * d / 2))       round is Python's own

An example. Two heads of d = 8 and low_freq_ratio = 0.5: four pairs a head, n = 2.

    row           0  1  2  3 | 4  5  6  7 || 8  9 10 11 | 12 13 14 15
    head          0          |            || 1          |
    pair          0  1  2  3 | 0  1  2  3 || 0  1  2  3 |  0  1  2  3
    adapted             x  x |       x  x ||       x  x |        x  x

    adapted_rows(16, 2, 0.5)  ->  [2, 3, 6, 7, 10, 11, 14, 15]

low_freq_ratio says which part of the d/2 pairs of a head adapts. Every pair has two rows, so n
pairs are 2 * n rows. However small the ratio, one pair remains. With low_freq_ratio = 1 these are
all rows, and what follows is plain LoRA.

To do: return the rows as a LongTensor in ascending order, num_heads * 2 * n of them. out_features
is H * d, so d = out_features // num_heads. Nested loops will do; a .view of torch.arange needs
none.

To avoid:
- int(...) in the place of round(...): it cuts 1.6 to 1.
- n = int(low_freq_ratio * d): that counts rows, not pairs.
- The slice [-n:] with n = 0, which is everything.
- A number of heads that is fixed: in some models keys have fewer heads than queries. Whoever calls
  gives the number of heads of the projection at hand.

Run: python -m pytest extras/lesson/exercises -q -k ex2      (pip install pytest, if it is missing)
"""

import torch  # noqa: F401 - for your code


def adapted_rows(out_features, num_heads, low_freq_ratio):
    """The rows of a weight [out_features, D] that adapt: LongTensor, ascending. out_features is
    num_heads * d."""
    raise NotImplementedError("exercise 2: the last n pairs of every head; see the drawing")
