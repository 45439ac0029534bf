"""A user's mistake, or a file that is not what it should be: one line that says where and what to do, and nothing is left behind.

Each case breaks a good checkpoint, adapter or data file in one way and runs the scripts as a user runs them."""

import ast
import json
import os
import shutil
import struct
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as eval_script
import model as model_file
import rosa
import train as train_script
from data import tasks, toy
from extras import compare, figure1, forgetting
from extras import merge as merge_file
from extras.runs import one_line
from model import Llama, LlamaConfig

ROOT = Path(rosa.__file__).parent
WEIGHTS, CONFIG, INDEX = Path("ckpt/model.safetensors"), Path("ckpt/config.json"), Path("ckpt/model.safetensors.index.json")
ADAPTER, ADAPTER_CONFIG = Path("adapter/adapter_model.safetensors"), Path("adapter/adapter_config.json")
DATA = Path("data.json")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of 1,024 tokens and a context of 256, an adapter for it, twelve examples."""
    directory = tmp_path_factory.mktemp("good")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(directory / "ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory / "ckpt")
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


SCRIPTS = {
    "train": (train_script, ["--ckpt", "ckpt", "--max-len", "200", "--val-size", "2", "--max-steps", "1", "--rank", "4"]),
    "eval": (eval_script, ["--ckpt", "ckpt", "--max-new-tokens", "2", "--limit", "2"]),
    "compare": (compare, []),
    "figure1": (figure1, ["fig1.png", "--ckpt", "ckpt"]),
    "forgetting": (forgetting, ["--ckpt", "ckpt"]),
    "merge": (merge_file, ["--ckpt", "ckpt", "--adapter", "adapter", "--out", "merged"]),
}


def tree():
    """Every path here, where a link leads, and what a file holds."""
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in Path().rglob("*")}


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
    prefix = {"train": "train.py", "eval": "eval.py"}.get(script, script)
    assert error.startswith(f"{prefix}: "), error
    for word in words:
        assert word in error, error
    assert tree() == before


def edit_json(path, **changes):
    """Change keys of a JSON object; ... takes a key out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in value.items() if value is not ...}))


def edit_tensors(path, **changes):
    """Replace tensors of a safetensors file, by the last parts of their names; ... takes one out."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for end, tensor in changes.items():
        name = next((name for name in tensors if name.endswith(end.replace("__", "."))), end)
        tensors[name] = tensor
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not ...}, path, metadata)


def edit_header(path, change):
    """Write a safetensors file with change(header) for its header, an object or bytes."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = change(json.loads(whole[8 : 8 + size]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])


def entry(header, name="model.norm.weight"):
    return header[name]


def overlapping(header):
    names = [name for name in header if name.endswith("layernorm.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    return header


def shards(**names):
    """The checkpoint in two files with an index; `names` replaces what it says of lm_head.weight."""
    tensors = load_file(WEIGHTS)
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["b.safetensors" if name == "lm_head.weight" else "a.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, Path("ckpt") / file)
    WEIGHTS.unlink()
    INDEX.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part} | names}))


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def pickled():
    WEIGHTS.unlink()
    torch.save({}, "ckpt/pytorch_model.bin")


# name -> (what breaks the checkpoint, words of the line)
CHECKPOINTS = {
    "directory missing": (lambda: shutil.rmtree("ckpt"), "no checkpoint 'ckpt'", "names known are tiny"),
    "a file": (lambda: (shutil.rmtree("ckpt"), Path("ckpt").write_text("")), "no checkpoint 'ckpt'", "neither a directory"),
    "directory empty": (lambda: (shutil.rmtree("ckpt"), Path("ckpt").mkdir()), "'ckpt' has no config.json", "give that of"),
    "without config": (CONFIG.unlink, "'ckpt' has no config.json", "give that of"),
    "without weights": (WEIGHTS.unlink, "ckpt has no model.safetensors", "download"),
    "without tokenizer": (Path("ckpt/tokenizer.model").unlink, "ckpt has no tokenizer.model", "download"),
    "tokenizer empty": (lambda: Path("ckpt/tokenizer.model").write_bytes(b""), "ckpt/tokenizer.model is not a", "download"),
    "tokenizer larger than the embedding":
        (lambda: random_model(vocab_size=500).save_pretrained("ckpt"), "ckpt: the tokenizer has 1024 tokens, the model only 500", "download"),
    "config no JSON": (lambda: CONFIG.write_text("{"), "ckpt/config.json is not a JSON", "download"),
    "config an array": (lambda: CONFIG.write_text("[1]"), "ckpt/config.json is not a JSON object", "download"),
    "config no UTF-8": (lambda: CONFIG.write_bytes(b'{"\xff": 1}'), "ckpt/config.json is not a JSON", "download"),
    "config too deep": (lambda: CONFIG.write_text("[" * 10**5), "ckpt/config.json is not a JSON", "download"),
    "config a link to itself": (lambda: loop(CONFIG), "'ckpt' has no config.json"),
    "index a link to itself": (lambda: (shards(), loop(INDEX)), "ckpt has no model.safetensors"),
    "weights a link to themselves": (lambda: loop(WEIGHTS), "ckpt has no model.safetensors"),
    "pickled weights": (pickled, "pickled weights (pytorch_model.bin), which can run code", "convert to model.safetensors"),
    "header no JSON": (lambda: edit_header(WEIGHTS, lambda h: b"{" * 200), "ckpt/model.safetensors", "download"),
    "header too deep": (lambda: edit_header(WEIGHTS, lambda h: b'{"a":' * 5000), "ckpt/model.safetensors", "download"),
    "header length absurd":
        (lambda: WEIGHTS.write_bytes(b"\xff" * 7 + b"\x7f" + WEIGHTS.read_bytes()[8:]), "ckpt/model.safetensors", "download"),
    "overlapping offsets": (lambda: edit_header(WEIGHTS, overlapping), "ckpt/model.safetensors", "download"),
    "offsets beyond the end": (lambda: edit_header(WEIGHTS, lambda h: h | {"model.norm.weight": entry(h) | {"data_offsets": [10**9, 10**9 + 128]}}),
                               "ckpt/model.safetensors", "download"),
    "dtype unknown": (lambda: edit_header(WEIGHTS, lambda h: h | {"model.norm.weight": entry(h) | {"dtype": "F31"}}),
                      "ckpt/model.safetensors", "download"),
    "wrong dtype": (lambda: edit_tensors(WEIGHTS, model__norm__weight=torch.ones(32, dtype=torch.int8)),
                    "ckpt: ", "model.norm.weight is stored as I8", "Download"),
    "wrong shape": (lambda: edit_tensors(WEIGHTS, model__norm__weight=torch.ones(4, 8)),
                    "ckpt: ", "model.norm.weight has shape [4, 8], config.json says [32]", "Download"),
    "tensor missing": (lambda: edit_tensors(WEIGHTS, model__norm__weight=...), "ckpt: ", "missing model.norm.weight", "Download"),
    "tensor extra": (lambda: edit_tensors(WEIGHTS, more=torch.ones(2)), "ckpt: ", "unexpected more", "Download"),
    "hundreds of tensors": (lambda: edit_tensors(WEIGHTS, **{f"x{i}\x1b": torch.ones(1) for i in range(500)}),
                            "ckpt: ", "unexpected x101\\x1b; and 495 more", "Download"),
    "a tensor's name of a megabyte": (lambda: edit_tensors(WEIGHTS, **{"x" * 10**6: torch.ones(2)}), "unexpected xxx", "Download"),
    "index no JSON": (lambda: (shards(), INDEX.write_text("")), f"{INDEX} is not a JSON", "download"),
    "index too deep": (lambda: (shards(), INDEX.write_text('{"weight_map":' * 10**5)), f"{INDEX} is not a JSON", "download"),
    "index without a map": (lambda: (shards(), INDEX.write_text('{"weight_map": [1]}')), f"{INDEX} has no weight_map", "download"),
    "shard absent": (lambda: shards(**{"lm_head.weight": "c.safetensors"}), f"{INDEX} names c.safetensors, which is absent", "download"),
    "shard with a null byte": (lambda: shards(**{"lm_head.weight": "c\0"}), f"{INDEX} names c\\x00, which is absent", "download"),
    "shard outside": (lambda: (shards(**{"lm_head.weight": "../b.safetensors"}), shutil.copy("ckpt/b.safetensors", ".")),
                      f"{INDEX} names a file outside", "ckpt/../b.safetensors", "download"),
    "shard absolute": (lambda: shards(**{"lm_head.weight": "/etc/passwd"}), f"{INDEX} names a file outside", "/etc/passwd", "download"),
    "shard the directory itself": (lambda: shards(**{"lm_head.weight": ".."}), f"{INDEX} names a file outside", "download"),
    "shard a link to itself": (lambda: (shards(), loop(Path("ckpt/b.safetensors"))), "b.safetensors, which is absent", "download"),
    "one tensor in two shards": (lambda: (shards(), edit_tensors(Path("ckpt/b.safetensors"), **{"model.norm.weight": torch.ones(32)})),
                                 "model.norm.weight is in ckpt/a.safetensors and in b.safetensors", "download"),
}


@pytest.mark.parametrize("script", ["train", "eval", "merge"])
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = CHECKPOINTS[what]
    breaking()
    refused(capsys, script, [], *words)


def test_weights_cut_short_anywhere_are_refused(here, capsys):
    whole = WEIGHTS.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        WEIGHTS.write_bytes(whole[:length])
        refused(capsys, "eval", [], "ckpt/model.safetensors is not a whole safetensors file", "download it again")
    WEIGHTS.write_bytes(whole + b"\0")
    refused(capsys, "eval", [], "ckpt/model.safetensors is not a whole safetensors file", "download it again")


@pytest.mark.parametrize("script, path", [("eval", WEIGHTS), ("eval", ADAPTER), ("merge", ADAPTER)])
def test_a_file_that_may_not_be_read_is_said_to_be_that(here, capsys, monkeypatch, script, path):
    def denied(file, *how):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *how)

    for module in (model_file, rosa):
        monkeypatch.setattr(module, "open", denied, raising=False)
    refused(capsys, script, ["--adapter", "adapter"], f"{path}: Permission denied")


@pytest.mark.parametrize("revision", ["../../../ckpt", "here", "a\0b", "", "..", "\ud800"])
def test_what_hugging_faces_cache_calls_main_lies_in_the_cache(here, capsys, revision):
    main = Path("no cache/models--some--model/refs/main")
    (main.parent.parent / "snapshots").mkdir(parents=True)
    main.parent.mkdir()
    main.write_bytes(revision.replace("here", str(Path("ckpt").absolute())).encode(errors="surrogatepass"))
    refused(capsys, "eval", ["--ckpt", "some/model"], "does not hold some/model", "hf download some/model")


def test_a_shard_may_be_a_link_as_in_hugging_faces_cache(here):
    expected = Llama.from_pretrained("ckpt").state_dict()
    shards()
    Path("blobs").mkdir()
    for file in Path("ckpt").glob("*"):
        shutil.move(file, Path("blobs") / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    for name, tensor in Llama.from_pretrained("ckpt").state_dict().items():
        assert torch.equal(tensor, expected[name])


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings")
CONFIGS = [
    *({name: ...} for name in ("model_type", *SIZES[:5])),
    *({name: value} for name in SIZES for value in (-8, 0, 2.5, 10**9, 10**30, "8", True, float("nan"))),
    {"num_hidden_layers": 1000}, {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**10},
    {"num_attention_heads": 5}, {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 8}, {"head_dim": 7},
    {"model_type": "gemma"}, {"model_type": ["llama"]}, {"model_type": None}, {"architectures": ["GemmaForCausalLM"]},
    {"architectures": "x" * 10**6}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": 10**400}, {"rope_theta": -1}, {"rope_theta": 10**400},
    {"rope_theta": float("inf")}, {"rope_theta": 1e-300}, {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
    {"rope_scaling": {"rope_type": ["linear"]}}, {"rope_scaling": [1]}, {"attention_bias": "no"}, {"tie_word_embeddings": "false"},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2, "original_max_position_embeddings": 8}},
    {"num_attention_heads": 2, "head_dim": 2**23, "vocab_size": 2**24, "intermediate_size": 2**24, "hidden_size": 2**24},
    {"eos_token_id": "</s>\x1b[2J\ud800"}, {"eos_token_id": [[[2]]]},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: f"{changes}"[:60])
def test_a_config_that_asks_for_what_cannot_be_is_refused_by_its_key(here, capsys, changes):
    edit_json(CONFIG, **changes)
    *_, key = changes  # the last
    said = {"head_dim": "head", "max_position_embeddings": "max_position", "num_hidden_layers": "layers", "rope_theta": "rope_theta"}
    refused(capsys, "eval", [], "ckpt", "config" if len(changes) > 4 else said.get(key, key.removeprefix("num_")))


def test_a_whole_number_beyond_64_bits_is_a_number():
    assert LlamaConfig(rope_theta=10**30, rms_norm_eps=10**30).rope_theta == 1e30


# --- adapters ---


def metadata(**changes):
    """Change what the adapter's safetensors metadata says under "rosa"."""
    def change(header):
        own = json.loads(header["__metadata__"]["rosa"]) | changes
        return header | {"__metadata__": {"rosa": json.dumps(own)}}
    edit_header(ADAPTER, change)


def another_models(**changes):
    rosa.save_adapter(rosa.attach(random_model(**{"vocab_size": 1024, "num_hidden_layers": 2} | changes), 4, 8), "adapter")


OTHER = "adapter is an adapter for another model: "
COPY = "copy it again"
Q_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
ADAPTERS = {
    "missing": (lambda: shutil.rmtree("adapter"), "adapter is no adapter directory", "no adapter_config.json"),
    "a file": (lambda: (shutil.rmtree("adapter"), Path("adapter").write_text("")), "adapter is no adapter directory"),
    "without tensors": (ADAPTER.unlink, "adapter is no adapter directory", "no adapter_model.safetensors"),
    "pickled": (lambda: ADAPTER.rename("adapter/adapter_model.bin"), "adapter_model.bin, a pickle, which can run code"),
    "a checkpoint": (lambda: (shutil.rmtree("adapter"), shutil.copytree("ckpt", "adapter")), "adapter is no adapter directory"),
    "more layers": (lambda: another_models(num_hidden_layers=3), OTHER, "unexpected base_model.model.model.layers.2", "Give --ckpt"),
    "fewer layers": (lambda: another_models(num_hidden_layers=1), OTHER, "missing base_model.model.model.layers.1", "Give --ckpt"),
    "another size": (lambda: another_models(hidden_size=16), OTHER, "has shape [4, 16], the model needs [4, 32]",
                     "Give --ckpt"),
    "another rank": (lambda: edit_json(ADAPTER_CONFIG, r=3), f"{ADAPTER_CONFIG}: rank 3 is 4 in the metadata of {ADAPTER.name}", "copy"),
    "another alpha": (lambda: edit_json(ADAPTER_CONFIG, lora_alpha=9), f"{ADAPTER_CONFIG}: alpha 9 is 8 in the metadata", "copy"),
    "rank no number": (lambda: edit_json(ADAPTER_CONFIG, r="4"), f"{ADAPTER_CONFIG}: rank '4' is 4 in the metadata", "copy"),
    "tensor missing": (lambda: edit_tensors(ADAPTER, lora_B__weight=...), OTHER, "missing base_model.model"),
    "tensor extra": (lambda: edit_tensors(ADAPTER, more=torch.ones(1)), OTHER, "unexpected more", "Give --ckpt"),
    "tensor of integers": (lambda: edit_tensors(ADAPTER, **{Q_B: torch.ones(32, 4, dtype=torch.int32)}), f"adapter: {Q_B} is torch.int32, not floats", "copy"),
    "config no JSON": (lambda: ADAPTER_CONFIG.write_text("{"), f"{ADAPTER_CONFIG} is not JSON", COPY),
    "config too deep": (lambda: ADAPTER_CONFIG.write_text("[" * 10**5), f"{ADAPTER_CONFIG} is not JSON", COPY),
    "config no object": (lambda: ADAPTER_CONFIG.write_text("[1]"), f"{ADAPTER_CONFIG}: not the JSON object that save_adapter or PEFT writes"),
    "config without a rank": (lambda: edit_json(ADAPTER_CONFIG, r=...), f"{ADAPTER_CONFIG}: the key 'r' is missing"),
    "method no text": (lambda: edit_json(ADAPTER_CONFIG, peft_type=["LORA"]), f"{ADAPTER_CONFIG}: not the JSON object that"),
    "method unknown": (lambda: edit_json(ADAPTER_CONFIG, peft_type="LOAR"), "LOAR"),
    "metadata no JSON": (lambda: edit_header(ADAPTER, lambda h: h | {"__metadata__": {"rosa": "{"}}), f"the metadata of {ADAPTER} is not JSON", COPY),
    "metadata no object": (lambda: edit_header(ADAPTER, lambda h: h | {"__metadata__": {"rosa": "[4]"}}), f"{ADAPTER_CONFIG}: not the JSON object"),
    "metadata unknown": (lambda: metadata(size=4), "size None is 4 in the metadata", "copy"),
    "targets unknown": (lambda: metadata(targets=["q", "z"]), "targets ['q', 'k'] is ['q', 'z'] in the metadata", "copy"),
    "ratio 0": (lambda: metadata(low_freq_ratio=0), "low_freq_ratio must be in (0, 1], not 0"),
    "ratio NaN": (lambda: metadata(low_freq_ratio=float("nan")), "low_freq_ratio must be in (0, 1], not nan"),
    "ratio no number": (lambda: metadata(low_freq_ratio="0.5"), "low_freq_ratio must be in (0, 1], not '0.5'"),
    "pairs unknown": (lambda: metadata(pairs=["low"]), "pairs must be low, high or random, not ['low']"),
    "rows beyond the ratio": (lambda: edit_tensors(ADAPTER, **{Q_B: torch.ones(32, 4)}), f"{Q_B} is not zero outside the rows", "copy"),
}


@pytest.mark.parametrize("script", ["eval", "merge"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = ADAPTERS[what]
    breaking()
    refused(capsys, script, ["--adapter", "adapter"], *words)


@pytest.mark.parametrize("script", ["eval", "merge"])
def test_an_adapter_cut_short_anywhere_is_refused(here, capsys, script):
    whole = ADAPTER.read_bytes()
    for length in (0, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        ADAPTER.write_bytes(whole[:length])
        refused(capsys, script, ["--adapter", "adapter"], f"{ADAPTER} is not a whole safetensors file", COPY)


@pytest.mark.parametrize("changes, word", [
    ({"r": 0}, "rank must be"), ({"r": -4}, "rank must be"), ({"r": 4.0}, "rank must be"), ({"r": True}, "rank must be"),
    ({"r": 5}, "shape"), ({"r": 10**30}, "shape"), ({"lora_alpha": float("nan")}, "alpha must be"), ({"lora_alpha": "8"}, "alpha must be"),
    ({"lora_alpha": 10**400}, "alpha must be"), ({"r": -4, "use_rslora": True}, "math"), ({"use_dora": True}, "use_dora"),
    ({"rank_pattern": {"x" * 10**6: 3}}, "rank_pattern"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
], ids=str)
def test_a_lora_of_peft_that_is_none_is_refused(here, capsys, changes, word):
    save_file(load_file(ADAPTER), ADAPTER)  # without our metadata
    edit_json(ADAPTER_CONFIG, **changes)
    for script in ("eval", "merge"):
        refused(capsys, script, ["--adapter", "adapter"], "adapter", word)


# --- data ---

RECORD = {"instruction": "a", "output": "b", "answer": "1"}
ONE = b'{"instruction": "a", "output": "b", "answer": "1"}'
FILES = {
    "empty": (b"", "data.json must hold at least one example"),
    "an empty array": (b"[]", "data.json must hold at least one example"),
    "only spaces": (b" \n ", "data.json must hold at least one example"),
    "no JSON": (b"[", "data.json: not JSON"),
    "no UTF-8": (b'["\xff"]', "data.json is not text in UTF-8: invalid start byte at byte 2"),
    "too deep": (b"[" * 10**5, "data.json: not JSON"),
    "a line too deep": (ONE + b"\n" + b'{"a":' * 10**5, "data.json, line 2: not JSON"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "data.json: not JSON"),
    "an object": (b"{}", "data.json, line 1: the field 'instruction' is missing"),
    "an object on several lines": (b'{\n"instruction": "a", "output": "b"\n}', "data.json, line 1: not JSON"),
    "text": (b'"a"\n', "data.json, line 1: not an object but str"),
    "a record that is a number": (b"[1]", "data.json, record 0: not an object but int"),
    "a line cut short": (ONE + b'\n\n{"instruction": "a", "output"\n', "data.json, line 3: not JSON: Expecting"),
    "a field missing": (b"[" + ONE + b', {"instruction": "a"}]', "data.json, record 1: the field"),
    "a field null": (b'[{"instruction": null, "output": "b", "answer": "1"}]', "data.json, record 0: the field 'instruction' is empty"),
    "a field empty": (b'[{"instruction": "", "output": "b", "answer": "1"}]', "data.json, record 0: the field 'instruction' is empty"),
    "a field a number": (b'[{"instruction": 7, "output": "b", "answer": "1"}]', "data.json, record 0: the field 'instruction' is not text but 7"),
    "an input a number": (ONE[:-1] + b', "input": 3}', "data.json, line 1: the field 'input' is not text but 3"),
    "half a character": (ONE[:-1] + b', "input": "\\ud800"}', "data.json, line 1: the field 'input' holds half a character", "mend"),
    "an output missing of a prompt": (b'{"prompt": "a", "output": "b"}', "data.json, line 1: the field"),
    "a prompt a list": (b'[{"prompt": [{"role": "user"}], "completion": "b", "answer": "1"}]', "data.json, record 0: the field 'prompt' is not text"),
    "a megabyte": (b'[{"instruction": "' + b"a b " * 250000 + b'", "output": "b", "answer": "1"}]', "tokens"),
    "a megabyte of no text": (b'[{"instruction": [' + b"1," * 500000 + b'1], "output": "b", "answer": "1"}]', "record 0: the field 'instruction' is not"),
    "a megabyte of no JSON": (b"[" + b"a" * 10**6, "data.json: not JSON"),
}


@pytest.mark.parametrize("script", ["train", "eval", "loss"])
@pytest.mark.parametrize("what", FILES)
def test_a_data_file_that_is_none_is_refused_by_its_record(here, capsys, what, script):
    content, *words = FILES[what]
    if script == "eval":
        DATA.unlink()
        Path("dataset/gsm8k").mkdir(parents=True)
        Path("dataset/gsm8k/test.json").write_bytes(content)
        words = [word.replace("data.json", "dataset/gsm8k/test.json") for word in words]
        return refused(capsys, "eval", ["--task", "gsm8k", "--data-dir", "."], *words)
    DATA.write_bytes(content)
    refused(capsys, *{"train": ("train", ["--train-file", DATA]), "loss": ("forgetting", [DATA])}[script], *words)


@pytest.mark.parametrize("name, answer", [("gsm8k", "inf"), ("gsm8k", "nan"), ("gsm8k", "1e999"), ("gsm8k", "one"), ("AQuA", "F"), ("AQuA", "1"),
                                          ("boolq", "True"), ("piqa", "solution3"), ("ARC-Easy", "2")])
def test_an_answer_that_no_response_can_give_is_refused(here, capsys, name, answer):
    file = Path("dataset") / name / "test.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([RECORD | {"answer": {"AQuA": "A", "boolq": "true", "piqa": "solution1", "ARC-Easy": "answer1"}.get(name, "-1,000.5")},
                                RECORD | {"answer": answer}]))
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

FLAGS = {
    "no such checkpoint": ("train", ["--ckpt", "absent"], "no checkpoint 'absent'"),
    "no such checkpoint, by name": ("eval", ["--ckpt", "llama2-7b"], "hf download meta-llama/Llama-2-7b-hf --include"),
    "a name that no directory can have": ("eval", ["--ckpt", "a\nb\x1b[2J" + "c" * 200], "no checkpoint", "a\\nb\\x1b[2J"),
    "no such task": ("train", ["--task", "algebra"], "task 'algebra'", "choose from toy"),
    "no such task, eval": ("eval", ["--task", "algebra"], "unknown task 'algebra'", "choose from toy"),
    "one of several sets": ("eval", ["--task", "gsm8k,algebra"], "unknown task 'algebra'", "choose from toy"),
    "no such flag": ("train", ["--rnak", "3"], "unrecognized arguments: --rnak"),
    "not a number": ("train", ["--rank", "x"], "--rank: invalid int value"),
    "rank 0": ("train", ["--rank", "0"], "--rank must be at least 1"),
    "ratio 0": ("train", ["--low-freq-ratio", "0"], "--low-freq-ratio must be in (0, 1]"),
    "ratio 2": ("train", ["--low-freq-ratio", "2"], "--low-freq-ratio must be in (0, 1]"),
    "ratio NaN": ("train", ["--low-freq-ratio", "nan"], "--low-freq-ratio must be in (0, 1]"),
    "k-ratio 0": ("train", ["--k-ratio", "0"], "--k-ratio must be in (0, 1]"),
    "k-ratio 1.1": ("train", ["--k-ratio", "1.1"], "--k-ratio must be in (0, 1]"),
    "select-every": ("train", ["--select-every", "0"], "--select-every must be at least 1"),
    "score-ema": ("train", ["--score-ema", "nan"], "score_ema must be in [0, 1)"),
    "alpha": ("train", ["--alpha", "-1"], "--alpha must be a positive number"),
    "target": ("train", ["--targets", "q,z"], "--targets has the unknown target 'z'", "choose from q,k,v"),
    "no target": ("train", ["--targets", ""], "--targets has the unknown target ''", "choose from q,k,v"),
    "lr NaN": ("train", ["--lr", "nan"], "--lr must be a positive number"),
    "lr negative": ("train", ["--lr=-1e-3"], "--lr must be a positive number"),
    "seed": ("train", ["--seed", str(2**70)], "--seed must be"),
    "batches": ("train", ["--batch-size", "6"], "--batch-size 6 is not a multiple of --micro-batch-size 4"),
    "no steps": ("train", ["--max-steps", "0"], "--max-steps must be at least 1"),
    "max-len beyond context": ("train", ["--max-len", "300"], "--max-len 300 exceeds the model's context of 256"),
    "all too long": ("train", ["--max-len", "9"], "0 of 40 examples have at most --max-len 9 tokens"),
    "no data": ("train", ["--task", "arithmetic"], "python data/download.py all"),
    "no data, eval": ("eval", ["--task", "arithmetic", "--data-dir", "d"], "python data/download.py all --dir d"),
    "no such method": ("train", ["--method", "rose"], "--method 'rose' is unknown"),
    "another method's option": ("train", ["--method", "lora", "--pairs", "low"], "--pairs is no option of --method lora"),
    "rank for peft": ("train", ["--method", "peft:IA3"], "--rank is no option", "give its own options with --peft-config"),
    "full in bfloat16": ("train", ["--method", "full", "--dtype", "bfloat16"], "--rank is no option of --method full"),
    "pairs": ("train", ["--pairs", "slow"], "argument --pairs: invalid choice: 'slow'"),
    "run into the checkpoint": ("train", ["--out", "ckpt"], "--out ckpt is the checkpoint itself"),
    "run into a file": ("train", ["--out", "data.json"], "--out data.json is a file: choose a directory"),
    "results into a file": ("eval", ["--out", "data.json"], "data.json"),
    "no choice": ("eval", ["--score", "likelihood"], "toy is not multiple choice: choose from AQuA"),
    "no question": ("eval", ["--prompt", " "], "--prompt is empty"),
    "a question of half characters": ("eval", ["--prompt", "a\udcff"], "--prompt is empty, or not text in UTF-8"),
    "a question beyond the context": ("eval", ["--prompt", "a b " * 200], "--prompt has ", "no room for an answer"),
    "nothing to compare": ("compare", ["ckpt"], "ckpt is no run directory"),
    "no examples to draw": ("figure1", ["--limit", "0"], "--limit must be at least 1"),
    "no set to draw": ("figure1", ["--task", "gsm8k", "--data-dir", "d"], "python data/download.py all --dir d"),
    "the old spelling of compare": ("eval", ["--compare", "runs/a"], "--compare is a command of its own now: python -m extras.compare RUN"),
    "the old spelling of figure1": ("eval", ["--activations=a.png"], "--activations is a command of its own now: python -m extras.figure1 PNG"),
    "the old spelling of forgetting": ("eval", ["--loss", "a.json"], "--loss is a command of its own now: python -m extras.forgetting FILE"),
    "no text": ("forgetting", ["absent.json"], "absent.json: No such file"),
    "text a directory": ("forgetting", ["ckpt"], "ckpt: Is a directory"),
    "train file absent": ("train", ["--train-file", "absent.json"], "absent.json: No such file"),
    "train file a directory": ("train", ["--train-file", "ckpt"], "ckpt: Is a directory"),
    "device": ("train", ["--device", "cuda:7"], "device 'cuda:7' is not available", "choose auto, cpu"),
    "device unknown": ("eval", ["--device", "abacus"], "device 'abacus' is not available", "choose auto, cpu"),
    "device without numbers": ("train", ["--device", "meta"], "device 'meta' is not available", "choose auto, cpu"),
    "device without a module": ("eval", ["--device", "hpu"], "device 'hpu' is not available", "choose auto, cpu"),
    "resume and overwrite": ("train", ["--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
    "nothing to resume": ("train", ["--resume"], "--resume: ", "nothing was saved there", "run without --resume"),
    "answer beyond context": ("eval", ["--max-new-tokens", "250"], "it exceeds the model's context of 256"),
    "merged into the checkpoint": ("merge", ["--out", "ckpt"], "ckpt exists already", "choose another --out"),
}


@pytest.mark.parametrize("what", FLAGS)
def test_a_flag_that_cannot_be_is_refused(here, capsys, what):
    refused(capsys, *FLAGS[what][:2], *FLAGS[what][2:])


def test_options_of_a_method_that_are_none_are_refused(here, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setitem(SCRIPTS, "train", (train_script, [part for part in SCRIPTS["train"][1] if part not in ("--rank", "4")]))
    for content, word in ((None, "absent.json: No such file"), ("[1]", "options.json holds list"), ('{"no_such": 1}', "no_such")):
        if content:
            Path("options.json").write_text(content)
        refused(capsys, "train", ["--method", "peft:LORA", "--peft-config", "options.json" if content else "absent.json"], word)
    refused(capsys, "train", ["--method", "full", "--dtype", "bfloat16"], "--method full needs --dtype float32")


def test_a_message_is_one_printable_line():
    assert one_line("a\nb\t c\x1b[31m \ud800\u2028\u202e é日") == "a b c\\x1b[31m \\ud800 \\u202e é日"
    assert one_line(FileNotFoundError(2, "No such file or directory", "a\nb")) == "a b: No such file or directory"
    assert one_line("where" + "x" * 10**6 + "what to do").startswith("where") and one_line("x" * 10**6 + "what to do").endswith("what to do")


# --- nothing that is read can run code ---


def violations(source):
    """What in a file could run code that it reads: each as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib",
                                                                          "marshal", "shelve")]
            found += [f"torch.{name}" for name in names if getattr(node, "module", None) == "torch" and name == "load"]
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"):
                found.append(called)
            if called.startswith("torch.") and called.endswith(".load") and given.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if called.split(".")[0] in ("np", "numpy") and given.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
            if "trust_remote_code" in given and given["trust_remote_code"] != "False":
                found.append(ast.unparse(node))
    return found


def test_no_file_of_the_project_can_run_what_it_reads():
    files = sorted(file for file in ROOT.rglob("*.py") if not any(part.startswith(".") for part in file.relative_to(ROOT).parts))
    assert {"model.py", "rosa.py", "train.py", "eval.py", "tasks.py", "fuzz.py"} <= {file.name for file in files}
    assert {str(file): found for file in files if (found := violations(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("line", ["import pickle", "from pickle import loads", "import os, dill as d", "import marshal", "from shelve import open",
                                  "eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "torch.load(file)",
                                  "torch.load(file, weights_only=False)", "from torch import load", "np.load(file, allow_pickle=True)",
                                  "AutoModel.from_pretrained(name, trust_remote_code=True)"])
def test_what_could_run_code_is_recognised(line):
    assert violations(line) and not violations("torch.load(file, weights_only=True)\nimport eval\nre.compile('a')\nmodel.eval()")


# --- the fuzzer ---


def test_two_hundred_mutated_files_are_refused_cleanly_or_read_rightly(tmp_path):
    counts = fuzz.run(range(200), seed=0, directory=tmp_path)
    assert sum(count["cases"] for count in counts.values()) == 200 and set(counts) == set(fuzz.KINDS)
    assert all(count["refused"] > 0 for count in counts.values())
    assert sum(count["accepted"] for count in counts.values()) > 10
