"""Statements about tokens: what a tokenizer of a checkpoint makes of a text, of a prompt and its response."""

import io
import json
import sys

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data import tasks
from data.tokenizer import load_tokenizer

TEXTS = ["", " ", "  two", "tail ", "a\nb\n\nc", "tab\there", "0123456789", "naïve café", "日本語", "🙂👍🏽", "▁", "ﬁ"]
TEXTS += ["<s>", "</s>", "<unk>", "<0x0A>", "\x00\x07", "\u00a0\u200b", "Anna has 7 shells.", "a" * 300]


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def write_sentencepiece(directory, **options):
    """A tokenizer.model of twelve tokens; returns its bytes."""
    model, sentences = io.BytesIO(), iter(["a b c d e f"] * 9)
    options |= {"vocab_size": 12, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return model.getvalue()


def write_json_tokenizer(directory, bos=False):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": level.alphabet(), "special_tokens": ["<bos>", "<eos>"], "show_progress": False}
    tokenizer.train_from_iterator(["the answer is seven"], tokenizers.trainers.BpeTrainer(**options))
    if bos:
        template = tokenizers.processors.TemplateProcessing
        tokenizer.post_processor = template(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return load_tokenizer(directory)


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
    model = write_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path).bos_id == 1
    assert load_tokenizer(tmp_path).encode("a b") == SentencePieceProcessor(model_proto=model).encode("a b")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).bos_id is None


def test_tokenizer_json(tmp_path):
    tokenizer = write_json_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    for text in TEXTS + ["<eos>", "<bos> <eos>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text and not {0, 1} & set(tokenizer.encode(text))
    assert write_json_tokenizer(tmp_path, bos=True).bos_id == 0


def test_a_sentencepiece_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    write_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(ValueError, match="-1 is no end-of-sequence token: .* tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", ["absent", {"text": "<eos>"}, 7])
def test_a_tokenizer_json_without_an_end_of_sequence_is_refused(tmp_path, eos):
    write_json_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "eos_token_id": "1"}))
    with pytest.raises(ValueError, match="end-of-sequence token"):
        load_tokenizer(tmp_path)


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
