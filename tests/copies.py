"""A copy of the project that a reader has edited, and its scripts, run there as a user runs them.

Each copy runs in a process of its own, forked from one that has imported PyTorch, so that no time
is spent on that."""

import contextlib
import importlib
import os
import re
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

from helpers import ROOT, forkserver
from tqdm import tqdm

OURS = ("model", "rosa", "train", "eval", "data", "extras")
LEFT_OUT = shutil.ignore_patterns("tiny", "lesson", "__pycache__", "*.png", "*.md")


def copy_project(directory):
    """The files that run, in a new directory."""
    directory.mkdir(parents=True)
    for name in ("model.py", "rosa.py", "train.py", "eval.py"):
        shutil.copy(ROOT / name, directory)
    for name in ("data", "extras"):
        shutil.copytree(ROOT / name, directory / name, ignore=LEFT_OUT)
    return directory


def edit(directory, file, old, new):
    """Replace what must stand once in a file of a copy."""
    text = (directory / file).read_text()
    assert text.count(old) == 1, f"{file} has not, or not once: {old}"
    (directory / file).write_text(text.replace(old, new))


def run_copy(directory, *commands):
    """Run commands, "train.py --ckpt ckpt", say, one after the other in a copy of the project.
    Returns of each the exit status, what it has printed, and what it has printed on stderr."""
    process = forkserver().Process(target=run_here, args=(directory, commands))
    process.start()
    process.join()
    return [end_of(directory, i) for i in range(len(commands))]


def run_jobs(jobs):
    """Run (directory, the copy to start from, edits, commands) one after the other, each in a fork
    of this process, and say in a file `done` when one has ended. For a process that runs beside the
    tests."""
    for directory, start, edits, commands in jobs:
        if start:
            shutil.copytree(
                start, directory, ignore=shutil.ignore_patterns("merged", "done", "__pycache__")
            )
        try:
            for one in edits:
                edit(directory, *one)
            child = os.fork()
            if child == 0:
                run_here(directory, commands)
                os._exit(0)
            os.waitpid(child, 0)
        except AssertionError as error:  # an edit that fits no more
            (directory / "failed").write_text(str(error))
        (directory / "done").touch()


def ends_of(directory, count, seconds=120):
    """What `run_copy` returns, once the process of `run_jobs` has done with a directory."""
    deadline = time.monotonic() + seconds
    while not (directory / "done").exists():
        assert time.monotonic() < deadline, f"{directory} is not done"
        time.sleep(0.02)
    assert not (directory / "failed").exists(), (directory / "failed").read_text()
    return [end_of(directory, i) for i in range(count)]


def end_of(directory, i):
    out, err, status = (directory / f"{i}.{kind}" for kind in ("out", "err", "status"))
    return int(status.read_text()), out.read_text(), err.read_text()


def run_here(directory, commands):
    """What `run_copy` has done by a process of its own."""
    import torch

    torch.set_num_threads(1)
    # Its usual one is a semaphore of the system, which `os._exit` leaves behind
    tqdm.set_lock(threading.RLock())
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(directory), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    os.chdir(directory)
    importlib.import_module("data.tasks").TOY_SIZES.update(train=40, test=3)
    for i, command in enumerate(commands):
        script, *arguments = command.split()
        with open(f"{i}.out", "w") as out, open(f"{i}.err", "w") as err:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = run_one(script, arguments)
        Path(f"{i}.status").write_text(str(status))


def run_one(script, arguments):
    """The exit status; a traceback is printed as Python prints it."""
    try:
        importlib.import_module(script.removesuffix(".py")).run(arguments)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def last_place(error):
    """The file and the line's text that a traceback names last."""
    places = re.findall(r'File "([^"]+)", line \d+, in .*\n {4,}(.*)', error)
    file, line = places[-1]
    return Path(file).name, line
