"""The table of runs side by side: what trained, validation loss, scores with their intervals, speed, memory.
It is Markdown, which goes into a report as it is.
Without it one reads args.json, summary.json, results.json and losses.json of each run directory.

    python -m extras.compare runs/*
"""

from pathlib import Path

from data.errors import UserError
from extras.checkpoints import read_json
from extras.commands import command_parser, run_script
from extras.predictions import adapter_hash, is_by_other_code
from extras.runs import read_log, trained_on

ABSENT = "–"


def row_of(run):
    """Column -> cell for what a run directory holds. Raises UserError."""
    held = {name: read_json(run / f"{name}.json", missing={}) for name in ("args", "summary", "results", "losses")}
    if not any(held.values()):
        raise UserError(f"{run} is no run directory: it has no args.json, results.json or losses.json")
    for name in ("results", "losses"):
        if held[name] and not is_of(held[name], run):
            print(f"{run / name}.json is not shown: what made it is not the adapter that is there now, or not known")
            held[name] = {}
    options, summary, results = held["args"], held["summary"], held["results"]
    settings = ("targets", "rank", "alpha", "low_freq_ratio", "pairs", "k_ratio", "select", "lr", "seed")
    method = [
        options.get("method", "base"),
        *(f"{name.replace('_', ' ')} {short(options[name])}" for name in settings if name in options),
    ]
    row = {"run": run.name, "method": ", ".join(method)}
    log = read_log(run / "log.jsonl")
    if log and options:
        row["model"] = Path(options["ckpt"]).name
        row["trained on"] = f"{trained_on(options)}, {log[-1]['step']:,} steps of {options['batch_size']}"
    if summary:
        row["trainable"] = f"{summary['trainable']:,} ({summary['trainable'] / summary['parameters']:.2%})"
        untrained = " (untrained)" if summary["val_loss"] == summary["val_loss_before"] else ""
        row["validation loss"] = f"{summary['val_loss_before']:.4f} → {summary['val_loss']:.4f}{untrained}"
    elif log:
        row["validation loss"] = "not finished"
    note = note_on_code(results, results.get("score", "generate"))
    for name, score in results.get("scores", {}).items():
        low, high = results["intervals"][name]
        row[f"{name} (n = {results['counts'][name]:,})"] = f"{score:.1%} ({100 * low:.1f}–{100 * high:.1f}){note}"
    alone = held["losses"].get("losses_alone", {})
    note = note_on_code(held["losses"], "loss")
    for name, loss in held["losses"].get("losses", {}).items():
        row[f"loss on {name}"] = (f"{alone[name]:.4f} → " if name in alone else "") + f"{loss:.4f}{note}"
    if summary:
        row["tokens/s"] = f"{summary['tokens_per_second']:,.0f}"
        row["peak memory"] = f"{summary['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in summary else ABSENT
    return row


def short(value):
    """128.0 as 128, and what is no number as it is."""
    return f"{value:g}" if isinstance(value, float) else value


def note_on_code(result, kind):
    """What a number is marked with where the code has been edited since it was made."""
    return " (other code)" if result and is_by_other_code(result, kind) else ""


def is_of(result, run):
    """Whether a result says what made it, and that is the adapter of the run, where there is one."""
    return "adapter" in result and adapter_hash(run) in (None, result["adapter"])


def main(args):
    """Print the table."""
    rows = [row_of(run) for run in args.runs]
    # The columns in the order of the fullest row.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row.get(name, ABSENT) for name in columns)} |")


def parse_args(arguments=None):
    parser = command_parser("compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, as train.py and eval.py leave it"
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("compare", parse_args, main, arguments)


if __name__ == "__main__":
    run()
