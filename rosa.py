"""RoSA, RoPE-aware Selective Adaptation (Pan et al., AAAI 2026, arXiv 2511.21733): low-rank updates
of the dimensions of Q and K that RoPE rotates slowly (RoAE), trained only in the layers that matter
now (DLS).

RoAE, RoPE-aware Attention Enhancement. RoPE turns pair i of a head, the dimensions (i, i + d/2), by
theta^(-2i/d) radians a position: the last pairs hardly turn, and carry what attention knows
regardless of position. RoAE adds to these n = round(low_freq_ratio * d/2) pairs alone, before the
rotation:

    one head of q = W x     0 ........ d/2-n ... d/2 ........ d-n ... d
                            [ untouched | low freq | untouched | low freq ]
                                             +                      +
    (alpha/rank) * B (A x)               [  n rows  ]           [  n rows  ]

with A [rank, D] and B [H * 2n, rank].

B starts at zero, so the adapted model begins as the base model. The update is linear in x: it
merges into W exactly, and it is a LoRA whose B is zero in all other rows; with low_freq_ratio = 1
it is LoRA itself.

DLS, Dynamic Layer Selection, is `LayerSelector` below. The model's modules must have a Hugging Face
LLaMA's names.

Read first: RoAE, adapted_rows and LayerSelector; they are the method. Skip at first reading: what
saves and loads adapters, from "files" to the end."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

TARGETS = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
TARGETS |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


class RoAE(nn.Module):
    """A linear layer plus a low-rank update of the low-frequency rows of each of its heads (paper,
    Fig. 2).

    linear: the layer to adapt, [out, in], with out = num_heads * d; it is kept as it is. A and B
    are float32 whatever the dtype of its weight; the forward pass casts these small matrices, never
    the activations. Raises ValueError."""

    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5, pairs="low"):
        super().__init__()
        check_arguments(rank, alpha, low_freq_ratio, pairs)
        self.linear = linear
        self.num_heads = num_heads
        self.rank = rank
        self.alpha = alpha
        self.low_freq_ratio = low_freq_ratio
        self.pairs = pairs
        device = linear.weight.device
        rows = adapted_rows(linear.out_features, num_heads, low_freq_ratio, pairs)
        # A buffer moves with the model to another device; not persistent, it is saved in no file.
        self.register_buffer("rows", rows.to(device), persistent=False)
        # A is drawn on the CPU, so that a seed gives the same numbers on every device.
        A = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.A = nn.Parameter(A.to(device))  # [rank, in]
        self.B = nn.Parameter(torch.zeros(len(rows), rank, device=device))  # [rows, rank]

    def forward(self, x):  # [.., in] -> [.., out]
        y = self.linear(x)
        B = self.B * (self.alpha / self.rank)  # scaled here, where it is small
        update = F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))  # [.., rows]
        return y.index_add(-1, self.rows, update)


def adapted_rows(out_features, num_heads, low_freq_ratio, pairs="low"):
    """The rows of a weight [num_heads * d, in] that adapt, as a LongTensor; all of them where
    low_freq_ratio is 1.

    Two heads of d = 8 have d/2 = 4 pairs each, the rows (0, 4), (1, 5), (2, 6) and (3, 7) of the
    head. With low_freq_ratio 0.5 the last n = 2 pairs of each head adapt: rows 2, 3, 6, 7 of the
    first head, and 10, 11, 14, 15 of the second.

    pairs: "low" is the method, the last n pairs of every head. Its ablations have as many
    parameters: "high", the first n pairs of every head, and "random", n pairs that a fixed seed
    draws for each head."""
    rows = torch.arange(out_features)
    if low_freq_ratio == 1:
        return rows
    half = out_features // num_heads // 2  # pairs in a head
    n = max(1, round(low_freq_ratio * half))
    generator = torch.Generator().manual_seed(0)
    adapted = []
    for head in rows.view(num_heads, 2, half):  # [2, pairs]: a column is a pair
        chosen = torch.arange(half)[-n:]
        if pairs == "high":
            chosen = torch.arange(half)[:n]
        if pairs == "random":
            chosen = torch.randperm(half, generator=generator)[-n:]
        adapted.append(head[:, chosen].flatten())  # both dimensions of each pair
    return torch.cat(adapted)


def check_arguments(rank, alpha, low_freq_ratio, pairs):
    """Raise ValueError for what no adapter can have, in a call or in a file."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, not {rank!r}")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1e38:  # within float32
        raise ValueError(f"alpha must be a positive number, not {alpha!r}")
    if not isinstance(low_freq_ratio, (int, float)) or not 0 < low_freq_ratio <= 1:
        raise ValueError(f"low_freq_ratio must be in (0, 1], not {low_freq_ratio!r}")
    if pairs not in ("low", "high", "random"):
        raise ValueError(f"pairs must be low, high or random, not {pairs!r}")


def attach(model, rank=64, alpha=128, low_freq_ratio=0.5, targets="q,k", pairs="low"):
    """Freeze the model and wrap the target projections of every layer. Returns the model.

    targets: of q, k, v, o, gate, up, down. In q and k `low_freq_ratio` of the pairs adapt, the
    low-frequency ones or the `pairs` of an ablation. RoPE does not rotate the other targets (v, o,
    gate, up, down): in these every row adapts, as in LoRA."""
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: choose from {','.join(TARGETS)}")
    if adapters(model) or hasattr(model, "peft_config"):  # PEFT sets it where it adapts a model
        raise ValueError("the model has adapters already: merge(model) first")
    model.requires_grad_(False)
    for layer in model.model.layers:
        # In the order of TARGETS, whatever the order asked for: so a seed gives the same A.
        for target in [target for target in TARGETS if target in targets]:
            linear = layer.get_submodule(TARGETS[target])
            if target in ("q", "k"):
                num_heads = linear.out_features // model.config.head_dim
                adapter = RoAE(linear, num_heads, rank, alpha, low_freq_ratio, pairs)
            else:
                adapter = RoAE(linear, 1, rank, alpha, low_freq_ratio=1.0)
            layer.set_submodule(TARGETS[target], adapter)
    return model


def adapters(model):
    """Name -> adapter of every adapter in the model, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoAE)}


@torch.no_grad()
def merge(model):
    """Fold every adapter into its base weight, in place, and remove it. Returns the model. The sum
    of weight and update is made in float32 and rounded once, to the weight's dtype. A bfloat16
    weight has 8 significant bits: an update much smaller than the weight is partly lost.

    Raises FloatingPointError where a sum is not finite in the weight's dtype: that adapter and
    those after it stay. Raises ValueError for a quantised weight, which no update can be added
    to."""
    for name, adapter in adapters(model).items():
        weight, rows = adapter.linear.weight, adapter.rows
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"{name}: an update cannot be merged into a quantised weight")
        update = (adapter.alpha / adapter.rank) * adapter.B @ adapter.A  # [rows, in], float32
        merged = (weight[rows] + update).to(weight.dtype)
        if not merged.isfinite().all():
            raise FloatingPointError(f"{name}: the merged weight is not finite in {weight.dtype}")
        weight[rows] = merged
        model.set_submodule(name, adapter.linear)
    return model


class LayerSelector:
    """DLS, Dynamic Layer Selection (paper, Algorithm 1): train only the layers whose LayerNorms
    have large gradients.

    Every `select_every` optimiser steps, the first included, a step is a probe. Its backward pass
    reaches all layers, and gives each layer a score. The layers with the highest scores train until
    the next probe. With six layers, k_ratio 0.5 and select_every 4:

        step                  0       1       2       3       4       5       6       7
                              probe   train   train   train   probe   train   train   train
        have requires_grad    ██████  ██···█  ██···█  ██···█  ██████  █··█·█  █··█·█  █··█·█
        are updated           ██···█  ██···█  ██···█  ██···█  █··█·█  █··█·█  █··█·█  █··█·█

    The last row is what the progress bar of train.py shows. The layers that are not selected lose
    the gradient of the probe and their requires_grad. Their adapters keep what they have learned
    and still act. Between probes the backward pass stops at the lowest layer that trains.

    A layer's score is the L2 norm of the gradients of its two norm weights, taken together; RoSA
    measures these gradients and never updates the norms. Of the L layers in which something trains,
    max(1, round(k_ratio * L)) are selected. If all L are selected, probes only record the scores.

    That the norms measure a layer is the paper's choice. Every layer has the same two, of the same
    size, and all input of its attention and its MLP passes through them. The gradients of the
    adapters would select other layers: at step 0, where B is zero, the gradient of every A is zero,
    and that of B depends on the random A. Which of the two finds the better layers is open: see
    section 9 of the notebook in extras/lesson.

    A probe fails if a score is not finite. Then nothing is selected. The selection before the probe
    stays (before the first probe that is all layers), and the next step is a probe again. The step
    itself updates the layers of the old selection, unless the loss or one of their gradients is not
    finite: then train.py leaves the step out.

    score_ema smooths the scores over probes: score = score_ema * old + (1 - score_ema) * new.
    select: "grad" is the method. Its ablations: "random" draws the scores instead, "static" keeps
    the first selection, "all" trains every layer whatever the k_ratio. Make a LayerSelector after
    adapters of any kind are attached: it selects among the parameters that have requires_grad.
    Raises ValueError."""

    def __init__(self, model, k_ratio=0.5, select_every=25, score_ema=0.0, select="grad"):
        if not 0 < k_ratio <= 1:
            raise ValueError(f"k_ratio must be in (0, 1], not {k_ratio!r}")
        if select_every < 1:
            raise ValueError(f"select_every must be at least 1, not {select_every!r}")
        if not 0 <= score_ema < 1:
            raise ValueError(f"score_ema must be in [0, 1), not {score_ema!r}")
        if select not in ("grad", "random", "static", "all"):
            raise ValueError(f"select must be grad, random, static or all, not {select!r}")
        self.select_every = select_every
        self.score_ema = score_ema
        self.select = select

        self.parameters = []  # of each layer: the parameters that can train
        # The weights of each layer's two norms. If PEFT's LN tuning trains a norm, it has two: the
        # frozen original, which is not used any more and gets no gradient, and a copy.
        self.norms = []
        for layer in model.model.layers:
            self.parameters.append([p for p in layer.parameters() if p.requires_grad])
            first, second = layer.input_layernorm, layer.post_attention_layernorm
            self.norms.append([*first.parameters(), *second.parameters()])
        # The norm weights that only measure.
        self.frozen_norms = []
        for weights in self.norms:
            self.frozen_norms += [weight for weight in weights if not weight.requires_grad]

        # The layers that can be selected are those in which something trains.
        self.candidates = [i for i, parameters in enumerate(self.parameters) if parameters]
        selects = k_ratio < 1 and select != "all"
        if selects and not self.candidates:
            raise ValueError(
                "nothing that trains belongs to a layer: layers cannot be selected, k_ratio "
                "must be 1"
            )
        self.count = len(self.candidates)  # how many layers train at a time
        if selects:
            self.count = max(1, round(k_ratio * len(self.candidates)))
        self.scores = None  # a score for each layer, float32, once there was a probe
        self.active = self.candidates  # indices of the layers in training
        self.probing = False  # whether this step is a probe
        self.selected = False  # whether this step has selected layers: extras/runs.py logs that
        self.failed = False  # whether the last probe was not finite

    def before_forward(self, step):
        """Call before the first forward pass of optimiser step `step`, counted from 0."""
        is_due = step % self.select_every == 0
        if self.select == "static" and step > 0:
            is_due = False
        self.probing = is_due or self.failed
        self.selected = False
        if self.probing:
            self.previous = self.active  # what stays if the probe fails
            # The scores of "random" are drawn here because here all processes have the same random
            # state. After this call train.py gives each process a seed of its own, for dropout.
            self.drawn = torch.rand(len(self.parameters))
            self.activate(self.candidates)
            for weight in self.frozen_norms:
                weight.requires_grad_(True)

    def after_backward(self):
        """Call after the last backward pass of the step, when the gradients of all processes are
        added up, and before they are clipped and applied."""
        if not self.probing:
            return
        scores = torch.stack([gradient_norm(weights) for weights in self.norms]).cpu()
        for weight in self.frozen_norms:
            weight.requires_grad_(False).grad = None
        self.failed = not scores.isfinite().all()
        if self.failed:
            return self.activate(self.previous)
        if self.select == "random":
            scores = self.drawn
        if self.scores is not None:
            scores = self.score_ema * self.scores + (1 - self.score_ema) * scores
        self.scores = scores
        self.selected = True
        by_score = self.scores.argsort(descending=True, stable=True).tolist()
        best = [i for i in by_score if i in self.candidates]
        self.activate(best[: self.count])

    def activate(self, layers):
        """Let the parameters of these layers train. Those of the other layers lose requires_grad
        and their gradient."""
        self.active = sorted(layers)
        for parameters in self.parameters:
            for parameter in parameters:
                parameter.requires_grad_(False)
        # This comes second because methods of PEFT may share a parameter between layers: it trains
        # if one of these layers does.
        for i in self.active:
            for parameter in self.parameters[i]:
                parameter.requires_grad_(True)
        for parameters in self.parameters:
            for parameter in parameters:
                if not parameter.requires_grad:
                    parameter.grad = None


def gradient_norm(weights):
    """The L2 norm of the gradients of these weights, taken together. A weight that was not used has
    no gradient."""
    gradients = [weight.grad.float().flatten() for weight in weights if weight.grad is not None]
    return torch.cat(gradients).norm()


# --- files ---


def attach_arguments(model):
    """The arguments of `attach` that gave the model its adapters. An adapter fits into a model only
    if these arguments are the same."""
    adapted = {}  # target -> one of its adapters: they are alike in every layer
    for name, adapter in adapters(model).items():
        module = name.split(".", 3)[3]  # without "model.layers.0."
        adapted[module] = adapter
    if not adapted:
        raise ValueError(
            "the model has no RoAE modules, which is what is saved and loaded here: attach(model) "
            "first"
        )
    targets = [target for target, module in TARGETS.items() if module in adapted]
    # q and k come first in TARGETS. So this is an adapter of q or k, if there is one: those of v, o
    # and the MLP have a low_freq_ratio of 1, whatever `attach` was called with.
    first = adapted[TARGETS[targets[0]]]
    return {
        "rank": first.rank,
        "alpha": first.alpha,
        "low_freq_ratio": first.low_freq_ratio,
        "targets": targets,
        "pairs": first.pairs,
    }


def lora_config(arguments):
    """The adapter_config.json that makes PEFT read an adapter with these arguments of `attach` as a
    LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": None,
        "r": arguments["rank"],
        "lora_alpha": arguments["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [TARGETS[target].split(".")[1] for target in arguments["targets"]],
    }


def save_adapter(model, directory):
    """Write adapter_config.json and adapter_model.safetensors: PEFT's LoRA format, B zero outside
    the adapted rows. The arguments of `attach` stand in the safetensors metadata, under "rosa".

    Raises ValueError for a parameter that has requires_grad and is no adapter's, since it would be
    lost."""
    arguments = attach_arguments(model)
    tensors = {}
    saved = set()  # names of the parameters that are saved
    for name, adapter in adapters(model).items():
        B = torch.zeros(adapter.linear.out_features, adapter.rank)
        B[adapter.rows.cpu()] = adapter.B.detach().cpu()
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        saved |= {f"{name}.A", f"{name}.B"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in saved:
            raise ValueError(
                f"{name} trains, and save_adapter would lose it: it writes the A and B of adapters"
            )
    config = lora_config(arguments)
    config["base_model_name_or_path"] = getattr(model, "name_or_path", None)
    write_adapter(model, directory, config, tensors, arguments)


def write_adapter(model, directory, config, tensors, metadata):
    """Write the two files of a model's adapter, under PEFT's names. All metadata stands under one
    key: safetensors writes several keys in no fixed order, and the same adapter shall give the same
    bytes. That the base was quantised (extras/quantize.py) is added to it."""
    if getattr(model, "quantization", None):
        metadata = metadata | {"base_quantization": model.quantization}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"rosa": json.dumps(metadata)})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model, directory):
    """Read what `save_adapter` wrote into the model, and attach adapters first if it has none.
    Returns the model. extras/adapters.py reads what other tools write.

    Raises ValueError or OSError, naming what does not fit, before the model is changed."""
    directory = Path(directory)
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8-sig"))
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("rosa", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    # The first files were written before `pairs` was an argument.
    arguments = {"pairs": "low"} | metadata
    arguments.pop("base_quantization", None)  # the adapter fits the unquantised base too
    if sorted(arguments) != ["alpha", "low_freq_ratio", "pairs", "rank", "targets"]:
        raise ValueError(
            f"{directory} was not written by save_adapter: extras.adapters.load_adapter reads the "
            "adapters of PEFT"
        )
    config["base_model_name_or_path"] = None  # whatever the base is called
    if config != lora_config(arguments):
        raise ValueError(
            f"{directory}: adapter_config.json is not what save_adapter has written for {arguments}"
        )
    return load_tensors(model, directory, arguments, tensors)


@torch.no_grad()
def load_tensors(model, directory, arguments, tensors):
    """Copy the tensors of an adapter, as `save_adapter` names them, into the model's adapters, and
    attach adapters with these arguments first if it has none. Returns the model. Raises ValueError
    for tensors that do not fit, naming the directory that they are from."""
    if adapters(model) and attach_arguments(model) != arguments:
        raise ValueError(
            f"{directory} has {arguments}, the adapters of the model have {attach_arguments(model)}"
        )
    check_adapter(model, directory, arguments, tensors)
    if not adapters(model):
        attach(model, **arguments)
    for name, adapter in adapters(model).items():
        adapter.A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        adapter.B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"][adapter.rows.cpu()])
    return model


def check_adapter(model, directory, arguments, tensors):
    """Raise ValueError unless the tensors are those of an adapter for the model, which may have
    adapters or not, with these arguments of `attach`."""
    shapes = {}
    rotated = {}  # the name of each B that adapts a q_proj or k_proj -> that linear layer
    for i, layer in enumerate(model.model.layers):
        for target in arguments["targets"]:
            linear = layer.get_submodule(TARGETS[target])
            if isinstance(linear, RoAE):
                linear = linear.linear
            name = f"base_model.model.model.layers.{i}.{TARGETS[target]}"
            shapes[f"{name}.lora_A.weight"] = (arguments["rank"], linear.in_features)
            shapes[f"{name}.lora_B.weight"] = (linear.out_features, arguments["rank"])
            if target in ("q", "k"):
                rotated[f"{name}.lora_B.weight"] = linear
    check_shapes(directory, tensors, shapes)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{directory}: {name} is {tensor.dtype}, not floats")
    ratio, pairs = arguments["low_freq_ratio"], arguments["pairs"]
    for name, linear in rotated.items():
        num_heads = linear.out_features // model.config.head_dim
        rows = adapted_rows(linear.out_features, num_heads, ratio, pairs)
        others = tensors[name].index_fill(0, rows, 0)
        if others.any():
            raise ValueError(
                f"{directory}: {name} is not zero outside low_freq_ratio {ratio}, pairs {pairs}"
            )


def check_shapes(directory, tensors, shapes):
    """Raise ValueError unless the tensors are those of `shapes`, name -> shape, and no others."""
    for name in shapes | tensors:
        shape = list(tensors[name].shape) if name in tensors else "absent"
        needed = list(shapes[name]) if name in shapes else "absent"
        if shape != needed:
            raise ValueError(
                f"{directory} was trained on another model: {name} is {shape}, this one needs "
                f"{needed}"
            )
