"""Faster or smaller versions of the formulas in model.py, put in by one line: `accelerate(model)`.
With them training is a quarter faster (SmolLM2, bfloat16, a CPU), and keeps two thirds as much for
the backward pass.
Without it: leave the line out, or type --plain; model.py computes the same.

A kernel stands for one method as it was when the kernel was written, and knows it by a fingerprint,
a hash of the method's tokens. If the method has been edited, or its source cannot be found, it is
left as written, and a line says so. An operator that PyTorch does not document is tried on a few
numbers first; if this PyTorch or this processor lacks it, a plain formula takes its place."""

import functools
import platform
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from extras import prefix
from extras.distributed import gather
from extras.operators import Operators, is_onednn, linear, reordered
from extras.source import edited
from model import MLP, Attention, DecoderLayer, Llama, RMSNorm
from rosa import RoAE


class Kernel(NamedTuple):
    """A function that stands for the method `name` of a class."""

    cls: type
    name: str
    function: FunctionType
    fingerprints: dict  # the fingerprint of the method, and those of other code it relies on
    # Whether the kernel can stand for the method in a certain module of this class
    fits: FunctionType = lambda module: True
    # Whether it pays in the backward pass alone. Without gradients the method is as fast.
    only_trains: bool = False

    @property
    def stands_for(self):
        return f"{self.cls.__name__}.{self.name}"


def accelerate(model, inference=False):
    """Exchange the methods of the model's modules for kernels. Call it after `attach`,
    `load_adapter` or `merge`.

    inference: no gradient will be asked for. Methods whose kernel pays in training alone stay, and
    the weights of linear layers are laid out anew where that makes them faster: the model can then
    no longer be trained, merged or saved. Returns (the methods that were exchanged, {method that is
    left as written: why}), and prints a line for each method that is left. Under torchrun a method
    that one process leaves is left by all."""
    Operators.look_up()
    left = {}
    for kernel in KERNELS:
        if reason := edited(kernel.fingerprints):
            left[kernel.stands_for] = reason
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    is_missed = is_x86 and model.device.type == "cpu" and not Operators.is_intel()
    if is_missed and not Operators.onednn:
        left["Linear.forward"] = "this PyTorch or processor has no oneDNN product"
    left_by_any = {}
    for left_by_one in gather(left):
        left_by_any |= left_by_one
    for name, reason in left_by_any.items():
        print(f"kernels    {reason}: running {name} as written")
    # In an evaluation extras/inference.py has a cache of its own. An edited attend, of which a line
    # above says that it runs as written, may not know of a cache.
    model.shares_prefix = False
    if not inference and "Attention.attend" not in left_by_any:
        prefix.share_if_possible(model)
    modules = own_modules(model)
    if inference and "Linear.forward" not in left_by_any:
        for module in modules:
            if type(module) is nn.Linear and is_unchanged(module, "forward"):
                pack(module)
    exchanged = set()
    for kernel in KERNELS:
        if kernel.stands_for in left_by_any or (inference and kernel.only_trains):
            continue
        for module in modules:
            is_unchanged_method = type(module) is kernel.cls and is_unchanged(module, kernel.name)
            if is_unchanged_method and kernel.fits(module):
                setattr(module, kernel.name, MethodType(kernel.function, module))
                exchanged.add(kernel.stands_for)
    return sorted(exchanged), left_by_any


def own_modules(model):
    """The modules of model.py and rosa.py, and those directly inside them. A layer inside another
    wrapper, such as one of peft, is not among them and is left as written, since the wrapper may
    read its weight."""
    parents = [model, model.model, model.model.layers]
    for module in model.modules():
        if isinstance(module, DecoderLayer) or type(module) in (Attention, MLP, RoAE):
            parents.append(module)
    modules = [model]
    for parent in parents:
        modules += parent.children()
    return modules


def is_unchanged(module, name):
    """Whether a module has no hooks, and no method of that name of its own."""
    return not has_hooks(module) and name not in vars(module)


def has_hooks(module):
    """Whether a module has hooks, which are other code that PyTorch calls with the module."""
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def say_what_runs(exchanged, from_inference=()):
    """Print a line that says for which methods extras/kernels.py and extras/inference.py stand."""
    files = {"extras/kernels.py": exchanged, "extras/inference.py": from_inference}
    parts = [f"{file} stands for {', '.join(names)}" for file, names in files.items() if names]
    if parts:
        print(f"kernels    {'; '.join(parts)}. --plain runs them as written")


# --- nn.Linear.forward ---


def linear_forward(self, x):
    return linear(x, self.weight, self.bias)


@torch.no_grad()
def pack(module):
    """Lay out the weight of a linear layer so that an x86 CPU multiplies by it fastest. On other
    devices nothing happens."""
    if is_onednn(module.weight) and not module.weight.is_mkldnn:
        module.weight = nn.Parameter(reordered(module.weight.detach()), requires_grad=False)


# --- RMSNorm.forward ---


def rms_norm_forward(self, x):
    return RMSNormFunction.apply(x, self.weight, self.eps)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm that keeps x and one number for each token for the backward pass. Autograd would keep
    every intermediate result."""

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
    """silu(gate) * up that keeps only its two inputs for the backward pass."""

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

# Up to so many tokens all scores of a head are held in memory at once where that is faster.
SHORT = 512


def attend(self, q, k, v, mask):
    """Attention.attend, with the same inputs and the same result. The heads that share a key/value
    head are computed as one head with a longer sequence of queries, so that no key is repeated."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    on_cpu = q.device.type == "cpu"
    is_shared = mask is not None and mask.dtype == torch.bool and mask.shape[:2] == (1, 1)
    if is_shared and on_cpu and T <= SHORT and torch.is_grad_enabled():
        return CausalAttention.apply(q, k, v, mask[0, 0])
    if mask is not None:
        q = q.reshape(B, K, -1, d)  # [B, K, H/K * T, d]
        if on_cpu and q.shape[2] <= SHORT:
            # For a few queries PyTorch's kernel takes half as long again as these matrix products.
            scores = ((q.float() * d**-0.5) @ k.float().transpose(2, 3)).view(B, K, H // K, T, S)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
            probabilities = scores.add_(mask[:, :, None]).softmax(-1).to(v.dtype)
            return (probabilities.view(B, K, -1, S) @ v).view(B, H, T, d)
        mask = mask.expand(-1, H // K, -1, -1).flatten(1, 2)[:, None]  # [B, 1, H/K * T, S]
        k = k.to(q.dtype)  # the cache of extras/inference.py holds keys in float32
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, T, d)
    if on_cpu and q.dtype == torch.bfloat16 and T <= SHORT:
        return CausalAttention.apply(q, k, v, None)
    dtype = q.dtype
    # On a CPU PyTorch's backward pass takes twice as long in bfloat16 as in float32.
    if q.requires_grad and on_cpu:
        q = q.float()
        k = k.float()
        v = v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).to(dtype)


class CausalAttention(torch.autograd.Function):
    """Causal attention in plain matrix products. In bfloat16 on a CPU it is three times as fast as
    PyTorch's kernel, backward pass included. It is for texts of up to SHORT tokens, since it keeps
    their probabilities, [T, S] for each head. q [B, H, T, d]; k, v [B, K, S, d]; seen: which
    positions a token sees, bool [T, S], or None where the tokens are all there is, and each sees
    those up to itself."""

    @staticmethod
    def forward(ctx, q, k, v, seen):
        B, H, T, d = q.shape
        K, S = k.shape[1:3]
        q = q.reshape(B * K, -1, d)
        k = k.reshape(B * K, S, d)
        v = v.reshape(B * K, S, d)
        # A vector that is subtracted from every key changes all scores of a query by one number,
        # and softmax does not depend on it. The scores are rounded to bfloat16, which is finest
        # near zero, and keys without their mean give smaller scores (Qwen2.5's bias is large).
        centred = (k.float() - k.float().mean(1, keepdim=True)).to(k.dtype)
        # The mask is [H/K * T, S], and the scores are [B * K, H/K * T, S].
        mask = torch.full((T, S), -torch.inf, dtype=q.dtype)
        mask = mask.triu(1) if seen is None else mask.masked_fill_(seen, 0)
        mask = mask.repeat(H // K, 1)
        in_float32 = q.dtype == torch.float16  # in which a score may be infinite
        if not in_float32:
            scores = torch.baddbmm(mask, q, centred.transpose(1, 2), alpha=d**-0.5)
        # In bfloat16 a score below 64 is off by an eighth at most, and a larger score by more. If a
        # sample of the rows has a larger score, all scores are computed again in float32. Compiled
        # code cannot branch on the numbers in a tensor.
        if q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            in_float32 = scores[:, ::16].amax(-1).abs().amax() > 64
        if in_float32:
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
        grad_q = grad_scores @ k
        grad_k = grad_scores.transpose(1, 2) @ q
        S = k.shape[1]
        return grad_q.view(B, H, T, d), grad_k.view(B, -1, S, d), grad_v.view(B, -1, S, d), None


# --- Llama.loss ---


def loss(self, tokens, labels):
    labelled = labels != -100
    x = prefix.hidden_states(self, tokens, labelled)  # [N, D]
    return SummedCrossEntropy.apply(x, self.lm_head.weight, labels[labelled])


class SummedCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(hidden @ weight.T)[label], computed some rows at a time.

    The gradients are computed in the forward pass too, while the logits of these rows are in
    memory. What is kept for the backward pass is the gradient, [N, D], and never the logits,
    [N, V]."""

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
            # The gradient of a row's logits is their softmax, less 1 at the label.
            grad = log_probs.exp_().scatter_add_(1, label, -torch.ones_like(at_label)).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = linear(grad, weight.T)
            if grad_weight is not None:
                grad_weight += linear(grad.T, h.T)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss
        return grad_hidden, grad_weight, None


# --- what stands for what ---


def is_plain(linear):
    """Whether a linear layer computes what its weight and bias say, and nothing else."""
    forward = getattr(vars(linear).get("forward"), "__func__", vars(linear).get("forward"))
    return type(linear) is nn.Linear and not has_hooks(linear) and forward in (None, linear_forward)


def reads_lm_head(model):
    """Whether the logits of a model are the product with its lm_head, and nothing else."""
    return is_plain(model.lm_head) and model.lm_head.bias is None and "logits" not in vars(model)


def is_faster(linear):
    """Whether linear_forward is faster than PyTorch's own for a linear layer."""
    if linear.weight.is_mkldnn:
        return True
    return is_onednn(linear.weight) and linear.weight.dtype == torch.float32


PLAIN_ATTEND = {(Attention, "attend"): "91e7c2b1d9ef"}
PLAIN_LINEAR = {(nn.Linear, "forward"): "bc032567e395"}
PLAIN_LOSS = {(Llama, "loss"): "84864ca6024f", (Llama, "logits"): "3238416f55cf"}
PLAIN_NORM = {(RMSNorm, "forward"): "4e383c7b4692"}
PLAIN_MLP = {(MLP, "forward"): "b66865aa8eb3"}
KERNELS = [
    Kernel(nn.Linear, "forward", linear_forward, PLAIN_LINEAR, fits=is_faster),
    Kernel(RMSNorm, "forward", rms_norm_forward, PLAIN_NORM, only_trains=True),
    Kernel(MLP, "forward", mlp_forward, PLAIN_MLP, only_trains=True),
    Kernel(Attention, "attend", attend, PLAIN_ATTEND),
    Kernel(Llama, "loss", loss, PLAIN_LOSS | PLAIN_LINEAR, reads_lm_head, only_trains=True),
]


# --- layers ---


def checkpoint_activations(model):
    """Let every layer keep one tensor for the backward pass and compute the others again. Training
    is then slower, and needs less memory."""
    prefix.stop_sharing(model, "--checkpoint-activations computes layers twice")
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model):
    """Let every layer be compiled at its first call, if this machine can compile."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=model.device))
    # PyTorch raises errors of different classes if there is no C++ compiler or no Triton, or if it
    # does not support this Python.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        print(f"compile    nothing can be compiled here ({reason}): going on without")
        return
    if hasattr(torch._dynamo.config, "recompile_limit"):
        # A layer is compiled once for training, once for a probe, once frozen and once without
        # gradients.
        torch._dynamo.config.recompile_limit = 64
    prefix.stop_sharing(model, "--compile")
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
