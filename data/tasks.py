"""What an example is: its prompt, the task lists, the files, and when a response is right.

Prompt, files and scoring are those of LLM-Adapters (Hu et al., EMNLP 2023; github.com/AGI-Edgerunners/LLM-Adapters), so
that scores compare; a clone of that repository serves as the data directory. `toy` is made on the spot.
"""

import json
import re
from pathlib import Path

from data import toy

TASKS = {
    "toy": ["toy"],
    "arithmetic": ["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"],
    "commonsense": ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"],
}
TRAIN_FILES = {"arithmetic": "math_10k.json", "commonsense": "commonsense_15k.json"}
TOY_SIZES = {"train": 2300, "test": 300}
DATA_DIR = "LLM-Adapters"
HOW_TO_GET = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters"

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:\n")
PROMPT_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                     "Write a response that appropriately completes the request.\n\n"
                     "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")


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
    """The names of a task's test sets; a single set is a task too. Raises ValueError for an unknown name."""
    every = [name for names in TASKS.values() for name in names]
    if task not in TASKS and task not in every:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}, or one test set of {', '.join(every)}")
    return TASKS.get(task, [task])


def train_examples(task, data_dir, train_file=None):
    """The training examples of a task. Raises ValueError or OSError with a line for the user."""
    if train_file:
        return load_examples(train_file)
    if task == "toy":
        return toy.examples("train", TOY_SIZES["train"])
    if task not in TRAIN_FILES:
        raise ValueError(f"task {task!r} has no training file of its own: give one with --train-file, "
                         f"or choose from toy, {', '.join(TRAIN_FILES)}")
    file = Path(data_dir) / "ft-training_set" / TRAIN_FILES[task]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is absent: {HOW_TO_GET}, and point --data-dir at it")
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
        try:
            is_correct(name, "0", example["answer"])
        except ValueError:
            raise ValueError(f"{file}, record {i}: the answer {example['answer']!r} is not a number") from None
    return examples


def load_examples(file, needed=("instruction", "output")):
    """A JSON array of {"instruction", "input", "output", "answer"}. Raises ValueError naming file and record."""
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} must hold a JSON array of at least one example")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{file}, record {i}: not an object but {type(record).__name__}")
        for field in needed:
            if field not in record:
                raise ValueError(f"{file}, record {i}: the field {field!r} is missing")
        for field in ("instruction", "input", "output", "answer"):
            if field in needed and not record[field]:
                raise ValueError(f"{file}, record {i}: the field {field!r} is empty")
            if not isinstance(record.get(field, ""), str):
                raise ValueError(f"{file}, record {i}: the field {field!r} is not text but {record[field]!r}")
    return records


CHOICES = {"boolq": r"true|false", "piqa": r"solution[12]", "hellaswag": r"ending[1-4]", "winogrande": r"option[12]"}
CHOICES |= dict.fromkeys(("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), r"answer[1-5]")


def extract_answer(name, response):
    """What a response answers to a question of test set `name`, as text; "" where it gives no answer.

    As LLM-Adapters: the last number, commas removed; in commonsense, the first option named. Unlike it, AQuA's choice
    is the last letter that stands alone: there, any capital A to E counts, be it the first letter of "Because"."""
    if name in CHOICES:
        return next(iter(re.findall(CHOICES[name], response)), "")
    if name == "AQuA":
        said = re.findall(r"answer is:? *\(?([A-E])\b", response)
        alone = re.findall(r"\b(?:[B-E]|A(?! [a-z]))\b", response)  # a lone A before a small letter is the article
        return next(reversed(said or alone), "")
    return next(reversed(re.findall(r"-?(?:\d+(?:\.\d+)?|\.\d+)", response.replace(",", ""))), "")


def is_correct(name, response, answer):
    """Whether a response gives the right answer; numbers may be off by 1e-3."""
    found = extract_answer(name, response)
    if name in CHOICES or name == "AQuA":
        return found == answer
    return found != "" and abs(float(found) - float(answer.replace(",", ""))) <= 1e-3
