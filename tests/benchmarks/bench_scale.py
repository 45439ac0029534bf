"""How cost grows: tokens/s and peak memory over sequence length, batch and model size; and
LLaMA-2-7B on one machine.

    python tests/benchmarks/bench_scale.py [--part growth,7b] [--device cpu] [--dir FOLDER]

growth: random models in bfloat16 with RoSA at its defaults, every layer active: the mean of two
optimiser steps after two others. Linear where it should be: the milliseconds a token stay the same
as the batch grows and follow the weights as the model grows; attention adds what grows with the
length. 7b: a random checkpoint in LLaMA-2-7B's shape (13.5 GB of bfloat16 in shards, under --dir,
removed afterwards). Loading is compared with plainly reading the same files, both with their pages
dropped from memory first. Then the row of bench_train.py that has --checkpoint-activations: five
steps, batch 1, 125 tokens. bench_gpu.py is for a GPU."""

import json
import os
import shutil
import subprocess
import tempfile
import timeit
from functools import partial
from pathlib import Path

import bench_train  # it is beside this file
import torch
from common import ROOT, in_own_process, parse_args, peak_mib, print_table, timer_of
from safetensors.torch import save_file

import rosa
from extras.checkpoints import load_model
from extras.kernels import accelerate
from model import Llama, LlamaConfig

# size -> (vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads)
SHAPES = {
    "small": (1024, 64, 160, 4, 4, 2),
    "135M": (49152, 576, 1536, 30, 9, 3),
    "360M": (49152, 960, 2560, 32, 15, 5),
    "1.7B": (49152, 2048, 8192, 24, 32, 32),
    "7B": (32000, 4096, 11008, 32, 32, 32),
}
POINTS = [f"135M: 1 x {length}" for length in (128, 256, 512, 1024, 2048, 4096)]
POINTS += [f"135M: {batch} x 128" for batch in (2, 4, 8, 16, 32)]
POINTS += [f"{size}: 1 x 128" for size in ("360M", "1.7B", "7B")]


def main():
    args = parse_args(
        __doc__, None, part="growth,7b", device="cpu", dir="/tmp", dtype="bfloat16", rounds=1
    )
    if "growth" in args.part:
        print_table(args, POINTS, measure_point, {})
    if "7b" in args.part:
        with tempfile.TemporaryDirectory(dir=args.dir) as directory:
            seven_b(Path(directory))


def meta_model(size):
    special = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": size != "7B"}
    with torch.device("meta"):
        return Llama(LlamaConfig("llama", *SHAPES[size], max_position_embeddings=4096, **special))


def fill(module, dtype, device):
    """Give a module on the meta device memory on another device, and random weights."""
    module.to(dtype).to_empty(device=device)
    for parameter in module.parameters():
        # The weights of norms, vectors, are 1
        parameter.data.fill_(1.0) if parameter.ndim == 1 else parameter.data.normal_(std=0.02)
    return module


def measure_point(args, point):
    size, batch, _, length = point.split()
    model = fill(meta_model(size.removesuffix(":")), getattr(torch, args.dtype), args.device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    accelerate(rosa.attach(model))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    tokens = torch.randint(3, 32000, (int(batch), int(length)), device=args.device)

    def step():
        model.loss(tokens, tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = timer_of(step).timeit(2).mean / tokens.numel()
    return {
        "tokens/s": 1 / seconds,
        "ms a token": 1000 * seconds,
        "peak MiB": peak_mib(args.device),
    }


def seven_b(ckpt):
    write_checkpoint(ckpt, "7B")
    files = sorted(ckpt.glob("*.safetensors"))
    drop_pages(files)
    reading = timeit.timeit(
        partial(subprocess.run, ["cat", *files], stdout=subprocess.DEVNULL, check=True), number=1
    )
    drop_pages(files)
    loading = in_own_process(timeit.timeit, partial(load_model, ckpt), number=1)
    times = f"{loading:.1f} s; reading the files: {reading:.1f} s; {loading / reading:.2f} times"
    print(
        f"loading {sum(file.stat().st_size for file in files) / 1e9:.2f} GB: {times}\n", flush=True
    )
    data = str(ckpt / "data.json")
    write_examples(data, numbers=21)
    options = ["--ckpt", str(ckpt), "--train-file", data, "--dtype", "bfloat16", "--rounds", "1"]
    options += ["--batch-size", "1", "--steps", "5", "--rows", "RoSA --checkpoint-activations"]
    bench_train.main(options)


def write_checkpoint(directory, size):
    """Write a random checkpoint, with an index and one file for each layer, so that no more than
    one layer is in memory."""
    model, weight_map = meta_model(size), {}
    (directory / "config.json").write_text(json.dumps(vars(model.config)))
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory)
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    others = ["model.embed_tokens", "model.norm"]
    if not model.config.tie_word_embeddings:
        others.append("lm_head")
    for part in (*layers, *others):
        module = fill(model.get_submodule(part), torch.bfloat16, "cpu")
        tensors = {
            f"{part}.{name}": parameter.data for name, parameter in module.named_parameters()
        }
        save_file(tensors, directory / f"{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
        module.to("meta")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_examples(file, numbers, fewest=None):
    """Write 128 examples. Each has 41 tokens, and 4 more for every number that it counts: `numbers`
    of them, or where fewest is given from so many up to `numbers`."""
    counts = range(fewest or numbers, numbers + 1)
    texts = [" ".join(map(str, range(i, i + counts[i % len(counts)]))) for i in range(100, 228)]
    records = [
        {"instruction": f"Count from {text[:3]}.", "output": text, "answer": text[-3:]}
        for text in texts
    ]
    Path(file).write_text(json.dumps(records))


def drop_pages(files):
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
