"""What a run of train.py will need of memory, said before the model is loaded; and where memory ran
out.
A run that is too large is seen in its first line, with the options that make it smaller; one that
ran out of memory ends in one line that says in which line of code and at which sizes.
Without it: watch the memory, and read the traceback.
"""

import contextlib
import os
import re
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

import rosa
from extras.checkpoints import computes_bfloat16, unloaded
from extras.distributed import evenly, fitting, processes
from extras.kernels import SummedCrossEntropy
from extras.quantize import is_quantized
from extras.source import is_library

# --- before ---


class Need(NamedTuple):
    """What a run needs, in bytes."""

    program: int  # Python and PyTorch; on a GPU nothing, since it is not in the GPU's memory
    weights: int
    trained: int  # what trains: parameters, gradients and AdamW's two moments, in float32
    activations: int  # at the largest micro-batch: what the backward pass needs, and works with

    @property
    def total(self):
        return sum(self)


def need(model, options, shape, device):
    """The Need of a run.

    model: of which the shapes count alone (`unloaded`); options: those of train.py by name, with a
    dtype that is not "auto"; shape: the Shape of its largest micro-batch; device: a
    torch.device."""
    itemsize = getattr(torch, options["dtype"]).itemsize
    weights = 0
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        size = itemsize
        can_be_int8 = leaf == "weight" and is_quantized(path, model.get_submodule(path))
        if options["quantize"] and can_be_int8:
            size = 1
        weights += parameter.numel() * size
    # A parameter that trains, its gradient and two moments, of 4 bytes each. With --method full the
    # first of the four are the weights, and counted there.
    trained = 16 * count_trained(model, options)
    if options["method"] == "full":
        trained -= weights
    if options["shard"]:
        weights //= processes()[1]
    program = PROGRAM if device.type == "cpu" else 0
    return Need(program, weights, trained, activations(model.config, options, shape, device))


# The resident set of a process that has trained a tiny model with this project's files: Python,
# PyTorch with its threads, a tokenizer.
PROGRAM = 450 * 2**20


def count_trained(model, options):
    """How many parameters train. Those of a method of the package peft are not known before it has
    attached them: they are counted as 0."""
    if options["method"] == "full":
        return sum(parameter.numel() for parameter in model.parameters())
    if options["method"] not in ("rosa", "lora"):
        return 0
    trained = 0
    for layer in model.model.layers:
        for target in set(options["targets"].split(",")):
            linear = layer.get_submodule(rosa.TARGETS[target])
            rows = linear.out_features
            if options["method"] == "rosa" and target in ("q", "k") and options["pairs"] != "all":
                num_heads = rows // model.config.head_dim
                rows = len(rosa.adapted_rows(rows, num_heads, options["low_freq_ratio"]))
            trained += options["rank"] * (linear.in_features + rows)
    return trained


class Shape(NamedTuple):
    """The largest micro-batch of a run."""

    rows: int
    length: int  # tokens of a row
    computed: int  # tokens for which layers compute: what all rows begin with counts once


def largest_micro_batch(config, options, lengths, shared, device):
    """The Shape of the micro-batch that needs most memory, where examples have these lengths, and
    all begin with `shared` tokens. Of micro-batches of equally many tokens it is the one with the
    longest rows, since a token keeps a probability for each token of its row."""
    is_shared = not any(options[name] for name in KEEP_WHOLE)
    shapes = []
    for length in set(lengths):
        size = options["micro_batch_size"] or fitting(length, shared)
        _, rows = evenly(options["batch_size"], size)
        computed = rows * length
        if is_shared:
            computed -= (rows - 1) * shared
        shapes.append(Shape(rows, length, computed))
    return max(shapes, key=lambda shape: (activations(config, options, shape, device), shape))


KEEP_WHOLE = ("plain", "compile", "shard", "checkpoint_activations")  # nothing is shared with these
# On a CPU what is freed between two tensors that stay leaves a hole, and not all holes are filled
# again: the C library holds more than is in use. How many times as much was measured by
# tests/benchmarks/bench_memory.py.
HELD = 1.45
HELD_PLAIN = 1.1  # with --plain
# With --checkpoint-activations, by the bytes of a number: float32, and bfloat16 or float16
HELD_RECOMPUTED = {4: 3.2, 2: 1.6}


def activations(config, options, shape, device):
    """What autograd keeps of a forward pass, and what the passes work with, in bytes.

    At a probe of DLS gradients reach every layer, whichever layers train between the probes."""
    itemsize = getattr(torch, options["dtype"]).itemsize
    layers, D = config.num_hidden_layers, config.hidden_size
    wide = config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    targets = set(rosa.TARGETS)
    if options["method"] in ("rosa", "lora"):
        targets = set(options["targets"].split(","))

    # Numbers that one token keeps in a layer.
    kept = 2 * D + queries + 2 * keys + 2 * wide  # the input of both norms; q, k, v; gate, up
    kept += config.num_attention_heads * shape.length  # a row of probabilities a head
    if {"q", "k", "v"} & targets:
        kept += D  # their input
    if {"gate", "up"} & targets:
        kept += D
    kept += queries * ("o" in targets) + wide * ("down" in targets)
    # What an adapter frees at once: the output of its linear layer, and its update.
    widths = {"q": queries, "k": keys, "v": keys, "o": D, "gate": wide, "up": wide, "down": D}
    freed = 2 * sum(widths[target] for target in targets)
    if options["method"] == "full":
        freed = 0  # it has no adapters
    if options["plain"]:
        kept += 4 * D + wide
    per_token = layers * itemsize * kept
    if options["checkpoint_activations"]:
        # Each layer keeps its input alone, and one at a time keeps all.
        per_token = layers * itemsize * D + itemsize * kept
    per_token += 4 * 4 * wide  # the widest tensors of a layer and their gradients, in float32
    all_logits = shape.rows * shape.length * config.vocab_size
    logits = all_logits if options["plain"] else min(all_logits, SummedCrossEntropy.SLICE)
    needed = shape.computed * per_token + 3 * 4 * logits  # float32: with their gradient, and a copy
    if device.type != "cpu":
        return needed
    if options["plain"]:
        return int(HELD_PLAIN * needed)
    if options["checkpoint_activations"]:
        return int(HELD_RECOMPUTED[itemsize] * needed)
    return int(HELD * needed) + shape.computed * layers * itemsize * freed


def say_what_is_needed(args, ckpt, examples, device):
    """Print what a run of train.py will need of memory; and, where less is free, which options
    would help. examples: pairs (prompt ids, response ids)."""
    model = unloaded(ckpt)
    options = vars(args)
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    shared = len(os.path.commonprefix([prompt for prompt, _ in examples]))
    shape = largest_micro_batch(model.config, options, lengths, shared, device)
    needed = need(model, options, shape, device)
    parts = [f"weights {gigabytes(needed.weights)}"]
    if needed.trained:
        parts.append(f"what trains and its optimiser {gigabytes(needed.trained)}")
    else:  # a method of the package peft
        parts.append("what trains is not counted")
    size = f"{shape.rows} x {shape.length} tokens"
    parts.append(f"activations {gigabytes(needed.activations)} ({size})")
    if needed.program:
        parts.append(f"the program {gigabytes(needed.program)}")
    count = processes()[1]
    each = f" in each of {count} processes" if count > 1 else ""
    line = f"memory     about {gigabytes(needed.total)} GB{each}: {', '.join(parts)}"
    free = free_memory(device)
    if free is not None and free < needed.total:
        line += f"; only {gigabytes(free)} GB are free"
        if helpful := what_helps(model, options, lengths, shared, device):
            line += f": {helpful}"
    print(line)


def gigabytes(number):
    return f"{number / 1e9:.1f}" if number < 1e11 else f"{number / 1e9:.0f}"


def what_helps(model, options, lengths, shared, device):
    """The two options that save most, with what would be needed then, in words."""

    def largest(options):
        return largest_micro_batch(model.config, options, lengths, shared, device)

    def total(options):
        return need(model, options, largest(options), device).total

    rows = largest(options).rows
    changes = {}
    if not options["shard"]:
        changes["--checkpoint-activations"] = {"checkpoint_activations": True}
        if options["method"] != "full":
            changes["--quantize int8"] = {"quantize": "int8"}
    fewer = [n for n in range(1, rows // 2 + 1) if options["batch_size"] % n == 0]
    if fewer:
        changes[f"--micro-batch-size {fewer[-1]}"] = {"micro_batch_size": fewer[-1]}
    if options["dtype"] == "float32" and options["method"] != "full" and computes_bfloat16(device):
        changes["--dtype bfloat16"] = {"dtype": "bfloat16"}
    totals = {option: total(options | change) for option, change in changes.items()}
    totals = {option: size for option, size in totals.items() if size < total(options)}
    best = sorted(totals, key=totals.get)[:2]
    return ", ".join(f"with {option} about {gigabytes(totals[option])}" for option in best)


def free_memory(device):
    """How many bytes can be had: of a GPU, or of the machine, or of the part of it that a container
    may use. None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [free_in_container(*files) for files in CONTAINERS]
    with contextlib.suppress(OSError, ValueError):
        (kilobytes,) = re.findall(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())
        found.append(1024 * int(kilobytes))
    return min((number for number in found if number is not None), default=None)


MEMINFO = Path("/proc/meminfo")
# The files of a container, in both versions of Linux' control groups: its limit, what it uses, and
# its statistics. These say how much of what it uses is copies of files, which can be dropped.
CONTAINERS = (
    tuple(Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(
        Path("/sys/fs/cgroup/memory", f"memory.{name}")
        for name in ("limit_in_bytes", "usage_in_bytes", "stat")
    ),
)


def free_in_container(limit, usage, statistics):
    """How many bytes a container may still take; None where there is no limit."""
    try:
        free = int(limit.read_text()) - int(usage.read_text())  # the limit may be "max"
        files = re.search(r"^(?:total_)?inactive_file (\d+)", statistics.read_text(), re.M)
    except (OSError, ValueError):
        return None
    if files:
        free += int(files[1])
    return free


# --- while it runs ---

# oneDNN and PyTorch's layer above it each keep what they have prepared for a product, 0.3 MB for
# each of the last 1,024 shapes. Nearly every micro-batch has a dozen new shapes, so a run grew by
# 6 MB with each. To prepare one again takes 2 ms. Both read these numbers at the first product.
for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(capacity, "64")


# --- after ---


def ran_out(error):
    """Whether an exception says that there is no memory left: PyTorch's on a GPU, its allocator's
    on a CPU, or Python's own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(NO_MEMORY.search(str(error)))


NO_MEMORY = re.compile("DefaultCPUAllocator: |not enough memory|[Cc]annot allocate memory")
# The functions by whose calls a phase of train.py or eval.py is known
PHASES = {
    "load_model": "while the model was loaded",
    "validate": "in validation",
    "generate_responses": "in generation",
    "answer_prompt": "in generation",
    "choose_options": "in scoring options",
}


def where_it_ran_out(error):
    """(the phase, the size of what was computed as (rows, tokens) or None, the innermost line that
    is not a library's) of an exception, as far as its traceback shows them."""
    phase = size = place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, values = frame.f_code, frame.f_locals
        if is_library(code.co_filename):
            continue
        place = f"{Path(code.co_filename).name}:{line}, {code.co_qualname}"
        if code.co_name in PHASES:
            phase, size = PHASES[code.co_name], None
        # The loop of train.py has these names.
        if code.co_name == "main" and "batch" in values and "step" in values:
            phase = f"in step {values['step'] + 1}"
        tokens = values.get("tokens")
        if size is None and isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
            size = tuple(tokens.shape)
        if code.co_name == "stream" and "num_slots" in values:
            longest = max(map(len, values["prompts"])) + values["max_new_tokens"]
            size = values["num_slots"], longest
    return phase, size, place


def out_of_memory(error, args, last_sentence):
    """One line about an exception for which `ran_out`: where, at which size, and what to type.

    args: the arguments of the script, or None. last_sentence: how to go on, which is left out where
    nothing has begun."""
    phase, size, place = where_it_ran_out(error)
    line = f"out of memory {phase or ''}".rstrip()
    if size:
        line += f", at {size[0]} x {size[1]} tokens"
    if place:
        line += f" ({place})"
    if advice := smaller(vars(args) if args else {}, phase, size):
        line += f": {advice}"
    if last_sentence and phase != PHASES["load_model"]:
        line += f". {last_sentence}"
    return line


def smaller(options, phase, size):
    """What to type for a run that needs less memory, in words."""
    advice = []
    rows, tokens = size or (1, 0)
    trains = "micro_batch_size" in options
    if trains and phase != PHASES["load_model"]:
        fewer = [n for n in range(1, rows // 2 + 1) if options["batch_size"] % n == 0]
        if fewer:
            advice.append(f"--micro-batch-size {fewer[-1]}")
        can_recompute = not options["checkpoint_activations"] and not options["shard"]
        if can_recompute and phase != PHASES["validate"]:
            advice.append("--checkpoint-activations")
    if "score" in options and rows > 1 and phase != PHASES["load_model"]:
        advice.append(f"--batch-size {rows // 2}")
    can_quantize = "quantize" in options and not options["quantize"]
    if can_quantize and options.get("method") != "full" and not options.get("shard"):
        advice.append("--quantize int8 in a new run" if trains else "--quantize int8")
    if not advice and trains and tokens > 1:
        advice.append(f"a smaller --max-len than {options['max_len']}, in a new run")
    return f"try {' or '.join(advice)}" if advice else ""
