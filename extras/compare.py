"""The table of runs side by side: what trained, validation loss, scores with their intervals,
speed, memory.
It is Markdown, which goes into a report as it is.
Without it one reads args.json, summary.json, results.json and losses.json of each run directory.

    python -m extras.compare runs/*
"""

from pathlib import Path

from data.errors import UserError
from extras.checkpoints import find_checkpoint, read_json
from extras.commands import command_parser, run_script
from extras.predictions import read_lines
from extras.records import (
    adapter_hash,
    checkpoint_hash,
    code_of_the_method,
    edited_since,
    is_by_other_code,
    read_log,
    stored_results,
    trained_on,
)

ABSENT = "–"
ARGUMENTS = (
    "targets",
    "rank",
    "alpha",
    "low_freq_ratio",
    "pairs",
    "k_ratio",
    "select",
    "lr",
    "seed",
)


def row_of(run):
    """Column -> cell for what a run directory holds. Raises UserError."""
    options = read_json(run / "args.json", missing={})
    summary = read_json(run / "summary.json", missing={})
    held = {name: stored_results(run / f"{name}.json") for name in ("results", "losses")}
    if not (options or summary or held["results"] or held["losses"]):
        answers = len(read_lines(run / "predictions.jsonl"))
        if answers:
            raise UserError(
                f"{run} holds an evaluation that has not ended, {answers:,} answers and no "
                "results.json"
            )
        raise UserError(
            f"{run} is no run directory: it has no args.json, results.json or losses.json"
        )
    method = [options.get("method", "base")]
    for name in ARGUMENTS:
        if name in options:
            method.append(f"{name.replace('_', ' ')} {short(options[name])}")
    row = {"run": run.name, "method": ", ".join(method)}
    if options:
        log = read_log(run / "log.jsonl")
        steps = log[-1]["step"] if log else 0
        row["model"] = Path(options["ckpt"]).name
        row["trained on"] = f"{trained_on(options)}, {steps:,} steps of {options['batch_size']}"
    if summary:
        row["trainable"] = (
            f"{summary['trainable']:,} ({summary['trainable'] / summary['parameters']:.2%})"
        )
        untrained = " (untrained)" if summary["val_loss"] == summary["val_loss_before"] else ""
        note = " (other code)" if edited_since(options, code_of_the_method()) else ""
        row["validation loss"] = (
            f"{summary['val_loss_before']:.4f} → {summary['val_loss']:.4f}{untrained}{note}"
        )
    elif options:
        row["validation loss"] = "not finished"
    for result in shown(run, options, "results.json", held["results"]):
        row |= score_cells(result)
    for result in shown(run, options, "losses.json", held["losses"]):
        row |= loss_cells(result)
    if summary:
        row["tokens/s"] = f"{summary['tokens_per_second']:,.0f}"
        row["peak memory"] = (
            f"{summary['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in summary else ABSENT
        )
    return row


def score_cells(result):
    """Column -> cell for one evaluation. What cannot be compared has columns of its own: other ways
    to score, other lengths of answers, other questions. A column is (title, what is added where it
    is not alone, what it is of)."""
    note = note_on_code(result, result.get("score", "generate"))
    by_likelihood = result.get("score") == "likelihood"
    limit = result.get("max_new_tokens")
    cells = {}
    for name, score in result["scores"].items():
        title = (
            f"{name} (n = {result['counts'][name]:,}{', by likelihood' if by_likelihood else ''})"
        )
        detail = f"answers of up to {limit} tokens" if limit else ""
        questions = result.get("questions", {}).get(name)
        low, high = result["intervals"][name]
        cells[title, detail, questions] = f"{score:.1%} ({100 * low:.1f}–{100 * high:.1f}){note}"
    return cells


def loss_cells(result):
    note = note_on_code(result, "loss")
    alone, tokens = result.get("losses_alone", {}), result.get("tokens", {})
    cells = {}
    for name, loss in result["losses"].items():
        size = f" ({tokens[name]:,} tokens)" if name in tokens else ""
        column = f"loss on {name}{size}"
        before = f"{alone[name]:.4f} → " if name in alone else ""
        cells[column, "", result.get("texts", {}).get(name)] = f"{before}{loss:.4f}{note}"
    return cells


def short(value):
    """128.0 as 128, and what is no number as it is."""
    return f"{value:g}" if isinstance(value, float) else value


def note_on_code(result, kind):
    """What a number is marked with where the code has been edited since it was made."""
    return " (other code)" if is_by_other_code(result, kind) else ""


def shown(run, options, file, results):
    """Those results in a run directory that are of its own checkpoint and adapter; a line for the
    others."""
    own = [result for result in results if is_own(result, run, options, results)]
    if len(own) < len(results):
        others = [result for result in results if result not in own]
        names = ", ".join(
            dict.fromkeys(str(result.get("ckpt", "an unknown one")) for result in others)
        )
        problem = (
            f"of another adapter or checkpoint ({names}) than this run's, or do not say of which"
        )
        which = (
            f"{len(others)} of the {len(results)} results in {run / file} are"
            if own
            else f"{run / file} is"
        )
        print(f"{which} not shown: {problem}")
    return own


def is_own(result, run, options, results):
    """Whether a result was made by the checkpoint and the adapter of the run. Where the directory
    holds no run, they are those of the latest result; where the run's checkpoint is no longer
    there, it is known by its name."""
    if "adapter" not in result or "checkpoint" not in result:
        return False  # as an early version has left it
    if not options:
        latest = results[-1]
        adapter = adapter_hash(run) or latest["adapter"]
        return (result["checkpoint"], result["adapter"]) == (latest["checkpoint"], adapter)
    if result["adapter"] != adapter_hash(run):
        return False
    if options.get("method") == "full" or not result["adapter"]:
        return result["checkpoint"] == checkpoint_hash(run)
    try:
        return result["checkpoint"] == checkpoint_hash(find_checkpoint(options["ckpt"]))
    except UserError:
        return Path(result.get("ckpt", "")).name == Path(options["ckpt"]).name


def table(rows):
    """The rows as lines of Markdown. Columns of one title say how they differ."""
    columns = {}  # the columns of all rows, in the order of the fullest row; a dict keeps it
    for row in sorted(rows, key=len, reverse=True):
        columns |= dict.fromkeys(row)
    full = []
    for column in columns:
        full.append(column if isinstance(column, tuple) else (column, "", None))
    lines = [titles_of(full), ["---"] * len(columns)]
    for row in rows:
        lines.append([row.get(column, ABSENT) for column in columns])
    return [f"| {' | '.join(line)} |" for line in lines]


def titles_of(columns):
    """The title of each column (title, detail, what it is of): with its detail where the title
    alone is not its own, and with a number where both are not."""
    titles = []
    for title, detail, _ in columns:
        details = {other for name, other, _ in columns if name == title}
        full = f"{title}, {detail}" if len(details) > 1 else title
        alike = sum(
            other == full or other.startswith(f"{full}, other questions") for other in titles
        )
        titles.append(f"{full}, other questions {alike + 1}" if alike else full)
    return titles


def main(args):
    """Print the table, and a line for each directory that has no row."""
    rows, problems = [], []
    for run in args.runs:
        try:
            rows.append(row_of(run))
        except UserError as error:
            problems.append(str(error))
    if not rows:
        raise UserError("; ".join(problems))
    for problem in problems:
        print(f"left out: {problem}")
    print("\n".join(table(rows)))


def parse_args(arguments=None):
    parser = command_parser("compare", __doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory, as train.py and eval.py leave it",
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("compare", parse_args, main, arguments)


if __name__ == "__main__":
    run()
