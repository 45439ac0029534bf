"""What an example is: its prompt, the task lists, the files, and when a response is right.

Prompt, files and scoring are those of LLM-Adapters (Hu et al., EMNLP 2023;
github.com/AGI-Edgerunners/LLM-Adapters), so that scores compare; a clone of that repository serves
as the data directory. `toy` is made on the spot."""

import json
import math
import re
from pathlib import Path

from data import toy
from data.errors import UserError, user_file

# Test sets by task. How a set's answers are read: `extract_answer`.
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
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def prompt_text(example):
    return (PROMPT_WITH_INPUT if example.get("input") else PROMPT).format(**example)


def encode_prompt(example, tokenizer):
    """The ids that a model answers to: the beginning-of-sequence token, where the model has one,
    and the prompt."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt_text(example))


def encode_example(example, tokenizer):
    """(prompt ids, response ids), the response ending with the end-of-sequence token.

    Prompt and response are encoded as one text, since a SentencePiece model would put a space
    before a response of its own; only where a token straddles the two are they encoded apart, so
    that the prompt's ids never change."""
    prompt, text = prompt_text(example), prompt_text(example) + example["output"]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    response = (
        ids[len(prompt_ids) :]
        if ids[: len(prompt_ids)] == prompt_ids
        else tokenizer.encode(example["output"])
    )
    return encode_prompt(example, tokenizer), response + [tokenizer.eos_id]


def tokens_and_labels(prompt, response):
    """What a model reads of an example, and what it shall predict at each of these positions: the
    next id where that belongs to the response, else -100. Two lists of one length."""
    tokens = (prompt + response)[:-1]
    labels = [-100] * (len(prompt) - 1) + response
    return tokens, labels


def test_sets(task):
    """The names of a task's test sets; one set, or several separated by commas, are a task too.
    Raises UserError for an unknown name."""
    every = [name for names in TASKS.values() for name in names]
    names = TASKS.get(task) or task.split(",")
    for name in names:
        if name not in every:
            raise UserError(
                f"unknown task {name!r}: choose from {', '.join(TASKS)}, or test sets of "
                f"{', '.join(every)}"
            )
    return list(dict.fromkeys(names))


def how_to_get(data_dir):
    """What to type where a file of a data directory is absent."""
    return "python data/download.py all" + ("" if data_dir == DATA_DIR else f" --dir {data_dir}")


def training_file(task, data_dir, train_file=None):
    """The path of the file that holds the training examples; None for a task that has none."""
    directory = Path(data_dir) / "ft-training_set"
    if train_file:
        beside = directory / train_file
        return beside if beside.is_file() and not Path(train_file).is_file() else Path(train_file)
    return directory / TRAIN_FILES[task] if task in TRAIN_FILES else None


def train_examples(task, data_dir, train_file=None, skip_empty=False):
    """The training examples of a task, each with its place: (place, example). Place and
    `skip_empty` as in `placed_examples`. Raises UserError."""
    file = training_file(task, data_dir, train_file)
    if file is None:
        if task != "toy":
            raise UserError(
                f"task {task!r} has no training file of its own: give one with --train-file, "
                f"or choose from toy, {', '.join(TRAIN_FILES)}"
            )
        examples = toy.examples("train", TOY_SIZES["train"])
        return [(f"example {i}", example) for i, example in enumerate(examples)]
    if not train_file and not file.is_file():
        others = ", ".join(sorted(other.name for other in file.parent.glob("*.json*")))
        instead = f". There, for --train-file: {others}" if others else ""
        raise UserError(f"{file} is absent. To get it: {how_to_get(data_dir)}{instead}")
    return placed_examples(file, skip_empty=skip_empty)


def test_examples(name, data_dir, skip_empty=False):
    """The examples of one test set, or None where its file is absent; `skip_empty` as in
    `load_examples`."""
    if name == "toy":
        return toy.examples("test", TOY_SIZES["test"])
    file = Path(data_dir) / "dataset" / name / "test.json"
    if not file.is_file():
        return None
    placed = placed_examples(file, ("instruction", "answer"), skip_empty)
    for place, example in placed:
        answer = example["answer"]
        try:
            choice = name in CHOICES or name == "AQuA"
            possible = (
                extract_answer(name, answer) == answer
                if choice
                else math.isfinite(float(answer.replace(",", "")))
            )
        except ValueError:
            possible = False
        if not possible:
            kind = "choice" if choice else "number"
            raise UserError(
                f"{file}, {place}: the answer {answer!r:.50} is not a {kind} of {name}: fix it"
            )
    return [example for _, example in placed]


# The same by three names
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))


def load_examples(file, needed=("instruction", "output"), skip_empty=False):
    """The examples of `placed_examples` without their places."""
    return [example for _, example in placed_examples(file, needed, skip_empty)]


def placed_examples(file, needed=("instruction", "output"), skip_empty=False):
    """The examples in a JSON array, or in JSON Lines, each with its place in the file: (place,
    example), where a place is "record 3" or "line 4", as `read_records` has it.

    An example is a dict. Its fields `needed`, of "instruction", "output" and "answer", are text, as
    is "input" where there is one; whatever else a record holds is not looked at. A question and its
    response may go by any names in PAIRS. Raises UserError naming file and place, unless
    `skip_empty` leaves out the records in which a needed field is empty or null."""
    examples, empty = [], []
    for place, record in read_records(file):
        if not isinstance(record, dict):
            raise UserError(f"{file}, {place}: not an object but {type(record).__name__}")
        texts = {name: as_text(value) for name, value in record.items()}
        there = [name for name, text in texts.items() if text is not None]
        choices = [
            {"instruction": p, "input": "input", "output": r, "answer": "answer"} for p, r in PAIRS
        ]
        # The most complete pair: a record may hold a prompt beside a question, or every name with
        # nulls in most.
        names = max(
            choices,
            key=lambda names: [sum(names[f] in held for f in needed) for held in (there, record)],
        )
        if missing := [repr(names[field]) for field in needed if names[field] not in record]:
            listed = ", ".join(map(repr, there)) or "{}"
            raise UserError(
                f"{file}, {place} has no {' and no '.join(missing)}, only {listed:.200}: rename "
                "or add fields"
            )
        used = {
            field: texts[names[field]] for field in (*needed, "input") if names[field] in record
        }
        for field, text in used.items():
            what = f"{file}, {place}: the field {names[field]!r}"
            if not isinstance(text, (str, type(None))):
                raise UserError(f"{what} is not text but {text!r:.50}")
            if not is_unicode(text or ""):
                raise UserError(f"{what} holds half a character, which cannot be encoded: fix it")
        if blank := [repr(names[field]) for field in needed if not used[field]]:
            empty.append((place, blank))
        else:
            examples.append((place, record | used))
    if empty and not skip_empty:
        fields, first = (
            " or ".join(dict.fromkeys(name for _, blank in empty for name in blank)),
            empty[0][0],
        )
        where, them = (
            (f"{len(empty)} records, the first is {first}", "them")
            if len(empty) > 1
            else (first, "it")
        )
        advice = f"delete {them}, or leave {them} out with --skip-empty"
        raise UserError(f"{file}: the field {fields} is empty in {where}: {advice}")
    if not examples:
        kind = "at least one example" + " without an empty field" * bool(empty)
        raise UserError(f"{file} must hold {kind}: a JSON array of them, or one a line")
    return examples


def as_text(value):
    """A number or a truth value as JSON spells it; None for null and for NaN, which pandas has for
    an empty cell."""
    if value is None or value != value:
        return None
    return json.dumps(value) if isinstance(value, (bool, int, float)) else value


def read_records(file):
    """(place, value) of every element of a JSON array, whose first place is "record 0", or of every
    line of JSON Lines, whose first place is "line 1"."""
    try:
        with user_file(file):
            text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    if text.lstrip().startswith("["):
        return [(f"record {i}", value) for i, value in enumerate(parse(text, file))]
    if goes_over_lines(text.lstrip()):
        advice = "put it in [ ], with a comma between objects, or each object on one line"
        raise UserError(f"{file} holds a JSON object over several lines: {advice}")
    # Not splitlines: a string in JSON may hold what Unicode takes for the end of a line.
    lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, parse(line, f"{file}, {place}")) for place, line in lines]


def goes_over_lines(text):
    """Whether the first JSON value of a text goes on after its first line."""
    try:
        return "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return False


def parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the second: a thousand brackets
        raise UserError(f"{place}: not JSON: {error}") from None


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
SAID = r"[Aa]nswer(?: is|:)[\s:*(]*([A-E])\b"
# "A train": the article, which opens a sentence; {} is what may follow the letter A instead.
ARTICLE = r"(?<![a-z,] )\bA (?!(?:{})\b(?!-))[a-z]"
# In "Answer: A because ...": words that follow no article.
AFTER_LETTER = (
    "is was has gives equals works fits satisfies matches makes yields because since as for and "
    "or but so not by with "
    "from if when where which that would the it we"
)


def extract_answer(name, response):
    """What a response answers to a question of test set `name`, as text; "" where it gives no
    answer.

    As LLM-Adapters, case counting: the last number, commas removed; in commonsense, the first
    option named. Unlike it, ".5" is a half, "untrue" does not name true, and AQuA's choice is the
    last letter said to be the answer, or else the last that stands alone: there, it is the first
    capital A to E, be it that of "Because"."""
    if name in CHOICES:
        return next(iter(re.findall(CHOICES[name], response)), "")
    if name == "AQuA":
        no_article = re.sub(ARTICLE.format(AFTER_LETTER.replace(" ", "|")), "", response)
        alone = re.findall(r"\b[A-E]\b", re.sub(ARTICLE.format("is"), "", response))
        # Where there is no other letter, an A that may be an article is the choice.
        return next(
            reversed(re.findall(SAID, no_article) or alone or re.findall(SAID, response)), ""
        )
    # A point begins a number only where no word ends: "Rs.75" is 75.
    return next(
        reversed(re.findall(r"-?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)", response.replace(",", ""))), ""
    )


def is_correct(name, response, answer):
    """Whether a response gives the right answer."""
    return is_right(name, extract_answer(name, response), answer)


def is_right(name, extracted, answer):
    """Whether what `extract_answer` found is the right answer; numbers may be off by 1e-3."""
    if name in CHOICES or name == "AQuA":
        return extracted == answer
    return extracted != "" and abs(float(extracted) - float(answer.replace(",", ""))) <= 1e-3


def options(name, example):
    """The responses that a multiple-choice example of test set `name` admits, worded as in the
    training data.

    They stand in the instruction: "Answer format: answer1/answer2/...", in AQuA "Answer Choices:
    (A) ... (B) ...". Raises UserError where fewer than two do."""
    if name == "AQuA":
        marker, pattern, wording = "Answer Choices:", r"\(([A-E])\)", "The answer is ({})."
    elif name in CHOICES:
        marker, pattern, wording = "Answer format:", CHOICES[name], "the correct answer is {}"
    else:
        raise UserError(f"{name} is not multiple choice: choose from AQuA, {', '.join(CHOICES)}")
    _, marked, listed = example["instruction"].rpartition(marker)
    choices = dict.fromkeys(re.findall(pattern, listed))  # each once: "(E) both (A) and (B)"
    if not marked or len(choices) < 2:
        raise UserError(
            f"{name}: fewer than two options stand after {marker!r} in "
            f"{example['instruction'][-60:]!r}"
        )
    return [wording.format(choice) for choice in choices]


def wilson_interval(right, count):
    """(low, high): the 95 % score interval of a proportion of which `right` in `count` is a sample
    (Wilson, 1927, "Probable inference, the law of succession, and statistical inference").

    With n = count, p = right/n and z the normal quantile 1.96, the q for which |p - q| <= z sqrt(q
    (1 - q)/n):

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)"""
    assert count >= 1 and 0 <= right <= count
    z, p = 1.959964, right / count
    middle = p + z**2 / (2 * count)
    half = z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    low, high = ((middle + side) / (1 + z**2 / count) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)  # rounding may step over them
