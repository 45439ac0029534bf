"""Owns what a run says and leaves on disk: help, one-line errors, atomic files, logs, the state to resume from, signals.
It makes possible that a run killed at any moment and resumed ends in the same bytes as one that never was.
Without it: rosa.save_adapter(model, directory) after the last step, and a traceback for a mistake.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from extras import peft_methods
from extras.checkpoints import copy_companions
from extras.distributed import by_the_first, processes
from model import read_json, stored_tensors

try:
    import resource
except ImportError:  # Windows
    resource = None

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends "(default: x)" to the help of an option, but no "(default: None)"."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def command_parser(name, documentation):
    """An argparse parser for `python -m extras.<name>`. documentation: the command's own docstring, an example in it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m extras.{name}", description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(name, message)
    return parser


def add_model_arguments(parser):
    """The options by which a command chooses a model: --ckpt, --adapter, --device, --dtype."""
    parser.add_argument("--ckpt", default="tiny", help="checkpoint, as train.py takes it (default: tiny)")
    parser.add_argument("--adapter", help="adapter directory, as train.py writes it (default: the model alone)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model (default: auto)")


def fail(name, message):
    """A user's mistake: one line on stderr, exit status 2."""
    print(f"{name}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def run_command(name, main, args):
    """main(args), in which ValueError, OSError and ImportError are a user's mistakes."""
    try:
        main(args)
    except (ValueError, OSError, ImportError) as error:
        fail(name, error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def one_line(message):
    """A message, an exception say, as one line for a terminal, whatever the names and values that it quotes hold."""
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-180:]}"  # the end says what to do


# --- files ---


class Stopped(Exception):
    """A signal has ended the run after a step: Stopped(message, exit status)."""


class CannotWrite(Exception):
    """The disk is full, read-only or gone. What was saved before is whole."""


@contextlib.contextmanager
def saving(path):
    """A disk that is full, read-only or gone ends the run in one line: `run`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotWrite(f"cannot write {path}: {error}. What was saved before is whole; once this is fixed") from None


def write(path, content):
    """write_whole, in a run of train.py."""
    with saving(path):
        write_whole(path, content)


def write_whole(path, content):
    """Replace a file whole: written beside it, flushed to disk, renamed. content: text, or a function that writes a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(content, encoding="utf-8") if isinstance(content, str) else content(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # of the error that brought us here
            partial.unlink()
        raise
    if os.name == "posix":  # a rename is on disk once its directory is
        flush(path.parent)


def flush(path):
    """Have the disk hold what was written."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_log(path, record):
    """Add a line. JSON has no word for a number that is not finite: null stands for it."""
    record = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    with saving(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path):
    """The records of a log, as far as it is whole: a kill may have cut the last line."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


# --- a run of train.py ---


LOGS = ("log.jsonl", "layers.jsonl")
# What may differ between a run and its resumption.
NOT_COMPARED = ("resume", "overwrite", "out", "device", "save_every", "checkpoint_activations", "shard")


def note_signals():
    """A list that SIGINT and SIGTERM are put into as they come; a second one ends the process at once."""
    noted = []

    def note(number, _):
        noted.append(number)
        handle(signal.SIG_DFL)

    def handle(handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    handle(note)
    return noted


def describe(args, ckpt, model, train_set, val_set):
    """args.json: the arguments, and hashes by which a resumption knows the checkpoint and the data again. Of the checkpoint
    these are its config, what its tensors are, and one small tensor, which another model of the same shape has otherwise."""
    tensors = sorted((name, t.file.name, t.file.stat().st_size, t.shape, t.dtype) for name, t in stored_tensors(ckpt).items())
    found = {"config.json of the checkpoint": (ckpt / "config.json").read_bytes(), "tensors of the checkpoint": tensors,
             "final norm of the checkpoint": model.model.norm.weight.to(getattr(torch, args.dtype)).tolist(),
             "training examples": train_set, "held-out examples": val_set}
    if getattr(args, "peft_config", None):
        found["options in --peft-config"] = read_json(args.peft_config)
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in found.items()}
    return json.loads(json.dumps(vars(args) | {"hashes": hashes}, default=str))


def check_same(args, description):
    """Raise ValueError naming a difference between this run and the one that was begun in --out."""
    if not (args.out / "args.json").is_file():
        raise FileNotFoundError(f"--resume: {args.out} has no args.json: nothing was saved there yet; run without --resume")
    before = read_json(args.out / "args.json")
    for key, value in before.items():
        if key not in (*NOT_COMPARED, "hashes") and (now := description.get(key)) != value:
            raise ValueError(f"--resume: the run in {args.out} has --{key.replace('_', '-')} {value}, not {now}")
    for name, value in before.get("hashes", {}).items():
        if description["hashes"].get(name) != value:
            raise ValueError(f"--resume: the {name} differ from those that the run in {args.out} began with")


def resume_command(typed):
    """What goes on with the run of these arguments."""
    arguments = [argument for argument in typed if argument not in ("--resume", "--overwrite")]
    return ("python " if processes()[1] == 1 else "torchrun ... ") + shlex.join([os.path.relpath(TRAIN), *arguments, "--resume"])


@by_the_first
def begin(args, description):
    """Make way in --out for a run, and say which."""
    with saving(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume:  # first: what is left of another run is from here on no run
            (args.out / "args.json").unlink(missing_ok=True)
        for file in ("state.safetensors", *LOGS, "layers.png", "summary.json"):
            (args.out / file).unlink(missing_ok=True)
        clear_partial(args.out)
    write(args.out / "args.json", json.dumps(description, indent=2) + "\n")


def clear_partial(out):
    """Delete what a save that was cut short has left."""
    for leftover in out.glob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@by_the_first
def save_best(args, model, ckpt):
    """The adapter, or with --method full a whole checkpoint, tokenizer included: `eval.py --ckpt` takes it."""
    new = args.out / "best.partial"
    with saving(new):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        if args.method == "full":
            model.save_pretrained(new)
            copy_companions(ckpt, new)
        else:
            peft_methods.save_adapter(model, new)
        for file in new.iterdir():
            write(args.out / file.name, lambda partial: os.replace(file, partial))
        new.rmdir()


@by_the_first
def save_state(args, trainable, optimizer, selector, step, best):
    """Everything that the rest of the run depends on, in one file. The random state is a function of the step."""
    tensors = {f"trainable.{name}": p.detach().cpu().contiguous() for name, p in trainable.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value.cpu() for key, value in moments.items()}
    if selector.scores is not None:
        tensors["scores"] = selector.scores
    progress = {"progress": json.dumps({"step": step, "best": best, "active": selector.active})}
    for log in LOGS:  # their lines up to this step are not to be lost when the state is there
        with saving(args.out / log), contextlib.suppress(FileNotFoundError):
            flush(args.out / log)
    write(args.out / "state.safetensors", lambda partial: save_file(tensors, partial, metadata=progress))


def load_state(args, trainable, optimizer, selector):
    """Undo `save_state`; returns (step, best validation loss). Log lines beyond that step are dropped."""
    path = args.out / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): --overwrite starts anew") from None
    moments = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "trainable":
                trainable[rest].copy_(tensor)
            elif kind == "optimizer":
                i, key = rest.split(".")
                moments.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    selector.scores = tensors.get("scores")
    selector.activate(progress["active"])
    if processes()[0] > 0:
        return progress["step"], progress["best"]
    with saving(args.out):
        clear_partial(args.out)
    for log in LOGS:
        lines = [json.dumps(record) + "\n" for record in read_log(args.out / log) if record["step"] <= progress["step"]]
        write(args.out / log, "".join(lines))
    return progress["step"], progress["best"]


def write_summary(args, trainable_count, count, best, device):
    """The run in six numbers, for `python -m extras.compare`: counts of parameters, nats, tokens/s without validation, bytes."""
    before, *steps = read_log(args.out / "log.jsonl")
    summary = {"trainable": trainable_count, "parameters": count, "val_loss_before": before["val_loss"], "val_loss": best,
               "tokens_per_second": sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)}
    if device.type == "cuda":
        summary["peak_memory"] = torch.cuda.max_memory_allocated()
    elif resource:  # of the whole process; kilobytes, on a Mac bytes
        summary["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    write(args.out / "summary.json", json.dumps(summary, indent=2) + "\n")


def draw_layers(out):
    """layers.png: the score of every layer at every probe, as a share of that probe's highest, and who was selected."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"layers.png needs the package matplotlib: pip install matplotlib; its numbers are in {out}/layers.jsonl")
    probes = read_log(out / "layers.jsonl")
    scores = torch.tensor([probe["scores"] for probe in probes]).T  # [L, probes]
    figure = Figure(figsize=(4 + 0.2 * len(probes), 1.5 + 0.15 * len(scores)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow((scores / scores.amax(0)).numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.scatter(*zip(*((i, layer) for i, probe in enumerate(probes) for layer in probe["active_layers"])),
                 s=10, c="white", edgecolors="black")
    every = math.ceil(len(probes) / 20)
    axes.set_xticks(range(0, len(probes), every), [probe["step"] for probe in probes[::every]], rotation=90)
    axes.set(xlabel="optimiser step", ylabel="layer", title="selected layers (dots)")
    figure.colorbar(image, label="score, share of the highest")
    write(out / "layers.png", lambda partial: figure.savefig(partial, format="png", dpi=120))
