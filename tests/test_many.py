"""Statements about several processes: they compute what one computes, and end together."""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import decisive_model, forkserver, random_model, smooth_adamw
from rounding import assert_close, near, of_model
from safetensors.torch import load_file
from tqdm import tqdm

import eval as eval_script
import train
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import runs
from model import Llama

pytestmark = pytest.mark.numeric
ROOT = Path(train.__file__).parent
RUN = ["--ckpt", "ckpt", "--max-steps", "8", "--batch-size", "6", "--micro-batch-size", "3", "--val-size", "9", "--eval-every", "4",
       "--save-every", "3", "--max-len", "200", "--select-every", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 4 layers, a context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256).save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)  # 31 to train on: the last batch of an epoch is one example
    monkeypatch.setitem(tasks.TOY_SIZES, "test", 13)
    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())  # here, and in `member`


def member(rank, world, port, script, arguments, before):
    """What torchrun starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is killed would leave behind
    torch.optim.AdamW = smooth_adamw()
    tasks.TOY_SIZES.update(train=40, test=13)
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{name}{rank}.txt", "w") as file:
            os.dup2(file.fileno(), number)
    if before:
        before(rank)
    importlib.import_module(script).run(arguments)


def start(world, script, *arguments, before=None):
    """So many processes that run the script together. before(rank) is called in each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = forkserver()
    started = [processes.Process(target=member, args=(rank, world, port, script.__name__, [str(a) for a in arguments], before))
               for rank in range(world)]
    for process in started:
        process.start()
    return started


def end(started, seconds=60):
    """Their exit statuses, what they printed, and their lines of errors, bars left out."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    out, errors = ([Path(f"{name}{rank}.txt").read_text() for rank in range(len(started))] for name in ("out", "err"))
    return codes, out, [line for text in errors for line in text.splitlines() if ".py: " in line or "Error" in line]


def together(world, script, *arguments, before=None):
    codes, out, errors = end(start(world, script, *arguments, before=before))
    assert codes == [0] * world and not errors, errors
    return out


RUNS = {}  # options -> what a run of one process with them has left


def run_alone(*options):
    """The directory `one`, as a single process leaves it."""
    if options not in RUNS:
        train.run([*RUN, *map(str, options), "--out", "one"])
        RUNS[options] = {file.name: file.read_bytes() for file in Path("one").iterdir()}
    Path("one").mkdir(exist_ok=True)
    for name, content in RUNS[options].items():
        Path("one", name).write_bytes(content)


def read_log(out, name="log.jsonl"):
    return [json.loads(line) for line in Path(out, name).read_text().splitlines()]


def assert_same_run(out, other, dtype=torch.float32):
    """The same losses, layers and scores, and the same adapter, to rounding: of the steps of training, each a pass forward and back."""
    rounding = of_model(Llama.from_pretrained("ckpt").config, 2 * (len(read_log(out)) - 1))
    for name in ("log.jsonl", "layers.jsonl"):
        ours, theirs = read_log(out, name), read_log(other, name)
        assert len(ours) == len(theirs) > 1
        for one, two in zip(ours, theirs):
            assert one.keys() == two.keys()
            for key in one.keys() - {"seconds"}:
                exact = key in ("step", "lr", "tokens", "active_layers")
                assert one[key] == (two[key] if exact else near(two[key], dtype=dtype, **rounding)), (key, one, two)
    one, two = (load_file(next(Path(directory).glob("*model.safetensors"))) for directory in (out, other))
    assert one.keys() == two.keys()
    for name in one:
        assert_close(one[name], two[name], dtype=dtype, **rounding)


@pytest.mark.parametrize("world, options", [
    (2, []), (4, []), (3, ["--batch-size", 5, "--micro-batch-size", 1, "--targets", "q,k,v,down"]), (2, ["--select", "random"]),
    (2, ["--method", "full", "--lr", 1e-5])], ids=str)
def test_several_processes_compute_what_one_computes(ckpt, world, options):
    run_alone(*options)
    printed = together(world, train, *RUN, *options, "--out", "many")
    assert_same_run("many", "one")
    assert "best validation loss" in printed[0] and printed[1:] == [""] * (world - 1)  # the first alone prints


def test_several_processes_select_the_same_layers_at_random_and_drop_different_things(ckpt):
    together(2, train, *RUN, "--select", "random", "--select-every", 1, "--out", "many", before=record_draws)
    drawn = [[json.loads(line) for line in Path(f"drawn{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    assert len(drawn[0]) == 8 and len({str(active) for active, _ in drawn[0]}) > 2
    for (active, drop), (other_active, other_drop) in zip(*drawn):
        assert active == other_active and drop != other_drop


def record_draws(rank):
    """Write down which layers this process selects, and what a dropout in it would draw from."""
    collate, after = train.collate, train.rosa.LayerSelector.after_backward
    drop = []

    def collated(*given):
        drop[:] = torch.get_rng_state()[:64].tolist()
        return collate(*given)

    def after_backward(self):
        after(self)
        with open(f"drawn{rank}.jsonl", "a") as file:
            file.write(json.dumps([self.active, drop]) + "\n")

    train.collate, train.rosa.LayerSelector.after_backward = collated, after_backward


def test_the_shares_of_the_processes_are_the_batch(monkeypatch):
    for world, count, size in [(1, 16, 4), (1, 13, 4), (2, 16, 4), (4, 5, 2), (3, 16, 4), (8, 16, 4), (8, 3, 4), (64, 16, 4)]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        parts = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(train.own_micro_batches(list(range(count)), size))
        assert sorted(i for part in parts for micro_batch in part for i in micro_batch) == list(range(count))
        assert len({len(part) for part in parts}) == 1 and max(len(m) for part in parts for m in part) <= size
        assert max(sum(map(len, part)) for part in parts) <= math.ceil(count / world) + size - 1


# --- what is sent ---


def record_messages(rank):
    """Write down what this process sends to be added up."""
    all_reduce = torch.distributed.all_reduce

    def recorded(tensor, **options):
        all_reduce(tensor, **options)
        with open(f"sent{rank}.jsonl", "a") as file:
            file.write(json.dumps([str(tensor.dtype), tensor.numel(), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]) + "\n")

    torch.distributed.all_reduce = recorded


def test_a_step_is_one_message_of_the_active_adapters_gradients(ckpt):
    together(2, train, *RUN, "--out", "many", before=record_messages)
    sent = [[json.loads(line) for line in Path(f"sent{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    assert sent[0] == sent[1] and len(sent[0]) == 8  # one a step, and all get the same bits
    adapter = 64 * (32 + 16) + 64 * (32 + 8)  # rank (D + H n) of q, rank (D + K n) of k: half of 32 and of 16 rows adapt
    for step, (dtype, count, _) in enumerate(sent[0]):
        probe = step % 3 == 0
        assert dtype == "torch.float32"
        assert count == (4 * (adapter + 2 * 32) if probe else 2 * adapter) + 2  # and norms; the loss, and whether a signal came


# --- FSDP2 ---


def report_rows(rank):
    """Write down how many bytes of the base this process holds at rest, and of which tensors all."""
    real = train.shard

    def shard(model, *arguments):
        real(model, *arguments)
        from torch.distributed.tensor import DTensor
        held = {name: p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for name, p in model.named_parameters()}
        Path(f"held{rank}.json").write_text(json.dumps(held))

    train.shard = shard


@pytest.mark.parametrize("options, changes", [
    ([], {}), (["--targets", "q,k,v,o,gate,up,down", "--dtype", "bfloat16"], {"model_type": "qwen2", "tie_word_embeddings": True})],
    ids=["float32", "bfloat16, all targets, tied, biases"])
def test_sharded_processes_compute_the_same_and_hold_a_half_each(ckpt, options, changes):
    model = random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256, **changes)
    model.save_pretrained("ckpt")
    options = ["--max-steps", 4, *options]
    train.run([*RUN, *map(str, options), "--out", "one"])
    together(2, train, *RUN, *options, "--shard", "--out", "many", before=report_rows)
    assert_same_run("many", "one", torch.bfloat16 if changes else torch.float32)
    size = 2 if changes else 4  # bytes
    for rank in range(2):
        held = json.loads(Path(f"held{rank}.json").read_text())
        base = {name: p.numel() * size for name, p in model.named_parameters()}
        for name in base:
            assert held[name] == (base[name] if "norm" in name else base[name] // 2), name
    together(2, train, *RUN, *options, "--out", "many", "--resume")  # whether sharded or not


# --- stopping, dying, resuming ---


def during(step, act, rank):
    """Let a process act while it computes that step: `act` is its rank and what it does."""
    if rank == act[0]:
        before = train.rosa.LayerSelector.before_forward
        train.rosa.LayerSelector.before_forward = lambda self, now: (act[1]() if now == step else None, before(self, now))


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def broken():
    raise RuntimeError("the cat sat on the keyboard")


def without_room():
    def write(path, content):
        with runs.saving(path):
            raise OSError(28, "No space left on device")
    runs.write = write


def test_a_signal_to_one_ends_all_after_their_step_and_other_numbers_of_processes_resume(ckpt):
    train.run([*RUN, "--max-steps", "12", "--out", "one"])
    arguments = [*RUN, "--max-steps", 12, "--out", "many"]
    codes, out, errors = end(start(2, train, *arguments, before=partial(during, 4, (1, terminated))))
    assert codes == [143, 143] and not errors and "stopped after step 5. To go on: torchrun ... " in out[0]
    codes, *_ = end(start(3, train, *arguments, "--resume", before=partial(during, 7, (0, terminated))))
    assert codes == [143] * 3 and len(read_log("many")) == 1 + 8
    train.run([*map(str, arguments), "--resume"])
    assert_same_run("many", "one")


@pytest.mark.parametrize("rank, act, shard", [(1, killed, []), (0, killed, []), (2, killed, ["--shard"]), (1, broken, []), (0, without_room, [])])
def test_one_that_dies_ends_all_and_the_run_resumes(ckpt, rank, act, shard):
    begin = time.monotonic()
    codes, _, errors = end(start(3, train, *RUN, *shard, "--out", "many", before=partial(during, 4, (rank, act))))
    assert time.monotonic() - begin < 30
    assert codes.pop(rank) in (-signal.SIGKILL, 1) and codes == [1, 1]
    told = "\n".join(errors)
    assert told.count("train.py: another process has ended") == (rank > 0)
    assert ("the cat sat" in told) == (act is broken) and ("No space left" in told) == (act is without_room)
    run_alone()
    train.run([*RUN, "--out", "many", "--resume"])
    assert_same_run("many", "one")


def spoilt(step, rank):
    """Process 1 alone meets what is not a number."""
    def spoil():
        loss = train.Llama.loss
        train.Llama.loss = lambda self, *given: loss(self, *given) * (torch.nan if torch.is_grad_enabled() else 1)

    during(step, (1, spoil), rank)


def test_what_is_not_finite_for_one_is_applied_by_none(ckpt):
    codes, out, errors = end(start(2, train, *RUN, "--save-every", 1, "--out", "many", before=partial(spoilt, 5)))
    line, = errors
    assert codes == [1, 1] and line.startswith("train.py: step 8 was the third in a row") and "of step 5" in line
    assert [record.get("skipped", False) for record in read_log("many")[1:]] == [False] * 5 + [True] * 3


# --- mistakes ---


def misplaced(rank):
    if rank == 1:
        def load_tokenizer(ckpt):
            raise ValueError("no tokenizer on this machine")
        train.load_tokenizer = eval_script.load_tokenizer = load_tokenizer


def test_a_mistake_is_one_line_whatever_the_number_of_processes(ckpt):
    wrong = [(train, ["--rnak", 3], None, "unrecognized"), (train, ["--ckpt", "absent"], None, "no checkpoint 'absent'"),
             (train, ["--rank", 0], None, "rank must be"), (eval_script, ["--ckpt", "absent"], None, "no checkpoint"),
             (train, [], misplaced, "rank 1: no tokenizer"), (eval_script, ["--ckpt", "ckpt", "--max-new-tokens", 9], misplaced, "rank 1: no tokenizer"),
             (train, ["--shard", "--method", "full"], None, "--shard"), (train, ["--shard", "--compile"], None, "--shard goes with")]
    for script, arguments, before, message in wrong:
        given = [*RUN, "--out", "many"] if script is train else []
        codes, _, errors = end(start(2, script, *given, *arguments, before=before))
        assert codes == [2, 2] and len(errors) == 1 and message in errors[0], (arguments, codes, errors)
        assert not Path("many").exists()


def test_shard_asks_for_several_processes(ckpt, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.run([*RUN, "--shard"])
    assert stopped.value.code == 2 and "--shard needs several processes: torchrun" in capsys.readouterr().err


# --- eval.py ---


def test_several_processes_answer_what_one_answers(ckpt):
    prompts = [tasks.encode_prompt(example, load_tokenizer("ckpt")) for example in tasks.test_examples("toy", "")]
    decisive_model(prompts, 12, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained("ckpt")
    arguments = ["--ckpt", "ckpt", "--max-new-tokens", 12, "--batch-size", 2, "--dtype", "float32", "--out"]
    eval_script.run([*map(str, arguments), "one"])
    together(3, eval_script, *arguments, "many")
    lines = Path("many/predictions.jsonl").read_text().splitlines(keepends=True)
    Path("many/predictions.jsonl").write_text("".join(lines[3:9]))  # as if it had been stopped
    printed = together(2, eval_script, *arguments, "many")
    assert "answers    6 of 13 are in many/predictions.jsonl already" in printed[0] and printed[1] == ""
    for name in ("predictions.jsonl", "results.json"):
        assert Path("one", name).read_bytes() == Path("many", name).read_bytes()


def unwritable(rank):
    write, writes = eval_script.write_whole, []

    def full(path, text):
        writes.append(path)
        if len(writes) > 1:
            raise OSError(28, "No space left on device")
        write(path, text)

    eval_script.write_whole = full


def test_what_the_first_cannot_write_ends_the_others_too(ckpt):
    codes, _, errors = end(start(3, eval_script, "--ckpt", "ckpt", "--max-new-tokens", 9, "--out", "many", before=unwritable))
    assert codes[0] == 2 and errors[0] == "eval.py: [Errno 28] No space left on device" and len(errors) == 1


# --- torchrun itself ---


def test_torchrun(ckpt):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = [*map(str, RUN), "--train-file", "data.json", "--max-steps", "100000", "--epochs", "100000", "--out", "many"]
    Path("data.json").write_text(json.dumps(toy.examples("train", 40)))
    process = subprocess.Popen([*torchrun, str(ROOT / "train.py"), *run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("many/log.jsonl").exists() or len(read_log("many")) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    steps = len(runs.read_log(Path("many/log.jsonl"))) - 1
    assert process.returncode and f"stopped after step {steps}. To go on: torchrun ... " in out
