"""Training and generation side by side with transformers + peft: same checkpoint, dtype, examples and batch size.

    python tests/bench_peers.py --ckpt checkpoints/smollm2-135m --train-file data.json --test-file test.json [--rounds 3]

Each measurement is a process of its own; ours and theirs take turns, and the table shows medians over the rounds, and
the median of the ratios within a round. Training: tokens/s is the median over the steps after the first two, padding not
counted. Generation: new tokens up to the end-of-sequence token over the wall time of all batches, prompts included. Memory
is the process's peak resident set on the CPU, the allocator's peak on a GPU. Needs transformers and peft.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import tasks  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

ALL = "q,k,v,o,gate,up,down"


def peak_mib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours_train(args, method):
    import train

    out = tempfile.mkdtemp()
    options = {"rosa": [], "rosa, k_ratio 1": ["--k-ratio", "1"],
               "lora": ["--method", "lora", "--targets", ALL, "--rank", "24", "--alpha", "48"]}[method]
    sys.argv[0] = "train.py"
    train.run(["--ckpt", args.ckpt, "--train-file", args.train_file, "--out", out, "--dtype", args.dtype, "--device", args.device,
               "--batch-size", str(args.batch_size), "--micro-batch-size", str(args.batch_size), "--max-len", str(args.max_len),
               "--max-steps", str(args.steps), "--val-size", "8", "--eval-every", "100000", "--save-every", "100000", *options])
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][1:]
    return statistics.median(record["tokens"] / record["seconds"] for record in log[2:])


def their_train(args, method):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.ckpt)
    examples = [tasks.encode_example(example, tokenizer) for example in tasks.load_examples(args.train_file)]
    examples = [pair for pair in examples if len(pair[0]) + len(pair[1]) <= args.max_len]
    random.Random(0).shuffle(examples)
    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).to(args.device)
    targets = [f"{name}_proj" for name in ALL.split(",")]
    model = get_peft_model(model, LoraConfig(r=24, lora_alpha=48, target_modules=targets, task_type="CAUSAL_LM")).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    rates = []
    for step in range(args.steps):
        rows = [examples[i % len(examples)] for i in range(step * args.batch_size, (step + 1) * args.batch_size)]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for row, (prompt, response) in enumerate(rows):
            length = len(prompt) + len(response)
            tokens[row, :length], mask[row, :length] = torch.tensor(prompt + response), 1
            labels[row, len(prompt):length] = torch.tensor(response)
        tokens, labels, mask = (tensor.to(args.device) for tensor in (tokens, labels, mask))
        start = time.perf_counter()
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        rates.append(int(mask.sum()) / (time.perf_counter() - start))
    return statistics.median(rates[2:])


def prompts(args):
    tokenizer = load_tokenizer(args.ckpt)
    return [tasks.encode_prompt(example, tokenizer) for example in tasks.load_examples(args.test_file, ("instruction",))[: args.limit]]


def ours_generate(args, _):
    from model import Llama

    model = Llama.from_pretrained(args.ckpt, args.device, getattr(torch, args.dtype))
    eos, ids, count = model.config.eos_token_id, prompts(args), 0
    start = time.perf_counter()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for i in range(0, len(ids), args.generate_batch_size):
        batch = [ids[j] for j in order[i : i + args.generate_batch_size]]
        count += sum(map(len, model.generate(batch, args.max_new_tokens, eos)))
    return count / (time.perf_counter() - start)


def their_generate(args, _):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    eos, ids, count = model.config.eos_token_id, prompts(args), 0
    start = time.perf_counter()
    for i in range(0, len(ids), args.generate_batch_size):
        batch = ids[i : i + args.generate_batch_size]
        width = max(map(len, batch))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=args.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=args.device)
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=args.max_new_tokens, do_sample=False,
                                 eos_token_id=eos, pad_token_id=0)
        for row in out[:, width:].tolist():
            count += row.index(eos) if eos in row else len(row)
    return count / (time.perf_counter() - start)


ROLES = {"ours_train": ours_train, "their_train": their_train, "ours_generate": ours_generate, "their_generate": their_generate}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True), p.add_argument("--train-file", required=True)
    p.add_argument("--test-file", required=True), p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtype", default="float32,bfloat16"), p.add_argument("--device", default="cpu")
    p.add_argument("--steps", type=int, default=12), p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--max-len", type=int, default=256), p.add_argument("--limit", type=int, default=64)
    p.add_argument("--generate-batch-size", type=int, default=32), p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--only", default="train,generate"), p.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.role:
        rate = ROLES[args.role[0]](args, args.role[1])
        print(json.dumps({"rate": rate, "peak_mib": peak_mib(args.device)}))
        return
    print("| what | dtype | ours, tokens/s | theirs | ratio | ours, MiB | theirs | ratio |\n|---|---|---|---|---|---|---|---|", flush=True)
    methods = [("train", method) for method in ("rosa", "rosa, k_ratio 1", "lora")] + [("generate", "greedy")]
    for dtype in args.dtype.split(","):
        for what in args.only.split(","):
            ours = [method for kind, method in methods if kind == what]
            rounds = []
            for _ in range(args.rounds):
                rounds.append({method: measure(f"ours_{what}", method, dtype) for method in ours})
                rounds[-1]["theirs"] = measure(f"their_{what}", "lora", dtype)
            for method in ours:
                cells = []
                for key in ("rate", "peak_mib"):
                    cells += [f"{statistics.median(r[side][key] for r in rounds):,.0f}" for side in (method, "theirs")]
                    cells.append(f"{statistics.median(r[method][key] / r['theirs'][key] for r in rounds):.2f}")
                print(f"| {what}, {method} | {dtype} | " + " | ".join(cells) + " |", flush=True)


def measure(role, method, dtype):
    command = [sys.executable, __file__, *sys.argv[1:], "--dtype", dtype, "--role", role, method]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
