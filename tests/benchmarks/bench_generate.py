"""Greedy generation side by side with transformers. One command, one table.

    python tests/benchmarks/bench_generate.py --ckpt checkpoints/smollm2-135m \\
        --test-file test.json [--rounds 3]

The same checkpoint, dtype, prompts and batch size. tokens/s: new tokens up to the end-of-sequence
token over the wall time of all batches, prompts included; `eval.py`'s by its own clock, from the
first question to the last answer written. Floor: 2 FLOPs per weight for each real token, the
vocabulary for new ones alone, at the rate of a large matmul measured in the same process. Without
transformers the peer's columns stay empty."""

import contextlib
import importlib.util
import io
import re
import tempfile
import time

import torch
from common import matmul_rate, parse_args, peak_mib, print_table  # common.py is beside this file
from torch.nn.utils.rnn import pad_sequence

import eval as eval_script
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import inference, kernels
from model import Llama


def main(arguments=None):
    sizes = {"rounds": 3, "limit": 64, "batch_size": 32, "max_new_tokens": 128, "device": "cpu"}
    choice = {"dtype": "float32,bfloat16", "rows": "; ".join(ROWS)}
    args = parse_args(__doc__, arguments, ckpt="data/tiny", test_file="", **sizes, **choice)
    rows = args.rows.split("; ")
    if "transformers" in rows and not importlib.util.find_spec("transformers"):
        rows.remove("transformers")
    ratios = {f"tokens/s / {row}": ("tokens/s", row) for row in ("transformers", "generate")}
    print_table(args, rows, measure, ratios)


def measure(args, row):
    return ROWS[row](args) | {"peak MiB": peak_mib(args.device)}


def load_examples(args):
    file = args.test_file
    examples = (
        tasks.load_examples(file, ("instruction", "answer"))
        if file
        else toy.examples("test", args.limit)
    )
    return examples[: args.limit]


def encoded_prompts(args):
    tokenizer = load_tokenizer(args.ckpt)
    return [tasks.encode_prompt(example, tokenizer) for example in load_examples(args)]


def ours(args):
    """Generate with `extras.inference`, long prompts first, as `eval.py` does."""
    model = Llama.from_pretrained(args.ckpt, args.device, getattr(torch, args.dtype))
    ids, rate = (
        sorted(encoded_prompts(args), key=len, reverse=True),
        matmul_rate(args.dtype, args.device),
    )
    kernels.accelerate(model, inference=True)
    start = time.perf_counter()
    answers = inference.generate(
        model, ids, args.max_new_tokens, model.config.eos_token_id, args.batch_size
    )
    seconds, count = time.perf_counter() - start, sum(map(len, answers))
    vocabulary = model.model.embed_tokens.weight.numel()
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    flops = 2 * weights * (sum(map(len, ids)) + count) + 2 * vocabulary * (count + len(ids))
    return {"tokens/s": count / seconds, "share of floor": flops / rate / seconds}


def ours_eval(args):
    """Run `eval.py` on the same questions, as if they were those of the toy task. tokens/s is the
    number that its progress bar shows."""
    tasks.test_examples = lambda *_: load_examples(args)
    options = {
        "--ckpt": args.ckpt,
        "--out": tempfile.mkdtemp(),
        "--dtype": args.dtype,
        "--device": args.device,
    }
    options |= {"--batch-size": args.batch_size, "--max-new-tokens": args.max_new_tokens}
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        eval_script.main(
            eval_script.parse_args([str(word) for option in options.items() for word in option])
        )
    return {
        "tokens/s": int(re.findall(r"([\d,]+) new tokens/s", shown.getvalue())[-1].replace(",", ""))
    }


def theirs(args):
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype))
        .to(args.device)
        .eval()
    )
    eos, ids, count = model.config.eos_token_id, encoded_prompts(args), 0
    options = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }
    left = {"batch_first": True, "padding_side": "left"}
    start = time.perf_counter()
    for i in range(0, len(ids), args.batch_size):
        rows = [torch.tensor(row) for row in ids[i : i + args.batch_size]]
        tokens = pad_sequence(rows, **left).to(args.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **left).to(args.device)
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, **options)
        for row in out[:, tokens.shape[1] :].tolist():
            count += row.index(eos) if eos in row else len(row)
    return {"tokens/s": count / (time.perf_counter() - start)}


ROWS = {"transformers": theirs, "generate": ours, "eval.py": ours_eval}

if __name__ == "__main__":
    main()
