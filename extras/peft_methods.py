"""What the package peft can train in our model: IA3, OFT, DoRA, tuned LayerNorms and whatever else it has.
--method peft:NAME trains it in the same loop, with the same layer selection; its adapters are read, too.
Without it: rosa.attach, rosa.save_adapter and rosa.load_adapter, which know RoAE and LoRA.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import rosa
from extras.checkpoints import read_json
from extras.distributed import processes

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_adapter(model, directory):
    """rosa.save_adapter, for a model with an adapter of any kind."""
    if not hasattr(model, "peft_config"):
        return rosa.save_adapter(model, directory)
    Path(directory).mkdir(parents=True, exist_ok=True)
    rosa.write_adapter(Path(directory), *peft_adapter(model))


def load_adapter(model, directory):
    """rosa.load_adapter, for an adapter of any kind; where rosa.py does not know it, PEFT's own code runs it. Returns
    the model. Raises ValueError, OSError or ImportError with a line for the user."""
    check_files(Path(directory))
    base = getattr(model, "name_or_path", "")
    stated = read_json(Path(directory) / "adapter_config.json").get("base_model_name_or_path")
    if base and stated and Path(str(stated)).name != Path(base).name and processes()[0] == 0:
        print(f"adapter    {directory} was trained on {stated}, not on {base}: of its shape, but is it the same model?")
    arguments, tensors = rosa.read_adapter(directory)
    if "peft" in arguments:
        return load_peft(model, arguments["peft"], tensors, directory)
    return rosa.load_adapter(model, directory)


def check_files(directory):
    """Raise ValueError or OSError unless the directory holds the two files of an adapter, whole."""
    if absent := [name for name in ADAPTER_FILES if not (directory / name).is_file()]:
        pickled = (directory / "adapter_model.bin").is_file()
        instead = ", only adapter_model.bin, a pickle, which can run code" if pickled else ""
        if (directory / "config.json").is_file():
            instead = f"; it is a whole checkpoint: --ckpt {directory}"
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {absent[0]}{instead}")
    config, weights = (directory / name for name in ADAPTER_FILES)
    if not isinstance(read_json(config).get("peft_type"), str):
        raise ValueError(f"{config}: the key 'peft_type' is missing: copy the adapter again")
    try:
        open(weights, "rb").close()  # which says why where it cannot: safe_open calls it absent
        with safe_open(weights, framework="pt") as file:
            metadata = (file.metadata() or {}).get("rosa", "{}")
        if not isinstance(json.loads(metadata), dict):
            raise ValueError("no object")
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file ({error}): copy it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the metadata of {weights} is not JSON ({error}): copy it again") from None


def attach_peft(model, peft_type, options):
    """Freeze the model and let the package `peft` put one of its adapters in. Returns the model.

    peft_type: a name of peft.PeftType (IA3, OFT, LN_TUNING, ...); options: arguments of its config class. What trains
    is made float32. Raises ValueError or ImportError with a line for the user."""
    try:
        import peft
    except ImportError:
        raise ImportError(f"the method peft:{peft_type} needs the package peft: pip install peft") from None
    configs = {kind.value: cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in configs:
        raise ValueError(
            f"peft {peft.__version__} has no method {peft_type!r}: choose from {', '.join(sorted(configs))}"
        )
    if options.get("target_modules") == "all-linear":  # in a model of transformers' PEFT itself leaves lm_head out
        options = options | {"target_modules": [module.split(".")[-1] for module in rosa.TARGETS.values()]}
    try:
        peft.inject_adapter_in_model(configs[peft_type](**options), model)
        saved = {tensor.data_ptr() for tensor in peft.get_peft_model_state_dict(model).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.data_ptr() in saved)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model.loss(tokens, tokens).backward()  # what cannot run here shall say so now
        model.zero_grad()
    except Exception as error:  # each of its methods raises its own
        raise ValueError(
            f"peft:{peft_type} with {options or 'no options'} in {str(model.dtype)[6:]}: "
            + " ".join(str(error).split())
        ) from None
    return model


def peft_adapter(model):
    """(config, tensors, metadata) of a PEFT adapter, named as PEFT names them on a transformers model."""
    import peft

    tensors = {
        f"base_model.model.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": getattr(model, "name_or_path", None)}
    return json.loads(json.dumps(config, default=sorted)), tensors, {"peft": True}  # sorted: some options are sets


def load_peft(model, config, tensors, directory):
    """Put a saved PEFT adapter into a model, attaching it first if need be."""
    if not hasattr(model, "peft_config"):
        options = config | {
            "inference_mode": False,
            "base_model_name_or_path": None,
        }  # the base's name PEFT would look for
        try:
            attach_peft(model, options.pop("peft_type"), options)
        except (ValueError, ImportError) as error:
            raise type(error)(f"{directory}: {error}") from None
    import peft

    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    rosa.check_tensors(
        directory, tensors, {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(model).items()}
    )
    peft.set_peft_model_state_dict(model, tensors)
    return model
