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
LLaMA's names."""

import json
import math
import sys
from collections import Counter
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

    linear: the layer to adapt, [out, in], out = num_heads * d; it is kept as it is. A and B are
    float32 whatever the dtype of its weight; the forward pass casts these small matrices, never the
    activations. Raises ValueError."""

    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5, pairs="low"):
        super().__init__()
        check_arguments(rank, alpha, low_freq_ratio, pairs)
        self.linear, self.num_heads, self.rank, self.alpha = linear, num_heads, rank, alpha
        self.low_freq_ratio, self.pairs = low_freq_ratio, pairs
        device, rows = (
            linear.weight.device,
            adapted_rows(linear.out_features, num_heads, low_freq_ratio, pairs),
        )
        # Goes where the model goes, into no file
        self.register_buffer("rows", rows.to(device), persistent=False)
        # Drawn on the CPU: the same numbers for every device
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

    pairs: "low" is the method, the last n pairs of every head; "high", the first n, and "random",
    any n, other ones in each head but the same in every layer, are its ablations with as many
    parameters."""
    rows = torch.arange(out_features)  # seen as [heads, 2 halves, pairs] below
    if low_freq_ratio == 1:
        return rows
    half = out_features // num_heads // 2  # pairs in a head
    n = max(1, round(low_freq_ratio * half))
    chosen = torch.arange(half)[:n] if pairs == "high" else torch.arange(half)[-n:]
    if pairs == "random":
        generator = torch.Generator().manual_seed(0)
        chosen = torch.stack(
            [torch.randperm(half, generator=generator)[-n:] for _ in range(num_heads)]
        )
    # [n] or [heads, n] -> [heads, 2, n]: both halves
    chosen = chosen.expand(num_heads, n)[:, None].expand(-1, 2, -1)
    return rows.view(num_heads, 2, half).gather(2, chosen).flatten()


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

    targets: of q, k, v, o, gate, up, down. Queries and keys get `low_freq_ratio` of their pairs,
    the low-frequency ones or the `pairs` of an ablation; the others are not rotated and get every
    row, as in LoRA."""
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"unknown target {unknown[0]!r}: choose from {','.join(TARGETS)}")
    if adapters(model) or hasattr(model, "peft_config"):
        raise ValueError("the model has adapters already: merge(model) first")
    model.requires_grad_(False)
    for layer in model.model.layers:
        # In one order: the same seed gives the same A
        for target in sorted(set(targets), key=list(TARGETS).index):
            linear = layer.get_submodule(TARGETS[target])
            rotated = target in ("q", "k")
            num_heads = linear.out_features // model.config.head_dim if rotated else 1
            adapter = RoAE(
                linear, num_heads, rank, alpha, low_freq_ratio if rotated else 1.0, pairs
            )
            layer.set_submodule(TARGETS[target], adapter)
    return model


def adapters(model):
    """Name -> adapter of every adapter in the model, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoAE)}


@torch.no_grad()
def merge(model):
    """Fold every adapter into its base weight, in place, and remove it. Returns the model. The sum
    is made in float32 and rounded once: to the 8 bits of a bfloat16 weight, where an update much
    smaller than the weight loses some.

    Raises FloatingPointError where a sum is not finite in the weight's dtype: that adapter and
    those after it stay."""
    for name, adapter in adapters(model).items():
        weight, rows = adapter.linear.weight, adapter.rows
        update = (adapter.alpha / adapter.rank) * adapter.B @ adapter.A  # [rows, in], float32
        merged = (weight[rows] + update).to(weight.dtype)
        if not merged.isfinite().all():
            raise FloatingPointError(f"{name}: the merged weight is not finite in {weight.dtype}")
        weight[rows] = merged
        model.set_submodule(name, adapter.linear)
    return model


def attach_arguments(model):
    """What must agree for one model's adapter to fit another: the arguments of `attach`."""
    # The last: all are alike
    layer = {name.split(".", 3)[3]: adapter for name, adapter in adapters(model).items()}
    if not layer:
        raise ValueError(
            "the model has no RoAE modules, which is what is saved and loaded here: attach(model) "
            "first"
        )
    targets = [target for target, module in TARGETS.items() if module in layer]
    first = layer[TARGETS[targets[0]]]  # q or k where there is one: the others have every row
    ratio, pairs = first.low_freq_ratio, first.pairs
    return {
        "rank": first.rank,
        "alpha": first.alpha,
        "low_freq_ratio": ratio,
        "targets": targets,
        "pairs": pairs,
    }


def save_adapter(model, directory):
    """Write adapter_config.json and adapter_model.safetensors: PEFT's LoRA format, B zero outside
    the adapted rows.

    What RoSA knows beyond that stands in the safetensors metadata, under "rosa". Raises ValueError
    for a parameter that trains and is no adapter's, since it would be lost."""
    saved = {
        parameter for adapter in adapters(model).values() for parameter in (adapter.A, adapter.B)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in saved:
            raise ValueError(
                f"{name} trains, and save_adapter would lose it: it writes the A and B of adapters"
            )
    metadata, tensors = attach_arguments(model), {}
    for name, adapter in adapters(model).items():
        B = torch.zeros(adapter.linear.out_features, adapter.rank)
        B[adapter.rows.cpu()] = adapter.B.detach().cpu()
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    config |= {
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": metadata["rank"],
    }
    config |= {
        "lora_alpha": metadata["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    config |= {"target_modules": [TARGETS[target].split(".")[1] for target in metadata["targets"]]}
    write_adapter(directory, config, tensors, metadata)


def write_adapter(directory, config, tensors, metadata):
    """Write an adapter's two files, as PEFT names them; the metadata under one key, as several have
    no fixed order."""
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    save_file(
        tensors, directory / "adapter_model.safetensors", metadata={"rosa": json.dumps(metadata)}
    )
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(model, directory):
    """Read what `save_adapter` wrote, or another PEFT LoRA, into the model; it is attached first if
    need be. Returns the model. Raises ValueError or OSError, naming what does not fit, before the
    model is changed."""
    arguments, tensors = read_adapter(directory)
    if "peft" in arguments:
        raise ValueError(
            f"{directory} is an adapter of PEFT's own: extras.adapters.load_adapter reads it"
        )
    if adapters(model) and attach_arguments(model) != arguments:
        raise ValueError(
            f"{directory} has {arguments}, the adapters of the model have {attach_arguments(model)}"
        )
    check_lora(directory, tensors, model, arguments)
    if not adapters(model):
        attach(model, **arguments)
    for name, adapter in adapters(model).items():
        adapter.A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        adapter.B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"][adapter.rows.cpu()])
    return model


# Fields of PEFT's LoraConfig that read_adapter reads, or that do not change what a trained adapter
# computes.
LORA_FIELDS = set(
    "peft_type r lora_alpha use_rslora target_modules exclude_modules lora_dropout task_type "
    "base_model_name_or_path "
    "revision inference_mode init_lora_weights auto_mapping peft_version layers_pattern "
    "megatron_core "
    "qalora_group_size loftq_config eva_config ensure_weight_tying".split()
)
# init_lora_weights that change the base weights too
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter(directory, as_lora=False):
    """(arguments for `attach`, name -> tensor) of an adapter directory; where PEFT's code is needed
    to run the adapter the arguments are {"peft": its config} instead, unless it is a LoRA and
    `as_lora`. Raises ValueError or OSError."""
    path = Path(directory) / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    with safe_open(Path(directory) / "adapter_model.safetensors", framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("rosa", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    # "peft": by --method peft:LORA
    if config.get("peft_type") != "LORA" or "peft" in metadata and not as_lora:
        return {"peft": config}, tensors
    # What is not known to be harmless must be off: DoRA, rank_pattern, future ones
    for name, value in config.items():
        changes_base = name == "init_lora_weights" and str(value).lower().startswith(CHANGE_BASE)
        if changes_base or (name not in LORA_FIELDS and value and value != "none"):
            raise ValueError(
                f"{path}: {name} = {value!r:.60} is not implemented: let PEFT convert it to a "
                "plain LoRA"
            )
    targets = [
        name
        for name, module in TARGETS.items()
        if any(f".{module}.lora_A." in key for key in tensors)
    ]
    stated = metadata.get("targets", targets)
    if sorted(map(str, stated)) != sorted(targets):
        raise ValueError(
            f"{directory} says that it adapts {stated}, and holds tensors of {targets}"
        )
    arguments = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "targets": targets}
    # Absent from what PEFT wrote: all rows adapt
    for name, default in (("low_freq_ratio", 1.0), ("pairs", "low")):
        arguments[name] = metadata.get(name, default)
    try:
        check_arguments(*(arguments[name] for name in ("rank", "alpha", "low_freq_ratio", "pairs")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.get("use_rslora"):  # it scales by alpha / sqrt(r), LoRA by alpha / r
        arguments["alpha"] *= math.sqrt(config["r"])
    return arguments, tensors


def check_lora(directory, tensors, model, arguments):
    """Raise ValueError unless the tensors are those of an adapter for the model with these
    arguments of `attach`."""
    ratio, pairs, shapes, rows = arguments["low_freq_ratio"], arguments["pairs"], {}, {}
    for i, layer in enumerate(model.model.layers):
        for target in arguments["targets"]:
            linear = layer.get_submodule(TARGETS[target])
            linear = linear.linear if isinstance(linear, RoAE) else linear
            name = f"base_model.model.model.layers.{i}.{TARGETS[target]}"
            shapes[f"{name}.lora_A.weight"] = (arguments["rank"], linear.in_features)
            shapes[f"{name}.lora_B.weight"] = (linear.out_features, arguments["rank"])
            if target in ("q", "k"):
                heads = linear.out_features // model.config.head_dim
                rows[f"{name}.lora_B.weight"] = adapted_rows(
                    linear.out_features, heads, ratio, pairs
                )
    if others := [name for name in tensors if ".layers." not in name]:
        raise ValueError(
            f"{directory} holds {others[0]}, which is in no layer: let PEFT merge it, "
            "merge_and_unload()"
        )
    check_tensors(directory, tensors, shapes)
    if not tensors:
        raise ValueError(f"{directory} holds no tensors: nothing would be adapted")
    if integers := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{directory}: {integers[0]} is {tensors[integers[0]].dtype}, not floats")
    for name, adapted in rows.items():
        if tensors[name].index_fill(0, adapted, 0).any():  # anything left without the adapted rows?
            raise ValueError(
                f"{directory}: {name} is not zero outside low_freq_ratio {ratio}, pairs {pairs}"
            )


def check_tensors(directory, tensors, shapes):
    """Raise ValueError unless the tensors are those of `shapes`, name -> shape, and no others."""
    for name in shapes | tensors:
        shape = list(tensors[name].shape) if name in tensors else "absent"
        needed = list(shapes[name]) if name in shapes else "absent"
        if shape != needed:
            raise ValueError(
                f"{directory} was trained on another model: {name} is {shape}, this one needs "
                f"{needed}"
            )


class LayerSelector:
    """DLS, Dynamic Layer Selection (paper, Algorithm 1): train only the layers whose LayerNorms
    have large gradients.

    Every `select_every` optimiser steps, the first included, a step is a probe. All that trains in
    any layer then asks for gradients, and so do each layer's two norm weights, which RoSA only
    measures: they are few, every layer has the same ones, and all input of attention and MLP passes
    through them. A layer's score is the L2 norm of their gradients; of the L layers that have
    something to train the round(k_ratio * L) with the highest scores train until the next probe.
    The others lose this step's gradient and ask for none; their adapters keep what they have
    learned and still act. Below the lowest active layer the backward pass then needs nothing. Where
    all layers train, probes only record scores.

    score_ema smooths the scores over probes: score = score_ema * old + (1 - score_ema) * new.
    select: "grad" is the method. Its ablations: "random" draws the scores instead, "static" keeps
    the first selection, "all" trains every layer whatever the k_ratio. Make it after adapters of
    any kind are attached: it selects among what asks for a gradient. Raises ValueError."""

    def __init__(self, model, k_ratio=0.5, select_every=25, score_ema=0.0, select="grad"):
        if not 0 < k_ratio <= 1:
            raise ValueError(f"k_ratio must be in (0, 1], not {k_ratio!r}")
        if select_every < 1:
            raise ValueError(f"select_every must be at least 1, not {select_every!r}")
        if not 0 <= score_ema < 1:
            raise ValueError(f"score_ema must be in [0, 1), not {score_ema!r}")
        if select not in ("grad", "random", "static", "all"):
            raise ValueError(f"select must be grad, random, static or all, not {select!r}")
        layers = model.model.layers
        trainable = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        # What layers share (VeRA) always trains
        uses = Counter(p for parameters in trainable for p in parameters)
        self.parameters = [[p for p in parameters if uses[p] == 1] for parameters in trainable]
        norms = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        self.norms = [[*first.parameters(), *second.parameters()] for first, second in norms]
        # They measure, no more
        self.frozen_norms = [w for norms in self.norms for w in norms if not w.requires_grad]
        # The layers that can be selected: those of which something trains. Where that is none, all
        # count as training.
        self.candidates = [i for i, parameters in enumerate(self.parameters) if parameters]
        if k_ratio < 1 and select != "all" and not self.candidates:
            raise ValueError(
                "nothing that trains belongs to a layer: layers cannot be selected, k_ratio "
                "must be 1"
            )
        self.candidates = self.candidates or list(range(len(layers)))
        self.count = len(self.candidates)
        if select != "all":
            self.count = max(1, round(k_ratio * len(self.candidates)))
        self.select_every, self.score_ema, self.select = select_every, score_ema, select
        self.scores = None  # [L] float32, once there was a probe
        self.active = self.candidates  # indices of the layers in training
        # Is this step a probe; did it select layers (for the log)
        self.probing = self.selected = False
        self.failed = False  # whether the last probe was not finite

    def before_forward(self, step):
        """Call before the first forward pass of optimiser step `step`, counted from 0."""
        due = step % self.select_every == 0 and not (self.select == "static" and step > 0)
        self.probing, self.selected = due or self.failed, False
        if self.probing:
            self.previous = self.active  # what stays if the probe fails; at the first all layers
            # For "random": here the processes share a seed
            self.drawn = torch.rand(len(self.parameters))
            self.activate(self.candidates)
            for weight in self.frozen_norms:
                weight.requires_grad_(True)

    def after_backward(self):
        """Call after the last backward pass of the step, before gradients are clipped and applied.
        A probe whose gradients are not finite tells nothing: the selection before it stays, and the
        next step is a probe again."""
        if not self.probing:
            return
        # PEFT's LN tuning computes with copies of the norms, which are here too: the originals get
        # no gradient.
        gradients = [
            [w.grad.float().norm() for w in norms if w.grad is not None] for norms in self.norms
        ]
        scores = torch.stack([torch.stack(norms).norm() for norms in gradients]).cpu()  # [L]
        for weight in self.frozen_norms:
            weight.requires_grad_(False).grad = None
        self.failed = not scores.isfinite().all()
        if self.failed:
            return self.activate(self.previous)
        if self.select == "random":
            scores = self.drawn
        self.selected = True
        self.scores = (
            scores
            if self.scores is None
            else self.score_ema * self.scores + (1 - self.score_ema) * scores
        )
        by_score = self.scores.argsort(descending=True, stable=True).tolist()
        self.activate([i for i in by_score if i in self.candidates][: self.count])

    def activate(self, layers):
        """Let the parameters of these layers ask for gradients, and of no others."""
        self.active = sorted(layers)
        for i, parameters in enumerate(self.parameters):
            for parameter in parameters:
                parameter.requires_grad_(i in self.active)
                parameter.grad = parameter.grad if i in self.active else None


if __name__ == "__main__":
    print(
        "rosa.py has no command; to merge an adapter: python -m extras.merge --help",
        file=sys.stderr,
    )
    sys.exit(2)
