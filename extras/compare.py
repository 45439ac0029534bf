"""A table of runs side by side: what was trained, validation loss, scores with their intervals,
speed, memory.
The table is Markdown, which can be pasted into a report.
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
    """The row of a run directory in the table, as column -> cell. Raises UserError."""
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
    """The cells of one evaluation, as column -> cell. Scores that cannot be compared go into
    separate columns: scores of another kind, of answers of another length, of other questions. A
    column is (title, detail, hash of the questions). `titles_of` adds the detail to the title if it
    differs between columns of this title."""
    note = note_on_code(result, result.get("score", "generate"))
    by_likelihood = result.get("score") == "likelihood"
    limit = result.get("max_new_tokens")
    cells = {}
    for name, score in result["scores"].items():
        way = ", by likelihood" if by_likelihood else ""
        title = f"{name} (n = {result['counts'][name]:,}{way})"
        detail = f"answers of up to {limit} tokens" if limit else ""
        questions = result.get("questions", {}).get(name)
        low, high = result["intervals"][name]
        cells[title, detail, questions] = f"{score:.1%} ({100 * low:.1f}–{100 * high:.1f}){note}"
    return cells


def loss_cells(result):
    """The cells of one result of extras.forgetting, as column -> cell."""
    note = note_on_code(result, "loss")
    alone = result.get("losses_alone", {})  # the losses without the adapter
    tokens = result.get("tokens", {})
    cells = {}
    for name, loss in result["losses"].items():
        size = f" ({tokens[name]:,} tokens)" if name in tokens else ""
        column = f"loss on {name}{size}"
        before = f"{alone[name]:.4f} → " if name in alone else ""
        cells[column, "", result.get("texts", {}).get(name)] = f"{before}{loss:.4f}{note}"
    return cells


def short(value):
    """A number without the zeros behind its point, 128.0 as 128. Another value is returned as it
    is."""
    return f"{value:g}" if isinstance(value, float) else value


def note_on_code(result, kind):
    """The mark of a result if the code has been edited since the result was made, else ""."""
    return " (other code)" if is_by_other_code(result, kind) else ""


def shown(run, options, file, results):
    """Those of the results in a file of a run directory that were made by the run's own checkpoint
    and adapter. Print a line about the others."""
    own = [result for result in results if is_own(result, run, options, results)]
    if len(own) < len(results):
        others = [result for result in results if result not in own]
        checkpoints = [str(result.get("ckpt", "an unknown one")) for result in others]
        names = ", ".join(dict.fromkeys(checkpoints))
        problem = (
            f"of another adapter or checkpoint ({names}) than this run's, or do not say of which"
        )
        which = f"{run / file} is"
        if own:
            which = f"{len(others)} of the {len(results)} results in {run / file} are"
        print(f"{which} not shown: {problem}")
    return own


def is_own(result, run, options, results):
    """Whether a result was made by the checkpoint and the adapter of the run.

    If the directory holds no run, the checkpoint and the adapter of the latest result take their
    place. If the run's checkpoint is no longer there, checkpoints of the same name are the same."""
    if "adapter" not in result or "checkpoint" not in result:
        return False  # results of early versions do not name them
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
    """The rows as lines of Markdown."""
    # The columns of all rows, beginning with those of the fullest row. A dict keeps their order.
    columns = {}
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
    """The title of each column (title, detail, hash): followed by its detail if columns of the same
    title have different details, and by a number if the two are still the same as another's."""
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
    rows = []
    problems = []
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
