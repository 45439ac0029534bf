"""Statements about tokens: what the tokenizer of a checkpoint makes of a text, and of a prompt with
its response."""

import io
import itertools
import json
import re
import shutil
import sys

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data import tasks
from data.errors import UserError
from data.tokenizer import load_tokenizer

TEXTS = [
    "",
    " ",
    "  two",
    "tail ",
    "a\nb\n\nc",
    "tab\there",
    "0123456789",
    "naïve café",
    "日本語",
    "🙂👍🏽",
    "▁",
    "ﬁ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\x00\x07",
    "\u00a0\u200b",
    "Anna has 7 shells.",
    "a" * 300,
]


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def write_sentencepiece(directory, **options):
    """Write a tokenizer.model, of twelve tokens if the options do not say otherwise. Returns its
    bytes."""
    model = io.BytesIO()
    options = {"vocab_size": 12, "sentence_iterator": iter(["a b c d e f"] * 9)} | options
    sentencepiece.SentencePieceTrainer.train(
        model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return model.getvalue()


def write_json_tokenizer(directory, template=None):
    """Write a byte-level tokenizer.json and its tokenizer_config.json. Returns the tokenizer that
    is read from them. `template`: what the post-processor makes of a text, such as "<bos> $A"."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, level = (
        tokenizers.Tokenizer(tokenizers.models.BPE()),
        tokenizers.pre_tokenizers.ByteLevel,
    )
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = {
        "initial_alphabet": level.alphabet(),
        "special_tokens": ["<bos>", "<eos>"],
        "show_progress": False,
    }
    tokenizer.train_from_iterator(
        ["the answer is seven"], tokenizers.trainers.BpeTrainer(**options)
    )
    if template:
        tokens = [("<bos>", 0), ("<eos>", 1)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=tokens
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<eos>"}})
    )
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
    assert prompt == Merging().encode(tasks.prompt_text({"instruction": "a"})) and response == [
        10,
        98,
        0,
    ]


def test_sentencepiece_encodes_and_decodes_every_text(tiny):
    for text in TEXTS:
        ids = tiny.encode(text)
        assert not {0, 1, 2} & set(ids), text  # no user can write a control token
        if "▁" not in text:
            # encode puts a space before a text that has none; decode takes the first one away
            assert tiny.decode(ids) == text.removeprefix(" ")
    assert tiny.decode([1, *tiny.encode("seven"), 2]) == "seven"
    assert tiny.decode([*tiny.encode("seven"), 1024, 31999]) == "seven"
    assert tiny.encode("12") == tiny.encode("1") + tiny.encode("2")[-1:]  # each digit is a token


def test_a_checkpoint_says_whether_sequences_begin_with_bos(tmp_path):
    model = write_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path).bos_id == 1
    assert load_tokenizer(tmp_path).encode("a b") == SentencePieceProcessor(
        model_proto=model
    ).encode("a b")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).bos_id is None


def test_tokenizer_json(tmp_path):
    tokenizer = write_json_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    for text in TEXTS + ["<eos>", "<bos> <eos>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text and not {0, 1} & set(
            tokenizer.encode(text)
        )
    assert write_json_tokenizer(tmp_path, "<bos> $A").bos_id == 0


def test_a_sentencepiece_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    write_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(
        ValueError, match="-1 is no end-of-sequence token: .* tokenizer_config.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", ["absent", {"text": "<eos>"}, 7])
def test_a_tokenizer_json_without_an_end_of_sequence_is_refused(tmp_path, eos):
    write_json_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": eos, "eos_token_id": "1"})
    )
    with pytest.raises(ValueError, match="end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def describe(directory, **files):
    """Write JSON files beside a tokenizer: config={...} becomes config.json."""
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))


CHATML = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"10": {"content": "<|im_end|>"}}}
NAMED_BY = {
    "a string": {"tokenizer_config": CHATML},
    "an object": {
        "tokenizer_config": CHATML | {"eos_token": {"content": "<|im_end|>", "special": False}}
    },
    "a map": {
        "special_tokens_map": {"eos_token": "<|im_end|>"},
        "added_tokens": {"<|im_end|>": 10},
    },
}


@pytest.mark.parametrize("name", NAMED_BY)
@pytest.mark.parametrize("eos_id", [2, -1])
def test_the_end_of_sequence_is_the_token_that_the_config_names(tmp_path, name, eos_id):
    size = len(SentencePieceProcessor(model_proto=write_sentencepiece(tmp_path, eos_id=eos_id)))
    describe(tmp_path, **json.loads(json.dumps(NAMED_BY[name]).replace("10", str(size))))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, size, size + 1)
    ids = tokenizer.encode("a<|im_end|>")
    assert size not in ids and tokenizer.decode([*ids, size]) == tokenizer.decode(ids)


def test_the_end_of_sequence_is_the_model_s_own_or_the_one_in_config_json(tmp_path):
    write_sentencepiece(tmp_path)
    describe(tmp_path, config={"eos_token_id": [5, 6]}, special_tokens_map={"eos_token": ""})
    assert load_tokenizer(tmp_path).eos_id == 2
    write_sentencepiece(tmp_path, eos_id=-1)
    assert load_tokenizer(tmp_path).eos_id == 5


def test_an_added_token_is_recognised_unless_it_is_special(tmp_path):
    size = len(
        SentencePieceProcessor(
            model_proto=write_sentencepiece(tmp_path, remove_extra_whitespaces=False)
        )
    )
    listed = [
        {"content": "<think>"},
        {"content": "<thinking>", "lstrip": True},
        {"content": "<tool>", "special": True},
    ]
    listed = {size + i: token for i, token in enumerate(listed)}
    describe(tmp_path, tokenizer_config={"added_tokens_decoder": listed})
    tokenizer = load_tokenizer(tmp_path)
    a = tokenizer.encode("a")
    # No class is stated: a space is put before the text after a token, too, as in transformers
    assert tokenizer.encode("a<think> a") == [*a, size, a[0], *a]
    assert tokenizer.encode("a  <thinking>") == [*a, size + 1] and size + 2 not in tokenizer.encode(
        "<tool>"
    )
    assert tokenizer.decode([*a, size, *a, size + 2, size + 3]) == "a<think> a"


def test_a_word_after_a_space_keeps_its_mark_whatever_the_trainers_options(tmp_path):
    """SentencePiece's trainer removes extra spaces by default, the one before a text too."""
    write_sentencepiece(tmp_path)
    model = SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" a") == tokenizer.encode("a") == model.encode("a")
    describe(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" a") == tokenizer.encode("a") == model.encode("a")
    assert tokenizer.decode(tokenizer.encode("a  b")) == "a  b"  # it removes nothing


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_token_that_is_a_single_word_is_found_only_as_one(tmp_path, file):
    if file == "tokenizer.model":
        write_sentencepiece(tmp_path)
    else:
        write_json_tokenizer(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    listed = {str(size): {"content": "bc", "single_word": True}}
    ends = {} if file == "tokenizer.model" else {"eos_token": "<eos>"}
    describe(tmp_path, tokenizer_config={"added_tokens_decoder": listed} | ends)
    encode = load_tokenizer(tmp_path).encode
    assert size in encode("bc") and size in encode("a bc, d") and size in encode("(bc)")
    assert size not in encode("abc") and size not in encode("bcd") and size not in encode("bc1 _bc")


@pytest.mark.parametrize("mark", ["\u0301", "\u200d", "\u203f", "\u0940", "2", "_"])
def test_marks_and_joiners_belong_to_a_word(tmp_path, mark):
    """As the package tokenizers has it; Python's \\w leaves them out."""
    write_sentencepiece(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    listed = {str(size): {"content": "<x>", "single_word": True}}
    describe(tmp_path, tokenizer_config={"added_tokens_decoder": listed})
    encode = load_tokenizer(tmp_path).encode
    assert size not in encode(f"a{mark}<x>") and size not in encode(f"<x>{mark}")
    assert size in encode(f"a{mark} <x> {mark}")


def test_a_llama_tokenizer_finds_user_defined_pieces_as_added_tokens(tmp_path):
    write_sentencepiece(tmp_path, user_defined_symbols="<u>", vocab_size=16, model_type="bpe")
    piece = SentencePieceProcessor(str(tmp_path / "tokenizer.model")).piece_to_id("<u>")
    describe(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": False})
    tokenizer = load_tokenizer(tmp_path)
    a = tokenizer.encode("a")
    assert tokenizer.encode("<u> a") == [piece, *a]  # no space is put before it
    assert tokenizer.decode([*a, piece]) == "a<u>"


@pytest.mark.parametrize("model_type, says", [("unigram", True), ("bpe", False)])
def test_where_transformers_takes_a_model_for_another_kind_a_line_says_so(
    tmp_path, capsys, model_type, says
):
    write_sentencepiece(tmp_path, model_type=model_type)
    describe(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    load_tokenizer(tmp_path)
    assert ("is a unigram model" in capsys.readouterr().err) == says


def test_without_the_package_a_line_says_where_a_space_is_put_otherwise(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    raw = {"added_tokens": [{"id": 1, "content": "<s>"}], "post_processor": {"single": single}}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}
    for puts_space, steps, says in (
        (True, {"normalizer": prepend, "pre_tokenizer": None}, False),
        (False, {"normalizer": prepend, "pre_tokenizer": None}, True),
        (True, {"normalizer": None, "pre_tokenizer": metaspace}, True),
        (False, {"normalizer": None, "pre_tokenizer": metaspace}, False),
        # it puts no space after an added token, and no second one
        (
            True,
            {"normalizer": None, "pre_tokenizer": metaspace | {"prepend_scheme": "first"}},
            True,
        ),
    ):
        write_sentencepiece(tmp_path, add_dummy_prefix=puts_space)
        describe(tmp_path, tokenizer=raw | steps, tokenizer_config={"tokenizer_class": "Other"})
        load_tokenizer(tmp_path)
        assert ("which may give other ids" in capsys.readouterr().err) == says, steps


def test_a_tokenizer_json_of_a_newer_format_asks_for_a_newer_package(tmp_path):
    write_json_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace('"type": "BPE"', '"type": "Newer"'))
    with pytest.raises(UserError, match="a newer one may read it, pip install -U tokenizers"):
        load_tokenizer(tmp_path)
    file.write_text(whole[:-9])
    with pytest.raises(UserError, match="is not a JSON object .*: fix or download it"):
        load_tokenizer(tmp_path)


def test_a_user_s_text_never_ends_a_sequence_though_sentencepiece_has_a_piece_for_it(tmp_path):
    write_sentencepiece(tmp_path, user_defined_symbols="<|im_end|>,<u>", vocab_size=16)
    describe(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 3 not in tokenizer.encode("a<|im_end|>") and 4 in tokenizer.encode(
        "a<u>"
    )


@pytest.mark.parametrize("named", [{}, {"bos_token": "<s>"}, {"bos_token": None}])
def test_a_sentencepiece_model_without_a_begin_of_sequence_has_none(tmp_path, named):
    write_sentencepiece(tmp_path, bos_id=-1)
    describe(tmp_path, tokenizer_config=named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tasks.encode_prompt({"instruction": "a b"}, tokenizer)[0] >= 0


TEMPLATES = {
    "$A <eos>": (None, 1),
    "<bos> $A <eos>": (0, 1),
    "<bos> $A": (0, 1),
    "$A <bos>": (None, 0),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_post_processor_puts_before_a_text_begins_it(tmp_path, template):
    write_json_tokenizer(tmp_path, template)
    describe(tmp_path, tokenizer_config={}, config={"eos_token_id": 1})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == TEMPLATES[template]


@pytest.mark.parametrize("named", [True, False])
def test_the_end_of_sequence_is_special_whatever_the_files_say(tmp_path, named):
    write_json_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    listed = {str(token["id"]): token for token in content["added_tokens"]}
    describe(tmp_path, tokenizer=content, config={"eos_token_id": 1})
    describe(
        tmp_path,
        tokenizer_config={"eos_token": "<eos>", "added_tokens_decoder": listed} if named else {},
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<eos>")
    assert tokenizer.eos_id == 1 not in ids and tokenizer.decode([*ids, 1]) == "<eos>"
    assert tokenizer.encode("<bos>") == [0] and tokenizer.decode([0]) == "<bos>"


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_only_tokens_that_a_text_can_produce_need_a_row_in_the_model(tmp_path, file):
    if file == "tokenizer.model":
        rows, eos = len(SentencePieceProcessor(model_proto=write_sentencepiece(tmp_path))), "</s>"
    else:
        rows, eos = write_json_tokenizer(tmp_path).vocab_size, "<eos>"
    listed = {"eos_token": eos, "added_tokens_decoder": {rows: {"content": "<pad>"}}}
    describe(
        tmp_path, config={"vocab_size": rows}, tokenizer_config=listed | {"pad_token": "<pad>"}
    )
    assert load_tokenizer(tmp_path).encode("<pad>")[-1] < rows
    describe(tmp_path, tokenizer_config=listed)
    with pytest.raises(ValueError, match=f"has {rows + 1} tokens, the model only {rows}: download"):
        load_tokenizer(tmp_path)
    describe(tmp_path, tokenizer_config=listed | {"eos_token": "<pad>"})
    with pytest.raises(
        ValueError,
        match=f"{rows} is no end-of-sequence token: it is named '<pad>'.*: fix tokenizer_c",
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_counts_beside_a_tokenizer_model(tmp_path):
    ids = write_json_tokenizer(tmp_path).encode("the answer")
    (tmp_path / "tokenizer.model").write_bytes(
        b"IQ== 0\nIg== 1\n"
    )  # as LLaMA 3's, tiktoken's format
    assert load_tokenizer(tmp_path).encode("the answer") == ids


def test_without_the_package_tokenizers_the_tokenizer_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_sentencepiece(tmp_path)
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    alike = {"added_tokens": [{"id": 1, "content": "<s>"}], "post_processor": {"single": single}}
    describe(tmp_path, tokenizer=alike)
    assert load_tokenizer(tmp_path).eos_id == 2 and capsys.readouterr().err == ""
    for changed in (
        {"added_tokens": [{"id": 10, "content": "<think>"}]},
        {"post_processor": None},
        {"added_tokens": 3},
    ):
        describe(tmp_path, tokenizer=alike | changed)
        assert load_tokenizer(tmp_path).eos_id == 2
        assert re.fullmatch(
            r".*pip install tokenizers; .*tokenizer.model is read .*\n", capsys.readouterr().err
        )
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "listed", [[], {"a": {"content": "<a>"}}, {"3": {}}, {"3": "<a>"}, {"3": {"content": []}}]
)
def test_a_broken_list_of_added_tokens_is_named(tmp_path, listed):
    write_sentencepiece(tmp_path)
    describe(tmp_path, tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(ValueError, match="list of added tokens is broken .*: download it again"):
        load_tokenizer(tmp_path)


AWKWARD = [
    "a<think>b",
    " <think> c",
    "<think>",
    "<think><think>  two",
    "a <|im_end|>b<think>",
    "</s>a<s> b<think>\n",
]
AWKWARD += [
    *TEXTS[:13],
    "<|im_end|>",
    "<pad>x",
    "▁<think>▁ y",
    "<unk> <0x0A>",
    "</s>",
    "🙂<think>🙂",
    "<|im_start|>user",
]
STYLES = {
    "llama": ({}, {"tokenizer_class": "LlamaTokenizer"}),
    "legacy": ({"model_type": "llama"}, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "unprefixed": (
        {"model_type": "llama"},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    ),
    "mistral": ({"model_type": "mistral"}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
}
ENDS = ["its own", "added", "added.json", "map", "unlisted"]
ADDED = ["<|im_end|>", "<think>", "<|im_start|>", "<pad>"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two directories, each with the same tokenizer as a tokenizer.model and a tokenizer.json. The
    tokenizer in models[True] has a begin-of-sequence token, the one in models[False] has none."""
    tokenizers, directories = pytest.importorskip("tokenizers"), {}
    for bos in (True, False):
        directory = directories[bos] = tmp_path_factory.mktemp("model")
        options = {} if bos else {"bos_id": -1}
        options |= {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
        }
        options |= {"remove_extra_whitespaces": False, "vocab_size": 320}
        options["sentence_iterator"] = iter(
            ["the answer is seven  and two", "a tail of three", "12 is a number"] * 9
        )
        pieces = SentencePieceProcessor(model_proto=write_sentencepiece(directory, **options))
        vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
        merges = [
            (a, b)
            for t in vocab
            for a, b in ((t[:i], t[i:]) for i in range(1, len(t)))
            if {a, b} <= {*vocab}
        ]
        merges.sort(key=lambda pair: vocab[pair[0] + pair[1]])
        parts = tokenizers.models.BPE(
            vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
        json_tokenizer = tokenizers.Tokenizer(parts)
        normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
        json_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        parts = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        json_tokenizer.decoder = decoders.Sequence(parts)
        json_tokenizer.add_special_tokens([t for t in ("<unk>", "<s>", "</s>") if t in vocab])
        json_tokenizer.save(str(directory / "tokenizer.json"))
    return directories


def write_directory(directory, models, files, style, bos, end, special):
    """Write a checkpoint's directory as it may lie on the Hub. `style`: a key of STYLES. `bos`:
    whether a sequence begins with <s> ("yes", "no"), or there is no such token ("none"). `end`:
    where the end-of-sequence token is named. `special`: whether the added tokens are called
    special."""
    import tokenizers

    source = models[bos != "none"]
    rows, (config, settings) = (
        len(SentencePieceProcessor(str(source / "tokenizer.model"))),
        STYLES[style],
    )
    added = {token: rows + i for i, token in enumerate(ADDED)}
    if end == "unlisted":
        added = {"<think>": rows}
    flags = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": special,
    }
    settings = settings | {
        "bos_token": None if bos == "none" else "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    settings |= {"add_bos_token": bos == "yes"}
    if end in ("added", "appended"):
        settings |= {
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}
            if special
            else "<|im_end|>"
        }
    if end in ("its own", "added", "appended"):
        settings["added_tokens_decoder"] = {
            i: {"content": token} | flags for token, i in added.items()
        }
        # Beside added_tokens_decoder this file does not count
        (directory / "special_tokens_map.json").write_text('{"eos_token": "<unk>"}')
    else:
        (directory / "added_tokens.json").write_text(json.dumps(added))
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if files != "tokenizer.json":
        shutil.copy(source / "tokenizer.model", directory)
    if files != "tokenizer.model":
        serialized = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
        serialized.add_tokens(
            [tokenizers.AddedToken(token, normalized=False, special=special) for token in added]
        )
        single = "<s> $A" if bos == "yes" else "$A"
        single, used = (
            (single + " <|im_end|>", ["<|im_end|>"]) if end == "appended" else (single, [])
        )
        used += ["<s>"] if bos == "yes" else []
        template = tokenizers.processors.TemplateProcessing
        used = [(token, serialized.token_to_id(token)) for token in used]
        serialized.post_processor = template(single=single, special_tokens=used)
        serialized.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": rows + 8}))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("files", ["tokenizer.model", "tokenizer.json", "both"])
def test_begin_end_ids_and_texts_are_those_of_transformers(tmp_path, models, files, style):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    ends = ENDS if files == "tokenizer.model" else [*ENDS, "appended"]
    for case in itertools.product(["yes", "no", "none"], ends, [True, False]):
        directory = tmp_path / "-".join(map(str, case))
        directory.mkdir()
        write_directory(directory, models, files, style, *case)
        ours, theirs = (
            load_tokenizer(directory),
            transformers.AutoTokenizer.from_pretrained(directory),
        )
        assert ours.eos_id == theirs.eos_token_id, case
        before = theirs.encode("a")[: -1 if case[1] == "appended" else None]
        before = before[: len(before) - len(theirs.encode("a", add_special_tokens=False))]
        assert [ours.bos_id] * (ours.bos_id is not None) == before, case
        for text in AWKWARD:
            ids = ours.encode(text)
            assert ids == theirs.encode(
                text, add_special_tokens=False, split_special_tokens=True
            ), (case, text)
            assert not {ours.bos_id, ours.eos_id} & set(ids)
            ids = [*before, *ids, ours.eos_id, *ours.encode(" b")]
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (case, text)
