"""What PyTorch has and does not document: a few operators, each tried before it is used.
They make the kernels a few per cent faster on a CPU; where a processor or a version lacks one,
nothing breaks.
Without it: the plain formulas that stand beside the operators here.
"""

import platform

import torch
import torch.nn.functional as F


class Operators:
    """What PyTorch has and does not document, asked for here alone. As written these are plain
    formulas; `look_up` puts the operator in the place of its formula where this PyTorch and
    processor have it, and both compute the same."""

    formulas = {}  # name -> the formula, once all were looked up
    # The dtypes in which oneDNN's product serves for F.linear, with packed weights too
    onednn = frozenset()

    @staticmethod
    def reshaped(y, shape):
        """y in another shape, as a tensor of its own, which may be added to in place."""
        return y.view(shape).clone()

    @staticmethod
    def silu_backward(grad, x):
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))

    @staticmethod
    def softmax_backward(grad, probabilities):
        grad = grad * probabilities
        return grad - probabilities * grad.sum(-1, keepdim=True)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def look_up(cls):
        """Once in a process, not while this file is imported: operators start threads, which a fork
        loses."""
        if cls.formulas:
            return
        aten, x, w, p = torch.ops.aten, *torch.linspace(-2, 2, 48, device="cpu").view(3, 4, 4)
        for name, operator, inputs in (
            ("reshaped", lambda y, shape: aten._unsafe_view(y, shape), (x, (2, 2, 4))),
            ("silu_backward", lambda grad, x: aten.silu_backward(grad, x), (x, w)),
            (
                "softmax_backward",
                lambda grad, p: torch._softmax_backward_data(grad, p, -1, p.dtype),
                (x, p.softmax(-1)),
            ),
        ):
            cls.formulas[name] = getattr(cls, name)
            if does_the_same(operator, cls.formulas[name], *inputs):
                setattr(cls, name, staticmethod(operator))
        if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
            cls.onednn = frozenset(
                dtype
                for dtype in (torch.float32, torch.bfloat16)
                if does_the_same(call_onednn, F.linear, x.to(dtype), w.to(dtype), p[0].to(dtype))
                and does_the_same(
                    lambda x, w: call_onednn(x, reordered(w), None),
                    F.linear,
                    x.to(dtype),
                    w.to(dtype),
                )
            )


def does_the_same(operator, formula, *inputs):
    """Whether an operator is there and computes what the formula does, roughly: of rounding this
    decides nothing."""
    try:
        return torch.allclose(operator(*inputs), formula(*inputs), rtol=0.05, atol=0.05)
    # Absent, refused on this processor, called otherwise by now
    except (AttributeError, RuntimeError, TypeError):
        return False


def is_onednn(tensor):
    return tensor.dtype in Operators.onednn and tensor.device.type == "cpu"


def call_onednn(x, weight, bias):  # [N, in]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile cannot compile that call itself, but any operator that is registered with the shape
# of its result.
if not hasattr(torch.ops.rosa, "linear"):  # when this file is loaded once more
    OPERATORS = torch.library.Library("rosa", "DEF")
    OPERATORS.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    OPERATORS.impl("linear", call_onednn, "CPU")
    torch.library.register_fake(
        "rosa::linear",
        lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
        lib=OPERATORS,
    )


def reordered(weight):  # [out, in], as oneDNN reads it fastest
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(x, weight, bias=None):
    """x @ weight.T + bias: [.., in], [out, in], [out] -> [.., out].

    In float32 on an x86 CPU through oneDNN, which PyTorch itself calls for bfloat16 alone: the same
    sums at twice the rate of MKL where that does not use AVX-512 (measured on an AMD EPYC). The
    weight may be packed: `pack`."""
    if is_onednn(x) and (x.dtype == torch.float32 or weight.is_mkldnn):
        return (
            OneDNNLinear.apply(x, weight, bias)
            if torch.is_grad_enabled()
            else onednn_linear(x, weight, bias)
        )
    return F.linear(x, weight, bias)


def onednn_linear(x, weight, bias):  # [.., in], [out, in], [out] or None
    call = torch.ops.rosa.linear if torch.compiler.is_compiling() else call_onednn
    return Operators.reshaped(
        call(x.reshape(-1, x.shape[-1]), weight, bias), (*x.shape[:-1], weight.shape[0])
    )


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (
            linear(grad, weight.T) if ctx.needs_input_grad[0] else None,
            linear(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)
            if ctx.needs_input_grad[1]
            else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None,
        )
