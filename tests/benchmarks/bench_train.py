"""Training side by side with transformers + peft and with the floor that the hardware sets. One command, one table.

    python tests/benchmarks/bench_train.py --ckpt checkpoints/smollm2-135m --train-file data.json [--rounds 3]

The peer is peft's LoRA, rank 24, on all linear layers: the same checkpoint, dtype, prompts and batch size; examples in
random order, padded to the longest of the batch. Ours is `train.py` as it stands, at its defaults but for what a row
says. Each measurement is a process of its own; the rows take turns, and the table shows medians over the rounds, for
ratios the median of the ratios within a round. tokens/s: median over the steps after the first three, padding not
counted. MiB: the process's peak resident set on a CPU, the allocator's peak on a GPU. Kept: what the forward pass
leaves for the backward pass, weights not counted, in the last micro-batch. Floor: the FLOPs that a step cannot do
without, at the rate of a large matmul measured in the same process; its share of the time is 1 where nothing else
takes any. --profile adds where the time goes, by kind of operation. Without transformers and peft the peer's columns
stay empty.
"""

import argparse
import contextlib
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
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import rosa  # noqa: E402
import train  # noqa: E402
from data import tasks  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from extras import kernels, runs  # noqa: E402
from model import LlamaConfig  # noqa: E402

ALL = "q,k,v,o,gate,up,down"
ROWS = {  # what a row says -> options of train.py
    "RoSA": "",
    "RoSA, one batch at a time": "--micro-batch-size BATCH",
    "RoSA without DLS": "--k-ratio 1",
    "RoSA, upper half active": "",
    "RoSA --checkpoint-activations": "--checkpoint-activations",
    "RoSA --compile": "--compile",
    "RoSA --compile, one batch at a time": "--compile --micro-batch-size BATCH",
    "RoSA --plain": "--plain",
    "LoRA, all linears, rank 24": f"--method lora --targets {ALL} --rank 24",
}
# An operation counts as the first kind of whose words its name holds one.
KINDS = {
    "attention": ("scaled_dot_product", "CausalAttention", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "matmul": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "norms": ("RMSNorm", "aten::rsqrt", "aten::pow", "aten::mean"),
    "SwiGLU": ("silu", "SwiGLU"),
    "loss": ("softmax", "SummedCrossEntropy", "aten::exp", "scatter", "gather"),
    "rotation": ("aten::roll", "aten::cat", "addcmul", "aten::cos", "aten::sin"),
    "optimiser": ("Optimizer", "_foreach"),
}
# heading -> what a cell is: a number of the row's, how it is written, the row it is a ratio to
COLUMNS = {"tokens/s": ("rate", ",.0f"), "/ peer": ("rate", ".2f", "theirs")}
COLUMNS |= {"/ RoSA without DLS": ("rate", ".2f", "RoSA without DLS"), "share of floor": ("floor", ".2f")}
COLUMNS |= {"peak MiB": ("peak", ",.0f"), "MiB / peer": ("peak", ".2f", "theirs")}
COLUMNS |= {"kept, KiB a token": ("kept", ",.0f"), "last loss": ("loss", ".3f")}


def peak_mib(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class UpperHalf(rosa.LayerSelector):
    """The upper layers are active, whatever the probe says."""

    def activate(self, layers):
        upper = range(len(self.parameters))[-self.count :]
        super().activate(layers if self.probing and len(layers) > self.count else upper)


def ours(args, row):
    out = Path(tempfile.mkdtemp())
    if row == "RoSA, upper half active":
        rosa.LayerSelector = UpperHalf
    kept = count_kept()
    options = {"--ckpt": args.ckpt, "--train-file": args.train_file, "--out": out, "--dtype": args.dtype}
    options |= {"--device": args.device, "--batch-size": args.batch_size, "--max-len": args.max_len}
    options |= {"--max-steps": args.steps, "--val-size": 8, "--eval-every": 10**6, "--save-every": 10**6}
    command = [str(word) for option in options.items() for word in option]
    command += ROWS[row].replace("BATCH", str(args.batch_size)).split()
    before = matmul_rate(args.dtype, args.device)
    with profile(activities=[ProfilerActivity.CPU]) if args.profile else contextlib.nullcontext() as profiled:
        train.run(command)
    if args.profile:
        print_profile(profiled.key_averages(), row, args.dtype)
    rate = statistics.median([before, matmul_rate(args.dtype, args.device)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    log = log[3 if args.steps > 5 else 1 :]  # not the probe, nor what is compiled
    options = train.parse_args(command)
    return {
        "rate": statistics.median(step["tokens"] / step["seconds"] for step in log),
        "loss": log[-1]["loss"],
        "kept": kept[-1] / 2**10,
        "floor": statistics.median(floor(args, step, options) / rate / step["seconds"] for step in log),
    }


def count_kept():
    """Have a run note, for each loss with gradients, the bytes a token that autograd keeps. Returns their list."""
    kept = []

    class CountingRun(runs.Run):  # made once the model's loss is the one that is used
        def __init__(self, args, ckpt, model, *rest):
            super().__init__(args, ckpt, model, *rest)
            loss = model.loss

            def counting(tokens, labels):
                result, count = saved_bytes(model, lambda: loss(tokens, labels))
                if torch.is_grad_enabled():
                    kept.append(count / tokens.numel())
                return result

            model.loss = counting

    runs.Run = CountingRun
    return kept


def saved_bytes(model, compute):
    """(what compute() returns, the bytes that autograd saves in it for the backward pass): each storage counts once,
    the model's own not at all."""
    weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if not tensor.is_mkldnn and (storage := tensor.untyped_storage()).data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    return result, sum(sizes.values())


def floor(args, step, options):
    """FLOPs of an optimiser step on its real tokens: 2 per weight forward; backward 2 through the frozen weights from
    the lowest active layer up, and another 2 for what trains; causal attention; the vocabulary where something is
    predicted (half)."""
    c = LlamaConfig.from_file(args.ckpt)
    tokens, length = step["tokens"], step["tokens"] / args.batch_size
    D, inner = c.hidden_size, c.intermediate_size
    width, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = D * (2 * width + 2 * keys + 3 * inner)
    attention = 2 * length * width  # QK^T and PV over half a square
    shapes = {"q": (D, width), "k": (D, keys), "v": (D, keys), "o": (width, D)}
    shapes |= {"gate": (D, inner), "up": (D, inner), "down": (inner, D)}
    ratio = getattr(options, "low_freq_ratio", 1.0)
    targets = {target: shapes[target] for target in options.targets.split(",")}
    rows = {target: out * (ratio if target in "qk" else 1.0) for target, (_, out) in targets.items()}
    adapters = sum(options.rank * (wide + rows[target]) for target, (wide, _) in targets.items())
    below, active = c.num_hidden_layers - min(step["active_layers"]), len(step["active_layers"])
    forward = c.num_hidden_layers * (2 * weights + attention + 2 * adapters)
    backward = below * (2 * weights + 2.5 * attention + 2 * adapters) + active * 2 * adapters
    return tokens * (forward + backward + 4 * c.vocab_size * D * 0.5)


def matmul_rate(dtype, device):
    """FLOP/s of the kernel of linear layers: 1,024 tokens, 1,536 x 576 weights; on a GPU 8,192 and 4,096 x 4,096."""
    kernels.Operators.look_up()
    rows, wide, out = (1024, 576, 1536) if device == "cpu" else (8192, 4096, 4096)
    x, w = (torch.randn(n, wide, dtype=getattr(torch, dtype), device=device) for n in (rows, out))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(10):
            kernels.linear(x, w)
        synchronize(device)
        times.append((time.perf_counter() - start) / 10)
    return 2 * rows * wide * out / statistics.median(times)


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def print_profile(events, row, dtype):
    total, shares = sum(event.self_cpu_time_total for event in events), dict.fromkeys(KINDS, 0.0)
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), None)
        if kind:
            shares[kind] += event.self_cpu_time_total / total
    shares["element-wise, copies, autograd, Python"] = 1 - sum(shares.values())
    text = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
    print(f"profile of {row}, {dtype}: {text}", file=sys.stderr)


def theirs(args, _):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.ckpt)
    examples = [tasks.encode_example(example, tokenizer) for example in tasks.load_examples(args.train_file)]
    examples = [pair for pair in examples if len(pair[0]) + len(pair[1]) <= args.max_len]
    random.Random(0).shuffle(examples)
    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype)).to(args.device)
    targets = [f"{name}_proj" for name in ALL.split(",")]
    config = LoraConfig(r=24, lora_alpha=48, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
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
            labels[row, len(prompt) : length] = torch.tensor(response)
        tokens, labels, mask = (tensor.to(args.device) for tensor in (tokens, labels, mask))
        start = time.perf_counter()
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(args.device)
        rates.append(int(mask.sum()) / (time.perf_counter() - start))
    return {"rate": statistics.median(rates[3 if args.steps > 5 else 1 :])}


def parser_of(documentation, **defaults):
    """A parser with an option for each default; ... for one that must be typed."""
    p = argparse.ArgumentParser(description=documentation.split("\n")[0])
    for name, default in defaults.items():
        options = {"default": default, "type": type(default), "help": "default: %(default)s"}
        options = {"required": True} if default is ... else options
        p.add_argument(f"--{name.replace('_', '-')}", **options)
    p.add_argument("--role", default="", help=argparse.SUPPRESS)
    return p


def main():
    sizes = {"rounds": 3, "steps": 12, "batch_size": 8, "max_len": 256, "dtype": "float32,bfloat16", "device": "cpu"}
    p = parser_of(__doc__, ckpt=..., train_file=..., **sizes, rows="; ".join(ROWS))
    p.add_argument("--profile", action="store_true")
    args = p.parse_args()
    if args.role:
        result = (theirs if args.role == "theirs" else ours)(args, args.role)
        print(json.dumps(result | {"peak": peak_mib(args.device)}))
        return
    rows = [row.strip() for row in args.rows.split(";")]
    peer = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
    if not peer:
        print("without the peer: pip install transformers peft")
    print(f"| | dtype | {' | '.join(COLUMNS)} |\n{'|---' * 10}|", flush=True)
    for dtype in args.dtype.split(","):
        roles = ["theirs"] * peer + rows
        rounds = [{role: measure(__file__, role, dtype) for role in roles} for _ in range(args.rounds)]
        for role in roles:
            cells = [cell(rounds, role, *what) for what in COLUMNS.values()]
            label = "transformers + peft LoRA" if role == "theirs" else role
            print(f"| {label} | {dtype} | {' | '.join(cells)} |", flush=True)


def cell(rounds, role, name, form, base=None):
    """The median over the rounds of a row's number, or of its ratio to another row's; empty where one is absent."""
    if name not in rounds[0][role] or base not in (None, *rounds[0]):
        return ""
    return format(statistics.median(r[role][name] / (r[base][name] if base else 1) for r in rounds), form)


def measure(script, role, dtype):
    """The last line that a process of its own prints, read as JSON."""
    command = [sys.executable, script, *sys.argv[1:], "--dtype", dtype, "--role", role]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    sys.stderr.writelines(line + "\n" for line in done.stderr.splitlines() if line.startswith("profile of"))
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
