"""Faster or smaller versions of the formulas in model.py and rosa.py, put in by one line:
`accelerate(model)`.
Training is a quarter faster with them (SmolLM2, bfloat16, a CPU), and keeps two thirds as much for
the backward pass.
Without it: leave the line out, or type --plain; model.py and rosa.py compute the same.

A kernel trusts nothing. It stands for one method as it was written: its fingerprint is a hash of
that method's tokens, and where the method has been edited, or its source can't be found, the method
runs as it is and one line says so. What PyTorch does not document is tried on a few numbers first;
where this PyTorch or this processor has it not, likewise."""

import functools
import platform
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from extras.distributed import gather
from extras.operators import Operators, is_onednn, linear, reordered
from extras.source import edited
from model import MLP, Attention, Llama, RMSNorm
from rosa import RoAE


class Kernel(NamedTuple):
    """function stands for the method `name` of a class. fingerprints: of that method, and of what
    else it relies on."""

    cls: type
    name: str
    function: FunctionType
    fingerprints: dict
    # Whether it can stand for the method of this very module
    fits: FunctionType = lambda module: True

    @property
    def stands_for(self):
        return f"{self.cls.__name__}.{self.name}"


def accelerate(model, inference=False):
    """Exchange the plain methods of the model's modules for kernels, after `attach`, `load_adapter`
    or `merge`.

    inference: linear layers' weights are laid out anew where that makes them faster; the model can
    then no longer be trained, merged or saved. Returns (the methods exchanged, {method left plain:
    why}), and prints a line for each of the latter; under torchrun what one process leaves out all
    leave out."""
    Operators.look_up()
    left = {}
    for kernel in KERNELS:
        if reason := edited(kernel.fingerprints):
            left[kernel.stands_for] = reason
    if (
        not Operators.onednn
        and platform.machine() in ("x86_64", "AMD64")
        and model.device.type == "cpu"
    ):
        left["Linear.forward"] = "this PyTorch or processor has no oneDNN product"
    left = {name: reason for each in gather(left) for name, reason in each.items()}
    for name, reason in left.items():
        print(f"kernels    {reason}: running {name} as written")
    # A linear layer inside a wrapper of another kind, such as one of peft, stays: its weight may be
    # read there.
    parents = (Llama, Attention, MLP, RoAE)
    linears = {
        child
        for parent in model.modules()
        if type(parent) in parents
        for child in parent.children()
    }
    exchanged = set()
    for kernel in KERNELS:
        for module in model.modules() if kernel.stands_for not in left else ():
            if type(module) is not kernel.cls or has_hooks(module) or kernel.name in vars(module):
                continue
            if kernel.cls is nn.Linear and module not in linears:
                continue
            if kernel.cls is nn.Linear and inference:
                pack(module)
            if kernel.fits(module):
                setattr(module, kernel.name, MethodType(kernel.function, module))
                exchanged.add(kernel.stands_for)
    return sorted(exchanged), left


def has_hooks(module):
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def say_what_runs(exchanged, from_inference=()):
    """One line: what runs from extras/kernels.py and extras/inference.py in the place of which
    methods."""
    places = {"extras/kernels.py": exchanged, "extras/inference.py": from_inference}
    parts = [f"{place} stands for {', '.join(names)}" for place, names in places.items() if names]
    if parts:
        print(f"kernels    {'; '.join(parts)}. --plain runs them as written")


# --- nn.Linear.forward ---


def linear_forward(self, x):
    return linear(x, self.weight, self.bias)


@torch.no_grad()
def pack(module):
    """Lay the weight of a linear layer out as an x86 CPU multiplies by it fastest; elsewhere
    nothing happens."""
    if is_onednn(module.weight) and not module.weight.is_mkldnn:
        module.weight = nn.Parameter(reordered(module.weight.detach()), requires_grad=False)


# --- RMSNorm.forward ---


def rms_norm_forward(self, x):
    return RMSNormFunction.apply(x, self.weight, self.eps)


class RMSNormFunction(torch.autograd.Function):
    """Keeps x and one number a token for the backward pass, where autograd would keep every
    intermediate."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)  # [.., 1]
        ctx.save_for_backward(x, weight, scale)
        return (h * scale).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        h = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_h = (grad * weight).float()
            grad_x = (grad_h - h * (grad_h * h).mean(-1, keepdim=True)).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * h).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


# --- MLP.forward ---


def mlp_forward(self, x):
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate = Operators.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


# --- Attention.attend ---

SHORT = 512  # tokens: so far all scores of a head are held at once where that is faster


def attend(self, q, k, v, mask):
    """The plain method's inputs and result. Heads that share a key/value head stand in for a longer
    sequence, so that no key is repeated."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    if mask is not None:
        q = q.reshape(B, K, -1, d)  # [B, K, H/K * T, d]
        if q.device.type == "cpu" and q.shape[2] <= SHORT:
            # In plain matrix products: for a few queries PyTorch's own kernel takes half as long
            # again.
            scores = ((q.float() * d**-0.5) @ k.float().transpose(2, 3)).view(B, K, H // K, T, S)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
            probabilities = scores.add_(mask[:, :, None]).softmax(-1).to(v.dtype)
            return (probabilities.view(B, K, -1, S) @ v).view(B, H, T, d)
        mask = mask.expand(-1, H // K, -1, -1).flatten(1, 2)[:, None]  # [B, 1, H/K * T, S]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, d)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT:
        return CausalAttention.apply(q, k, v)
    dtype = q.dtype
    # PyTorch's backward pass there takes twice as long in bfloat16
    if q.requires_grad and q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).to(dtype)


class CausalAttention(torch.autograd.Function):
    """Causal attention in plain matrix products: in bfloat16 on a CPU three times as fast as
    PyTorch's kernel, backward pass included, for texts that are SHORT: it keeps their [T, T]
    probabilities. q [B, H, T, d]; k, v [B, K, T, d]."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, d = q.shape
        K = k.shape[1]
        q, k, v = q.reshape(B * K, -1, d), k.reshape(B * K, T, d), v.reshape(B * K, T, d)
        # What is taken from all keys alike changes all scores of a query alike, and softmax does
        # not see it. Scores come out in bfloat16, finest near zero: without their mean keys give
        # smaller ones (Qwen2.5's bias is large).
        centred = (k.float() - k.float().mean(1, keepdim=True)).to(k.dtype)
        # [H/K * T, T]
        mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1).repeat(H // K, 1)
        # [B * K, H/K * T, T]
        scores = torch.baddbmm(mask, q, centred.transpose(1, 2), alpha=d**-0.5)
        # A score of 64 is off by an eighth: of such, seen in a sample of rows, bfloat16 has too few
        # digits.
        # Which knows no numbers
        checked = q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if checked and scores[:, ::16].amax(-1).abs().amax() > 64:
            scores = torch.baddbmm(
                mask.float(), q.float(), k.float().transpose(1, 2), alpha=d**-0.5
            )
        probabilities = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probabilities)
        return (probabilities @ v).view(B, H, T, d)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probabilities = ctx.saved_tensors
        B, H, T, d = grad.shape
        grad = grad.reshape(q.shape)
        grad_v = probabilities.transpose(1, 2) @ grad
        grad_scores = Operators.softmax_backward(grad @ v.transpose(1, 2), probabilities).mul_(
            d**-0.5
        )
        grad_q, grad_k = grad_scores @ k, grad_scores.transpose(1, 2) @ q
        return grad_q.view(B, H, T, d), grad_k.view(B, -1, T, d), grad_v.view(B, -1, T, d)


# --- Llama.loss ---


def loss(self, tokens, labels):
    labelled = labels != -100
    return SummedCrossEntropy.apply(
        self.hidden_states(tokens)[labelled], self.lm_head.weight, labels[labelled]
    )


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[label], some rows at a time.

    The gradients are made in the forward pass, slice by slice, while the logits are at hand: what
    is kept for the backward pass is [N, D], never [N, V]."""

    SLICE = 2**23  # float32 logits held at once: 32 MiB

    @staticmethod
    def forward(ctx, hidden, weight, labels):  # [N, D], [V, D], [N]
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = max(1, SummedCrossEntropy.SLICE // weight.shape[0])
        for start in range(0, len(hidden), rows):
            h, label = hidden[start : start + rows], labels[start : start + rows, None]
            log_probs = linear(h, weight).log_softmax(-1, dtype=torch.float32)  # [rows, V]
            at_label = log_probs.gather(1, label)
            loss -= at_label.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # Softmax - 1
            grad = log_probs.exp_().scatter_add_(1, label, -torch.ones_like(at_label)).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = linear(grad, weight.T)
            if grad_weight is not None:
                grad_weight += linear(grad.T, h.T)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *(None if grad is None else grad * grad_loss for grad in ctx.saved_tensors), None


# --- RoAE.forward ---


def roae_forward(self, x):
    y = self.linear(x)
    B = self.B * (self.alpha / self.rank)
    update = F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))  # [.., rows]
    if self.low_freq_ratio == 1:
        return y.add_(update)
    if self.pairs == "random":
        return y.index_add_(-1, self.rows, update)
    return AddToPairs.apply(y, update, self.num_heads, pairs_slice(self))


def pairs_slice(adapter):
    """The pairs of every head that adapt, a slice of its d/2: the first n or the last n."""
    half = adapter.linear.out_features // adapter.num_heads // 2
    n = len(adapter.rows) // adapter.num_heads // 2
    return slice(0, n) if adapter.pairs == "high" else slice(half - n, half)


def adds_to_its_rows(adapter):
    """Whether the kernel adds to the very rows that the plain method adds to: they may have been
    chosen otherwise."""
    rows = torch.arange(adapter.linear.out_features)
    if adapter.low_freq_ratio != 1 and adapter.pairs != "random":
        rows = rows.view(adapter.num_heads, 2, -1)[..., pairs_slice(adapter)].flatten()
    return adapter.pairs == "random" or torch.equal(adapter.rows.cpu(), rows)


class AddToPairs(torch.autograd.Function):
    """Adds the update, [.., rows], to the pairs `columns` of every head of y, [.., out], in place.
    The gradient passes as it is: autograd alone would copy all of it."""

    @staticmethod
    def forward(ctx, y, update, num_heads, columns):
        ctx.mark_dirty(y)
        ctx.num_heads, ctx.columns = num_heads, columns
        heads = y.unflatten(-1, (num_heads, 2, -1))  # [.., H, 2, d/2], a view of y
        heads[..., columns] += update.view(*heads.shape[:-1], -1)
        return y

    @staticmethod
    def backward(ctx, grad):
        heads = grad.unflatten(-1, (ctx.num_heads, 2, -1))
        return grad, heads[..., ctx.columns].flatten(-3), None, None


def is_plain(linear):
    """Whether nothing but the weight and bias of a linear layer decides what it computes."""
    forward = getattr(vars(linear).get("forward"), "__func__", vars(linear).get("forward"))
    return type(linear) is nn.Linear and not has_hooks(linear) and forward in (None, linear_forward)


def reads_lm_head(model):
    """Whether the logits of a model are its lm_head's product and no more."""
    return is_plain(model.lm_head) and model.lm_head.bias is None and "logits" not in vars(model)


PLAIN_ATTEND = {(Attention, "attend"): "91e7c2b1d9ef"}
PLAIN_LINEAR = {(nn.Linear, "forward"): "bc032567e395"}
KERNELS = [
    Kernel(
        nn.Linear,
        "forward",
        linear_forward,
        PLAIN_LINEAR,
        fits=lambda module: (
            module.weight.is_mkldnn
            or is_onednn(module.weight)
            and module.weight.dtype == torch.float32
        ),
    ),
    Kernel(RMSNorm, "forward", rms_norm_forward, {(RMSNorm, "forward"): "4e383c7b4692"}),
    Kernel(MLP, "forward", mlp_forward, {(MLP, "forward"): "b66865aa8eb3"}),
    Kernel(Attention, "attend", attend, PLAIN_ATTEND),
    Kernel(
        Llama,
        "loss",
        loss,
        {(Llama, "loss"): "84864ca6024f", (Llama, "logits"): "3238416f55cf"} | PLAIN_LINEAR,
        fits=reads_lm_head,
    ),
    Kernel(
        RoAE,
        "forward",
        roae_forward,
        {(RoAE, "forward"): "19f590aa9e30"},
        fits=lambda adapter: is_plain(adapter.linear) and adds_to_its_rows(adapter),
    ),
]


# --- layers ---


def checkpoint_activations(model):
    """Keep one tensor a layer for the backward pass and compute the rest again: slower, in less
    memory."""
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model):
    """Have every layer compiled at its first call, if anything can be compiled here."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=model.device))
    # No C++ compiler, no Triton, a Python that is not supported: each its own class
    except Exception as error:
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        return print(
            f"compile    nothing can be compiled here ({reason.strip()}): going on without"
        )
    if hasattr(torch._dynamo.config, "recompile_limit"):
        # A layer that trains, is probed, is frozen, runs without gradients: each is compiled code
        # of its own.
        torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
