"""Owns where a checkpoint lies and what it runs on: names of models, Hugging Face's cache, device and dtype.
It makes possible `--ckpt llama2-7b`, and a line that says how to download what is absent.
Without it: Llama.from_pretrained(directory, device, dtype) with the directory's own path.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import torch

from extras.distributed import processes
from model import Operators

HERE = Path(__file__).resolve().parent.parent

NAMES = {  # short names of repositories on the Hugging Face Hub
    "llama2-7b": "meta-llama/Llama-2-7b-hf", "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B", "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B", "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B", "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}


def find_checkpoint(ckpt):
    """The directory that `ckpt` names: itself, `checkpoints/<ckpt>`, the bundled `data/<ckpt>`, or what Hugging Face's cache
    holds of the repository `ckpt`, which is an org/name or a key of NAMES. Raises FileNotFoundError saying how to get it."""
    for directory in (Path(ckpt), Path("checkpoints") / ckpt, HERE / "data" / ckpt):
        if (directory / "config.json").is_file():
            return directory
    if Path(ckpt).is_dir():
        raise FileNotFoundError(f"the directory {str(ckpt)!r} has no config.json: give that of a Hugging Face checkpoint")
    repository = NAMES.get(str(ckpt), str(ckpt))
    absent = f"no checkpoint {str(ckpt)!r}: neither a directory of that name nor checkpoints/{ckpt}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise FileNotFoundError(f"{absent}; the names known are tiny, {', '.join(NAMES)}, and any org/name on the Hugging Face Hub")
    cache = hub_cache() / ("models--" + repository.replace("/", "--"))
    head = cache / "refs" / "main"
    # Of what the file says the last part alone: it shall lead nowhere else.
    directory = cache / "snapshots" / Path(head.read_text(errors="replace").strip()).name if head.is_file() else cache
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return directory
    raise FileNotFoundError(f"{absent}, and Hugging Face's cache {hub_cache()} does not hold {repository}. To download it (hf comes "
                            f"with pip install huggingface_hub): hf download {repository} --include '*.json' "
                            f"--include 'tokenizer*' --include 'model*.safetensors'")


def hub_cache():
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def copy_companions(source, directory):
    """Copy what makes a checkpoint directory complete beside config and weights: the tokenizer, the generation config."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
                    "generation_config.json"):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def choose_device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) for two flags. Device "auto": CUDA, then MPS, then the CPU. Dtype "auto": bfloat16
    where the device computes it natively (CUDA, CPUs with AVX512-BF16 or AMX), float32 elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and processes()[1] > 1:  # each process of a machine its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device).item()  # "meta" has no numbers
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"device {device!r} is not available ({reason}): choose auto, cpu, cuda or mps") from None
    device = torch.device(device)
    if dtype != "auto":
        return device, getattr(torch, dtype)
    return device, torch.bfloat16 if Operators.computes_bfloat16(device) else torch.float32


def say_if_bfloat16_is_slow(device, dtype):
    """A line for who has asked for bfloat16 where it is computed in software."""
    if dtype == torch.bfloat16 and not Operators.computes_bfloat16(device) and processes()[0] == 0:
        name = "processor" if device.type == "cpu" else "device"
        print(f"this {name} computes bfloat16 in software, slowly: --dtype float32 is faster here", file=sys.stderr)
