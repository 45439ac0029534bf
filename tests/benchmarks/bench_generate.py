"""Greedy generation side by side with transformers. One command, one table.

    python tests/benchmarks/bench_generate.py --ckpt checkpoints/smollm2-135m --test-file test.json [--rounds 3]

The same checkpoint, dtype, prompts and batch size; each measurement is a process of its own, the rows take turns, and
the table shows medians over the rounds, for ratios the median of the ratios within a round. tokens/s: new tokens up to
the end-of-sequence token over the wall time of all batches, prompts included; `eval.py`'s by its own clock, from the
first question to the last answer written. Floor: 2 FLOPs per weight for each real token, the vocabulary for new ones
alone, at the rate of a large matmul measured in the same process. Without transformers the peer's columns stay empty.
"""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_train import (
    cell,
    matmul_rate,
    measure,
    parser_of,
    peak_mib,
)  # beside this file; puts the project on sys.path

import eval as eval_script
from data import tasks
from data.tokenizer import load_tokenizer
from extras import inference, kernels
from model import Llama


def prompts(args):
    tokenizer = load_tokenizer(args.ckpt)
    examples = tasks.load_examples(args.test_file, ("instruction",))[: args.limit]
    return [tasks.encode_prompt(example, tokenizer) for example in examples]


def ours(args, pack=True):
    """Long prompts first and, where `pack`, weights laid out anew, as in `eval.py`."""
    model = Llama.from_pretrained(args.ckpt, args.device, getattr(torch, args.dtype))
    ids, rate = sorted(prompts(args), key=len, reverse=True), matmul_rate(args.dtype, args.device)
    kernels.accelerate(model, inference=pack)
    start = time.perf_counter()
    answers = inference.generate(model, ids, args.max_new_tokens, model.config.eos_token_id, args.batch_size)
    seconds, count = time.perf_counter() - start, sum(map(len, answers))
    vocabulary = model.model.embed_tokens.weight.numel()
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    flops = 2 * weights * (sum(map(len, ids)) + count) + 2 * vocabulary * (count + len(ids))
    return {"rate": count / seconds, "floor": flops / rate / seconds}


def ours_eval(args):
    """`eval.py` on the same questions: tokens/s from what it shows."""
    folder = Path(tempfile.mkdtemp())
    (folder / "dataset" / "SVAMP").mkdir(parents=True)
    records = json.loads(Path(args.test_file).read_text(encoding="utf-8"))[: args.limit]
    (folder / "dataset" / "SVAMP" / "test.json").write_text(json.dumps(records), encoding="utf-8")
    options = {"--ckpt": args.ckpt, "--task": "SVAMP", "--data-dir": folder, "--out": folder / "out"}
    options |= {"--dtype": args.dtype, "--device": args.device}
    options |= {"--batch-size": args.batch_size, "--max-new-tokens": args.max_new_tokens}
    with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        eval_script.run([str(word) for option in options.items() for word in option])
    if " new tokens/s" not in shown.getvalue():
        sys.exit(f"eval.py generates nothing: {shown.getvalue()}")
    return {"rate": float(shown.getvalue().split(" new tokens/s")[-2].split()[-1].replace(",", ""))}


def theirs(args):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    eos, ids, count = model.config.eos_token_id, prompts(args), 0
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    start = time.perf_counter()
    for i in range(0, len(ids), args.batch_size):
        batch = ids[i : i + args.batch_size]
        width = max(map(len, batch))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=args.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=args.device)
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, **options)
        for row in out[:, width:].tolist():
            count += row.index(eos) if eos in row else len(row)
    return {"rate": count / (time.perf_counter() - start)}


ROWS = {"transformers": theirs, "generate": ours, "eval.py": ours_eval}
ROWS |= {"generate, not packed": lambda args: ours(args, pack=False)}
COLUMNS = {"tokens/s": ("rate", ",.0f"), "/ transformers": ("rate", ".2f", "transformers")}  # as in bench_train.py
COLUMNS |= {"/ generate": ("rate", ".2f", "generate"), "share of floor": ("floor", ".2f"), "peak MiB": ("peak", ",.0f")}


def main():
    sizes = {"rounds": 3, "limit": 64, "batch_size": 32, "max_new_tokens": 128, "device": "cpu"}
    args = parser_of(__doc__, ckpt=..., test_file=..., **sizes, dtype="float32,bfloat16").parse_args()
    if args.role:
        print(json.dumps(ROWS[args.role](args) | {"peak": peak_mib(args.device)}))
        return
    rows = list(ROWS)
    if not importlib.util.find_spec("transformers"):
        print("without the peer: pip install transformers")
        rows.remove("transformers")
    print(f"| | dtype | {' | '.join(COLUMNS)} |\n{'|---' * 7}|", flush=True)
    for dtype in args.dtype.split(","):
        rounds = [{row: measure(__file__, row, dtype) for row in rows} for _ in range(args.rounds)]
        for row in rows:
            cells = [cell(rounds, row, *what) for what in COLUMNS.values()]
            print(f"| {row} | {dtype} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
