"""What train.py says that it will need of memory, beside what it took. One command, one table.

    python tests/benchmarks/bench_memory.py [--device cuda] [--dir FOLDER] [--rows "..."]

Each row is an epoch of train.py on a random checkpoint, in a process of its own: a size, how many
tokens its 128 examples have, and options. said: the line "memory" of its output. took: peak_memory
of its summary.json, the resident set of the process on a CPU, max_memory_allocated on a GPU."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_scale import write_checkpoint, write_examples  # they are beside this file
from common import ROOT, parse_args

# size: tokens in the shortest and the longest example: options of train.py
ROWS = [
    "135M: 61-161: --dtype float32",
    "135M: 125-325: --dtype float32 --micro-batch-size 2",
    "135M: 61-161: --dtype float32 --micro-batch-size 16 --k-ratio 1",
    "135M: 61-161: --dtype bfloat16",
    "135M: 125-325: --dtype bfloat16",
    "135M: 61-161: --dtype float32 --checkpoint-activations --micro-batch-size 8",
    "135M: 61-161: --dtype float32 --plain --micro-batch-size 8",
    "135M: 61-161: --dtype float32 --method lora --targets q,k,v,o,gate,up,down --rank 16",
    "135M: 61-161: --dtype float32 --quantize int8 --k-ratio 0.25",
    "135M: 61-161: --method full",
    "360M: 61-161: --dtype float32",
    "360M: 61-161: --dtype bfloat16 --checkpoint-activations",
    "360M: 61-161: --dtype float32 --quantize int8",
    "1.7B: 161-161: --dtype bfloat16 --batch-size 2 --max-steps 2",
    "1.7B: 161-161: --dtype float32 --batch-size 2 --max-steps 2 --checkpoint-activations",
    "1.7B: 161-161: --dtype bfloat16 --batch-size 2 --max-steps 2 --quantize int8",
    "7B: 125-125: --dtype bfloat16 --batch-size 1 --max-steps 1 --quantize int8",
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
            fewest, most = map(int, tokens.split("-"))
            options = [*options.split(), "--device", args.device]
            said, took = measure(ckpt, fewest, most, options)
            print(f"| {row} | {said:.2f} | {took:.2f} | {said / took:.2f} |", flush=True)


def measure(ckpt, fewest, most, options):
    """(bytes that train.py says, bytes that it takes), both in GB."""
    data = ckpt / "data.json"
    write_examples(data, numbers=(most - 41) // 4, fewest=(fewest - 41) // 4)
    out = ckpt / "run"
    command = [sys.executable, ROOT / "train.py", "--ckpt", ckpt, "--train-file", data]
    command += ["--val-size", "1", "--epochs", "1", "--out", out, "--overwrite", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.search(r"^memory +about ([\d.]+) GB", done.stdout, re.M)
    took = json.loads((out / "summary.json").read_text())["peak_memory"]
    return float(said[1]), took / 1e9


if __name__ == "__main__":
    main()
