"""Greedy generation side by side with transformers. One command, one table.

    python tests/bench_generate.py --ckpt checkpoints/smollm2-135m --test-file test.json [--rounds 3]

The same checkpoint, dtype, prompts and batch size; each measurement is a process of its own, the rows take turns, and the table
shows medians over the rounds, for ratios the median of the ratios within a round. tokens/s: new tokens up to the end-of-sequence
token over the wall time of all batches, prompts included; `eval.py`'s by its own clock, from the first question to the last
answer written. Floor: 2 FLOPs per weight for each real token, the vocabulary for new ones alone, at the rate of a large matmul
measured in the same process. Without transformers the peer's columns stay empty.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_train import matmul_rate, measure, peak_mib  # beside this file; puts the project on sys.path

import eval as eval_script
from data import tasks
from data.tokenizer import load_tokenizer
from model import Llama


def prompts(args):
    tokenizer = load_tokenizer(args.ckpt)
    return [tasks.encode_prompt(example, tokenizer) for example in tasks.load_examples(args.test_file, ("instruction",))[: args.limit]]


def ours(args, pack=True):
    """Long prompts first and weights packed, as in `eval.py`."""
    model = Llama.from_pretrained(args.ckpt, args.device, getattr(torch, args.dtype))
    ids, rate = sorted(prompts(args), key=len, reverse=True), matmul_rate(args.dtype, args.device)
    if pack:
        model.pack()
    start = time.perf_counter()
    answers = model.generate(ids, args.max_new_tokens, model.config.eos_token_id, batch_size=args.batch_size)
    seconds, count = time.perf_counter() - start, sum(map(len, answers))
    vocabulary = model.model.embed_tokens.weight.numel()
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    flops = 2 * weights * (sum(map(len, ids)) + count) + 2 * vocabulary * (count + len(ids))
    return {"rate": count / seconds, "floor": flops / rate / seconds}


def ours_unpacked(args):
    return ours(args, pack=False)


def ours_eval(args):
    """`eval.py` on the same questions: tokens/s from what it shows."""
    folder = Path(tempfile.mkdtemp())
    (folder / "dataset" / "SVAMP").mkdir(parents=True)
    records = json.loads(Path(args.test_file).read_text(encoding="utf-8"))[: args.limit]
    (folder / "dataset" / "SVAMP" / "test.json").write_text(json.dumps(records), encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        eval_script.run(["--ckpt", args.ckpt, "--task", "SVAMP", "--data-dir", str(folder), "--out", str(folder / "out"), "--dtype",
                         args.dtype, "--device", args.device, "--batch-size", str(args.batch_size), "--max-new-tokens",
                         str(args.max_new_tokens)])
    if " new tokens/s" not in shown.getvalue():
        sys.exit(f"eval.py generates nothing: {shown.getvalue()}")
    return {"rate": float(shown.getvalue().split(" new tokens/s")[-2].split()[-1].replace(",", ""))}


def theirs(args):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    eos, ids, count = model.config.eos_token_id, prompts(args), 0
    start = time.perf_counter()
    for i in range(0, len(ids), args.batch_size):
        batch = ids[i : i + args.batch_size]
        width = max(map(len, batch))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=args.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=args.device)
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=False,
                                 eos_token_id=eos, pad_token_id=0)
        for row in out[:, width:].tolist():
            count += row.index(eos) if eos in row else len(row)
    return {"rate": count / (time.perf_counter() - start)}


ROWS = {"transformers": theirs, "generate": ours, "generate, not packed": ours_unpacked, "eval.py": ours_eval}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True), p.add_argument("--test-file", required=True)
    p.add_argument("--rounds", type=int, default=3), p.add_argument("--limit", type=int, default=64)
    p.add_argument("--dtype", default="float32,bfloat16"), p.add_argument("--device", default="cpu")
    p.add_argument("--batch-size", type=int, default=32), p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--role", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.role:
        print(json.dumps(ROWS[args.role](args) | {"peak": peak_mib(args.device)}))
        return
    rows = list(ROWS)
    if not importlib.util.find_spec("transformers"):
        print("without the peer: pip install transformers")
        rows.remove("transformers")
    print("| | dtype | tokens/s | / transformers | / generate | share of floor | peak MiB |\n" + "|---" * 7 + "|", flush=True)
    for dtype in args.dtype.split(","):
        rounds = [{row: measure(__file__, row, dtype) for row in rows} for _ in range(args.rounds)]
        for row in rows:
            ratios = [f"{statistics.median(r[row]['rate'] / r[base]['rate'] for r in rounds):.2f}" if base in rows else ""
                      for base in ("transformers", "generate")]
            share = f"{statistics.median(r[row]['floor'] for r in rounds):.2f}" if "floor" in rounds[0][row] else ""
            print(f"| {row} | {dtype} | {statistics.median(r[row]['rate'] for r in rounds):,.0f} | {ratios[0]} | {ratios[1]} | {share} | "
                  f"{statistics.median(r[row]['peak'] for r in rounds):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
