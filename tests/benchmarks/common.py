"""What the benchmarks share: options, processes, and the table. Each measurement is a process of
its own; the rows of a table take turns, round after round; it shows medians over the rounds, for
ratios the median of those within a round."""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import tasks  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from extras.operators import Operators, linear  # noqa: E402


def parse_args(documentation, arguments, **defaults):
    """The options of a benchmark, one for each default; False: one that takes no value."""
    parser = argparse.ArgumentParser(description=documentation.split("\n")[0])
    for name, default in defaults.items():
        kind = (
            {"action": "store_true"}
            if default is False
            else {"type": type(default), "default": default}
        )
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help=f"default: {default}")
    return parser.parse_args(arguments)


def print_table(args, rows, measure, ratios):
    """measure(args, row) returns {heading: number}, of which one row may have other ones than
    another. ratios: further headings -> (the heading of a number, the row whose number it is
    divided by)."""
    headings = []
    for dtype in args.dtype.split(","):
        args.dtype = dtype
        rounds = [
            {row: in_own_process(measure, args, row) for row in rows} for _ in range(args.rounds)
        ]
        if not headings:
            headings = [
                *dict.fromkeys(heading for row in rows for heading in rounds[0][row]),
                *ratios,
            ]
            print(f"| | dtype | {' | '.join(headings)} |\n{'|---' * (2 + len(headings))}|")
        for row in rows:
            cells = [cell(rounds, row, *ratios.get(heading, (heading,))) for heading in headings]
            print(f"| {row} | {dtype} | {' | '.join(cells)} |", flush=True)


def cell(rounds, row, heading, base=None):
    """Empty where there is no such number, or no such row to divide it by."""
    if heading not in rounds[0][row] or base not in (None, *rounds[0]):
        return ""
    numbers = [
        results[row][heading] / (results[base][heading] if base else 1) for results in rounds
    ]
    median = statistics.median(numbers)
    return f"{median:,.0f}" if median >= 100 else f"{median:.4g}"


def in_own_process(function, *arguments, **options):
    """What function(*arguments, **options) returns, or raises. What it prints is not shown."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=silence
    ) as executor:
        return executor.submit(function, *arguments, **options).result()


def silence():
    for descriptor in (1, 2):  # of C++ too
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# --- what is measured ---


def timer_of(call):
    """torch's own timer of call(), which calls it twice before, and waits for a GPU."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def peak_mib(device):
    """The allocator's peak on a GPU, on a CPU the process's peak resident set, which Linux gives in
    KiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def matmul_rate(dtype, device):
    """FLOP/s of the kernel of linear layers: 1,024 tokens, 1,536 x 576 weights; on a GPU 8,192 and
    4,096 x 4,096."""
    Operators.look_up()
    rows, wide, out = (1024, 576, 1536) if device == "cpu" else (8192, 4096, 4096)
    x, w = (torch.randn(n, wide, dtype=getattr(torch, dtype), device=device) for n in (rows, out))
    return (
        2
        * rows
        * wide
        * out
        / timer_of(lambda: linear(x, w)).blocked_autorange(min_run_time=1).median
    )


def saved_bytes(model, tokens, labels):
    """What autograd saves of model.loss for the backward pass: each storage counts once, the
    model's own not at all."""
    weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if not tensor.is_mkldnn and (storage := tensor.untyped_storage()).data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(tokens, labels)
    return sum(sizes.values())


def encoded_examples(args):
    """(prompt ids, response ids) of the examples in --train-file, or of the toy task, that
    --max-len admits."""
    tokenizer = load_tokenizer(args.ckpt)
    pairs = [
        tasks.encode_example(example, tokenizer)
        for _, example in tasks.train_examples("toy", "", args.train_file)
    ]
    return [
        (prompt, response)
        for prompt, response in pairs
        if len(prompt) + len(response) <= args.max_len
    ]
