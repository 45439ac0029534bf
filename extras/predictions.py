"""predictions.jsonl and results.json: a line per answered question, and the scores.
An evaluation that was stopped goes on where it was, and asks nothing twice.
Without it: print(response) in the loop of eval.py.
"""

import contextlib
import json

from data.errors import user_file
from extras.distributed import gather, is_first
from extras.records import add_result, hash_of, locked, write_whole


class Predictions:
    """The answers so far. lines: number of a question -> the line that answers it.

    questions: eval.py's Question tuples. origin: what the answers depend on
    beside the question, from `origin_of`. Lines of another origin do not count here, and stay in
    the file."""

    def __init__(self, out, origin, questions):
        self.out = out
        self.questions = questions
        self.path = out / "predictions.jsonl"
        named = (origin["checkpoint"], origin["adapter"], origin["settings"])
        self.made_by = "-".join(map(str, named))  # in the file this is called "settings"
        self.code = hash_of(origin["code"])
        # The first process reads the file for all: other machines may hold another one.
        stored = read_lines(self.path) if is_first() else None
        lines = gather(stored)[0]
        numbers = {}
        for question in questions:
            answer = question.example["answer"]
            key = (question.test_set, question.index, hash_of(question.prompt), answer)
            numbers[key] = question.number
        self.lines = {}
        by_other_code = set()
        for line in lines:
            number = numbers.get((line["set"], line["index"], line["prompt"], line["answer"]))
            if number is None or line.get("settings") != self.made_by:
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
        """Have the first process make a file, or end the one that is there with a whole line."""
        if not is_first():
            return
        with user_file(self.path):
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out), open(self.path, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):  # a kill has cut the last line
                    file.write(b"\n")

    def unanswered(self):
        """The questions that are to be asked. Long prompts come first, so that what does not fit in
        memory fails at once."""
        questions = [question for question in self.questions if question.number not in self.lines]
        return sorted(questions, key=lambda question: (-len(question.prompt), question.number))

    def add(self, number, response, finish_reason, judged):
        """Add an answer, which is on disk at once. finish_reason: "stop", "length" (the answer was
        cut at --max-new-tokens), or "no room". judged: the fields "extracted" and "correct"."""
        question = self.questions[number]
        line = {
            "set": question.test_set,
            "index": question.index,
            "instruction": question.example["instruction"],
            "answer": question.example["answer"],
            "response": response,
            **judged,
            "finish_reason": finish_reason,
            "prompt": hash_of(question.prompt),
            "settings": self.made_by,
            "code": self.code,
        }
        self.lines[number] = line
        if is_first():
            with (
                user_file(self.path),
                locked(self.out),
                open(self.path, "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line) + "\n")

    def finish(self, results):
        """Write these answers in the order of the questions, before those of anything else, and
        results.json."""
        if is_first():
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
    """What is equal in two lines that answer the same question, made by the same."""
    names = ("set", "index", "prompt", "answer", "settings", "code")
    return tuple(line.get(name) for name in names)


def read_lines(path):
    """The lines of a predictions.jsonl, without those that were cut short or are no answer."""
    if not path.is_file():
        return []
    needed = {"set", "index", "prompt", "answer", "response", "correct"}
    lines = []
    for text in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and needed <= line.keys():
                lines.append(line)
    return lines
