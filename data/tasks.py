"""What an example is: its prompt, the task lists, the files, and when a response is right.

Prompt, files and scoring are those of LLM-Adapters (Hu et al., EMNLP 2023; github.com/AGI-Edgerunners/LLM-Adapters), so
that scores compare; a clone of that repository serves as the data directory. `toy` is made on the spot.
"""

import json
import math
import re
from pathlib import Path

from data import toy

# Test sets by task: what data/download.py fetches, but toy. How a set's answers are read: `extract_answer`.
TASKS = {
    "toy": ["toy"],
    "arithmetic": ["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"],
    "commonsense": [
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ],
}
TRAIN_FILES = {"arithmetic": "math_10k.json", "commonsense": "commonsense_15k.json"}
TOY_SIZES = {"train": 2300, "test": 300}
DATA_DIR = "LLM-Adapters"

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def prompt_text(example):
    return (PROMPT_WITH_INPUT if example.get("input") else PROMPT).format(**example)


def encode_prompt(example, tokenizer):
    """The ids that a model answers to: the beginning-of-sequence token, where the model has one, and the prompt."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt_text(example))


def encode_example(example, tokenizer):
    """(prompt ids, response ids), the response ending with the end-of-sequence token.

    Prompt and response are encoded as one text, since a SentencePiece model would put a space before a response of
    its own; only where a token straddles the two are they encoded apart, so that the prompt's ids never change."""
    prompt, text = prompt_text(example), prompt_text(example) + example["output"]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    response = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else tokenizer.encode(example["output"])
    return encode_prompt(example, tokenizer), response + [tokenizer.eos_id]


def test_sets(task):
    """The names of a task's test sets; one set, or several separated by commas, are a task too. Raises ValueError for
    an unknown name."""
    every = [name for names in TASKS.values() for name in names]
    names = TASKS.get(task) or task.split(",")
    for name in names:
        if name not in every:
            raise ValueError(
                f"unknown task {name!r}: choose from {', '.join(TASKS)}, or test sets of {', '.join(every)}"
            )
    return list(dict.fromkeys(names))


def how_to_get(data_dir):
    """What to type where a file of a data directory is absent."""
    return "python data/download.py all" + ("" if data_dir == DATA_DIR else f" --dir {data_dir}")


def train_examples(task, data_dir, train_file=None):
    """The training examples of a task. Raises ValueError or OSError with a line for the user."""
    if train_file:
        beside = Path(data_dir) / "ft-training_set" / train_file
        return load_examples(beside if beside.is_file() and not Path(train_file).is_file() else train_file)
    if task == "toy":
        return toy.examples("train", TOY_SIZES["train"])
    if task not in TRAIN_FILES:
        raise ValueError(
            f"task {task!r} has no training file of its own: give one with --train-file, "
            f"or choose from toy, {', '.join(TRAIN_FILES)}"
        )
    file = Path(data_dir) / "ft-training_set" / TRAIN_FILES[task]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is absent. To get it: {how_to_get(data_dir)}")
    return load_examples(file)


def test_examples(name, data_dir):
    """The examples of one test set, or None where its file is absent."""
    if name == "toy":
        return toy.examples("test", TOY_SIZES["test"])
    file = Path(data_dir) / "dataset" / name / "test.json"
    if not file.is_file():
        return None
    examples = load_examples(file, needed=("instruction", "answer"))
    for i, example in enumerate(examples):
        answer = example["answer"]
        try:
            choice = name in CHOICES or name == "AQuA"
            possible = (
                extract_answer(name, answer) == answer if choice else math.isfinite(float(answer.replace(",", "")))
            )
        except ValueError:
            possible = False
        if not possible:
            kind = "choice" if choice else "number"
            raise ValueError(f"{file}, record {i}: the answer {answer!r:.50} is not a {kind} of {name}: fix it")
    return examples


PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # the same by three names


def load_examples(file, needed=("instruction", "output")):
    """The examples in a JSON array, or in JSON Lines, as dicts of text: "instruction", "input", "output", "answer", of
    which each has `needed`; a question and its response may go by any names in PAIRS. Raises ValueError naming file and
    record."""
    examples = []
    for place, record in read_records(file):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: not an object but {type(record).__name__}")
        prompt, response = next((pair for pair in PAIRS if pair[0] in record), PAIRS[0])
        names = {"instruction": prompt, "input": "input", "output": response, "answer": "answer"}
        for field, name in names.items():
            if field in needed and name not in record:
                raise ValueError(f"{place}: the field {name!r} is missing")
            if field in needed and not record[name]:
                raise ValueError(f"{place}: the field {name!r} is empty")
            if not isinstance(record.get(name, ""), str):
                raise ValueError(f"{place}: the field {name!r} is not text but {record[name]!r:.50}")
            if not is_unicode(record.get(name, "")):
                raise ValueError(f"{place}: the field {name!r} holds half a character, which cannot be encoded: fix it")
        examples.append(record | {field: record[name] for field, name in names.items() if name in record})
    if not examples:
        raise ValueError(f"{file} must hold at least one example: a JSON array of them, or one a line")
    return examples


def read_records(file):
    """(where it stands, value) of every element of a JSON array, or of every line of JSON Lines."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if text.lstrip().startswith("["):
        return [(f"{file}, record {i}", value) for i, value in enumerate(parse(text, file))]
    # Not splitlines: a string in JSON may hold what Unicode takes for the end of a line.
    lines = [(f"{file}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, parse(line, place)) for place, line in lines]


def parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the second: a thousand brackets
        raise ValueError(f"{place}: not JSON: {error}") from None


def is_unicode(text):
    """Whether a text can be encoded: JSON and command lines can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


CHOICES = {
    "boolq": r"\b(?:true|false)\b",
    "piqa": r"solution[12]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
}
CHOICES |= dict.fromkeys(("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), r"answer[1-5]")


def extract_answer(name, response):
    """What a response answers to a question of test set `name`, as text; "" where it gives no answer.

    As LLM-Adapters, case counting: the last number, commas removed; in commonsense, the first option named. Unlike it,
    ".5" is a half, "untrue" does not name true, and AQuA's choice is the last letter said to be the answer, or else the
    last that stands alone: there, it is the first capital A to E, be it that of "Because"."""
    if name in CHOICES:
        return next(iter(re.findall(CHOICES[name], response)), "")
    if name == "AQuA":
        text = re.sub(r"(?<![a-z,] )\bA (?!is\b)[a-z]", "", response)  # "A train": the article, which opens a sentence
        said = re.findall(r"[Aa]nswer(?: is|:)[\s:*(]*([A-E])\b", text)
        return next(reversed(said or re.findall(r"\b[A-E]\b", text)), "")
    # A point begins a number only where no word ends: "Rs.75" is 75.
    return next(reversed(re.findall(r"-?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)", response.replace(",", ""))), "")


def is_correct(name, response, answer):
    """Whether a response gives the right answer; numbers may be off by 1e-3."""
    answered = extract_answer(name, response)
    if name in CHOICES or name == "AQuA":
        return answered == answer
    return answered != "" and abs(float(answered) - float(answer.replace(",", ""))) <= 1e-3


def options(name, example):
    """The responses that a multiple-choice example of test set `name` admits, worded as in the training data.

    They stand in the instruction: "Answer format: answer1/answer2/...", in AQuA "Answer Choices: (A) ... (B) ...".
    Raises ValueError where fewer than two do."""
    if name == "AQuA":
        marker, pattern, wording = "Answer Choices:", r"\(([A-E])\)", "The answer is ({})."
    elif name in CHOICES:
        marker, pattern, wording = "Answer format:", CHOICES[name], "the correct answer is {}"
    else:
        raise ValueError(f"{name} is not multiple choice: choose from AQuA, {', '.join(CHOICES)}")
    _, marked, listed = example["instruction"].rpartition(marker)
    choices = dict.fromkeys(re.findall(pattern, listed))  # each once: "(E) both (A) and (B)"
    if not marked or len(choices) < 2:
        raise ValueError(f"{name}: fewer than two options stand after {marker!r} in {example['instruction'][-60:]!r}")
    return [wording.format(choice) for choice in choices]


def wilson_interval(right, count):
    """(low, high): the 95 % score interval of a proportion of which `right` in `count` is a sample (Wilson, 1927,
    "Probable inference, the law of succession, and statistical inference").

    With n = count, p = right/n and z the normal quantile 1.96, the q for which |p - q| <= z sqrt(q (1 - q)/n):

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)"""
    assert count >= 1 and 0 <= right <= count
    z, p = 1.959964, right / count
    middle = p + z**2 / (2 * count)
    half = z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    low, high = ((middle + side) / (1 + z**2 / count) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)  # rounding may step over them
