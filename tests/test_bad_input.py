"""A user's mistake, or a file that is not what it should be: one line that says where and what to
do, and nothing is left behind.

Each case breaks a good checkpoint, adapter or data file in one way and runs the scripts as a user
runs them."""

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
from helpers import ROOT, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as eval_script
import rosa
import train as train_script
from data import tasks, toy
from extras import adapters, checkpoints, compare, figure1, forgetting
from extras import merge as merge_file
from extras.commands import one_line
from model import Llama

CKPT, CONFIG, WEIGHTS = Path("ckpt"), Path("ckpt/config.json"), Path("ckpt/model.safetensors")
INDEX, TOKENIZER, SHARD = (
    CKPT / "model.safetensors.index.json",
    CKPT / "tokenizer.model",
    CKPT / "b.safetensors",
)
ADAPTER, ADAPTER_CONFIG = (
    Path("adapter/adapter_model.safetensors"),
    Path("adapter/adapter_config.json"),
)
DATA = Path("dataset/gsm8k/test.json")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of 1,024 tokens and a context of 256, an adapter for it, twelve examples."""
    directory = tmp_path_factory.mktemp("good")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(directory / CKPT)
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory / TOKENIZER)
    rosa.save_adapter(rosa.attach(model, 4, 8), directory / "adapter")
    (directory / DATA).parent.mkdir(parents=True)
    (directory / DATA).write_text(json.dumps(toy.examples("train", 12)))
    return directory


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A working directory with nothing but those."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.setattr(tasks, "TOY_SIZES", {"train": 40, "test": 2})


TRAIN = "--ckpt ckpt --max-len 200 --val-size 2 --max-steps 1".split()
SCRIPTS = {
    "train": (train_script, [*TRAIN, "--rank", "4"]),
    "train, any method": (train_script, TRAIN),
    "eval": (eval_script, "--ckpt ckpt --max-new-tokens 2".split()),
    "eval, adapter": (eval_script, "--ckpt ckpt --max-new-tokens 2 --adapter adapter".split()),
    "compare": (compare, []),
    "figure1": (figure1, "fig1.png --ckpt ckpt".split()),
    "forgetting": (forgetting, "--ckpt ckpt".split()),
    "merge": (merge_file, "--ckpt ckpt --adapter adapter --out merged".split()),
}


def tree():
    """Every path here, where a link leads, and what a file holds."""
    return {
        p: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes()
        for p in Path().rglob("*")
    }


def refused(capsys, script, arguments, *words):
    """Run a script: it ends in one printable line with these words, exit status 2, and nothing has
    changed."""
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
holds = later(
    lambda path, content: Path(path).write_bytes(
        content.encode() if isinstance(content, str) else content
    )
)
# As PEFT writes it, with none of our metadata
bare = later(lambda: save_file(load_file(ADAPTER), ADAPTER))
loop = later(lambda path: (path.unlink(), path.symlink_to(path.name)))


@later
def says(path, **changes):
    """Change keys of a JSON object; ... takes a key out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in value.items() if value is not ...}))


@later
def tensors(path, changes):
    """Replace the first tensor of a safetensors file whose name ends so, or add one; ... takes it
    out."""
    with safe_open(path, "pt") as file:
        held, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    held |= {
        next((name for name in held if name.endswith(end)), end): value
        for end, value in changes.items()
    }
    save_file({name: value for name, value in held.items() if value is not ...}, path, about)


@later
def metadata(text=None, **changes):
    """The adapter's safetensors metadata, under "rosa": another text, or with changes."""
    with safe_open(ADAPTER, "pt") as file:
        text = text or json.dumps(json.loads(file.metadata()["rosa"]) | changes)
    save_file(load_file(ADAPTER), ADAPTER, {"rosa": text})


@later
def shards(lm_head="b.safetensors", index=None):
    """The checkpoint in two files with an index. lm_head: where that says its weight is; index:
    what it is instead."""
    held = load_file(WEIGHTS)
    files = {name: SHARD.name if name == "lm_head.weight" else "a.safetensors" for name in held}
    for file in set(files.values()):
        save_file({name: value for name, value in held.items() if files[name] == file}, CKPT / file)
    WEIGHTS.unlink()
    INDEX.write_text(index or json.dumps({"weight_map": files | {"lm_head.weight": lm_head}}))


# --- checkpoints ---

NOT_WHOLE, NOT_JSON = (
    ("ckpt/model.safetensors", "download"),
    ("ckpt/config.json", "not a JSON", "download"),
)
MISFIT, NORM = ("ckpt: the tensors do not fit", "Download"), "model.norm.weight"
HUNDREDS = {f"x{i}\x1b": torch.ones(1) for i in range(500)}
PICKLED = (
    "pickled weights (pytorch_model.bin), which can run code",
    "convert to model.safetensors",
)
OUTSIDE = (f"{INDEX} names a file outside", "download")
CHECKPOINTS = {  # name -> (what breaks the checkpoint, words of the line)
    "a file": (
        each(gone(CKPT), holds(CKPT, "")),
        "no checkpoint 'ckpt': neither a directory",
        "tiny, llama2-7b",
    ),
    "config a link to itself": (loop(CONFIG), "'ckpt' has no config.json", "give that of"),
    "config no JSON": (holds(CONFIG, "{"), *NOT_JSON),
    "config an array": (holds(CONFIG, "[1]"), *NOT_JSON),
    "config too deep": (holds(CONFIG, "[" * 10**5), *NOT_JSON),
    "without tokenizer": (gone(TOKENIZER), "ckpt has no tokenizer.model", "download"),
    "tokenizer empty": (holds(TOKENIZER, ""), "ckpt/tokenizer.model is not a", "download"),
    "tokenizer too large": (
        says(CONFIG, vocab_size=500),
        "tokenizer has 1024 tokens, the model only 500",
        "download",
    ),
    "weights a link to themselves": (loop(WEIGHTS), "ckpt has no model.safetensors", "download"),
    "index a link to itself": (
        each(shards(), loop(INDEX)),
        "ckpt has no model.safetensors",
        "download",
    ),
    "pickled weights": (lambda: WEIGHTS.rename(CKPT / "pytorch_model.bin"), *PICKLED),
    "header no JSON": (holds(WEIGHTS, struct.pack("<Q", 200) + b"{" * 200), *NOT_WHOLE),
    "wrong dtype": (
        tensors(WEIGHTS, {NORM: torch.ones(32, dtype=torch.int8)}),
        f"{NORM} is stored as I8",
        *MISFIT,
    ),
    "shape": (
        tensors(WEIGHTS, {NORM: torch.ones(4, 8)}),
        f"{NORM} has shape [4, 8], config.json says [32]",
        *MISFIT,
    ),
    "more than memory holds": (
        says(CONFIG, hidden_size=2**24, vocab_size=2**24),
        "[16777216, 16777216]",
        *MISFIT,
    ),
    "tensor missing": (tensors(WEIGHTS, {NORM: ...}), f"missing {NORM}", *MISFIT),
    "hundreds of tensors": (
        tensors(WEIGHTS, HUNDREDS),
        "unexpected x101\\x1b; and 495 more",
        *MISFIT,
    ),
    "index no JSON": (shards(index="{"), f"{INDEX} is not a JSON", "download"),
    "index too deep": (
        shards(index='{"weight_map":' * 10**5),
        f"{INDEX} is not a JSON",
        "download",
    ),
    "index without a map": (
        shards(index='{"weight_map": [1]}'),
        f"{INDEX} has no weight_map",
        "download",
    ),
    "shard absent": (shards("c\0"), f"{INDEX} names c\\x00, which is absent", "download"),
    "shard a link to itself": (
        each(shards(), loop(SHARD)),
        "b.safetensors, which is absent",
        "download",
    ),
    "shard outside": (shards("../adapter/adapter_model.safetensors"), *OUTSIDE, "ckpt/../adapter"),
    "shard absolute": (shards("/etc/passwd"), *OUTSIDE, "/etc/passwd"),
    "shard the directory itself": (shards(".."), *OUTSIDE),
    "in two shards": (
        each(shards(), tensors(SHARD, {NORM: torch.ones(32)})),
        f"{NORM} is in ckpt/a.safetensors and",
    ),
}


@pytest.mark.parametrize("script", ["eval", "merge"])
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = CHECKPOINTS[what]
    breaking()
    refused(capsys, script, [], *words)


FILES_READ = [("train", WEIGHTS, "download"), ("eval, adapter", ADAPTER, "copy")]


@pytest.mark.parametrize("script, path, verb", FILES_READ)
def test_a_file_cut_short_anywhere_or_too_long_is_refused(here, capsys, script, path, verb):
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]  # of the header
    lengths = 0, 7, 8, end - 1, end, len(whole) // 2, len(whole) - 1
    for content in [*(whole[:length] for length in lengths), whole + b"\0"]:
        path.write_bytes(content)
        refused(capsys, script, [], f"{path} is not a whole safetensors file", f"{verb} it again")


@pytest.mark.parametrize("script, path, verb", FILES_READ)
def test_a_file_that_may_not_be_read_is_said_to_be_that(
    here, capsys, monkeypatch, script, path, verb
):
    def denied(file, *how):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *how)

    for module in (checkpoints, adapters):
        monkeypatch.setattr(module, "open", denied, raising=False)
    refused(capsys, script, [], f"{path}: Permission denied")


@pytest.mark.parametrize("revision", [b"../../../ckpt", b"a\0b", b"\xff"])
def test_what_hugging_faces_cache_calls_main_lies_in_the_cache(here, capsys, revision):
    main = Path("no cache/models--some--model/refs/main")
    (main.parent.parent / "snapshots").mkdir(parents=True)
    main.parent.mkdir()
    main.write_bytes(revision)
    refused(
        capsys,
        "eval",
        ["--ckpt", "some/model"],
        "does not hold some/model",
        "hf download some/model",
    )


def test_a_shard_may_be_a_link_as_in_hugging_faces_cache(here):
    expected = Llama.from_pretrained(CKPT).state_dict()
    shards()()
    Path("blobs").mkdir()
    for file in CKPT.glob("*"):
        shutil.move(file, Path("blobs") / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    for name, value in checkpoints.load_model(CKPT).state_dict().items():
        assert torch.equal(value, expected[name])


NEEDED = "model_type vocab_size hidden_size intermediate_size".split()
NEEDED += ["num_attention_heads", "num_hidden_layers"]
LIMITED = [
    *NEEDED[1:-1],
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
]
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2}
NAN = float("nan")
CONFIGS = [  # changes, of which the last one's key the line names
    *({name: ...} for name in NEEDED),
    *({name: 2**24 + 1} for name in LIMITED),
    {"num_hidden_layers": 2**10 + 1},
    *({name: x} for name in ("vocab_size", "head_dim") for x in (0, 2.5, "8", True)),
    {"head_dim": 2**10, "num_key_value_heads": 2**20, "num_attention_heads": 2**20},
    {"num_attention_heads": 5},
    {"head_dim": 7},
    *({"model_type": x} for x in ("gemma", ["llama"])),
    *({"architectures": x} for x in (["GemmaForCausalLM"], 3)),
    {"layer_types": 3},
    {"rms_norm_eps": NAN},
    *({"rope_theta": x} for x in (-1, 10**400, 1e-300)),
    *(
        {"rope_scaling": x}
        for x in ({"rope_type": "linear", "factor": NAN}, {"rope_type": ["linear"]}, [1])
    ),
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}},
    *({name: "no"} for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")),
    *({"eos_token_id": x} for x in ("</s>\x1b[2J\ud800", [[[2]]])),
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: f"{changes}"[:60])
def test_a_config_that_asks_for_what_cannot_be_is_refused_by_its_key(here, capsys, changes):
    says(CONFIG, **changes)()
    refused(capsys, "eval", [], "ckpt", list(changes)[-1])


def test_a_whole_number_beyond_64_bits_is_a_number(here):
    says(CONFIG, rope_theta=10**30, rms_norm_eps=10**30)()
    assert checkpoints.load_model(CKPT)(torch.zeros(1, 2, dtype=torch.long)).isfinite().all()


# --- adapters ---

OTHER, COPY = "adapter was trained on another model: ", "copy"
Q_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
NO_ADAPTER = "adapter is no adapter directory"
SETTING, RANK = f"{ADAPTER_CONFIG}: ", "rank must be a whole number of at least 1, not "
PICKLE = "no adapter_model.safetensors, only adapter_model.bin, a pickle, which can run code"
ADAPTERS = {  # name -> (what breaks the adapter, words of the line)
    "missing": (gone("adapter"), NO_ADAPTER, "no adapter_config.json"),
    "pickled": (lambda: ADAPTER.rename("adapter/adapter_model.bin"), NO_ADAPTER, PICKLE),
    "another rank": (says(ADAPTER_CONFIG, r=3), OTHER, "is [4, 32], this one needs [3, 32]"),
    "tensor missing": (
        tensors(ADAPTER, {"lora_B.weight": ...}),
        OTHER,
        "is absent, this one needs",
    ),
    "tensor extra": (tensors(ADAPTER, {"more": torch.ones(1)}), "holds more, which is in no layer"),
    "no tensors": (
        lambda: save_file({}, ADAPTER),
        "names the modules q_proj, k_proj, the file holds tensors of none",
    ),
    "a target without tensors": (
        says(ADAPTER_CONFIG, target_modules=["q_proj", "k_proj", "v_proj"]),
        "adapter_config.json names the modules q_proj, k_proj, v_proj, the file holds tensors of "
        "q_proj, k_proj",
    ),
    "tensors without a target": (
        says(ADAPTER_CONFIG, target_modules="no.*such"),
        "names the modules none, the file",
    ),
    "metadata of other targets": (
        metadata(targets=["q", "z"]),
        "says that it adapts ['q', 'z'], and holds tensors of",
    ),
    "tensor of integers": (
        tensors(ADAPTER, {Q_B: torch.ones(32, 4, dtype=torch.int32)}),
        f"{Q_B} is",
    ),
    "config an array": (
        holds(ADAPTER_CONFIG, "[1]"),
        f"{ADAPTER_CONFIG} holds list, not a JSON object",
    ),
    "method no text": (
        says(ADAPTER_CONFIG, peft_type=["LORA"]),
        SETTING,
        "the key 'peft_type'",
        COPY,
    ),
    "method unknown": (says(ADAPTER_CONFIG, peft_type="LOAR"), "LOAR"),
    "rank no number": (says(ADAPTER_CONFIG, r=True), SETTING, f"{RANK}True"),
    "rank negative, its root too": (
        says(ADAPTER_CONFIG, r=-4, use_rslora=True),
        SETTING,
        f"{RANK}-4",
    ),
    "alpha NaN": (
        says(ADAPTER_CONFIG, lora_alpha=NAN),
        SETTING,
        "alpha must be a positive number, not nan",
    ),
    "alpha no number": (
        says(ADAPTER_CONFIG, lora_alpha="8"),
        SETTING,
        "alpha must be a positive number, not '8'",
    ),
    "DoRA": (says(ADAPTER_CONFIG, use_dora=True), SETTING, "use_dora = True is not implemented"),
    "of other base weights": (
        says(ADAPTER_CONFIG, init_lora_weights="pissa"),
        SETTING,
        "init_lora_weights = 'pissa'",
    ),
    "PEFT's own": (
        each(bare(), says(ADAPTER_CONFIG, r=3)),
        OTHER,
        "is [4, 32], this one needs [3, 32]",
    ),
    "metadata no JSON": (metadata("{"), f"metadata of {ADAPTER}", COPY),
    "metadata no object": (metadata("[4]"), f"of {ADAPTER}", COPY),
    "ratio NaN": (metadata(low_freq_ratio=NAN), "low_freq_ratio must be in (0, 1], not nan"),
    "ratio no number": (
        metadata(low_freq_ratio="0.5"),
        "low_freq_ratio must be in (0, 1], not '0.5'",
    ),
    "pairs unknown": (metadata(pairs=["low"]), "pairs must be low, high or random, not ['low']"),
    "rows beyond the ratio": (
        tensors(ADAPTER, {Q_B: torch.ones(32, 4)}),
        f"{Q_B} is not zero outside",
    ),
}


@pytest.mark.parametrize("script", ["eval, adapter", "merge"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_none_is_refused(here, capsys, what, script):
    breaking, *words = ADAPTERS[what]
    breaking()
    refused(capsys, script, [], *words)


def test_an_adapters_metadata_decides_which_rows_adapt_and_nothing_else(here):
    metadata(rank=3, alpha=9, size=4)()
    settings = rosa.attach_arguments(adapters.load_adapter(checkpoints.load_model(CKPT), "adapter"))
    assert settings == {
        "rank": 4,
        "alpha": 8,
        "low_freq_ratio": 0.5,
        "targets": ["q", "k"],
        "pairs": "low",
    }


# --- data ---


def array(text):
    """JSON of one record, whose instruction this is."""
    return f'[{{"instruction": {text}, "output": "b", "answer": "1"}}]'


ONE, EMPTY, NONE = array('"a"')[1:-1], array('""')[1:-1], "test.json must hold at least one example"
FILES = {  # name -> (what the file holds, words of the line)
    "an empty array": ("[]", NONE),
    "only spaces": (" \n ", NONE),
    "no UTF-8": (b'["\xff"]', "test.json is not text in UTF-8: invalid start byte at byte 2"),
    "too deep": ("[" * 10**5, "test.json: not JSON"),
    "a number of 5,000 digits": (f"[{'9' * 5000}]", "test.json: not JSON"),
    "a line cut short": (
        f'{ONE}\n\n{{"instruction": "a", "output"\n',
        "test.json, line 3: not JSON: Expecting",
    ),
    "a record that is a number": ("[1]", "test.json, record 0: not an object but int"),
    "a field missing": (
        f'[{ONE}, {{"instruction": "a"}}]',
        "test.json, record 1 has no '",
        "', only 'instruction': ",
    ),
    "halves of two pairs": (
        '[{"prompt": "a", "question": "b"}]',
        "0 has no '",
        "', only 'prompt', 'question': rename",
    ),
    "a record without fields": (
        "[{}]",
        "record 0 has no 'instruction' and no '",
        "', only {}: rename or add fields",
    ),
    "a field null": (
        array("null"),
        "test.json: the field 'instruction' is empty in record 0: delete it, or leave it",
    ),
    "fields empty": (
        f"{EMPTY}\n{ONE}\n{EMPTY}",
        "'instruction' is empty in 2 records, the first is line 1: delete them",
    ),
    "an input a list": (
        ONE[:-1] + ', "input": [3]}',
        "test.json, line 1: the field 'input' is not text but [3]",
    ),
    "an object over lines": (
        ONE.replace(",", ",\n"),
        "test.json holds a JSON object over several lines: put it in [ ]",
    ),
    "a prompt a list": (
        '[{"prompt": [{}], "completion": "b", "answer": "1"}]',
        "record 0: the field 'prompt' is not",
    ),
    "half a character": (
        ONE[:-1] + ', "input": "\\ud800"}',
        "the field 'input' holds half a character, which",
    ),
    "too long": (array(json.dumps("a b " * 1000)), "tokens"),
}
READ_DATA = {
    "train": ["--train-file", DATA],
    "eval": ["--task", "gsm8k", "--data-dir", "."],
    "forgetting": [DATA],
}


@pytest.mark.parametrize("script", READ_DATA)
@pytest.mark.parametrize("what", FILES)
def test_a_data_file_that_is_none_is_refused_by_its_record(here, capsys, what, script):
    content, *words = FILES[what]
    holds(DATA, content)()
    refused(capsys, script, READ_DATA[script], *words)


ANSWERS = [
    ("gsm8k", "-1,000.5", "inf"),
    ("gsm8k", "1", "one"),
    ("AQuA", "A", "F"),
    ("boolq", "true", "True"),
]


@pytest.mark.parametrize("name, right, wrong", ANSWERS)
def test_an_answer_that_no_response_can_give_is_refused(here, capsys, name, right, wrong):
    file = Path("dataset") / name / "test.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps([{"instruction": "a", "answer": answer} for answer in (right, wrong)])
    )
    refused(
        capsys,
        "eval",
        ["--task", name, "--data-dir", "."],
        f"{file}, record 1: the answer {wrong!r} is not a",
    )


@pytest.mark.parametrize(
    "content, message", [(b"", "holds no text"), (b"\xff", "is not text in UTF-8")]
)
def test_a_text_that_is_none_is_refused(here, capsys, content, message):
    Path("notes.txt").write_bytes(content)
    refused(capsys, "forgetting", ["notes.txt"], f"notes.txt {message}")


def test_an_example_that_is_too_long_is_named_by_its_place_in_the_file(here, capsys):
    long = {"instruction": "Add 1 and 2. " * 99, "output": "3"}
    examples = [{"instruction": "Add.", "output": ""}, long | {"instruction": "Add."}, long]
    Path("data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    refused(capsys, "forgetting", ["data.jsonl", "--skip-empty"], "data.jsonl, line 3: ", "exceed")


# --- flags ---

DOWNLOAD = "python data/download.py all"
DEVICES = "cuda:7", "abacus", "meta", "hpu"  # meta has no numbers, hpu no module
COUNTS = "rank", "select-every", "max-steps"
OLD = {
    "--compare a": "compare RUN",
    "--activations=a.png": "figure1 PNG",
    "--loss a": "forgetting FILE",
}
FLAGS = [  # (script, arguments, words of the line)
    ("eval", "--ckpt llama2-7b", "hf download meta-llama/Llama-2-7b-hf --include"),
    ("eval", ["--ckpt", "a\nb\x1b[2J" + "c" * 200], "no checkpoint", "a\\nb\\x1b[2J"),
    ("train", "--task algebra", "task 'algebra'", "choose from toy"),
    ("eval", "--task gsm8k,algebra", "unknown task 'algebra': choose from", "toy, "),
    ("train", "--rnak 3", "unrecognized arguments: --rnak"),
    ("train", "--rank x", "--rank must be a whole number of at least 1, not x"),
    *(("train", f"--{x} 0", f"--{x} must be a whole number of at least 1") for x in COUNTS),
    *(
        ("train", f"--low-freq-ratio {x}", f"--low-freq-ratio must be in (0, 1], not {x}")
        for x in (0, 2)
    ),
    ("train", "--k-ratio nan", "--k-ratio must be in (0, 1], not nan"),
    ("train", "--lr=nan", "--lr must be a positive number, not nan"),
    ("train", "--alpha -1", "--alpha must be a positive number, not -1"),
    ("train", "--score-ema nan", "--score-ema must be in [0, 1), not nan"),
    ("train", "--targets q,z", "--targets has the unknown target 'z'", "choose from q,k,v"),
    ("train", f"--seed {2**70}", "--seed must be a whole number from 0 to 2^32 - 1"),
    ("train", "--batch-size 6", "--batch-size 6 is not a multiple of --micro-batch-size 4"),
    ("train", "--max-len 300", "--max-len 300 exceeds the model's context of 256"),
    ("train", "--max-len 9", "0 of 40 examples have at most --max-len 9 tokens"),
    ("train", "--task arithmetic", DOWNLOAD),
    ("eval", "--task arithmetic --data-dir d", f"{DOWNLOAD} --dir d"),
    ("train", "--method rose", "--method 'rose' is unknown"),
    ("train", "--method lora --pairs low", "--pairs is no option of --method lora"),
    (
        "train",
        "--method peft:IA3",
        "--rank is no option",
        "give its own options with --peft-config",
    ),
    ("train, any method", "--method full --dtype bfloat16", "--method full needs --dtype float32"),
    ("train", "--pairs slow", "--pairs", "invalid choice: 'slow'"),
    ("train", "--shard", "--shard needs several processes: torchrun"),
    ("train", "--out ckpt", "--out ckpt is the checkpoint itself"),
    ("train", f"--out {DATA}", f"--out {DATA} is a file: choose a directory"),
    ("eval", f"--out {DATA}", str(DATA)),
    ("eval", "--score likelihood", "toy is not multiple choice: choose from AQuA"),
    ("eval", ["--prompt", " "], "--prompt is empty"),
    ("eval", ["--prompt", "a\udcff"], "--prompt is empty, or not text in UTF-8"),
    ("eval", ["--prompt", "a b " * 200], "--prompt has ", "no room for an answer"),
    ("compare", "ckpt", "ckpt is no run directory"),
    ("figure1", "--limit 0", "--limit must be a whole number of at least 1"),
    ("figure1", "--task gsm8k --data-dir d", f"{DOWNLOAD} --dir d"),
    *(
        ("eval", old, f"is a command of its own now: python -m extras.{command}")
        for old, command in OLD.items()
    ),
    ("forgetting", "absent.json", "absent.json: No such file"),
    ("train", "--train-file ckpt", "ckpt: Is a directory"),
    *(
        ("eval", f"--device {x}", f"device '{x}' is not available", "choose auto, cpu")
        for x in DEVICES
    ),
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
            loads = (
                called.startswith("torch.")
                and called.endswith(".load")
                and options.get("weights_only") != "True"
            )
            numpy = (
                called.split(".")[0] in ("np", "numpy")
                and options.get("allow_pickle", "False") != "False"
            )
            if (
                called in RUNNERS
                or loads
                or numpy
                or options.get("trust_remote_code", "False") != "False"
            ):
                bad.append(ast.unparse(node))
    return bad


def test_no_file_of_the_project_can_run_what_it_reads():
    files = [
        file
        for file in ROOT.rglob("*.py")
        if not any(part[0] == "." for part in file.relative_to(ROOT).parts)
    ]
    assert {"model.py", "tasks.py", "kernels.py", "fuzz.py"} <= {file.name for file in files}
    assert {
        str(file): bad for file in files if (bad := violations(file.read_text(encoding="utf-8")))
    } == {}


BAD = [
    "import pickle",
    "import os, dill as d",
    "from shelve import open",
    "exec(text)",
    "builtins.eval(text)",
]
BAD += [
    "torch.load(file)",
    "torch.load(file, weights_only=False)",
    "torch.jit.load(file)",
    "from torch import load",
]
BAD += [
    "np.load(file, allow_pickle=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
]


@pytest.mark.parametrize("line", BAD)
def test_what_could_run_code_is_recognised(line):
    harmless = "torch.load(file, weights_only=True)\nimport eval\nre.compile('a')\nmodel.eval()"
    assert violations(line) and not violations(harmless)


def test_two_hundred_mutated_files_are_refused_cleanly_or_read_rightly(tmp_path):
    counts = fuzz.run(range(200), seed=0, directory=tmp_path)
    assert sum(count["cases"] for count in counts.values()) == 200 and set(counts) == set(
        fuzz.KINDS
    )
    assert all(count["refused"] > 0 for count in counts.values())
    assert sum(count["accepted"] for count in counts.values()) > 10
