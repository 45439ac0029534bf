"""The tasks: their test sets and training files, the prompt of an example, and when a response is
right.

Prompt, files and scoring are those of LLM-Adapters (Hu et al., EMNLP 2023;
github.com/AGI-Edgerunners/LLM-Adapters), so that scores can be compared; a clone of that repository
serves as the data directory. The examples of the task `toy` are in no file: toy.py makes them."""

import json
import math
import re
from pathlib import Path

from data import toy
from data.errors import UserError, read_text

# task -> the names of its test sets. `extract_answer` knows how the answers to each are read.
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
    template = PROMPT_WITH_INPUT if example.get("input") else PROMPT
    return template.format(**example)


def encode_prompt(example, tokenizer):
    """The ids that a model answers: the beginning-of-sequence token, if the model has one, and the
    prompt."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt_text(example))


def encode_example(example, tokenizer):
    """(prompt ids, response ids), the response ending with the end-of-sequence token.

    Prompt and response are encoded as one text, since a SentencePiece model would put a space
    before a response that is encoded alone. Only where a token straddles the two are they encoded
    separately, so that the ids of the prompt are always the same."""
    prompt = prompt_text(example)
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + example["output"])
    if ids[: len(prompt_ids)] == prompt_ids:
        response = ids[len(prompt_ids) :]
    else:
        response = tokenizer.encode(example["output"])
    return encode_prompt(example, tokenizer), response + [tokenizer.eos_id]


def tokens_and_labels(prompt, response):
    """Two lists of the same length: the ids that a model reads of an example, and at each position
    the label to predict. The label is the next id if that id belongs to the response, else -100."""
    tokens = (prompt + response)[:-1]
    labels = [-100] * (len(prompt) - 1) + response
    return tokens, labels


def test_sets(task):
    """The names of a task's test sets. `task` may also be the names of test sets, separated by
    commas. Raises UserError for an unknown name."""
    every = []
    for sets in TASKS.values():
        every += sets
    names = TASKS.get(task) or task.split(",")
    for name in names:
        if name not in every:
            raise UserError(
                f"unknown task {name!r}: choose from {', '.join(TASKS)}, or test sets of "
                f"{', '.join(every)}"
            )
    return list(dict.fromkeys(names))


def how_to_get(data_dir):
    """The command that fetches the files of a data directory."""
    command = "python data/download.py all"
    return command if data_dir == DATA_DIR else f"{command} --dir {data_dir}"


def training_file(task, data_dir, train_file=None):
    """The path of the file that holds the training examples, or None for a task that has no such
    file. `train_file` is a path, or the name of a file in the data directory."""
    directory = Path(data_dir) / "ft-training_set"
    if train_file:
        in_data_dir = directory / train_file
        if in_data_dir.is_file() and not Path(train_file).is_file():
            return in_data_dir
        return Path(train_file)
    return directory / TRAIN_FILES[task] if task in TRAIN_FILES else None


def train_examples(task, data_dir, train_file=None, skip_empty=False):
    """The training examples of a task as (place, example), as `placed_examples` returns them.
    Raises UserError."""
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
    """The examples of one test set as (place, example), or None if its file is absent. Place and
    `skip_empty` are as in `placed_examples`. Raises UserError where that does, and for an answer
    that no response could match."""
    if name == "toy":
        examples = toy.examples("test", TOY_SIZES["test"])
        return [(f"example {i}", example) for i, example in enumerate(examples)]
    file = Path(data_dir) / "dataset" / name / "test.json"
    if not file.is_file():
        return None
    placed = placed_examples(file, ("instruction", "answer"), skip_empty)
    for place, example in placed:
        answer = example["answer"]
        if not is_possible(name, answer):
            kind = "choice" if is_multiple_choice(name) else "number"
            raise UserError(
                f"{file}, {place}: the answer {answer!r:.50} is not a {kind} of {name}: fix it"
            )
    return placed


def is_possible(name, answer):
    """Whether `answer` can be the right answer to a question of test set `name`."""
    if is_multiple_choice(name):
        return extract_answer(name, answer) == answer
    try:
        return math.isfinite(float(answer.replace(",", "")))
    except ValueError:
        return False


# The names by which files call a question and its response
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))


def load_examples(file, needed=("instruction", "output"), skip_empty=False):
    """The examples of `placed_examples` without their places."""
    return [example for _, example in placed_examples(file, needed, skip_empty)]


def placed_examples(file, needed=("instruction", "output"), skip_empty=False):
    """The examples in a JSON array, or in JSON Lines, as (place, example). The place says where in
    the file an example stands: "record 3" or "line 4".

    needed: the fields that every example must have, out of "instruction", "output" and "answer".
    An example is a dict. Its needed fields are text, and so is its "input" if it has one; its other
    fields are not looked at. The file may call a question and its response by any of the names in
    PAIRS. Raises UserError, which names the file and the place. A record in which a needed field is
    empty or null is an error too, unless `skip_empty` leaves such records out."""
    examples = []
    empty = []  # (place, names of the empty fields) of the records in which a needed field is empty
    for place, record in read_records(file):
        example, empty_fields = read_example(record, needed, f"{file}, {place}")
        if empty_fields:
            empty.append((place, empty_fields))
        else:
            examples.append((place, example))
    if empty and not skip_empty:
        raise UserError(f"{file}: {problem_of_empty_fields(empty)}")
    if not examples:
        kind = "at least one example"
        if empty:
            kind += " without an empty field"
        raise UserError(f"{file} must hold {kind}: a JSON array of them, or one a line")
    return examples


def read_example(record, needed, where):
    """(example, the names of those needed fields that are empty) from a record of a file. `where`
    is the record's file and place, for the messages. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: not an object but {type(record).__name__}")
    texts = {name: as_text(value) for name, value in record.items()}
    names = names_of_fields(texts, needed)
    missing = [repr(names[field]) for field in needed if names[field] not in record]
    if missing:
        held = [repr(name) for name, text in texts.items() if text is not None]
        listed = ", ".join(held) or "{}"
        raise UserError(
            f"{where} has no {' and no '.join(missing)}, only {listed:.200}: rename or add fields"
        )
    example = dict(record)
    for field in (*needed, "input"):
        if names[field] in record:
            example[field] = checked_text(
                texts[names[field]], f"{where}: the field {names[field]!r}"
            )
    return example, [repr(names[field]) for field in needed if not example[field]]


def names_of_fields(texts, needed):
    """field -> the name by which a record calls that field.

    texts: name -> text of all that the record holds. The names are those of the pair in PAIRS of
    which the record holds the most needed fields, since a record may hold a prompt beside a
    question, or every name with nulls in most."""

    def completeness(names):
        wanted = [names[field] for field in needed]
        num_filled = sum(texts.get(name) is not None for name in wanted)
        num_present = sum(name in texts for name in wanted)
        return num_filled, num_present

    choices = []
    for question, response in PAIRS:
        names = {"instruction": question, "input": "input", "output": response, "answer": "answer"}
        choices.append(names)
    return max(choices, key=completeness)


def checked_text(text, what):
    """The text of a field, or None for null. Raises UserError for what is no text, and for half a
    character, and calls the field `what`."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{what} is not text but {text!r:.50}")
    if not is_unicode(text):
        raise UserError(f"{what} holds half a character, which cannot be encoded: fix it")
    return text


def problem_of_empty_fields(empty):
    """What is wrong with a file in which needed fields are empty, and what to do. empty: (place,
    names of the empty fields) of each such record."""
    names = {}  # a dict, since it keeps the order of its keys
    for _, empty_fields in empty:
        names |= dict.fromkeys(empty_fields)
    first, _ = empty[0]
    if len(empty) == 1:
        where = first
        them = "it"
    else:
        where = f"{len(empty)} records, the first is {first}"
        them = "them"
    advice = f"delete {them}, or leave {them} out with --skip-empty"
    return f"the field {' or '.join(names)} is empty in {where}: {advice}"


def as_text(value):
    """A value as text: a number or a truth value is spelt as in JSON. Null is None, and so is NaN,
    which pandas writes for an empty cell. Anything else is returned as it is."""
    if value is None or value != value:
        return None
    return json.dumps(value) if isinstance(value, (bool, int, float)) else value


def read_records(file):
    """(place, value) of every element of a JSON array, or of every line of JSON Lines. The places
    of an array are "record 0", "record 1" and so on, those of JSON Lines "line 1", "line 2"."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        return [(f"record {i}", value) for i, value in enumerate(parse(text, file))]
    if goes_over_lines(text.lstrip()):
        advice = "put it in [ ], with a comma between objects, or each object on one line"
        raise UserError(f"{file} holds a JSON object over several lines: {advice}")
    # splitlines would also split at characters that Unicode takes for the end of a line, and that
    # may stand in a string of JSON.
    lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, parse(line, f"{file}, {place}")) for place, line in lines]


def goes_over_lines(text):
    """Whether the first JSON value of a text goes on after its first line."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand nested brackets
        raise UserError(f"{place}: not JSON: {error}") from None


def is_unicode(text):
    """Whether a text can be encoded: a text from JSON or from a command line can hold half of a
    character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# multiple-choice test set -> the pattern of its options. Those of AQuA are the letters A to E.
CHOICES = {
    "boolq": r"\b(?:true|false)\b",
    "piqa": r"solution[12]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
}
CHOICES |= dict.fromkeys(("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), r"answer[1-5]")
# What may stand around a letter: brackets, quotes, asterisks, spaces, commands of LaTeX and tags of
# HTML, but no end of a part of a sentence
MARKS = r"(?:\\[a-zA-Z]+|</?\w+>|[^\w.,;!?]|_)*"
KIND = r"(?i:answer|option|choice)"
# The letter in "The answer is (B)", "**Choice:** option `B`", "B is the correct answer"
IS = r"(?i:is|will be|would be|must be|should be|has to be)\b"
IS += r"(?:\s+(?:therefore|thus|clearly|indeed|then))*"
LETTER = r"(?:(?<!\$)([A-E])(?![A-Za-z0-9])|(?<=\$)([A-E])(?![A-Za-z0-9]|\s*=))"  # $A = 12$ is none
SAID = rf"{KIND}(?:\s+{IS}|\W*[:=\uff1a\u2192]|\**\s*(?=[(\[])){MARKS}"
SAID += rf"(?:(?i:the )?(?:{KIND}|letter)\b{MARKS})?{LETTER}"
SAID += rf"|\({KIND}\W*{LETTER}"
SAID += rf"|\b{LETTER}{MARKS}(?<=\W)is (?:the )?(?:(?:correct|right|best|final) )*{KIND}\b"
SAID += rf"|{KIND}{MARKS}{LETTER}{MARKS}(?<=\W)is (?:the )?(?:correct|right)\b"
# What stands between thousands: 9{,}500 and 9\,500 in LaTeX, a no-break or a thin space
THOUSANDS = r",?\{+\\?,\}+(?:\\!)?|,\{\}|,?\\!|\{?\\[,:>; ]\}?|\\thinspace |[~\u00a0\u2009\u202f]"
THOUSANDS = rf"(?<=\d)(?:{THOUSANDS})(?=\d{{3}}(?!\d))"
# The article at the beginning of a sentence, as in "A train ...". {} stands for the words before
# which an A is not the article but the letter.
ARTICLE = r"(?<![a-z,] )\bA (?!(?:{})\b(?!-))[a-z]"
# Words that do not follow the article, as in "Answer: A because ..."
AFTER_LETTER = (
    "is was has gives equals works fits satisfies matches makes yields because since as for and "
    "or but so not by with "
    "from if when where which that would the it we"
)


def extract_answer(name, response):
    """The answer that a response gives to a question of test set `name`, as text; "" if the
    response gives no answer.

    The answer is the one that LLM-Adapters extracts, case counting: the last number with its commas
    removed, and in commonsense the first option that is named. There are four differences: ".5" is
    a half, LaTeX's thousands ("9{,}500") and the minus of Unicode belong to a number, "untrue" does
    not name true, and in AQuA the choice is the last letter said to be the answer, or else the last
    letter that stands alone. In LLM-Adapters it is the first capital A to E, even that of
    "Because"."""
    if name in CHOICES:
        named = re.findall(CHOICES[name], response)
        return named[0] if named else ""
    if name == "AQuA":
        letters = chosen_letters(response)
        return letters[-1] if letters else ""
    response = re.sub(THOUSANDS, "", response)
    response = re.sub("\u2212\\\\?\\$?(?=[\\d.])", "-", response)
    # A point begins a number only where no word ends: "Rs.75" is 75.
    numbers = re.findall(r"-?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)", response.replace(",", ""))
    return numbers[-1] if numbers else ""


def chosen_letters(response):
    """The letters A to E that a response to a question of AQuA names as its choice, in order."""
    article = ARTICLE.format(AFTER_LETTER.replace(" ", "|"))
    said = said_letters(re.sub(article, "", response))
    if said:
        return said
    alone = re.findall(r"\b[A-E]\b", re.sub(ARTICLE.format("is"), "", response))
    # Where no other letter is named, an A that may be an article is the choice.
    return alone or said_letters(response)


def said_letters(response):
    """The letters that are said to be the answer, the option or the choice, in order."""
    return [match[match.lastindex] for match in re.finditer(SAID, response)]


def is_correct(name, response, answer):
    """Whether a response gives the right answer."""
    return is_right(name, extract_answer(name, response), answer)


def is_right(name, extracted, answer):
    """Whether the answer that `extract_answer` returned is right. A number may be off by 1e-3."""
    if is_multiple_choice(name):
        return extracted == answer
    if extracted == "":
        return False
    return abs(float(extracted) - float(answer.replace(",", ""))) <= 1e-3


def is_multiple_choice(name):
    """Whether the questions of test set `name` are multiple choice; the answers to the others are
    numbers."""
    return name in CHOICES or name == "AQuA"


def options(name, example):
    """The responses among which an example of the multiple-choice test set `name` lets a model
    choose, worded as in the training data.

    The options are read from the instruction, which ends in "Answer format: answer1/answer2/...",
    and in AQuA in "Answer Choices: (A) ... (B) ...". Raises UserError if it has fewer than two."""
    if name == "AQuA":
        marker = "Answer Choices:"
        pattern = r"\(([A-E])\)"
        wording = "The answer is ({})."
    elif name in CHOICES:
        marker = "Answer format:"
        pattern = CHOICES[name]
        wording = "the correct answer is {}"
    else:
        raise UserError(f"{name} is not multiple choice: choose from AQuA, {', '.join(CHOICES)}")
    _, marked, listed = example["instruction"].rpartition(marker)
    # An option may be named again in the text of another: "(E) both (A) and (B)".
    choices = dict.fromkeys(re.findall(pattern, listed))
    if not marked or len(choices) < 2:
        raise UserError(
            f"{name}: fewer than two options stand after {marker!r} in "
            f"{example['instruction'][-60:]!r}"
        )
    return [wording.format(choice) for choice in choices]


def wilson_interval(right, count):
    """(low, high): the 95 % score interval of a proportion, where `right` answers of a sample of
    `count` are right (Wilson, 1927, "Probable inference, the law of succession, and statistical
    inference").

    With n = count, p = right/n and z the normal quantile 1.96, the interval holds every q for which
    |p - q| <= z sqrt(q (1 - q)/n). Its ends are

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)"""
    assert count >= 1 and 0 <= right <= count
    z = 1.959964
    p = right / count
    middle = p + z**2 / (2 * count)
    half = z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    low = (middle - half) / (1 + z**2 / count)
    high = (middle + half) / (1 + z**2 / count)
    return max(low, 0.0), min(high, 1.0)  # rounding may carry the ends beyond 0 and 1
