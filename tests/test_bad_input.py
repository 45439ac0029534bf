"""A user's mistake, or a file that is not what it should be: the command ends with one line that
says what is wrong and what to do, and it leaves nothing behind.

A test begins in a directory that holds a good checkpoint, a good adapter for it and a good data
file. It spoils one of these, or types a wrong option, and runs a command as a user types it."""

import ast
import importlib
import json
import os
import shlex
import shutil
import struct
from pathlib import Path

import fuzz
import pytest
import torch
from helpers import ROOT, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rosa
from data import tasks, toy
from extras import adapters, checkpoints
from extras.commands import one_line
from model import Llama

CONFIG = Path("ckpt/config.json")
WEIGHTS = Path("ckpt/model.safetensors")
INDEX = Path("ckpt/model.safetensors.index.json")
TOKENIZER = Path("ckpt/tokenizer.model")
ADAPTER_CONFIG = Path("adapter/adapter_config.json")
ADAPTER_WEIGHTS = Path("adapter/adapter_model.safetensors")
DATA = Path("dataset/gsm8k/test.json")

TRAIN = "train.py --ckpt ckpt --max-len 200 --val-size 2 --max-steps 1"
EVAL = "eval.py --ckpt ckpt --max-new-tokens 2"
EVAL_ADAPTER = f"{EVAL} --adapter adapter"
MERGE = "extras.merge --ckpt ckpt --adapter adapter --out merged"
FIGURE1 = "extras.figure1 fig1.png --ckpt ckpt"
FORGETTING = "extras.forgetting --ckpt ckpt"

by_eval_and_merge = pytest.mark.parametrize("command", [EVAL, MERGE], ids=["eval", "merge"])
by_eval_adapter_and_merge = pytest.mark.parametrize(
    "command", [EVAL_ADAPTER, MERGE], ids=["eval", "merge"]
)


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory):
    """A checkpoint of 1,024 tokens and a context of 256, an adapter for it, twelve examples."""
    directory = tmp_path_factory.mktemp("good")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(directory / "ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory / TOKENIZER)
    rosa.save_adapter(rosa.attach(model, 4, 8), directory / "adapter")
    (directory / DATA).parent.mkdir(parents=True)
    (directory / DATA).write_text(json.dumps(toy.examples("train", 12)))
    return directory


@pytest.fixture
def good_files(good_directory, tmp_path, monkeypatch):
    """A working directory with a copy of the good checkpoint, adapter and data file alone."""
    shutil.copytree(good_directory, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.setattr(tasks, "TOY_SIZES", {"train": 40, "test": 2})


@pytest.fixture
def sharded(good_files):
    """The checkpoint's weights in two files with an index: lm_head's in b.safetensors, all others
    in a.safetensors."""
    tensors = load_file(WEIGHTS)
    WEIGHTS.unlink()
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, "ckpt/b.safetensors")
    save_file(tensors, "ckpt/a.safetensors")
    INDEX.write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def expect_error(good_files, capsys):
    """A function that runs a command and expects an error: exit status 2, one printable line that
    contains each of the messages, and no file written, changed or deleted."""

    def run_and_check(command, *messages):
        script, *arguments = shlex.split(command)
        before = directory_contents()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(script.removesuffix(".py")).run(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2, error
        assert error.endswith("\n") and error[:-1].isprintable() and len(error) < 700, error
        assert error.startswith(f"{script.removeprefix('extras.')}: "), error
        for message in messages:
            assert message in error, error
        assert directory_contents() == before

    return run_and_check


def directory_contents():
    """Each path in the working directory -> where it leads (a link), its bytes (a file), or False
    (a directory)."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in Path().rglob("*")
    }


def edit_json(file, **changes):
    """Give keys of the JSON object in a file other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def link_to_itself(file):
    file.unlink()
    file.symlink_to(file.name)


def read_adapter():
    """The tensors in the adapter's safetensors file, and the metadata beside them."""
    with safe_open(ADAPTER_WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


# --- checkpoints ---


@by_eval_and_merge
def test_a_file_in_the_place_of_a_checkpoint_is_refused(expect_error, command):
    shutil.rmtree("ckpt")
    Path("ckpt").write_text("")
    expect_error(command, "no checkpoint 'ckpt': neither a directory", "tiny, llama2-7b")


@by_eval_and_merge
@pytest.mark.parametrize(
    "file, content, message",
    [
        pytest.param(CONFIG, b"{", "config.json is not a JSON", id="config no JSON"),
        pytest.param(CONFIG, b"[1]", "config.json is not a JSON", id="config an array"),
        pytest.param(CONFIG, b"[" * 10**5, "config.json is not a JSON", id="config too deep"),
        pytest.param(TOKENIZER, b"", "tokenizer.model is not a", id="tokenizer empty"),
        pytest.param(
            WEIGHTS,
            struct.pack("<Q", 200) + b"{" * 200,  # the header's length, and a header
            "model.safetensors is not a whole safetensors file",
            id="header no JSON",
        ),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(expect_error, command, file, content, message):
    file.write_bytes(content)
    expect_error(command, f"ckpt/{message}", "download it")


@by_eval_and_merge
def test_a_checkpoint_without_a_tokenizer_is_refused(expect_error, command):
    TOKENIZER.unlink()
    expect_error(command, "ckpt has no tokenizer.model", "download")


@by_eval_and_merge
@pytest.mark.parametrize(
    "file, message",
    [
        (CONFIG, "the directory 'ckpt' has no config.json: give that of"),
        (WEIGHTS, "ckpt has no model.safetensors and no model.safetensors.index.json: download"),
    ],
    ids=["config", "weights"],
)
def test_a_link_to_itself_in_a_checkpoint_is_no_file(expect_error, command, file, message):
    link_to_itself(file)
    expect_error(command, message)


@by_eval_and_merge
def test_pickled_weights_are_refused(expect_error, command):
    WEIGHTS.rename("ckpt/pytorch_model.bin")
    expect_error(
        command,
        "pickled weights (pytorch_model.bin), which can run code",
        "convert to model.safetensors",
    )


@by_eval_and_merge
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(expect_error, command):
    edit_json(CONFIG, vocab_size=500)
    expect_error(command, "tokenizer has 1024 tokens, the model only 500: download")


@by_eval_and_merge
@pytest.mark.parametrize(
    "changed, message",
    [
        pytest.param(
            {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
            "model.norm.weight is stored as I8",
            id="wrong dtype",
        ),
        pytest.param(
            {"model.norm.weight": torch.ones(4, 8)},
            "model.norm.weight has shape [4, 8], config.json says [32]",
            id="shape",
        ),
        pytest.param(
            {f"x{i}\x1b": torch.ones(1) for i in range(500)},
            "unexpected x101\\x1b; and 495 more",
            id="hundreds of tensors",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(expect_error, command, changed, message):
    save_file(load_file(WEIGHTS) | changed, WEIGHTS)
    expect_error(command, "ckpt: the tensors do not fit the config: ", message, "Download both")


@by_eval_and_merge
def test_a_checkpoint_that_lacks_a_tensor_is_refused(expect_error, command):
    tensors = load_file(WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, WEIGHTS)
    expect_error(
        command,
        "ckpt: the tensors do not fit the config: missing model.norm.weight",
        "Download both",
    )


@by_eval_and_merge
def test_a_config_of_a_model_larger_than_any_memory_is_refused_by_the_shapes(expect_error, command):
    edit_json(CONFIG, hidden_size=2**24, vocab_size=2**24)
    expect_error(
        command,
        "ckpt: the tensors do not fit the config: ",
        "config.json says [16777216, 16777216]",
        "Download both",
    )


# --- checkpoints in several files ---


@by_eval_and_merge
@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param("{", "is not a JSON", id="no JSON"),
        pytest.param('{"weight_map":' * 10**5, "is not a JSON", id="too deep"),
        pytest.param('{"weight_map": [1]}', "has no weight_map", id="without a map"),
    ],
)
def test_an_index_that_is_none_is_refused(expect_error, sharded, command, content, message):
    INDEX.write_text(content)
    expect_error(command, f"ckpt/model.safetensors.index.json {message}", "download it")


@by_eval_and_merge
@pytest.mark.parametrize(
    "file, message",
    [
        ("c\0", "c\\x00, which is absent: download it"),
        (
            "../adapter/adapter_model.safetensors",
            "a file outside its directory, ckpt/../adapter/adapter_model.safetensors: download",
        ),
        ("/etc/passwd", "a file outside its directory, /etc/passwd: download"),
        ("..", "a file outside its directory, ckpt/..: download"),
    ],
)
def test_a_file_that_an_index_cannot_name_is_refused(expect_error, sharded, command, file, message):
    index = json.loads(INDEX.read_text())
    index["weight_map"]["lm_head.weight"] = file
    INDEX.write_text(json.dumps(index))
    expect_error(command, f"ckpt/model.safetensors.index.json names {message}")


@by_eval_and_merge
@pytest.mark.parametrize(
    "file, message",
    [
        (INDEX, "ckpt has no model.safetensors and no model.safetensors.index.json: download"),
        (Path("ckpt/b.safetensors"), "names b.safetensors, which is absent: download"),
    ],
    ids=["index", "shard"],
)
def test_a_link_to_itself_is_no_index_and_no_shard(expect_error, sharded, command, file, message):
    link_to_itself(file)
    expect_error(command, message)


@by_eval_and_merge
def test_a_tensor_in_two_shards_is_refused(expect_error, sharded, command):
    shard = Path("ckpt/b.safetensors")
    save_file(load_file(shard) | {"model.norm.weight": torch.ones(32)}, shard)
    expect_error(command, "model.norm.weight is in ckpt/a.safetensors and in b.safetensors")


def test_a_shard_may_be_a_link_as_in_hugging_faces_cache(sharded, good_directory):
    Path("blobs").mkdir()
    for file in Path("ckpt").glob("*"):
        shutil.move(file, Path("blobs") / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    expected = Llama.from_pretrained(good_directory / "ckpt").state_dict()
    for name, value in checkpoints.load_model("ckpt").state_dict().items():
        assert torch.equal(value, expected[name])


# --- files that cannot be read to their end, or at all ---


@pytest.mark.parametrize(
    "command, file, advice",
    [
        (TRAIN, WEIGHTS, "download it again"),
        (EVAL_ADAPTER, ADAPTER_WEIGHTS, "copy it again"),
    ],
    ids=["train", "eval"],
)
def test_a_file_cut_short_anywhere_or_too_long_is_refused(expect_error, command, file, advice):
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]  # 8 bytes hold the header's length
    for length in (0, 7, 8, header_end - 1, header_end, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        expect_error(command, f"{file} is not a whole safetensors file", advice)
    file.write_bytes(whole + b"\0")
    expect_error(command, f"{file} is not a whole safetensors file", advice)


@pytest.mark.parametrize(
    "command, file", [(TRAIN, WEIGHTS), (EVAL_ADAPTER, ADAPTER_WEIGHTS)], ids=["train", "eval"]
)
def test_a_file_that_may_not_be_read_is_said_to_be_that(expect_error, monkeypatch, command, file):
    def open_or_deny(path, *mode):
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *mode)

    for module in (checkpoints, adapters):
        monkeypatch.setattr(module, "open", open_or_deny, raising=False)
    expect_error(command, f"{file}: Permission denied")


@pytest.mark.parametrize("revision", [b"../../../ckpt", b"a\0b", b"\xff"])
def test_what_hugging_faces_cache_calls_main_lies_in_the_cache(expect_error, revision):
    Path("no cache/models--some--model/snapshots").mkdir(parents=True)
    Path("no cache/models--some--model/refs").mkdir()
    Path("no cache/models--some--model/refs/main").write_bytes(revision)
    expect_error(
        "eval.py --ckpt some/model", "does not hold some/model", "get('some/model', allow_patterns="
    )


# --- config.json ---

NEEDED_KEYS = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
]
LIMITED_KEYS = [  # to 2**24
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
]
NAN = float("nan")
LLAMA3 = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8}


@pytest.mark.parametrize("key", NEEDED_KEYS)
def test_a_config_without_a_key_that_is_needed_is_refused_by_the_key(expect_error, key):
    config = json.loads(CONFIG.read_text())
    del config[key]
    CONFIG.write_text(json.dumps(config))
    expect_error(EVAL, "ckpt/config.json: ", key)


@pytest.mark.parametrize(
    "key, value",
    [
        *((key, 2**24 + 1) for key in LIMITED_KEYS),
        ("num_hidden_layers", 2**10 + 1),
        *((key, value) for key in ("vocab_size", "head_dim") for value in (0, 2.5, "8", True)),
        ("num_attention_heads", 5),  # no multiple of the two heads of keys
        ("head_dim", 7),
        ("model_type", "gemma"),
        ("model_type", ["llama"]),
        ("architectures", ["GemmaForCausalLM"]),
        ("architectures", 3),
        ("layer_types", 3),
        ("rms_norm_eps", NAN),
        ("rope_theta", -1),
        ("rope_theta", 10**400),
        ("rope_theta", 1e-300),
        ("rope_scaling", {"rope_type": "linear", "factor": NAN}),
        ("rope_scaling", {"rope_type": ["linear"]}),
        ("rope_scaling", [1]),
        ("rope_scaling", LLAMA3 | {"low_freq_factor": 2, "high_freq_factor": 2}),
        ("attention_bias", "no"),
        ("mlp_bias", "no"),
        ("tie_word_embeddings", "no"),
        ("eos_token_id", "</s>\x1b[2J\ud800"),
        ("eos_token_id", [[[2]]]),
    ],
    ids=lambda value: f"{value}"[:60],
)
def test_a_config_that_asks_for_what_cannot_be_is_refused_by_its_key(expect_error, key, value):
    edit_json(CONFIG, **{key: value})
    expect_error(EVAL, "ckpt", key)


def test_a_config_of_more_rows_of_queries_than_can_be_is_refused(expect_error):
    edit_json(CONFIG, head_dim=2**10, num_key_value_heads=2**20, num_attention_heads=2**20)
    expect_error(EVAL, "ckpt/config.json: num_attention_heads x head_dim is more than 2^24")


def test_a_whole_number_beyond_64_bits_is_a_number(good_files):
    edit_json(CONFIG, rope_theta=10**30, rms_norm_eps=10**30)
    logits = checkpoints.load_model("ckpt")(torch.zeros(1, 2, dtype=torch.long))
    assert logits.isfinite().all()


# --- adapters ---

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
K_B = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
LAST_Q_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@by_eval_adapter_and_merge
def test_an_adapter_that_is_absent_is_refused(expect_error, command):
    shutil.rmtree("adapter")
    expect_error(command, "adapter is no adapter directory: it has no adapter_config.json")


@by_eval_adapter_and_merge
def test_a_pickled_adapter_is_refused(expect_error, command):
    ADAPTER_WEIGHTS.rename("adapter/adapter_model.bin")
    expect_error(
        command,
        "adapter is no adapter directory: it has no adapter_model.safetensors, only "
        "adapter_model.bin, a pickle, which can run code",
    )


@by_eval_adapter_and_merge
def test_an_adapter_whose_config_is_no_object_is_refused(expect_error, command):
    ADAPTER_CONFIG.write_text("[1]")
    expect_error(command, "adapter/adapter_config.json holds list, not a JSON object")


@by_eval_adapter_and_merge
@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param(
            {"r": 3},
            f"adapter was trained on another model: {Q_A} is [4, 32], this one needs [3, 32]",
            id="another rank",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "k_proj", "v_proj"]},
            "adapter_config.json names the modules q_proj, k_proj, v_proj, the file holds tensors "
            "of q_proj, k_proj",
            id="a target without tensors",
        ),
        pytest.param(
            {"target_modules": "no.*such"},
            "adapter_config.json names the modules none, the file holds tensors of q_proj, k_proj",
            id="tensors without a target",
        ),
        pytest.param(
            {"peft_type": ["LORA"]},
            "adapter/adapter_config.json: the key 'peft_type' is missing: copy the file again",
            id="method no text",
        ),
        pytest.param({"peft_type": "LOAR"}, "LOAR", id="method unknown"),
        pytest.param(
            {"r": True},
            "adapter/adapter_config.json: rank must be a whole number of at least 1, not True",
            id="rank no number",
        ),
        pytest.param(
            {"r": -4, "use_rslora": True},
            "adapter/adapter_config.json: rank must be a whole number of at least 1, not -4",
            id="rank negative, of which use_rslora takes the root",
        ),
        pytest.param(
            {"lora_alpha": NAN},
            "adapter/adapter_config.json: alpha must be a positive number, not nan",
            id="alpha NaN",
        ),
        pytest.param(
            {"lora_alpha": "8"},
            "adapter/adapter_config.json: alpha must be a positive number, not '8'",
            id="alpha no number",
        ),
        pytest.param(
            {"use_dora": True},
            "adapter/adapter_config.json: use_dora = True is not implemented",
            id="DoRA",
        ),
        pytest.param(
            {"init_lora_weights": "pissa"},
            "adapter/adapter_config.json: init_lora_weights = 'pissa'",
            id="for other base weights",
        ),
    ],
)
def test_an_adapter_that_is_none_is_refused(expect_error, command, changes, message):
    edit_json(ADAPTER_CONFIG, **changes)
    expect_error(command, message)


@by_eval_adapter_and_merge
def test_an_adapter_without_our_metadata_is_read_as_peft_writes_it(expect_error, command):
    save_file(load_file(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS)
    edit_json(ADAPTER_CONFIG, r=3)
    expect_error(
        command, f"adapter was trained on another model: {Q_A} is [4, 32], this one needs [3, 32]"
    )


@by_eval_adapter_and_merge
@pytest.mark.parametrize(
    "changed, message",
    [
        pytest.param(
            {"more": torch.ones(1)}, "adapter holds more, which is in no layer", id="one more"
        ),
        pytest.param(
            {LAST_Q_B: torch.ones(32, 4, dtype=torch.int32)},
            f"adapter: {LAST_Q_B} is torch.int32",
            id="integers",
        ),
        pytest.param(
            {LAST_Q_B: torch.ones(32, 4)},
            f"adapter: {LAST_Q_B} is not zero outside low_freq_ratio 0.5, pairs low",
            id="rows beyond the ratio",
        ),
    ],
)
def test_a_tensor_that_an_adapter_cannot_have_is_refused(expect_error, command, changed, message):
    tensors, metadata = read_adapter()
    save_file(tensors | changed, ADAPTER_WEIGHTS, metadata)
    expect_error(command, message)


@by_eval_adapter_and_merge
def test_an_adapter_that_lacks_a_tensor_is_refused(expect_error, command):
    tensors, metadata = read_adapter()
    del tensors[K_B]
    save_file(tensors, ADAPTER_WEIGHTS, metadata)
    expect_error(
        command,
        f"adapter was trained on another model: {K_B} is absent, this one needs [16, 4]",
    )


@by_eval_adapter_and_merge
def test_an_adapter_without_tensors_is_refused(expect_error, command):
    save_file({}, ADAPTER_WEIGHTS)
    expect_error(
        command, "names the modules q_proj, k_proj, the file holds tensors of none: copy both files"
    )


@by_eval_adapter_and_merge
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ["q", "z"]}, "says that it adapts ['q', 'z'], and holds tensors of"),
        ({"low_freq_ratio": NAN}, "low_freq_ratio must be in (0, 1], not nan"),
        ({"low_freq_ratio": "0.5"}, "low_freq_ratio must be in (0, 1], not '0.5'"),
        ({"pairs": ["low"]}, "pairs must be low, high or random, not ['low']"),
    ],
    ids=["targets", "ratio NaN", "ratio no number", "pairs"],
)
def test_metadata_that_no_adapter_has_is_refused(expect_error, command, changes, message):
    tensors, metadata = read_adapter()
    metadata["rosa"] = json.dumps(json.loads(metadata["rosa"]) | changes)
    save_file(tensors, ADAPTER_WEIGHTS, metadata)
    expect_error(command, message)


@by_eval_adapter_and_merge
@pytest.mark.parametrize("text", ["{", "[4]"])
def test_metadata_that_is_no_json_object_is_refused(expect_error, command, text):
    save_file(load_file(ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, {"rosa": text})
    expect_error(command, "the metadata of adapter/adapter_model.safetensors is not JSON", "copy")


def test_an_adapters_metadata_decides_which_rows_adapt_and_nothing_else(good_files):
    tensors, metadata = read_adapter()
    other = {"rank": 3, "alpha": 9, "size": 4}
    metadata["rosa"] = json.dumps(json.loads(metadata["rosa"]) | other)
    save_file(tensors, ADAPTER_WEIGHTS, metadata)
    model = adapters.load_adapter(checkpoints.load_model("ckpt"), "adapter")
    assert rosa.attach_arguments(model) == {
        "rank": 4,
        "alpha": 8,
        "low_freq_ratio": 0.5,
        "targets": ["q", "k"],
        "pairs": "low",
    }


# --- data ---

GOOD_RECORD = '{"instruction": "a", "output": "b", "answer": "1"}'
EMPTY_RECORD = '{"instruction": "", "output": "b", "answer": "1"}'

by_all_that_read_data = pytest.mark.parametrize(
    "command",
    [
        f"{TRAIN} --train-file dataset/gsm8k/test.json",
        f"{EVAL} --task gsm8k --data-dir .",
        f"{FORGETTING} dataset/gsm8k/test.json",
    ],
    ids=["train", "eval", "forgetting"],
)


@by_all_that_read_data
@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"[]", "test.json must hold at least one example", id="an empty array"),
        pytest.param(b" \n ", "test.json must hold at least one example", id="only spaces"),
        pytest.param(
            b'["\xff"]',
            "test.json is not text in UTF-8: invalid start byte at byte 2",
            id="no UTF-8",
        ),
        pytest.param(b"[" * 10**5, "test.json: not JSON", id="too deep"),
        pytest.param(
            b"[" + b"9" * 5000 + b"]", "test.json: not JSON", id="a number of 5,000 digits"
        ),
        pytest.param(
            f'{GOOD_RECORD}\n\n{{"instruction": "a", "output"\n'.encode(),
            "test.json, line 3: not JSON: Expecting",
            id="a line cut short",
        ),
        pytest.param(
            b"[1]", "test.json, record 0: not an object but int", id="a record that is a number"
        ),
        pytest.param(
            b'[{"instruction": null, "output": "b", "answer": "1"}]',
            "test.json: the field 'instruction' is empty in record 0: delete it, or leave it",
            id="a field null",
        ),
        pytest.param(
            f"{EMPTY_RECORD}\n{GOOD_RECORD}\n{EMPTY_RECORD}".encode(),
            "'instruction' is empty in 2 records, the first is line 1: delete them",
            id="fields empty",
        ),
        pytest.param(
            b'{"instruction": "a", "output": "b", "answer": "1", "input": [3]}',
            "test.json, line 1: the field 'input' is not text but [3]",
            id="an input a list",
        ),
        pytest.param(
            b'{"instruction": "a",\n"output": "b",\n"answer": "1"}',
            "test.json holds a JSON object over several lines: put it in [ ]",
            id="an object over lines",
        ),
        pytest.param(
            b'[{"prompt": [{}], "completion": "b", "answer": "1"}]',
            "record 0: the field 'prompt' is not",
            id="a prompt a list",
        ),
        pytest.param(
            b'{"instruction": "a", "output": "b", "answer": "1", "input": "\\ud800"}',
            "the field 'input' holds half a character, which",
            id="half a character",
        ),
        pytest.param(
            json.dumps([{"instruction": "a b " * 1000, "output": "b", "answer": "1"}]).encode(),
            "tokens",
            id="too long",
        ),
    ],
)
def test_a_data_file_that_is_none_is_refused_by_its_record(expect_error, command, content, message):
    DATA.write_bytes(content)
    expect_error(command, message)


@by_all_that_read_data
@pytest.mark.parametrize(
    "content, message, fields",
    [
        pytest.param(
            f'[{GOOD_RECORD}, {{"instruction": "a"}}]',
            "test.json, record 1 has no '",
            "'instruction'",
            id="a field missing",
        ),
        pytest.param(
            '[{"prompt": "a", "question": "b"}]',
            "test.json, record 0 has no '",
            "'prompt', 'question'",
            id="halves of two pairs",
        ),
        pytest.param(
            "[{}]",
            "test.json, record 0 has no 'instruction' and no '",
            "{}",
            id="a record without fields",
        ),
    ],
)
def test_a_record_that_lacks_a_field_is_refused_with_the_fields_that_it_has(
    expect_error, command, content, message, fields
):
    """Which field is missing depends on the command: eval.py needs an answer, the two others need
    what a model shall learn."""
    DATA.write_text(content)
    expect_error(command, message, f"', only {fields}: rename or add fields")


@pytest.mark.parametrize(
    "task, right, wrong",
    [
        ("gsm8k", "-1,000.5", "inf"),
        ("gsm8k", "1", "one"),
        ("AQuA", "A", "F"),
        ("boolq", "true", "True"),
    ],
)
def test_an_answer_that_no_response_can_give_is_refused(expect_error, task, right, wrong):
    file = Path("dataset") / task / "test.json"
    file.parent.mkdir(exist_ok=True)
    records = [{"instruction": "a", "answer": answer} for answer in (right, wrong)]
    file.write_text(json.dumps(records))
    expect_error(
        f"{EVAL} --task {task} --data-dir .",
        f"dataset/{task}/test.json, record 1: the answer '{wrong}' is not a",
    )


@pytest.mark.parametrize(
    "content, message", [(b"", "holds no text"), (b"\xff", "is not text in UTF-8")]
)
def test_a_text_that_is_none_is_refused(expect_error, content, message):
    Path("notes.txt").write_bytes(content)
    expect_error(f"{FORGETTING} notes.txt", f"notes.txt {message}")


def test_an_example_that_is_too_long_is_named_by_its_place_in_the_file(expect_error):
    long = {"instruction": "Add 1 and 2. " * 99, "output": "3"}
    examples = [{"instruction": "Add.", "output": ""}, long | {"instruction": "Add."}, long]
    Path("data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    expect_error(f"{FORGETTING} data.jsonl --skip-empty", "data.jsonl, line 3: ", "exceed")


# --- flags ---

DOWNLOAD = "python data/download.py all"
FLAGS = [  # (command, what is typed after it, the message)
    (EVAL, "--ckpt llama2-7b", "get('meta-llama/Llama-2-7b-hf', allow_patterns=["),
    (EVAL, f"--ckpt 'a\nb\x1b[2J{'c' * 200}'", "no checkpoint 'a\\nb\\x1b[2J"),
    (
        TRAIN,
        "--task algebra",
        "task 'algebra' has no training file of its own: give one with --train-file, or choose "
        "from toy",
    ),
    (EVAL, "--task gsm8k,algebra", "unknown task 'algebra': choose from toy, "),
    (TRAIN, "--rnak 3", "unrecognized arguments: --rnak"),
    (TRAIN, "--rank x", "--rank must be a whole number of at least 1, not x"),
    (TRAIN, "--rank 0", "--rank must be a whole number of at least 1"),
    (TRAIN, "--select-every 0", "--select-every must be a whole number of at least 1"),
    (TRAIN, "--max-steps 0", "--max-steps must be a whole number of at least 1"),
    (TRAIN, "--low-freq-ratio 0", "--low-freq-ratio must be in (0, 1], not 0"),
    (TRAIN, "--low-freq-ratio 2", "--low-freq-ratio must be in (0, 1], not 2"),
    (TRAIN, "--k-ratio nan", "--k-ratio must be in (0, 1], not nan"),
    (TRAIN, "--lr=nan", "--lr must be a positive number, not nan"),
    (TRAIN, "--alpha -1", "--alpha must be a positive number, not -1"),
    (TRAIN, "--score-ema nan", "--score-ema must be in [0, 1), not nan"),
    (TRAIN, "--targets q,z", "--targets has the unknown target 'z': choose from q,k,v"),
    (TRAIN, f"--seed {2**70}", "--seed must be a whole number from 0 to 2^32 - 1"),
    (
        TRAIN,
        "--batch-size 6 --micro-batch-size 4",
        "--batch-size 6 is not a multiple of --micro-batch-size 4",
    ),
    (TRAIN, "--max-len 300", "--max-len 300 exceeds the model's context of 256"),
    (TRAIN, "--max-len 9", "0 of 40 examples have at most --max-len 9 tokens"),
    (TRAIN, "--task arithmetic", DOWNLOAD),
    (EVAL, "--task arithmetic --data-dir d", f"{DOWNLOAD} --dir d"),
    (TRAIN, "--method rose", "--method 'rose' is unknown"),
    (TRAIN, "--method lora --pairs low", "--pairs is no option of --method lora"),
    (
        TRAIN,
        "--method peft:IA3 --rank 4",
        "--rank is no option of --method peft:IA3: give its own options with --peft-config",
    ),
    (TRAIN, "--method full --dtype bfloat16", "--method full needs --dtype float32"),
    (TRAIN, "--pairs slow", "--pairs invalid choice: 'slow'"),
    (TRAIN, "--shard", "--shard needs several processes: torchrun"),
    (TRAIN, "--out ckpt", "--out ckpt is the checkpoint itself"),
    (TRAIN, f"--out {DATA}", f"--out {DATA} is a file: choose a directory"),
    (EVAL, f"--out {DATA}", f"{DATA}"),
    (EVAL, "--score likelihood", "toy is not multiple choice: choose from AQuA"),
    (EVAL, "--prompt ' '", "--prompt is empty"),
    (EVAL, "--prompt a\udcff", "--prompt is empty, or not text in UTF-8"),
    (
        EVAL,
        f"--prompt '{'a b ' * 200}'",
        "--prompt has 432 tokens, the model's context 256: make it shorter, there is no room for "
        "an answer",
    ),
    ("extras.compare", "ckpt", "ckpt is no run directory"),
    (FIGURE1, "--limit 0", "--limit must be a whole number of at least 1"),
    (FIGURE1, "--task gsm8k --data-dir d", f"{DOWNLOAD} --dir d"),
    (FORGETTING, "absent.json", "absent.json: No such file"),
    (TRAIN, "--train-file ckpt", "ckpt: Is a directory"),
    (TRAIN, "--resume --overwrite", "--resume continues a run, --overwrite starts anew"),
    (
        TRAIN,
        "--resume",
        "--resume: runs/ckpt-toy-rosa has no args.json: nothing was saved there yet; run without "
        "--resume",
    ),
    (EVAL, "--max-new-tokens 250", "it exceeds the model's context of 256"),
    (MERGE, "--out ckpt", "ckpt exists already: delete it, or choose another --out"),
]


@pytest.mark.parametrize(
    "command, typed, message",
    FLAGS,
    ids=[f"{command.split()[0]} {typed}"[:60] for command, typed, _ in FLAGS],
)
def test_a_flag_that_cannot_be_is_refused(expect_error, command, typed, message):
    expect_error(f"{command} {typed}", message)


# meta has no numbers, hpu no module in PyTorch
@pytest.mark.parametrize("device", ["cuda:7", "abacus", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused(expect_error, device):
    expect_error(
        f"{EVAL} --device {device}", f"device '{device}' is not available", "choose auto, cpu"
    )


def test_options_of_a_method_that_are_none_are_refused(expect_error):
    pytest.importorskip("peft")
    command = f"{TRAIN} --method peft:LORA --peft-config options.json"
    expect_error(command, "options.json: No such file")
    Path("options.json").write_text("[1]")
    expect_error(command, "options.json holds list")
    Path("options.json").write_text('{"no_such": 1}')
    expect_error(command, "no_such")


def test_a_message_is_one_printable_line():
    assert (
        one_line("a\nb\t c\x1b[31m \ud800\u2028\u202e é日") == "a b c\\x1b[31m \\ud800 \\u202e é日"
    )
    long = one_line("where" + "x" * 10**4 + "what to do")
    assert long.startswith("where") and long.endswith("what to do") and len(long) < 700


# --- nothing that is read can run code ---

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNERS = {
    name
    for call in ("eval", "exec", "compile", "__import__")
    for name in (call, f"builtins.{call}")
}


def unsafe_code(source):
    """The imports and calls in a Python source that could run code out of a file that it reads."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            unsafe += [name for name in [*names, module] if name.split(".")[0] in PICKLES]
            unsafe += ["torch.load"] * (module == "torch" and "load" in names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads_pickle = (
                called.startswith("torch.")
                and called.endswith(".load")
                and options.get("weights_only") != "True"
            )
            numpy_allows_pickle = (
                called.split(".")[0] in ("np", "numpy")
                and options.get("allow_pickle", "False") != "False"
            )
            trusts_remote_code = options.get("trust_remote_code", "False") != "False"
            if called in RUNNERS or loads_pickle or numpy_allows_pickle or trusts_remote_code:
                unsafe.append(ast.unparse(node))
    return unsafe


def test_no_file_of_the_project_can_run_what_it_reads():
    environments = [file.parent for file in ROOT.glob("*/pyvenv.cfg")]
    files = [
        file
        for file in ROOT.rglob("*.py")
        if not any(part[0] == "." for part in file.relative_to(ROOT).parts)
        and not any(place in file.parents for place in environments)
    ]
    assert {"model.py", "tasks.py", "kernels.py", "fuzz.py"} <= {file.name for file in files}
    for file in files:
        assert unsafe_code(file.read_text(encoding="utf-8")) == [], file


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, dill as d",
        "from shelve import open",
        "exec(text)",
        "builtins.eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.jit.load(file)",
        "from torch import load",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_could_run_code_is_recognised(line):
    harmless = "torch.load(file, weights_only=True)\nimport eval\nre.compile('a')\nmodel.eval()"
    assert unsafe_code(line) and not unsafe_code(harmless)


def test_two_hundred_mutated_files_are_refused_cleanly_or_read_rightly(tmp_path):
    counts = fuzz.run(range(200), seed=0, directory=tmp_path)
    assert sum(count["cases"] for count in counts.values()) == 200 and set(counts) == set(
        fuzz.KINDS
    )
    assert all(count["refused"] > 0 for count in counts.values())
    assert sum(count["accepted"] for count in counts.values()) > 10
