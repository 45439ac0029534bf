"""Statements about stopping and resuming: whatever ends a run, and whenever, it can go on, and ends in the same bytes."""

import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import forkserver, random_model
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import rosa
import train
from data import tasks, toy
from extras import runs
from extras.checkpoints import choose_device_and_dtype
from model import Llama

ROOT = Path(train.__file__).parent
RUN = ["--ckpt", "ckpt", "--max-steps", "10", "--batch-size", "4", "--val-size", "8", "--eval-every", "3", "--save-every", "2",
       "--select-every", "3", "--score-ema", "0.5", "--lr", "1e-2", "--device", "cpu", "--dtype", "float32", "--out", "out"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 2 layers, a context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=512).save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)


def run(*arguments):
    train.run([*RUN, *map(str, arguments)])


WHOLE = {}


def run_whole():
    """The directory `whole`, as an undisturbed run leaves it."""
    if not WHOLE:
        run("--out", "whole")
        WHOLE.update({file.name: file.read_bytes() for file in Path("whole").iterdir()})
    Path("whole").mkdir(exist_ok=True)
    for name, content in WHOLE.items():
        Path("whole", name).write_bytes(content)


def ends(capsys, *arguments):
    """The exit status of a run that does not end well, and its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    return stopped.value.code, line


def contents(out):
    """What a run left, times and memory aside. Raises ValueError for what is not JSON by the book."""
    def strict(text):
        return json.loads(text, parse_constant=float.fromhex)

    held = {path.name: path.read_bytes() for path in Path(out).iterdir()}
    held["log.jsonl"] = [strict(line) | {"seconds": 0} for line in held["log.jsonl"].splitlines()]
    held["layers.jsonl"] = [strict(line) for line in held["layers.jsonl"].splitlines()]
    held["args.json"] = strict(held["args.json"]) | {"resume": 0, "overwrite": 0, "out": 0}
    held["summary.json"] = strict(held["summary.json"]) | {"tokens_per_second": 0, "peak_memory": 0}
    return held


def state(out="out"):
    with safe_open(Path(out) / "state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"]), {name: file.get_tensor(name) for name in file.keys()}


# --- kill -9 ---


def life(arguments, fatal, count=None):
    """A process that trains, and kills itself at its touch of the disk number `fatal`: before or after a file is flushed,
    renamed or deleted, in the middle of the tensors or of a line of a log. `count` is told how many there were."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is killed would leave behind
    tasks.TOY_SIZES["train"] = 40
    touches = 0

    def touch():
        nonlocal touches
        touches += 1
        if touches == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def touching(*given, **options):
            touch()
            result = function(*given, **options)
            touch()
            return result
        return touching

    save_file, dumps = runs.save_file, json.dumps

    def half_saved(tensors, path, **options):
        save_file(tensors, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        touch()
        path.write_bytes(whole)

    def half_written(path, record):
        line = dumps(record) + "\n"
        with open(path, "a") as file:
            file.write(line[: len(line) // 2])
            file.flush()
            touch()
            file.write(line[len(line) // 2 :])

    os.replace, os.fsync, os.unlink, Path.unlink = map(around, (os.replace, os.fsync, os.unlink, Path.unlink))
    runs.save_file, runs.write_log = half_saved, half_written
    with open("printed.txt", "a") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    train.run(arguments)
    if count is not None:
        count.value = touches


@pytest.mark.slow
@pytest.mark.parametrize("options, wanted", [(["--dtype", "float32", "--overwrite"], 20), (["--dtype", "bfloat16"], 10)],
                         ids=["float32", "bfloat16"])
def test_a_run_killed_many_times_ends_as_one_that_was_never_stopped(ckpt, options, wanted):
    processes, arguments = forkserver(), [*RUN, "--max-steps", "20", *options[:2]]
    count = processes.Value("i")
    first = processes.Process(target=int)  # the time that the server takes to start is not the run's
    first.start()
    first.join()
    begin = time.monotonic()
    whole = processes.Process(target=life, args=([*arguments, *options[2:], "--out", "whole"], None, count))
    whole.start()
    whole.join(60)
    assert whole.exitcode == 0 and count.value > 80
    seconds = time.monotonic() - begin
    if "--overwrite" in options:  # the directory holds another run, to which nobody may fall back
        shutil.copytree("whole", "out")
        Path("out/args.json").write_text(json.dumps(json.loads(Path("whole/args.json").read_text()) | {"seed": 9}))

    def begun():
        return Path("out/args.json").exists() and json.loads(Path("out/args.json").read_text())["seed"] == 0

    rng, kills, steps = random.Random(options[1]), 0, []
    while kills < wanted:
        fatal = rng.randint(1, count.value // 4) if rng.random() < 0.7 else None
        child = processes.Process(target=life, args=([*arguments, *(["--resume"] if begun() else options[2:])], fatal))
        child.start()
        child.join(60 if fatal else rng.uniform(0, seconds / 2))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL), Path("printed.txt").read_text()
        if begun() and Path("out/state.safetensors").exists():
            steps.append(state()[0]["step"])  # whole at every moment, and so is the best adapter
            rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert steps == sorted(steps) and len(set(steps)) > 1  # a kill loses nothing that was saved
    last = processes.Process(target=life, args=([*arguments, "--resume"], None))
    last.start()
    last.join(60)
    assert last.exitcode == 0, Path("printed.txt").read_text()
    assert contents("out") == contents("whole")


def test_what_the_end_of_a_run_adds_is_made_up_for(ckpt):
    run()
    before = contents("out")
    for name in ("summary.json", "layers.png"):
        Path("out", name).unlink(missing_ok=True)
    Path("out/adapter_config.json.partial").write_text("{")
    run("--resume")
    assert contents("out") == before


# --- another run is not taken for this one ---


def test_what_auto_has_come_to_is_part_of_the_run(ckpt):
    run("--dtype", "auto")
    assert json.loads(Path("out/args.json").read_text())["dtype"] == str(choose_device_and_dtype("cpu")[1])[6:]


def test_what_is_left_of_a_run_that_another_was_about_to_replace_is_no_run(ckpt, capsys):
    run()
    run("--out", "other", "--seed", 1)
    unlink, calls = Path.unlink, []

    def interrupted(path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        assert ends(capsys, "--overwrite", "--seed", 1)[0] == 130
    code, line = ends(capsys, "--resume")
    assert code == 2 and "nothing was saved there" in line
    run("--seed", 1)
    assert contents("out") == contents("other")


def another_config():
    config = json.loads(Path("ckpt/config.json").read_text())
    Path("ckpt/config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))


def another_dtype():
    config = Path("ckpt/config.json").read_text()
    Llama.from_pretrained("ckpt", dtype=torch.bfloat16).save_pretrained("ckpt")
    Path("ckpt/config.json").write_text(config)


def other_weights():
    random_model(1, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=512).save_pretrained("ckpt")


def another_example():
    examples = json.loads(Path("data.json").read_text())
    examples[17]["output"] += "!"
    Path("data.json").write_text(json.dumps(examples))


CHANGES = {
    "an argument": (lambda: None, ["--lr", "2e-2"], "has --lr 0.01, not 0.02"),
    "dtype": (lambda: None, ["--dtype", "bfloat16"], "has --dtype float32, not bfloat16"),
    "config": (another_config, [], "the config.json of the checkpoint differ"),
    "tensors": (another_dtype, [], "the tensors of the checkpoint differ"),
    "weights": (other_weights, [], "the final norm of the checkpoint differ"),
    "data": (another_example, [], "examples differ"),
    "options of peft": (lambda: Path("dropout.json").write_text('{"lora_dropout": 0.2}'), [], "the options in --peft-config differ"),
}


@pytest.mark.parametrize("change, arguments, message", CHANGES.values(), ids=CHANGES)
def test_resuming_something_else_is_refused_and_the_difference_named(ckpt, capsys, change, arguments, message):
    Path("data.json").write_text(json.dumps(toy.examples("train", 40)))
    start = ["--train-file", "data.json", "--max-steps", 1]
    if "peft" in message:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.1}')
        start += ["--method", "peft:LORA", "--peft-config", "dropout.json"]
    run(*start)
    before = contents("out")
    change()
    code, line = ends(capsys, *start, *arguments, "--resume")
    assert code == 2 and "--resume: the " in line and message in line
    assert contents("out") == before


# --- disks ---


@pytest.fixture
def small_disk(ckpt):
    """`out`, a file system of its own, too small for the moments of AdamW beside the adapters."""
    Path("out").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", "out"], capture_output=True).returncode:
        pytest.skip("only root can make a file system")
    yield
    subprocess.run(["umount", "out"], check=True)


def test_a_full_disk_ends_the_run_in_a_line_and_it_goes_on_once_there_is_room(small_disk, capsys):
    run_whole()
    code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and "No space left on device" in line and line.endswith("--resume")
    assert state()[0]["step"] < 10 and not list(Path("out").glob("*.safetensors.partial"))
    rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    subprocess.run(["mount", "-o", "remount,size=40m", "out"], check=True)
    run("--resume")
    assert contents("out") == contents("whole")


TROUBLES = {
    "read-only": ("os.replace", "state.safetensors", OSError(30, "Read-only file system")),
    "a disk that cannot flush": ("extras.runs.flush", "state.safetensors", OSError(5, "Input/output error")),
    "no space": ("extras.runs.save_file", "state.safetensors", SafetensorError("I/O error: No space left on device (os error 28)")),
    "no permission": ("builtins.open", "log.jsonl", PermissionError(13, "Permission denied")),
    "no space for layers.jsonl": ("builtins.open", "layers.jsonl", OSError(28, "No space left on device")),
    "no space for the best": ("rosa.save_file", "adapter_model", SafetensorError("I/O error: No space left on device")),
    "the best cannot take its place": ("os.replace", "out/adapter_model", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("function, file, error", TROUBLES.values(), ids=TROUBLES)
def test_what_cannot_be_written_ends_the_run_in_a_line_and_what_was_saved_is_whole(ckpt, capsys, function, file, error):
    run_whole()
    works = pkgutil.resolve_name(function)

    def broken(*arguments, **options):  # on that file, from step 3 on
        if any(file in str(a) for a in arguments if isinstance(a, (str, Path))) and len(runs.read_log(Path("out/log.jsonl"))) > 3:
            raise error
        return works(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, broken)
        code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and str(error) in line and line.endswith("--resume")
    assert state()[0]["step"] in (2, 4)
    rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert not list(Path("out").glob("*.safetensors.partial"))  # what could not be saved takes no room
    run("--resume")
    assert contents("out") == contents("whole")


@pytest.mark.parametrize("loss", [0.0, 99.0], ids=["the best is to be saved", "the log is to be written"])
def test_a_directory_that_vanished_ends_the_run_in_a_line_and_is_not_made_again(ckpt, capsys, monkeypatch, loss):
    validate, calls = train.validate, []

    def vanish(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            shutil.rmtree("out")
            return loss
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", vanish)
    code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and "No such file or directory" in line and not Path("out").exists()


# --- what is not finite ---


def spoil(monkeypatch, steps, what):
    """Make the loss, or the gradient alone, of these steps not a number."""
    before, now = rosa.LayerSelector.before_forward, []
    monkeypatch.setattr(rosa.LayerSelector, "before_forward", lambda self, step: (now.append(step), before(self, step)))
    loss = Llama.loss

    def spoiled(self, *arguments):
        value = loss(self, *arguments)
        if torch.is_grad_enabled() and now and now[-1] in steps:
            return value * torch.nan if what == "loss" else value + (value - value.detach()).abs().sqrt()  # d sqrt(0) is infinite
        return value

    monkeypatch.setattr(Llama, "loss", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(ckpt, monkeypatch, capsys, what):
    states = []
    save = runs.save_state

    def saving(*arguments):
        save(*arguments)
        states.append(state())

    monkeypatch.setattr(runs, "save_state", saving)
    spoil(monkeypatch, (0, 4, 5, 7), what)
    run("--save-every", 1)
    log = contents("out")["log.jsonl"]
    assert [record["step"] for record in log if record.get("skipped")] == [1, 5, 6, 8]
    assert all((record["loss"] is None) == (record.get("skipped", False) and what == "loss") for record in log[1:])
    assert [progress["step"] for progress, _ in states] == [0, 2, 3, 4, 7, 9, 10]  # every state is a good one
    for _, tensors in states:
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    counts = [max((t.item() for name, t in tensors.items() if name.endswith(".step")), default=0) for _, tensors in states]
    assert counts == [0, 1, 2, 3, 4, 5, 6]  # of updates
    assert all(len(record["active_layers"]) == 1 for record in log[1:])  # a probe that tells nothing still leaves k_ratio
    assert [record["step"] for record in contents("out")["layers.jsonl"]] == [4, 7, 10]
    assert capsys.readouterr().out.count("not applied: loss ") == 4


def test_three_such_steps_in_a_row_end_the_run_and_it_goes_on_from_the_state_before(ckpt, capsys):
    run_whole()
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, (5, 6, 7), "loss")
        code, line = ends(capsys)
        args = train.parse_args(RUN)
        train_set, _, records, _ = train.load_data(args, train.load_tokenizer("ckpt"))
        batch = train.make_batches([len(prompt) + len(response) for prompt, response in train_set], 4, "0 0")[7]
        assert code == 1 and "step 8 was the third in a row" in line and "loss nan" in line
        assert f"examples {[records[i] for i in batch]}" in line and "The last good state, of step 4, is in out/state.safetensors" in line
        assert state()[0]["step"] == 4
        examples, tokenizer = tasks.train_examples("toy", ""), train.load_tokenizer("ckpt")
        assert [tasks.encode_example(examples[records[i]], tokenizer) for i in batch] == [train_set[i] for i in batch]
        assert ends(capsys, "--resume")[1] == line
    run("--resume")
    assert contents("out") == contents("whole")
