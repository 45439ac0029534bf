"""A few operators that PyTorch has and does not document; each is tried before it is used.
They make the kernels a few per cent faster on a CPU; where a processor or a version lacks an
operator, nothing breaks.
Without it: the plain formulas that stand beside the operators here.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F


class Operators:
    """The operators that PyTorch does not document; no other place in the project names them. The
    methods below are plain formulas. `look_up` replaces a formula by its operator if this PyTorch
    and this processor have the operator, and it computes the same."""

    formulas = {}  # name -> the plain formula, once `look_up` has run
    # The dtypes in which oneDNN's product can replace F.linear, with packed weights too
    onednn = frozenset()

    @staticmethod
    def reshaped(y, shape):
        """y in another shape. The result is no view, and so may be added to in place."""
        return y.view(shape).clone()

    @staticmethod
    def silu_backward(grad, x):
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))

    @staticmethod
    def softmax_backward(grad, probabilities):
        grad = grad * probabilities
        return grad - probabilities * grad.sum(-1, keepdim=True)

    @staticmethod
    def is_intel():
        """Whether the processor is one of Intel's."""
        try:
            return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
        except OSError:  # no Linux
            return "GenuineIntel" in platform.processor()

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def look_up(cls):
        """Put the operators in the places of their formulas, once in a process. This is not done
        when the file is imported, since operators start threads, which a fork loses."""
        if cls.formulas:
            return
        aten = torch.ops.aten
        x, w, p = torch.linspace(-2, 2, 48, device="cpu").view(3, 4, 4)
        operators = {
            "reshaped": lambda y, shape: aten._unsafe_view(y, shape),
            "silu_backward": lambda grad, x: aten.silu_backward(grad, x),
            "softmax_backward": lambda grad, p: torch._softmax_backward_data(grad, p, -1, p.dtype),
        }
        inputs = {
            "reshaped": (x, (2, 2, 4)),
            "silu_backward": (x, w),
            "softmax_backward": (x, p.softmax(-1)),
        }
        for name, operator in operators.items():
            cls.formulas[name] = getattr(cls, name)
            if does_the_same(operator, cls.formulas[name], *inputs[name]):
                setattr(cls, name, staticmethod(operator))
        if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
            found = set()
            # In float32 the product of MKL is the faster one on Intel's own processors.
            dtypes = [torch.bfloat16] if cls.is_intel() else [torch.float32, torch.bfloat16]
            for dtype in dtypes:
                if onednn_serves(x.to(dtype), w.to(dtype), p[0].to(dtype)):
                    found.add(dtype)
            cls.onednn = frozenset(found)


def onednn_serves(x, weight, bias):
    """Whether oneDNN's product can replace F.linear in the dtype of these tensors, with packed
    weights too."""

    def packed_product(x, weight):
        return call_onednn(x, reordered(weight), None)

    return does_the_same(call_onednn, F.linear, x, weight, bias) and does_the_same(
        packed_product, F.linear, x, weight
    )


def does_the_same(operator, formula, *inputs):
    """Whether an operator is there and computes roughly what the formula computes. The tolerance is
    wide, since rounding shall not decide."""
    try:
        return torch.allclose(operator(*inputs), formula(*inputs), rtol=0.05, atol=0.05)
    # The operator is absent, fails on this processor, or takes other arguments in this version.
    except (AttributeError, RuntimeError, TypeError):
        return False


def is_onednn(tensor):
    return tensor.dtype in Operators.onednn and tensor.device.type == "cpu"


def call_onednn(x, weight, bias):  # [N, in]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile cannot compile that call itself. It can compile an operator that is registered
# together with the shape of its result.
if not hasattr(torch.ops.rosa, "linear"):  # the operator is there if the file is loaded again
    OPERATORS = torch.library.Library("rosa", "DEF")
    OPERATORS.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    OPERATORS.impl("linear", call_onednn, "CPU")
    torch.library.register_fake(
        "rosa::linear",
        lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
        lib=OPERATORS,
    )


def reordered(weight):
    """The weight, [out, in], laid out as oneDNN reads it fastest."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(x, weight, bias=None):
    """x @ weight.T + bias: [.., in], [out, in], [out] -> [.., out].

    On an x86 CPU that is not Intel's, oneDNN computes the product in float32, where PyTorch's own
    F.linear calls MKL. oneDNN computes the same sums, at twice the rate of MKL where MKL does not
    use AVX-512 (measured on an AMD EPYC). The weight may be packed: `pack` in kernels.py."""
    if not is_onednn(x):
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 and not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x, weight, bias):  # [.., in], [out, in], [out] or None
    call = torch.ops.rosa.linear if torch.compiler.is_compiling() else call_onednn
    y = call(x.reshape(-1, x.shape[-1]), weight, bias)
    return Operators.reshaped(y, (*x.shape[:-1], weight.shape[0]))


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.T)
        if ctx.needs_input_grad[1]:
            grad_weight = linear(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias
