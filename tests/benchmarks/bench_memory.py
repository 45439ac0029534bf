"""What train.py says that it will need of memory, beside what it took. One command, one table.

    python tests/benchmarks/bench_memory.py [--device cuda] [--dir FOLDER] [--rows "..."]

Each row is six steps of train.py on a random checkpoint, in a process of its own: a size, so many
tokens in the longest example (the shortest has a third), and options. said: the line "memory" of
its output. took: peak_memory of its summary.json, the resident set of the process on a CPU,
max_memory_allocated on a GPU."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_scale import write_checkpoint, write_examples  # they are beside this file
from common import ROOT, parse_args

# size: tokens in the longest example: options of train.py
ROWS = [
    "135M: 161: --dtype float32",
    "135M: 325: --dtype float32 --micro-batch-size 2",
    "135M: 161: --dtype float32 --micro-batch-size 16 --k-ratio 1",
    "135M: 161: --dtype bfloat16",
    "135M: 161: --dtype float32 --checkpoint-activations --micro-batch-size 8",
    "135M: 161: --dtype float32 --plain --micro-batch-size 8",
    "135M: 161: --dtype float32 --method lora --targets q,k,v,o,gate,up,down --rank 16",
    "135M: 161: --dtype float32 --quantize int8 --k-ratio 0.25",
    "360M: 161: --dtype float32",
    "360M: 161: --dtype bfloat16 --checkpoint-activations",
    "360M: 161: --dtype float32 --quantize int8",
    "1.7B: 161: --dtype bfloat16 --micro-batch-size 2 --batch-size 4",
    "1.7B: 161: --dtype float32 --micro-batch-size 2 --checkpoint-activations --batch-size 4",
    "1.7B: 161: --dtype bfloat16 --quantize int8 --micro-batch-size 2 --batch-size 4",
    "7B: 125: --dtype bfloat16 --quantize int8 --batch-size 1",
]


def main(arguments=None):
    args = parse_args(__doc__, arguments, device="cpu", dir="/tmp", rows="; ".join(ROWS))
    print(f"| | said, GB | took, GB | said / took |\n{'|---' * 4}|")
    written = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        for row in args.rows.split("; "):
            size, tokens, options = row.split(": ")
            ckpt = Path(directory, size)
            if size not in written:
                for other in written.values():  # one checkpoint at a time is on the disk
                    for file in other.glob("*.safetensors"):
                        file.unlink()
                ckpt.mkdir()
                write_checkpoint(ckpt, size)
                written[size] = ckpt
            said, took = measure(ckpt, int(tokens), [*options.split(), "--device", args.device])
            print(f"| {row} | {said:.2f} | {took:.2f} | {said / took:.2f} |", flush=True)


def measure(ckpt, tokens, options):
    """(bytes that train.py says, bytes that it takes), both in GB."""
    data = ckpt / "data.json"
    numbers = (tokens - 41) // 4
    write_examples(data, numbers, fewest=max(1, numbers // 6))
    out = ckpt / "run"
    command = [sys.executable, ROOT / "train.py", "--ckpt", ckpt, "--train-file", data]
    command += ["--val-size", "1", "--max-steps", "6", "--out", out, "--overwrite", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.search(r"^memory +about ([\d.]+) GB", done.stdout, re.M)
    took = json.loads((out / "summary.json").read_text())["peak_memory"]
    return float(said[1]), took / 1e9


if __name__ == "__main__":
    main()
