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
        rosa.write_adapter(directory, config, tensors, {"peft": True})
    else:
        rosa.save_adapter(model, directory)


def load_adapter(model, directory):
    """rosa.load_adapter, for an adapter of any kind. Returns the model. Raises UserError for what
    is wrong with the files."""
    adapter = read_adapter(directory)
    say_if_of_another_base(adapter, getattr(model, "name_or_path", ""))
    if adapter.needs_peft:
        return load_peft(model, adapter)
    arguments = lora_arguments(adapter)
    config = adapter.config | {"base_model_name_or_path": None}
    is_rosas_own = adapter.metadata == arguments and config == rosa.lora_config(arguments)
    with refusals_of("rosa"):
        if is_rosas_own:
            return rosa.load_adapter(model, adapter.directory)
        return rosa.load_tensors(model, adapter.directory, arguments, adapter.tensors)


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
    return Adapter(directory, config, metadata, tensors)


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


# --- LoRA, as PEFT and RoSA write it ---


def lora_arguments(adapter):
    """The arguments of rosa.attach for an adapter whose peft_type is LORA. RoSA's metadata say
    which rows adapt; without metadata all rows do. Raises UserError for what rosa.py does not
    implement, and where the two files are not of one adapter."""
    path = adapter.directory / "adapter_config.json"
    config, metadata = adapter.config, adapter.metadata
    for name, value in config.items():
        changes_base = name == "init_lora_weights" and str(value).lower().startswith(CHANGE_BASE)
        is_off = not value or value == "none"
        if changes_base or not (name in HARMLESS or is_off):  # DoRA, rank_pattern, what is to come
            raise UserError(
                f"{path}: {name} = {value!r:.60} is not implemented: let PEFT convert it to a "
                "plain LoRA"
            )
    targets = held_targets(adapter.tensors)
    check_targets(adapter, targets, metadata.get("targets", targets))
    for name in adapter.tensors:
        if ".layers." not in name:
            raise UserError(
                f"{adapter.directory} holds {name}, which is in no layer: let PEFT merge it, "
                "merge_and_unload()"
            )
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
    if config.get("use_rslora"):  # rsLoRA scales by alpha / sqrt(r), LoRA by alpha / r
        arguments["alpha"] *= math.sqrt(config["r"])
    return arguments | {"targets": targets}


def held_targets(tensors):
    """The targets of rosa.attach of which there are tensors: q, k, v, o, gate, up, down."""
    names = " ".join(tensors)
    return [target for target, module in rosa.TARGETS.items() if f".{module}.lora_A." in names]


def check_targets(adapter, held, stated):
    """Raise UserError unless RoSA's metadata (stated) and adapter_config.json name the very modules
    of which the file holds tensors."""
    directory, config = adapter.directory, adapter.config
    if sorted(map(str, stated)) != sorted(held):
        raise UserError(f"{directory} says that it adapts {stated}, and holds tensors of {held}")
    named = []
    for target, module in rosa.TARGETS.items():
        is_excluded = is_named(module, config.get("exclude_modules"))
        if is_named(module, config.get("target_modules")) and not is_excluded:
            named.append(target)
    if named != held:
        raise UserError(
            f"{directory}: adapter_config.json names the modules {in_words(named)}, the file holds "
            f"tensors of {in_words(held)}: copy both files again, of one adapter"
        )


def in_words(targets):
    """q and k as "q_proj, k_proj"."""
    return ", ".join(rosa.TARGETS[target].split(".")[1] for target in targets) or "none"


def is_named(module, names):
    """Whether PEFT finds a module of a layer, "self_attn.q_proj", say, by target_modules or
    exclude_modules: a list of names or of their ends, "all-linear", or a pattern for the whole
    name."""
    full = f"model.layers.0.{module}"
    if names == "all-linear":
        return True
    if isinstance(names, str):
        try:
            return re.fullmatch(names, full) is not None
        except re.error:
            return False
    return any(full == name or full.endswith(f".{name}") for name in names or ())


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
        if fails_in_model(error):
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
