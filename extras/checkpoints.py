"""Where a checkpoint lies, what is wrong with it, and what it runs on: names, Hugging Face's cache,
device, dtype.
`--ckpt llama2-7b` finds its files; what is absent or broken is one line that says what to download
or fix.
Without it: Llama.from_pretrained(directory, device, dtype) with the directory's own path; a mistake
is a traceback.
"""

import json
import os
import re
import shutil
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.errors import UserError, refusals_of, user_file
from extras.distributed import processes
from model import Llama, LlamaConfig, full_name

HERE = Path(__file__).resolve().parent.parent

NAMES = {  # short names of repositories on the Hugging Face Hub
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}


def find_checkpoint(ckpt):
    """The directory that `ckpt` names: itself, `checkpoints/<ckpt>`, the bundled `data/<ckpt>`, or
    what Hugging Face's cache holds of the repository `ckpt`, an org/name or a key of NAMES. Raises
    UserError with how to get it."""
    for directory in (Path(ckpt), Path("checkpoints") / ckpt, HERE / "data" / ckpt):
        if (directory / "config.json").is_file():
            return directory
    if Path(ckpt).is_dir():
        raise UserError(
            f"the directory {str(ckpt)!r} has no config.json: give that of a Hugging Face "
            "checkpoint"
        )
    repository = NAMES.get(str(ckpt), str(ckpt))
    absent = f"no checkpoint {str(ckpt)!r}: neither a directory of that name nor checkpoints/{ckpt}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(
            f"{absent}; the names known are tiny, {', '.join(NAMES)}, and any org/name on the "
            "Hugging Face Hub"
        )
    cache = hub_cache() / ("models--" + repository.replace("/", "--"))
    head = cache / "refs" / "main"
    # Of what the file says the last part alone: it shall lead nowhere else.
    directory = (
        cache / "snapshots" / Path(head.read_text(errors="replace").strip()).name
        if head.is_file()
        else cache
    )
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return directory
    raise UserError(
        f"{absent}, and Hugging Face's cache {hub_cache()} does not hold {repository}. To "
        "download it (hf comes "
        f"with pip install huggingface_hub): hf download {repository} --include '*.json' "
        f"--include 'tokenizer*' --include 'model*.safetensors'"
    )


def hub_cache():
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
COMPANIONS += ("chat_template*", "generation_config.json")


def companions(ckpt):
    """What a checkpoint directory holds beside config and weights: the tokenizer's files, the
    generation config."""
    return sorted({file for pattern in COMPANIONS for file in ckpt.glob(pattern) if file.is_file()})


def copy_companions(source, directory):
    for file in companions(source):
        shutil.copyfile(file, directory / file.name)


def choose_device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) for two flags. Device "auto": CUDA, then MPS, then the CPU. Dtype
    "auto": bfloat16 where the device computes it natively (CUDA, CPUs with AVX512-BF16 or AMX),
    float32 elsewhere."""
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if device == "cuda" and processes()[1] > 1:  # each process of a machine its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device).item()  # "meta" has no numbers
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(
            f"device {device!r} is not available ({reason}): choose auto, cpu, cuda or mps"
        ) from None
    device = torch.device(device)
    if dtype != "auto":
        return device, getattr(torch, dtype)
    return device, torch.bfloat16 if computes_bfloat16(device) else torch.float32


def computes_bfloat16(device):
    """Whether a device has instructions for bfloat16. Where it has none PyTorch computes it in
    software, slowly."""
    if device.type == "cpu":
        names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def say_if_bfloat16_is_slow(device, dtype):
    """A line for who has asked for bfloat16 where it is computed in software."""
    if dtype == torch.bfloat16 and not computes_bfloat16(device) and processes()[0] == 0:
        name = "processor" if device.type == "cpu" else "device"
        print(
            f"this {name} computes bfloat16 in software, slowly: --dtype float32 is faster here",
            file=sys.stderr,
        )


# --- loading, with a line for the user where something is wrong ---


def load_model(ckpt, device="cpu", dtype=None, mapped=False):
    """Llama.from_pretrained of a checkpoint directory. Raises UserError for what is wrong with its
    files.

    mapped: the weights stay in their files, as stored; they take memory as they are read."""
    model, table = meta_model(ckpt)
    config = model.config
    if config.context != config.max_position_embeddings and processes()[0] == 0:
        scaled = f"linear scaling by {config.rope_scaling['factor']}" if config.rope_scaling else ""
        reason = (
            "the sliding window"
            if config.context == config.sliding_window
            else f"{scaled} of what config.json has"
        )
        print(
            f"context    taken to be {config.context} tokens, not "
            f"{config.max_position_embeddings}: {reason}"
        )
    if not mapped:
        model = Llama.from_pretrained(ckpt, device, dtype)
    for name in table if mapped else ():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(read_tensor(table, name)))
    if mapped and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.name_or_path = hub_name(ckpt)  # PEFT looks there
    return model.eval()


def hub_name(ckpt):
    """What an adapter calls its base: org/name of a checkpoint in Hugging Face's cache, the
    directory of another."""
    # In that cache a checkpoint is models--org--name/snapshots/<commit>.
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+$", Path(ckpt).as_posix())
    return "/".join(cached.groups()) if cached else str(Path(ckpt).absolute())


def meta_model(ckpt):
    """(the model of a checkpoint directory without memory, its tensor table). As in
    Llama.from_pretrained a stored lm_head counts, whatever config.json says of tying, and an equal
    copy is tied."""
    config, stored = check_config(ckpt), stored_tensors(ckpt)
    if config.tie_word_embeddings and stored.keys() >= {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }:
        both = (
            read_tensor(stored, name) for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        config.tie_word_embeddings = torch.equal(*both)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = Llama(config)
    return model, tensor_table(ckpt, model, stored)


def check_finite(model):
    """Raise FloatingPointError naming a weight or an adapter's matrix that holds a NaN or an
    infinity, of which every answer would be one. Their sum has it too, and takes one reading of the
    weights."""
    for name, parameter in model.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise FloatingPointError(
                f"{name} holds numbers that are not finite: download it, or train it, again"
            )


# What config.json may say: name -> the largest whole number; beyond, even a model without memory
# cannot be made.
WHOLE_NUMBERS = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 2**24
)
WHOLE_NUMBERS |= {"num_hidden_layers": 2**10, "max_position_embeddings": 2**24}
OPTIONAL_WHOLE_NUMBERS = dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), 2**24)


def check_config(directory):
    """LlamaConfig.from_file, with each value looked at first. Raises UserError naming the file and
    the field."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    generation = read_json(path.with_name("generation_config.json"), missing={})
    try:
        for name, largest in (WHOLE_NUMBERS | OPTIONAL_WHOLE_NUMBERS).items():
            value = raw.get(name, 1)
            optional = name in OPTIONAL_WHOLE_NUMBERS and value is None
            if not optional and (type(value) is not int or not 1 <= value <= largest):
                raise UserError(
                    f"{name} must be a whole number from 1 to {largest:,}, not {value!r}"
                )
        if raw.get("num_attention_heads", 1) * (raw.get("head_dim") or 1) > 2**24:
            raise UserError("num_attention_heads x head_dim is more than 2^24")
        for name in ("architectures", "layer_types"):
            if not isinstance(raw.get(name), list | None):
                raise UserError(f"{name} must be a list, not {raw[name]!r}")
        for name in [
            name for name, field in LlamaConfig.__dataclass_fields__.items() if field.type is bool
        ]:
            if raw.get(name) not in (True, False, None):
                raise UserError(f"{name} must be true or false, not {raw[name]!r}")
        eos = (
            raw.get("eos_token_id")
            if generation.get("eos_token_id") is None
            else generation["eos_token_id"]
        )
        if any(
            token is not None and type(token) is not int
            for token in (eos if isinstance(eos, list) else [eos])
        ):
            where = "eos_token_id, here or in generation_config.json,"
            raise UserError(f"{where} must be a token id or a list of them, not {eos!r}")
        if not isinstance(raw.get("model_type", ""), str):
            raise UserError(f"model_type {raw['model_type']!r} is not implemented")
        check_positive("rms_norm_eps", raw.get("rms_norm_eps", 1.0))
        check_rope(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with refusals_of("model"):
        return LlamaConfig.from_file(directory)


def check_rope(raw):
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling must be an object, not {rope!r}")
    check_positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 1.0)))
    numbers = {"linear": ["factor"]}
    numbers["llama3"] = [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ]
    for name in numbers.get(str(rope.get("rope_type", rope.get("type"))), ()):
        check_positive(f"rope_scaling's {name}", rope.get(name))
    low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 1)
    if low >= high:
        raise UserError(
            f"rope_scaling's low_freq_factor {low} is not below its high_freq_factor {high}"
        )


def check_positive(name, value):
    if type(value) not in (int, float) or not 0 < value < 1e38:  # within float32
        raise UserError(f"{name} must be a positive number, not {value!r}")


class Stored(NamedTuple):
    file: Path
    name: str  # in the file
    shape: tuple
    dtype: str  # as safetensors names it: BF16


def tensor_table(directory, model, stored):
    """name -> Stored of every parameter of the model, which may be on the meta device, from what is
    stored in a checkpoint directory. Raises UserError naming the first tensors that do not fit."""
    # A tied one once
    needed = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {
        name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")
    }
    missing = [f"missing {name}" for name in sorted(needed.keys() - stored.keys())]
    unexpected = [f"unexpected {name}" for name in sorted(stored.keys() - needed.keys())]
    problems = [
        problem for both in zip_longest(missing, unexpected) for problem in both if problem
    ]  # in turn: both show
    for name in (name for name in needed if name in stored):
        if stored[name].shape != needed[name]:
            shape = list(stored[name].shape)
            problems.append(f"{name} has shape {shape}, config.json says {list(needed[name])}")
        if stored[name].dtype not in ("F16", "BF16", "F32", "F64"):
            problems.append(
                f"{name} is stored as {stored[name].dtype}, not as a float of 16, 32 or 64 bits"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        message = f"{directory}: the tensors do not fit the config: {'; '.join(problems[:5])}{more}"
        of_your_own = (
            "a parameter of your own, in model.py, is made only where a field of "
            "LlamaConfig says so"
        )
        raise UserError(f"{message}. Download both again, of one model; {of_your_own}")
    return stored


def read_tensor(table, name):
    """A tensor of a checkpoint, mapped from its file: what is read of it goes when the tensor
    goes."""
    with safe_open(table[name].file, framework="pt") as file:
        return file.get_tensor(table[name].name)


def stored_tensors(directory):
    """name -> Stored of every tensor in a checkpoint directory."""
    table = {}
    for file in checkpoint_files(Path(directory)):
        try:
            with user_file(file):
                # Which says why where it cannot: safe_open calls it absent
                open(file, "rb").close()
            with safe_open(file, framework="pt") as tensors:
                for stored_name in tensors.keys():
                    if (name := full_name(stored_name)) in table:
                        both = f"{name} is in {table[name].file} and in {file.name}"
                        raise UserError(f"{both}: download the checkpoint again")
                    entry = tensors.get_slice(stored_name)
                    table[name] = Stored(
                        file, stored_name, tuple(entry.get_shape()), entry.get_dtype()
                    )
        except SafetensorError as error:
            with open(file, "rb") as opened:
                if opened.read(40).startswith(b"version https://git-lfs"):
                    raise UserError(
                        f"{file} is a Git LFS pointer, not the weights: git lfs pull"
                    ) from None
            raise UserError(
                f"{file} is not a whole safetensors file ({error}): download it again"
            ) from None
    return table


def checkpoint_files(directory):
    """The safetensors files of a checkpoint directory. Raises UserError saying what else lies
    there."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)
        )
        if pickled:
            problem = (
                f"{directory} holds only pickled weights ({pickled[0]}), which can run code "
                "when they are loaded"
            )
            raise UserError(f"{problem}: download or convert to model.safetensors")
        names = f"no {single.name} and no {index.name}"
        raise UserError(f"{directory} has {names}: download them")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(
            f"{index} has no weight_map from tensor names to file names: download it again"
        )
    files = [directory / file for file in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != directory or file.name in ("", ".", ".."):
            problem = f"{index} names a file outside its directory, {file}"
            raise UserError(f"{problem}: download the checkpoint again")
        with user_file(file):  # a name may be too long for a disk
            is_there = file.is_file()
        if not is_there:
            raise UserError(f"{index} names {file.name}, which is absent: download it")
    return files


def read_json(path, missing=None):
    """The JSON object in a file. Raises UserError naming the file; an absent file is `missing`, if
    that is given."""
    if missing is not None and not Path(path).exists():
        return missing
    with user_file(path):
        content = Path(path).read_bytes()
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a thousand brackets
        raise UserError(f"{path} is not a JSON file ({error}): fix or download it") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds {type(value).__name__}, not a JSON object: fix or download it"
        )
    return value
