"""Frozen linear layers whose weights are held as 8-bit integers, with a scale for each row.
LLaMA-2-7B then takes 7 GB where bfloat16 takes 13.5, and trains in 9.
Without it: linear layers in the dtype of --dtype; only --quantize int8 asks for this file.
"""

import math

import torch
from torch import nn

from extras.operators import linear


class Int8Linear(nn.Linear):
    """A linear layer with a frozen weight [out, in] of which each row is rounded to 8 bits:

        weight[r] = scale[r] * integers[r] / 128        integers from -127 to 127

    The largest number of a row becomes 127 or -127. Results and gradients are those of the rounded
    weight: an integer over 128 is exact in every dtype, and the scale multiplies the product. (In
    float16 the integers alone would make products too large for it.)

    weight: of a float dtype; bias: a parameter or None; dtype: in which `weight` reads."""

    def __init__(self, weight, bias, dtype):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        weight = weight.detach().to(torch.float32, copy=True)
        largest = torch.linalg.vector_norm(weight, math.inf, dim=1)  # makes no copy of the weight
        # A row of zeros is divided by 1, and stays zeros.
        step = torch.where(largest == 0, 1, largest / 127)  # [out]
        integers = weight.div_(step[:, None]).round_().to(torch.int8)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(128 * step, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self):
        """The rounded weight, made anew at each reading: what is written into it is lost."""
        return (self.integers * (self.scale / 128)[:, None]).to(self.dtype)

    def forward(self, x):  # [.., in] -> [.., out]
        y = Int8Product.apply(x, self.integers, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Product(torch.autograd.Function):
    """x @ weight.T. What is kept for the backward pass is the integers, which are there anyway."""

    @staticmethod
    def forward(ctx, x, integers, scale):
        ctx.save_for_backward(integers, scale)
        return linear(x, shares(integers, x.dtype)).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        integers, scale = ctx.saved_tensors
        scaled = (grad * scale).to(grad.dtype)
        return linear(scaled, shares(integers, grad.dtype).T), None, None


def shares(integers, dtype):
    """integers / 128, exact in every dtype."""
    return integers.to(dtype).mul_(1 / 128)


def is_quantized(name, module):
    """Whether int8 takes the place of a module: of a linear layer of the transformer's layers.
    Embedding, norms and lm_head stay, and so does a class of your own."""
    return name.startswith("model.layers.") and type(module) is nn.Linear


def quantize(model):
    """Put an Int8Linear in the place of each of a model's linear layers that `is_quantized`."""
    for name, module in list(model.named_modules()):
        if is_quantized(name, module):
            model.set_submodule(name, Int8Linear(module.weight, module.bias, model.dtype))
