"""Statements about extras/runs.py: whatever ends a run, and whenever, it can go on, and ends in the
same bytes."""

import functools
import json
import math
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import best_step, forkserver, random_model, read_log, read_steps, read_validations
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import eval as eval_script
import rosa
import train
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import runs
from extras.checkpoints import choose_device_and_dtype
from model import Llama

RUN = (
    "--ckpt ckpt --max-steps 10 --batch-size 4 --val-size 8 --eval-every 3 --save-every 2 "
    "--select-every 3 "
    "--score-ema 0.5 --lr 1e-2 --device cpu --dtype float32 --out out"
).split()

pytestmark = pytest.mark.usefixtures("unflushed")
SIGNALS = signal.SIGINT, signal.SIGTERM


def write_model(seed=0):
    random_model(
        seed, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=512
    ).save_pretrained("ckpt")


@pytest.fixture
def ckpt(ckpt, monkeypatch):
    """The directory `ckpt` in an empty working directory, with 2 layers and a context of 512."""
    write_model()
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)


def run(*arguments):
    train.run([*RUN, *map(str, arguments)])


@functools.cache
def whole(*options):
    """The directory of an undisturbed run with these options, made once for all tests."""
    directory = Path("whole", *options).resolve()
    run(*options, "--out", directory)
    return directory


def ends(capsys, *arguments):
    """Make a run that ends early. Returns its exit status, and the line that it prints at its
    end."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    return stopped.value.code, line


def files(out="out"):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def contents(out="out"):
    """The files that a run has left. Times, memory and the place of the checkpoint, in which two
    runs may differ, are replaced by 0."""
    left = files(out)
    if "adapter_config.json" in left:
        left["adapter_config.json"] = json.loads(left["adapter_config.json"]) | {
            "base_model_name_or_path": 0
        }
    left["log.jsonl"] = re.sub(rb'"seconds": [^,]+', b'"seconds": 0', left["log.jsonl"])
    left["args.json"] = json.loads(left["args.json"]) | {"resume": 0, "overwrite": 0, "out": 0}
    left["summary.json"] = json.loads(left["summary.json"]) | {
        "tokens_per_second": 0,
        "peak_memory": 0,
    }
    return left


def rewrite(file, **changes):
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def state(out="out"):
    with safe_open(Path(out) / "state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"]), {
            name: file.get_tensor(name) for name in file.keys()
        }


def at_save(patch, act):
    """Call act(step) after each save of the state."""
    save = runs.Run.save_state
    patch.setattr(runs.Run, "save_state", lambda self, step: (save(self, step), act(step)))


def interrupt(*_):
    raise KeyboardInterrupt


def run_until(last, *arguments):
    """Make a run that is interrupted when it has saved step `last`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_save(patch, lambda step: step == last and interrupt())
        run(*arguments)


# --- kill -9 ---


def train_and_die(arguments, fatal, count):
    """For a process that trains and kills itself. It touches the disk before and after it flushes,
    renames or deletes a file, and while it writes tensors; touch number `fatal` kills it. `count`
    is the number of touches so far."""
    # tqdm's usual lock is a semaphore of the system, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    tasks.TOY_SIZES["train"] = 40

    def touch():
        count.value += 1
        if count.value == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def touching(*inputs, **options):
            touch()
            result = function(*inputs, **options)
            touch()
            return result

        return touching

    def half_saved(tensors, path, **options):
        save_file(tensors, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        touch()
        path.write_bytes(whole)

    os.replace, os.fsync, os.unlink, Path.unlink = map(
        around, (os.replace, os.fsync, os.unlink, Path.unlink)
    )
    runs.save_file = half_saved
    with open("printed.txt", "a") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    train.run(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--overwrite"], []])
def test_a_run_killed_many_times_ends_as_one_that_was_never_stopped(ckpt, options):
    processes = forkserver()
    count = processes.Value("i", lock=False)  # a lock would stay closed after a kill

    def live(*more, fatal=None, seconds=60):
        count.value = 0
        child = processes.Process(
            target=train_and_die, args=([*RUN, "--max-steps", "20", *more], fatal, count)
        )
        child.start()
        child.join(seconds)
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), Path("printed.txt").read_text()
        return child.exitcode

    # A first short run: the time that the server takes to start shall not be measured
    live("--max-steps", "1", "--out", "first")
    begin = time.monotonic()
    assert live("--out", "whole") == 0 and count.value > 80
    touches, seconds = count.value, time.monotonic() - begin
    if options:  # the directory holds another run, to which nobody may fall back
        shutil.copytree("whole", "out")
        rewrite("out/args.json", seed=9)

    def begun():
        return (
            Path("out/args.json").exists()
            and json.loads(Path("out/args.json").read_text())["seed"] == 0
        )

    rng, kills, steps = random.Random(0), 0, []
    while kills < 15:
        fatal = rng.randint(1, touches // 4) if rng.random() < 0.7 else None
        resume = ["--resume"] if begun() else options
        kills += (
            live(*resume, fatal=fatal, seconds=60 if fatal else rng.uniform(0, seconds / 2)) != 0
        )
        if begun() and Path("out/state.safetensors").exists():
            # The state can be read at any time, and from the first validation on so can the adapter
            steps.append(state()[0]["step"])
            if read_validations("out"):
                rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert steps == sorted(steps) and len(set(steps)) > 1  # a kill loses nothing that was saved
    assert live("--resume") == 0 and contents() == contents("whole")


# --- interruptions and signals ---

KINDS = "--dtype bfloat16 --select random", "--method full --lr 1e-3"
KINDS = *KINDS, "--method peft:LORA --peft-config dropout.json --k-ratio 0.5"


@pytest.mark.parametrize("options", KINDS)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(ckpt, options):
    if "peft:LORA" in options:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.5}')
    arguments = [
        *"--max-steps 6 --save-every 1 --select-every 2 --k-ratio 0.5".split(),
        *options.split(),
    ]
    run_until(4, *arguments)  # before a selection of layers
    for name in runs.LOGS:  # it had gone on beyond what was saved, and was stopped amid a line
        with open(Path("out", name), "a") as log:
            log.write('{"step": 5, "loss": 0}\n{"step": 6, "val_loss": 0}\n{"ste')
    run(*arguments, "--resume")
    assert contents() == contents(whole(*arguments))


def test_moments_go_by_the_names_of_their_parameters_whatever_the_order_of_these(ckpt, monkeypatch):
    # Clipping adds up the gradients, and the rounding of a sum depends on its order
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    run("--max-steps", 4, "--out", "plain order")
    run_until(2, "--max-steps", 4)
    _, tensors = state()
    moments = {name.removesuffix(".exp_avg") for name in tensors if name.endswith(".exp_avg")}
    assert (
        moments and {name.replace("optimizer.", "trainable.") for name in moments} < tensors.keys()
    )
    listed = Llama.named_parameters
    monkeypatch.setattr(
        Llama, "named_parameters", lambda self, **how: reversed(list(listed(self, **how)))
    )
    run("--max-steps", 4, "--resume")
    assert contents() == contents("plain order")


def test_what_the_end_of_a_run_adds_is_made_up_for(ckpt):
    shutil.copytree(whole(), "out")
    for name in ("summary.json", "run.png"):
        Path("out", name).unlink(missing_ok=True)
    # safetensors writes to a file with a name like the second
    for leftover in ("adapter_config.json.partial", ".tmpa1B2c3"):
        Path("out", leftover).write_text("{")
    run("--resume")
    assert contents() == contents(whole())


MOMENTS = [(signal.SIGINT, 130, "before_forward", 5), (signal.SIGTERM, 143, "after_backward", 6)]


@pytest.mark.parametrize("number, code, moment, last", MOMENTS)
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(
    ckpt, number, code, moment, last, monkeypatch, capsys
):
    """A signal that comes after the gradients of all processes were added up ends the run after the
    next step."""
    plain, calls, handlers = (
        getattr(rosa.LayerSelector, moment),
        [],
        [signal.getsignal(n) for n in SIGNALS],
    )

    def signalled(*inputs):
        calls.append(inputs)
        if len(calls) == 5:
            signal.raise_signal(number)
        plain(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(rosa.LayerSelector, moment, signalled)
        stopped, line = ends(capsys, "--out", "a run")
    assert stopped == code and len(read_steps("a run")) == last
    assert [signal.getsignal(n) for n in SIGNALS] == handlers  # the former handlers are back
    stop, _, command = line.partition(". To resume: ")
    assert stop == (
        f"train.py: stopped after step {last}; the adapter kept is the best so far, of step "
        f"{best_step('a run')}"
    )
    python, script, *resuming = shlex.split(command)
    assert (python, Path(script).resolve()) == ("python", Path(train.__file__).resolve())
    assert resuming == [*RUN, "--out", "a run", "--resume"]
    train.run(resuming)
    assert contents("a run") == contents(whole())


def test_a_validation_that_is_in_the_log_holds_whatever_its_repetition_gives(
    ckpt, monkeypatch, capsys
):
    """An edited file may give another loss; but by that of the log the adapter on disk was kept."""
    train.run([*RUN, "--out", "a run"])
    before = contents("a run")
    best = min(read_validations("a run").values())
    monkeypatch.setattr(train, "validate", lambda *_: 99.0)
    capsys.readouterr()
    train.run([*RUN, "--out", "a run", "--resume"])
    printed = capsys.readouterr()
    assert contents("a run") == before
    last = read_validations("a run")[10]
    shown = f"step    10  validation loss 99.0000; {last:.4f} is in log.jsonl, and holds"
    assert shown in printed.out + printed.err
    assert f"best validation loss {best:.4f}" in printed.out


@pytest.mark.parametrize("moment", ["before it", "before its line", "after its line"])
@pytest.mark.parametrize("step", [0, 3, 10])
def test_a_run_that_ends_when_a_validation_is_due_makes_it_and_its_line_once(
    ckpt, monkeypatch, capsys, moment, step
):
    """Every third step is validated, after it was saved."""

    keep_best, write_log = runs.Run.keep_best, runs.write_log

    def keep(self, now, val_loss):
        if now == step and moment == "before it":
            interrupt()
        keep_best(self, now, val_loss)

    def write(path, record):
        is_it = "val_loss" in record and record["step"] == step
        if is_it and moment == "before its line":
            interrupt()
        write_log(path, record)
        if is_it and moment == "after its line":
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "keep_best", keep)
        patch.setattr(runs, "write_log", write)
        assert ends(capsys)[0] == 130
    assert state()[0]["step"] == step == len(read_steps("out"))
    assert (step in read_validations("out")) == (moment == "after its line")
    run("--resume")
    assert contents() == contents(whole())


def test_a_second_signal_ends_a_run_at_once_which_the_first_says(monkeypatch, capfd):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    noting = runs.Run(SimpleNamespace(out=None, method="rosa"), *[None] * 7)
    noting.note_signals()
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert noting.signals == [signal.SIGINT] and handlers == dict.fromkeys(SIGNALS, signal.SIG_DFL)
    assert (
        "a second time ends it at once, and then what is saved is step 0\n"
        in capfd.readouterr().err
    )


def test_an_interruption_while_loading_is_a_line(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(Llama, "from_pretrained", interrupt)
    with pytest.raises(SystemExit) as stopped:
        eval_script.run("--ckpt ckpt --limit 1".split())
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith(
        "eval.py: interrupted. What was scored"
    )


# --- another run is not taken for this one ---


def test_what_auto_has_come_to_is_part_of_the_run(ckpt):
    run("--dtype", "auto", "--max-steps", 1)
    assert (
        json.loads(Path("out/args.json").read_text())["dtype"]
        == str(choose_device_and_dtype("cpu")[1])[6:]
    )


def test_a_run_is_not_begun_over_another_unless_asked_to(ckpt, monkeypatch, capsys):
    shutil.copytree(whole(), "out")
    before = files()
    code, line = ends(capsys, "--seed", 1)
    assert code == 2 and files() == before
    assert line.endswith(
        "--out out holds a run already: --resume continues it, --overwrite starts anew, --out "
        "NAME keeps both"
    )
    # A run that starts anew and dies before its first step leaves nothing of the old one to resume.
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupt)
        code, line = ends(capsys, "--overwrite", "--seed", 1)
    assert code == 130 and line.startswith("train.py: interrupted. To resume: ")
    run("--resume", "--seed", 1)
    assert contents() == contents(whole("--seed", "1"))


def test_what_is_left_of_a_run_that_another_was_about_to_replace_is_no_run(
    ckpt, monkeypatch, capsys
):
    shutil.copytree(whole(), "out")
    unlink = Path.unlink

    def interrupted(path, **options):
        interrupt() if path.name == "log.jsonl" else unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        assert ends(capsys, "--overwrite", "--seed", 1)[0] == 130
    code, line = ends(capsys, "--resume")
    assert code == 2 and "nothing was saved there" in line
    run("--seed", 1)
    assert contents() == contents(whole("--seed", "1"))


def forget_format():
    args = json.loads(Path("out/args.json").read_text())
    del args["format"]
    Path("out/args.json").write_text(json.dumps(args))


def another_dtype():
    tensors = load_file("ckpt/model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, "ckpt/model.safetensors"
    )


def write_examples(end=""):
    examples = toy.examples("train", 40)
    examples[17]["output"] += end
    Path("data.json").write_text(json.dumps(examples))


CHANGES = {
    "in format 1 and not 4: --overwrite starts anew": ("", forget_format),
    "in format 3 and not 4: --overwrite starts anew": (
        "",
        lambda: rewrite("out/args.json", format=3),
    ),
    "has --lr 0.01, not 0.02": ("--lr 2e-2", lambda: None),
    "has --dtype float32, not bfloat16": ("--dtype bfloat16", lambda: None),
    "config.json of the checkpoint differ": (
        "",
        lambda: rewrite("ckpt/config.json", rope_theta=5e5),
    ),
    "weight files of the checkpoint differ": ("", another_dtype),
    "final norm of the checkpoint differ": ("", lambda: write_model(1)),
    "examples differ": ("", lambda: write_examples("!")),
    "options in --peft-config differ": ("", lambda: rewrite("dropout.json", lora_dropout=0.2)),
}


def test_a_run_goes_on_with_smaller_micro_batches_and_another_spelling_of_its_paths(ckpt):
    run("--micro-batch-size", 4)
    before = read_steps("out")
    run_until(4, "--micro-batch-size", 4, "--overwrite")
    run("--resume", "--micro-batch-size", 2, "--ckpt", Path("ckpt").absolute())
    for one, other in zip(before, read_steps("out"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("message", CHANGES)
def test_resuming_something_else_is_refused_and_the_difference_named(ckpt, capsys, message):
    write_examples()
    start = "--train-file data.json --max-steps 1".split()
    if "peft" in message:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.1}')
        start += "--method peft:LORA --peft-config dropout.json".split()
    shutil.copytree(whole(*start), "out")
    options, change = CHANGES[message]
    change()
    before = files()
    code, line = ends(capsys, *start, *options.split(), "--resume")
    assert code == 2 and "--resume: the " in line and message in line and files() == before


# --- disks ---


@pytest.fixture
def small_disk(ckpt):
    """The directory `out` is a small file system: it has room for the adapters, but not for the
    moments of AdamW too."""
    Path("out").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", "out"], capture_output=True
    ).returncode:
        pytest.skip("only root can make a file system")
    yield
    subprocess.run(["umount", "out"], check=True)


def assert_stops_in_a_line(capsys, error):
    """A run ends with a line, and what it has saved before is whole."""
    code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and error in line and line.endswith("--resume")
    assert state()[0]["step"] < 10
    rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    # The part of a file that was written before the error is deleted
    assert not list(Path("out").glob("*.safetensors.partial"))


def test_a_full_disk_ends_the_run_in_a_line_and_it_goes_on_once_there_is_room(small_disk, capsys):
    assert_stops_in_a_line(capsys, "No space left on device")
    subprocess.run(["mount", "-o", "remount,size=40m", "out"], check=True)
    run("--resume")
    assert contents() == contents(whole())


TROUBLES = {
    "read-only": ("os.replace", "state.safetensors", OSError(30, "Read-only file system")),
    "a disk that cannot flush": (
        "extras.runs.flush",
        "log.jsonl",
        OSError(5, "Input/output error"),
    ),
    "no permission": ("builtins.open", "log.jsonl", PermissionError(13, "Permission denied")),
    "no space": (
        "rosa.save_file",
        "adapter_model",
        SafetensorError("I/O error: No space left on device"),
    ),
}


@pytest.mark.parametrize("function, file, error", TROUBLES.values(), ids=TROUBLES)
def test_what_cannot_be_written_ends_a_run_in_a_line(
    ckpt, monkeypatch, capsys, function, file, error
):
    works = pkgutil.resolve_name(function)

    def broken(*inputs, **options):  # on that file, after step 3
        named = any(file in str(each) for each in inputs if isinstance(each, (str, Path)))
        if named and len(read_steps("out")) > 2:
            raise error
        return works(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(function, broken)
        assert_stops_in_a_line(capsys, str(error))
    assert state()[0]["step"] in (2, 3, 4)
    run("--resume")
    assert contents() == contents(whole())


def test_a_directory_that_vanished_ends_the_run_in_a_line_and_is_not_made_again(
    ckpt, capsys, monkeypatch
):
    losses = iter(range(9, 0, -1))  # each is the best so far, which is to be saved
    monkeypatch.setattr(train, "validate", lambda *_: shutil.rmtree("out") or next(losses))
    code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and "No such file or directory" in line
    assert not Path("out").exists()


# --- what is not finite ---


def spoil(patch, steps, what):
    """Make the gradients of these steps nan; if `what` is "loss", make the loss nan too."""

    def spoiled(_, model, loss, signals):
        if len(read_steps("out")) not in steps:  # counted from 0
            return loss.item(), signals
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        return math.nan if what == "loss" else loss.item(), signals

    patch.setattr(train, "all_reduce_gradients", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(ckpt, monkeypatch, capsys, what):
    states = []
    at_save(monkeypatch, lambda step: states.append(state()))
    spoil(monkeypatch, (0, 4, 5, 7), what)
    run("--save-every", 1)
    log = read_steps("out")
    assert [record["step"] for record in log if record.get("skipped")] == [1, 5, 6, 8]
    assert all(
        (record["loss"] is None) == (record.get("skipped", False) and what == "loss")
        for record in log
    )
    # No state was saved after a step that was not applied
    assert [progress["step"] for progress, _ in states] == [0, 2, 3, 4, 7, 9, 10]
    updates = []
    for _, tensors in states:
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        updates.append(
            max((t.item() for name, t in tensors.items() if name.endswith(".step")), default=0)
        )
    assert updates == [0, 1, 2, 3, 4, 5, 6]
    # Both layers are active until a probe succeeds
    assert [len(record["active_layers"]) for record in log] == [2] + [1] * 9
    assert [record["step"] for record in read_log("out", "layers.jsonl")] == [2, 4, 7, 10]
    said = r"not applied: loss [\w.]+, gradient nan in example \d+(, example \d+){3} of toy\n"
    assert len(re.findall(said, capsys.readouterr().out)) == 4


def test_three_such_steps_in_a_row_end_the_run_and_it_goes_on_from_the_state_before(
    ckpt, monkeypatch, capsys
):
    """It names the places of the step's examples in the file, whatever was left out before them."""
    examples = toy.examples("train", 40)
    examples[2]["output"] = examples[9]["output"] = ""
    Path("data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    options = "--train-file data.jsonl --skip-empty".split()
    with monkeypatch.context() as patch:
        spoil(patch, (5, 6, 7), "loss")
        code, line = ends(capsys, *options)
        assert code == 1 and "step 8 was the third in a row" in line and "loss nan" in line
        assert (
            "The last good state, of step 4, is in out/state.safetensors" in line
            and state()[0]["step"] == 4
        )
        (places,) = re.findall("gradient nan in (.*) of data.jsonl. The last good", line)
        numbers = [int(place.removeprefix("line ")) for place in places.split(", ")]
        tokenizer = load_tokenizer("ckpt")
        named = [tasks.encode_example(examples[number - 1], tokenizer) for number in numbers]
        train_set, *_ = train.load_data(train.parse_args([*RUN, *options]), tokenizer)
        lengths = [len(prompt) + len(response) for prompt, response in train_set]
        assert named == [train_set[i] for i in train.make_batches(lengths, 4, "0 0")[7]]
        assert ends(capsys, *options, "--resume")[1] == line
    run(*options, "--resume")
    assert contents() == contents(whole(*options))
