"""Whole files, append-only logs, and by what something was made.
After a kill at any moment every file is as it was before or as it should be, and no number is taken
for that of another adapter, checkpoint or code.
Without it: write_text, and a note of what each file was made with.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

import rosa
from data import tasks
from data.errors import UserError, user_file
from data.tokenizer import JsonTokenizer, SentencePieceTokenizer
from extras.adapters import ADAPTER_FILES
from extras.checkpoints import checkpoint_files, companions, read_json
from extras.commands import Stop
from extras.source import HERE, file_fingerprint, reached_code, short_hash
from model import Llama, LlamaConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# --- whole files ---


@contextlib.contextmanager
def saving(path):
    """Around what writes in a run: a disk that is full, read-only or gone ends it in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Stop(f"cannot write {path}: {error}. What was saved before is whole") from None


def write(path, content):
    """`write_whole` in a run: what the disk refuses ends the run in one line."""
    with saving(path):
        write_whole(path, content)


def write_whole(path, content):
    """Replace a file whole: the new one is written beside it, flushed, and renamed.

    content: a text, or a function that writes the file whose path it is given."""
    partial = path.with_name(path.name + ".partial")
    try:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            content(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        # The error that brought us here is the one to be shown, not another one of this deletion.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if os.name == "posix":  # a renamed file is safe once its directory is flushed
        flush(path.parent)


def flush(path):
    """Have the disk hold what was written to a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable(directory):
    """Make a directory, if it is not there. Raise UserError where no file can be written in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None


def clear_partial(directory):
    """Delete what a save that was cut short has left: our files end in .partial, those of the
    package safetensors are called .tmp and six letters."""
    for leftover in (*directory.glob("*.partial"), *directory.glob(".tmp??????")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@contextlib.contextmanager
def locked(directory):
    """Around what changes the files of a directory: one process at a time does so. Windows knows no
    such lock."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # closing the directory unlocks it


# --- append-only logs ---


def line_of(record):
    """The line of a log that holds a record. JSON has no word for a number that is not finite: null
    stands for it."""
    finite = {}
    for key, value in record.items():
        is_not_finite = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if is_not_finite else value
    return json.dumps(finite) + "\n"


def write_log(path, record):
    """Add a line to a log."""
    with saving(path), open(path, "a", encoding="utf-8") as file:
        file.write(line_of(record))


def read_log(path):
    """The records of a log, as far as the log is whole: a kill may have cut its last line."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return records


# --- what a run directory says ---


def steps_of(log):
    """The records of a run's log that are of steps."""
    return [record for record in log if "loss" in record]


def validations_of(log):
    """The records of a run's log that are of validations, but for losses that are not finite. In
    formats before 4 a step and its validation are one record."""
    return [record for record in log if record.get("val_loss") is not None]


def best_step(out):
    """The step that the adapter in a run directory is of; None where the directory holds no run."""
    validations = validations_of(read_log(out / "log.jsonl"))
    if not validations:
        return None
    return min(validations, key=lambda record: record["val_loss"])["step"]


def say_if_unfinished(out):
    """Print a line where what a run directory holds is not what a whole run has made of it, or
    where other code has made it."""
    step = best_step(out)
    if step is None:
        return
    if edited := edited_since(read_json(out / "args.json", missing={}), code_of_the_method()):
        print(f"trained    {out}: {have_been_edited(edited)} since its run began")
    if not (out / "summary.json").exists():
        problem = "its run has not ended; what it holds is the best so far"
        print(f"unfinished {out}: {problem}, of step {step}")
    elif step == 0:
        print(f"untrained  {out}: no step of its run improved on the loss before training")


def trained_on(args):
    """What a run was trained on, in a word. args: those in its args.json."""
    return Path(args["train_file"]).stem if args["train_file"] else args["task"]


def code_of_the_method():
    """file -> fingerprint of the files that say what is trained, and how."""
    return {name: file_fingerprint(HERE / name) for name in ("model.py", "rosa.py")}


def edited_since(args, code):
    """The files that were edited since a run began. args: those in its args.json. code: file ->
    fingerprint now. Runs of earlier versions do not say with which code they began, and runs with
    --plain do not name all of the files."""
    began = args.get("code", {})
    return [file for file in began if file in code and began[file] != code[file]]


def have_been_edited(files):
    """Say of some files that they were edited: "model.py and rosa.py have been edited"."""
    return f"{' and '.join(files)} {'has' if len(files) == 1 else 'have'} been edited"


# --- by what a result was made ---


def origin_of(ckpt, adapter, settings, code):
    """What a result was made by: the checkpoint, the adapter (None: none) and the settings, each in
    twelve characters, and the code, as file -> twelve characters."""
    return {
        "checkpoint": checkpoint_hash(ckpt),
        "adapter": adapter_hash(adapter),
        "settings": hash_of(settings),
        "code": code,
    }


def hash_of(value):
    """Twelve characters that stand for a value."""
    return short_hash(repr(value))


def checkpoint_hash(ckpt):
    """The hash of a checkpoint: of its config, of its tokenizer's files, and of the names, sizes
    and times of the files that hold its weights. What a run or an evaluation leaves in the
    directory does not count."""
    small = [ckpt / "config.json", *companions(ckpt)]
    contents = [(file.name, file.read_bytes()) for file in small]
    weights = []
    for file in checkpoint_files(ckpt):
        status = file.stat()
        weights.append((file.name, status.st_size, status.st_mtime_ns))
    return hash_of(contents + weights)


def adapter_hash(directory):
    """The hash of an adapter's files; None where no adapter is."""
    files = [directory / name for name in ADAPTER_FILES] if directory else []
    if not files or not all(map(Path.is_file, files)):
        return None
    return hash_of([file.read_bytes() for file in files])


# These files may stand for methods of model.py and rosa.py. --plain leaves them out, and has the
# same results.
STAND_INS = ("extras/kernels.py", "extras/operators.py", "extras/inference.py")
QUANTIZED = "extras/quantize.py"  # the layers that --quantize makes


def result_code(kind, adapter=None, own=(), quantization=None):
    """file -> fingerprint of the code that makes a result.

    kind: "generate" where the result is the ids of an answer, else "likelihood" or "loss".
    adapter, quantization: true where there is one. own: functions of the caller's that take
    part."""
    if kind == "generate":
        method = Llama.generate
        encode = tasks.encode_prompt
    else:
        method = Llama.loss
        encode = tasks.encode_example
    starts = [Llama, LlamaConfig, method, LlamaConfig.from_dict, Llama.from_pretrained, encode]
    for tokenizer in (SentencePieceTokenizer, JsonTokenizer):
        starts += [tokenizer.encode, tokenizer.decode]
    if adapter:
        starts.append(rosa.load_adapter)
    code = reached_code(*starts)
    if kind != "loss":
        code |= {name: file_fingerprint(HERE / name) for name in STAND_INS}
    if quantization:
        code[QUANTIZED] = file_fingerprint(HERE / QUANTIZED)
    return reached_code(*own) | code


def is_by_other_code(result, kind):
    """Whether a result was made by other code than there is now, or does not say by which."""
    stated = result.get("code", {})
    now = result_code(kind, result["adapter"], quantization=QUANTIZED in stated)
    return any(stated.get(file) != code for file, code in now.items())


def add_result(path, result, identifying, merge=lambda old, new: new):
    """Write a result into a JSON file that keeps the results before it under "others", the latest
    last. An old result that has the same values under the identifying names is replaced, by
    merge(the old one, the new one)."""
    with user_file(path), locked(path.parent):
        try:
            stored = stored_results(path)
        except UserError:  # a file that cannot be read is replaced
            stored = []
        others = []
        for old in stored:
            if all(old.get(name) == result[name] for name in identifying):
                result = merge(old, result)
            else:
                others.append(old)
        write_whole(path, json.dumps(result | {"others": others}, indent=2) + "\n")


def stored_results(path):
    """The results in a file of `add_result`, the latest last; none where there is no file."""
    result = read_json(path, missing={})
    others = result.pop("others", [])
    return [*others, result] if result else []
