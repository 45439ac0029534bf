"""Statements about examples: prompts, tokens, files, answers."""

import io
import json
import random
import sys

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data import tasks, toy
from data.tokenizer import load_tokenizer

# --- toy ---


def test_toy_problems_are_right_and_train_and_test_share_no_numbers(monkeypatch):
    keys, problem = {}, toy.problem

    def recording(rng):
        key, setup, question, *rest = problem(rng)
        keys[f"{setup} {question}"] = key
        return key, setup, question, *rest

    monkeypatch.setattr(toy, "problem", recording)
    splits = {(split, seed): toy.examples(split, 800, seed) for split in ("train", "test") for seed in (0, 1)}
    for examples in splits.values():
        assert len({example["instruction"] for example in examples}) == 800
        for example in examples:
            for equation in example["output"].split(". ")[:-1]:
                left, right = equation.split(" = ")
                a, sign, b = left.split()
                expected = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b), "/": int(a) / int(b)}[sign]
                assert int(right) == expected >= 0
            assert example["output"].endswith(f" = {example['answer']}. The answer is {example['answer']}.")
            assert tasks.is_correct("toy", example["output"], example["answer"])
    of_split = {split: {keys[example["instruction"]] for (name, _), examples in splits.items() if name == split
                        for example in examples} for split in ("train", "test")}
    assert not of_split["train"] & of_split["test"] and len(of_split["test"]) > 200
    rng = random.Random(0)
    assert 0.05 < sum(toy.split_of(toy.problem(rng)[0]) == "test" for _ in range(20000)) / 20000 < 0.15


def test_toy_problems_depend_on_the_seed_alone():
    assert toy.examples("train", 20) == toy.examples("train", 20) != toy.examples("train", 20, seed=1)


# --- prompts and tokens ---


def test_the_prompt_is_that_of_llm_adapters():
    assert tasks.prompt_text({"instruction": "Add {1} and 2.", "output": "3", "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:\n")
    assert tasks.prompt_text({"instruction": "Add.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def test_an_example_is_bos_prompt_response_eos(tiny):
    example = {"instruction": "Anna has 7 shells.", "output": "7 + 5 = 12. The answer is 12."}
    prompt, response = tasks.encode_example(example, tiny)
    assert prompt[0] == 1 and response[-1] == 2 and 1 not in response and 2 not in prompt
    assert prompt == tasks.encode_prompt(example, tiny)
    assert tiny.decode(prompt + response) == tasks.prompt_text(example) + example["output"]
    assert tiny.decode(response) == example["output"]
    assert response[0] == tiny.encode("7")[-1]  # no space before the response


def test_a_token_across_the_boundary_never_changes_the_prompt():
    class Merging:
        """Two newlines are one token, as in many byte-level vocabularies."""
        bos_id, eos_id = None, 0

        def encode(self, text):
            return [ord(c) for c in text.replace("\n\n", "\r")]

    prompt, response = tasks.encode_example({"instruction": "a", "output": "\nb"}, Merging())
    assert prompt == Merging().encode(tasks.prompt_text({"instruction": "a"})) and response == [10, 98, 0]


TEXTS = ["", " ", "  two", "tail ", "a\nb\n\nc", "tab\there", "0123456789", "naïve café", "日本語", "🙂👍🏽", "<s>", "</s>", "<unk>",
         "<0x0A>", "\x00\x07", "▁", "Anna has 7 shells.", "a" * 300, "ﬁ", "\u00a0\u200b"]


def test_sentencepiece_encodes_and_decodes_every_text(tiny):
    for text in TEXTS:
        ids = tiny.encode(text)
        assert not {0, 1, 2} & set(ids), text  # never a control token, whatever a user writes
        if "▁" not in text:
            assert tiny.decode(ids) == text.removeprefix(" ")  # a first space is the one that would be put there
    assert tiny.decode([1, *tiny.encode("seven"), 2]) == "seven"
    assert tiny.decode([*tiny.encode("seven"), 1024, 31999]) == "seven"
    assert tiny.encode("12") == tiny.encode("1") + tiny.encode("2")[-1:]  # each digit is a token


def test_a_checkpoint_says_whether_sequences_begin_with_bos(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e f"] * 9), model_writer=model, vocab_size=12,
                                             hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert load_tokenizer(tmp_path).bos_id == 1
    assert load_tokenizer(tmp_path).encode("a b") == SentencePieceProcessor(model_proto=model.getvalue()).encode("a b")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).bos_id is None


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e f"] * 9), model_writer=model, vocab_size=12,
                                             hard_vocab_limit=False, minloglevel=2, eos_id=-1)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="-1 is no end-of-sequence token: mend tokenizer_config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for eos in ("absent", {"text": "<eos>"}, 7):
        write_json_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "eos_token_id": "1"}))
        with pytest.raises(ValueError, match="end-of-sequence token"):
            load_tokenizer(tmp_path)


def write_json_tokenizer(directory, bos=False):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             special_tokens=["<bos>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(["the answer is seven"], trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return load_tokenizer(directory)


def test_tokenizer_json(tmp_path):
    tokenizer = write_json_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    for text in TEXTS + ["<eos>", "<bos> <eos>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text and not {0, 1} & set(tokenizer.encode(text))
    assert write_json_tokenizer(tmp_path, bos=True).bos_id == 0


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


# --- files ---


PLAIN = [{"instruction": "Add 1 and 2.", "output": "3"}, {"instruction": "Name it.", "input": "\u2028 a\nb", "output": "é"}]


@pytest.mark.parametrize("fields", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")])
@pytest.mark.parametrize("lines", [False, True])
def test_a_persons_own_examples(tmp_path, fields, lines):
    names = dict(zip(("instruction", "output"), fields))
    records = [{names.get(key, key): value for key, value in record.items()} for record in PLAIN]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n" if lines else json.dumps(records, indent=1)
    (tmp_path / "data").write_bytes(("\ufeff" + text).encode())
    examples = tasks.load_examples(tmp_path / "data")
    assert [{key: example[key] for key in plain} for plain, example in zip(PLAIN, examples, strict=True)] == PLAIN
    assert tasks.prompt_text(examples[1]) == tasks.prompt_text(PLAIN[1])


def test_tasks_and_their_files(tmp_path):
    assert len(tasks.test_sets("arithmetic")) == 7 and len(tasks.test_sets("commonsense")) == 8
    assert tasks.test_sets("gsm8k") == ["gsm8k"] and tasks.test_examples("gsm8k", tmp_path) is None
    with pytest.raises(ValueError, match="unknown task 'algebra'"):
        tasks.test_sets("algebra")
    with pytest.raises(FileNotFoundError, match="math_10k.json is absent. To get it: python data.download.py all --dir"):
        tasks.train_examples("arithmetic", tmp_path)
    with pytest.raises(ValueError, match="--train-file"):
        tasks.train_examples("gsm8k", tmp_path)
    (tmp_path / "ft-training_set").mkdir()
    (tmp_path / "ft-training_set" / "math_10k.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert tasks.train_examples("arithmetic", tmp_path) == [{"instruction": "a", "output": "b"}]
    (tmp_path / "ft-training_set" / "more.json").write_text('[{"instruction": "c", "output": "d"}]')
    assert tasks.train_examples("arithmetic", tmp_path, "more.json")[0]["output"] == "d"
    assert tasks.train_examples("my own", tmp_path, tmp_path / "ft-training_set" / "math_10k.json")[0]["output"] == "b"
    (tmp_path / "dataset" / "gsm8k").mkdir(parents=True)
    (tmp_path / "dataset" / "gsm8k" / "test.json").write_text('[{"instruction": "a", "answer": "1"}]')
    assert len(tasks.test_examples("gsm8k", tmp_path)) == 1


# --- answers ---


@pytest.mark.parametrize("name, response, answer, right", [
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
])
def test_scoring(name, response, answer, right):
    assert tasks.is_correct(name, response, answer) is right


def test_the_answers_of_every_toy_problem_score():
    for example in toy.examples("test", 50):
        assert tasks.is_correct("toy", example["output"], example["answer"])
        assert not tasks.is_correct("toy", example["output"] + " 1000", example["answer"])
