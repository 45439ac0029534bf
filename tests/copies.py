"""Copies of the project that a reader has edited, and its scripts, run there as a user runs them.

The scripts of a copy run in a process of its own. It is forked from a process that has imported
PyTorch already, because the import takes seconds."""

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
from typing import NamedTuple

from helpers import ROOT, forkserver
from tqdm import tqdm

PROJECT_MODULES = ("model", "rosa", "train", "eval", "data", "extras")
NOT_COPIED = shutil.ignore_patterns("tiny", "lesson", "__pycache__", "*.png", "*.md")


class Result(NamedTuple):
    """How a command has ended: its exit status, and what it printed on stdout and on stderr."""

    status: int
    out: str
    err: str


def copy_project(directory):
    """Copy the files that the scripts need to a new directory."""
    directory.mkdir(parents=True)
    for name in ("model.py", "rosa.py", "train.py", "eval.py"):
        shutil.copy(ROOT / name, directory)
    for name in ("data", "extras"):
        shutil.copytree(ROOT / name, directory / name, ignore=NOT_COPIED)
    return directory


def edit(directory, file, old, new):
    """Replace a text in a file of a copy. The text must be there exactly once."""
    text = (directory / file).read_text()
    assert text.count(old) == 1, f"{file} has not, or not once: {old}"
    (directory / file).write_text(text.replace(old, new))


def run_copy(directory, *commands):
    """Run commands, such as "train.py --ckpt ckpt", one after the other in a copy of the project.
    Returns a Result for each command."""
    process = forkserver().Process(target=run_commands, args=(directory, commands))
    process.start()
    process.join()
    return [read_result(directory, i) for i in range(len(commands))]


def run_jobs(jobs):
    """For a process that runs beside the tests: make copies, edit them and run commands in them. A
    job is (the copy's directory, the directory that it is copied from, edits, commands); where the
    second is None the copy is there already. A job that has ended leaves a file `done` in the
    copy."""
    for directory, original, edits, commands in jobs:
        if original:
            shutil.copytree(
                original, directory, ignore=shutil.ignore_patterns("merged", "done", "__pycache__")
            )
        try:
            for file, old, new in edits:
                edit(directory, file, old, new)
            child = os.fork()
            if child == 0:
                run_commands(directory, commands)
                os._exit(0)
            os.waitpid(child, 0)
        except AssertionError as error:  # the text that an edit replaces is no longer in the file
            (directory / "failed").write_text(str(error))
        (directory / "done").touch()


def wait_for_results(directory, count, seconds=120):
    """The Results of the `count` commands of a job, as soon as `run_jobs` has done the job."""
    deadline = time.monotonic() + seconds
    while not (directory / "done").exists():
        assert time.monotonic() < deadline, f"{directory} is not done"
        time.sleep(0.02)
    assert not (directory / "failed").exists(), (directory / "failed").read_text()
    return [read_result(directory, i) for i in range(count)]


def read_result(directory, i):
    """The Result of command number i, from the files in which `run_commands` has left it."""
    status, out, err = (
        (directory / f"{i}.{kind}").read_text() for kind in ("status", "out", "err")
    )
    return Result(int(status), out, err)


def run_commands(directory, commands):
    """Run the commands in this process, as if Python had been started in the copy's directory, and
    leave exit status, stdout and stderr of each in files."""
    # tqdm's usual lock is a semaphore of the system, which `os._exit` would leave behind
    tqdm.set_lock(threading.RLock())
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT_MODULES]:
        del sys.modules[name]
    sys.path[:] = [str(directory), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    os.chdir(directory)
    importlib.import_module("data.tasks").TOY_SIZES.update(train=40, test=3)
    for i, command in enumerate(commands):
        script, *arguments = command.split()
        with open(f"{i}.out", "w") as out, open(f"{i}.err", "w") as err:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = run_script(script, arguments)
        Path(f"{i}.status").write_text(str(status))


def run_script(script, arguments):
    """Run a script, print the traceback of an exception as Python does, and return the exit
    status."""
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
