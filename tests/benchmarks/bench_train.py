"""Training side by side with transformers + peft and with the floor that the hardware sets. One
command, one table.

    python tests/benchmarks/bench_train.py --ckpt checkpoints/smollm2-135m \\
        --train-file data.json [--rounds 3]

The peer is peft's LoRA, rank 24, on all linear layers: the same checkpoint, dtype, prompts and
batch size; examples in random order, padded to the longest of the batch. Ours is `train.py` as it
stands, at its defaults but for what a row says. tokens/s: median over the steps after the first
three, padding not counted. MiB: the process's peak resident set on a CPU, the allocator's peak on a
GPU. Kept: what a forward pass leaves for the backward pass, weights not counted, with the layers
active that were so last. Floor: the FLOPs that a step cannot do without, at the rate of a large
matmul measured in the same process; its share of the time is 1 where nothing else takes any.
--profile adds where the time goes, by kind of operation. Without transformers and peft the peer's
columns stay empty."""

import importlib.util
import random
import statistics
import tempfile

import torch

# common.py is beside this file
from common import encoded_examples, matmul_rate, parse_args, peak_mib, print_table, saved_bytes
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import timer

import rosa
import train
from extras import records
from extras.checkpoints import load_model

PEER = "transformers + peft LoRA"
WARM_UP = 3  # steps that are not measured: the probe of all layers, and compilation
# The name of a row -> options of train.py. A micro-batch is a whole batch at most, so that 1000
# stands for the whole batch
ROWS = {
    PEER: None,
    "RoSA": "",
    "RoSA, one batch at a time": "--micro-batch-size 1000",
    "RoSA without DLS": "--k-ratio 1",
    "RoSA, upper half active": "",
    "RoSA --checkpoint-activations": "--checkpoint-activations",
    "RoSA --compile, one batch at a time": "--compile --micro-batch-size 1000",
    "RoSA --plain": "--plain",
    "LoRA, all linears, rank 24": "--method lora --targets q,k,v,o,gate,up,down --rank 24",
}
RATIOS = {
    "tokens/s / peer": ("tokens/s", PEER),
    "tokens/s / RoSA without DLS": ("tokens/s", "RoSA without DLS"),
    "peak / peer": ("peak MiB", PEER),
}
# An operation belongs to the first kind of which a word is in its name. The last kind takes all
# operations that remain
KINDS = {
    "attention": (
        "scaled_dot_product",
        "CausalAttention",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
    ),
    "matmul": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "norms": ("RMSNorm", "aten::rsqrt", "aten::pow", "aten::mean"),
    "SwiGLU": ("silu", "SwiGLU"),
    "loss": ("softmax", "SummedCrossEntropy", "aten::exp", "scatter", "gather"),
    "rotation": ("aten::roll", "aten::cat", "addcmul", "aten::cos", "aten::sin"),
    "optimiser": ("Optimizer", "_foreach"),
    "element-wise, copies, autograd, Python": ("",),
}


def main(arguments=None):
    sizes = {
        "rounds": 3,
        "steps": 12,
        "batch_size": 8,
        "max_len": 256,
        "dtype": "float32,bfloat16",
        "device": "cpu",
    }
    choice = {"rows": "; ".join(ROWS), "profile": False}
    args = parse_args(__doc__, arguments, ckpt="data/tiny", train_file="", **sizes, **choice)
    rows = [row for row in args.rows.split("; ") if row != PEER or importlib.util.find_spec("peft")]
    print_table(args, rows, measure, RATIOS)


def measure(args, row):
    if row == PEER:
        return measure_peer(args)
    if row == "RoSA, upper half active":
        rosa.LayerSelector = UpperHalf
    # The model is loaded here, and not by train.py, because it is measured after the run too
    model = load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    train.load_model = lambda *_, **__: model
    options = {
        "--ckpt": args.ckpt,
        "--train-file": args.train_file,
        "--out": tempfile.mkdtemp(),
        "--dtype": args.dtype,
    }
    options |= {"--device": args.device, "--batch-size": args.batch_size, "--max-len": args.max_len}
    options |= {"--max-steps": args.steps, "--val-size": 8}
    options = train.parse_args(
        [str(word) for option in options.items() for word in option] + ROWS[row].split()
    )
    before = matmul_rate(args.dtype, args.device)
    with torch.autograd.profiler.profile(enabled=args.profile) as profile:
        train.main(options)
    rate = statistics.median([before, matmul_rate(args.dtype, args.device)])
    log = records.steps_of(records.read_log(options.out / "log.jsonl"))[WARM_UP:]
    batch = encoded_examples(args)[: args.batch_size]
    micro_batch, *_ = train.own_micro_batches(batch, options.micro_batch_size)
    tokens, labels = train.collate(micro_batch, model.device)
    results = {
        "peak MiB": peak_mib(args.device),
        "tokens/s": statistics.median(step["tokens"] / step["seconds"] for step in log),
        "last loss": log[-1]["loss"],
        "kept, KiB a token": saved_bytes(model, tokens, labels) / tokens.numel() / 2**10,
        "share of floor": statistics.median(
            floor_flops(args, model, step) / rate / step["seconds"] for step in log
        ),
    }
    return results | (time_shares(profile.key_averages()) if args.profile else {})


class UpperHalf(rosa.LayerSelector):
    """A selector in which the upper layers are active, whatever the probe says."""

    def activate(self, layers):
        upper = range(len(self.parameters))[-self.count :]
        super().activate(layers if self.probing and len(layers) > self.count else upper)


def floor_flops(args, model, step):
    """FLOPs of an optimiser step on its real tokens: 2 per weight forward; backward 2 through the
    frozen weights from the lowest active layer up, and another 2 for what trains; causal attention;
    the vocabulary where something is predicted (half)."""
    config, layers = model.config, len(model.model.layers)
    weights = sum(
        m.weight.numel() for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)
    )
    adapters = (
        sum(adapter.A.numel() + adapter.B.numel() for adapter in rosa.adapters(model).values())
        / layers
    )
    length = step["tokens"] / args.batch_size
    # Q K^T and P V, which causal attention computes for half of the square
    attention = 2 * length * config.num_attention_heads * config.head_dim
    below, active = layers - min(step["active_layers"]), len(step["active_layers"])
    forward = layers * (2 * weights + attention + 2 * adapters)
    backward = below * (2 * weights + 2.5 * attention + 2 * adapters) + active * 2 * adapters
    return step["tokens"] * (forward + backward + 4 * model.lm_head.weight.numel() * 0.5)


def time_shares(events):
    total, shares = sum(event.self_cpu_time_total for event in events), dict.fromkeys(KINDS, 0.0)
    for event in events:
        kind = next(
            kind for kind, words in KINDS.items() if any(word in event.key for word in words)
        )
        shares[kind] += event.self_cpu_time_total / total
    return shares


def measure_peer(args):
    from transformers import AutoModelForCausalLM

    examples = encoded_examples(args)
    random.Random(0).shuffle(examples)
    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype))
    rates = train_peer(args, model.to(args.device), examples)
    return {"tokens/s": statistics.median(rates[WARM_UP:]), "peak MiB": peak_mib(args.device)}


def train_peer(args, model, examples):
    """Train peft's LoRA of rank 24 on all linear layers of a model of transformers. Returns the
    tokens/s of each step."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=24, lora_alpha=48, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    rates = []
    for step in range(args.steps):
        first = step * args.batch_size
        batch = [examples[i % len(examples)] for i in range(first, first + args.batch_size)]
        rows = [torch.tensor(prompt + response) for prompt, response in batch]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in batch]
        tokens = pad_sequence(rows, batch_first=True).to(args.device)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(args.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        start = timer()
        outputs = model(input_ids=tokens, attention_mask=mask.to(args.device), labels=labels)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(map(len, rows)) / (timer() - start))
    return rates


if __name__ == "__main__":
    main()
