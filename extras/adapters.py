"""What the package peft can train in our model: IA3, OFT, DoRA, tuned LayerNorms and whatever else
it has.
--method peft:NAME trains it in the same loop, with the same layer selection; its adapters are
read, too.
Without it: rosa.attach, rosa.save_adapter and rosa.load_adapter, which know RoAE and LoRA.
"""

import json
import re
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import rosa
from data.errors import UserError, refusals_of, user_file
from extras.checkpoints import read_json
from extras.distributed import processes
from extras.source import is_library

# Values of PEFT's init_lora_weights by which it changes the base, by chance
DRAWN_ANEW = r"pissa_niter_\d+"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(model, directory):
    """rosa.save_adapter, for a model with an adapter of any kind."""
    if not hasattr(model, "peft_config"):
        return rosa.save_adapter(model, directory)
    Path(directory).mkdir(parents=True, exist_ok=True)
    rosa.write_adapter(Path(directory), *peft_adapter(model))


def load_adapter(model, directory):
    """rosa.load_adapter, for an adapter of any kind; where rosa.py does not know it, PEFT's own
    code runs it. Returns the model. Raises UserError for what is wrong with its files."""
    check_files(Path(directory))
    say_if_of_another_base(directory, getattr(model, "name_or_path", ""))
    with refusals_of("rosa"):
        arguments, tensors = rosa.read_adapter(directory)
        if "peft" not in arguments:
            check_targets(directory, arguments["targets"])
            return rosa.load_adapter(model, directory)
    return load_peft(model, arguments["peft"], tensors, directory)


def say_if_of_another_base(directory, base):
    """A line where an adapter names another base than the one it is used with, the name or
    directory of a model."""
    stated = read_json(Path(directory) / "adapter_config.json").get("base_model_name_or_path")
    if base and stated and Path(str(stated)).name != Path(base).name and processes()[0] == 0:
        print(
            f"adapter    {directory} was trained on {stated}, not on {base}: of its shape, but is "
            "it the same model?"
        )


def check_files(directory):
    """Raise UserError unless the directory holds the two files of an adapter, whole."""
    if absent := [name for name in ADAPTER_FILES if not (directory / name).is_file()]:
        pickled = (directory / "adapter_model.bin").is_file()
        instead = ", only adapter_model.bin, a pickle, which can run code" if pickled else ""
        if (directory / "config.json").is_file():
            instead = f"; it is a whole checkpoint: --ckpt {directory}"
        raise UserError(f"{directory} is no adapter directory: it has no {absent[0]}{instead}")
    config, weights = (directory / name for name in ADAPTER_FILES)
    if not isinstance(read_json(config).get("peft_type"), str):
        written = "as PEFT or train.py has written it"
        raise UserError(f"{config}: the key 'peft_type' is missing: copy the file again, {written}")
    try:
        with user_file(weights):
            open(weights, "rb").close()  # which says why where it cannot: safe_open calls it absent
        with safe_open(weights, framework="pt") as file:
            metadata = (file.metadata() or {}).get("rosa", "{}")
        is_object = isinstance(json.loads(metadata), dict)
        reason = "no object"
    except SafetensorError as error:
        raise UserError(
            f"{weights} is not a whole safetensors file ({error}): copy it again"
        ) from None
    except (ValueError, RecursionError) as error:
        is_object, reason = False, error
    if not is_object:
        raise UserError(f"the metadata of {weights} is not JSON ({reason}): copy it again")


def check_targets(directory, held):
    """Raise UserError unless adapter_config.json names the very modules of which the file holds
    tensors: held, of q, k, v, o, gate, up, down."""
    config = read_json(Path(directory) / "adapter_config.json")
    named = [
        target
        for target, module in rosa.TARGETS.items()
        if is_named(module, config.get("target_modules"))
    ]
    named = [
        target
        for target in named
        if not is_named(rosa.TARGETS[target], config.get("exclude_modules"))
    ]
    if set(named) != set(held):
        names = {target: module.split(".")[1] for target, module in rosa.TARGETS.items()}
        says, holds = (
            ", ".join(names[target] for target in each) or "none" for each in (named, held)
        )
        problem = f"adapter_config.json names the modules {says}, the file holds tensors of {holds}"
        raise UserError(f"{directory}: {problem}: copy both files again, of one adapter")


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
    # In a model of transformers' PEFT itself leaves lm_head out
    if options.get("target_modules") == "all-linear":
        options = options | {
            "target_modules": [module.split(".")[-1] for module in rosa.TARGETS.values()]
        }
    initial = str(options.get("init_lora_weights", ""))
    if re.fullmatch(DRAWN_ANEW, initial):
        draws = (
            "peft draws the base anew when the adapter is read, so that it would be another model's"
        )
        raise UserError(
            f"peft:{peft_type} with init_lora_weights {initial!r}: {draws}: choose pissa, or true"
        )
    was_training = model.training
    try:
        peft.inject_adapter_in_model(configs[peft_type](**options), model)
        # Its modules come in training mode: their dropout would act in an evaluation
        model.train(was_training)
        saved = {tensor.data_ptr() for tensor in peft.get_peft_model_state_dict(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.data_ptr() in saved)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.loss(tokens, tokens).backward()  # what cannot run here shall say so now
        model.zero_grad()
    except Exception as error:  # each of its methods raises its own
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
    """(config, tensors, metadata) of a PEFT adapter, named as PEFT names them on a transformers
    model."""
    import peft

    tensors = {
        f"base_model.model.{name}": tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    config = model.peft_config["default"].to_dict()
    config |= {
        "inference_mode": True,
        "base_model_name_or_path": getattr(model, "name_or_path", None),
    }
    # Sorted: some options are sets
    return json.loads(json.dumps(config, default=sorted)), tensors, {"peft": True}


def load_peft(model, config, tensors, directory):
    """Put a saved PEFT adapter into a model, attaching it first if need be."""
    if not hasattr(model, "peft_config"):
        options = config | {
            "inference_mode": False,
            "base_model_name_or_path": None,
        }  # the base's name PEFT would look for
        try:
            attach_peft(model, options.pop("peft_type"), options)
        except UserError as error:
            raise UserError(f"{directory}: {error}") from error
    import peft

    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(model).items()}
    with refusals_of("rosa"):
        rosa.check_tensors(directory, tensors, shapes)
    peft.set_peft_model_state_dict(model, tensors)
    return model
