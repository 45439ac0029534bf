"""predictions.jsonl and results.json: a line per answered question, and the scores.
An evaluation that was stopped goes on where it was, and asks nothing twice.
Without it: print(response) in the loop of eval.py.
"""

import hashlib
import json
from pathlib import Path

import rosa
from data.errors import user_file
from data.tokenizer import JsonTokenizer, SentencePieceTokenizer
from extras.distributed import gather, processes
from extras.peft_methods import ADAPTER_FILES
from extras.runs import read_log, write_whole
from extras.source import HERE, file_fingerprint, reached_code
from model import Llama, LlamaConfig


class Predictions:
    """The answers so far: number of the question -> its line. questions: (test set, index, example, prompt ids) tuples.

    made_by: what the answers depend on beside the question, as `fingerprint` has it; lines that were made by anything
    else don't count."""

    def __init__(self, out, made_by, questions):
        self.out, self.questions = out, questions
        self.path = out / "predictions.jsonl"
        self.settings = "-".join(str(made_by[name]) for name in ("checkpoint", "adapter", "settings"))
        self.code = hash_of(made_by["code"])
        lines = gather(read_lines(self.path) if processes()[0] == 0 else None)[0]  # one file, whoever reads it
        same = {(line["set"], line["index"]): line for line in lines if line.get("settings") == self.settings}
        answered = {place: line for place, line in same.items() if line.get("code") == self.code}
        if len(answered) < len(same):
            number = len(same) - len(answered)
            print(f"answers    {number:,} in {self.path} were answered by other code: asking again")
        elif lines and not same:
            print(f"answers    those in {self.path} are of another adapter or other settings: starting anew")
        self.lines = {}
        for number, (name, i, example, prompt) in enumerate(questions):
            line = answered.pop((name, i), None)
            if line and (line["prompt"], line["answer"]) == (hash_of(prompt), example["answer"]):
                self.lines[number] = line
        self.other_lines = list(answered.values())  # of questions that are not asked now: they are kept
        if self.lines:
            print(f"answers    {len(self.lines):,} of {len(questions):,} are in {self.path} already")
        self.write()

    def write(self):
        """The file anew, in the order of the questions; by the first process."""
        if processes()[0] > 0:
            return
        lines = [self.lines[number] for number in sorted(self.lines)] + self.other_lines
        with user_file(self.path):
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def unanswered(self):
        """Long prompts first, so that what does not fit in memory fails at once."""
        numbers = set(range(len(self.questions))) - set(self.lines)
        return sorted(numbers, key=lambda number: (-len(self.questions[number][3]), number))

    def add(self, number, response, finish_reason, judged):
        """An answer, on disk at once. finish_reason: "stop", "length" (cut at --max-new-tokens), "no room". judged: the
        fields "extracted" and "correct"."""
        name, i, example, prompt = self.questions[number]
        line = {"set": name, "index": i, "instruction": example["instruction"], "answer": example["answer"]}
        line |= {"response": response} | judged | {"finish_reason": finish_reason}
        line |= {"prompt": hash_of(prompt), "settings": self.settings, "code": self.code}
        self.lines[number] = line
        if processes()[0] == 0:
            with user_file(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def finish(self, results):
        """Write results.json, and the answers in order."""
        self.write()
        if processes()[0] == 0:
            with user_file(self.out):
                write_whole(self.out / "results.json", json.dumps(results, indent=2) + "\n")
        print(f"every answer is in {self.path}")


def fingerprint(ckpt, adapter, settings, code):
    """What a result belongs to: the checkpoint, the adapter (None: none) and the settings, each in twelve characters,
    and the code that has made it, as file -> twelve characters."""
    made_by = {"checkpoint": checkpoint_hash(ckpt), "adapter": adapter_hash(adapter), "settings": hash_of(settings)}
    return made_by | {"code": code}


# Files that may stand for methods of model.py and rosa.py. --plain leaves them out, and has the same results.
STAND_INS = ("extras/kernels.py", "extras/operators.py", "extras/inference.py")


def result_code(kind, adapter=None, own=()):
    """file -> fingerprint of the code that makes a result. kind: "generate", the ids of an answer; "likelihood", and
    "loss". adapter: whether there is one. own: functions of the caller's that take part."""
    method = Llama.generate if kind == "generate" else Llama.loss
    reading = [LlamaConfig.from_file, Llama.from_pretrained]
    text = [getattr(cls, name) for cls in (SentencePieceTokenizer, JsonTokenizer) for name in ("encode", "decode")]
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
    """Of all its small files, the tokenizer's too, and of the names, sizes and times of its weights."""
    small = [file for file in sorted(ckpt.iterdir()) if file.suffix in (".json", ".model", ".txt", ".jinja")]
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(ckpt.glob("*.safetensors"))]
    return hash_of([(file.name, file.read_bytes()) for file in small] + weights)


def adapter_hash(directory):
    """None where no adapter is."""
    files = [directory / name for name in ADAPTER_FILES] if directory else []
    return hash_of([file.read_bytes() for file in files]) if files and all(map(Path.is_file, files)) else None


def hash_of(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def read_lines(path):
    """The lines of a predictions.jsonl, but a last one that was cut short, and whatever else is no answer."""
    needed = {"set", "index", "prompt", "answer", "correct"}
    return [line for line in read_log(path) if isinstance(line, dict) and needed <= line.keys()]
