"""Exercise 4: merging the updates into the weights. About 15 minutes.

You write one function of rosa.py, `merge`. It takes a whole model with its adapters, and gives back
the model without adapters that computes the same.

While training, an adapted layer computes two things and adds them (exercise 3). Both are linear in
x. So after training one matrix does both, and the model is as fast and as small as it was before:

    y[rows] = W[rows] x + bias[rows] + alpha / rank * B (A x)
            = (W[rows] + alpha / rank * B A) x + bias[rows]
               ----------- new W[rows] ------

    W [out, D]                      update [len(rows), D]

    row 0   . . . . . .
    row 1   # # # # # #     +=      row 0 of alpha / rank * B A
    row 2   . . . . . .
    row 3   # # # # # #     +=      row 1 of alpha / rank * B A        rows = [1, 3]

A is [rank, D], B is [len(rows), rank]: B @ A has the shape of W[rows]. Here, once and not for every
token, this product is made.

An example with D = 2, rank 1, alpha 3, rows = [1, 3], A = [[1, 2]] and B = [[1], [10]]:

    B @ A            [[1, 2], [10, 20]]
    times 3 / 1      [[3, 6], [30, 60]]
    W of ones        [[1, 1], [1, 1], [1, 1], [1, 1]]   becomes   [[1, 1], [4, 7], [1, 1], [31, 61]]

Given is `adapters(model)`: every adapter in the model with its name, which is its path, such as
"layers.0.self_attn.q_proj". An adapter has linear, rows, rank, alpha, A and B, as in exercise 3.
The tests bring their own adapters, with other sizes in each place.

To do, for each adapter:
1. Add the update to adapter.linear.weight, in place, in that very tensor: other parts of a program
   hold it, such as a tied layer. Rows outside `rows`, and the bias, stay what they are, bit for
   bit.
2. Put the layer back where its adapter stands: model.set_submodule(name, adapter.linear).

Then return the model.

`rows` is a LongTensor. W[rows] on the right is a copy, but `W[rows] = ...` and `W[rows] += ...`
write into W. Do it under torch.no_grad(). This is no step of the forward pass, and without it
autograd makes W a result of A and B.

Precision. A and B are float32, W may be bfloat16. Make the sum in float32 and round it once, at
the end. Whoever casts the update to W's dtype, and then adds, rounds twice, and loses small updates
more often.

To avoid: linear.weight = nn.Parameter(...), which is another tensor; writing into weight.float(),
which is a copy where the weight is bfloat16; alpha alone, or alpha // rank; `return model` inside
the loop, which ends it after the first adapter.

Run: python -m pytest extras/lesson/exercises -q -k ex4      (pip install pytest, if it is missing)
"""

import torch  # noqa: F401 - for your code


def adapters(model):
    """Name -> adapter, of every adapter in the model. Given."""
    attributes = ("linear", "rows", "A", "B")
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in attributes)
    }


def merge(model):
    """Fold every adapter into its linear layer, in place, and put that in its place. Returns the
    model."""
    raise NotImplementedError("exercise 4: W[rows] += alpha / rank * B @ A, for each adapter")
