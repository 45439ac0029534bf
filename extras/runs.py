"""A run of train.py: its directory with the best adapter, its logs, the state to resume from;
signals.
A run killed at any moment and resumed ends in the same bytes as one that never was.
Without it: rosa.save_adapter(model, directory) after the last step.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import tasks
from data.errors import UserError
from extras import adapters
from extras.checkpoints import checkpoint_files, copy_companions, name_end, read_json
from extras.commands import Stop
from extras.distributed import by_the_first, gather, is_first
from extras.records import (
    QUANTIZED,
    best_step,
    clear_partial,
    edited_since,
    flush,
    hash_of,
    have_been_edited,
    line_of,
    read_log,
    saving,
    steps_of,
    trained_on,
    validations_of,
    write,
    write_log,
)
from extras.source import HERE, file_fingerprint

try:
    import resource
except ImportError:  # Windows
    resource = None

# The format of a run directory. Before 4 a validation stood in its step's line of log.jsonl; in 2
# the step that is saved was validated already; 1 did not say its format.
FORMAT = 4
LOGS = ("log.jsonl", "layers.jsonl")
# eval.py and extras.forgetting leave these files beside the adapter.
RESULTS = ("results.json", "predictions.jsonl", "losses.json")
# These arguments may differ between a run and its resumption.
NOT_COMPARED = (
    "resume",
    "overwrite",
    "out",
    "device",
    "save_every",
    "checkpoint_activations",
    "shard",
    "plain",
    "micro_batch_size",  # with another one the losses are the same to rounding
)
# These arguments name files: the files' hashes are compared, not the names.
NOT_COMPARED += ("ckpt", "data_dir", "train_file", "peft_config")


class Run:
    """A run directory, and what a run must know to stop after any step and be resumed.

    trainable: name -> parameter of all that trains, in the optimiser's order."""

    def __init__(self, args, ckpt, tokenizer, model, trainable, optimizer, selector, loss_scale):
        self.args = args
        self.out = args.out
        self.ckpt = ckpt
        self.tokenizer = tokenizer
        self.model = model
        self.trainable = trainable
        self.optimizer = optimizer
        self.selector = selector
        self.loss_scale = loss_scale
        self.best = math.inf  # validation loss, nats per token
        self.kept = "checkpoint" if args.method == "full" else "adapter"
        self.saved = 0  # the step of the state on disk
        self.validated = {}  # step -> validation loss, as the log of a resumed run has them
        self.skipped_in_a_row = 0  # the last steps, if they were not applied
        self.signals = []  # SIGINT and SIGTERM, as they come

    def resume(self):
        """With --resume load the state in the directory, if one is there, and return its step; else
        return None."""
        step = None
        if self.args.resume and (self.out / "state.safetensors").exists():
            step = self.load_state()
        if len(set(gather(step))) > 1:
            problem = f"--resume: {self.out} holds different states on different machines"
            raise UserError(f"{problem}: share it, or copy it to each")
        return step

    @by_the_first
    def begin(self, description):
        """Clear the directory for this run, and say in args.json which run it is."""
        with saving(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            # Results beside an adapter are of the adapter that this run replaces.
            results = RESULTS if self.holds_a_run() else ()
            # args.json goes first: without it, what is left of another run is no run.
            if not self.args.resume:
                (self.out / "args.json").unlink(missing_ok=True)
            for file in ("state.safetensors", *LOGS, "run.png", "summary.json", *results):
                (self.out / file).unlink(missing_ok=True)
            clear_partial(self.out)
        write(self.out / "args.json", json.dumps(description, indent=2) + "\n")

    def holds_a_run(self):
        """Whether the directory holds the files of a run, whole or not."""
        kept = ("args.json", "adapter_model.safetensors", "model.safetensors")
        return any((self.out / file).exists() for file in kept)

    def can_apply(self, step, loss, norm, places):
        """Whether a step can be applied: one that is not finite would spoil the weights for good.
        places: where the step's examples stand in the training data, "line 4", say."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        args = self.args
        data = tasks.training_file(args.task, args.data_dir, args.train_file) or args.task
        self.culprits = f"loss {loss:.3g}, gradient {norm:.3g} in {', '.join(places)} of {data}"
        tqdm.write(f"step {step:5}  not applied: {self.culprits}")
        return False

    def keep_best(self, step, val_loss):
        """Keep the adapter if its validation loss is the lowest so far, and add a line with the
        loss to log.jsonl. A resumed run repeats the validation of its state; where the log has its
        line already, that line holds, since by it the adapter on disk was kept or not."""
        if step == 0 and not math.isfinite(val_loss):
            advice = f"is {self.ckpt} whole?"
            if self.args.dtype == "float16":
                advice = (
                    f"its activations may be too large for float16: --dtype float32, or {advice}"
                )
            raise Stop(f"the validation loss is {val_loss} before training: {advice}")
        note = " before training" if step == 0 else ""
        logged = self.validated.get(step, val_loss)
        if f"{logged:.4f}" != f"{val_loss:.4f}":  # by edited code, perhaps
            note += f"; {logged:.4f} is in log.jsonl, and holds"
        tqdm.write(f"step {step:5}  validation loss {val_loss:.4f}{note}")
        if step in self.validated:
            return
        if val_loss < self.best or step == 0:
            self.best = val_loss
            self.save_best()
        if is_first():
            write_log(self.out / "log.jsonl", {"step": step, "val_loss": val_loss})

    def log(self, record):
        """Have the first process add a step's line to log.jsonl, and after a selection of layers
        one to layers.jsonl."""
        if not is_first():
            return
        if self.skipped_in_a_row:
            record = record | {"skipped": True}
        write_log(self.out / "log.jsonl", record)
        if self.selector.selected:
            selection = {
                "step": record["step"],
                "scores": self.selector.scores.tolist(),
                "active_layers": self.selector.active,
            }
            write_log(self.out / "layers.jsonl", selection)

    def save(self, step, total_steps, stop_requested):
        """Save the state where it is due: every --save-every steps, before each validation, which a
        resumption then makes, and before the run ends. A step that was not applied is not saved."""
        is_due = (
            stop_requested
            or step == total_steps
            or step % self.args.save_every == 0
            or step % self.args.eval_every == 0
        )
        if is_due and not self.skipped_in_a_row:
            self.save_state(step)
            self.saved = step

    def stopped(self, step):
        """The end of a run after a signal: what to raise."""
        # Where another process was signalled, this one does not know by which signal.
        number = self.signals[0] if self.signals else signal.SIGTERM
        kept = f"the {self.kept} kept is the best so far, of step {best_step(self.out)}"
        return Stop(f"stopped after step {step}; {kept}", 128 + number)

    def not_finite(self, step):
        """The end of a run after three steps in a row that were not applied: what to raise."""
        message = f"step {step} was the third in a row that is not finite: {self.culprits}"
        state = f"The last good state, of step {self.saved}, is in {self.out / 'state.safetensors'}"
        return Stop(f"{message}. {state}")

    def note_signals(self):
        """From here on SIGINT and SIGTERM let the step end first; a second one ends the process at
        once."""

        def note(number, _):
            self.signals.append(number)
            handle(signal.SIG_DFL)
            if is_first():
                again = "a second time ends it at once, and then what is saved is step"
                line = f"stopping once this step is done and saved; {again} {self.saved}"
                # The signal may have interrupted a print, and a print cannot be entered twice.
                os.write(2, f"\n{line}\n".encode())

        def handle(handler):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handler)

        handle(note)

    @by_the_first
    def save_best(self):
        """Save the adapter; with --method full a whole checkpoint, tokenizer included, which is a
        --ckpt for eval.py."""
        new = self.out / "best.partial"
        with saving(new):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            if self.kept == "checkpoint":
                self.model.save_pretrained(new)
                copy_companions(self.ckpt, new)
                name_end(new, self.tokenizer.eos_id)
            else:
                adapters.save_adapter(self.model, new)
            for file in [file for file in new.rglob("*") if file.is_file()]:
                place = self.out / file.relative_to(new)
                place.parent.mkdir(exist_ok=True)
                write(place, lambda partial, file=file: os.replace(file, partial))
            shutil.rmtree(new)

    @by_the_first
    def save_state(self, step):
        """Save everything that the rest of the run depends on, in one file. The random state is not
        in it: the loop seeds it anew in every step."""
        tensors = {}
        for name, parameter in self.trainable.items():
            tensors[f"trainable.{name}"] = parameter.detach().cpu().contiguous()
            # A parameter that has not been trained yet has no moments.
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value.cpu()
        if self.selector.scores is not None:
            tensors["scores"] = self.selector.scores
        progress = {
            "step": step,
            "best": self.best,
            "active": self.selector.active,
            "failed": self.selector.failed,
            "loss_scale": [self.loss_scale.value, self.loss_scale.good_steps],
        }
        metadata = {"progress": json.dumps(progress)}
        # The logs' lines up to this step must not be lost when the state is there.
        for log in LOGS:
            with saving(self.out / log), contextlib.suppress(FileNotFoundError):
                flush(self.out / log)
        write(
            self.out / "state.safetensors",
            lambda partial: save_file(tensors, partial, metadata=metadata),
        )

    @torch.no_grad()
    def load_state(self):
        """Undo `save_state`, cut the logs back to what was written before it, and return its
        step."""
        path = self.out / "state.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            problem = f"{path} is not a whole safetensors file ({error})"
            raise UserError(f"{problem}: --overwrite starts anew") from None
        moments = {}  # the optimiser knows parameters by their positions
        for position, (name, parameter) in enumerate(self.trainable.items()):
            parameter.copy_(tensors[f"trainable.{name}"])
            prefix = f"optimizer.{name}."
            keys = [key for key in tensors if key.startswith(prefix)]
            if keys:
                moments[position] = {key.removeprefix(prefix): tensors[key] for key in keys}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.selector.scores = tensors.get("scores")
        self.selector.activate(progress["active"])
        self.selector.failed = progress["failed"]
        # Runs that began before there was float16 have none.
        if "loss_scale" in progress:
            self.loss_scale.value, self.loss_scale.good_steps = progress["loss_scale"]
        self.saved = progress["step"]
        for record in read_log(self.out / "log.jsonl"):
            if "val_loss" in record and record["step"] <= self.saved:
                # A loss that is not finite is null in the log.
                loss = math.nan if record["val_loss"] is None else record["val_loss"]
                self.validated[record["step"]] = loss
        # The state was saved before its own validation.
        self.best = min(progress["best"], self.validated.get(self.saved, math.inf))
        if is_first():
            with saving(self.out):
                clear_partial(self.out)
            self.cut_logs()
        return self.saved

    def cut_logs(self):
        """Drop the lines of the logs that the resumed run writes again: those of later steps."""
        for log in LOGS:
            kept = []
            for record in read_log(self.out / log):
                if record["step"] <= self.saved:
                    kept.append(line_of(record))
            write(self.out / log, "".join(kept))

    def finish(self, device):
        """Write summary.json, the run in six numbers for extras.compare, and draw run.png."""
        print(f"best validation loss {self.best:.4f}; its {self.kept} is in {self.out}")
        if not is_first():
            return
        log = read_log(self.out / "log.jsonl")
        steps = steps_of(log)
        loss_before = validations_of(log)[0]["val_loss"]
        if self.best == loss_before:
            what = f"the {self.kept} kept is the untrained one"
            print(f"nothing improved on the loss before training: {what}")
        tokens = sum(step["tokens"] for step in steps)
        seconds = sum(step["seconds"] for step in steps)
        summary = {
            "trainable": sum(p.numel() for p in self.trainable.values()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "val_loss_before": loss_before,
            "val_loss": self.best,
            "tokens_per_second": tokens / seconds,
        }
        if device.type == "cuda":
            summary["peak_memory"] = torch.cuda.max_memory_allocated()  # bytes
        elif resource:  # memory of the whole process; in kilobytes, but on a Mac in bytes
            unit = 1 if sys.platform == "darwin" else 1024
            summary["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        write(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        draw_run(self.out)


# A run depends on the code in these files.
CODE = ("model.py", "rosa.py", "train.py", "data/tasks.py", "data/tokenizer.py", "data/toy.py")
KERNELS = ("extras/kernels.py", "extras/operators.py")  # not with --plain


def describe(args, ckpt, model, train_set, val_set):
    """What args.json holds: the arguments, the code, and hashes by which a resumption knows the
    checkpoint and the data again. The checkpoint's weights are many: the hash is of the names and
    sizes of their files, and of one small tensor, in which models of the same shape differ."""
    files = [(file.name, file.stat().st_size) for file in checkpoint_files(ckpt)]
    norm = model.model.norm.weight.to(getattr(torch, args.dtype))
    content = {
        "config.json of the checkpoint": (ckpt / "config.json").read_bytes(),
        "weight files of the checkpoint": files,
        "final norm of the checkpoint": norm.tolist(),
        "training examples": train_set,
        "held-out examples": val_set,
    }
    if getattr(args, "peft_config", None):
        content["options in --peft-config"] = read_json(args.peft_config)
    hashes = {name: hash_of(value) for name, value in content.items()}
    description = vars(args) | {"format": FORMAT, "hashes": hashes, "code": code_of(args)}
    return json.loads(json.dumps(description, default=str))


def code_of(args):
    """file -> fingerprint of the files that a run with these arguments depends on."""
    files = CODE if args.plain else CODE + KERNELS
    if args.quantize:
        files += (QUANTIZED,)
    return {name: file_fingerprint(HERE / name) for name in files}


def check_out(args, ckpt):
    """Raise UserError where --out cannot be this run's directory."""
    # A run that ended before its first validation, by a mistake perhaps, has left nothing to keep.
    holds_a_run = (args.out / "args.json").exists() and best_step(args.out) is not None
    if holds_a_run and not (args.resume or args.overwrite):
        problem = f"--out {args.out} holds a run already"
        advice = "--resume continues it, --overwrite starts anew, --out NAME keeps both"
        raise UserError(f"{problem}: {advice}")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: choose a directory for the run")
    if args.out.resolve() == ckpt.resolve():
        problem = f"--out {args.out} is the checkpoint itself"
        raise UserError(f"{problem}: choose another directory for the run")


def check_same(args, description):
    """Raise UserError naming a difference between this run and the one that was begun in --out."""
    run = f"the run in {args.out}"
    if not (args.out / "args.json").is_file():
        problem = f"--resume: {args.out} has no args.json: nothing was saved there yet"
        raise UserError(f"{problem}; run without --resume")
    before = read_json(args.out / "args.json")
    its_format = before.get("format", 1)
    if its_format != FORMAT:
        problem = f"{run} was begun by another version, in format {its_format} and not {FORMAT}"
        raise UserError(f"--resume: {problem}: --overwrite starts anew")
    for key, value in before.items():
        if key in (*NOT_COMPARED, "hashes", "format", "code"):
            continue
        now = description.get(key)
        if now != value:
            raise UserError(f"--resume: {run} has --{key.replace('_', '-')} {value}, not {now}")
    for name, value in before.get("hashes", {}).items():
        if description["hashes"].get(name) != value:
            raise UserError(f"--resume: the {name} differ from those that {run} began with")
    if edited := edited_since(before, description["code"]):
        since = f"since {run} began: it is resumed with the code of now"
        print(f"code       {have_been_edited(edited)} {since}")


def draw_run(out):
    """run.png: the losses, the learning rate, and of every layer its score at each probe and
    whether it trained."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        advice = "pip install matplotlib, then the same command with --resume draws it"
        print(f"run.png is not drawn: {advice}")
        return
    args = read_json(out / "args.json")
    log = read_log(out / "log.jsonl")
    steps = steps_of(log)
    validations = validations_of(log)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")  # the shape of a slide
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 3])
    figure.suptitle(
        f"{Path(os.path.abspath(args['ckpt'])).name} on {trained_on(args)}: {args['method']}"
    )

    numbers = [record["step"] for record in steps]
    losses = [record["loss"] for record in steps]  # None, drawn as a gap, where it is not finite
    top.plot(numbers, np.array(losses, dtype=float), color="0.75", label="training batch")
    validated = [record["step"] for record in validations]
    held_out = [record["val_loss"] for record in validations]
    label = f"held out: {held_out[0]:.3f} → {min(held_out):.3f}"
    top.plot(validated, held_out, "o", markersize=5, clip_on=False, label=label)
    scale = "log" if held_out[0] > 5 * min(held_out) else "linear"
    top.set(ylabel="loss, nats per token", yscale=scale)
    top.legend()

    middle.plot(numbers, [record["lr"] for record in steps], color="tab:green")
    middle.ticklabel_format(axis="y", scilimits=(0, 0))
    middle.set(ylabel="learning\nrate", ylim=(0, None))

    last = numbers[-1]
    bottom.set(xlabel="optimiser step", ylabel="layer", xlim=(0, last))
    title = "DLS: gradient of each layer's norms (blue), and the layers that train (lines)"
    bottom.set_title(title, fontsize="medium")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    probes = read_log(out / "layers.jsonl")
    if probes:
        image = draw_probes(bottom, probes, last)
        figure.colorbar(image, ax=bottom, label="share of the highest")
    write(out / "run.png", lambda partial: figure.savefig(partial, format="png", dpi=150))


def draw_probes(axes, probes, last):
    """Draw the layers' scores at each probe and which layers trained from there to the next probe,
    up to step `last`; return the image of the scores."""
    edges = [probe["step"] - 1 for probe in probes] + [last]
    scores = torch.tensor([probe["scores"] for probe in probes]).T  # [L, probes]
    shares = (scores / scores.amax(0)).numpy()
    borders = [layer - 0.5 for layer in range(len(scores) + 1)]
    image = axes.pcolormesh(edges, borders, shares, cmap="Blues", vmin=0, vmax=1)
    # Points: a line is a third of its layer's height, so that the layer's scores stay visible.
    width = min(2.5, 40 / len(scores))
    for probe, left, right in zip(probes, edges, edges[1:]):
        axes.hlines(probe["active_layers"], left, right, color="tab:orange", linewidth=width)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return image
