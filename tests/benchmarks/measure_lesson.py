"""Measure what extras/lesson/measured.npz holds: what the notebook shows and has no time to
measure.

    python data/download.py arithmetic
    python -m extras.make_tiny models/theta10000 --minutes 14
    python -m extras.make_tiny models/theta100 --minutes 14 --theta 100
    python tests/benchmarks/measure_lesson.py --theta models --smollm2 DIR --runs DIR

The two models were made on one core each. The directory of --smollm2 holds SmolLM2-135M-Instruct.
That of --runs holds runs of train.py, under the names that `read_runs` asks for; tests/README.md
has their commands. What is not given stays as it is in the file. The functions that measure are the
notebook's own: its cells of definitions run here."""

import argparse
import json
import runpy
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from extras import make_tiny
from model import Llama

LESSON = ROOT / "extras" / "lesson"
# What stands in the cells of the notebook that are needed: imports, data, and definitions
CELLS = ("import os", "import torch", "def accuracy", "def finetune", "def norms_of", "def loss_wi")
RANKS = (8, 16, 32, 64)
RATES = ("1e-3", "3e-3", "1e-2")
FULL_RATES = ("3e-4", "1e-3")
PAIRS = ("low", "high", "random")


def notebook():
    """What the needed cells of the notebook define, name -> value."""
    cells = json.loads((LESSON / "lesson.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = [source for source in sources if any(text in source for text in CELLS)]
    assert len(code) == len(CELLS)
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "cells.py"
        script.write_text("\n\n".join(code))
        return runpy.run_path(str(script))


def rows_of(texts, tokenizer, count, length):
    """`count` rows of `length` ids, of texts that follow one another: [count, length]."""
    ids = []
    for text in texts:
        ids += [tokenizer.bos_id or tokenizer.eos_id, *tokenizer.encode(text)]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"these texts have {len(ids)} tokens: too few for {count} rows of {length}")


def knock_outs(model, rows, loss_without):
    """By how much the loss rises without each pair, and without the n slowest and n fastest, for n
    from 1: three arrays [d/2]."""
    pairs = list(range(model.config.head_dim // 2))
    sets = {
        "alone": [[i] for i in pairs],
        "without_slowest": [pairs[-n:] for n in range(1, len(pairs) + 1)],
        "without_fastest": [pairs[:n] for n in range(1, len(pairs) + 1)],
    }
    base = loss_without(model, rows, [])
    print(f"base loss {base:.3f}", flush=True)
    rises = {}
    for name, chosen in sets.items():
        rises[name] = np.array([loss_without(model, rows, each) - base for each in chosen])
    return rises


def measure_theta(directory, lesson):
    """Norms and knock-outs of a model of make_tiny, and the held-out loss after RoAE on its slow
    and on its fast pairs, with three seeds."""
    tokenizer = load_tokenizer(directory)
    model = Llama.from_pretrained(directory, dtype=torch.float32)
    rng = make_tiny.random.Random(5)
    rows = rows_of((make_tiny.document(rng) for _ in range(1000)), tokenizer, 16, 256)
    measured = knock_outs(model, rows, lesson["loss_without"])
    measured["norms"] = lesson["norms_of_pairs"](model, lesson["questions"][:32])
    for pairs in ("low", "high"):
        measured[pairs] = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = Llama.from_pretrained(directory, dtype=torch.float32)
            rosa.attach(model, rank=8, alpha=16, pairs=pairs)
            selector = rosa.LayerSelector(model, select_every=10)
            losses, _ = lesson["finetune"](model, selector, lr=1e-2, seed=seed)
            measured[pairs].append(losses[-1])
            print(f"{directory} {pairs} seed {seed}: {losses[-1]:.4f}", flush=True)
    return measured


def measure_smollm2(directory, data_dir, lesson):
    """Norms on 32 questions of GSM8K; knock-outs on 2,048 tokens of its problems and answers."""
    tokenizer = load_tokenizer(directory)
    model = Llama.from_pretrained(directory, dtype=torch.float32)
    problems = json.loads((Path(data_dir) / "dataset/gsm8k/test.json").read_text())
    prompts = [tasks.encode_prompt(problem, tokenizer) for problem in problems[:32]]
    texts = (f"{problem['instruction']}\n{problem['output'].strip()}" for problem in problems)
    measured = knock_outs(model, rows_of(texts, tokenizer, 4, 512), lesson["loss_without"])
    return measured | {"norms": lesson["norms_of_pairs"](model, prompts)}


def read_runs(directory):
    """The accuracy of `tiny` at each rank and rate, and the curves of SmolLM2 with slow, fast and
    random pairs."""

    def accuracy(name):
        return json.loads((directory / name / "results.json").read_text())["micro"]

    def validations(name):
        log = map(json.loads, (directory / name / "log.jsonl").read_text().splitlines())
        return [(record["step"], record["val_loss"]) for record in log if "val_loss" in record]

    measured = {"ranks": RANKS, "rates": [float(rate) for rate in RATES]}
    measured["rank_rate"] = [[accuracy(f"r{rank}-{rate}-s0") for rate in RATES] for rank in RANKS]
    measured["full_rates"] = [float(rate) for rate in FULL_RATES]
    measured["full_accuracy"] = [accuracy(f"full-{rate}-s0") for rate in FULL_RATES]
    measured["rank_64_alpha_16"] = accuracy("r64-1e-2-a16-s0")
    for pairs in PAIRS:
        run = validations(f"{pairs}25")
        measured["smollm2_steps"] = [step for step, _ in run]
        measured[f"smollm2_{pairs}"] = [loss for _, loss in run]
    return measured


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--theta", type=Path, help="folder with theta10000 and theta100")
    parser.add_argument("--runs", type=Path, help="folder with the runs of train.py")
    parser.add_argument("--data-dir", default=tasks.DATA_DIR)
    return parser.parse_args(arguments)


def main(args):
    lesson = notebook()
    path = LESSON / "measured.npz"
    kept = dict(np.load(path)) if path.is_file() else {}
    if args.theta:
        for name in ("theta10000", "theta100"):
            measured = measure_theta(args.theta / name, lesson)
            kept |= {f"{name}_{key}": value for key, value in measured.items()}
    if args.smollm2:
        measured = measure_smollm2(args.smollm2, args.data_dir, lesson)
        kept |= {f"smollm2_{key}": value for key, value in measured.items()}
    if args.runs:
        kept |= read_runs(args.runs)
    kept = {name: np.asarray(value) for name, value in kept.items()}
    for name, value in kept.items():
        if value.dtype == np.float64:
            kept[name] = value.astype(np.float32)
    np.savez_compressed(path, **kept)
    print(f"{path}: {', '.join(kept)}")


if __name__ == "__main__":
    main(parse_args())
