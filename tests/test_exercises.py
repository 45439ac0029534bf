"""Statements about extras/lesson/exercises: the tests of an exercise are red until it is solved,
and green with our own code in the place of the reader's; and the hint for a mistake names the
mistake."""

import ast
import re
import runpy
import shutil
import sys
from types import ModuleType

import pytest
from helpers import ROOT

pytestmark = pytest.mark.numeric
FOLDER = ROOT / "extras" / "lesson" / "exercises"
IMPORTS = """import math, torch, model, rosa, train
import torch.nn.functional as F
from torch import nn
from types import SimpleNamespace as Object
"""
# exercise -> a solution that is the project's own code
SOLUTIONS = {
    "ex1_rotation": """
own_frequencies = model.rope_inverse_frequencies
def rope_inverse_frequencies(config):
    names = Object(head_dim=config.head_dim, rope_theta=config.rope_theta, rope_scaling=None)
    return own_frequencies(names)
rope_table, rotate = model.rope_table, model.rotate""",
    "ex2_rows": "adapted_rows = rosa.adapted_rows",
    "ex3_roae": "RoAE = rosa.RoAE",
    "ex4_merge": "merge = rosa.merge",
    "ex5_layers": "gradient_norm, LayerSelector = rosa.gradient_norm, rosa.LayerSelector",
    "ex6_micro_batches": """
def collate(examples, device="cpu"):
    return train.collate(examples, device)
def accumulate_gradients(network, micro_batches):
    llama, total = Object(hidden_states=network, logits=lambda x: x), 0.0
    response_tokens = sum((labels != -100).sum() for _, labels in micro_batches)
    for tokens, labels in micro_batches:
        loss = model.Llama.loss(llama, tokens, labels) / response_tokens
        loss.backward()
        total += loss.item()
    return total""",
}
# The same, as a reader would write it: in these texts the mistakes are made below.
WRITTEN_OUT = {
    "ex1_rotation": """
def rope_inverse_frequencies(config):
    d, theta = config.head_dim, config.rope_theta
    return theta ** (-2 * torch.arange(d // 2) / d)
def rope_table(positions, inv_freq):
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[None], torch.cat((-sin, sin), -1)[None]
def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    h = x.float()
    y = h * cos + h.roll(half, -1) * sin
    return y.to(x.dtype)""",
    "ex2_rows": """
def adapted_rows(out_features, num_heads, low_freq_ratio):
    d = out_features // num_heads
    half = d // 2
    n = max(1, round(low_freq_ratio * half))
    return torch.arange(out_features).view(num_heads, 2, half)[:, :, -n:].flatten()""",
    "ex3_roae": """
from ex2_rows import adapted_rows
class RoAE(nn.Module):
    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5):
        super().__init__()
        self.linear, self.rank, self.alpha = linear, rank, alpha
        rows = adapted_rows(linear.out_features, num_heads, low_freq_ratio)
        self.register_buffer("rows", rows, persistent=False)
        A = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(len(rows), rank)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
    def forward(self, x):
        y, scale = self.linear(x), self.alpha / self.rank
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        update = scale * F.linear(F.linear(x, A), B)
        return y.index_add(-1, self.rows, update)""",
    "ex4_merge": """
def adapters(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, rosa.RoAE)}
@torch.no_grad()
def merge(model):
    for name, adapter in adapters(model).items():
        linear, rows, A, B = adapter.linear, adapter.rows, adapter.A, adapter.B
        weight, update = linear.weight, adapter.alpha / adapter.rank * B @ A
        weight[rows] += update
        model.set_submodule(name, linear)
    return model""",
    "ex5_layers": """
def gradient_norm(weights):
    return torch.cat([weight.grad.float() for weight in weights]).norm()
class LayerSelector:
    def __init__(self, model, k_ratio=0.5, select_every=25):
        self.select_every = select_every
        self.layers = model.model.layers
        self.parameters, self.norms = [], []
        for layer in model.model.layers:
            self.parameters.append([p for p in layer.parameters() if p.requires_grad])
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            self.norms.append([first.weight, second.weight])
        self.probing, self.scores = False, None
        self.active = list(range(len(self.parameters)))
        self.count = max(1, round(k_ratio * len(self.parameters)))
    def before_forward(self, step):
        self.probing = step % self.select_every == 0
        if self.probing:
            self.activate(range(len(self.parameters)))
            for weight in sum(self.norms, []):
                weight.requires_grad_(True)
    def after_backward(self):
        if not self.probing:
            return
        self.scores = torch.stack([gradient_norm(weights) for weights in self.norms])
        for weight in sum(self.norms, []):
            weight.grad = None
            weight.requires_grad_(False)
        best = self.scores.argsort(descending=True)[:self.count].tolist()
        self.activate(best)
    def activate(self, layers):
        self.active = sorted(layers)
        for i, parameters in enumerate(self.parameters):
            for p in parameters:
                p.requires_grad_(i in self.active)
                if i not in self.active:
                    p.grad = None""",
    "ex6_micro_batches": """
def collate(examples, device="cpu"):
    T = max(len(prompt) + len(response) for prompt, response in examples) - 1
    tokens = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), -100)
    for i, (prompt, response) in enumerate(examples):
        ids = prompt + response
        tokens[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[i, len(prompt) - 1 : len(ids) - 1] = torch.tensor(response)
    return tokens.to(device), labels.to(device)
def accumulate_gradients(model, micro_batches):
    total, N = 0.0, sum((labels != -100).sum() for _, labels in micro_batches)
    for tokens, labels in micro_batches:
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / N
        loss.backward()
        total += loss.item()
    return total""",
}
# Texts that stand in these solutions, or in the mistakes, more than once or at length
TURNED = "h * cos + h.roll(half, -1) * sin"
NEIGHBOURS = "a, b, c, s = h[..., ::2], h[..., 1::2], cos[..., :half], sin[..., half:]; y = "
TURNED_NEIGHBOURS = f"{NEIGHBOURS}torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)"
READ_NEIGHBOURS = f"{NEIGHBOURS}torch.cat((a * c - b * s, a * s + b * c), -1)"
INTERLEAVED = (
    "cos[..., :half].repeat_interleave(2, -1), torch.tensor([-1, 1]).repeat_interleave(half) "
    "* sin[..., half:].repeat_interleave(2, -1)"
)
MIXED = "torch.stack((h[..., 1::2], h[..., ::2]), -1).flatten(-2)"
IN_PLACE = """h = x.float().clone()
    a, b = h.chunk(2, -1)
    c, s = cos[..., :half], sin[..., half:]
    a[:] = a * c - b * s
    b[:] = a * s + b * c
    y = h  # """
END_OF_EACH_HEAD = """return torch.tensor(
        [r for r in range(out_features) if r % d >= d - int(low_freq_ratio * d)])
    """
PADDED_B = """padded = torch.zeros_like(y[0, 0]).new_zeros(y.shape[-1], self.rank)
        padded[self.rows] = B
        return y + scale * F.linear(F.linear(x, A), padded)
        """
WHOLE_WEIGHT = """W = self.linear.weight.clone()
        W[self.rows] += (scale * self.B @ self.A).to(W.dtype)
        return F.linear(x, W, self.linear.bias)
        """
PADDED_UPDATE = "return y + torch.zeros_like(y).index_add(-1, self.rows, update)  # "
EINSUM = "torch.einsum('or,rd,btd->bto', B, A, x)"
FORMED = "update = scale * F.linear(x, B @ A)"
FIRST_IS_LOST = """
    for i, (prompt, _) in enumerate(examples):
        labels[i, len(prompt) - 1] = -100
    return tokens"""
ONE_BACKWARD = """    losses = [
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum") / N
        for tokens, labels in micro_batches]
    sum(losses).backward()
    return sum(losses).item()
    for"""
WAKE = "self.layers[i].requires_grad_(i in self.active)"
LAST_ALONE = "; weight.register_hook(lambda _, weight=weight: setattr(weight, 'grad', None))"
FIRST_SCALE = """    first = next(iter(adapters(model).values()))
    for name, adapter in adapters(model).items():
        adapter.alpha, adapter.rank = first.alpha, first.rank
"""
# (exercise, a text in the written-out solution, the mistake in its place, words of the hint)
MISTAKES = [
    ("ex1_rotation", f"y = {TURNED}", TURNED_NEIGHBOURS, "these pairs are neighbours"),
    ("ex1_rotation", f"y = {TURNED}", READ_NEIGHBOURS, "read as neighbours (0::2, 1::2)"),
    ("ex1_rotation", "h.roll(half, -1)", MIXED, "the tables are of halves"),
    ("ex1_rotation", "-1) * sin", "-1) * -sin", "this turns clockwise"),
    (
        "ex1_rotation",
        f"y = {TURNED}",
        TURNED_NEIGHBOURS.replace("sin[", "-sin["),
        "neighbours for pairs, and clockwise",
    ),
    (
        "ex1_rotation",
        "h.roll(half, -1)",
        "torch.cat((-h[..., half:], h[..., :half]), -1)",
        "the minus is there twice",
    ),
    ("ex1_rotation", "h.roll(half, -1)", "h", "multiplies (b, a), the halves exchanged"),
    ("ex1_rotation", "h.roll(half, -1)", "h.roll(half)", "roll without a dimension"),
    ("ex1_rotation", f"y = {TURNED}", IN_PLACE, "a and b are views"),
    ("ex1_rotation", f"y = {TURNED}", IN_PLACE.replace(".clone()", ""), "a and b are views"),
    (
        "ex1_rotation",
        f"y = {TURNED}",
        f"y = h.copy_({TURNED})",
        "x was written into",
    ),
    (
        "ex1_rotation",
        "h = x.float()",
        "h, cos, sin = x, cos.to(x.dtype), sin.to(x.dtype)",
        "x.float()",
    ),
    (
        "ex1_rotation",
        "h = x.float()",
        "h, cos, sin = x.float(), cos.to(x.dtype).float(), sin.to(x.dtype).float()",
        "computed in the dtype of x",
    ),
    (
        "ex1_rotation",
        "h = x.float()",
        f"h, cos, sin = x.float(), {INTERLEAVED}",
        "the tables are of neighbours, as repeat_interleave",
    ),
    ("ex1_rotation", "y.to(x.dtype)", "y", "end with .to(x.dtype)"),
    ("ex1_rotation", f"y = {TURNED}", f"y = ({TURNED}).detach()", "no detach"),
    ("ex1_rotation", "positions[:, None]", "(positions[:, None] + 1)", "positions are off by one"),
    ("ex1_rotation", "positions[:", "torch.arange(len(positions))[:", "use the positions given"),
    ("ex1_rotation", "angles = ", "angles = math.pi / 180 * ", "these are degrees"),
    ("ex1_rotation", ".float() * inv_freq", ".bfloat16() * inv_freq.bfloat16()", "torch.bfloat16"),
    (
        "ex1_rotation",
        ".float() * inv_freq",
        ".half() * inv_freq.half(); angles = angles.float()",
        "the angles were made in torch.float16",
    ),
    (
        "ex1_rotation",
        ".float() * inv_freq",
        ".bfloat16() * inv_freq",
        "positions or angles were rounded",
    ),
    ("ex1_rotation", "(-sin, sin)", "(sin, sin)", "the sign is missing"),
    ("ex1_rotation", "(-sin, sin)", "(sin, -sin)", "the minus belongs to the first half"),
    (
        "ex1_rotation",
        "torch.cat((cos, cos), -1)",
        "cos.repeat_interleave(2, -1)",
        "this cos table is of neighbours",
    ),
    (
        "ex1_rotation",
        "torch.cat((-sin, sin), -1)",
        "torch.stack((-sin, sin), -1).flatten(-2)",
        "this sin table is of neighbours",
    ),
    (
        "ex1_rotation",
        "cos, sin = angles.cos(), angles.sin()",
        "sin, cos = angles.cos(), angles.sin()",
        "this is sin, and cos comes here",
    ),
    ("ex1_rotation", "torch.cat((cos, cos), -1)[None]", "cos[None]", "a column for each dimension"),
    ("ex1_rotation", "cos), -1)[None]", "cos), -1)", "unsqueeze(0)"),
    ("ex1_rotation", "torch.arange(d // 2)", "torch.arange(d // 2).flip(0)", "in reverse order"),
    ("ex1_rotation", "(-2 *", "(-1 *", "the exponent is -2i / d, not -i / d"),
    ("ex1_rotation", "(d // 2) / d", "(d // 2) // d", "// cuts"),
    ("ex1_rotation", "return theta", "return 10000.0", "theta is config.rope_theta"),
    ("ex1_rotation", "h = x.float()", "h = x.bfloat16().float()", "nearly right"),
    ("ex1_rotation", "-2 * torch", "-4 * torch", "arange(0, d, 2) is 2i already"),
    ("ex1_rotation", "cos), -1)[None]", "cos), -1)[:, None]", "not unsqueeze(1)"),
    ("ex1_rotation", "cat((cos, cos), -1)", "cat((cos, cos), 0)", "stand below each other"),
    ("ex1_rotation", "h.roll(half, -1)", "h.roll(half, -2)", "rolled along the positions"),
    ("ex1_rotation", "h.roll(half, -1)", "h.roll(1, -1)", "rolled by one"),
    ("ex1_rotation", "h.roll(half, -1)", "h.flip(-1)", "flip turns the order around"),
    ("ex2_rows", "-n:]", ":n]", "these are the first pairs"),
    ("ex2_rows", "[:, :, -n:]", "[:, 1:, -n:]", "one half only"),
    ("ex2_rows", "[:, :, -n:]", "[:1, :, -n:]", "these are the rows of head 0 alone"),
    ("ex2_rows", "ratio * half", "ratio * d", "n counts pairs"),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "int(low_freq_ratio * d)",
        "n counts pairs",
    ),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "max(1, int(low_freq_ratio * d))",
        "n counts pairs",
    ),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "max(1, int(low_freq_ratio * d) // 2)",
        "n was rounded down",
    ),
    (
        "ex2_rows",
        "num_heads, 2, half)[:, :, -n:]",
        "num_heads, half, 2)[:, -n:]",
        "the end of each head in one piece",
    ),
    ("ex2_rows", "round(", "int(", "n was rounded down"),
    (
        "ex2_rows",
        "round(low_freq_ratio * half)",
        "int(low_freq_ratio * half + 0.5)",
        "round(2.5) is 2",
    ),
    ("ex2_rows", "round(", "math.ceil(", "n was rounded up"),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "round(low_freq_ratio * half)",
        "the slice [-n:] is everything",
    ),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "int(low_freq_ratio * half)",
        "n was rounded down",
    ),
    (
        "ex2_rows",
        "return",
        f"{END_OF_EACH_HEAD}return",
        "the end of each head in one piece",
    ),
    ("ex2_rows", "d = ", "num_heads = 1; d = ", "num_heads was not used"),
    ("ex2_rows", "ratio * half", "ratio * out_features // 2", "does not depend on num_heads"),
    (
        "ex2_rows",
        "d = ",
        "num_heads = out_features // num_heads; d = ",
        "num_heads and d are exchanged",
    ),
    ("ex2_rows", ".flatten()", ".flatten().flip(0).tolist()", "one list in ascending order"),
    ("ex2_rows", ".flatten()", ".flatten().int()", "torch.tensor(rows)"),
    (
        "ex2_rows",
        "return",
        """if round(low_freq_ratio * half) == 0:
        return torch.tensor([], dtype=torch.long)
    return""",
        "no row: n is at least 1",
    ),
    (
        "ex2_rows",
        "view(num_heads, 2, half)[:, :, -n:]",
        "view(2, half, num_heads)[:, -n:]",
        "heads come first",
    ),
    (
        "ex2_rows",
        "return",
        """return torch.tensor(
        [h * d + s + i for h in range(32) for s in (0, half) for i in range(half - n, half)])
    return""",
        "num_heads or d a fixed number",
    ),
    ("ex2_rows", "d = ", "num_heads = 2; d = ", "num_heads is fixed at 2"),
    ("ex3_roae", "linear.out_features, num", "linear.in_features, num", "adapted_rows(linear.out"),
    ("ex3_roae", "zeros(len(rows)", "zeros(linear.out_features", "B has a row for each of `rows`"),
    ("ex3_roae", "zeros(len(rows), rank)", "zeros(rank, len(rows))", "transposed"),
    (
        "ex3_roae",
        "scale = self.linear(x), self.alpha / self.rank",
        "scale = self.linear(x), self.alpha",
        "scaled by alpha alone",
    ),
    ("ex3_roae", "self.alpha / self.rank", "self.alpha / len(self.rows)", "alpha / len(rows)"),
    ("ex3_roae", "self.alpha / self.rank", "self.alpha / self.rank ** 0.5", "rsLoRA"),
    ("ex3_roae", "self.alpha / self.rank", "self.alpha // self.rank", "cuts the fraction off"),
    (
        "ex3_roae",
        "y, scale = self.linear(x), self.alpha / self.rank",
        "scale = self.alpha / self.rank\n        with torch.no_grad(): y = self.linear(x)",
        "no torch.no_grad() around linear",
    ),
    (
        "ex3_roae",
        "return y.index_add(-1, self.rows, update)",
        "y.index_add(-1, self.rows, update)\n        return y",
        "index_add returns a new tensor",
    ),
    (
        "ex3_roae",
        "nn.Parameter(A)",
        "nn.Parameter(nn.init.kaiming_uniform_(A.T.contiguous(), a=math.sqrt(5)).T.contiguous())",
        "fill A as [rank, D]",
    ),
    ("ex3_roae", "A, a=math.sqrt(5)", "A", "a=math.sqrt(5) is missing"),
    ("ex3_roae", "torch.zeros(", "torch.randn(", "B is zero at the start"),
    ("ex3_roae", "nn.Parameter(A)", "nn.Parameter(0 * A)", "with A and B both zero"),
    ("ex3_roae", "nn.Parameter(A)", "nn.Parameter(torch.randn_like(A))", "kaiming_uniform_"),
    (
        "ex3_roae",
        "nn.Parameter(A)",
        "nn.Parameter(A.to(linear.weight.dtype))",
        "what trains is float32",
    ),
    ("ex3_roae", "nn.Parameter(A)", "nn.Parameter(A, False)", "is what trains"),
    (
        "ex3_roae",
        "rows = adapted",
        "linear.requires_grad_(False); rows = adapted",
        "RoAE freezes nothing",
    ),
    ("ex3_roae", "y.index_add(-1,", "y.index_add(2,", "take any x"),
    ("ex3_roae", "nn.Parameter(A)", "A", "self.A = nn.Parameter"),
    (
        "ex3_roae",
        "self.alpha = linear",
        "self.alpha = __import__('copy').deepcopy(linear)",
        "no copy",
    ),
    (
        "ex3_roae",
        'self.register_buffer("rows", rows, persistent=False)',
        "self.rows = rows",
        "a plain tensor stays",
    ),
    ("ex3_roae", ", persistent=False", "", "persistent=False"),
    ("ex3_roae", "-1, self.rows", "-1, torch.arange(len(self.rows))", "went to the first rows"),
    ("ex3_roae", "self.linear(x)", "x @ self.linear.weight.T", "the bias is lost"),
    (
        "ex3_roae",
        "self.linear(x)",
        "F.linear(x, self.linear.weight, self.linear.bias)",
        "any layer",
    ),
    ("ex3_roae", "return y.index_add(-1, self.rows, update)", "return y", "the update is missing"),
    ("ex3_roae", "y.index_add(", "y.index_copy(", "the update took the place"),
    ("ex3_roae", "update = scale * F.linear(F.linear(x, A), B)", FORMED, "B @ A was made"),
    (
        "ex3_roae",
        "update = scale * F.linear(F.linear(x, A), B)",
        f"update = scale * {EINSUM}",
        "B @ A was made",
    ),
    ("ex3_roae", "update =", f"{WHOLE_WEIGHT}update =", "B @ A was made"),
    (
        "ex3_roae",
        "y, scale",
        "self.A.data = self.A.data.to(x.dtype); y, scale",
        "is a copy for this pass",
    ),
    ("ex3_roae", "update =", f"{PADDED_B}update =", "filled up with zeros"),
    ("ex3_roae", "return y", PADDED_UPDATE, "an update for all outputs was made"),
    ("ex3_roae", "y, scale", "x = x.float(); y, scale", "x was cast up"),
    (
        "ex3_roae",
        "F.linear(F.linear(x, A), B)",
        "F.linear(F.linear(x.float(), self.A), self.B).to(x.dtype)",
        "x was cast up",
    ),
    (
        "ex3_roae",
        "return y.index_add(-1, self.rows, update)",
        "return y.float().index_add(-1, self.rows, update.float())",
        "linear(x) was cast up",
    ),
    (
        "ex3_roae",
        "F.linear(x, A), B)",
        "F.linear(x, A).float(), self.B).to(x.dtype)",
        "A x or B (A x) was cast up",
    ),
    ("ex3_roae", "self.A.to(x.dtype), self.B.to(x.dtype)", "self.A, self.B", "self.A.to(x.dtype)"),
    ("ex3_roae", "F.linear(x, A)", "F.linear(F.dropout(x, 0.1), A)", "no dropout"),
    ("ex3_roae", "F.linear(x, A)", "F.linear(x.detach(), A)", "no x.detach()"),
    ("ex3_roae", "self.A.to(x.dtype)", "self.A.detach().to(x.dtype)", "no detach, no .data"),
    ("ex3_roae", "y, scale", "x += 0.5; y, scale", "x is the caller's"),
    ("ex4_merge", "adapter.alpha / adapter.rank", "adapter.alpha", "scaled by alpha alone"),
    ("ex4_merge", "adapter.alpha / adapter", "adapter.alpha // adapter", "cuts the fraction off"),
    ("ex4_merge", "adapter.alpha / adapter.rank", "2", "scaled by 2, whatever"),
    (
        "ex4_merge",
        "    for name",
        "    model = __import__('copy').deepcopy(model)\n    for name",
        "no copy: change the model that came",
    ),
    (
        "ex4_merge",
        "weight, update = linear.weight,",
        "weight, update = linear.weight.float(),",
        ".float() is a copy where the weight is bfloat16",
    ),
    ("ex4_merge", "/ adapter.rank", "/ len(B)", "the rank is the number of A's rows"),
    ("ex4_merge", "/ adapter.rank", "/ A.shape[1]", "the rank is the number of A's rows"),
    ("ex4_merge", "/ adapter.rank", "/ adapter.rank ** 0.5", "rsLoRA"),
    ("ex4_merge", "+= update", "+= 2 * update", "merged twice"),
    ("ex4_merge", "+= update", "-= update", "subtracted"),
    (
        "ex4_merge",
        "weight, update = linear.weight,",
        "weight, update = linear.weight.clone(),",
        "the weight is what it was",
    ),
    ("ex4_merge", "weight[rows] +=", "weight[:len(rows)] +=", "these are the first rows"),
    ("ex4_merge", "weight[rows] +=", "weight[rows] =", "the rows were replaced"),
    (
        "ex4_merge",
        "weight[rows] += update",
        "weight[rows] += update if len(A.T) != len(weight) else 0 * update; "
        "weight[:, rows] += update.T if len(A.T) == len(weight) else 0",
        "these are columns",
    ),
    (
        "ex4_merge",
        "+= update",
        "+= update.T if len(rows) == len(A.T) else update",
        "B @ A came transposed",
    ),
    ("ex4_merge", "weight[rows]", "weight *= 1.001; weight[rows]", "other rows changed"),
    (
        "ex4_merge",
        "weight[rows] +=",
        "weight[:] = weight + 1e-7; weight[rows] +=",
        "other rows changed",
    ),
    (
        "ex4_merge",
        "+= update",
        "+= update; linear.weight = nn.Parameter(weight.clone(), False)",
        "not in place",
    ),
    (
        "ex4_merge",
        "+= update",
        "+= update; linear.weight = nn.Parameter(weight.clone())",
        "not in place",
    ),
    ("ex4_merge", "+= update", "+= update; linear.weight.data = weight.clone()", "not in place"),
    ("ex4_merge", "@torch.no_grad()", "", "merge under torch.no_grad()"),
    ("ex4_merge", "+= update", "+= update.to(weight.dtype)", "rounded twice"),
    ("ex4_merge", "    return model", "        return model", "return behind the loop"),
    (
        "ex4_merge",
        "        model.set_submodule(name, linear)\n",
        "",
        "the adapter was left in its place",
    ),
    (
        "ex4_merge",
        "(name, linear)",
        "(name, __import__('copy').deepcopy(linear))",
        "not the layer itself",
    ),
    ("ex4_merge", "    return model", "    return", "return model"),
    (
        "ex4_merge",
        "    for name, adapter in adapters(model).items():\n",
        FIRST_SCALE,
        "scaled as the first adapter",
    ),
    (
        "ex5_layers",
        "torch.cat([weight.grad.float() for weight in weights]).norm()",
        "sum(weight.grad.norm() for weight in weights)",
        "the sum of two norms",
    ),
    ("ex5_layers", "]).norm()", "]).abs().sum()", "the sum of absolute values"),
    ("ex5_layers", "]).norm()", "]).sum()", "a plain sum"),
    ("ex5_layers", "]).norm()", "]).square().sum()", "the root is missing"),
    ("ex5_layers", "in weights]", "in weights[:1]]", "one norm weight only"),
    ("ex5_layers", ".grad.float()", ".grad", "the norm was made in bfloat16"),
    ("ex5_layers", "weight.grad.float() for", "weight.float() for", "norms of the weights: .grad"),
    (
        "ex5_layers",
        "weight.grad.float() for",
        "weight.detach() * weight.grad.float() for",
        "gradients times weights",
    ),
    (
        "ex5_layers",
        "best = self.scores.argsort(descending=True)[:self.count].tolist()",
        "best = [int(score) for score in sorted(self.scores)[:self.count]]",
        "sorted(scores)[:count] are scores",
    ),
    (
        "ex5_layers",
        "        if not self.probing:\n            return\n",
        "",
        "at a step that is no probe after_backward returns at once",
    ),
    (
        "ex5_layers",
        "round(k_ratio * len(self.parameters))",
        "int(k_ratio * len(self.parameters) + 0.5)",
        "round(2.5) is 2",
    ),
    (
        "ex5_layers",
        "self.probing = step %",
        "self.n = getattr(self, 'n', -1) + 1; self.probing = self.n %",
        "counted by itself",
    ),
    (
        "ex5_layers",
        "weight.requires_grad_(True)",
        f"weight.requires_grad_(True){LAST_ALONE}",
        "only the last micro-batch",
    ),
    ("ex5_layers", "            weight.grad = None\n", "", "norms keep their gradient"),
    ("ex5_layers", "            weight.requires_grad_(False)\n", "", "norms keep requires_grad"),
    (
        "ex5_layers",
        "                weight.requires_grad_(True)",
        "                pass",
        "a probe measures both norm weights",
    ),
    ("ex5_layers", "descending=True", "descending=False", "these are the lowest scores"),
    (
        "ex5_layers",
        "self.scores.argsort(descending=True)[:self.count]",
        "self.scores.sort(descending=True)[0][:self.count]",
        "these are scores, not indices",
    ),
    (
        "ex5_layers",
        "self.activate(best)",
        "self.activate(best); self.scores = self.scores.tolist()",
        "torch.stack",
    ),
    (
        "ex5_layers",
        "self.active = sorted(layers)",
        "self.active = list(layers)",
        "sort the indices",
    ),
    (
        "ex5_layers",
        "self.activate(best)",
        "self.active = sorted(best)",
        "after_backward calls activate",
    ),
    (
        "ex5_layers",
        "max(1, round(k_ratio * len(self.parameters)))",
        "int(k_ratio * len(self.parameters))",
        "rounded down, to 0",
    ),
    ("ex5_layers", "max(1, round(", "max(1, int(", "the count was rounded down"),
    ("ex5_layers", "max(1, round(", "max(1, math.ceil(", "the count was rounded up"),
    (
        "ex5_layers",
        "max(1, round(k_ratio * len(self.parameters)))",
        "round(k_ratio * len(self.parameters))",
        "max(1, ...)",
    ),
    (
        "ex5_layers",
        "                if i not in self.active:\n                    p.grad = None",
        "",
        "frozen layers keep their gradient",
    ),
    ("ex5_layers", "if i not in self.active:", "if True:", "a probe is a training step too"),
    (
        "ex5_layers",
        "requires_grad_(i in self.active)",
        "requires_grad_(i in self.active and p.requires_grad)",
        "stays frozen",
    ),
    (
        "ex5_layers",
        "requires_grad_(i in self.active)",
        "requires_grad_(i in self.active or p.requires_grad)",
        "nothing was frozen",
    ),
    (
        "ex5_layers",
        "            for p in parameters:\n",
        f"            {WAKE}\n            for p in parameters:\n",
        "the base weights woke up",
    ),
    (
        "ex5_layers",
        "self.activate(range(len(self.parameters)))",
        "pass",
        "at a probe every layer trains",
    ),
    (
        "ex5_layers",
        "self.activate(range(len(self.parameters)))",
        "[p.requires_grad_(True) for p in sum(self.parameters, [])]",
        "at a probe every layer is active",
    ),
    ("ex5_layers", "step % self.select_every == 0", "True", "every step is a probe"),
    (
        "ex5_layers",
        "step % self.select_every == 0",
        "(step + 1) % self.select_every == 0",
        "off by one",
    ),
    (
        "ex5_layers",
        "step % self.select_every == 0",
        "step > 0 and step % self.select_every == 0",
        "step 0 is a probe",
    ),
    ("ex6_micro_batches", '"sum") / N', '"mean") / len(micro_batches)', "a mean of means"),
    (
        "ex6_micro_batches",
        ") / N\n",
        ") / len(micro_batches)\n",
        "divided by the number of micro-batches",
    ),
    ("ex6_micro_batches", ") / N\n", ")\n", "a sum: divide"),
    ("ex6_micro_batches", "(labels != -100).sum()", "labels.numel()", "prompt was counted"),
    (
        "ex6_micro_batches",
        "loss.backward()",
        "model.zero_grad(); loss.backward()",
        "no zero_grad between the passes",
    ),
    (
        "ex6_micro_batches",
        "logits = ",
        "model.zero_grad(); logits = ",
        "no zero_grad between the passes",
    ),
    (
        "ex6_micro_batches",
        "    for tokens, labels in micro",
        f"{ONE_BACKWARD} tokens, labels in micro",
        "one backward pass at the end",
    ),
    (
        "ex6_micro_batches",
        "        loss.backward()\n        total += loss.item()\n",
        "        total = total + loss\n    total.backward()\n    total = total.item()\n",
        "one backward pass at the end",
    ),
    (
        "ex6_micro_batches",
        "        loss.backward()\n        total += loss.item()\n",
        "        total = total + loss\n        total.backward(retain_graph=True)\n",
        "no retain_graph",
    ),
    (
        "ex6_micro_batches",
        "loss.backward()\n        total += loss.item()\n    return total",
        "loss.backward(retain_graph=True)\n        total = total + loss\n    return total.item()",
        "no retain_graph",
    ),
    ("ex6_micro_batches", "labels != -100).sum()", "labels > 0).sum()", "0 is a token like any"),
    (
        "ex6_micro_batches",
        "    return total",
        "    nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n    return total",
        "no clipping here",
    ),
    (
        "ex6_micro_batches",
        "    return total",
        "    model.zero_grad()\n    return total",
        "at the end",
    ),
    (
        "ex6_micro_batches",
        "logits = model(tokens).flatten(0, 1)",
        "labels = labels[:, 1:]; logits = model(tokens)[:, :-1].flatten(0, 1)",
        "shifted a second time",
    ),
    ("ex6_micro_batches", "total += loss.item()", "total = loss.item()", "add up"),
    (
        "ex6_micro_batches",
        'reduction="sum") / N',
        'reduction="mean") * (labels != -100).sum() / N',
        "0/0",
    ),
    ("ex6_micro_batches", "        loss.backward()\n", "", "there was no backward pass"),
    ("ex6_micro_batches", "total += loss.item()", "total = total + loss", "loss.item()"),
    (
        "ex6_micro_batches",
        "    return total",
        "    [p.data.sub_(p.grad) for p in model.parameters()]\n    return total",
        "the optimizer's step is the caller's",
    ),
    ("ex6_micro_batches", "\n    return tokens", FIRST_IS_LOST, "the first response token is lost"),
    (
        "ex6_micro_batches",
        "labels.to(device)\n",
        "labels.clamp(min=0).to(device)\n",
        "its label is -100",
    ),
    (
        "ex6_micro_batches",
        "labels.to(device)\n",
        "labels.masked_fill(labels == 0, -100).to(device)\n",
        "the id 0 of a response is learnt",
    ),
    ("ex6_micro_batches", "labels.to(device)\n", "labels.roll(1, 1).to(device)\n", "not shifted"),
    (
        "ex6_micro_batches",
        "ids = prompt + response",
        "n = len(prompt); prompt += response; ids, prompt = prompt, prompt[:n]",
        "the caller's lists were changed",
    ),
    ("ex6_micro_batches", "tokens.to(device), labels.to(device)", "tokens, labels", ".to(device)"),
    ("ex6_micro_batches", "dtype=torch.long", "dtype=torch.float32", "dtype=torch.long"),
]


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Modules that a test imports from the exercises, or from a copy of the exercises, are
    forgotten after the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for path in FOLDER.glob("*.py"):
        monkeypatch.setitem(sys.modules, path.stem, None)
        del sys.modules[path.stem]


@pytest.fixture
def failures(monkeypatch, tmp_path):
    """A function that runs the tests of an exercise with this code in the place of the reader's;
    exercise 3 also calls exercise 2, which is solved unless other code is given. It returns a
    Failure of short_messages.py for each test that failed."""
    monkeypatch.syspath_prepend(FOLDER)

    def install(exercise, code):
        reader = ModuleType(exercise)
        (tmp_path / "reader.py").write_text(IMPORTS + code)
        vars(reader).update(runpy.run_path(str(tmp_path / "reader.py")))
        monkeypatch.setitem(sys.modules, exercise, reader)

    def call(exercise, code, ex2_rows=SOLUTIONS["ex2_rows"]):
        install("ex2_rows", ex2_rows)
        install(exercise, code)
        found = []
        for name, test in runpy.run_path(str(FOLDER / f"test_{exercise}.py")).items():
            if name.startswith("test_"):
                try:
                    test()
                except (Exception, pytest.fail.Exception) as error:
                    found.append(Failed(error))
        return found

    return call


class Failed:
    """What short_messages.py reads of a failure."""

    def __init__(self, error):
        message = str(error) if hasattr(error, "sure") else f"{type(error).__name__}: {error}"
        self.what, _, self.hint = message.partition("\n")
        self.sure = getattr(error, "sure", False)
        self.is_guess = hasattr(error, "sure") and not self.sure
        self.fitting = getattr(error, "fitting", ())

    def __repr__(self):
        return f"{self.what} ({self.hint}, {'sure' if self.sure else 'a guess'})"


def first_shown(found):
    """What the reader sees of the first failure. Where its hint is a guess, the next one is added:
    it is the first that is sure, if there is one."""
    told, _ = runpy.run_path(str(FOLDER / "short_messages.py"))["told"](found)
    return "\n".join(f"{what}\n{hint}" for what, hint, _ in told[: 1 if found[0].sure else 2])


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_our_own_code_solves_it_and_so_does_what_is_broken_below(exercise, failures):
    assert (
        failures(exercise, SOLUTIONS[exercise]) == failures(exercise, WRITTEN_OUT[exercise]) == []
    )


# To save time, two thirds of them run with the slow tests alone.
ROWS = [
    pytest.param(*row, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, row in enumerate(MISTAKES)
]


@pytest.mark.parametrize(
    "exercise, right, wrong, hint", ROWS, ids=[f"{row[0]}: {row[3]}" for row in MISTAKES]
)
def test_a_mistake_is_called_by_its_name(exercise, right, wrong, hint, failures):
    """The first hint that is shown names it. What follows from it may be said after it."""
    assert right in WRITTEN_OUT[exercise]
    found = failures(exercise, WRITTEN_OUT[exercise].replace(right, wrong))
    assert found and hint in first_shown(found), found


OTHERWISE = {  # other ways to solve an exercise
    "ex1: halves joined": (
        "ex1_rotation",
        "y = h * cos + h.roll(half, -1) * sin",
        """a, b, c, s = h[..., :half], h[..., half:], cos[..., :half], sin[..., half:]
    y = torch.cat((a * c - b * s, b * c + a * s), -1)""",
    ),
    "ex3: into the output of the layer": (
        "ex3_roae",
        "return y.index_add(-1, self.rows, update)",
        "y[..., self.rows] += update; return y",
    ),
    "ex3: scaled where it is small": (
        "ex3_roae",
        "A, B = self.A.to(x.dtype), self.B.to(x.dtype)",
        "A, B, scale = self.A.to(x.dtype), (scale * self.B).to(x.dtype), 1",
    ),
    "ex3: with @": ("ex3_roae", "F.linear(F.linear(x, A), B)", "(x @ A.T @ B.T)"),
    "ex4: written once": (
        "ex4_merge",
        "weight[rows] += update",
        "weight[rows] = (weight[rows].float() + update).to(weight.dtype)",
    ),
    "ex4: index_add in float32": (
        "ex4_merge",
        "weight[rows] += update",
        "weight.copy_(weight.float().index_add(0, rows, update))",
    ),
    "ex6: whole rows padded, then cut": (
        "ex6_micro_batches",
        "    T = max(",
        """    T = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), -100)
    for i, (p, r) in enumerate(examples):
        ids[i, : len(p + r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p + r)] = torch.tensor(r)
    return ids[:, :-1].to(device), labels[:, 1:].to(device)
    T = max(""",
    ),
    "ex5: topk": (
        "ex5_layers",
        "self.scores.argsort(descending=True)[:self.count]",
        "self.scores.topk(self.count).indices",
    ),
    "ex5: the norm of the norms": (
        "ex5_layers",
        "torch.cat([weight.grad.float() for weight in weights]).norm()",
        "torch.stack([weight.grad.float().norm() for weight in weights]).norm()",
    ),
}


@pytest.mark.parametrize("exercise, right, other", OTHERWISE.values(), ids=OTHERWISE)
def test_other_ways_to_solve_it_are_green(exercise, right, other, failures):
    assert right in WRITTEN_OUT[exercise]
    assert failures(exercise, WRITTEN_OUT[exercise].replace(right, other)) == []


@pytest.mark.parametrize(
    "rows, line",
    [
        ("-n:]", "the rows come from exercise 2"),
        ("raises", "the rows come from exercise 2"),
        ("missing", "exercise 2 first"),
    ],
)
def test_exercise_3_says_when_exercise_2_is_at_fault(rows, line, failures):
    code = {
        "-n:]": WRITTEN_OUT["ex2_rows"].replace("-n:]", ":n]"),
        "raises": "def adapted_rows(*_):\n    [][1]",
        "missing": (FOLDER / "ex2_rows.py").read_text(),
    }[rows]
    found = failures("ex3_roae", WRITTEN_OUT["ex3_roae"], code)
    assert len(found) > 8 and all(line in f"{each.what}{each.hint}" for each in found)


@pytest.fixture
def run_pytest(tmp_path, monkeypatch, capsys):
    """A function that runs `python -m pytest -q` on a copy of the exercises whose code is given, or
    of all of them as they are. It returns the exit status and the lines that a reader sees in 80
    columns."""
    for name, value in {
        "COLUMNS": "80",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for path in FOLDER.glob("*.py"):
        exercise = path.stem.removeprefix("test_")
        if exercise in SOLUTIONS or not exercise.startswith("ex"):
            shutil.copy(path, tmp_path)
    # pytest shall not read the settings of the project
    (tmp_path / "pytest.ini").write_text("[pytest]")

    def run(capture="no", **files):
        for exercise, code in files.items():
            (tmp_path / f"{exercise}.py").write_text(IMPORTS + code)
        for path in FOLDER.glob("*.py"):  # what a run before this one has imported
            sys.modules.pop(path.stem, None)
        tests = [str(tmp_path / f"test_{exercise}.py") for exercise in files or SOLUTIONS]
        status = pytest.main(
            [
                *tests,
                "-q",
                f"--capture={capture}",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:faulthandler",
            ]
        )
        return status, capsys.readouterr().out.splitlines()

    return run


def stub_messages(exercise):
    """The messages of the stubs of an exercise, in the order of the file, but for those of methods
    of a class of which __init__ is a stub: they are shown once that is solved."""
    shown = []
    for node in ast.parse((FOLDER / f"{exercise}.py").read_text()).body:
        raises = [each for each in ast.walk(node) if isinstance(each, ast.Raise)]
        raises.sort(key=lambda each: each.lineno)
        messages = [each.exc.args[0].value for each in raises]
        shown += messages[:1] if isinstance(node, ast.ClassDef) else messages
    return shown


def test_the_stub_of_exercise_3_says_what_is_missing_once_exercise_2_is_solved(failures):
    [message] = stub_messages("ex3_roae")
    found = failures("ex3_roae", (FOLDER / "ex3_roae.py").read_text())
    assert len(found) > 8 and all(message in each.what for each in found)


def test_every_stub_is_red_and_says_what_is_missing(run_pytest):
    missing = {exercise: stub_messages(exercise) for exercise in SOLUTIONS}
    if sum(map(len, missing.values())) < 10:
        pytest.skip("somebody is at work on the exercises")
    missing["ex3_roae"] = ["exercise 2 first: RoAE asks adapted_rows for its rows"]
    lines_missing = [
        f"{exercise}.py: {message}" for exercise in missing for message in missing[exercise]
    ]
    status, lines = run_pytest()
    assert status == 1 and lines[2:-1] == lines_missing
    assert all(": exercise " in line for line in lines_missing)
    assert re.fullmatch(r"\d+ to do in .*", lines[-1]) and max(map(len, lines[1:])) <= 80


def test_what_is_wrong_is_said_in_a_few_lines(run_pytest):
    wrong = {
        "ex2_rows": WRITTEN_OUT["ex2_rows"].replace("-n:]", ":n]"),
        "ex3_roae": WRITTEN_OUT["ex3_roae"],
        "ex4_merge": "def merge(*layer):\n    layer[9]",
    }
    status, lines = run_pytest(ex1_rotation=SOLUTIONS["ex1_rotation"], **wrong)
    place = IMPORTS.count("\n") + 2
    assert f"ex4_merge.py:{place}: IndexError: tuple index out of range" in lines
    assert "    in: layer[9]" in lines
    assert lines.count("    hint: these are the first pairs, which turn fast: take the last") == 1
    assert lines.count("    hint: the rows come from exercise 2: first make its tests green") == 1
    assert any(re.fullmatch(r"    and \d+ more like it", line) for line in lines)
    assert status == 1 and re.fullmatch(r"\d+ passed, \d+ wrong.*", lines[-1]) and len(lines) < 60


def test_the_first_failure_is_told_and_what_later_ones_are_sure_of_but_no_later_guess(run_pytest):
    code = WRITTEN_OUT["ex5_layers"].replace("descending=True", "descending=False")
    _, lines = run_pytest(ex5_layers=code.replace(".norm()", ".norm() * 3"))
    hints = [line.strip() for line in lines if re.match("    (hint|perhaps)", line)]
    assert hints[0].startswith("hint: no mistake that we know gives this")
    assert hints[1:] == ["perhaps: these are the lowest scores"]
    assert re.fullmatch(r"ex5_layers.py: \d+ more tests fail, perhaps .*", lines[-2])
    code = WRITTEN_OUT["ex5_layers"].replace("descending=True", "descending=False")
    _, lines = run_pytest(ex5_layers=code)
    assert [each for each in lines if "hint" in each] == ["    hint: these are the lowest scores"]


def test_of_two_mistakes_that_fit_the_one_is_told_that_another_test_has_found(run_pytest):
    """Gradients of 3 and 4: 7 is the sum of two norms, and of absolute values too."""
    code = WRITTEN_OUT["ex5_layers"].replace("]).norm()", "]).abs().sum()")
    _, lines = run_pytest(ex5_layers=code)
    assert lines[2:4] == [
        "ex5_layers.py: gradients [3] and [4]: their norm: expected 5, came 7",
        "    hint: the sum of absolute values: the root of the sum of squares",
    ]


def test_what_exercise_7_tells_is_at_the_end(run_pytest, tmp_path):
    (tmp_path / "test_ex9.py").write_text(
        'pytest_plugins = ["short_messages"]\n'
        "def test_it():\n    import checking\n    checking.STORY.append('loss 3 before, 2 after')"
    )
    _, lines = run_pytest(ex9="")
    assert "your RoSA" in lines[-3] and lines[-2] == "loss 3 before, 2 after"


def test_what_the_reader_prints_is_shown_where_a_test_fails(run_pytest):
    code = WRITTEN_OUT["ex2_rows"].replace("    return", "    print('n is', n)\n    return")
    _, lines = run_pytest(capture="sys", ex2_rows=code.replace("-n:]", ":n]"))
    assert "    your print: n is 1" in lines
    _, lines = run_pytest(ex2_rows=code)
    assert not any("your print" in line for line in lines)


def test_a_file_that_python_cannot_read_is_a_line_and_other_exercises_run(run_pytest):
    _, lines = run_pytest(ex1_rotation="def f(:\n", ex2_rows=WRITTEN_OUT["ex2_rows"])
    place = f"ex1_rotation.py:{IMPORTS.count(chr(10)) + 1}"
    assert f"{place}: SyntaxError: invalid syntax" in lines and "    in: def f(:" in lines
    assert re.fullmatch(r"12 passed, \d+ wrong in .*", lines[-1]) and len(lines) < 9
    _, lines = run_pytest(ex2_rows="no_such_name")
    assert any("NameError: name 'no_such_name' is not defined" in line for line in lines)
    assert "    in: no_such_name" in lines
