"""A user's mistake, or a file that is not what it should be: one line that says where and what to do, and nothing is
left behind.

Each case breaks a good checkpoint, adapter or data file in one way and runs the scripts as a user runs them."""

import ast
import json
import os
import shutil
import struct
from functools import partial
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as eval_script
import rosa
import train as train_script
from data import tasks, toy
from extras import checkpoints, compare, figure1, forgetting, peft_methods
from extras import merge as merge_file
from extras.commands import one_line
from model import Llama, LlamaConfig

ROOT = Path(rosa.__file__).parent
CKPT, CONFIG, WEIGHTS = Path("ckpt"), Path("ckpt/config.json"), Path("ckpt/model.safetensors")
INDEX, TOKENIZER, SHARD = CKPT / "model.safetensors.index.json", CKPT / "tokenizer.model", CKPT / "b.safetensors"
ADAPTER, ADAPTER_CONFIG = Path("adapter/adapter_model.safetensors"), Path("adapter/adapter_config.json")
DATA = Path("data.json")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of 1,024 tokens and a context of 256, an adapter for it, twelve examples."""
    directory = tmp_path_factory.mktemp("good")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(directory / CKPT)
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory / TOKENIZER)
    rosa.save_adapter(rosa.attach(model, 4, 8), directory / "adapter")
    (directory / DATA).write_text(json.dumps(toy.examples("train", 12)))
    return directory


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A working directory with nothing but those."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 40)


TRAIN = "--ckpt ckpt --max-len 200 --val-size 2 --max-steps 1".split()
SCRIPTS = {
    "train": (train_script, [*TRAIN, "--rank", "4"]),
    "train, any method": (train_script, TRAIN),
    "eval": (eval_script, "--ckpt ckpt --max-new-tokens 2 --limit 2".split()),
    "compare": (compare, []),
    "figure1": (figure1, "fig1.png --ckpt ckpt".split()),
    "forgetting": (forgetting, "--ckpt ckpt".split()),
    "merge": (merge_file, "--ckpt ckpt --adapter adapter --out merged".split()),
}


def tree():
    """Every path here, where a link leads, and what a file holds."""
    return {p: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in Path().rglob("*")}


def refused(capsys, script, arguments, *words):
    """Run a script: it ends in one printable line with these words, exit status 2, and nothing has changed."""
    module, defaults = SCRIPTS[script]
    before = tree()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        module.run([*defaults, *map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.endswith("\n") and error[:-1].isprintable() and len(error) < 700, error
    name = script.split(",")[0]
    assert error.startswith(f"{name}.py: " if name in ("train", "eval") else f"{name}: "), error
    for word in words:
        assert word in error, error
    assert tree() == before


# --- ways to break a file, each to be called later ---


def later(function):
    return lambda *arguments, **options: partial(function, *arguments, **options)


each = later(lambda *breaks: [one() for one in breaks])
gone = later(lambda path: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink())
holds = later(lambda path, content: Path(path).write_bytes(content.encode() if isinstance(content, str) else content))
smaller = later(lambda: random_model(vocab_size=500).save_pretrained(CKPT))
loop = later(lambda path: (path.unlink(), path.symlink_to(path.name)))


@later
def says(path, **changes):
    """Change keys of a JSON object; ... takes a key out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in value.items() if value is not ...}))


@later
def tensors(path, changes):
    """Replace the first tensor of a safetensors file whose name ends so, or add one; ... takes it out."""
    with safe_open(path, "pt") as file:
        held, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    held |= {next((name for name in held if name.endswith(end)), end): value for end, value in changes.items()}
    save_file({name: value for name, value in held.items() if value is not ...}, path, about)


@later
def header(path, change):
    """A safetensors file with change(header) for its header, an object or bytes."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    text = change(json.loads(whole[8 : 8 + size]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def norm(**changes):
    """The header says this of the last norm."""
    return header(WEIGHTS, lambda h: h | {NORM: h[NORM] | changes})


def overlapping(header):
    names = [name for name in header if name.endswith("layernorm.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    return header


def metadata(text=None, **changes):
    """The adapter's safetensors metadata, under "rosa": another text, or with changes."""

    def change(header):
        changed = text or json.dumps(json.loads(header["__metadata__"]["rosa"]) | changes)
        return header | {"__metadata__": {"rosa": changed}}

    return header(ADAPTER, change)


@later
def shards(lm_head="b.safetensors", index=None):
    """The checkpoint in two files with an index. lm_head: where that says its weight is; index: what it is instead."""
    held = load_file(WEIGHTS)
    files = {name: SHARD.name if name == "lm_head.weight" else "a.safetensors" for name in held}
    for file in set(files.values()):
        save_file({name: value for name, value in held.items() if files[name] == file}, CKPT / file)
    WEIGHTS.unlink()
    INDEX.write_text(index or json.dumps({"weight_map": files | {"lm_head.weight": lm_head}}))


@later
def another_models(**changes):
    """The adapter is one for another model."""
    model = random_model(**{"vocab_size": 1024, "num_hidden_layers": 2} | changes)
    rosa.save_adapter(rosa.attach(model, 4, 8), "adapter")


def bare():
    """The adapter is as PEFT writes it: it has none of our metadata."""
    save_file(load_file(ADAPTER), ADAPTER)


# --- checkpoints ---

NO_OBJECTS = {"no JSON": "{", "an array": "[1]", "no UTF-8": b'{"\xff": 1}', "too deep": "[" * 10**5}
NOT_WHOLE, NOT_JSON = ("ckpt/model.safetensors", "download"), ("not a JSON", "download")
MISFIT, NORM = ("ckpt: the tensors do not fit", "Download"), "model.norm.weight"
HUNDREDS = {f"x{i}\x1b": torch.ones(1) for i in range(500)}
PICKLED = ("pickled weights (pytorch_model.bin), which can run code", "convert to model.safetensors")
OUTSIDE = (f"{INDEX} names a file outside", "download")
CHECKPOINTS = {  # name -> (what breaks the checkpoint, words of the line)
    "directory missing": (gone(CKPT), "no checkpoint 'ckpt'", "tiny, llama2-7b"),
    "a file": (each(gone(CKPT), holds(CKPT, "")), "no checkpoint 'ckpt'", "neither a directory"),
    "directory empty": (each(gone(CKPT), CKPT.mkdir), "'ckpt' has no config.json", "give that of"),
    "without config": (gone(CONFIG), "'ckpt' has no config.json", "give that of"),
    "without weights": (gone(WEIGHTS), "ckpt has no model.safetensors", "download"),
    "without tokenizer": (gone(TOKENIZER), "ckpt has no tokenizer.model", "download"),
    "tokenizer empty": (holds(TOKENIZER, ""), "ckpt/tokenizer.model is not a", "download"),
    "tokenizer too large": (smaller(), "ckpt: the tokenizer has 1024 tokens, the model only 500", "download"),
    **{f"config {how}": (holds(CONFIG, text), "ckpt/config.json", *NOT_JSON) for how, text in NO_OBJECTS.items()},
    "config a link to itself": (loop(CONFIG), "'ckpt' has no config.json"),
    "index a link to itself": (each(shards(), loop(INDEX)), "ckpt has no model.safetensors"),
    "weights a link to themselves": (loop(WEIGHTS), "ckpt has no model.safetensors"),
    "pickled weights": (lambda: WEIGHTS.rename(CKPT / "pytorch_model.bin"), *PICKLED),
    "header no JSON": (header(WEIGHTS, lambda h: b"{" * 200), *NOT_WHOLE),
    "header too deep": (header(WEIGHTS, lambda h: b'{"a":' * 5000), *NOT_WHOLE),
    "header length absurd": (holds(WEIGHTS, b"\xff" * 7 + b"\x7f" + bytes(10**4)), *NOT_WHOLE),
    "overlapping offsets": (header(WEIGHTS, overlapping), *NOT_WHOLE),
    "offsets beyond the end": (norm(data_offsets=[10**9, 10**9 + 128]), *NOT_WHOLE),
    "dtype unknown": (norm(dtype="F31"), *NOT_WHOLE),
    "wrong dtype": (tensors(WEIGHTS, {NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM} is stored as I8", *MISFIT),
    "shape": (tensors(WEIGHTS, {NORM: torch.ones(4, 8)}), f"{NORM} has shape [4, 8], config.json says [32]", *MISFIT),
    "tensor missing": (tensors(WEIGHTS, {NORM: ...}), f"missing {NORM}", *MISFIT),
    "tensor extra": (tensors(WEIGHTS, {"more": torch.ones(2)}), "unexpected more", *MISFIT),
    "hundreds of tensors": (tensors(WEIGHTS, HUNDREDS), "unexpected x101\\x1b; and 495 more", *MISFIT),
    "a tensor's name of a megabyte": (tensors(WEIGHTS, {"x" * 10**6: torch.ones(2)}), "unexpected xxx", "Download"),
    "index no JSON": (shards(index="{"), f"{INDEX} is not a JSON", "download"),
    "index too deep": (shards(index='{"weight_map":' * 10**5), f"{INDEX} is not a JSON", "download"),
    "index without a map": (shards(index='{"weight_map": [1]}'), f"{INDEX} has no weight_map", "download"),
    "shard absent": (shards("c.safetensors"), f"{INDEX} names c.safetensors, which is absent", "download"),
    "shard with a null byte": (shards("c\0"), f"{INDEX} names c\\x00, which is absent", "download"),
    "shard outside": (each(shards("../b.safetensors"), lambda: shutil.copy(SHARD, ".")), *OUTSIDE, "ckpt/../b."),
    "shard absolute": (shards("/etc/passwd"), *OUTSIDE, "/etc/passwd"),
    "shard the directory itself": (shards(".."), *OUTSIDE),
    "shard a link to itself": (each(shards(), loop(SHARD)), "b.safetensors, which is absent", "download"),
    "in two shards": (
        each(shards(), tensors(SHARD, {NORM: torch.ones(32)})),
        f"{NORM} is in ckpt/a.safetensors and in b.",
    ),
}


@pytest.mark.parametrize("script", ["train", "eval", "merge"])
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = CHECKPOINTS[what]
    breaking()
    refused(capsys, script, [], *words)


@pytest.mark.parametrize("script, path", [("eval", WEIGHTS), ("eval", ADAPTER), ("merge", ADAPTER)])
def test_a_file_cut_short_anywhere_or_too_long_is_refused(here, capsys, script, path):
    advice = "download it again" if path == WEIGHTS else "copy it again"
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]  # of the header
    lengths = 0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, len(whole) // 2, len(whole) - 1
    for content in [*(whole[:length] for length in lengths), whole + b"\0"]:
        path.write_bytes(content)
        refused(capsys, script, ["--adapter", "adapter"], f"{path} is not a whole safetensors file", advice)


@pytest.mark.parametrize("script, path", [("eval", WEIGHTS), ("eval", ADAPTER), ("merge", ADAPTER)])
def test_a_file_that_may_not_be_read_is_said_to_be_that(here, capsys, monkeypatch, script, path):
    def denied(file, *how):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *how)

    for module in (checkpoints, peft_methods):
        monkeypatch.setattr(module, "open", denied, raising=False)
    refused(capsys, script, ["--adapter", "adapter"], f"{path}: Permission denied")


@pytest.mark.parametrize("revision", ["../../../ckpt", "here", "a\0b", "", "..", "\ud800"])
def test_what_hugging_faces_cache_calls_main_lies_in_the_cache(here, capsys, revision):
    main = Path("no cache/models--some--model/refs/main")
    (main.parent.parent / "snapshots").mkdir(parents=True)
    main.parent.mkdir()
    main.write_bytes(revision.replace("here", str(CKPT.absolute())).encode(errors="surrogatepass"))
    refused(capsys, "eval", ["--ckpt", "some/model"], "does not hold some/model", "hf download some/model")


def test_a_shard_may_be_a_link_as_in_hugging_faces_cache(here):
    expected = Llama.from_pretrained(CKPT).state_dict()
    shards()()
    Path("blobs").mkdir()
    for file in CKPT.glob("*"):
        shutil.move(file, Path("blobs") / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    for name, value in checkpoints.load_model(CKPT).state_dict().items():
        assert torch.equal(value, expected[name])


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
OTHER_SIZES = ["num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"]
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2}
HUGE = dict.fromkeys(["vocab_size", "intermediate_size", "hidden_size"], 2**24)
NAN, INFINITE = float("nan"), float("inf")
CONFIGS = [  # changes, of which the last one's key the line names
    *({name: ...} for name in ("model_type", *SIZES)),
    *({name: x} for name in SIZES + OTHER_SIZES for x in (-8, 0, 2.5, 10**9, 10**30, "8", True, NAN)),
    {"num_hidden_layers": 1000},
    {"head_dim": 2**10, "num_key_value_heads": 2**20, "num_attention_heads": 2**20},
    {"num_attention_heads": 5},
    {"head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 2},
    {"head_dim": 7},
    *({"model_type": x} for x in ("gemma", ["llama"], None)),
    *({"architectures": x} for x in (["GemmaForCausalLM"], "x" * 10**6, 3, 2.5)),
    {"layer_types": 3},
    *({"rms_norm_eps": x} for x in (NAN, 10**400)),
    *({"rope_theta": x} for x in (-1, 10**400, INFINITE, 1e-300)),
    *({"rope_scaling": x} for x in ({"rope_type": "linear", "factor": NAN}, {"rope_type": ["linear"]}, [1])),
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}},
    {"attention_bias": "no"},
    {"tie_word_embeddings": "false"},
    HUGE | {"num_attention_heads": 2, "head_dim": 2**23, "config": 1},
    *({"eos_token_id": x} for x in ("</s>\x1b[2J\ud800", [[[2]]])),
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: f"{changes}"[:60])
def test_a_config_that_asks_for_what_cannot_be_is_refused_by_its_key(here, capsys, changes):
    says(CONFIG, **changes)()
    *_, key = changes
    word = {"head_dim": "head", "max_position_embeddings": "max_position", "num_hidden_layers": "layers"}
    refused(capsys, "eval", [], "ckpt", word.get(key, key.removeprefix("num_")))


def test_a_whole_number_beyond_64_bits_is_a_number(here):
    assert LlamaConfig(rope_theta=10**30, rms_norm_eps=10**30).rope_theta == 1e30
    says(CONFIG, rope_theta=10**30, rms_norm_eps=10**30)()
    assert checkpoints.load_model(CKPT)(torch.zeros(1, 2, dtype=torch.long)).isfinite().all()


# --- adapters ---

OTHER, COPY = "adapter was trained on another model: ", "copy"
Q_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
NO_ADAPTER = "adapter is no adapter directory"
SETTING = f"{ADAPTER_CONFIG}: "
LORAS = [({"r": r}, "rank must be") for r in (0, -4, 4.0, True)] + [({"r": r}, "needs") for r in (5, 10**30)]
LORAS += [({"lora_alpha": alpha}, "alpha must be") for alpha in (NAN, "8", 10**400)]
LORAS += [({"r": -4, "use_rslora": True}, "rank must be"), ({"use_dora": True}, "use_dora")]
LORAS += [({"rank_pattern": {"x" * 10**6: 3}}, "rank_pattern"), ({"init_lora_weights": "pissa"}, "init_lora_weights")]
ADAPTERS = {  # name -> (what breaks the adapter, words of the line)
    "missing": (gone("adapter"), NO_ADAPTER, "no adapter_config.json"),
    "a file": (each(gone("adapter"), holds("adapter", "")), NO_ADAPTER),
    "without tensors": (gone(ADAPTER), NO_ADAPTER, "no adapter_model.safetensors"),
    "pickled": (lambda: ADAPTER.rename("adapter/adapter_model.bin"), "adapter_model.bin, a pickle, which can run code"),
    "a checkpoint": (each(gone("adapter"), lambda: shutil.copytree(CKPT, "adapter")), NO_ADAPTER),
    "more layers": (another_models(num_hidden_layers=3), OTHER, "model.layers.2", "absent"),
    "fewer layers": (another_models(num_hidden_layers=1), OTHER, "model.layers.1", "absent"),
    "another size": (another_models(hidden_size=16), OTHER, "is [4, 16], this one needs [4, 32]"),
    "another rank": (says(ADAPTER_CONFIG, r=3), OTHER, "is [4, 32], this one needs [3, 32]"),
    "rank no number": (says(ADAPTER_CONFIG, r="4"), SETTING, "rank must be a whole number of at least 1, not '4'"),
    "tensor missing": (tensors(ADAPTER, {"lora_B.weight": ...}), OTHER, "is absent, this one needs"),
    "tensor extra": (tensors(ADAPTER, {"more": torch.ones(1)}), OTHER, "more is [1], this one needs absent"),
    "tensor of integers": (tensors(ADAPTER, {Q_B: torch.ones(32, 4, dtype=torch.int32)}), f"{Q_B} is"),
    **{f"config {how}": (holds(ADAPTER_CONFIG, text), "config.json", "not a JSON") for how, text in NO_OBJECTS.items()},
    "config without a rank": (says(ADAPTER_CONFIG, r=...), SETTING, "rank must be a whole number"),
    "config without a method": (says(ADAPTER_CONFIG, peft_type=...), SETTING, "the key 'peft_type'", COPY),
    "method no text": (says(ADAPTER_CONFIG, peft_type=["LORA"]), SETTING, "the key 'peft_type'", COPY),
    "method unknown": (says(ADAPTER_CONFIG, peft_type="LOAR"), "LOAR"),
    "metadata no JSON": (metadata("{"), f"metadata of {ADAPTER}", COPY),
    "metadata no object": (metadata("[4]"), f"of {ADAPTER}", COPY),
    "ratio 0": (metadata(low_freq_ratio=0), "low_freq_ratio must be in (0, 1], not 0"),
    "ratio NaN": (metadata(low_freq_ratio=NAN), "low_freq_ratio must be in (0, 1], not nan"),
    "ratio no number": (metadata(low_freq_ratio="0.5"), "low_freq_ratio must be in (0, 1], not '0.5'"),
    "pairs unknown": (metadata(pairs=["low"]), "pairs must be low, high or random, not ['low']"),
    "rows beyond the ratio": (tensors(ADAPTER, {Q_B: torch.ones(32, 4)}), f"{Q_B} is not zero outside"),
    **{f"PEFT's own, {x}"[:60]: (each(bare, says(ADAPTER_CONFIG, **x)), "adapter", word) for x, word in LORAS},
}


@pytest.mark.parametrize("script", ["eval", "merge"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = ADAPTERS[what]
    breaking()
    refused(capsys, script, ["--adapter", "adapter"], *words)


def test_an_adapters_metadata_decides_which_rows_adapt_and_nothing_else(here):
    metadata(rank=3, alpha=9, targets=["q", "z"], size=4)()
    settings = rosa.settings(peft_methods.load_adapter(checkpoints.load_model(CKPT), "adapter"))
    assert settings == {"rank": 4, "alpha": 8, "low_freq_ratio": 0.5, "targets": ["q", "k"], "pairs": "low"}


# --- data ---


def array(text):
    """JSON of one record, whose instruction this is."""
    return f'[{{"instruction": {text}, "output": "b", "answer": "1"}}]'


ONE, NONE, DEEP = array('"a"')[1:-1], "data.json must hold at least one example", '{"a":' * 10**5
FILES = {  # name -> (what the file holds, words of the line)
    "empty": ("", NONE),
    "an empty array": ("[]", NONE),
    "only spaces": (" \n ", NONE),
    "no JSON": ("[", "data.json: not JSON"),
    "no UTF-8": (b'["\xff"]', "data.json is not text in UTF-8: invalid start byte at byte 2"),
    "too deep": ("[" * 10**5, "data.json: not JSON"),
    "a line too deep": (f"{ONE}\n{DEEP}", "data.json, line 2: not JSON"),
    "a number of 5,000 digits": (f"[{'9' * 5000}]", "data.json: not JSON"),
    "an object": ("{}", "data.json, line 1: the field 'instruction' is missing"),
    "an object on several lines": ('{\n"instruction": "a", "output": "b"\n}', "data.json, line 1: not JSON"),
    "text": ('"a"\n', "data.json, line 1: not an object but str"),
    "a record that is a number": ("[1]", "data.json, record 0: not an object but int"),
    "a line cut short": (f'{ONE}\n\n{{"instruction": "a", "output"\n', "data.json, line 3: not JSON: Expecting"),
    "a field missing": (f'[{ONE}, {{"instruction": "a"}}]', "data.json, record 1: the field"),
    "a field null": (array("null"), "data.json, record 0: the field 'instruction' is empty"),
    "a field empty": (array('""'), "data.json, record 0: the field 'instruction' is empty"),
    "a field a number": (array("7"), "data.json, record 0: the field 'instruction' is not text but 7"),
    "an input a number": (ONE[:-1] + ', "input": 3}', "data.json, line 1: the field 'input' is not text but 3"),
    "half a character": (
        ONE[:-1] + ', "input": "\\ud800"}',
        "line 1: the field 'input' holds half a character",
        "encoded: ",
    ),
    "an output missing of a prompt": ('{"prompt": "a", "output": "b"}', "data.json, line 1: the field"),
    "a prompt a list": ('[{"prompt": [{}], "completion": "b", "answer": "1"}]', "record 0: the field 'prompt' is not"),
    "a megabyte": (array(json.dumps("a b " * 250000)), "tokens"),
    "a megabyte of no text": (array([1] * 300000), "record 0: the field 'instruction' is not"),
    "a megabyte of no JSON": ("[" + "a" * 10**6, "data.json: not JSON"),
}


@pytest.mark.parametrize("script", ["train", "eval", "forgetting"])
@pytest.mark.parametrize("what", FILES)
def test_a_data_file_that_is_none_is_refused_by_its_record(here, capsys, what, script):
    content, *words = FILES[what]
    if script == "eval":
        DATA.unlink()
        Path("dataset/gsm8k").mkdir(parents=True)
        holds("dataset/gsm8k/test.json", content)()
        words = [word.replace("data.json", "dataset/gsm8k/test.json") for word in words]
        return refused(capsys, "eval", ["--task", "gsm8k", "--data-dir", "."], *words)
    holds(DATA, content)()
    refused(capsys, script, ["--train-file", DATA] if script == "train" else [DATA], *words)


RIGHT = {"gsm8k": "-1,000.5", "AQuA": "A", "boolq": "true", "piqa": "solution1", "ARC-Easy": "answer1"}
WRONG = [("gsm8k", answer) for answer in ("inf", "nan", "1e999", "one")] + [("AQuA", "F"), ("AQuA", "1")]


@pytest.mark.parametrize("name, answer", [*WRONG, ("boolq", "True"), ("piqa", "solution3"), ("ARC-Easy", "2")])
def test_an_answer_that_no_response_can_give_is_refused(here, capsys, name, answer):
    file = Path("dataset") / name / "test.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"instruction": "a", "answer": right} for right in (RIGHT[name], answer)]))
    refused(capsys, "eval", ["--task", name, "--data-dir", "."], f"{file}, record 1: the answer {answer!r} is not a")


def test_a_megabyte_among_others_is_left_out(here, capsys):
    DATA.write_text(json.dumps([*toy.examples("train", 12), {"instruction": "a b " * 250000, "output": "b"}]))
    train_script.run([*SCRIPTS["train"][1], "--train-file", "data.json", "--out", "run"])
    assert "10 examples of" in (printed := capsys.readouterr().out) and "1 longer than 200 tokens left out" in printed


def test_a_text_that_does_not_fit_is_refused(here, capsys):
    for content, *words in ((b"", "notes.txt holds no text"), (b"\xff", "notes.txt is not text in UTF-8")):
        Path("notes.txt").write_bytes(content)
        refused(capsys, "forgetting", ["notes.txt"], *words)


# --- flags ---

DOWNLOAD = "python data/download.py all"
DEVICES = {"cuda:7": "train", "abacus": "eval", "meta": "train", "hpu": "eval"}  # meta has no numbers, hpu no module
OLD = [
    ("--compare", " a", "compare RUN"),
    ("--activations", "=a.png", "figure1 PNG"),
    ("--loss", " a", "forgetting FILE"),
]
MOVED = "is a command of its own now: python -m extras."
FLAGS = [  # (script, arguments, words of the line)
    ("train", "--ckpt absent", "no checkpoint 'absent'"),
    ("eval", "--ckpt llama2-7b", "hf download meta-llama/Llama-2-7b-hf --include"),
    ("eval", ["--ckpt", "a\nb\x1b[2J" + "c" * 200], "no checkpoint", "a\\nb\\x1b[2J"),
    ("train", "--task algebra", "task 'algebra'", "choose from toy"),
    ("eval", "--task algebra", "unknown task 'algebra'", "choose from toy"),
    ("eval", "--task gsm8k,algebra", "unknown task 'algebra'", "choose from toy"),
    ("train", "--rnak 3", "unrecognized arguments: --rnak"),
    *(("train", f"--rank {x}", f"--rank must be a whole number of at least 1, not {x}") for x in ("x", 0)),
    *(("train", f"--low-freq-ratio {x}", f"--low-freq-ratio must be in (0, 1], not {x}") for x in (0, 2, "nan")),
    *(("train", f"--k-ratio {x}", f"--k-ratio must be in (0, 1], not {x}") for x in (0, 1.1)),
    *(("train", f"--lr={x}", f"--lr must be a positive number, not {x}") for x in ("nan", "-1e-3")),
    *(("train", f"--{x} 0", f"--{x} must be a whole number of at least 1") for x in ("select-every", "max-steps")),
    ("train", "--score-ema nan", "score_ema must be in [0, 1)"),
    ("train", "--alpha -1", "--alpha must be a positive number, not -1"),
    ("train", "--targets q,z", "--targets has the unknown target 'z'", "choose from q,k,v"),
    ("train", ["--targets", ""], "--targets has the unknown target ''", "choose from q,k,v"),
    ("train", f"--seed {2**70}", "--seed must be a whole number from 0 to 2^32 - 1"),
    ("train", "--batch-size 6", "--batch-size 6 is not a multiple of --micro-batch-size 4"),
    ("train", "--max-len 300", "--max-len 300 exceeds the model's context of 256"),
    ("train", "--max-len 9", "0 of 40 examples have at most --max-len 9 tokens"),
    ("train", "--task arithmetic", DOWNLOAD),
    ("eval", "--task arithmetic --data-dir d", f"{DOWNLOAD} --dir d"),
    ("train", "--method rose", "--method 'rose' is unknown"),
    ("train", "--method lora --pairs low", "--pairs is no option of --method lora"),
    ("train", "--method peft:IA3", "--rank is no option", "give its own options with --peft-config"),
    ("train", "--method full --dtype bfloat16", "--rank is no option of --method full"),
    ("train, any method", "--method full --dtype bfloat16", "--method full needs --dtype float32"),
    ("train", "--pairs slow", "--pairs", "invalid choice: 'slow'"),
    ("train", "--shard", "--shard needs several processes: torchrun"),
    ("train", "--out ckpt", "--out ckpt is the checkpoint itself"),
    ("train", "--out data.json", "--out data.json is a file: choose a directory"),
    ("eval", "--out data.json", "data.json"),
    ("eval", "--score likelihood", "toy is not multiple choice: choose from AQuA"),
    ("eval", ["--prompt", " "], "--prompt is empty"),
    ("eval", ["--prompt", "a\udcff"], "--prompt is empty, or not text in UTF-8"),
    ("eval", ["--prompt", "a b " * 200], "--prompt has ", "no room for an answer"),
    ("compare", "ckpt", "ckpt is no run directory"),
    ("figure1", "--limit 0", "--limit must be at least 1"),
    ("figure1", "--task gsm8k --data-dir d", f"{DOWNLOAD} --dir d"),
    *(("eval", option + value, f"{option} {MOVED}{command}") for option, value, command in OLD),
    ("forgetting", "absent.json", "absent.json: No such file"),
    ("forgetting", "ckpt", "ckpt: Is a directory"),
    ("train", "--train-file absent.json", "absent.json: No such file"),
    ("train", "--train-file ckpt", "ckpt: Is a directory"),
    *((script, f"--device {x}", f"device '{x}' is not available", "choose auto, cpu") for x, script in DEVICES.items()),
    ("train", "--resume --overwrite", "--resume goes on with a run, --overwrite starts anew"),
    ("train", "--resume", "--resume: ", "nothing was saved there", "run without --resume"),
    ("eval", "--max-new-tokens 250", "it exceeds the model's context of 256"),
    ("merge", "--out ckpt", "ckpt exists already", "choose another --out"),
]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: f"{flag[0]} {flag[1]}"[:60])
def test_a_flag_that_cannot_be_is_refused(here, capsys, flag):
    script, arguments, *words = flag
    refused(capsys, script, arguments.split() if isinstance(arguments, str) else arguments, *words)


def test_options_of_a_method_that_are_none_are_refused(here, capsys):
    pytest.importorskip("peft")
    arguments = ["--method", "peft:LORA", "--peft-config", "options.json"]
    refused(capsys, "train, any method", arguments, "options.json: No such file")
    for content, word in (("[1]", "options.json holds list"), ('{"no_such": 1}', "no_such")):
        Path("options.json").write_text(content)
        refused(capsys, "train, any method", arguments, word)


def test_a_message_is_one_printable_line():
    assert one_line("a\nb\t c\x1b[31m \ud800\u2028\u202e é日") == "a b c\\x1b[31m \\ud800 \\u202e é日"
    assert one_line(FileNotFoundError(2, "No such file or directory", "a\nb")) == "a b: No such file or directory"
    long = one_line("where" + "x" * 10**6 + "what to do")
    assert long.startswith("where") and long.endswith("what to do") and len(long) < 700


# --- nothing that is read can run code ---

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNERS = {name for call in ("eval", "exec", "compile", "__import__") for name in (call, f"builtins.{call}")}


def violations(source):
    """What in a file could run code that it reads: each as text."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            bad += [name for name in [*names, module] if name.split(".")[0] in PICKLES]
            bad += ["torch.load"] * (module == "torch" and "load" in names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads = called.startswith("torch.") and called.endswith(".load") and options.get("weights_only") != "True"
            numpy = called.split(".")[0] in ("np", "numpy") and options.get("allow_pickle", "False") != "False"
            if called in RUNNERS or loads or numpy or options.get("trust_remote_code", "False") != "False":
                bad.append(ast.unparse(node))
    return bad


def test_no_file_of_the_project_can_run_what_it_reads():
    files = [file for file in ROOT.rglob("*.py") if not any(part[0] == "." for part in file.relative_to(ROOT).parts)]
    assert {"model.py", "rosa.py", "train.py", "eval.py", "tasks.py", "kernels.py", "fuzz.py"} <= {
        f.name for f in files
    }
    assert {str(file): bad for file in files if (bad := violations(file.read_text(encoding="utf-8")))} == {}


BAD = ["import pickle", "from pickle import loads", "import os, dill as d", "import marshal", "from shelve import open"]
BAD += ["eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "builtins.eval(text)"]
BAD += ["torch.load(file)", "torch.load(file, weights_only=False)", "torch.jit.load(file)", "from torch import load"]
BAD += ["np.load(file, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)"]


@pytest.mark.parametrize("line", BAD)
def test_what_could_run_code_is_recognised(line):
    harmless = "torch.load(file, weights_only=True)\nimport eval\nre.compile('a')\nmodel.eval()"
    assert violations(line) and not violations(harmless)


def test_two_hundred_mutated_files_are_refused_cleanly_or_read_rightly(tmp_path):
    counts = fuzz.run(range(200), seed=0, directory=tmp_path)
    assert sum(count["cases"] for count in counts.values()) == 200 and set(counts) == set(fuzz.KINDS)
    assert all(count["refused"] > 0 for count in counts.values())
    assert sum(count["accepted"] for count in counts.values()) > 10
