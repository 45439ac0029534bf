"""Exercise 3: RoAE, a linear layer with a low-rank update of some of its rows.

The layer is frozen. What trains are two small matrices, A and B, whose product changes the outputs `rows` (exercise 2
chose them; here they are given), and no others:

                   +-- linear, frozen [out, D] ---------------+
    x [.., D] -----+                                          (+)----> y [.., out]
                   +-- A [rank, D] -- B [len(rows), rank] ----+
                                        * alpha / rank          only into y[.., rows]

    y           = W x + bias
    y[.., rows] = y[.., rows] + alpha / rank * B (A x)

alpha / rank keeps the size of the update about the same when you change the rank. Compute A x first, rank numbers a
token, then B of that: the product B A, as large as the rows of W, is never made.

How it starts. B is zero, so the update is zero and the adapted layer gives exactly what the base layer gives. A is
random: were both zero, each one's gradient, which the other multiplies, would be zero too, for ever.

    A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)), uniform between -1/sqrt(D) and 1/sqrt(D), as nn.Linear's weights
    B: zeros

Precision. Models are often kept in bfloat16, but what trains stays in float32, or small steps would be rounded away.
In `forward` cast A and B, which are small, to the dtype of x. Not x, the activations, which are large: y must have the
dtype of x.

To do: the class below, with the attributes linear, rows, rank, alpha, A, B; A and B are nn.Parameter. Freeze the
linear layer in __init__ (weight, and bias where there is one). In forward, F.linear(x, M) computes x @ M.T;
y.index_add(-1, rows, update) or y[..., rows] += update adds to some of the outputs.
To avoid: computing W x without the bias (call self.linear); alpha without rank; torch.randn for A.

Run: python -m pytest extras/lesson/exercises -q -k ex3      (pip install pytest, if it is not there)
"""

import math  # noqa: F401 - for your code

import torch  # noqa: F401 - for your code
import torch.nn.functional as F  # noqa: F401 - for your code
from torch import nn


class RoAE(nn.Module):
    """linear: nn.Linear(D, out); rows: LongTensor, which of the out rows adapt."""

    def __init__(self, linear, rows, rank, alpha):
        super().__init__()
        raise NotImplementedError("exercise 3: freeze linear, make A and B; see the text")

    def forward(self, x):  # [.., D] -> [.., out]
        raise NotImplementedError(
            "exercise 3: linear(x), plus the update of the rows; see the text"
        )
