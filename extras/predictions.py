"""predictions.jsonl and results.json: a line per answered question, and the scores.
An evaluation that was stopped goes on where it was, and asks nothing twice.
Without it: print(response) in the loop of eval.py.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import rosa
from data import tasks
from data.errors import UserError, user_file
from data.tokenizer import JsonTokenizer, SentencePieceTokenizer
from extras.adapters import ADAPTER_FILES
from extras.checkpoints import checkpoint_files, companions, read_json
from extras.distributed import gather, processes
from extras.runs import locked, write_whole
from extras.source import HERE, file_fingerprint, reached_code
from model import Llama, LlamaConfig


class Predictions:
    """The answers so far: number of the question -> its line. questions: (test set, index, example,
    prompt ids) tuples.

    made_by: what the answers depend on beside the question, as `fingerprint` has it. Lines of other
    adapters, settings or code don't count here, and stay in the file."""

    def __init__(self, out, made_by, questions):
        self.out, self.questions = out, questions
        self.path = out / "predictions.jsonl"
        self.settings = "-".join(
            str(made_by[name]) for name in ("checkpoint", "adapter", "settings")
        )
        self.code = hash_of(made_by["code"])
        # One file, whoever reads it
        lines = gather(read_lines(self.path) if processes()[0] == 0 else None)[0]
        numbers = {}
        for number, (name, i, example, prompt) in enumerate(questions):
            numbers[name, i, hash_of(prompt), example["answer"]] = number
        self.lines, by_other_code = {}, set()
        for line in lines:
            number = numbers.get((line["set"], line["index"], line["prompt"], line["answer"]))
            if number is None or line.get("settings") != self.settings:
                continue
            if line.get("code") == self.code:
                self.lines[number] = line
            else:
                by_other_code.add(number)
        if again := by_other_code - self.lines.keys():
            print(
                f"answers    {len(again):,} in {self.path} were answered by other code: asking "
                "again"
            )
        elif lines and not self.lines:
            print(
                f"answers    those in {self.path} are of another adapter, settings or questions: "
                "starting anew"
            )
        if self.lines:
            print(
                f"answers    {len(self.lines):,} of {len(questions):,} are in {self.path} already"
            )
        self.prepare()

    def prepare(self):
        """Have a file that ends with a whole line; by the first process."""
        if processes()[0] > 0:
            return
        with user_file(self.path):
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out), open(self.path, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):  # a kill has cut the last line
                    file.write(b"\n")

    def unanswered(self):
        """Long prompts first, so that what does not fit in memory fails at once."""
        numbers = set(range(len(self.questions))) - set(self.lines)
        return sorted(numbers, key=lambda number: (-len(self.questions[number][3]), number))

    def add(self, number, response, finish_reason, judged):
        """An answer, on disk at once. finish_reason: "stop", "length" (cut at --max-new-tokens),
        "no room". judged: the fields "extracted" and "correct"."""
        name, i, example, prompt = self.questions[number]
        line = {
            "set": name,
            "index": i,
            "instruction": example["instruction"],
            "answer": example["answer"],
        }
        line |= {"response": response} | judged | {"finish_reason": finish_reason}
        line |= {"prompt": hash_of(prompt), "settings": self.settings, "code": self.code}
        self.lines[number] = line
        if processes()[0] == 0:
            with (
                user_file(self.path),
                locked(self.out),
                open(self.path, "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line) + "\n")

    def finish(self, results):
        """Write these answers in the order of the questions, before those of anything else, and
        results.json."""
        if processes()[0] == 0:
            own = {identity(line): line for _, line in sorted(self.lines.items())}
            with user_file(self.path), locked(self.out):
                others = [line for line in read_lines(self.path) if identity(line) not in own]
                lines = [json.dumps(line) + "\n" for line in [*own.values(), *others]]
                write_whole(self.path, "".join(lines))
            add_result(
                self.out / "results.json",
                results,
                ("checkpoint", "adapter", "settings", "questions"),
            )
        print(f"every answer is in {self.path}")


def identity(line):
    """What two lines have in common that answer one question in one way."""
    return tuple(
        line.get(name) for name in ("set", "index", "prompt", "answer", "settings", "code")
    )


def add_result(path, result, identifying, merge=lambda old, new: new):
    """Write a result into a JSON file that keeps those before it under "others", the latest last.
    One that has the same values under the identifying names is replaced, by merge(it, the new
    one)."""
    with user_file(path), locked(path.parent):
        try:
            stored = stored_results(path)
        except UserError:  # a file that cannot be read is replaced
            stored = []
        others = []
        for old in stored:
            if same(old, result, identifying):
                result = merge(old, result)
            else:
                others.append(old)
        write_whole(path, json.dumps(result | {"others": others}, indent=2) + "\n")


def same(old, new, names):
    return all(old.get(name) == new[name] for name in names)


def stored_results(path):
    """The results in a file of `add_result`, the latest last; none where there is no file."""
    result = read_json(path, missing={})
    others = result.pop("others", [])
    return [*others, result] if result else []


def fingerprint(ckpt, adapter, settings, code):
    """What a result belongs to: the checkpoint, the adapter (None: none) and the settings, each in
    twelve characters, and the code that has made it, as file -> twelve characters."""
    made_by = {
        "checkpoint": checkpoint_hash(ckpt),
        "adapter": adapter_hash(adapter),
        "settings": hash_of(settings),
    }
    return made_by | {"code": code}


# Files that may stand for methods of model.py and rosa.py. --plain leaves them out, and has the
# same results.
STAND_INS = ("extras/kernels.py", "extras/operators.py", "extras/inference.py")


def result_code(kind, adapter=None, own=()):
    """file -> fingerprint of the code that makes a result. kind: "generate", the ids of an answer;
    "likelihood", and "loss". adapter: whether there is one. own: functions of the caller's that
    take part."""
    method = Llama.generate if kind == "generate" else Llama.loss
    reading = [LlamaConfig.from_dict, Llama.from_pretrained]
    text = [tasks.encode_prompt if kind == "generate" else tasks.encode_example]
    text += [
        getattr(cls, name)
        for cls in (SentencePieceTokenizer, JsonTokenizer)
        for name in ("encode", "decode")
    ]
    adapting = [rosa.load_adapter] if adapter else []
    code = reached_code(Llama, LlamaConfig, method, *reading, *text, *adapting)
    if kind != "loss":
        code |= {name: file_fingerprint(HERE / name) for name in STAND_INS}
    return reached_code(*own) | code


def is_by_other_code(result, kind):
    """Whether a result was made by other code than there is now, or does not say by which."""
    stated = result.get("code", {})
    now = result_code(kind, result["adapter"])
    return any(stated.get(file) != code for file, code in now.items())


def checkpoint_hash(ckpt):
    """Of its config, of its tokenizer's files, and of the names, sizes and times of its weights; of
    nothing that a run or an evaluation leaves in its directory."""
    small = [ckpt / "config.json", *companions(ckpt)]
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint_files(ckpt)
    ]
    return hash_of([(file.name, file.read_bytes()) for file in small] + weights)


def adapter_hash(directory):
    """None where no adapter is."""
    files = [directory / name for name in ADAPTER_FILES] if directory else []
    return (
        hash_of([file.read_bytes() for file in files])
        if files and all(map(Path.is_file, files))
        else None
    )


def hash_of(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def read_lines(path):
    """The lines of a predictions.jsonl, but those that were cut short, and whatever else is no
    answer."""
    needed = {"set", "index", "prompt", "answer", "response", "correct"}
    lines = []
    for text in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    ):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and needed <= line.keys():
                lines.append(line)
    return lines
