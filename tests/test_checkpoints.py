"""Statements about `extras/checkpoints.py`: where a checkpoint is found, and what is said of one
that does not fit."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, assert_same_tensors, random_model, random_tokens, randomise_adapters
from rounding import assert_close, of_model
from safetensors.torch import load_file, save_file

import rosa
from data.errors import UserError
from extras import adapters, checkpoints
from extras.checkpoints import find_checkpoint, hub_cache, load_model
from extras.merge import merge_checkpoint
from model import Llama


def test_checkpoints_are_found_by_name(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("checkpoints/mine")
    assert (
        find_checkpoint("mine").samefile("checkpoints/mine")
        and find_checkpoint("tiny").name == "tiny"
    )
    with pytest.raises(
        UserError, match="no checkpoint 'other'.* names known are tiny, llama2-7b, "
    ):
        find_checkpoint("other")
    with pytest.raises(UserError, match="no config.json"):
        find_checkpoint("checkpoints")


@pytest.mark.parametrize("name", ["llama2-7b", "some.org/A-model_1"])
def test_a_name_is_looked_for_here_then_in_the_cache_of_hugging_face(
    tmp_path, monkeypatch, model, name
):
    repository = {"llama2-7b": "meta-llama/Llama-2-7b-hf"}.get(name, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "$PWD/cache")
    monkeypatch.setenv("PWD", str(tmp_path))
    with pytest.raises(UserError, match='To download it .*: python -c "from hugg.*"$') as error:
        find_checkpoint(name)
    code = str(error.value).partition('python -c "')[2][:-1]
    # What the line fetches, in any shell: its code has no double quote, dollar or backslash.
    assert not re.search(r'["$\\`!%]', code)
    fetched = []

    def snapshot_download(*given, **named):
        fetched.append((given, named))

    package = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    Path("line.py").write_text(code)
    runpy.run_path("line.py")
    ((repositories, options),) = fetched
    assert repositories == (repository,)
    wanted = "config.json tokenizer.model merges.txt chat_template.jinja tokenizer_config.json"
    wanted += " model-00001-of-00002.safetensors model.safetensors.index.json"
    unwanted = "pytorch_model.bin original/consolidated.00.pth consolidated.safetensors x.gguf"
    for files, is_wanted in ((wanted, True), (unwanted, False)):
        for file in files.split():
            assert any(fnmatch(file, each) for each in options["allow_patterns"]) is is_wanted, file

    cached = tmp_path / "cache" / ("models--" + repository.replace("/", "--"))
    model.save_pretrained(cached / "snapshots" / "0123abc")
    # No revision is the main one yet: what lies there is named
    with pytest.raises(UserError, match=f"refs/main does not name .*: --ckpt {cached}/snapshots/0"):
        find_checkpoint(name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("moved")
    with pytest.raises(UserError, match=f"refs/main does not name .*: --ckpt {cached}/snapshots/0"):
        find_checkpoint(name)
    (cached / "refs" / "main").write_text("0123abc")
    assert find_checkpoint(name) == cached / "snapshots" / "0123abc"
    # An adapter's config will name the checkpoint by its name on the Hub
    assert load_model(find_checkpoint(name)).name_or_path == repository
    (cached / "snapshots" / "0123abc" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(UserError, match="does not hold"):  # config.json alone is no checkpoint
        find_checkpoint(name)
    for nearer in (f"checkpoints/{name}", name):
        model.save_pretrained(nearer)
        assert find_checkpoint(name).samefile(nearer)
    # An adapter's config will name the directory, where PEFT finds it
    assert load_model(find_checkpoint(name)).name_or_path == str(tmp_path / name)


def test_of_pickled_weights_in_the_cache_a_line_says_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match="pickled weights only, pytorch_model.bin, .*Choose a ch"):
        find_checkpoint("a/b")


def test_an_adapter_in_the_cache_is_called_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    rosa.save_adapter(rosa.attach(random_model(), 2, 4), snapshot)
    with pytest.raises(UserError, match="is an adapter's directory"):
        find_checkpoint("a/b")
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "training_args.bin").write_text("")  # no weights
    with pytest.raises(UserError, match="does not hold a/b. To download it"):
        find_checkpoint("a/b")


@pytest.mark.parametrize(
    "variables, cache",
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "~/x"}, "home/x/huggingface/hub"),
        ({"HF_HOME": "$HOME/h", "XDG_CACHE_HOME": "x"}, "home/h/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "$HOME/old", "HF_HOME": "h"}, "home/old"),
        ({"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "old", "HF_HOME": "h"}, "home/new"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(tmp_path, monkeypatch, variables, cache):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == tmp_path / cache
    code = "from huggingface_hub.constants import HF_HUB_CACHE as cache; print(cache)"
    if find_spec("huggingface_hub"):  # the package agrees
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert shown.stdout.strip() == str(tmp_path / cache)


def test_an_adapter_is_no_checkpoint(tmp_path):
    rosa.save_adapter(rosa.attach(random_model(), 2, 4), tmp_path / "a")
    with pytest.raises(UserError, match="is an adapter's directory: give it by --adapter"):
        find_checkpoint(tmp_path / "a")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "outside, inside, context", [(64, None, 64), (64, 32, 64), (None, 32, 32), (None, None, 128)]
)
def test_the_context_before_scaling_may_stand_beside_rope_scaling(
    tmp_path, outside, inside, context
):
    """As transformers 5 has it; with neither it is max_position_embeddings."""
    scaling = ROPE | {"original_max_position_embeddings": 64}
    random_model(rope_scaling=scaling, max_position_embeddings=128).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": ROPE}
    if inside:
        raw["rope_scaling"] = ROPE | {"original_max_position_embeddings": inside}
    if outside:
        raw["original_max_position_embeddings"] = outside
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = load_model(tmp_path)
    expected = random_model(rope_scaling=ROPE | {"original_max_position_embeddings": context})
    assert torch.equal(found.inv_freq, expected.inv_freq)
    if not inside:
        with pytest.raises(ValueError, match="llama3' has no original_max_position_embeddings"):
            Llama.from_pretrained(tmp_path)


def test_files_with_a_byte_order_mark_are_read_as_those_without(tmp_path):
    model = rosa.attach(random_model(), 2, 4)
    random_model().save_pretrained(tmp_path)
    rosa.save_adapter(model, tmp_path / "a")
    for file in (tmp_path / "config.json", tmp_path / "a" / "adapter_config.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for load in (load_model, Llama.from_pretrained):
        for load_adapter in (adapters.load_adapter, rosa.load_adapter):
            assert rosa.adapters(load_adapter(load(tmp_path), tmp_path / "a"))


def test_one_tensor_in_two_files_is_refused_by_the_model_too(tmp_path):
    random_model().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = {
        "weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is in .*b.safetensors and in another file"):
        Llama.from_pretrained(tmp_path)


HOMES = (
    {},
    {"HF_HOME": "~/h"},
    {"XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "$HOME/h", "HF_HUB_CACHE": "/c"},
)


@pytest.mark.parametrize("environment", [*HOMES, {"HF_HUB_CACHE": "~/c", "XDG_CACHE_HOME": "/x"}])
def test_the_cache_is_where_hugging_face_has_it(monkeypatch, environment):
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert str(hub_cache()) == theirs


def shard(directory):
    """Split model.safetensors in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    where = {
        name: f"model-0000{1 + (i % 2)}-of-00002.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(where.values()):
        save_file(
            {name: tensors[name] for name in tensors if where[name] == file}, directory / file
        )
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_that_fits_is_loaded_as_from_pretrained_loads_it(tmp_path, tied, sharded):
    """In one file or in shards; the frequencies that old checkpoints hold are passed over by
    both."""
    model, tokens = random_model(tie_word_embeddings=tied), random_tokens(1, 9)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    if sharded:
        shard(tmp_path)
    for loaded in (
        Llama.from_pretrained(tmp_path),
        load_model(tmp_path),
        load_model(tmp_path, mapped=True),
    ):
        assert_same_tensors(loaded, model)
        assert_close(loaded(tokens), model(tokens), **of_model(model.config))
        assert not loaded.training
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_where_one_file_and_shards_lie_side_by_side_both_loaders_read_the_one(tmp_path, model):
    """So does transformers."""
    random_model(seed=5).save_pretrained(tmp_path)
    shard(tmp_path)
    model.save_pretrained(tmp_path)
    for load in (Llama.from_pretrained, load_model):
        assert_same_tensors(load(tmp_path), model)


def test_the_header_of_each_file_is_read_once(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path)
    shard(tmp_path)
    asked = []
    stored_tensors = checkpoints.stored_tensors
    monkeypatch.setattr(
        checkpoints,
        "stored_tensors",
        lambda directory: asked.append(1) or stored_tensors(directory),
    )
    load_model(tmp_path)
    assert asked == [1]


def test_what_the_scripts_load_is_what_an_edited_from_pretrained_loads(
    tmp_path, model, monkeypatch, capsys
):
    model.save_pretrained(tmp_path)

    @classmethod
    def doubled(cls, directory, device="cpu", dtype=None):
        model = from_pretrained(directory, device, dtype)
        model.lm_head.weight.data.mul_(2)
        return model

    from_pretrained = Llama.from_pretrained
    monkeypatch.setattr(Llama, "from_pretrained", doubled)
    assert torch.equal(load_model(tmp_path).lm_head.weight, 2 * model.lm_head.weight)
    line = "Llama.from_pretrained has been edited: loading by Llama.from_pretrained"
    assert line in capsys.readouterr().out


def test_a_checkpoint_that_was_saved_without_its_lm_head_lacks_a_prefix_only(tmp_path):
    """That is so where the embeddings are tied; else the lm_head is missing. Merged, it is a
    checkpoint like any other."""
    model, tokens = random_model(tie_word_embeddings=True, vocab_size=1024), random_tokens(1, 9)
    model.save_pretrained(tmp_path / "a")
    rosa.save_adapter(randomise_adapters(rosa.attach(model, rank=4)), tmp_path / "adapter")
    file = tmp_path / "a" / "model.safetensors"
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file
    )
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    change_config(tmp_path / "a", architectures=["LlamaModel"])
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    assert_same_tensors(rosa.load_adapter(loaded, tmp_path / "adapter"), model)
    assert_close(loaded(tokens), model(tokens), **of_model(model.config))
    merge_checkpoint(tmp_path / "a", tmp_path / "adapter", tmp_path / "merged")
    # Both are merged by one formula.
    assert_same_tensors(load_model(tmp_path / "merged"), rosa.merge(model))
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_model(tmp_path / "a")


def test_fused_tensors_are_taken_apart_and_merged_where_they_are_stored(tmp_path):
    """As Phi-3 and others store q, k and v as one tensor, and gate and up as another."""
    changes = {"attention_bias": True, "vocab_size": 1024, "max_position_embeddings": 256}
    model, tokens = random_model(**changes), random_tokens(1, 9)
    model.save_pretrained(tmp_path / "a")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    fused = fuse(tensors, len(model.model.layers))
    assert len(fused) < len(tensors)
    save_file(fused, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="is missing"):
        Llama.from_pretrained(tmp_path / "a")
    for mapped in (False, True):
        loaded = load_model(tmp_path / "a", mapped=mapped)
        assert_same_tensors(loaded, model)
        assert_close(loaded(tokens), model(tokens), **of_model(model.config))

    targets = "q,k,up"  # so that rows beside the adapted ones must stay
    rosa.save_adapter(
        randomise_adapters(rosa.attach(model, 4, targets=targets)), tmp_path / "adapter"
    )
    merge_checkpoint(tmp_path / "a", tmp_path / "adapter", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: x.shape for name, x in written.items()} == {
        name: x.shape for name, x in fused.items()
    }
    assert_same_tensors(load_model(tmp_path / "merged"), rosa.merge(model))


def fuse(tensors, num_layers):
    """The tensors of a checkpoint, with those of q, k and v in one, and those of gate and up."""
    fused = dict(tensors)
    for i in range(num_layers):
        for whole, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for leaf in ("weight", "bias"):
                names = [f"model.layers.{i}.{part}.{leaf}" for part in parts]
                if names[0] in fused:
                    rows = torch.cat([fused.pop(name) for name in names])
                    fused[f"model.layers.{i}.{whole}.{leaf}"] = rows
    return fused


def change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_context_that_config_json_does_not_state_is_said(tmp_path, capsys):
    scaling = {"rope_type": "linear", "factor": 2.0}
    random_model(rope_scaling=scaling).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.context == 256
    said = (
        "context    taken to be 256 tokens, not 128 as in config.json: linear scaling by 2.0 of "
        "what it has\n"
    )
    assert capsys.readouterr().out == said
    assert Llama.from_pretrained(tmp_path).config.context == 128
    # Written, the config says what it was taken to say.
    loaded.save_pretrained(tmp_path / "again")
    for load in (Llama.from_pretrained, load_model):
        assert load(tmp_path / "again").config.context == 256
    assert capsys.readouterr().out == ""
    for changes, said in (
        ({"sliding_window": 20}, "20 tokens, not 128 as in config.json: the sliding window\n"),
        ({}, ""),
    ):
        random_model(model_type="mistral", **changes).save_pretrained(tmp_path)
        load_model(tmp_path)
        assert capsys.readouterr().out == (said and f"context    taken to be {said}")


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EARLY = {  # how checkpoints of other times and writers put it: as transformers puts it
    "LLaMAForCausalLM": ({"architectures": ["LLaMAForCausalLM"]}, {}),
    "type": (
        {"rope_scaling": {"type": "llama3"} | SCALING},
        {"rope_scaling": {"rope_type": "llama3"} | SCALING},
    ),
}


@pytest.mark.parametrize("early, usual", EARLY.values(), ids=EARLY)
def test_early_spellings_are_those_of_now_and_model_py_refuses_them_by_name(tmp_path, early, usual):
    random_model(rope_scaling=None).save_pretrained(tmp_path)
    change_config(tmp_path, **usual)
    expected, tokens = Llama.from_pretrained(tmp_path), random_tokens(1, 100)
    change_config(tmp_path, **early)
    assert torch.equal(load_model(tmp_path)(tokens), expected(tokens))
    with pytest.raises(ValueError, match="LLaMAForCausalLM|has no rope_type"):
        Llama.from_pretrained(tmp_path)


def test_an_lm_head_other_than_the_embedding_that_it_is_tied_to_counts_here_and_in_what_is_written(
    tmp_path, capsys
):
    model, tokens = random_model(), random_tokens(1, 9)
    model.save_pretrained(tmp_path / "a")
    change_config(tmp_path / "a", tie_word_embeddings=True)
    for mapped in (False, True):
        loaded = load_model(tmp_path / "a", mapped=mapped)
        assert_same_tensors(loaded, model)
        assert_close(loaded(tokens), model(tokens), **of_model(model.config))
        assert not loaded.config.tie_word_embeddings
        assert "both are kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lm_head.weight belongs to no parameter"):
        Llama.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert_same_tensors(Llama.from_pretrained(tmp_path / "b"), model)
    assert capsys.readouterr().out == ""


def test_an_equal_copy_of_the_embedding_is_tied_to_it(tmp_path, capsys):
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    for mapped in (False, True):
        loaded = load_model(tmp_path, mapped=mapped)
        assert_same_tensors(loaded, model)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stated, expected", [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_tensors_of_several_dtypes_become_a_model_of_one(tmp_path, model, stated, expected):
    """That dtype is the one that the config names, or the widest; a checkpoint of one dtype stays
    as it is."""
    model.bfloat16().save_pretrained(tmp_path)
    change_config(tmp_path, torch_dtype="float32")
    assert load_model(tmp_path).dtype == torch.bfloat16
    change_config(tmp_path, torch_dtype=stated)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: x.float() if "norm" in name else x for name, x in tensors.items()}, file)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert_close(
        loaded(random_tokens(1, 9)),
        model(random_tokens(1, 9)),
        **of_model(model.config),
        dtype=torch.bfloat16,
    )
    with pytest.raises(ValueError, match="torch.bfloat16 and torch.float32: choose a dtype"):
        Llama.from_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_names_that_do_not_fit_are_shown_on_both_sides_and_a_pointer_is_called_one(tmp_path, model):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        ValueError,
        match="missing lm_head.weight; unexpected _orig_mod.lm_head.weight; missing model",
    ):
        load_model(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the weights: git lfs pull"):
        load_model(tmp_path)


UP, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"
MISFITS = [  # a tensor (None: taken away), what from_pretrained says of it, what load_model does
    (UP, torch.zeros(48, 32).char(), f"{UP} is torch.int8", f"{UP} is stored as I8"),
    (
        HEAD,
        torch.zeros(3, 5),
        "[3, 5], not floats [97, 32]",
        f"{HEAD} has shape [3, 5], config.json says [97, 32]",
    ),
    ("extra", torch.zeros(3), "the tensor extra belongs to no parameter", "unexpected extra"),
    (NORM, None, f"the tensor {NORM} is missing", f"missing {NORM}"),
]


def test_a_tensor_that_does_not_fit_is_named_and_by_load_model_all_of_them(tmp_path, model):
    model.save_pretrained(tmp_path)
    stored, file = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"

    def refused(load, changes):
        tensors = {
            name: tensor for name, tensor in (stored | changes).items() if tensor is not None
        }
        save_file(tensors, file)
        with pytest.raises(ValueError, match=str(tmp_path)) as error:
            load(tmp_path)
        return str(error.value)

    for name, tensor, plain, _ in MISFITS:
        assert plain in refused(Llama.from_pretrained, {name: tensor})
    message = refused(load_model, {name: tensor for name, tensor, *_ in MISFITS})
    assert all(diagnosis in message for *_, diagnosis in MISFITS)
