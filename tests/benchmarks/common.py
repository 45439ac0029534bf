"""What the benchmarks share: options, processes, and the table.

Each measurement runs in a new process. The rows of a table take turns, round after round. The table
shows medians over the rounds; a ratio is computed within each round, and its median is shown."""

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
    """Parse the options of a benchmark. Each default stands for an option; a default of False
    stands for an option that takes no value."""
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
    """Measure each row and print the table. measure(args, row) returns {heading: number}; the rows
    may have different headings. ratios: further headings -> (the heading of a number, the row by
    whose number it is divided). Where a row fails, a line says why, and its cells are empty."""
    headings = []
    for dtype in args.dtype.split(","):
        args.dtype = dtype
        rounds = []
        for _ in range(args.rounds):
            rounds.append({row: measured(measure, args, row) for row in rows})
        if not headings:
            of_rows = (heading for row in rows for heading in rounds[0][row])
            headings = [*dict.fromkeys(of_rows), *ratios]
            print(f"| | dtype | {' | '.join(headings)} |\n{'|---' * (2 + len(headings))}|")
        for row in rows:
            cells = [cell(rounds, row, *ratios.get(heading, (heading,))) for heading in headings]
            print(f"| {row} | {dtype} | {' | '.join(cells)} |", flush=True)


def measured(measure, args, row):
    try:
        return in_own_process(measure, args, row)
    except Exception as error:  # whatever it was, the other rows are measured
        print(f"{row}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        return {}


def cell(rounds, row, heading, base=None):
    """The text of one cell: the median over the rounds that have its number. It is empty where no
    round has."""
    numbers = []
    for results in rounds:
        number = results[row].get(heading)
        divisor = results.get(base, {}).get(heading) if base else 1
        if number is not None and divisor is not None:
            numbers.append(number / divisor)
    if not numbers:
        return ""
    median = statistics.median(numbers)
    return f"{median:,.0f}" if median >= 100 else f"{median:.4g}"


def in_own_process(function, *arguments, **options):
    """Call function(*arguments, **options) in a new process. Returns what the call returns, or
    raises what it raises. What it prints is not shown."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=silence
    ) as executor:
        return executor.submit(function, *arguments, **options).result()


def silence():
    for descriptor in (1, 2):  # replacing these silences what C++ prints too
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# --- what is measured ---


def timer_of(call):
    """torch's timer of call(). It calls call() twice before it measures, and waits for a GPU."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def peak_mib(device):
    """On a GPU the peak of the allocator, on a CPU the peak resident set of the process. Linux
    gives the resident set in KiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def matmul_rate(dtype, device):
    """The FLOP/s that the kernel of linear layers reaches: on a CPU with 1,024 tokens and 1,536 x
    576 weights, on a GPU with 8,192 tokens and 4,096 x 4,096 weights."""
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
    """How many bytes autograd saves of model.loss for the backward pass. Each storage counts once,
    the weights of the model do not count."""
    weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if not tensor.is_mkldnn and (storage := tensor.untyped_storage()).data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(tokens, labels)
    return sum(sizes.values())


def encoded_examples(args):
    """The examples in --train-file, or of the toy task, that are no longer than --max-len, as
    (prompt ids, response ids)."""
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
