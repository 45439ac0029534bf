"""Statements about stopping and resuming: whatever ends a run, and whenever, it can go on, and ends in the same
bytes."""

import json
import os
import pkgutil
import random
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
from conftest import QUICK, SHORT, forkserver, random_model, read_log, run
from rounding import assert_close
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import eval as eval_script
import rosa
import train
from data import tasks, toy
from extras import kernels, runs
from extras.checkpoints import choose_device_and_dtype
from model import Llama

ROOT = Path(train.__file__).parent
RUN = (
    "--ckpt ckpt --max-steps 10 --batch-size 4 --val-size 8 --eval-every 3 --save-every 2 --select-every "
    "3 --score-ema 0.5 --lr 1e-2 --device cpu --dtype float32 --out out"
).split()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 2 layers, a context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=512).save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)


def train_small(*arguments):
    train.run([*RUN, *map(str, arguments)])


WHOLE = {}


def run_whole():
    """The directory `whole`, as an undisturbed run leaves it."""
    if not WHOLE:
        train_small("--out", "whole")
        WHOLE.update({file.name: file.read_bytes() for file in Path("whole").iterdir()})
    Path("whole").mkdir(exist_ok=True)
    for name, content in WHOLE.items():
        Path("whole", name).write_bytes(content)


def ends(capsys, *arguments):
    """The exit status of a run that does not end well, and its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_small(*arguments)
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
    """A process that trains, and kills itself at its touch of the disk number `fatal`: before or after a file is
    flushed, renamed or deleted, in the middle of the tensors or of a line of a log. `count` is told how many there
    were."""
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, which a process that is killed would leave behind
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
@pytest.mark.parametrize(
    "options, wanted",
    [(["--dtype", "float32", "--overwrite"], 20), (["--dtype", "bfloat16"], 10)],
    ids=["float32", "bfloat16"],
)
def test_a_run_killed_many_times_ends_as_one_that_was_never_stopped(small, options, wanted):
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


def test_what_the_end_of_a_run_adds_is_made_up_for(small):
    train_small()
    before = contents("out")
    for name in ("summary.json", "layers.png"):
        Path("out", name).unlink(missing_ok=True)
    Path("out/adapter_config.json.partial").write_text("{")
    train_small("--resume")
    assert contents("out") == before


# --- another run is not taken for this one ---


def test_what_auto_has_come_to_is_part_of_the_run(small):
    train_small("--dtype", "auto")
    assert json.loads(Path("out/args.json").read_text())["dtype"] == str(choose_device_and_dtype("cpu")[1])[6:]


def test_what_is_left_of_a_run_that_another_was_about_to_replace_is_no_run(small, capsys):
    train_small()
    train_small("--out", "other", "--seed", 1)
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
    train_small("--seed", 1)
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
    "options of peft": (
        lambda: Path("dropout.json").write_text('{"lora_dropout": 0.2}'),
        [],
        "the options in --peft-config differ",
    ),
}


@pytest.mark.parametrize("change, arguments, message", CHANGES.values(), ids=CHANGES)
def test_resuming_something_else_is_refused_and_the_difference_named(small, capsys, change, arguments, message):
    Path("data.json").write_text(json.dumps(toy.examples("train", 40)))
    start = ["--train-file", "data.json", "--max-steps", 1]
    if "peft" in message:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.1}')
        start += ["--method", "peft:LORA", "--peft-config", "dropout.json"]
    train_small(*start)
    before = contents("out")
    change()
    code, line = ends(capsys, *start, *arguments, "--resume")
    assert code == 2 and "--resume: the " in line and message in line
    assert contents("out") == before


# --- disks ---


@pytest.fixture
def small_disk(small):
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
    train_small("--resume")
    assert contents("out") == contents("whole")


TROUBLES = {
    "read-only": ("os.replace", "state.safetensors", OSError(30, "Read-only file system")),
    "a disk that cannot flush": ("extras.runs.flush", "state.safetensors", OSError(5, "Input/output error")),
    "no space": (
        "extras.runs.save_file",
        "state.safetensors",
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ),
    "no permission": ("builtins.open", "log.jsonl", PermissionError(13, "Permission denied")),
    "no space for layers.jsonl": ("builtins.open", "layers.jsonl", OSError(28, "No space left on device")),
    "no space for the best": ("rosa.save_file", "adapter_model", SafetensorError("I/O error: No space left on device")),
    "the best cannot take its place": ("os.replace", "out/adapter_model", OSError(28, "No space left on device")),
}


@pytest.mark.parametrize("function, file, error", TROUBLES.values(), ids=TROUBLES)
def test_what_cannot_be_written_ends_the_run_in_a_line_and_what_was_saved_is_whole(
    small, capsys, function, file, error
):
    run_whole()
    works = pkgutil.resolve_name(function)

    def broken(*arguments, **options):  # on that file, from step 3 on
        if (
            any(file in str(a) for a in arguments if isinstance(a, (str, Path)))
            and len(runs.read_log(Path("out/log.jsonl"))) > 3
        ):
            raise error
        return works(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, broken)
        code, line = ends(capsys)
    assert code == 1 and "cannot write out/" in line and str(error) in line and line.endswith("--resume")
    assert state()[0]["step"] in (2, 4)
    rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert not list(Path("out").glob("*.safetensors.partial"))  # what could not be saved takes no room
    train_small("--resume")
    assert contents("out") == contents("whole")


@pytest.mark.parametrize("loss", [0.0, 99.0], ids=["the best is to be saved", "the log is to be written"])
def test_a_directory_that_vanished_ends_the_run_in_a_line_and_is_not_made_again(small, capsys, monkeypatch, loss):
    validate, calls = train.validate, []

    def vanish(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            shutil.rmtree("out")
            return loss
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", vanish)
    code, line = ends(capsys)
    assert (
        code == 1 and "cannot write out/" in line and "No such file or directory" in line and not Path("out").exists()
    )


# --- what is not finite ---


def spoil(monkeypatch, steps, what):
    """Make the loss, or the gradient alone, of these steps not a number."""
    before, now = rosa.LayerSelector.before_forward, []
    monkeypatch.setattr(rosa.LayerSelector, "before_forward", lambda self, step: (now.append(step), before(self, step)))
    accelerate = kernels.accelerate

    def accelerate_and_spoil(model):
        accelerate(model)
        loss = model.loss

        def spoiled(*arguments):
            value = loss(*arguments)
            if not torch.is_grad_enabled() or not now or now[-1] not in steps:
                return value
            return (
                value * torch.nan if what == "loss" else value + (value - value.detach()).abs().sqrt()
            )  # infinite slope

        model.loss = spoiled

    monkeypatch.setattr(kernels, "accelerate", accelerate_and_spoil)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(small, monkeypatch, capsys, what):
    states = []
    save = runs.Run.save_state

    def saving(*arguments):
        save(*arguments)
        states.append(state())

    monkeypatch.setattr(runs.Run, "save_state", saving)
    spoil(monkeypatch, (0, 4, 5, 7), what)
    train_small("--save-every", 1)
    log = contents("out")["log.jsonl"]
    assert [record["step"] for record in log if record.get("skipped")] == [1, 5, 6, 8]
    assert all((record["loss"] is None) == (record.get("skipped", False) and what == "loss") for record in log[1:])
    assert [progress["step"] for progress, _ in states] == [0, 2, 3, 4, 7, 9, 10]  # every state is a good one
    for _, tensors in states:
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    counts = [
        max((t.item() for name, t in tensors.items() if name.endswith(".step")), default=0) for _, tensors in states
    ]
    assert counts == [0, 1, 2, 3, 4, 5, 6]  # of updates
    assert all(
        len(record["active_layers"]) == 1 for record in log[1:]
    )  # a probe that tells nothing still leaves k_ratio
    assert [record["step"] for record in contents("out")["layers.jsonl"]] == [4, 7, 10]
    assert capsys.readouterr().out.count("not applied: loss ") == 4


def test_three_such_steps_in_a_row_end_the_run_and_it_goes_on_from_the_state_before(small, capsys):
    run_whole()
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, (5, 6, 7), "loss")
        code, line = ends(capsys)
        args = train.parse_args(RUN)
        train_set, _, places, _ = train.load_data(args, train.load_tokenizer("ckpt"))
        batch = train.make_batches([len(prompt) + len(response) for prompt, response in train_set], 4, "0 0")[7]
        assert code == 1 and "step 8 was the third in a row" in line and "loss nan" in line
        assert (
            f"examples {[places[i] for i in batch]}" in line
            and "The last good state, of step 4, is in out/state.safetensors" in line
        )
        assert state()[0]["step"] == 4
        examples, tokenizer = tasks.train_examples("toy", ""), train.load_tokenizer("ckpt")
        assert [tasks.encode_example(examples[places[i]], tokenizer) for i in batch] == [train_set[i] for i in batch]
        assert ends(capsys, "--resume")[1] == line
    train_small("--resume")
    assert contents("out") == contents("whole")


# --- of any kind ---


@pytest.mark.parametrize(
    "options",
    [
        ["--score-ema", 0.5],
        ["--dtype", "bfloat16"],
        ["--select", "random"],
        ["--method", "full", "--lr", 1e-3],
        ["--method", "peft:LORA", "--peft-config", "dropout.json", "--k-ratio", 0.5],
    ],
    ids=str,
)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(ckpt, monkeypatch, options):
    if "peft:LORA" in options:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.5}')
    arguments = [*(SHORT if "--method" in options else QUICK), "--save-every", 1, *options]
    run(train, *arguments, "--out", "whole")
    save = runs.Run.save_state

    def stop(self, step):
        save(self, step)
        if step == stop.after:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_state", stop)
    for stop.after, resume in ((3, ()), (4, ("--resume",)), (None, ("--resume",))):
        try:
            run(train, *arguments, "--out", "parts", *resume)
        except KeyboardInterrupt:
            for name in ("log.jsonl", "layers.jsonl"):  # it had gone on beyond what was saved
                with open(f"parts/{name}", "a") as log:
                    log.write(json.dumps({"step": stop.after + 1, "loss": 0}) + "\n")
    best = "model.safetensors" if "full" in options else "adapter_model.safetensors"
    for name in (best, "state.safetensors", "layers.jsonl"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()
    without_times = [[record | {"seconds": 0} for record in read_log(out)] for out in ("whole", "parts")]
    assert without_times[0] == without_times[1]
    with pytest.raises(ValueError, match="has --batch-size 8, not 4"):
        run(train, *arguments, "--out", "parts", "--resume", "--batch-size", 4)


def test_a_run_is_not_begun_over_another_unless_asked_to(ckpt, capsys):
    run(train, *QUICK, "--out", "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        train.run([str(argument) for argument in (*QUICK, "--out", "out", "--seed", 1)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(
        "--out out holds a run already: --resume goes on with it, --overwrite starts anew\n"
    )
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

    # A run that starts anew and dies before its first step leaves nothing of the old one to resume.
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(train, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(train, *QUICK, "--out", "out", "--overwrite", "--seed", 1)
    run(train, *QUICK, "--out", "out", "--resume", "--seed", 1)
    run(train, *QUICK, "--out", "other", "--seed", 1)
    for name in ("adapter_model.safetensors", "state.safetensors", "layers.jsonl"):
        assert Path("out", name).read_bytes() == Path("other", name).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(ckpt, number, code, monkeypatch, capsys):
    arguments = [*map(str, QUICK), "--select-every", "4", "--max-steps", "8"]
    train.run([*arguments, "--out", "whole"])
    before, handlers = rosa.LayerSelector.before_forward, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self, step):
        if step == 4:
            signal.raise_signal(number)
        before(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(rosa.LayerSelector, "before_forward", signalled)
        with pytest.raises(SystemExit) as stopped:
            train.run([*arguments, "--out", "a run"])
    *_, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == code and len(read_log("a run")) == 1 + 5
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers  # as they were
    python, script, *resuming = shlex.split(last.removeprefix("train.py: stopped after step 5. To go on: "))
    assert (
        python == "python"
        and Path(script).resolve() == ROOT / "train.py"
        and resuming == [*arguments, "--out", "a run", "--resume"]
    )
    train.run(resuming)
    lines = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(out)]
        for out in ("whole", "a run")
    ]
    assert lines[0] == lines[1]
    name = "adapter_model.safetensors"
    assert Path("whole", name).read_bytes() == Path("a run", name).read_bytes()


@pytest.mark.parametrize("script", [train, eval_script])
def test_an_interruption_while_loading_is_a_line(ckpt, script, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "from_pretrained", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.run(
            ["--ckpt", "ckpt", "--max-len", "200", "--val-size", "20"]
            if script is train
            else ["--ckpt", "ckpt", "--limit", "1", "--max-new-tokens", "9"]
        )
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith(f"{script.__name__}.py: interrupted")


def test_a_second_signal_ends_a_run_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run = runs.Run(SimpleNamespace(out=None), None, None, None, None, None)
        run.note_signals()
        signal.raise_signal(signal.SIGINT)
        assert run.signals == [signal.SIGINT]
        assert [signal.getsignal(number) for number in before] == [signal.SIG_DFL, signal.SIG_DFL]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_of_an_older_version_is_refused_in_a_line(small, capsys):
    train_small()
    args = json.loads(Path("out/args.json").read_text())
    assert args.pop("format") == runs.FORMAT
    Path("out/args.json").write_text(json.dumps(args))
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, line = ends(capsys, "--resume")
    assert code == 2 and "was begun by another version, in format 1 and not 2: --overwrite starts anew" in line
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_moments_go_by_the_names_of_their_parameters(small, monkeypatch):
    run_whole()
    _, tensors = state("whole")
    names = {name.removeprefix("trainable.") for name in tensors if name.startswith("trainable.")}
    moments = {name.removeprefix("optimizer.") for name in tensors if name.startswith("optimizer.")}
    trained = {name for name in names if f"{name}.step" in moments}
    assert trained and moments == {f"{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    # To be resumed half way by a version that lists its parameters the other way round.
    save = runs.Run.save_state

    def stop(self, step):
        save(self, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save_state", stop)
        with pytest.raises(SystemExit):
            train_small()
    named_parameters = Llama.named_parameters
    monkeypatch.setattr(Llama, "named_parameters", lambda self, **how: reversed(list(named_parameters(self, **how))))
    train_small("--resume")
    for name, tensor in state()[1].items():
        assert_close(tensor, tensors[name], length=1000, depth=100)
