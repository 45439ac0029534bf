"""How cost grows: tokens/s and peak memory over sequence length, batch and model size; and LLaMA-2-7B on one machine.

    python tests/benchmarks/bench_scale.py [--part growth,7b] [--device cpu] [--dir FOLDER]

growth: random models in bfloat16 with RoSA at its defaults, every layer active, a process each: the median of two
optimiser steps after the first. Linear where it should be: the milliseconds a token stay the same as the batch grows
and follow the weights as the model grows; attention adds what grows with the length.
7b: a random checkpoint in LLaMA-2-7B's shape (13.5 GB of bfloat16 in shards, under --dir, removed afterwards), two
steps of `train.py --checkpoint-activations` on it, batch 1, 128 tokens. Where there is no room a line says so. Loading
is compared with plainly reading the same files, both with their pages dropped from memory first. With --device cuda
the two steps make way for the tables of bench_train.py and bench_generate.py on that checkpoint: batches of 16 x 256
tokens, and of 64 answers.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_train import ROOT, measure, parser_of, peak_mib, synchronize  # beside this file; it finds the project
from safetensors.torch import save_file

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from extras.checkpoints import load_model
from extras.kernels import accelerate
from model import Llama, LlamaConfig

FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
FIELDS += ["vocab_size", "tie_word_embeddings"]
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "360M": (960, 2560, 32, 15, 5, 49152, True),
    "1.7B": (2048, 8192, 24, 32, 32, 49152, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
}
POINTS = [("135M", 1, length) for length in (128, 256, 512, 1024, 2048, 4096)]
POINTS += [("135M", batch, 128) for batch in (2, 4, 8, 16, 32)] + [(size, 1, 128) for size in ("360M", "1.7B", "7B")]


def meta_model(size):
    fields = dict(zip(FIELDS, SHAPES[size])) | {"max_position_embeddings": 4096}
    with torch.device("meta"):
        return Llama(LlamaConfig(**fields, bos_token_id=1, eos_token_id=2))


def random_model(size, device):
    """On the device at once, in bfloat16."""
    model = meta_model(size).bfloat16().to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    return model


def point(args, size, batch, length):
    model = rosa.attach(random_model(size, args.device))
    accelerate(model)
    weights = peak_mib(args.device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    tokens = torch.randint(3, 32000, (batch, length), device=args.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.loss(tokens, tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(args.device)
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "weights": weights, "peak": peak_mib(args.device)}


def growth(args):
    columns = "tokens/s | ms a token | peak MiB | of it beyond the weights, KiB a token"
    print(f"| model | batch | tokens each | {columns} |\n{'|---' * 7}|", flush=True)
    for size, batch, length in POINTS:
        result, count = measure(__file__, f"{size} {batch} {length}", "bfloat16"), batch * length
        seconds, beyond = result["seconds"], (result["peak"] - result["weights"]) * 1024 / count
        cells = f"{count / seconds:,.0f} | {1000 * seconds / count:.2f} | {result['peak']:,.0f} | {beyond:,.0f}"
        print(f"| {size} | {batch} | {length} | {cells} |", flush=True)


def seven_b(args):
    size = 2 * sum(p.numel() for p in meta_model("7B").parameters())
    folder = Path(args.dir)
    if (free := shutil.disk_usage(folder).free) < 1.05 * size:
        room = f"{folder}, which has {free / 1e9:.1f} GB free"
        sys.exit(f"a checkpoint of {size / 1e9:.1f} GB does not fit into {room}: choose another --dir")
    ckpt = Path(tempfile.mkdtemp(dir=folder))
    try:
        write_checkpoint(ckpt)
        files = sorted(ckpt.glob("*.safetensors"))
        drop_pages(files)
        start, buffer = time.perf_counter(), bytearray(2**24)
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        reading = time.perf_counter() - start
        drop_pages(files)
        loading = measure(__file__, f"load {ckpt}", "bfloat16")["seconds"]
        times = f"{loading:.1f} s; reading the files: {reading:.1f} s; {loading / reading:.2f} times"
        print(f"loading {size / 1e9:.2f} GB: {times}")
        side_by_side(args, ckpt) if args.device != "cpu" else two_steps(ckpt, size)
    finally:
        shutil.rmtree(ckpt)


def two_steps(ckpt, size):
    write_data(ckpt, 6, 128)
    command = [sys.executable, ROOT / "train.py", "--ckpt", ckpt, "--train-file", ckpt / "data.json"]
    command += ["--out", ckpt / "run", *"--batch-size 1 --max-len 128 --val-size 1 --max-steps 2".split()]
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command), "--checkpoint-activations", "--dtype", "bfloat16"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("train.py failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    log = [json.loads(line) for line in (ckpt / "run" / "log.jsonl").read_text().splitlines()][1:]
    steps = ", ".join(f"{step['tokens']} tokens in {step['seconds']:.1f} s" for step in log)
    print(f"two steps: {time.perf_counter() - start:.0f} s in all, {steps}")
    print(f"peak resident {peak / 1e9:.2f} GB; 1.15 times the weights and 1 GB: {1.15 * size / 1e9 + 1:.2f} GB")


def side_by_side(args, ckpt):
    write_data(ckpt, 128, 256)
    rows = ("RoSA", "RoSA, one batch at a time", "RoSA --compile, one batch at a time", "LoRA, all linears, rank 24")
    train = ["bench_train.py", "--train-file", ckpt / "data.json", "--batch-size", 16, "--steps", 7]
    generate = ["bench_generate.py", "--test-file", ckpt / "data.json", "--batch-size", 64]
    always = ["--ckpt", ckpt, "--device", args.device, "--dtype", "bfloat16", "--rounds", 1]
    for script, *options in ([*train, "--rows", "; ".join(rows)], generate):
        print(flush=True)
        command = [sys.executable, Path(__file__).with_name(script), *always, *options]
        subprocess.run([str(word) for word in command], check=True)


def write_data(ckpt, count, length):
    """data.json: so many examples, each of about as many tokens as `length` allows."""
    tokenizer, examples = load_tokenizer(ckpt), []
    for i in range(100, 100 + count):
        for j in range(i + 1, i + length):
            output = " ".join(map(str, range(i, j)))
            example = {"instruction": f"Count from {i}.", "output": output, "answer": str(j - 1)}
            if sum(map(len, tasks.encode_example(example, tokenizer))) > length:
                break
            longest = example
        examples.append(longest)
    (ckpt / "data.json").write_text(json.dumps(examples))


def write_checkpoint(directory):
    """Random, a file a layer, with an index: never more than a layer in memory."""
    model, weight_map, shards = meta_model("7B"), {}, {}
    raw = {name: value for name, value in vars(model.config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory)
    for name, parameter in model.named_parameters():
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", {})[name] = parameter.shape
    for i, shapes in enumerate(shards.values(), 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for name in (name for name in tensors if "norm" not in name):
            tensors[name].normal_(std=0.02)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][model.config.eos_token_id] = 0  # no answer ends by chance
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drop_pages(files):
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    args = parser_of(__doc__, part="growth,7b", device="cpu", dir=tempfile.gettempdir(), dtype="bfloat16").parse_args()
    if args.role.startswith("load "):
        start = time.perf_counter()
        load_model(args.role.removeprefix("load "))
        return print(json.dumps({"seconds": time.perf_counter() - start}))
    if args.role:
        size, *numbers = args.role.split()
        return print(json.dumps(point(args, size, *map(int, numbers))))
    for part in args.part.split(","):
        {"growth": growth, "7b": seven_b}[part](args)


if __name__ == "__main__":
    main()
