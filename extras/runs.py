"""A run of train.py: its directory with the best adapter, its logs, the state to resume from;
signals.
A run killed at any moment and resumed ends in the same bytes as one that never was.
Without it: rosa.save_adapter(model, directory) after the last step.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data.errors import UserError
from extras import adapters
from extras.checkpoints import copy_companions, read_json, stored_tensors
from extras.commands import Stop
from extras.distributed import by_the_first, gather, is_first
from extras.records import (
    best_step,
    clear_partial,
    edited_since,
    flush,
    have_been_edited,
    line_of,
    read_log,
    saving,
    trained_on,
    write,
    write_log,
)
from extras.source import HERE, file_fingerprint

try:
    import resource
except ImportError:  # Windows
    resource = None

FORMAT = 3  # of a run directory; in 2 the step that is saved was validated already; 1 had no number
LOGS = ("log.jsonl", "layers.jsonl")
# What eval.py and extras.forgetting leave beside it
RESULTS = ("results.json", "predictions.jsonl", "losses.json")
# What may differ between a run and its resumption.
NOT_COMPARED = (
    "resume",
    "overwrite",
    "out",
    "device",
    "save_every",
    "checkpoint_activations",
    "shard",
    "plain",
)
# With micro-batches of another size the losses are the same to rounding only. Of what these name
# hashes are compared.
NOT_COMPARED += ("micro_batch_size", "ckpt", "data_dir", "train_file", "peft_config")


class Run:
    """A run directory, and what a run must know to stop after any step and go on.

    trainable: name -> parameter of what trains, in the optimiser's order."""

    def __init__(self, args, ckpt, model, trainable, optimizer, selector):
        self.args, self.out, self.ckpt, self.model = args, args.out, ckpt, model
        self.trainable, self.optimizer, self.selector = trainable, optimizer, selector
        self.best = math.inf  # validation loss, nats per token
        self.kept = "checkpoint" if args.method == "full" else "adapter"
        self.saved = 0  # the step that the state on disk is of
        self.skipped = 0  # steps in a row that were not applied
        self.signals = []  # SIGINT and SIGTERM, as they come

    def resume(self):
        """The step to go on from: that of the state in the directory with --resume, else None."""
        step = (
            self.load_state()
            if self.args.resume and (self.out / "state.safetensors").exists()
            else None
        )
        if len(set(gather(step))) > 1:
            problem = f"--resume: {self.out} holds different states on different machines"
            raise UserError(f"{problem}: share it, or copy it to each")
        return step

    @by_the_first
    def begin(self, description):
        """Make way in the directory for a run, say in args.json which."""
        with saving(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            results = RESULTS if self.holds_a_run() else ()  # of an adapter that is replaced now
            if not self.args.resume:  # first: what is left of another run is from here on no run
                (self.out / "args.json").unlink(missing_ok=True)
            for file in ("state.safetensors", *LOGS, "run.png", "summary.json", *results):
                (self.out / file).unlink(missing_ok=True)
            clear_partial(self.out)
        write(self.out / "args.json", json.dumps(description, indent=2) + "\n")
        write_log(self.out / "log.jsonl", {"step": 0})

    def holds_a_run(self):
        kept = ("args.json", "adapter_model.safetensors", "model.safetensors")
        return any((self.out / file).exists() for file in kept)

    def can_apply(self, step, loss, norm, places_in_file):
        """Whether a step can be applied: one that is not finite would spoil the weights for good.
        places_in_file: those of its examples."""
        self.skipped = 0 if math.isfinite(loss) and math.isfinite(norm) else self.skipped + 1
        if self.skipped:
            self.culprits = f"loss {loss:.3g}, gradient {norm:.3g}, examples {places_in_file}"
            tqdm.write(f"step {step:5}  not applied: {self.culprits}")
        return not self.skipped

    def keep_best(self, step, val_loss):
        """The adapter kept is the best one, not the last one. The loss goes into the step's line in
        log.jsonl."""
        if step == 0 and not math.isfinite(val_loss):
            raise Stop(f"the validation loss is {val_loss} before training: is {self.ckpt} whole?")
        tqdm.write(
            f"step {step:5}  validation loss {val_loss:.4f}"
            + (" before training" if step == 0 else "")
        )
        if val_loss < self.best or step == 0:
            self.best = val_loss
            self.save_best()
        if is_first():
            log = self.out / "log.jsonl"
            *before, record = read_log(log)
            write(log, "".join(map(line_of, [*before, record | {"val_loss": val_loss}])))

    def log(self, record):
        """A line of log.jsonl, and after a selection of layers one of layers.jsonl; the first
        process writes."""
        if not is_first():
            return
        write_log(self.out / "log.jsonl", record | ({"skipped": True} if self.skipped else {}))
        if self.selector.selected:
            scores = self.selector.scores.tolist()
            selection = {
                "step": record["step"],
                "scores": scores,
                "active_layers": self.selector.active,
            }
            write_log(self.out / "layers.jsonl", selection)

    def save(self, step, total_steps, stop_requested):
        """Save the state every --save-every steps, before each validation, which a resumption then
        makes, and before the run stops; it stops here, after a signal or the third step in a row
        that was not applied."""
        if self.skipped == 3:
            state = (
                f"The last good state, of step {self.saved}, is in {self.out / 'state.safetensors'}"
            )
            message = f"step {step} was the third in a row that is not finite: {self.culprits}"
            raise Stop(f"{message}, counted from 0 in the training data. {state}")
        last = step == total_steps
        due = (
            last
            or stop_requested
            or step % self.args.save_every == 0
            or step % self.args.eval_every == 0
        )
        if due and not self.skipped:
            self.save_state(step)
            self.saved = step
        if stop_requested and not last:
            kept = f"the {self.kept} kept is the best so far, of step {best_step(self.out)}"
            raise Stop(
                f"stopped after step {step}; {kept}", 128 + (self.signals or [signal.SIGTERM])[0]
            )

    def note_signals(self):
        """From here on SIGINT and SIGTERM let the step end first; a second one ends the process at
        once."""

        def note(number, _):
            self.signals.append(number)
            handle(signal.SIG_DFL)
            if is_first():  # os.write: what print was doing, a signal may have interrupted
                again = (
                    f"a second time ends it at once, and then what is saved is step {self.saved}"
                )
                os.write(2, f"\nstopping once this step is done and saved; {again}\n".encode())

        def handle(handler):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handler)

        handle(note)

    @by_the_first
    def save_best(self):
        """The adapter, or with --method full a whole checkpoint, tokenizer included: `eval.py
        --ckpt` takes it."""
        new = self.out / "best.partial"
        with saving(new):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            if self.kept == "checkpoint":
                self.model.save_pretrained(new)
                copy_companions(self.ckpt, new)
            else:
                adapters.save_adapter(self.model, new)
            for file in new.iterdir():
                write(self.out / file.name, lambda partial, file=file: os.replace(file, partial))
            new.rmdir()

    @by_the_first
    def save_state(self, step):
        """Everything that the rest of the run depends on, in one file. The random state is a
        function of the step."""
        tensors = {
            f"trainable.{name}": p.detach().cpu().contiguous() for name, p in self.trainable.items()
        }
        # One that has not been trained yet has no moments
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value.cpu()
        if self.selector.scores is not None:
            tensors["scores"] = self.selector.scores
        progress = {
            "step": step,
            "best": self.best,
            "active": self.selector.active,
            "failed": self.selector.failed,
        }
        for log in LOGS:  # their lines up to this step are not to be lost when the state is there
            with saving(self.out / log), contextlib.suppress(FileNotFoundError):
                flush(self.out / log)
        write(
            self.out / "state.safetensors",
            lambda partial: save_file(
                tensors, partial, metadata={"progress": json.dumps(progress)}
            ),
        )

    @torch.no_grad()
    def load_state(self):
        """Undo `save_state`; returns the step. Log lines beyond it are dropped."""
        path = self.out / "state.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): --overwrite starts anew"
            ) from None
        moments = {}  # the optimiser's own state goes by position
        for i, (name, parameter) in enumerate(self.trainable.items()):
            parameter.copy_(tensors[f"trainable.{name}"])
            prefix = f"optimizer.{name}."
            if own_moments := {
                key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)
            }:
                moments[i] = own_moments
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.selector.scores = tensors.get("scores")
        self.selector.activate(progress["active"])
        self.selector.failed = progress["failed"]
        self.best, self.saved = progress["best"], progress["step"]
        if is_first():
            with saving(self.out):
                clear_partial(self.out)
            for log in LOGS:
                records = [
                    record for record in read_log(self.out / log) if record["step"] <= self.saved
                ]
                write(self.out / log, "".join(map(line_of, records)))
        return self.saved

    def finish(self, device):
        """summary.json, the run in six numbers for `python -m extras.compare`, and run.png."""
        print(f"best validation loss {self.best:.4f}; its {self.kept} is in {self.out}")
        if not is_first():
            return
        before, *steps = read_log(self.out / "log.jsonl")
        if self.best == before["val_loss"]:
            print(
                f"nothing improved on the loss before training: the {self.kept} kept is the "
                "untrained one"
            )
        summary = {
            "trainable": sum(p.numel() for p in self.trainable.values()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "val_loss_before": before["val_loss"],
            "val_loss": self.best,
            "tokens_per_second": sum(step["tokens"] for step in steps)
            / sum(step["seconds"] for step in steps),
        }
        if device.type == "cuda":
            summary["peak_memory"] = torch.cuda.max_memory_allocated()  # bytes
        elif resource:  # of the whole process; kilobytes, on a Mac bytes
            unit = 1 if sys.platform == "darwin" else 1024
            summary["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        write(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        draw_run(self.out)


# The files that a run depends on.
CODE = ("model.py", "rosa.py", "train.py", "data/tasks.py", "data/tokenizer.py", "data/toy.py")
KERNELS = ("extras/kernels.py", "extras/operators.py")  # not with --plain


def describe(args, ckpt, model, train_set, val_set):
    """args.json: the arguments, the code, and hashes by which a resumption knows the checkpoint and
    the data again. Of the checkpoint these are its config, what its tensors are, and one small
    tensor, by which models of a shape differ."""
    entries = stored_tensors(ckpt).items()
    content = {
        "config.json of the checkpoint": (ckpt / "config.json").read_bytes(),
        "tensors of the checkpoint": sorted(
            (name, entry.file.name, entry.file.stat().st_size, entry.shape, entry.dtype)
            for name, entry in entries
        ),
        "final norm of the checkpoint": model.model.norm.weight.to(
            getattr(torch, args.dtype)
        ).tolist(),
        "training examples": train_set,
        "held-out examples": val_set,
    }
    if getattr(args, "peft_config", None):
        content["options in --peft-config"] = read_json(args.peft_config)
    hashes = {
        name: hashlib.sha256(repr(value).encode()).hexdigest()[:16]
        for name, value in content.items()
    }
    code = {
        name: file_fingerprint(HERE / name) for name in (CODE if args.plain else CODE + KERNELS)
    }
    return json.loads(
        json.dumps(vars(args) | {"format": FORMAT, "hashes": hashes, "code": code}, default=str)
    )


def check_out(args, ckpt):
    """Raise UserError where --out cannot be this run's directory."""
    # A run that ended before its first validation, by a mistake perhaps, has left nothing to be
    # kept.
    holds_a_run = (args.out / "args.json").exists() and best_step(args.out) is not None
    if holds_a_run and not (args.resume or args.overwrite):
        message = (
            f"--out {args.out} holds a run already: --resume goes on with it, --overwrite "
            "starts anew"
        )
        raise UserError(f"{message}, --out NAME keeps both")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: choose a directory for the run")
    if args.out.resolve() == ckpt.resolve():
        raise UserError(
            f"--out {args.out} is the checkpoint itself: choose another directory for the run"
        )


def check_same(args, description):
    """Raise UserError naming a difference between this run and the one that was begun in --out."""
    if not (args.out / "args.json").is_file():
        message = f"--resume: {args.out} has no args.json: nothing was saved there yet"
        raise UserError(f"{message}; run without --resume")
    before = read_json(args.out / "args.json")
    if before.get("format", 1) != FORMAT:
        message = (
            f"--resume: the run in {args.out} was begun by another version, in format "
            f"{before.get('format', 1)}"
        )
        raise UserError(f"{message} and not {FORMAT}: --overwrite starts anew")
    for key, value in before.items():
        if (
            key not in (*NOT_COMPARED, "hashes", "format", "code")
            and (now := description.get(key)) != value
        ):
            raise UserError(
                f"--resume: the run in {args.out} has --{key.replace('_', '-')} {value}, not {now}"
            )
    for name, value in before.get("hashes", {}).items():
        if description["hashes"].get(name) != value:
            raise UserError(
                f"--resume: the {name} differ from those that the run in {args.out} began with"
            )
    if edited := edited_since(before, description["code"]):
        since = f"since the run in {args.out} began: it goes on with the code of now"
        print(f"code       {have_been_edited(edited)} {since}")


def draw_run(out):
    """run.png: the losses, the learning rate, and of every layer its score at each probe and
    whether it trained."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return print(
            "run.png is not drawn: pip install matplotlib, then the same command with --resume "
            "draws it"
        )
    args, log, probes = (
        read_json(out / "args.json"),
        read_log(out / "log.jsonl"),
        read_log(out / "layers.jsonl"),
    )
    steps, last = log[1:], log[-1]["step"]
    validated = [record for record in log if record.get("val_loss") is not None]
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")  # of a slide's shape
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 3])
    figure.suptitle(f"{Path(args['ckpt']).absolute().name} on {trained_on(args)}: {args['method']}")
    losses = [math.nan if record["loss"] is None else record["loss"] for record in steps]
    top.plot([record["step"] for record in steps], losses, color="0.75", label="training batch")
    held_out = [record["val_loss"] for record in validated]
    label = f"held out: {held_out[0]:.3f} → {min(held_out):.3f}"
    top.plot(
        [record["step"] for record in validated],
        held_out,
        "o",
        markersize=5,
        clip_on=False,
        label=label,
    )
    top.set(
        ylabel="loss, nats per token", yscale="log" if held_out[0] > 5 * min(held_out) else "linear"
    )
    top.legend()
    middle.plot(
        [record["step"] for record in steps], [record["lr"] for record in steps], color="tab:green"
    )
    middle.ticklabel_format(axis="y", scilimits=(0, 0))
    middle.set(ylabel="learning\nrate", ylim=(0, None))
    bottom.set(xlabel="optimiser step", ylabel="layer", xlim=(0, last))
    bottom.set_title(
        "DLS: gradient of each layer's norms (blue), and the layers that train (lines)",
        fontsize="medium",
    )
    bottom.xaxis.get_major_locator().set_params(integer=True)
    if probes:  # each colours the steps up to the next one
        edges = [probe["step"] - 1 for probe in probes] + [last]
        scores = torch.tensor([probe["scores"] for probe in probes]).T  # [L, probes]
        borders = [layer - 0.5 for layer in range(len(scores) + 1)]
        # Points: a third of a layer's height, so that its scores stay visible
        line = min(2.5, 40 / len(scores))
        image = bottom.pcolormesh(
            edges, borders, (scores / scores.amax(0)).numpy(), cmap="Blues", vmin=0, vmax=1
        )
        for probe, left, right in zip(probes, edges, edges[1:]):
            bottom.hlines(probe["active_layers"], left, right, color="tab:orange", linewidth=line)
        bottom.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=bottom, label="share of the highest")
    write(out / "run.png", lambda partial: figure.savefig(partial, format="png", dpi=150))
