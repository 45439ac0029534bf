"""Training side by side with transformers + peft and with the floor that the hardware sets. One command, one table.

    python tests/bench_train.py --ckpt checkpoints/smollm2-135m --train-file data.json [--rounds 3]

The peer is peft's LoRA, rank 24, on all linear layers: the same checkpoint, dtype, prompts and batch size; examples in random
order, padded to the longest of the batch. Ours is `train.py` as it stands, at its defaults but for what a row says. Each
measurement is a process of its own; the rows take turns, and the table shows medians over the rounds, for ratios the median of
the ratios within a round. tokens/s: median over the steps after the first three, padding not counted. MiB: the process's peak
resident set on a CPU, the allocator's peak on a GPU. Kept: what the forward pass leaves for the backward pass, weights not
counted, in the last micro-batch. Floor: the FLOPs that a step cannot do without, at the rate of a large
matmul measured in the same process; its share of the time is 1 where nothing else takes any. --profile adds where the time
goes, by kind of operation. Without transformers and peft the peer's columns stay empty.
"""

import argparse
import importlib.util
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
import rosa  # noqa: E402
import train  # noqa: E402
from data import tasks  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

ALL = "q,k,v,o,gate,up,down"
ROWS = {  # what a row says -> options of train.py
    "RoSA": [],
    "RoSA, one batch at a time": ["--micro-batch-size", "BATCH"],
    "RoSA without DLS": ["--k-ratio", "1"],
    "RoSA, upper half active": [],
    "RoSA --checkpoint-activations": ["--checkpoint-activations"],
    "RoSA --compile": ["--compile"],
    "RoSA --compile, one batch at a time": ["--compile", "--micro-batch-size", "BATCH"],
    "LoRA, all linears, rank 24": ["--method", "lora", "--targets", ALL, "--rank", "24"],
}
# An operation counts as the first kind of whose words its name holds one.
KINDS = {"attention": ("scaled_dot_product", "CausalAttention", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
         "matmul": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
         "norms": ("RMSNorm", "aten::rsqrt", "aten::pow", "aten::mean"), "SwiGLU": ("silu", "SwiGLU"),
         "loss": ("softmax", "SummedCrossEntropy", "aten::exp", "scatter", "gather"),
         "rotation": ("aten::roll", "aten::cat", "addcmul", "aten::cos", "aten::sin"), "optimiser": ("Optimizer", "_foreach")}


def peak_mib(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def ours(args, row):
    out = Path(tempfile.mkdtemp())
    if row == "RoSA, upper half active":
        class UpperHalf(rosa.LayerSelector):  # whatever the probe says
            def activate(self, layers):
                super().activate(layers if self.probing and len(layers) > self.count else range(len(self.parameters))[-self.count:])

        rosa.LayerSelector = UpperHalf
    kept = count_kept()
    options = [str(args.batch_size) if option == "BATCH" else option for option in ROWS[row]]
    command = ["--ckpt", args.ckpt, "--train-file", args.train_file, "--out", out, "--dtype", args.dtype, "--device", args.device,
               "--batch-size", args.batch_size, "--max-len", args.max_len, "--max-steps", args.steps, "--val-size", 8,
               "--eval-every", 10**6, "--save-every", 10**6, *options]
    command = [str(word) for word in command]
    before = matmul_rate(args.dtype, args.device)
    with (profiler() if args.profile else open(os.devnull)) as profile:
        train.run(command)
    if args.profile:
        print_profile(profile, row, args.dtype)
    rate = statistics.median([before, matmul_rate(args.dtype, args.device)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    log = log[3 if args.steps > 5 else 1:]  # not the probe, nor what is compiled
    options = train.parse_args(command)
    return {"rate": statistics.median(step["tokens"] / step["seconds"] for step in log), "loss": log[-1]["loss"], "kept": kept[-1] / 2**10,
            "floor": statistics.median(floor(args, step, options) / rate / step["seconds"] for step in log)}


def count_kept():
    """Have `Llama.loss` note, for each call with gradients, the bytes a token that autograd keeps. Returns the list of them."""
    loss, kept = Llama.loss, []

    def counting(self, tokens, labels):
        weights = {p.untyped_storage().data_ptr() for p in self.parameters()}
        sizes = {}

        def note(tensor):
            if not tensor.is_mkldnn and (storage := tensor.untyped_storage()).data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = loss(self, tokens, labels)
        if torch.is_grad_enabled():
            kept.append(sum(sizes.values()) / tokens.numel())
        return result

    Llama.loss = counting
    return kept


def floor(args, step, options):
    """FLOPs of an optimiser step on its real tokens: 2 per weight forward; backward 2 through the frozen weights from the lowest
    active layer up, and another 2 for what trains; causal attention; the vocabulary where something is predicted (half)."""
    c = LlamaConfig.from_file(args.ckpt)
    tokens, length = step["tokens"], step["tokens"] / args.batch_size
    width, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * width + 2 * keys + 3 * c.intermediate_size)
    attention = 2 * length * width  # QK^T and PV over half a square
    shapes = {"q": (c.hidden_size, width), "k": (c.hidden_size, keys), "v": (c.hidden_size, keys), "o": (width, c.hidden_size),
              "gate": (c.hidden_size, c.intermediate_size), "up": (c.hidden_size, c.intermediate_size),
              "down": (c.intermediate_size, c.hidden_size)}
    ratio = getattr(options, "low_freq_ratio", 1.0)
    adapters = sum(options.rank * (wide + out * (ratio if target in "qk" else 1.0))
                   for target, (wide, out) in shapes.items() if target in options.targets.split(","))
    below, active = c.num_hidden_layers - min(step["active_layers"]), len(step["active_layers"])
    per_token = (c.num_hidden_layers * (2 * weights + attention + 2 * adapters) + below * (2 * weights + 2.5 * attention + 2 * adapters)
                 + active * 2 * adapters + 4 * c.vocab_size * c.hidden_size * 0.5)
    return tokens * per_token


def matmul_rate(dtype, device):
    """FLOP/s of the model's own linear layer on 1,024 tokens and 1,536 x 576 weights (on a GPU 8,192 and 4,096 x 4,096)."""
    from model import linear

    rows, wide, out = (1024, 576, 1536) if device == "cpu" else (8192, 4096, 4096)
    x, w = (torch.randn(n, wide, dtype=getattr(torch, dtype), device=device) for n in (rows, out))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(10):
            linear(x, w)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10)
    return 2 * rows * wide * out / statistics.median(times)


def profiler():
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU])


def print_profile(profile, row, dtype):
    events = profile.key_averages()
    total, shares = sum(event.self_cpu_time_total for event in events), dict.fromkeys(KINDS, 0.0)
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), None)
        if kind:
            shares[kind] += event.self_cpu_time_total / total
    shares["element-wise, copies, autograd, Python"] = 1 - sum(shares.values())
    print(f"profile of {row}, {dtype}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()), file=sys.stderr)


def theirs(args, _):
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
        if args.device != "cpu":
            torch.cuda.synchronize()
        rates.append(int(mask.sum()) / (time.perf_counter() - start))
    return {"rate": statistics.median(rates[3 if args.steps > 5 else 1:])}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True), p.add_argument("--train-file", required=True)
    p.add_argument("--rounds", type=int, default=3), p.add_argument("--steps", type=int, default=12)
    p.add_argument("--dtype", default="float32,bfloat16"), p.add_argument("--device", default="cpu")
    p.add_argument("--batch-size", type=int, default=8), p.add_argument("--max-len", type=int, default=256)
    p.add_argument("--rows", default="; ".join(ROWS)), p.add_argument("--profile", action="store_true")
    p.add_argument("--role", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.role:
        result = (theirs if args.role == "theirs" else ours)(args, args.role)
        print(json.dumps(result | {"peak": peak_mib(args.device)}))
        return
    rows = [row.strip() for row in args.rows.split(";")]
    peer = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
    if not peer:
        print("without the peer: pip install transformers peft")
    print("| | dtype | tokens/s | / peer | / RoSA without DLS | share of floor | peak MiB | / peer | kept, KiB a token | last loss |\n" + "|---" * 10 + "|", flush=True)
    for dtype in args.dtype.split(","):
        roles = ["theirs"] * peer + rows
        rounds = [{role: measure(__file__, role, dtype) for role in roles} for _ in range(args.rounds)]
        for role in roles:
            def median(value, needed=role):
                return statistics.median(map(value, rounds)) if needed in roles else float("nan")

            cells = [f"{median(lambda r: r[role]['rate']):,.0f}", f"{median(lambda r: r[role]['rate'] / r['theirs']['rate'], 'theirs'):.2f}",
                     f"{median(lambda r: r[role]['rate'] / r['RoSA without DLS']['rate'], 'RoSA without DLS'):.2f}",
                     f"{median(lambda r: r[role].get('floor', float('nan'))):.2f}", f"{median(lambda r: r[role]['peak']):,.0f}",
                     f"{median(lambda r: r[role]['peak'] / r['theirs']['peak'], 'theirs'):.2f}",
                     f"{median(lambda r: r[role].get('kept', float('nan'))):,.0f}", f"{median(lambda r: r[role].get('loss', float('nan'))):.3f}"]
            label = "transformers + peft LoRA" if role == "theirs" else role
            print(f"| {label} | {dtype} | " + " | ".join(cells).replace("nan", "") + " |", flush=True)


def measure(script, role, dtype):
    """The last line that a process of its own prints, read as JSON."""
    command = [sys.executable, script, *sys.argv[1:], "--dtype", dtype, "--role", role]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    if done.returncode:
        sys.exit(done.stderr)
    sys.stderr.writelines(line + "\n" for line in done.stderr.splitlines() if line.startswith("profile of"))
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
