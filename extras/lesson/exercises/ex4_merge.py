"""Exercise 4: merging the update into the weight.

While training, the adapted layer computes two things and adds them (exercise 3). Both are linear in x, so that after
training one matrix does both, and the model is as fast and as large as it was before:

    y[rows] = W[rows] x + bias[rows] + alpha / rank * B (A x)
            = (W[rows] + alpha / rank * B A) x + bias[rows]
               ----------- new W[rows] ------

    W [out, D]                      update [len(rows), D]

    row 0   . . . . . .
    row 1   # # # # # #     +=      row 0 of alpha / rank * B A
    row 2   . . . . . .
    row 3   # # # # # #     +=      row 1 of alpha / rank * B A        rows = [1, 3]

A is [rank, D], B is [len(rows), rank]: B @ A has the shape of W[rows]. The rank is the number of A's rows.

To do, in place, in linear.weight itself: other parts of a program, a checkpoint that is saved, a tied layer, hold that
very tensor. The rows outside `rows` and the bias stay what they are, bit for bit. Return nothing.

`rows` is a LongTensor. W[rows] on the right is a copy, but `W[rows] = ...` and `W[rows] += ...` write into W. Do it
under torch.no_grad(): this is no step of the forward pass, and without it autograd makes W a result of A and B.

Precision. A and B are float32, W may be bfloat16. Make the sum in float32 and round it once, at the end. Whoever first
rounds the update and then the sum rounds twice, and loses small updates more often.

To avoid: W += with a matrix of all rows; linear.weight = nn.Parameter(...), which is another tensor; alpha alone;
calling it twice on the same layer, for then the update counts double.

Run: python -m pytest extras/lesson/exercises -q -k ex4      (pip install pytest, if it is not there)
"""

import torch  # noqa: F401 - for your code


def merge(linear, rows, A, B, alpha):
    """linear.weight[rows] += alpha / rank * B @ A, in place. A [rank, D], B [len(rows), rank]."""
    raise NotImplementedError("exercise 4: add alpha / rank * B @ A to W[rows]; see the text")
