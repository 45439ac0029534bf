"""Statements about several processes: they compute what one computes, and end together."""

import hashlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    decisive_model,
    forkserver,
    random_model,
    read_log,
    read_steps,
    smooth_adamw,
)
from rounding import assert_close, near, of_model
from safetensors.torch import load_file
from tqdm import tqdm

import eval as eval_script
import rosa
import train
from data import tasks, toy
from data.errors import UserError
from data.tokenizer import load_tokenizer
from extras import inference, records, runs
from extras.kernels import accelerate
from model import MLP, Llama

pytestmark = pytest.mark.numeric
RUN = (
    "--ckpt ckpt --max-steps 8 --batch-size 6 --micro-batch-size 3 --val-size 9 --eval-every 4 "
    "--save-every 3"
)
RUN += " --max-len 200 --select-every 3 --device cpu --dtype float32"


@pytest.fixture
def ckpt(ckpt, monkeypatch):
    """The directory `ckpt` in an empty working directory, and fewer examples of toy."""
    # 31 to train on: the last batch of an epoch is one example
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)
    monkeypatch.setitem(tasks.TOY_SIZES, "test", 13)
    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())  # here, and in `run_process`


def run_process(index, world, port, script, arguments, before):
    """One of the processes that torchrun would start: runs the script, and writes what it prints to
    out<index>.txt and err<index>.txt."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world)}
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    # tqdm's own lock is a semaphore of the system, which a killed process would leave behind
    tqdm.set_lock(threading.RLock())
    torch.optim.AdamW = smooth_adamw()
    tasks.TOY_SIZES.update(train=40, test=13)
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{name}{index}.txt", "w") as file:
            os.dup2(file.fileno(), number)
    if before:
        before(index)
    importlib.import_module(script).run(arguments)


def start(world, script, command, before=None):
    """Start `world` processes that run the script with this command line. First before(index) is
    called in each process. As under torchrun, the processes meet at a store that is there before
    them: a process that waits for another process to open a store sleeps for a second."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    what, processes = (world, store.port, script.__name__, command.split(), before), forkserver()
    started = [processes.Process(target=run_process, args=(index, *what)) for index in range(world)]
    for process in started:
        process.start()
        process.store = store  # keeps the store open for as long as the process is held
    return started


def end(started, seconds=60):
    """Wait for processes. Returns their exit statuses, what each has printed on stdout, and the
    lines on stderr that are errors and no progress bars."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    out, errors = (
        [Path(f"{name}{index}.txt").read_text() for index in range(len(started))]
        for name in ("out", "err")
    )
    return (
        codes,
        out,
        [
            line
            for text in errors
            for line in text.splitlines()
            if ".py: " in line or "Error" in line
        ],
    )


def together(world, script, command, before=None):
    codes, out, errors = end(start(world, script, command, before))
    assert codes == [0] * world and not errors, errors
    return out


RUNS = {}  # options -> what a run of one process with them has left


def run_alone(options=""):
    """Make the directory `one`, as a run of a single process leaves it."""
    if options not in RUNS:
        train.run(f"{RUN} {options} --out one".split())
        RUNS[options] = {file.name: file.read_bytes() for file in Path("one").iterdir()}
    Path("one").mkdir(exist_ok=True)
    for name, content in RUNS[options].items():
        Path("one", name).write_bytes(content)


def add_line(file, value):
    with open(file, "a") as opened:
        opened.write(json.dumps(value) + "\n")


def assert_same_run(out, other, dtype=torch.float32):
    """Two runs have the same losses, layers, scores and adapter, to the rounding of their steps,
    each of which is a pass forward and back."""
    steps = len(read_steps(out))
    rounding = of_model(Llama.from_pretrained("ckpt").config, 2 * steps)
    for name in ("log.jsonl", "layers.jsonl"):
        ours, theirs = read_log(out, name), read_log(other, name)
        assert len(ours) == len(theirs) > 1
        for one, two in zip(ours, theirs):
            assert one.keys() == two.keys()
            for key in one.keys() - {"seconds"}:
                exact = key in ("step", "lr", "tokens", "active_layers")
                assert one[key] == (
                    two[key] if exact else near(two[key], dtype=dtype, **rounding)
                ), (key, one, two)
    one, two = (
        load_file(next(Path(directory).glob("*model.safetensors"))) for directory in (out, other)
    )
    assert one.keys() == two.keys()
    for name in one:
        assert_close(one[name], two[name], dtype=dtype, **rounding)


SLOW = pytest.mark.slow
UNEVEN = "--batch-size 5 --micro-batch-size 1 --targets q,k,v,down"
FULL = "--method full --lr 1e-5"
INT8 = "--quantize int8"


@pytest.mark.parametrize(
    "world, options",
    [(3, UNEVEN), *(pytest.param(*run, marks=SLOW) for run in ((4, ""), (2, FULL), (2, INT8)))],
)
def test_several_processes_compute_what_one_computes(ckpt, world, options):
    run_alone(options)
    printed = together(world, train, f"{RUN} {options} --out many")
    assert_same_run("many", "one")
    # Only the first process prints
    assert "best validation loss" in printed[0] and printed[1:] == [""] * (world - 1)


def record(index):
    """Make a process write two lines for each step: the dtype, the length and the content of the
    one message that it adds up with the other processes; and the layers that it selects, with the
    state of the random numbers from which dropout would draw."""
    collate, all_reduce, after = (
        train.collate,
        torch.distributed.all_reduce,
        rosa.LayerSelector.after_backward,
    )
    drop = []

    def collated(*arguments):
        drop[:] = torch.get_rng_state()[:64].tolist()
        return collate(*arguments)

    def added_up(tensor, **options):
        all_reduce(tensor, **options)
        total = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        add_line(f"steps{index}.jsonl", [str(tensor.dtype), tensor.numel(), total])

    def after_backward(self):
        after(self)
        add_line(f"steps{index}.jsonl", [self.active, drop])

    train.collate, torch.distributed.all_reduce, rosa.LayerSelector.after_backward = (
        collated,
        added_up,
        after_backward,
    )


def test_several_processes_select_the_same_layers_at_random_and_drop_different_things(ckpt):
    options = "--select random --select-every 1"
    run_alone(options)
    together(2, train, f"{RUN} {options} --out many", record)
    assert_same_run("many", "one")
    drawn = [read_log(".", f"steps{index}.jsonl")[1::2] for index in range(2)]
    assert len(drawn[0]) == 8 and len({str(active) for active, _ in drawn[0]}) > 2
    for (active, drop), (other_active, other_drop) in zip(*drawn):
        assert active == other_active and drop != other_drop


SHARES = [
    (1, 16, 4),
    (1, 13, 4),
    (2, 16, 4),
    (4, 5, 2),
    (3, 16, 4),
    (8, 16, 4),
    (8, 3, 4),
    (64, 16, 4),
]


@pytest.mark.parametrize("world, count, size", SHARES)
def test_the_shares_of_the_processes_are_the_batch_and_all_take_part_in_every_round(
    monkeypatch, world, count, size
):
    parts = []
    for index in range(world):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(index))
        parts.append(train.own_micro_batches(list(range(count)), size))
    assert sorted(i for part in parts for micro_batch in part for i in micro_batch) == list(
        range(count)
    )
    assert (
        len({len(part) for part in parts}) == 1
        and max(len(m) for part in parts for m in part) <= size
    )
    assert max(sum(map(len, part)) for part in parts) <= math.ceil(count / world) + size - 1


@pytest.mark.parametrize("plain", [True, False])
def test_no_examples_have_gradients_of_zero_for_all_that_trains(model, plain):
    rosa.attach(model, 2)
    rosa.LayerSelector(model).before_forward(0)  # a probe: norms too
    if not plain:
        accelerate(model)
    model.loss(*train.collate([], model.device)).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 3 * (2 * 2 + 2) and not any(grad.any() for grad in gradients)


# --- what is sent ---


def test_a_step_is_one_message_of_the_gradients_of_what_trains_and_of_the_norms_to_be_scored(
    ckpt,
):
    run_alone()
    together(2, train, f"{RUN} --out many", record)
    assert_same_run("many", "one")
    sent = [read_log(".", f"steps{index}.jsonl")[::2] for index in range(2)]
    assert sent[0] == sent[1] and len(sent[0]) == 8  # one a step, and all get the same bits
    # A layer's adapters have rank x (32 inputs + rows): 16 of the 32 rows of q, 8 of the 16 of k
    adapter = 64 * (32 + 16) + 64 * (32 + 8)
    for step, (dtype, count, _) in enumerate(sent[0]):
        # A probe sends the gradients of all layers, and of their norms
        gradients = 4 * (adapter + 2 * 32) if step % 3 == 0 else 2 * adapter
        # The two more numbers are the loss, and how many signals came
        assert dtype == "torch.float32" and count == gradients + 2


# --- FSDP2 ---


def report_rows(index):
    """Make a process write down how many bytes of each base weight it holds between two passes, and
    which loss FSDP wraps."""
    from torch.distributed import fsdp
    from torch.distributed.tensor import DTensor

    shard, register = train.shard, fsdp.register_fsdp_forward_method

    def reported(model, *arguments):
        shard(model, *arguments)
        at_rest = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in model.named_parameters()
        }
        sizes = {name.replace(".linear.", "."): p.nbytes for name, p in at_rest.items()}
        Path(f"held{index}.json").write_text(json.dumps(sizes))

    def registered(module, name):
        Path(f"wrapped{index}.txt").write_text(
            f"{getattr(module, name).__func__.__module__}.{name}"
        )
        register(module, name)

    train.shard, fsdp.register_fsdp_forward_method = reported, registered


ALL, TIED = (
    "--targets q,k,v,o,gate,up,down --dtype bfloat16",
    {"model_type": "qwen2", "tie_word_embeddings": True},
)


@pytest.mark.parametrize(
    "options, changes",
    [("", {}), pytest.param("--plain", {}, marks=SLOW), pytest.param(ALL, TIED, marks=SLOW)],
)
def test_sharded_processes_compute_the_same_hold_a_half_each_and_resume_unsharded(
    ckpt, options, changes
):
    model = random_model(
        vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256, **changes
    )
    model.save_pretrained("ckpt")
    command = f"{RUN} --max-steps 4 {options}"
    train.run(f"{command} --out one".split())
    together(2, train, f"{command} --shard --out many", report_rows)
    assert_same_run("many", "one", torch.bfloat16 if changes else torch.float32)
    size = 2 if changes else 4  # bytes
    for index in range(2):
        held = json.loads(Path(f"held{index}.json").read_text())
        for name, p in model.named_parameters():
            assert held[name] == p.numel() * size // (1 if "norm" in name else 2), name
        assert (
            Path(f"wrapped{index}.txt").read_text()
            == f"{'model' if options == '--plain' else 'extras.kernels'}.loss"
        )
    if options != "--plain":
        together(2, train, f"{command} --out many --resume")


# --- stopping, dying, resuming ---


def act_in_step(step, act, index):
    """Make one process do something at the beginning of that step. `act`: the index of the process,
    and the function that it calls."""
    if index == act[0]:
        before = rosa.LayerSelector.before_forward

        def before_forward(self, now):
            if now == step:
                act[1]()
            before(self, now)

        rosa.LayerSelector.before_forward = before_forward


def send_to_itself(number):
    os.kill(os.getpid(), number)


killed, terminated, halted = (
    partial(send_to_itself, number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
)


def broken():
    raise RuntimeError("the cat sat on the keyboard")


def spoilt():
    """From here on the hidden states in this process are nan, in training."""
    real = Llama.hidden_states
    Llama.hidden_states = lambda self, *inputs: (
        real(self, *inputs) * (torch.nan if torch.is_grad_enabled() else 1)
    )


def without_room():
    def write(path, content):
        with records.saving(path):
            raise OSError(28, "No space left on device")

    runs.write = write


@pytest.mark.slow
def test_a_signal_to_one_ends_all_after_their_step_and_other_numbers_of_processes_resume(ckpt):
    command = f"{RUN} --max-steps 12 --out"
    train.run(f"{command} one".split())
    codes, _, errors = end(
        start(2, train, f"{command} many", partial(act_in_step, 4, (1, terminated)))
    )
    assert codes == [143, 143] and len(errors) == 1
    assert errors[0].startswith(
        "train.py: stopped after step 5; the adapter kept is the best so far, of step "
    )
    assert ". To resume: torchrun ... " in errors[0]
    codes, *_ = end(
        start(3, train, f"{command} many --resume", partial(act_in_step, 7, (0, terminated)))
    )
    assert codes == [143] * 3 and len(read_steps("many")) == 8
    train.run(f"{command} many --resume".split())
    assert_same_run("many", "one")


DEATHS = [
    (1, killed, ""),
    pytest.param(0, killed, "", marks=SLOW),
    pytest.param(2, killed, "--shard", marks=SLOW),
    pytest.param(1, broken, "", marks=SLOW),
    (0, without_room, ""),
]


@pytest.mark.parametrize("index, act, shard", DEATHS)
def test_one_that_dies_ends_all_and_the_run_resumes(ckpt, index, act, shard):
    codes, _, errors = end(
        start(3, train, f"{RUN} {shard} --out many", partial(act_in_step, 4, (index, act))),
        seconds=30,
    )
    assert codes.pop(index) in (-signal.SIGKILL, 1) and codes == [1, 1]
    text = "\n".join(errors)
    assert text.count("train.py: another process has ended") == (index > 0)
    assert ("the cat sat" in text) == (act is broken) and ("No space left" in text) == (
        act is without_room
    )
    run_alone()
    train.run(f"{RUN} --out many --resume".split())
    assert_same_run("many", "one")


SILENCE = 2  # seconds until a silent process is taken for dead, in the place of 50


def impatient(index):
    """The group that adds up gradients waits no longer than SILENCE. The first process takes longer
    than SILENCE to save its first adapter. In step 4 the second process is halted, and sends
    nothing more."""
    save = runs.adapters.save_adapter

    def noting(function, seconds):
        def call(*arguments, timeout, **options):
            add_line(f"timeouts{index}.jsonl", timeout.total_seconds())
            return function(*arguments, timeout=timedelta(seconds=seconds), **options)

        return call

    def slow(*arguments):
        runs.adapters.save_adapter = save
        time.sleep(1.2 * SILENCE)
        save(*arguments)

    for name, seconds in {"init_process_group": 3600, "new_group": SILENCE}.items():
        setattr(torch.distributed, name, noting(getattr(torch.distributed, name), seconds))
    runs.adapters.save_adapter = slow
    act_in_step(4, (1, halted), index)


@pytest.mark.slow
def test_one_that_is_silent_in_a_step_is_taken_for_dead_and_the_first_may_take_its_time_to_save(
    ckpt,
):
    started = start(2, train, f"{RUN} --out many", impatient)
    started[0].join(30)
    started[1].kill()
    codes, _, errors = end(started)
    assert codes == [1, -signal.SIGKILL] and errors[0].startswith(
        "train.py: another process has ended"
    ), errors
    assert len(read_steps("many")) == 4
    assert [read_log(".", f"timeouts{index}.jsonl") for index in range(2)] == [[3600, 50]] * 2


def test_what_is_not_finite_for_one_is_applied_by_none(ckpt):
    codes, _, errors = end(
        start(2, train, f"{RUN} --save-every 1 --out many", partial(act_in_step, 5, (1, spoilt)))
    )
    (line,) = errors
    assert (
        codes == [1, 1]
        and line.startswith("train.py: step 8 was the third in a row")
        and "of step 5" in line
    )
    assert [record.get("skipped", False) for record in read_steps("many")] == [False] * 5 + [
        True
    ] * 3


# --- mistakes ---


def not_finite(index):
    stream = inference.stream

    def failing(*given):
        yield next(stream(*given))
        raise FloatingPointError("the logits of one process are not finite")

    if index == 1:
        inference.stream = failing


def test_what_is_not_finite_for_one_process_is_what_is_said(ckpt):
    codes, _, errors = end(start(2, eval_script, f"{EVAL} --out many", not_finite))
    line = (
        "eval.py: process 1: the logits of one process are not finite. What was scored so far is "
        "kept, and not asked again"
    )
    assert codes == [1, 1] and errors == [line]


ABSENT, EVAL = "--ckpt absent", "--ckpt ckpt --max-new-tokens 9 --device cpu"


def misplaced(index):
    def load_tokenizer(ckpt):
        raise UserError("no tokenizer on this machine")

    if index == 1:
        train.load_tokenizer = eval_script.load_tokenizer = load_tokenizer


def mistaken(index):
    plain = MLP.forward

    def forward(self, x):
        B, T = x.shape
        return plain(self, x)

    if index == 1:
        MLP.forward = forward


@pytest.mark.parametrize("script", [train, eval_script])
def test_a_mistake_in_the_code_is_a_traceback_and_the_others_end_with_it(ckpt, script):
    command = f"{RUN if script is train else EVAL} --out many"
    codes, _, errors = end(start(2, script, command, mistaken))
    assert codes == [1, 1] and "ValueError: " in errors[-1], errors
    assert errors[0].startswith(
        f"{script.__name__}.py: another process has ended, and this one with it"
    ), errors
    assert "in forward\n    B, T = x.shape\n" in Path("err1.txt").read_text()


MISTAKES = [  # (script, arguments, what is changed in each process before, the message)
    (train, f"{RUN} --rnak 3", None, "unrecognized"),
    (train, f"{RUN} {ABSENT}", None, "no checkpoint 'absent'"),
    (train, f"{RUN} --rank 0", None, "rank must be"),
    (eval_script, ABSENT, None, "no checkpoint"),
    (train, RUN, misplaced, "process 1: no tokenizer"),
    (eval_script, EVAL, misplaced, "process 1: no tokenizer"),
    (train, f"{RUN} --shard --method full", None, "--shard shards frozen weights"),
    (train, f"{RUN} --shard --compile", None, "--shard does not go with --compile"),
]


@pytest.mark.parametrize(
    "script, command, before, message", MISTAKES, ids=[mistake[-1] for mistake in MISTAKES]
)
def test_a_mistake_ends_all_in_one_line_whatever_the_number_of_processes(
    ckpt, script, command, before, message
):
    codes, _, errors = end(start(2, script, f"{command} --out many", before))
    assert codes == [2, 2] and len(errors) == 1 and message in errors[0], (codes, errors)
    assert not Path("many").exists()


# --- eval.py ---


def test_several_processes_answer_what_one_answers(ckpt):
    prompts = [
        tasks.encode_prompt(example, load_tokenizer("ckpt"))
        for _, example in tasks.test_examples("toy", "")
    ]
    model = decisive_model(
        prompts, 12, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256
    )
    model.save_pretrained("ckpt")
    command = "--ckpt ckpt --max-new-tokens 12 --batch-size 2 --device cpu --dtype float32 --out"
    eval_script.run(f"{command} one".split())
    together(3, eval_script, f"{command} many")
    lines = Path("many/predictions.jsonl").read_text().splitlines(keepends=True)
    Path("many/predictions.jsonl").write_text("".join(lines[3:9]))  # as if it had been stopped
    printed = together(2, eval_script, f"{command} many")
    assert (
        "answers    6 of 13 are in many/predictions.jsonl already" in printed[0]
        and printed[1] == ""
    )
    for name in ("predictions.jsonl", "results.json"):
        assert Path("one", name).read_bytes() == Path("many", name).read_bytes()


def unwritable(index):
    write = records.write_whole

    def full(path, text):
        if path.name == "results.json":
            raise OSError(28, "No space left on device")
        write(path, text)

    records.write_whole = full


def test_what_the_first_cannot_write_ends_the_others_too(ckpt):
    codes, _, errors = end(start(3, eval_script, f"{EVAL} --out many", unwritable))
    assert codes == [2] * 3 and errors == ["eval.py: many/results.json: No space left on device"]


@pytest.mark.slow
def test_torchrun(ckpt):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = f"{RUN} --train-file data.json --max-steps 100000 --epochs 100000 --out many".split()
    Path("data.json").write_text(json.dumps(toy.examples("train", 40)))
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*torchrun, str(ROOT / "train.py"), *command], **pipes, text=True)
    while len(read_steps("many")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    steps = len(read_steps("many"))
    assert (
        process.returncode
        and f"train.py: stopped after step {steps}; " in error
        and ": torchrun ... " in error
    )
