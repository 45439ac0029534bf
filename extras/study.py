"""Many runs of train.py by a plan: methods at equal size, each at its own best learning rate,
compared by pairs of runs.
Whether one method is better than another is said with an interval, and every run is in the report.
Without it: run train.py by hand for each method, rate and seed, and hope to have forgotten none.

    python -m extras.study tests/study/smollm2.toml --data-dir LLM-Adapters --dry-run
    python -m extras.study tests/study/smollm2.toml --data-dir LLM-Adapters

A plan is a TOML file; tests/study/ has some. Of each method the runs with the plan's `tuning_seed`
find the learning rate: the one with the lowest validation loss at the last step. While that is the
lowest or the highest rate tried, the next one beyond it is tried too. Then the runs with the other
`seeds` are made at this rate. A finished run is a line in a file .jsonl beside the plan. Ctrl-C
ends the study after the step that is being computed, and the same command goes on with it."""

import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

import train
from data.errors import UserError, read_text, user_file
from extras.checkpoints import find_checkpoint, read_json, unloaded
from extras.commands import Stop, command_parser, run_script
from extras.compare import ABSENT
from extras.memory import count_trained
from extras.records import hash_of, make_writable, read_log, steps_of, write_log, write_whole
from extras.runs import code_of

TRAIN = Path(train.__file__)


class Cell(NamedTuple):
    """One run of a study."""

    model: str
    task: str
    method: str
    lr: float
    seed: int


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
        if not isinstance(value, Plan.__annotations__[name]):
            kind = {"list": "list", "dict": "table", "str": "text", "int": "whole number"}
            raise UserError(f"{path}: {name} must be a {kind[Plan.__annotations__[name].__name__]}")
    plan = Plan(**read)
    for is_wrong, message in mistakes(plan):
        if is_wrong:
            raise UserError(f"{path}: {message}")
    return plan


def mistakes(plan):
    """What may be wrong with a plan: (whether it is, what is said then)."""
    texts = [*plan.models, *plan.tasks.values(), *plan.methods.values()]
    if not all(isinstance(text, str) for text in texts):
        return [(True, "models, and the options of tasks and methods, must be texts")]
    if not all(isinstance(rate, (int, float)) and rate > 0 for rate in plan.rates):
        return [(True, "rates must be positive numbers")]
    if len(plan.rates) < 4:
        return [(True, "rates has fewer than four learning rates")]
    if not all(isinstance(seed, int) for seed in plan.seeds):
        return [(True, "seeds must be whole numbers")]
    ratios = [high / low for low, high in zip(plan.rates, plan.rates[1:])]
    unknown = [name for name in (*plan.baselines, *plan.unequal) if name not in plan.methods]
    cells = first_cells(plan)
    return [
        (not cells, "models, tasks and methods must not be empty"),
        (unknown, f"{', '.join(unknown)} is none of the methods: {', '.join(plan.methods)}"),
        (not plan.baselines, "baselines names no method"),
        (
            any(not 3.1 < ratio < 3.3 for ratio in ratios),
            "rates must rise by factors of 10^0.5, as 1e-3, 3.16e-3, 1e-2 do",
        ),
        (
            plan.tuning_seed in plan.seeds,
            f"tuning_seed {plan.tuning_seed} is among the seeds: what chose the rate cannot judge",
        ),
        (
            not 2 <= len(set(plan.seeds)) == len(plan.seeds) <= 1 + len(STUDENT),
            f"seeds must be 2 to {1 + len(STUDENT)} different numbers",
        ),
        (
            len({directory_of(cell) for cell in cells}) < len(cells),
            "two names of models, tasks or methods differ in signs alone",
        ),
    ]


def first_cells(plan):
    """A Cell of each method, task and model."""
    cells = []
    for model in plan.models:
        for task in plan.tasks:
            for method in plan.methods:
                cells.append(Cell(model, task, method, plan.rates[0], plan.tuning_seed))
    return cells


def options_of(plan, cell):
    """The options of train.py that belong to a cell, whatever the machine."""
    words = ["--ckpt", cell.model]
    for text in (plan.tasks[cell.task], plan.options, plan.methods[cell.method]):
        words += shlex.split(text)
    return [*words, "--lr", f"{cell.lr:g}", "--seed", str(cell.seed)]


def directory_of(cell):
    """The name of a cell's run directory."""
    name = f"{Path(cell.model).name} {cell.task} {cell.method} lr {cell.lr:g} seed {cell.seed}"
    return re.sub(r"[^\w.]+", "-", name)


def check_sizes(plan, done):
    """Raise UserError where methods of a plan train numbers of parameters that differ by more than
    2 per cent. How many those of the package peft have is known after their first run."""
    for model in plan.models:
        shapes = unloaded(find_checkpoint(model))
        sizes = {}
        for cell in first_cells(plan):
            if cell.model == model and cell.method not in plan.unequal:
                options = vars(train.parse_args(options_of(plan, cell)))
                sizes[cell.method] = count_trained(shapes, options)
        for cell, record in done.items():
            if cell.model == model and cell.method in sizes:
                sizes[cell.method] = record["trainable"]
        sizes = {method: size for method, size in sizes.items() if size}
        if sizes and max(sizes.values()) > 1.02 * min(sizes.values()):
            counts = ", ".join(f"{method} {size:,}" for method, size in sizes.items())
            raise UserError(
                f"the methods train different numbers of parameters of {model}: {counts}: change "
                "--rank until they are within 2 per cent, or name a method under unequal"
            )


# --- which runs ---


def read_done(path, plan):
    """Cell -> record of every run in a study's .jsonl that was made by the plan as it is now. Print
    a line about the others."""
    done = {}
    others = 0
    for record in read_log(path):
        cell = Cell(*(record[name] for name in Cell._fields))
        is_known = cell.task in plan.tasks and cell.method in plan.methods
        if is_known and record["options"] == shlex.join(options_of(plan, cell)):
            done[cell] = record
        else:
            others += 1
    if others:
        print(f"study      {others} runs in {path} are of another plan: they do not count")
    edited = sum(record["code"] != code_now(plan, cell) for cell, record in done.items())
    if edited:
        print(f"study      {edited} of these runs were made by other code than there is now")
    return done


def code_now(plan, cell):
    """What stands for the code that a run of a cell depends on."""
    return hash_of(code_of(train.parse_args(options_of(plan, cell))))


def tuning_losses(plan, done, model, task, method):
    """Learning rate -> validation loss of the finished runs with the tuning seed."""
    losses = {}
    for cell, record in done.items():
        if cell[:3] == (model, task, method) and cell.seed == plan.tuning_seed:
            losses[cell.lr] = record["val_loss"]
    return dict(sorted(losses.items()))


def best_rate(losses):
    """The learning rate of the lowest loss. A run that diverged has the loss None. None where all
    have."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=finite.get) if finite else None


def rates_to_try(rates, losses):
    """The learning rates that have to be tried before the best one is known.

    rates: those of the plan; losses: learning rate -> loss, what has been tried already."""
    missing = [rate for rate in rates if rate not in losses]
    if missing:
        return missing
    tried = sorted(losses)
    best = best_rate(losses)
    # Two steps of 10^0.5 are a factor of 10, so that 3.16e-3 is followed by 1e-2, not by 9.99e-3.
    if best == tried[0]:
        return [float(f"{tried[1] / 10:g}")]
    if best == tried[-1]:
        return [float(f"{tried[-2] * 10:g}")]
    return []


def open_cells(plan, done):
    """The cells that can be run now, in turn: the rates of all methods, then the seeds of those
    methods whose rate is known."""
    cells = []
    for model in plan.models:
        for task in plan.tasks:
            tuning, final = [], []
            for method in plan.methods:
                losses = tuning_losses(plan, done, model, task, method)
                rates = rates_to_try(plan.rates, losses)
                own = (model, task, method)
                tuning.append([Cell(*own, rate, plan.tuning_seed) for rate in rates])
                best = best_rate(losses)
                if not rates and best is not None:
                    runs = [Cell(*own, best, seed) for seed in plan.seeds]
                    final.append([cell for cell in runs if cell not in done])
            for lists in (tuning, final):
                for turn in zip_longest(*lists):
                    cells += [cell for cell in turn if cell is not None]
    return cells


def remaining(plan, done):
    """Method -> how many of its runs remain, as far as is known: the rates may become more."""
    counts = dict.fromkeys(plan.methods, 0)
    cells = open_cells(plan, done)
    for cell in cells:
        counts[cell.method] += 1
    for model, task, method, *_ in first_cells(plan):
        is_tuning = any(
            cell[:3] == (model, task, method) and cell.seed == plan.tuning_seed for cell in cells
        )
        if is_tuning:
            counts[method] += len(plan.seeds)
    return counts


def end_with_a_whole_line(path):
    """Delete the last line of a file if a kill has cut it."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            write_whole(path, text[: text.rfind("\n") + 1])


def what_remains(plan, done):
    """How many runs and how many hours remain, in words."""
    counts = remaining(plan, done)
    line = f"{len(done)} runs are done, {sum(counts.values())} remain"
    if not done:
        return f"{line}; the first of them will show how long they take"
    of_all = [record["minutes"] for record in done.values()]
    total = 0
    for method, number in counts.items():
        own = [record["minutes"] for cell, record in done.items() if cell.method == method]
        total += number * statistics.median(own or of_all)
    if total < 60:
        return f"{line}, about {total:.0f} minutes"
    return f"{line}, about {total / 60:.1f} hours"


# --- a run ---


def run_cell(plan, cell, runs, machine):
    """Run train.py for a cell, or let a run that was stopped go on. Returns its record. What it
    prints is kept in a file beside its directory; its progress bar is shown.

    machine: options of train.py for this machine, which change no result. Raises Stop."""
    out = runs / directory_of(cell)
    options = options_of(plan, cell)
    command = [sys.executable, str(TRAIN), *options, *machine, "--out", str(out)]
    if (out / "args.json").is_file():
        command.append("--resume")
    start = time.monotonic()
    printed = runs / f"{out.name}.txt"
    with open(printed, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file)
        # A terminal sends Ctrl-C to both processes: train.py ends its step then, and this one waits
        # for it. SIGTERM comes to this process alone.
        handlers = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        status = process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    log = read_log(out / "log.jsonl")
    steps = steps_of(log)
    has_diverged = [step.get("skipped") for step in steps[-3:]] == [True, True, True]
    if status != 0 and not has_diverged:
        if status < 0:  # killed by a signal
            status = 128 - status
        if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Stop(f"stopped in {out}", status)
        raise Stop(f"{out} ended with status {status}; what it printed is in {printed}", status)
    minutes = max(time.monotonic() - start, sum(step["seconds"] for step in steps)) / 60
    record = cell._asdict() | {"val_loss": None, "val_loss_before": log[0]["val_loss"]}
    if not has_diverged:
        record["val_loss"] = log[-1]["val_loss"]
    record |= {"trainable": None, "tokens_per_second": None, "peak_memory": None}
    summary = read_json(out / "summary.json", missing={})
    record |= {name: summary[name] for name in record if name in summary and "loss" not in name}
    args = read_json(out / "args.json")
    record |= {
        "minutes": round(minutes, 2),
        "steps": steps[-1]["step"],
        "skipped": sum(step.get("skipped", False) for step in steps),
        "dtype": args["dtype"],
        "processor": processor(),
        "code": hash_of(args["code"]),
        "options": shlex.join(options),
    }
    return record


def processor():
    """What the runs compute with: losses of two kinds of it agree to what is shown, times do
    not."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


# --- the report ---

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


def interval(differences):
    """(mean, low, high): the mean of paired differences and its interval of 95 per cent, by
    Student's t."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    width = STUDENT[len(differences) - 1] * error
    return mean, mean - width, mean + width


def final_losses(plan, done, model, task, method):
    """(the method's learning rate, seed -> validation loss at it). A rate that is not known yet is
    None; a run that diverged has the loss None."""
    losses = tuning_losses(plan, done, model, task, method)
    rate = None if rates_to_try(plan.rates, losses) else best_rate(losses)
    runs = {}
    for seed in plan.seeds:
        cell = Cell(model, task, method, rate, seed)
        if cell in done:
            runs[seed] = done[cell]["val_loss"]
    return rate, runs


def comparisons(plan, done):
    """Every pair of a method and a baseline, once. `mean`, `low` and `high` are of the differences
    in loss, method minus baseline, and None where a run is missing or has diverged."""
    found = []
    for model in plan.models:
        for task in plan.tasks:
            pairs = set()
            for baseline in plan.baselines:
                for method in plan.methods:
                    if method == baseline or frozenset((method, baseline)) in pairs:
                        continue
                    pairs.add(frozenset((method, baseline)))
                    _, ours = final_losses(plan, done, model, task, method)
                    _, theirs = final_losses(plan, done, model, task, baseline)
                    differences = {}
                    for seed in plan.seeds:
                        if ours.get(seed) is not None and theirs.get(seed) is not None:
                            differences[seed] = ours[seed] - theirs[seed]
                    mean = low = high = None
                    if len(differences) == len(plan.seeds):
                        mean, low, high = interval(list(differences.values()))
                    comparison = {"model": model, "task": task, "method": method}
                    comparison |= {"baseline": baseline, "differences": differences}
                    found.append(comparison | {"mean": mean, "low": low, "high": high})
    return found


def report_lines(plan, done, compared):
    """The report as lines of Markdown."""
    lines = []
    for model in plan.models:
        for task in plan.tasks:
            lines += [f"### {Path(model).name}, {task}", ""]
            lines += tuning_table(plan, done, model, task) + [""]
            own = [pair for pair in compared if (pair["model"], pair["task"]) == (model, task)]
            lines += final_table(plan, done, model, task, own) + [""]
    left = sum(remaining(plan, done).values())
    unfinished = f", {left} remain" if left else ""
    chance = 0.05 * len(compared)
    lines.append(
        f"{len(done)} runs{unfinished}; {len(compared)} comparisons. Were there no differences at "
        f"all, {chance:.2g} of their intervals would still leave out zero."
    )
    if len({record["code"] for record in done.values()}) > 1:
        lines.append("The code was edited between the runs: see `code` in the JSON file.")
    return lines


def tuning_table(plan, done, model, task):
    """The losses by which the learning rates were chosen."""
    of_methods = {}
    rates = set(plan.rates)
    for method in plan.methods:
        of_methods[method] = tuning_losses(plan, done, model, task, method)
        rates |= of_methods[method].keys()
    rates = sorted(rates)
    lines = [f"Validation loss by learning rate, seed {plan.tuning_seed}:", ""]
    lines.append(row_of(["method", "trainable", *(f"{rate:g}" for rate in rates)]))
    lines.append(row_of(["---"] * (2 + len(rates))))
    for method, losses in of_methods.items():
        best = best_rate(losses)
        cells = []
        for rate in rates:
            cell = shown(losses[rate]) if rate in losses else ABSENT
            cells.append(f"**{cell}**" if rate == best else cell)
        sizes = [record["trainable"] for cell, record in done.items() if cell.method == method]
        size = next((f"{size:,}" for size in sizes if size), ABSENT)
        lines.append(row_of([method, size, *cells]))
    return lines


def final_table(plan, done, model, task, compared):
    """The losses with the other seeds, and the differences."""
    titles = ["method", "rate", *(f"seed {seed}" for seed in plan.seeds), "mean"]
    titles += [f"minus {baseline} (95 %)" for baseline in plan.baselines]
    lines = ["Validation loss at the best rate, and the mean of the paired differences:", ""]
    lines += [row_of(titles), row_of(["---"] * len(titles))]
    for method in plan.methods:
        rate, runs = final_losses(plan, done, model, task, method)
        cells = [method, f"{rate:g}" if rate else ABSENT]
        for seed in plan.seeds:
            cells.append(shown(runs[seed]) if seed in runs else ABSENT)
        is_whole = len(runs) == len(plan.seeds) and None not in runs.values()
        cells.append(shown(statistics.fmean(runs.values())) if is_whole else ABSENT)
        for baseline in plan.baselines:
            pairs = [pair for pair in compared if pair["method"] == method]
            cells.append(
                next((shown_difference(p) for p in pairs if p["baseline"] == baseline), "")
            )
        lines.append(row_of(cells))
    return lines


def row_of(cells):
    return f"| {' | '.join(cells)} |"


def shown(loss):
    return "diverged" if loss is None else f"{loss:.4f}"


def shown_difference(comparison):
    """A difference with its interval, and what may be claimed: only where the interval leaves out
    zero."""
    mean, low, high = (comparison[name] for name in ("mean", "low", "high"))
    if mean is None:
        return ABSENT
    claim = "no claim"
    if high < 0:
        claim = "better"
    if low > 0:
        claim = "worse"
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f}): {claim}"


def draw(path, compared):
    """Draw the differences with their intervals, if the package matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"{path} needs the package matplotlib: pip install matplotlib")
        return
    groups = {}  # (model, task) -> its comparisons
    for comparison in compared:
        if comparison["mean"] is not None:
            group = Path(comparison["model"]).name, comparison["task"]
            groups.setdefault(group, []).append(comparison)
    if not groups:
        return
    rows = sum(len(group) + 2 for group in groups.values())
    figure = Figure(figsize=(9.6, 0.8 + 0.36 * rows), layout="constrained")
    heights = [len(group) + 1 for group in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((model, task), group) in zip(panels, groups.items()):
        for y, pair in enumerate(reversed(group)):
            claims = pair["high"] < 0 or pair["low"] > 0
            color = "tab:blue" if claims else "0.6"
            axes.hlines(y, pair["low"], pair["high"], color=color, linewidth=2.5)
            values = pair["differences"].values()
            axes.plot(values, [y] * len(values), "|", color=color, markersize=9)
            axes.plot(pair["mean"], y, "o", color=color)
        names = [f"{pair['method']} − {pair['baseline']}" for pair in reversed(group)]
        axes.set_yticks(range(len(group)), names)
        axes.set_ylim(-0.7, len(group) - 0.3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{model} on {task}", fontsize="medium")
    panels[-1].set_xlabel(
        "difference in validation loss, nats per token: below zero the first is better; strokes: "
        "each seed's"
    )
    with user_file(path):
        figure.savefig(path, dpi=150)
    print(f"figure     {path}")


def report(args, plan, done):
    """Print the report; write the picture, and the JSON file with all numbers, beside the plan."""
    compared = comparisons(plan, done)
    print("\n".join(report_lines(plan, done, compared)))
    runs = [cell._asdict() | record for cell, record in done.items()]
    numbers = {"plan": plan._asdict(), "runs": runs, "comparisons": compared}
    file = args.plan.with_suffix(".json")
    write_whole(file, "".join((json.dumps(numbers, indent=1), "\n")))
    draw(args.plan.with_suffix(".png"), compared)


def main(args):
    """Make the runs of a plan that are not made yet, one after the other, and the report."""
    plan = read_plan(args.plan)
    path = args.plan.with_suffix(".jsonl")
    done = read_done(path, plan)
    check_sizes(plan, done)
    print(f"study      {what_remains(plan, done)}")
    if args.dry_run:
        return
    if args.report:
        return report(args, plan, done)
    runs = args.runs or Path("runs") / args.plan.stem
    make_writable(runs)
    end_with_a_whole_line(path)
    machine = ["--device", args.device]
    if args.data_dir:
        machine += ["--data-dir", args.data_dir]
    while cells := open_cells(plan, done):
        for cell in cells:
            print(f"run        {directory_of(cell)}", flush=True)
            record = run_cell(plan, cell, runs, machine)
            write_log(path, record)
            done[cell] = record
            check_sizes(plan, done)
            before, after = shown(record["val_loss_before"]), shown(record["val_loss"])
            print(f"           {before} → {after}; {what_remains(plan, done)}", flush=True)
    report(args, plan, done)


def parse_args(arguments=None):
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="TOML file")
    add("--data-dir", help="as train.py takes it")
    add("--device", default="auto", help="as train.py takes it (default: auto)")
    add("--runs", type=Path, metavar="DIR", help="for the run directories (default: runs/PLAN)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say how many runs and hours remain")
    what.add_argument("--report", action="store_true", help="report what is done, and run nothing")
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("study", parse_args, main, arguments, last_sentence)


def last_sentence(arguments):
    return "The same command goes on"


if __name__ == "__main__":
    run()
