"""Statements about `python -m extras.merge`: a whole checkpoint or nothing, what `merge` makes, in
little memory."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, random_model, random_tokens, randomise_adapters
from rounding import assert_close, bound, of_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rosa
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import checkpoints
from extras import merge as merge_file
from extras.checkpoints import load_model
from model import Llama

pytestmark = pytest.mark.numeric
ROOT = Path(rosa.__file__).parent
ALL = "q,k,v,o,gate,up,down"


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A bfloat16 checkpoint `ckpt` and a trained adapter `adapter` for it in an empty working
    directory."""
    monkeypatch.chdir(tmp_path)
    model = random_model(vocab_size=1024, max_position_embeddings=256, dtype=torch.bfloat16)
    model.save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    Path("ckpt/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    Path("ckpt/training_args.bin").write_text("a pickle")
    rosa.save_adapter(randomise_adapters(rosa.attach(model, 4, 8, 0.5, ALL)), "adapter")


def merge(*arguments):
    merge_file.run(["--ckpt", "ckpt", "--adapter", "adapter", "--out", "out", *arguments])


ENDS = [  # eos_token_id in config.json, in generation_config.json; then the same as merged
    (0, 0, [0, 2], [0, 2]),
    (0, [7, 0], [0, 2], [7, 0, 2]),
    (None, 0, None, [0, 2]),
    (0, None, [0, 2], [0, 2]),  # transformers does not look into config.json then
    (None, None, None, 2),
    ([2, 7], 2, [2, 7], 2),
]


@pytest.mark.parametrize("config, generation, config_after, generation_after", ENDS)
def test_every_token_that_ends_an_answer_is_named(
    ckpt, config, generation, config_after, generation_after
):
    """tokenizer.model ends a text with id 2. Training ends every response with it."""
    for name, stated in (("config", config), ("generation_config", generation)):
        file = Path(f"ckpt/{name}.json")
        raw = json.loads(file.read_text()) | {"eos_token_id": stated}
        file.write_text(json.dumps({key: raw[key] for key in raw if raw[key] is not None}))
    merge()
    for name, expected in (("config", config_after), ("generation_config", generation_after)):
        assert json.loads(Path(f"out/{name}.json").read_text()).get("eos_token_id") == expected


def test_no_byte_order_mark_is_handed_on(ckpt):
    """Others cannot read a JSON file that has one."""
    Path("ckpt/tokenizer_config.json").write_text('{"add_bos_token": true}')
    for file in Path("ckpt").glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    merge()
    assert all(file.read_bytes()[:1] == b"{" for file in Path("out").glob("*.json"))


def test_what_is_no_weight_and_no_pickle_comes_along(ckpt):
    kept = "LICENSE LICENSE.txt NOTICE USE_POLICY.md tekken.json vocab.txt chat_template.jinja"
    kept += " x.jinja README.md additional_chat_templates/tool.jinja"
    left = "pytorch_model.bin pytorch_model.bin.index.json consolidated.00.pth training.pkl"
    left += " a.gguf flax_model.msgpack .gitattributes args.json log.jsonl adapter_config.json"
    left += " original/params.json original/consolidated.00.pth"
    for name in (kept + " " + left).split():
        Path("ckpt", name).parent.mkdir(exist_ok=True)
        Path("ckpt", name).write_text(name)
    merge()
    found = {
        file.relative_to("out").as_posix() for file in Path("out").rglob("*") if file.is_file()
    }
    ours = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert found == ours | set(kept.split())
    assert Path("out/LICENSE").read_text() == "LICENSE"


@pytest.mark.parametrize("shard", [5 * 10**9, 20000, 1])
def test_the_directory_is_complete_and_holds_what_merging_in_memory_gives(
    ckpt, capsys, shard, monkeypatch
):
    monkeypatch.setattr(merge_file, "SHARD", shard)
    merge("--out", "a/b/out")  # a and a/b are made too
    assert capsys.readouterr().out.startswith("a/b/out holds the merged checkpoint.")
    out, merged = Path("a/b/out"), Llama.from_pretrained("a/b/out")
    expected = rosa.merge(rosa.load_adapter(Llama.from_pretrained("ckpt"), "adapter"))
    assert merged.config == expected.config and merged.config.eos_token_id == [2, 7]
    assert_same_tensors(merged, expected)  # to the bit: rosa.merge makes both
    assert (out / "config.json").read_bytes() == Path("ckpt/config.json").read_bytes()
    weights = sorted(file.name for file in out.glob("*.safetensors"))
    others = {file.name for file in out.iterdir()} - set(weights)
    assert others - {"model.safetensors.index.json"} == {
        "config.json",
        "generation_config.json",
        "tokenizer.model",
    }
    if shard > 10**9:
        assert weights == ["model.safetensors"] and len(others) == 3
        return
    dtypes = {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    assert checkpoints.DTYPES == dtypes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in weights for name in load_file(out / file)}
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in merged.parameters())
    assert weights[0] == f"model-00001-of-{len(weights):05}.safetensors"
    for file in weights:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_says_what_rounding_has_cost_which_is_nothing_in_float32(ckpt, capsys, dtype):
    Llama.from_pretrained("ckpt", dtype=dtype).save_pretrained("ckpt")
    merge()
    words = capsys.readouterr().out.split()
    exact = rosa.load_adapter(Llama.from_pretrained("ckpt", dtype=torch.float32), "adapter")
    rounded = Llama.from_pretrained("out", dtype=torch.float32)
    prompts = [
        tasks.encode_prompt(example, load_tokenizer("ckpt")) for example in toy.examples("test", 4)
    ]
    with torch.inference_mode():
        logits = [
            torch.cat([model(torch.tensor([prompt]))[0] for prompt in prompts])
            for model in (exact, rounded)
        ]
    before, after = logits
    moved, rounding = (
        (after - before).abs().max().item(),
        bound(**of_model(exact.config)) * before.abs().max().item(),
    )
    printed = float(words[words.index("by") + 1])
    assert printed == pytest.approx(moved, rel=0.06, abs=rounding) and (printed < rounding) == (
        dtype == torch.float32
    )
    assert int(words[words.index("next") - 1]) == len(before)
    # Where the two largest logits are equal but for rounding, either may be the next token
    first, second = before.topk(2).values.unbind(-1)
    same, ties = (before.argmax(-1) == after.argmax(-1)).sum(), (first - second < rounding).sum()
    assert abs(int(words[words.index("tokens") + 1]) - same) <= ties


def test_an_lm_head_other_than_the_embedding_that_it_is_tied_to_is_kept_and_untied(ckpt, capsys):
    config = json.loads(Path("ckpt/config.json").read_text())
    Path("ckpt/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    expected = rosa.merge(rosa.load_adapter(load_model("ckpt"), "adapter"))
    merge()
    assert "both are kept, and untied" in capsys.readouterr().out
    assert not json.loads(Path("out/config.json").read_text())["tie_word_embeddings"]
    assert_same_tensors(Llama.from_pretrained("out"), expected)


MISTAKES = {
    "--out ckpt": "ckpt exists already",
    "--out half": "half.partial exists already",
    "--ckpt absent": "no checkpoint 'absent'",
    "--adapter absent": "absent is no adapter directory",
    "--adapter ckpt": "it has no adapter_config.json; it is a whole checkpoint: --ckpt ckpt",
    "--adapter ia3": (
        "is an adapter of type IA3, which rosa.merge cannot merge: load both with the package peft"
    ),
    "--adapter other": "other was trained on another model: base_model.model.model.layers.2",
    "--rank 3": "unrecognized arguments: --rank 3",
}


@pytest.mark.parametrize("arguments, message", MISTAKES.items())
def test_a_mistake_is_one_line_and_nothing_is_left_behind(ckpt, capsys, arguments, message):
    Path("half.partial").mkdir()
    rosa.save_adapter(rosa.attach(random_model(num_hidden_layers=2), 4, 8), "other")
    shutil.copytree("adapter", "ia3")
    Path("ia3/adapter_config.json").write_text('{"peft_type": "IA3"}')
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        merge(*arguments.split())
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and error.count("\n") == 1
        and error.startswith("merge: ")
        and message in error
    )
    assert sorted(Path().rglob("*")) == before


def test_what_fails_half_way_leaves_nothing(ckpt, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge_file.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
        with pytest.raises(SystemExit):
            merge()
    assert "needs 0.0 GB, only 0.0 are free" in capsys.readouterr().err

    def no_space(*_, **__):
        Path("out.partial/model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_file, "save_file", no_space)
    with pytest.raises(SystemExit) as stopped:
        merge()
    assert stopped.value.code == 130
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "ckpt"]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2"}])
def test_logits_layer_by_layer_are_the_logits_and_leave_nothing_in_memory(changes):
    model, tokens = random_model(**changes), random_tokens(2, 20)
    weights = dict(model.named_parameters())  # tied weights are here once, as in a file
    with torch.device("meta"):
        empty = Llama(model.config)
    logits = merge_file.logits_layer_by_layer(empty, tokens, weights.get)
    assert_close(logits, model(tokens), **of_model(model.config))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_what_is_written_has_the_names_of_the_checkpoints_files(ckpt, monkeypatch):
    """As if a reader had taught checkpoints.py a family whose files have other names. Whoever reads
    the checkpoint, by whatever names, reads the merged one."""
    expected = rosa.merge(rosa.load_adapter(Llama.from_pretrained("ckpt"), "adapter"))
    theirs = {"a tensor that is no parameter, rotary_emb.inv_freq": torch.ones(3)}
    for name, tensor in load_file("ckpt/model.safetensors").items():
        name = name.replace("model.layers.", "blocks.").replace("self_attn", "attn")
        theirs[name] = tensor
    save_file(theirs, "ckpt/model.safetensors")
    monkeypatch.setattr(
        checkpoints,
        "parameter_name",
        lambda name: name.replace("blocks.", "model.layers.").replace("attn", "self_attn"),
    )
    merge()
    written = load_file("out/model.safetensors")
    assert {name: x.shape for name, x in written.items()} == {
        name: x.shape for name, x in theirs.items()
    }
    assert_same_tensors(load_model("out"), expected)


EDITED = {
    "forward": (rosa.RoAE, "forward", lambda self, x: self.linear(x) * 1.01),
    "merge": (
        rosa,
        "merge",
        lambda model: (
            [model.set_submodule(n, a.linear) for n, a in rosa.adapters(model).items()] and model
        ),
    ),
}


@pytest.mark.parametrize("name", EDITED)
def test_where_merging_is_another_computation_than_the_adapters_own_it_is_refused_by_name(
    ckpt, monkeypatch, capsys, name
):
    monkeypatch.setattr(*EDITED[name])
    with pytest.raises(SystemExit) as stopped:
        merge()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(
        r"merged, model.layers.0.\S+ computes something else than RoAE", error
    )
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "ckpt"]


def test_what_an_adapter_holds_beside_updates_is_not_left_out_silently(ckpt, monkeypatch, capsys):
    """A reader's own tensor, of which rosa.check_adapter was taught."""
    file = Path("adapter/adapter_model.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        load_file(file) | {"base_model.model.model.layers.0.self_attn.head_scale": torch.ones(4)},
        file,
        metadata,
    )
    monkeypatch.setattr(rosa, "check_adapter", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        merge()
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and "layers.0.self_attn.head_scale, which is no part of what is merged here" in error
    )
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "ckpt"]


def test_a_mistake_that_shows_in_the_check_of_what_was_written_leaves_nothing(ckpt, monkeypatch):
    monkeypatch.setattr(Llama, "forward", lambda self, tokens: tokens.no_such_thing)
    with pytest.raises(AttributeError):
        merge()
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "ckpt"]
