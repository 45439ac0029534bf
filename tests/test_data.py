"""Statements about examples: toy problems, prompts, files, answers."""

import json
import operator
import random

import pytest

from data import tasks, toy
from data.errors import UserError

# --- toy ---

OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}


def test_toy_problems_are_right_and_train_and_test_share_no_numbers(monkeypatch):
    keys, problem, split_keys = {}, toy.problem, {"train": set(), "test": set()}

    def recording(rng):
        key, setup, question, steps, conclusion = problem(rng)
        keys[f"{setup} {question}"] = key
        assert steps[-1].rstrip(".").split(" = ")[1] in conclusion.split()
        return key, setup, question, steps, conclusion

    monkeypatch.setattr(toy, "problem", recording)
    for split, seed in (("train", 0), ("train", 1), ("test", 0), ("test", 1)):
        examples = toy.examples(split, 800, seed)
        assert len({example["instruction"] for example in examples}) == 800
        for example in examples:
            for equation in example["output"].split(". ")[:-1]:
                left, right = equation.split(" = ")
                a, sign, b = left.split()
                assert int(right) == OPERATIONS[sign](int(a), int(b)) >= 0
            assert example["output"].endswith(
                f" = {example['answer']}. The answer is {example['answer']}."
            )
            assert tasks.is_correct("toy", example["output"], example["answer"])
            assert not tasks.is_correct("toy", example["output"] + " 1000", example["answer"])
            split_keys[split].add(keys[example["instruction"]])
    assert not split_keys["train"] & split_keys["test"] and len(split_keys["test"]) > 200
    rng = random.Random(0)
    assert (
        0.05 < sum(toy.split_of(toy.problem(rng)[0]) == "test" for _ in range(20000)) / 20000 < 0.15
    )


def test_toy_problems_depend_on_the_seed_alone():
    assert (
        toy.examples("train", 20) == toy.examples("train", 20) != toy.examples("train", 20, seed=1)
    )


def test_the_prompt_is_that_of_llm_adapters():
    assert tasks.prompt_text({"instruction": "Add {1} and 2.", "output": "3", "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:\n"
    )
    assert tasks.prompt_text({"instruction": "Add.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


# --- files ---

PLAIN = [{"instruction": "Add 1 and 2.", "output": "3"}]
PLAIN += [{"instruction": "Name it.", "input": "\u2028 a\nb", "output": "é"}]


@pytest.mark.parametrize(
    "fields", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")]
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_persons_own_examples(tmp_path, fields, lines):
    names = dict(zip(("instruction", "output"), fields))
    records = [{names.get(key, key): value for key, value in record.items()} for record in PLAIN]
    text = json.dumps(records, indent=1)
    if lines:
        text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    (tmp_path / "data").write_bytes(("\ufeff" + text).encode())
    examples = tasks.load_examples(tmp_path / "data")
    assert [
        {key: example[key] for key in plain} for plain, example in zip(PLAIN, examples, strict=True)
    ] == PLAIN
    assert tasks.prompt_text(examples[1]) == tasks.prompt_text(PLAIN[1])


def load(tmp_path, *records, **options):
    (tmp_path / "data").write_text(json.dumps(records))
    return tasks.load_examples(tmp_path / "data", **options)


def test_null_is_absent_and_a_number_is_its_text(tmp_path):
    plain = {"instruction": "Add.", "output": "3"}
    for absent in (None, float("nan"), ""):
        (example,) = load(tmp_path, plain | {"input": absent})
        assert tasks.prompt_text(example) == tasks.prompt_text(plain)
    for value, text in ((0, "0"), (-2.5, "-2.5"), (True, "true"), (False, "false")):
        (example,) = load(tmp_path, {"prompt": "Add.", "input": value, "completion": value})
        assert example["input"] == example["output"] == text
    test_set = tmp_path / "dataset" / "boolq" / "test.json"
    test_set.parent.mkdir(parents=True)
    test_set.write_text('[{"instruction": "a", "input": null, "output": null, "answer": false}]')
    assert tasks.test_examples("boolq", tmp_path)[0][1]["answer"] == "false"


@pytest.mark.parametrize("unused", [None, 7, "", [1], {"a": 1}, "\ud800"])
def test_a_field_that_is_not_used_is_not_looked_at(tmp_path, unused):
    (example,) = load(
        tmp_path,
        {"instruction": "a", "output": "b", "answer": unused, "prompt": unused, "id": unused},
    )
    assert (example["instruction"], example["output"]) == ("a", "b")
    needed = "instruction", "answer"
    (example,) = load(tmp_path, {"instruction": "a", "output": unused, "answer": 7}, needed=needed)
    assert (example["instruction"], example["answer"]) == ("a", "7")


@pytest.mark.parametrize(
    "others", [{"prompt": "c"}, {"instruction": "c", "output": None, "prompt": None}]
)
def test_the_pair_that_is_complete_is_read(tmp_path, others):
    (example,) = load(tmp_path, others | {"question": "a", "answer": "b"})
    assert (example["instruction"], example["output"]) == ("a", "b")


def test_examples_with_an_empty_field_are_counted_or_left_out(tmp_path):
    records = [
        {"instruction": str(i), "output": None if i % 10 == 3 else "" if i % 10 == 5 else "b"}
        for i in range(50)
    ]
    first = (
        "the field 'output' is empty in 10 records, the first is record 3: delete them, or "
        "leave them out with --skip"
    )
    with pytest.raises(ValueError, match=first):
        load(tmp_path, *records)
    left = [str(i) for i in range(50) if i % 10 not in (3, 5)]
    assert [example["instruction"] for example in load(tmp_path, *records, skip_empty=True)] == left
    placed = tasks.train_examples("my own", "", tmp_path / "data", skip_empty=True)
    assert [place for place, _ in placed] == [f"record {i}" for i in left]
    with pytest.raises(
        ValueError, match="the field 'prompt' or 'completion' is empty in 2 records"
    ):
        load(tmp_path, {"prompt": "", "completion": "b"}, {"prompt": "a", "completion": ""})
    with pytest.raises(ValueError, match="must hold at least one example without an empty field"):
        load(tmp_path, {"prompt": "a", "completion": ""}, skip_empty=True)


def test_a_test_set_leaves_out_empty_examples_and_names_the_place_of_a_wrong_answer(tmp_path):
    test_set = tmp_path / "dataset" / "gsm8k" / "test.json"
    test_set.parent.mkdir(parents=True)
    lines = [
        json.dumps({"instruction": "a", "output": "", "answer": answer})
        for answer in (0, "", 2.5, "two")
    ]
    test_set.write_text("\n".join(lines[:3]))
    with pytest.raises(
        ValueError,
        match="test.json: the field 'answer' is empty in line 2: delete it, or leave it out",
    ):
        tasks.test_examples("gsm8k", tmp_path)
    examples = tasks.test_examples("gsm8k", tmp_path, skip_empty=True)
    assert [example["answer"] for _, example in examples] == ["0", "2.5"]
    test_set.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="test.json, line 4: the answer 'two' is not a number of gsm8k"
    ):
        tasks.test_examples("gsm8k", tmp_path, skip_empty=True)


@pytest.mark.parametrize("count", [1, 2])
def test_objects_over_several_lines_are_said_to_be_that(tmp_path, count):
    (tmp_path / "data").write_text(
        "\n".join(json.dumps(record, indent=1) for record in PLAIN[:count])
    )
    with pytest.raises(
        ValueError, match=r"holds a JSON object over several lines: put it in \[ \], with a comma"
    ):
        tasks.load_examples(tmp_path / "data")


def test_a_task_is_its_test_sets_or_one_of_them(tmp_path):
    assert len(tasks.test_sets("arithmetic")) == 7 and len(tasks.test_sets("commonsense")) == 8
    assert tasks.test_sets("gsm8k") == ["gsm8k"] and tasks.test_examples("gsm8k", tmp_path) is None
    with pytest.raises(ValueError, match="unknown task 'algebra'"):
        tasks.test_sets("algebra")


def test_the_files_of_a_task_lie_as_in_llm_adapters_and_a_persons_own_beside_them_or_anywhere(
    tmp_path,
):
    absent = rf"math_10k.json is absent. To get it: python data.download.py all --dir {tmp_path}$"
    with pytest.raises(UserError, match=absent):
        tasks.train_examples("arithmetic", tmp_path)
    with pytest.raises(ValueError, match="--train-file"):
        tasks.train_examples("gsm8k", tmp_path)
    math, more = (tmp_path / "ft-training_set" / name for name in ("math_10k.json", "more.json"))
    test_set = tmp_path / "dataset" / "gsm8k" / "test.json"
    for file, field, value in (
        (math, "output", "b"),
        (more, "output", "d"),
        (test_set, "answer", "1"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{"instruction": "a", field: value}]))
    arithmetic = [("record 0", {"instruction": "a", "output": "b"})]
    assert tasks.train_examples("arithmetic", tmp_path) == arithmetic
    assert tasks.train_examples("my own", tmp_path, math) == arithmetic
    ((_, example),) = tasks.train_examples("arithmetic", tmp_path, "more.json")
    assert example["output"] == "d"
    assert tasks.training_file("arithmetic", tmp_path, "more.json") == more
    assert tasks.training_file("toy", tmp_path) is None
    with pytest.raises(UserError, match="There, for --train-file: math_10k.json, more.json$"):
        tasks.train_examples("commonsense", tmp_path)
    assert len(tasks.test_examples("gsm8k", tmp_path)) == 1


# --- answers ---

ANSWERS = [
    ("gsm8k", "So 3 + 4 = 7. The answer is 7.", "7.0", True),
    ("gsm8k", "The answer is 1,234.", "1234", True),
    ("gsm8k", "It costs $12.50", "12.5", True),
    ("gsm8k", "The answer is -3", "-3.0", True),
    ("gsm8k", "7, or rather 8", "7", False),
    ("gsm8k", "seven", "7", False),
    ("gsm8k", "", "0", False),
    ("gsm8k", "0.3333", "0.33333", True),
    ("gsm8k", "0.33", "0.3333", False),
    ("SVAMP", "about .5", "0.5", True),
    ("mawps", "9", "1,000", False),
    ("AQuA", "Because A train is Fast, the answer is (C).", "C", True),
    ("AQuA", "Adding Both gives D", "D", True),
    ("AQuA", "A train leaves", "A", False),
    ("AQuA", "(B)", "B", True),
    ("AQuA", "The answer is A because E is wrong", "A", True),
    ("AQuA", "CABBAGE", "E", False),
    ("boolq", "the correct answer is true", "true", True),
    ("boolq", "the correct answer is false, not true", "true", False),
    ("piqa", "solution2", "solution2", True),
    ("ARC-Easy", "the correct answer is answer3", "answer3", True),
    ("social_i_qa", "answer1 or answer2", "answer2", False),
    ("hellaswag", "ending4", "ending4", True),
    ("winogrande", "option3", "option3", False),
    ("openbookqa", "I do not know", "answer1", False),
]


@pytest.mark.parametrize("name, response, answer, right", ANSWERS)
def test_scoring(name, response, answer, right):
    assert tasks.is_correct(name, response, answer) is right
