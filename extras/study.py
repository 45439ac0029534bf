"""Many runs of train.py by a plan: methods at equal size, each at its own best learning rate,
compared by pairs of runs.
Whether one method is better than another is said with an interval, and every run is in the report.
Without it: run train.py by hand for each method, rate and seed, and hope to have forgotten none.

    python -m extras.study tests/study/llama2-7b.toml --data-dir LLM-Adapters --dry-run
    python -m extras.study tests/study/llama2-7b.toml --data-dir LLM-Adapters

A plan is a TOML file such as that one; class Plan below says what its keys are. Of each method the
runs with the plan's `tuning_seed` find the learning rate: the one with the lowest validation loss
at the last step. While that is the lowest or the highest rate tried, the next one beyond it is
tried too. Then the runs with the other `seeds` are made at this rate. A finished run is a line in a
file .jsonl beside the plan. Ctrl-C ends the study after the step that is being computed; the same
command goes on with it. Several runs at a time: --device cuda:0,cuda:1 makes one on each of two
GPUs, --device cpu,cpu two that share the cores. Let one study of a plan run at a time."""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import torch

import train
from data.errors import UserError, read_text, user_file
from extras.checkpoints import choose_device_and_dtype, find_checkpoint, read_json, unloaded
from extras.commands import Stop, command_parser, run_script
from extras.compare import ABSENT, table
from extras.memory import count_trained
from extras.records import (
    hash_of,
    line_of,
    make_writable,
    read_log,
    steps_of,
    write_log,
    write_whole,
)
from extras.runs import code_of

TRAIN = Path(train.__file__)

# Student's t for a two-sided interval of 95 per cent, by degrees of freedom: one less than the
# number of pairs.
STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}


class Plan(NamedTuple):
    models: list  # checkpoints, as --ckpt takes them
    tasks: dict  # name -> options of train.py
    methods: dict  # name -> options of train.py
    baselines: list  # the methods with which all others are compared
    options: str  # of every run
    rates: list  # learning rates, of which each is 10^0.5 times the one before
    tuning_seed: int
    seeds: list
    unequal: list = []  # methods that may have another number of trainable parameters


class Cell(NamedTuple):
    """One run of a study."""

    model: str
    task: str
    method: str
    lr: float
    seed: int


class Running(NamedTuple):
    """A run that is being made."""

    process: subprocess.Popen  # train.py
    out: Path
    device: str
    start: float  # seconds, time.monotonic


# --- the plan ---


def read_plan(path):
    """The Plan in a TOML file. Raises UserError."""
    try:
        read = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    for name in read:
        if name not in Plan._fields:
            raise UserError(f"{path}: unknown key {name!r}: choose from {', '.join(Plan._fields)}")
    for name in Plan._fields:
        if name not in read and name not in Plan._field_defaults:
            raise UserError(f"{path}: the key {name!r} is missing")
    for name, value in read.items():
        kind = Plan.__annotations__[name]
        if not isinstance(value, kind):
            words = {list: "list", dict: "table", str: "text", int: "whole number"}
            raise UserError(f"{path}: {name} must be a {words[kind]}")
    plan = Plan(**read)
    try:
        check_plan(plan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan


# Options that a plan has keys for, or that depend on the machine.
NOT_IN_A_PLAN = (
    *("--ckpt", "--lr", "--seed", "--out", "--device", "--data-dir"),
    *("--resume", "--overwrite", "--help", "-h"),
)


def check_plan(plan):
    """Raise UserError, with what is wrong, where a plan cannot be run."""
    names = [*plan.models, *plan.baselines, *plan.unequal]
    options = [plan.options, *plan.tasks.values(), *plan.methods.values()]
    if not all(isinstance(text, str) for text in names + options):
        raise UserError("the names, and the options of tasks and methods, must be texts")
    if not all(isinstance(rate, (int, float)) and rate > 0 for rate in plan.rates):
        raise UserError("rates must be positive numbers")
    if not all(isinstance(seed, int) for seed in plan.seeds):
        raise UserError("seeds must be whole numbers")
    for text in options:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{text!r}: {error}") from None
        for word in words:
            if is_none_of_a_plan(word):
                raise UserError(
                    f"{text!r} has {word}, which belongs into another key or to the machine"
                )

    for name in (*plan.baselines, *plan.unequal):
        if name not in plan.methods:
            raise UserError(f"{name} is none of the methods: {', '.join(plan.methods)}")
    if not plan.baselines:
        raise UserError("baselines names no method")
    if len(plan.rates) < 4:
        raise UserError("rates has fewer than four learning rates")
    for low, high in zip(plan.rates, plan.rates[1:]):
        if not 3.1 < high / low < 3.3:
            raise UserError("rates must rise by factors of 10^0.5, as 1e-3, 3.16e-3, 1e-2 do")
    if plan.tuning_seed in plan.seeds:
        raise UserError(
            f"tuning_seed {plan.tuning_seed} is among the seeds: what chose the rate cannot judge"
        )
    if len(set(plan.seeds)) < len(plan.seeds):
        raise UserError("seeds has a number twice")
    most = 1 + len(STUDENT)
    if not 2 <= len(plan.seeds) <= most:
        raise UserError(f"seeds must be 2 to {most} numbers")

    # A run of each method and seed, at one rate, shows whether train.py takes the options.
    cells = []
    for group in groups(plan):
        cells += [Cell(*group, plan.rates[0], seed) for seed in (plan.tuning_seed, *plan.seeds)]
    if not cells:
        raise UserError("models, tasks and methods must not be empty")
    for cell in cells:
        try:
            args = train.parse_args(options_of(plan, cell))
        except UserError as error:
            raise UserError(f"{cell.method} on {cell.task}: {error}") from None
        if args.dtype == "auto":
            raise UserError(
                "options must say the --dtype, since auto is not the same on all machines"
            )
    if len({shlex.join(options_of(plan, cell)) for cell in cells}) < len(cells):
        raise UserError("two models, tasks or methods have the same options")


def is_none_of_a_plan(word):
    """Whether a word of a plan's options is one of NOT_IN_A_PLAN, or short for it: argparse takes
    --ckp for --ckpt."""
    option = word.split("=")[0]
    is_short = len(option) > 2 and option.startswith("--")
    return any(option == name or (is_short and name.startswith(option)) for name in NOT_IN_A_PLAN)


def groups(plan):
    """Yield (model, task, method): every combination."""
    for model in plan.models:
        for task in plan.tasks:
            for method in plan.methods:
                yield model, task, method


def options_of(plan, cell):
    """The options of train.py that belong to a cell, whatever the machine."""
    words = ["--ckpt", cell.model]
    for text in (plan.tasks[cell.task], plan.options, plan.methods[cell.method]):
        words += shlex.split(text)
    return [*words, "--lr", f"{cell.lr:g}", "--seed", str(cell.seed)]


def directory_of(plan, cell):
    """The name of a cell's run directory. With other options it is another one."""
    name = f"{Path(cell.model).name} {cell.task} {cell.method} lr {cell.lr:g} seed {cell.seed}"
    which = hash_of(options_of(plan, cell))[:6]
    return re.sub(r"[^\w.]+", "-", f"{name} {which}")


def check_sizes(plan, done):
    """Raise UserError where methods of a plan train numbers of parameters that differ by more than
    2 per cent. For a method of the package peft the number is known only after its first run."""
    for model in plan.models:
        shapes = unloaded(find_checkpoint(model))
        sizes = {}  # (task, method) -> number
        for its_model, task, method in groups(plan):
            if its_model == model and method not in plan.unequal:
                cell = Cell(model, task, method, plan.rates[0], plan.tuning_seed)
                options = vars(train.parse_args(options_of(plan, cell)))
                sizes[task, method] = count_trained(shapes, options)
        for cell, record in done.items():
            key = cell.task, cell.method
            if cell.model == model and key in sizes and record["trainable"]:
                sizes[key] = record["trainable"]
        known = [size for size in sizes.values() if size]
        if known and max(known) > 1.02 * min(known):
            counts = [f"{method} {size:,}" for (_, method), size in sizes.items() if size]
            raise UserError(
                f"the methods train different numbers of parameters of {model}: "
                f"{', '.join(dict.fromkeys(counts))}: change --rank until they are within 2 per "
                "cent, or name a method under unequal"
            )


# --- which runs ---


def read_done(path, plan):
    """The runs in a study's .jsonl: (those of the plan as it is now, as Cell -> record; the records
    of all others). Raises UserError."""
    done = {}
    others = []
    records = read_log(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(records) < len(lines) - 1:  # a kill may have cut the last line, but no other
        raise UserError(f"{path}, line {len(records) + 1} is no run of a study: delete it")
    for record in records:
        try:
            cell = Cell(*(record[name] for name in Cell._fields))
            if is_of_plan(plan, cell) and record["options"] == shlex.join(options_of(plan, cell)):
                done[cell] = record
            else:
                others.append(record)
        except (KeyError, TypeError):
            raise UserError(f"{path}: this line is no run of a study: {record}") from None
    check_pairs(path, done)
    return done, others


def is_of_plan(plan, cell):
    """Whether a plan may have asked for a cell. Rates beyond those of the plan are a power of ten
    from one of them."""
    rates = set()
    for rate in plan.rates:
        rates |= {float(f"{rate * 10**power:g}") for power in range(-3, 4)}
    is_its_seed = cell.seed in (plan.tuning_seed, *plan.seeds)
    return cell[:3] in groups(plan) and is_its_seed and cell.lr in rates


def check_pairs(path, done):
    """Raise UserError where runs of one seed had other examples, or another checkpoint. In another
    --data-dir a file of the same name may hold others."""
    first = {}
    for cell, record in done.items():
        own = cell.model, cell.task, cell.seed
        other = first.setdefault(own, record)
        if record["seen"] != other["seen"]:
            raise UserError(
                f"{path}: {cell.method} and {other['method']}, seed {cell.seed}, had different "
                "examples or checkpoints: delete the lines of one of them"
            )


def made_by_other_code(plan, done):
    """How many runs were made by other code than there is now."""
    now = {}  # (model, task, method) -> the code, which is the same for all rates and seeds
    edited = 0
    for cell, record in done.items():
        if cell[:3] not in now:
            now[cell[:3]] = code_now(plan, cell)
        edited += record["code"] != now[cell[:3]]
    return edited


def code_now(plan, cell):
    """What stands for the code that a run of a cell depends on."""
    return hash_of(code_of(train.parse_args(options_of(plan, cell))))


def tuning_losses(plan, done, group):
    """Learning rate -> validation loss of the finished runs with the tuning seed."""
    losses = {}
    for cell, record in done.items():
        if cell[:3] == group and cell.seed == plan.tuning_seed:
            losses[cell.lr] = record["val_loss"]
    return dict(sorted(losses.items()))


def best_rate(losses):
    """The learning rate of the lowest loss; None where every run diverged, which is a loss of
    None."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=finite.get) if finite else None


MOST_BEYOND = 6  # so many rates beyond the plan's are tried at most


def rates_to_try(rates, losses):
    """The learning rates that have to be tried before the best one is known.

    rates: those of the plan; losses: learning rate -> loss, what has been tried already."""
    missing = [rate for rate in rates if rate not in losses]
    if missing or len(losses) >= len(rates) + MOST_BEYOND:
        return missing
    tried = sorted(losses)
    best = best_rate(losses)
    # Two steps of 10^0.5 are a factor of 10, so that 3.16e-3 is followed by 1e-2, not by 9.99e-3.
    if best == tried[0]:
        return [float(f"{tried[1] / 10:g}")]
    if best == tried[-1]:
        return [float(f"{tried[-2] * 10:g}")]
    return []


def chosen_rate(plan, done, group):
    """The learning rate of a method; None where it is not known yet, or where all have diverged."""
    losses = tuning_losses(plan, done, group)
    return None if rates_to_try(plan.rates, losses) else best_rate(losses)


def open_cells(plan, done):
    """The cells that can be run now, the methods in turn: first the rates, then the seeds of those
    methods whose rate is known."""
    tuning = []  # pairs (how many runs of its method come before it, cell)
    final = []
    for group in groups(plan):
        losses = tuning_losses(plan, done, group)
        for turn, rate in enumerate(rates_to_try(plan.rates, losses), len(losses)):
            tuning.append((turn, Cell(*group, rate, plan.tuning_seed)))
        rate = chosen_rate(plan, done, group)
        if rate is not None:
            for turn, seed in enumerate(plan.seeds):
                final.append((turn, Cell(*group, rate, seed)))
    in_turn = [*sorted(tuning, key=by_turn), *sorted(final, key=by_turn)]
    return [cell for _, cell in in_turn if cell not in done]


def by_turn(pair):
    turn, _ = pair
    return turn


def what_remains(plan, done):
    """How many runs and hours remain, in words, as far as is known: the rates may become more."""
    counts = dict.fromkeys(groups(plan), 0)
    untuned = set()
    for cell in open_cells(plan, done):
        counts[cell[:3]] += 1
        if cell.seed == plan.tuning_seed:
            untuned.add(cell[:3])
    for group in untuned:
        counts[group] += len(plan.seeds)
    line = f"{len(done)} runs are done, {sum(counts.values())} remain"
    if not done:
        return f"{line}; the first of them will show how long they take"
    of_all = []  # minutes of a run
    minutes = {}  # (model, task, method) -> those of its runs
    for cell, record in done.items():
        of_all.append(record["minutes"] / record.get("at_a_time", 1))
        minutes.setdefault(cell[:3], []).append(of_all[-1])
    total = 0
    for group, number in counts.items():
        total += number * statistics.median(minutes.get(group, of_all))
    if total < 60:
        return f"{line}, about {total:.0f} minutes"
    return f"{line}, about {total / 60:.1f} hours"


# --- the runs ---


def make_runs(plan, path, done, runs, devices, options):
    """Make the runs that remain, one at a time on each device, and add their records to the file
    `path` and to `done`.

    options: those of train.py for this machine. At a signal, or where one of them fails, the runs
    end after their step; a second signal ends them at once. Raises Stop, and UserError."""
    running = {}  # Cell -> Running
    signals = []

    def pass_on(number, _):
        signals.append(number)
        for run in running.values():
            run.process.terminate()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under nohup it is ignored
        numbers.append(signal.SIGHUP)  # the terminal is closed
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        while True:
            free = list(devices)
            for run in running.values():
                free.remove(run.device)
            cells = [cell for cell in open_cells(plan, done) if cell not in running]
            for cell, device in zip(cells, free):
                if signals:
                    break
                out = runs / directory_of(plan, cell)
                print(f"run        {out.name}", flush=True)
                running[cell] = start_run(plan, cell, out, device, devices, options)
                if signals:  # one that came meanwhile has not reached it
                    running[cell].process.terminate()
            if not running:
                break
            cell = first_to_end(running)
            run = running.pop(cell)
            record = record_of(plan, cell, run, signals) | {"at_a_time": len(devices)}
            write_log(path, record)
            done[cell] = record
            # What --resume needs is as large as the weights that train, and no longer needed.
            (run.out / "state.safetensors").unlink(missing_ok=True)
            before, after = (shown(record, name) for name in ("val_loss_before", "val_loss"))
            # Where several runs are made, the line above may be of another one.
            which = f"{run.out.name}: " if len(devices) > 1 else ""
            remain = what_remains(plan, done)
            print(f"           {which}{before} → {after}; {remain}", flush=True)
            check_pairs(path, done)
            check_sizes(plan, done)
    finally:
        if not signals:  # else they have got it already
            for run in running.values():
                run.process.terminate()
        for run in running.values():
            run.process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        raise Stop("stopped between two runs", 128 + signals[0])


def start_run(plan, cell, out, device, devices, options):
    """Start train.py for a cell, or let its run go on that was stopped. What it prints on stdout is
    added to a file beside the directory `out`; where several runs are made, what it prints on
    stderr too. Returns a Running."""
    command = [sys.executable, str(TRAIN), *options_of(plan, cell)]
    command += ["--device", device, *options, "--out", str(out)]
    is_begun = (out / "state.safetensors").is_file()
    command.append("--resume" if is_begun else "--overwrite")
    environment = dict(os.environ)
    if devices.count(device) > 1:
        threads = max(1, torch.get_num_threads() // devices.count(device))
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.monotonic()
    with open(printed(out), "a") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file if len(devices) > 1 else None,
            env=environment,
            # In a group of its own it does not get the terminal's Ctrl-C beside the one passed on.
            process_group=0,
        )
    return Running(process, out, device, start)


def printed(out):
    """The file with what the run in the directory `out` prints."""
    return out.with_name(f"{out.name}.txt")


def first_to_end(running):
    """Wait until one of the runs has ended, and return its cell."""
    while True:
        for cell, run in running.items():
            if run.process.poll() is not None:
                return cell
        time.sleep(0.1)


def record_of(plan, cell, run, signals):
    """The record of a run that has ended. Raises Stop where it has not come to its last step."""
    out = run.out
    status = run.process.returncode
    log = read_log(out / "log.jsonl")
    steps = steps_of(log)
    # After three such steps train.py ends with status 1.
    skipped = [step.get("skipped") for step in steps[-3:]]
    has_diverged = status == 1 and skipped == [True, True, True]
    if status != 0 and signals:
        raise Stop(f"stopped in {out}", 128 + signals[0])
    if status != 0 and not has_diverged:
        raise Stop(f"{out} ended with status {status}; what it printed is in {printed(out)}")
    args = read_json(out / "args.json")
    summary = read_json(out / "summary.json", missing={})  # absent where the run diverged
    began, now = hash_of(args["code"]), code_now(plan, cell)
    minutes = max(time.monotonic() - run.start, sum(step["seconds"] for step in steps)) / 60
    seen = ("config.json of the checkpoint", "weight files of the checkpoint")
    seen += ("training examples", "held-out examples")
    return cell._asdict() | {
        "val_loss_before": log[0]["val_loss"],
        "val_loss": None if has_diverged else log[-1]["val_loss"],
        "trainable": summary.get("trainable"),
        "tokens_per_second": summary.get("tokens_per_second"),
        "peak_memory": summary.get("peak_memory"),
        "minutes": round(minutes, 2),  # or more, if the run was stopped and has gone on
        "steps": steps[-1]["step"],
        "skipped": sum(step.get("skipped", False) for step in steps),
        "processor": processor(run.device),
        "seen": hash_of([args["hashes"][name] for name in seen]),
        "code": began if began == now else f"{began} and {now}",
        "options": shlex.join(options_of(plan, cell)),
    }


def processor(name):
    """What --device `name` computes with. Times of two kinds of it cannot be compared."""
    device, _ = choose_device_and_dtype(name, "float32")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


# --- the report ---


def interval(differences):
    """(mean, low, high): the mean of paired differences and its interval of 95 per cent, by
    Student's t."""
    mean = statistics.fmean(differences)
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    half_width = STUDENT[len(differences) - 1] * standard_error
    return mean, mean - half_width, mean + half_width


def final_losses(plan, done, group):
    """Seed -> validation loss of the finished runs at the method's rate. A run that diverged has
    the loss None."""
    rate = chosen_rate(plan, done, group)
    if rate is None:
        return {}
    cells = [Cell(*group, rate, seed) for seed in plan.seeds]
    return {cell.seed: done[cell]["val_loss"] for cell in cells if cell in done}


def compare(plan, done):
    """Every pair of a method and a baseline, once, as dicts."""
    found = []
    pairs = set()
    for model, task, method in groups(plan):
        for baseline in plan.baselines:
            pair = model, task, frozenset((method, baseline))
            if method == baseline or pair in pairs:
                continue
            pairs.add(pair)
            ours = final_losses(plan, done, (model, task, method))
            theirs = final_losses(plan, done, (model, task, baseline))
            names = {"model": model, "task": task, "method": method, "baseline": baseline}
            found.append(names | difference(plan.seeds, ours, theirs))
    return found


def difference(seeds, ours, theirs):
    """The differences of losses by seed, with mean, interval and what may be claimed: that one is
    better only where the interval leaves out zero."""
    differences = {}
    for seed in seeds:
        if ours.get(seed) is not None and theirs.get(seed) is not None:
            differences[seed] = ours[seed] - theirs[seed]
    result = {"differences": differences, "mean": None, "low": None, "high": None, "claim": None}
    if None in (*ours.values(), *theirs.values()):
        return result | {"claim": "a run diverged"}
    if len(differences) < len(seeds):
        return result
    mean, low, high = interval(list(differences.values()))
    claim = "no claim"
    if high < 0:
        claim = "better"
    if low > 0:
        claim = "worse"
    return result | {"mean": mean, "low": low, "high": high, "claim": claim}


def report_lines(plan, done, others, compared):
    """The report as lines of Markdown."""
    lines = []
    for model in plan.models:
        for task in plan.tasks:
            lines += [f"### {Path(model).name}, {task}", ""]
            lines += tuning_table(plan, done, model, task)
            lines += final_table(plan, done, model, task, compared)
    remain = len(open_cells(plan, done))
    lines.append(f"{len(done)} runs{', more remain' if remain else ''}.")
    intervals = sum(comparison["mean"] is not None for comparison in compared)
    lines.append(
        f"{intervals} intervals of 95 per cent: if there were no differences, "
        f"{0.05 * intervals:.2g} of them would be expected to leave out zero by chance. The claims "
        "are not corrected for it."
    )
    lines.append(
        "An interval is over seeds (held-out examples, order, initial A) at the rates chosen; the "
        "choice of a rate, by one seed, has no part in it."
    )
    for group in groups(plan):
        losses = tuning_losses(plan, done, group)
        rate = chosen_rate(plan, done, group)
        if rate is not None and rate in (min(losses), max(losses)):
            lines.append(f"The best rate of {group[-1]}, {rate:g}, is at the edge of those tried.")
    at_other_rates = 0
    for cell in done:
        if cell.seed in plan.seeds and cell.lr != chosen_rate(plan, done, cell[:3]):
            at_other_rates += 1
    if at_other_rates:
        lines.append(f"{at_other_rates} runs with these seeds, at other rates, are in no table.")
    if others:
        lines.append(f"{len(others)} runs of another plan are in no table; the JSON file has them.")
    if edited := made_by_other_code(plan, done):
        lines.append(f"{edited} runs were made by other code than there is now.")
    return lines


def tuning_table(plan, done, model, task):
    """The losses by which the learning rates were chosen."""
    losses = {}
    rates = set(plan.rates)
    for method in plan.methods:
        losses[method] = tuning_losses(plan, done, (model, task, method))
        rates |= losses[method].keys()
    rates = sorted(rates)
    rows = []
    for method in plan.methods:
        chosen = chosen_rate(plan, done, (model, task, method))
        sizes = [
            record["trainable"]
            for cell, record in done.items()
            if cell[:3] == (model, task, method) and record["trainable"]
        ]
        row = {"method": method, "trainable": f"{sizes[0]:,}" if sizes else ABSENT}
        for rate in rates:
            text = shown(losses[method], rate)
            row[f"{rate:g}"] = f"**{text}**" if rate == chosen else text
        rows.append(row)
    title = f"Validation loss by learning rate, seed {plan.tuning_seed}:"
    return [title, "", *table(rows), ""]


def final_table(plan, done, model, task, compared):
    """The losses with the other seeds, and the differences."""
    rows = []
    for method in plan.methods:
        rate = chosen_rate(plan, done, (model, task, method))
        losses = final_losses(plan, done, (model, task, method))
        row = {"method": method, "rate": f"{rate:g}" if rate else ABSENT}
        for seed in plan.seeds:
            row[f"seed {seed}"] = shown(losses, seed)
        is_whole = len(losses) == len(plan.seeds) and None not in losses.values()
        row["mean"] = f"{statistics.fmean(losses.values()):.4f}" if is_whole else ABSENT
        for baseline in plan.baselines:
            names = {"model": model, "task": task, "method": method, "baseline": baseline}
            own = [comparison for comparison in compared if names.items() <= comparison.items()]
            row[f"minus {baseline}"] = shown_difference(own[0]) if own else ""
        rows.append(row)
    title = "Validation loss at this rate, and the mean of the paired differences (95 %):"
    return [title, "", *table(rows), ""]


def shown(values, key):
    """The loss that stands under a key, as text."""
    if key not in values:
        return ABSENT
    return "diverged" if values[key] is None else f"{values[key]:.4f}"


def shown_difference(comparison):
    if comparison["mean"] is None:
        return comparison["claim"] or ABSENT
    numbers = [f"{comparison[name]:+.4f}" for name in ("mean", "low", "high")]
    return "{} ({} to {}): {}".format(*numbers, comparison["claim"])


def draw(path, compared):
    """Draw the differences with their intervals, if the package matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"{path} needs the package matplotlib: pip install matplotlib")
        return
    panels = {}  # title -> comparisons
    for comparison in compared:
        if comparison["mean"] is not None:
            title = f"{Path(comparison['model']).name} on {comparison['task']}"
            panels.setdefault(title, []).append(comparison)
    if not panels:
        return
    heights = [len(panel) + 1 for panel in panels.values()]
    figure = Figure(figsize=(9.6, 1 + 0.36 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, panel) in zip(all_axes, panels.items()):
        panel = panel[::-1]  # the first on top
        for y, comparison in enumerate(panel):
            color = "0.6" if comparison["claim"] == "no claim" else "tab:blue"
            seeds = comparison["differences"].values()
            axes.hlines(y, comparison["low"], comparison["high"], color=color, linewidth=2.5)
            axes.plot(seeds, [y] * len(seeds), "|", color=color, markersize=9)
            axes.plot(comparison["mean"], y, "o", color=color)
        names = [f"{comparison['method']} − {comparison['baseline']}" for comparison in panel]
        axes.set_yticks(range(len(panel)), names)
        axes.set_ylim(-0.7, len(panel) - 0.3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
    all_axes[-1].set_xlabel(
        "difference in validation loss, nats per token, with its interval of 95 %\n"
        "left of zero the method named first is better; a stroke is one seed"
    )
    with user_file(path):
        figure.savefig(path, dpi=150)
    print(f"figure     {path}")


def report(path, plan, done, others):
    """Print the report; write the picture, and the JSON file with all numbers, beside the plan."""
    compared = compare(plan, done)
    print("\n".join(report_lines(plan, done, others, compared)))
    numbers = {"plan": plan._asdict(), "runs": list(done.values()), "others": others}
    numbers["comparisons"] = compared
    file = path.with_suffix(".report.json")
    with user_file(file):
        write_whole(file, json.dumps(numbers, indent=1) + "\n")
    draw(path.with_suffix(".report.png"), compared)


def main(args):
    """Make the runs of a plan that are not made yet, and the report."""
    devices = args.device.split(",")
    plan = read_plan(args.plan)
    path = args.plan.with_suffix(".jsonl")
    done, others = read_done(path, plan)
    check_sizes(plan, done)
    print(f"study      {what_remains(plan, done)}")
    if others:
        print(f"study      {len(others)} runs in {path} are of another plan: they do not count")
    if edited := made_by_other_code(plan, done):
        print(f"study      {edited} of these runs were made by other code than there is now")
    if args.dry_run:
        return
    if args.report:
        return report(args.plan, plan, done, others)
    runs = args.runs or Path("runs") / args.plan.stem
    make_writable(runs)
    make_writable(path.parent)
    end_with_a_whole_line(path)
    if len(devices) > 1:
        print(f"progress   is in the files {runs / '*.txt'}")
    options = ["--data-dir", args.data_dir] if args.data_dir else []
    make_runs(plan, path, done, runs, devices, options)
    report(args.plan, plan, done, others)


def end_with_a_whole_line(path):
    """Delete the last line of a file if a kill has cut it, or if it is empty."""
    whole = "".join(line_of(record) for record in read_log(path))
    if path.is_file() and path.read_text(encoding="utf-8") != whole:
        write_whole(path, whole)


def parse_args(arguments=None):
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="TOML file")
    add("--data-dir", help="as train.py takes it")
    text = "as train.py takes it (default: auto); several with commas make several runs at a time"
    add("--device", default="auto", help=text)
    add("--runs", type=Path, metavar="DIR", help="for the run directories (default: runs/PLAN)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say how many runs and hours remain")
    what.add_argument("--report", action="store_true", help="report what is done, and run nothing")
    return parser.parse_args(arguments)


def last_sentence(arguments):
    return "The same command goes on with the study"


def run(arguments=None):
    run_script("study", parse_args, main, arguments, last_sentence)


if __name__ == "__main__":
    run()
