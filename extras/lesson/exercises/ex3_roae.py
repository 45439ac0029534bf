"""Exercise 3: RoAE, a linear layer with a low-rank update of some of its rows. About 30 minutes.

You write the class RoAE of rosa.py. It asks your `adapted_rows` of exercise 2 for its rows, so
solve that one first.

The layer itself is kept as it is. What trains are two small matrices, A and B. Their product
changes the outputs `rows`, and no others:

                   +-- linear [out, D] -----------------------+
    x [.., D] -----+                                          (+)----> y [.., out]
                   +-- A [rank, D] -- B [len(rows), rank] ----+
                                        * alpha / rank          only into y[.., rows]

    y           = linear(x)                                         [.., out]
    y[.., rows] = y[.., rows] + alpha / rank * B (A x)              [.., len(rows)]

alpha / rank keeps the size of the update about the same when you change the rank.

An example: linear = nn.Linear(D = 1, out = 4) with all weights 1 and no bias, one head, rank 1,
alpha 2, low_freq_ratio 0.5. Then rows = [1, 3]. With A = [[5]], B = [[1], [10]] and x = [1]:

    A x = [5]     B (A x) = [5, 50]     times alpha / rank: [10, 100]     y = [1, 11, 1, 101]

Small is what LoRA is about. Compute A x first, rank numbers a token, then B of that, len(rows)
numbers a token. Two things are never made, because they are large:
- The product B @ A. It is as large as the rows of W.
- A B for all rows of W, or an update for all outputs, with zeros where nothing adapts.

How it starts. B is zero, so the update is zero and the adapted layer gives exactly what the base
layer gives. A is random. Were both zero, their gradients would be zero for ever, because the
gradient of each is a product with the other.

    A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)), uniform between -1/sqrt(D) and 1/sqrt(D)
    B: zeros

Precision. Models are often kept in bfloat16, but what trains is float32, or small steps would be
rounded away. So A and B are float32 also beside a bfloat16 weight. In `forward` cast A and B, which
are small, to the dtype of x. Never cast the activations, which are large: neither x, nor linear(x),
nor what A and B make of x. y has the dtype of x.

To do, in __init__: the attributes linear, rows, rank, alpha, A and B. linear is the very layer that
came. A and B are nn.Parameter. rows is a buffer, which moves to a GPU with the model, and which no
file needs to hold: self.register_buffer("rows", rows, persistent=False). Do not freeze anything
here: `attach` freezes the whole model before it makes the adapters (exercise 7).

In forward: call self.linear(x), which also adds the bias. F.linear(x, M) computes x @ M.T.
y.index_add(-1, rows, update) adds to some of the outputs. So does y[..., rows] += update. That one
writes into the output of self.linear, and that is allowed, because nobody else holds it.

To avoid: W x without the bias; alpha without rank, or alpha // rank; torch.randn for A; detach,
torch.no_grad and dropout in forward.

Run: python -m pytest extras/lesson/exercises -q -k ex3      (pip install pytest, if it is missing)
"""

import math  # noqa: F401 - for your code

import torch  # noqa: F401 - for your code
import torch.nn.functional as F  # noqa: F401 - for your code
from ex2_rows import adapted_rows  # noqa: F401 - yours, for your code
from torch import nn


class RoAE(nn.Module):
    """linear: nn.Linear(D, out), with out = num_heads * d."""

    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5):
        super().__init__()
        raise NotImplementedError("exercise 3: the rows, A and B; see the text")

    def forward(self, x):  # [.., D] -> [.., out]
        raise NotImplementedError("exercise 3: linear(x), plus the update of the rows")
