"""The door of all adapter files: RoSA's own, the LoRA that PEFT writes in its dialects, and the
adapters that the package peft alone can run.
--method peft:NAME trains IA3, OFT, DoRA, tuned LayerNorms and more in the same loop, with the same
layer selection.
Without it: rosa.attach, rosa.save_adapter and rosa.load_adapter, which know RoSA's own files.
"""

import json
import math
import re
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

import rosa
from data.errors import UserError, refusals_of, user_file
from extras.checkpoints import read_json
from extras.memory import ran_out
from extras.source import is_library

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Fields of PEFT's LoraConfig that are read here, or that do not change what a trained adapter
# computes
HARMLESS = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "auto_mapping",
    "peft_version",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "ensure_weight_tying",
}
# Values of init_lora_weights by which PEFT changes the base weights too
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Values by which PEFT draws the change of the base anew whenever the adapter is read
DRAWN_ANEW = r"pissa_niter_\d+"


class Adapter(NamedTuple):
    """What the two files of an adapter directory hold."""

    directory: Path
    config: dict  # adapter_config.json
    metadata: dict  # of RoSA; empty where another tool has written the files
    quantization: str | None  # how the base was quantised when the adapter was trained, if it was
    tensors: dict  # name -> tensor

    @property
    def peft_type(self):
        return self.config["peft_type"]

    @property
    def needs_peft(self):
        """Whether the code of the package peft must run the adapter: any but RoSA's and LoRA; and a
        LoRA that --method peft:LORA has trained stays one of PEFT's."""
        return self.peft_type != "LORA" or "peft" in self.metadata


def save_adapter(model, directory):
    """rosa.save_adapter, for a model with adapters of any kind."""
    if hasattr(model, "peft_config"):
        config, tensors = peft_adapter(model)
        rosa.write_adapter(model, directory, config, tensors, {"peft": True})
    else:
        rosa.save_adapter(model, directory)


def load_adapter(model, directory):
    """rosa.load_adapter, for an adapter of any kind. Returns the model. Raises UserError for what
    is wrong with the files."""
    adapter = read_adapter(directory)
    say_if_of_another_base(adapter, getattr(model, "name_or_path", ""))
    say_if_quantized_otherwise(adapter, model)
    if adapter.needs_peft:
        return load_peft(model, adapter)
    arguments, tensors = lora_of(model, adapter)
    config = adapter.config | {"base_model_name_or_path": None}
    is_rosas_own = adapter.metadata == arguments and config == rosa.lora_config(arguments)
    with refusals_of("rosa"):
        if is_rosas_own:
            return rosa.load_adapter(model, adapter.directory)
        return rosa.load_tensors(model, adapter.directory, arguments, tensors)


def read_adapter(directory):
    """The Adapter in a directory. Raises UserError unless both files are there, and whole."""
    directory = Path(directory)
    for name in ADAPTER_FILES:
        if not (directory / name).is_file():
            raise UserError(
                f"{directory} is no adapter directory: it has no {name}{hint(directory)}"
            )
    config_file, weights = (directory / name for name in ADAPTER_FILES)
    config = read_json(config_file)
    if not isinstance(config.get("peft_type"), str):
        written = "as PEFT or train.py has written it"
        raise UserError(
            f"{config_file}: the key 'peft_type' is missing: copy the file again, {written}"
        )
    try:
        with user_file(weights):
            open(weights, "rb").close()  # says why where it cannot: safe_open calls it absent
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get("rosa", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(
            f"{weights} is not a whole safetensors file ({error}): copy it again"
        ) from None
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the metadata of {weights} is not JSON ({error}): copy it again") from None
    if not isinstance(metadata, dict):
        raise UserError(f"the metadata of {weights} is not JSON (no object): copy it again")
    quantization = metadata.pop("base_quantization", None)
    return Adapter(directory, config, metadata, quantization, tensors)


def hint(directory):
    """What a directory is that has not the files of an adapter, where that can be seen."""
    if (directory / "config.json").is_file():
        return f"; it is a whole checkpoint: --ckpt {directory}"
    if (directory / "adapter_model.bin").is_file():
        return ", only adapter_model.bin, a pickle, which can run code"
    return ""


def say_if_of_another_base(adapter, base):
    """Print a line where an adapter names another base than the one it is used with, the name or
    directory of a model."""
    stated = adapter.config.get("base_model_name_or_path")
    if base and stated and Path(str(stated)).name != Path(base).name:
        print(
            f"adapter    {adapter.directory} was trained on {stated}, not on {base}: of its shape, "
            "but is it the same model?"
        )


def say_if_quantized_otherwise(adapter, model):
    """Print a line where an adapter was trained on a quantised base and is used with another, or
    the other way round. Files of other tools do not say what they were trained on."""
    trained = adapter.quantization
    if adapter.metadata and trained != getattr(model, "quantization", None):
        its_base = f"a base quantised to {trained}" if trained else "a base that was not quantised"
        advice = f"with --quantize {trained} it is" if trained else "without --quantize it is not"
        print(f"adapter    {adapter.directory} was trained on {its_base}: {advice} here too")


# --- LoRA, as PEFT and RoSA write it ---

NAME_LISTS = ("target_modules", "exclude_modules", "layers_pattern")
# A tensor's name: where the writer's model has its layers, the linear layer, the factor, and in
# some files the adapter's name.
LORA_NAME = re.compile(r"((?:.*\.)?)(layers\.\d+\.[\w.]+)\.(lora_[AB])(\.[^.]+)?\.weight")
PREFIX = "base_model.model.model."  # of these names in what PEFT's save_pretrained writes


def usual_names(file, tensors):
    """(tensors, prefix): the tensors under the names that PEFT's save_pretrained gives them, and
    the prefix that their names had. Raises UserError where they are of several adapters."""
    usual = {}
    found = {}  # (prefix, adapter's name) -> the first tensor's name
    for name, tensor in tensors.items():
        match = LORA_NAME.fullmatch(name)
        if match:
            prefix, module, factor, adapter = match.groups()
            found.setdefault((prefix, adapter), name)
            name = f"{PREFIX}{module}.{factor}.weight"
        usual[name] = tensor
    if len(found) > 1:
        first, second, *_ = found.values()
        raise UserError(
            f"{file} holds several adapters, {first} and {second}: save the one that is meant"
        )
    (prefix, _), *_ = [*found, (PREFIX, None)]
    return usual, prefix


def lora_of(model, adapter):
    """(arguments, tensors) of an adapter whose peft_type is LORA: those of rosa.attach and
    rosa.load_tensors for this model.

    RoSA's metadata say which rows adapt; without metadata all rows do. A linear layer that the
    adapter leaves as it is, while it adapts the same one of another layer, gets A and B of zeros.
    Raises UserError for what rosa.py does not implement, and where the two files are not of one
    adapter."""
    path = adapter.directory / "adapter_config.json"
    config, metadata = adapter.config, adapter.metadata
    for name, value in config.items():
        changes_base = name == "init_lora_weights" and str(value).lower().startswith(CHANGE_BASE)
        is_off = not value or value == "none"
        if changes_base or not (name in HARMLESS or is_off):  # DoRA, rank_pattern, what is to come
            # What PEFT cannot convert it can merge.
            advice = "convert it to a plain LoRA"
            if name in ("modules_to_save", "bias", "lora_bias", "trainable_token_indices"):
                advice = "merge it, merge_and_unload()"
            raise UserError(f"{path}: {name} = {value!r:.60} is not implemented: let PEFT {advice}")
        if name in NAME_LISTS and not is_name_list(value):
            raise UserError(f"{path}: {name} must be a name or a list of names, not {value!r:.60}")
    layers = config.get("layers_to_transform")
    if not all(type(i) is int for i in (layers if isinstance(layers, list) else [layers or 0])):
        raise UserError(
            f"{path}: layers_to_transform must be a layer's number or a list, not {layers!r:.60}"
        )
    for name in adapter.tensors:
        if "layers." not in name:
            raise UserError(
                f"{adapter.directory} holds {name}, which is in no layer: let PEFT merge it, "
                "merge_and_unload()"
            )
    tensors, prefix = usual_names(adapter.directory / "adapter_model.safetensors", adapter.tensors)
    held = dict.fromkeys(name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors)
    named = named_modules(model, config, prefix)
    targets = check_targets(model, adapter, held, named)
    arguments = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "low_freq_ratio": metadata.get("low_freq_ratio", 1.0),
        "pairs": metadata.get("pairs", "low"),
    }
    try:
        rosa.check_arguments(**arguments)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if "low_freq_ratio" not in metadata:  # RoSA's own adapters are whole
        tensors |= zeros_where_nothing_adapts(model, targets, named, arguments["rank"])
    if config.get("use_rslora"):  # rsLoRA scales by alpha / sqrt(r), LoRA by alpha / r
        arguments["alpha"] *= math.sqrt(config["r"])
    return arguments | {"targets": targets}, tensors


def is_name_list(value):
    """Whether a value of adapter_config.json is a name, a list of names, or null."""
    names = value if isinstance(value, list) else [value or ""]
    return all(isinstance(name, str) for name in names)


def linear_layers(model):
    """The name of each linear layer that may be adapted, "layers.0.self_attn.q_proj" -> its
    target, "q"."""
    names = {}
    for i in range(len(model.model.layers)):
        for target, module in rosa.TARGETS.items():
            names[f"layers.{i}.{module}"] = target
    return names


def named_modules(model, config, prefix):
    """The linear layers of the model that PEFT adapts by this adapter_config.json, as
    `linear_layers` names them. prefix: that of the tensors in the file, whose model may have kept
    its layers in another place."""
    places = {"model.", prefix.removeprefix("base_model.model.")}
    named = []
    for name in linear_layers(model):
        if any(is_adapted(f"{place}{name}", config) for place in places):
            named.append(name)
    return named


def is_adapted(name, config):
    """Whether PEFT adapts the module of this name, "model.layers.0.self_attn.q_proj", by these
    fields of its config: target_modules, exclude_modules, layers_to_transform, layers_pattern."""
    targets = config.get("target_modules")
    if is_named(name, config.get("exclude_modules")) or not is_named(name, targets):
        return False
    layers = config.get("layers_to_transform")  # a number or a list of numbers
    is_list = not isinstance(targets, str)
    if layers is None or layers == [] or not is_list or name in targets:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        except re.error:
            match = None
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def is_named(name, names):
    """Whether PEFT finds a module by target_modules or exclude_modules: a list of names or of their
    ends, "all-linear", or a pattern for the whole name."""
    if names == "all-linear":
        return True
    if isinstance(names, str):
        try:
            return re.fullmatch(names, name) is not None
        except re.error:
            return False
    return any(name == end or name.endswith(f".{end}") for end in names or ())


def check_targets(model, adapter, held, named):
    """The targets of rosa.attach: q, k, v, o, gate, up, down. Raises UserError unless
    adapter_config.json and RoSA's metadata name the modules of which the file holds tensors.

    held: the modules whose tensors are in the file, such as layers.0.self_attn.q_proj; named: those
    of the model that adapter_config.json names."""
    directory, config = adapter.directory, adapter.config
    targets = targets_of(held)
    stated = adapter.metadata.get("targets", targets)
    if sorted(map(str, stated)) != sorted(targets):
        raise UserError(f"{directory} says that it adapts {stated}, and holds tensors of {targets}")
    if targets_of(named) != targets:
        raise UserError(
            f"{directory}: adapter_config.json names the modules {in_words(targets_of(named))}, "
            f"the file holds tensors of {in_words(targets)}: copy both files again, of one adapter"
        )
    for name in held:
        if name in linear_layers(model) and name not in named:
            raise UserError(
                f"{directory}: it holds tensors of {name}, which adapter_config.json does not "
                "name: copy both files again, of one adapter"
            )
    narrowing = [
        name for name in ("layers_to_transform", "exclude_modules") if config.get(name) is not None
    ]
    names = config["target_modules"]
    if isinstance(names, str) or any(re.search(r"\d", name) for name in names):
        narrowing.insert(0, "target_modules")
    absent = [name for name in named if name not in held]
    if narrowing and absent:
        raise UserError(
            f"{directory}: by {' and '.join(narrowing)} in adapter_config.json it adapts "
            f"{len(named)} linear layers of this model, and the file holds nothing of "
            f"{len(absent)} of them, {absent[0]} the first: it is of a model with other layers, or "
            "the two files are not of one adapter"
        )
    return targets


def targets_of(modules):
    """The targets of rosa.attach to which modules such as layers.0.self_attn.q_proj belong."""
    ends = {".".join(module.split(".")[2:]) for module in modules}
    return [target for target, module in rosa.TARGETS.items() if module in ends]


def in_words(targets):
    """q and k as "q_proj, k_proj"."""
    return ", ".join(rosa.TARGETS[target].split(".")[1] for target in targets) or "none"


def zeros_where_nothing_adapts(model, targets, named, rank):
    """A and B of zeros, under their names in a file, for each linear layer that belongs to one of
    the targets and is not named."""
    zeros = {}
    for name, target in linear_layers(model).items():
        if target in targets and name not in named:
            linear = model.model.get_submodule(name)
            if isinstance(linear, rosa.RoAE):
                linear = linear.linear
            zeros[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(rank, linear.in_features)
            zeros[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(linear.out_features, rank)
    return zeros


# --- what the package peft runs ---


def attach_peft(model, peft_type, options):
    """Freeze the model and let the package `peft` put one of its adapters in. Returns the model.

    peft_type: a name of peft.PeftType (IA3, OFT, LN_TUNING, ...); options: arguments of its config
    class. What trains is made float32. Raises UserError for what peft refuses; a mistake in
    model.py stays what it is."""
    try:
        import peft
    except ModuleNotFoundError:
        raise UserError(
            f"the method peft:{peft_type} needs the package peft: pip install peft"
        ) from None
    configs = {kind.value: cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in configs:
        methods = ", ".join(sorted(configs))
        raise UserError(
            f"peft {peft.__version__} has no method {peft_type!r}: choose from {methods}"
        )
    if options.get("target_modules") == "all-linear":
        # PEFT leaves lm_head out of these in a model of transformers alone.
        modules = [module.split(".")[-1] for module in rosa.TARGETS.values()]
        options = options | {"target_modules": modules}
    initial = str(options.get("init_lora_weights", ""))
    if re.fullmatch(DRAWN_ANEW, initial):
        raise UserError(
            f"peft:{peft_type} with init_lora_weights {initial!r}: peft draws the base anew when "
            "the adapter is read, so that it would be another model's: choose pissa, or true"
        )
    if "peft_type" in options:
        raise UserError(
            "--peft-config names an adapter's adapter_config.json: it takes the options of the "
            'method alone, such as {"target_modules": ["q_proj"]}; eval.py runs an adapter, by '
            "--adapter"
        )
    was_training = model.training
    try:
        peft.inject_adapter_in_model(configs[peft_type](**options), model)
        # PEFT's modules come in training mode: their dropout would act in an evaluation.
        model.train(was_training)
        saved = {tensor.data_ptr() for tensor in peft.get_peft_model_state_dict(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.data_ptr() in saved)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.loss(tokens, tokens).backward()  # a method that cannot run here shall say so now
        model.zero_grad()
    except Exception as error:  # each of PEFT's methods raises exceptions of its own kind
        if fails_in_model(error) or ran_out(error):
            raise
        given = f"{options or 'no options'} in {str(model.dtype)[6:]}"
        raise UserError(f"peft:{peft_type} with {given}: {' '.join(str(error).split())}") from error
    return model


def fails_in_model(error):
    """Whether an exception comes from model.py, or from what it calls in PyTorch, and not from the
    package peft."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    callers = [file for file in files if not is_library(file) or "peft" in Path(file).parts]
    return not is_library(callers[-1]) and callers[-1] != __file__


def peft_adapter(model):
    """(config, tensors) of a PEFT adapter, named as PEFT names them on a transformers model."""
    import peft

    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        tensors[f"base_model.model.{name}"] = copied
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["base_model_name_or_path"] = getattr(model, "name_or_path", None)
    # Some options are sets, which JSON does not have: sorted, they are lists.
    return json.loads(json.dumps(config, default=sorted)), tensors


def load_peft(model, adapter):
    """Put an adapter of PEFT's into a model, attaching it first if need be."""
    if not hasattr(model, "peft_config"):
        # base_model_name_or_path: PEFT would look for a model of that name.
        options = adapter.config | {"inference_mode": False, "base_model_name_or_path": None}
        del options["peft_type"]
        try:
            attach_peft(model, adapter.peft_type, options)
        except UserError as error:
            raise UserError(f"{adapter.directory}: {error}") from error
    import peft

    tensors = {
        name.removeprefix("base_model.model."): tensor for name, tensor in adapter.tensors.items()
    }
    shapes = {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(model).items()}
    with refusals_of("rosa"):
        rosa.check_shapes(adapter.directory, tensors, shapes)
    peft.set_peft_model_state_dict(model, tensors)
    return model
