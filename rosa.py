"""RoSA, RoPE-aware Selective Adaptation (Pan et al., AAAI 2026, arXiv 2511.21733): low-rank updates of the dimensions
of Q and K that RoPE rotates slowly (RoAE), trained only in the layers that matter now (DLS).

RoAE, RoPE-aware Attention Enhancement. RoPE turns pair i of a head, the dimensions (i, i + d/2), by theta^(-2i/d)
radians a position: the last pairs hardly turn, and carry what attention knows regardless of position. RoAE adds to
these n = round(low_freq_ratio * d/2) pairs alone, before the rotation:

    one head of q = W x         0 ........ d/2-n ... d/2 ........ d-n ... d
                                [ untouched | low freq | untouched | low freq ]
                                                 +                      +
    (alpha/rank) * B (A x)                   [  n rows  ]           [  n rows  ]     A [rank, D], B [H * 2n, rank]

B starts at zero, so the adapted model begins as the base model. The update is linear in x: it merges into W exactly,
and it is a LoRA whose B is zero in all other rows; with low_freq_ratio = 1 it is LoRA itself.

DLS, Dynamic Layer Selection: `LayerSelector`, at the end of the file.

Names of modules are those of a Hugging Face LLaMA; nothing else is asked of the model.
"""

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

TARGETS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class RoAE(nn.Linear):
    """A linear layer plus a low-rank update of the low-frequency rows of each of its heads (paper, Fig. 2).

    linear: the nn.Linear to adapt, [out, in], out = num_heads * d; its weight and bias are used as they are, not
    copied, and keep their names. A and B are float32 whatever the dtype of the weight; the forward pass casts these
    small matrices, never the activations.
    pairs: "low" is the method; "high" (the fastest as many) and "random" (others in each head, the same in every layer)
    are its ablations, at an equal number of parameters.
    Raises ValueError for a rank below 1, an alpha that is not positive, a low_freq_ratio outside (0, 1]."""

    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5, pairs="low"):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight of its own
        check_settings(rank, alpha, low_freq_ratio, pairs)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.base_class = linear.weight, linear.bias, type(linear)
        self.num_heads, self.rank, self.alpha = num_heads, rank, alpha
        self.low_freq_ratio, self.pairs = low_freq_ratio, pairs
        rows = torch.arange(self.out_features)
        if low_freq_ratio < 1:
            half = self.out_features // num_heads // 2
            n = max(1, round(low_freq_ratio * half))  # pairs of a head that adapt
            self.columns = slice(0, n) if pairs == "high" else slice(half - n, half)
            rows = rows.view(num_heads, 2, half)
            if pairs == "random":
                generator = torch.Generator().manual_seed(0)
                shuffled = torch.stack([torch.randperm(half, generator=generator) for _ in range(num_heads)])
                rows = rows.gather(2, shuffled[:, None].expand(-1, 2, -1))
            rows = rows[:, :, self.columns].reshape(-1)
        # The rows of `weight` that B's rows stand for. A buffer: it goes where the model goes, and into no file.
        self.register_buffer("rows", rows.to(linear.weight.device), persistent=False)
        A = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.A = nn.Parameter(A.to(linear.weight.device))  # [rank, in]
        self.B = nn.Parameter(torch.zeros(len(rows), rank, device=linear.weight.device))  # [rows, rank]

    def forward(self, x):  # [.., in] -> [.., out]
        y = self.base_class.forward(self, x)  # W x + bias, as the adapted layer computes it
        B = self.B * (self.alpha / self.rank)  # scaled here, where it is small
        update = F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))  # [.., rows]
        if self.low_freq_ratio == 1:
            y += update
        elif self.pairs == "random":
            y.index_add_(-1, self.rows, update)
        else:
            y = AddToPairs.apply(y, update, self.num_heads, self.columns)
        return y

    @torch.no_grad()
    def merged(self):
        """The plain layer that computes the same. Its weight is this one's, changed in place: the sum is made in
        float32 and rounded once to the weight's dtype."""
        weight = self.weight
        update = (self.alpha / self.rank) * self.B @ self.A
        weight[self.rows] = (weight[self.rows].float() + update).to(weight.dtype)
        linear = self.base_class(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = weight, self.bias
        return linear


class AddToPairs(torch.autograd.Function):
    """Adds the update, [.., rows], to the pairs `columns` of every head of y, [.., out], in place. The gradient passes as it is:
    autograd alone would copy all of it."""

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


def check_settings(rank, alpha, low_freq_ratio, pairs):
    """Raise ValueError for what is none of an adapter's, whoever says so: a program, or a file."""
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

    targets: of q, k, v, o, gate, up, down. Queries and keys get `low_freq_ratio` of their pairs, the low-frequency
    ones or the `pairs` of an ablation; the others are not rotated and get every row, as in LoRA. With
    low_freq_ratio = 1, which is pairs = "all", everything is LoRA."""
    if pairs == "all":
        low_freq_ratio, pairs = 1.0, "low"
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: choose from {','.join(TARGETS)}")
    if adapters(model) or hasattr(model, "peft_config"):
        raise ValueError("the model has adapters already: merge(model) first")
    model.requires_grad_(False)
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    for layer in model.model.layers:
        for target in TARGETS:  # in one order, however they were named: the same seed gives the same A
            if target in targets:
                ratio = low_freq_ratio if target in heads else 1.0
                linear = layer.get_submodule(TARGETS[target])
                layer.set_submodule(TARGETS[target], RoAE(linear, heads.get(target, 1), rank, alpha, ratio, pairs))
    return model


def adapters(model):
    """Name -> adapter of every adapter in the model, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoAE)}


def merge(model):
    """Fold every adapter into its base weight and remove it. Returns the model.

    In float32 the outputs stay the same to rounding. A bfloat16 weight keeps 8 bits: of an update much smaller than
    the weight the low bits are lost, which the unmerged adapter would still have applied."""
    for name, adapter in adapters(model).items():
        model.set_submodule(name, adapter.merged())
    return model


def settings(model):
    """What must agree for one model's adapter to fit another: the arguments of `attach`."""
    found = adapters(model)
    first = next(iter(found.values()))
    modules = {name.split(".", 3)[3]: module for name, module in found.items()}  # model.layers.0.self_attn.q_proj
    targets = [target for target, module in TARGETS.items() if module in modules]
    ratios = [modules[TARGETS[target]].low_freq_ratio for target in ("q", "k") if target in targets]
    return {"rank": first.rank, "alpha": first.alpha, "low_freq_ratio": (ratios or [1.0])[0], "targets": targets,
            "pairs": first.pairs}


def save_adapter(model, directory):
    """Write adapter_config.json and adapter_model.safetensors: PEFT's LoRA format, B zero outside the adapted rows.

    What RoSA knows beyond that stands in the safetensors metadata, under "rosa". Each file is replaced whole."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    known = settings(model)
    tensors = {}
    for name, adapter in adapters(model).items():
        B = torch.zeros(adapter.out_features, adapter.rank)
        B[adapter.rows.cpu()] = adapter.B.detach().cpu()
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": known["rank"], "lora_alpha": known["alpha"], "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": [TARGETS[target].split(".")[1] for target in known["targets"]],
    }
    write_adapter(directory, config, tensors, known)


def write_adapter(directory, config, tensors, known):
    partial = directory / "adapter_model.safetensors.partial"
    save_file(tensors, partial, metadata={"rosa": json.dumps(known)})  # one key: several have no fixed order
    os.replace(partial, directory / "adapter_model.safetensors")
    partial = directory / "adapter_config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, directory / "adapter_config.json")


def load_adapter(model, directory):
    """Read what `save_adapter` wrote, or another PEFT LoRA, into the model; it is attached first if need be. Returns
    the model. Raises ValueError or OSError, naming all that does not fit, before the model is changed."""
    directory = Path(directory)
    known, tensors = read_adapter(directory)
    if "peft" in known:
        raise ValueError(f"{directory} is an adapter of PEFT's type {known['peft']['peft_type']}: extras.peft_methods.load_adapter reads it")
    return set_adapter(model, known, tensors, directory)


def set_adapter(model, known, tensors, directory):
    """Put what `read_adapter` read from a directory, settings and tensors, into the model. Returns and raises as `load_adapter`."""
    if adapters(model) and (mine := settings(model)) != known:
        differing = [f"{key} {known[key]} (the model has {mine[key]})" for key in known if known[key] != mine[key]]
        raise ValueError(f"{directory} has {', '.join(differing)}")
    check_lora(directory, tensors, model, known)
    if not adapters(model):
        attach(model, **known)
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
            adapter.B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"][adapter.rows.cpu()])
    return model


def check_lora(directory, tensors, model, known):
    """Raise ValueError unless the tensors are those of an adapter for the model, known: arguments of `attach`."""
    linears = {f"base_model.model.model.layers.{i}.{TARGETS[target]}": (target, layer.get_submodule(TARGETS[target]))
               for i, layer in enumerate(model.model.layers) for target in known["targets"]}
    shapes = {f"{name}.lora_A.weight": (known["rank"], linear.in_features) for name, (_, linear) in linears.items()}
    shapes |= {f"{name}.lora_B.weight": (linear.out_features, known["rank"]) for name, (_, linear) in linears.items()}
    check_tensors(directory, tensors, shapes)
    if wrong := [name for name in tensors if not tensors[name].is_floating_point()]:
        raise ValueError(f"{directory}: {wrong[0]} is {tensors[wrong[0]].dtype}, not floats: copy the adapter again")
    for name, (target, linear) in linears.items():
        if target in ("q", "k") and known["low_freq_ratio"] < 1:  # B is read in the adapted rows alone
            heads = model.config.num_attention_heads if target == "q" else model.config.num_key_value_heads
            rows = RoAE(nn.Linear(1, linear.out_features), heads, 1, 1, known["low_freq_ratio"], known["pairs"]).rows
            if tensors[f"{name}.lora_B.weight"].index_fill(0, rows, 0).any():
                raise ValueError(f"{directory}: {name}.lora_B.weight is not zero outside the rows of low_freq_ratio "
                                 f"{known['low_freq_ratio']}, pairs {known['pairs']}, in its metadata: copy the adapter again")


def check_tensors(directory, tensors, wanted):
    """Raise ValueError unless the tensors are those of `wanted`, name -> shape, and no others."""
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [f"{name} has shape {list(tensors[name].shape)}, the model needs {list(shape)}"
                 for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{directory} is an adapter for another model: {'; '.join(problems[:3])}{more}. Give --ckpt "
                         "the one that it was trained on")


# Of PEFT's LoraConfig: what read_adapter heeds, and what says nothing about the function that a trained adapter is.
LORA_FIELDS = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "task_type",
               "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "auto_mapping", "peft_version",
               "layers_pattern", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "ensure_weight_tying"}


def read_adapter(directory):
    """The settings, arguments for `attach`, and the tensors in an adapter directory. Where PEFT's code is needed to
    run the adapter the settings are {"peft": its config} instead."""
    file = directory / "adapter_model.safetensors"
    try:
        place = directory / "adapter_config.json"
        config = json.loads(place.read_text(encoding="utf-8"))
        open(file, "rb").close()  # which says why where it cannot: safe_open calls it absent
        with safe_open(file, framework="pt") as opened:
            place = f"the metadata of {file}"
            own = json.loads((opened.metadata() or {}).get("rosa", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (FileNotFoundError, NotADirectoryError):
        absent = next(name for name in ("adapter_config.json", file.name) if not (directory / name).is_file())
        pickled = ", only adapter_model.bin, a pickle, which can run code" if (directory / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {absent}{pickled}") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): copy it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): copy it again") from None
    try:
        if not isinstance(config, dict) or not isinstance(own, dict) or not isinstance(config["peft_type"], str):
            raise TypeError("not the JSON object that save_adapter or PEFT writes")
        if config["peft_type"] != "LORA" or "peft" in own:
            return {"peft": config}, tensors
        for name, value in config.items():  # DoRA, rank_pattern, modules_to_save, ...: by name, future ones too
            if name not in LORA_FIELDS and value and value != "none":
                raise ValueError(f"{name} = {value!r:.60} is not implemented")
        if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise ValueError(f"init_lora_weights = {config['init_lora_weights']!r} changes the base weights too, which is not "
                             "implemented: let PEFT convert it to a plain LoRA (save_pretrained's path_initial_model_for_"
                             "weight_conversion)")
        targets = [target for target, module in TARGETS.items() if any(f".{module}.lora_A." in name for name in tensors)]
        # rsLoRA scales by alpha / sqrt(r), LoRA by alpha / r.
        alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
        known = {"rank": config["r"], "alpha": alpha, "low_freq_ratio": 1.0, "targets": targets, "pairs": "low"}
        for name in own:  # they may add the rows to what PEFT reads, and change nothing of it
            if name not in known or name not in ("low_freq_ratio", "pairs") and own[name] != known[name]:
                raise ValueError(f"{name} {known.get(name)!r} is {own[name]!r} in the metadata of {file.name}: "
                                 "copy the adapter again")
        known |= own
        check_settings(*(known[name] for name in ("rank", "alpha", "low_freq_ratio", "pairs")))
    except (ValueError, KeyError, TypeError) as error:  # a key that is absent, not an object
        problem = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{directory / 'adapter_config.json'}: {problem}") from None
    return known, tensors


class LayerSelector:
    """DLS, Dynamic Layer Selection (paper, Algorithm 1): train only the layers whose LayerNorms have large gradients.

    Every `select_every` optimiser steps, the first included, a step is a probe: the two norm weights of every layer,
    never trained themselves, and every adapter ask for gradients, and the ordinary backward pass delivers them. A
    layer's score is the L2 norm of its norm weights' gradients; the round(k_ratio * L) layers with the highest scores
    train until the next probe. The other adapters lose this step's gradient and ask for none; they keep what they have
    learned and still act. Nothing below the lowest active layer is then stored or computed for the backward pass.

        selector.before_forward(step)       # a probe asks every layer for gradients
        ...                                 # forward and backward, of one or several micro-batches
        selector.after_backward()           # a probe scores and selects

    score_ema smooths the scores over probes: score = score_ema * old + (1 - score_ema) * new.
    select: "grad" is the method. Its ablations: "random" draws the scores instead, "static" keeps the first selection,
    "all" trains every layer whatever the k_ratio.
    It is made once the model's adapters are attached, of any kind: what asks for a gradient then belongs to its layer.
    Raises ValueError for a k_ratio outside (0, 1], a select_every below 1, a score_ema outside [0, 1)."""

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
        found = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        owners = Counter(p for parameters in found for p in parameters)
        self.parameters = [[p for p in parameters if owners[p] == 1] for parameters in found]  # not what layers share
        self.norms = [[*layer.input_layernorm.parameters(), *layer.post_attention_layernorm.parameters()] for layer in layers]
        self.borrowed = [w for norms in self.norms for w in norms if not w.requires_grad]  # thermometers and no more
        self.count = len(layers) if select == "all" else max(1, round(k_ratio * len(layers)))
        if self.count < len(layers) and not any(self.parameters):
            raise ValueError("nothing that trains belongs to a layer: layers cannot be selected, k_ratio must be 1")
        self.select_every, self.score_ema, self.select = select_every, score_ema, select
        self.scores = None  # [L] float32, once there was a probe
        self.active = list(range(len(layers)))  # indices of the layers in training
        self.probing = False

    def before_forward(self, step):
        """Call before the first forward pass of optimiser step `step`, counted from 0."""
        self.probing = step % self.select_every == 0 and not (self.select == "static" and step > 0)
        if self.probing:
            self.selected = self.active[: self.count]
            self.drawn = torch.rand(len(self.parameters))  # here, where all of several processes draw the same
            self.activate(range(len(self.parameters)))
            for weight in self.borrowed:
                weight.requires_grad_(True)

    def after_backward(self):
        """Call after the last backward pass of the step, before gradients are clipped and applied. A probe whose gradients
        are not finite tells nothing: it counts as none, and the selection before it stays."""
        if not self.probing:
            return
        scores = torch.stack([torch.stack([w.grad.float().norm() for w in norms if w.grad is not None]).norm()
                              for norms in self.norms]).cpu()
        if self.select == "random":
            scores = self.drawn
        for weight in self.borrowed:
            weight.requires_grad_(False).grad = None
        self.probing = bool(scores.isfinite().all())
        if not self.probing:
            return self.activate(self.selected)
        self.scores = scores if self.scores is None else self.score_ema * self.scores + (1 - self.score_ema) * scores
        self.activate(self.scores.argsort(descending=True, stable=True)[: self.count].tolist())

    def activate(self, layers):
        """Let the parameters of these layers ask for gradients, and of no others."""
        self.active = sorted(layers)
        for i, parameters in enumerate(self.parameters):
            for parameter in parameters:
                parameter.requires_grad_(i in self.active)
                if i not in self.active:
                    parameter.grad = None


if __name__ == "__main__":
    print("rosa.py: it has no command of its own; to merge an adapter: python -m extras.merge --help", file=sys.stderr)
    sys.exit(2)
