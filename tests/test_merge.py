"""Statements about `python -m extras.merge`: a whole checkpoint or nothing, what `merge` makes in memory, in little of it."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import random_model, random_tokens, randomise_adapters
from rounding import bound, of_model
from safetensors.torch import load_file

import rosa
from extras import merge as merge_file
from model import Llama

pytestmark = pytest.mark.numeric
ROOT = Path(rosa.__file__).parent
ALL = "q,k,v,o,gate,up,down"


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A bfloat16 checkpoint `ckpt` and a trained adapter `adapter` for it in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    model = random_model(vocab_size=1024, max_position_embeddings=256, dtype=torch.bfloat16)
    model.save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    Path("ckpt/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    Path("ckpt/training_args.bin").write_text("a pickle")
    rosa.save_adapter(randomise_adapters(rosa.attach(model, 4, 8, 0.5, ALL)), "adapter")
    return "ckpt"


def merge(*arguments):
    merge_file.run(["--ckpt", "ckpt", "--adapter", "adapter", "--out", "out", *arguments])


@pytest.mark.parametrize("shard", [5 * 10**9, 20000, 1])
def test_the_directory_is_complete_and_holds_what_merging_in_memory_gives(ckpt, shard, monkeypatch):
    monkeypatch.setattr(merge_file, "SHARD", shard)
    merge()
    merged = Llama.from_pretrained("out")
    expected = rosa.merge(rosa.load_adapter(Llama.from_pretrained("ckpt"), "adapter"))
    assert merged.config == expected.config and merged.config.eos_token_id == [2, 7]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert Path("out/config.json").read_bytes() == Path("ckpt/config.json").read_bytes()
    weights = sorted(file.name for file in Path("out").glob("*.safetensors"))
    others = {file.name for file in Path("out").iterdir()} - set(weights)
    if shard > 10**9:
        assert weights == ["model.safetensors"]
        assert others == {"config.json", "generation_config.json", "tokenizer.model"}
        return
    assert others == {"config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json"}
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    held = {name: file for file in weights for name in load_file(f"out/{file}")}
    assert index["weight_map"] == held and index["metadata"]["total_size"] == sum(2 * p.numel() for p in merged.parameters())
    assert weights[0] == f"model-00001-of-{len(weights):05}.safetensors"
    for file in weights:
        tensors = load_file(f"out/{file}")
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard


def test_it_says_what_rounding_has_cost(ckpt, capsys):
    merge()
    words = capsys.readouterr().out.split()
    from data import tasks, toy
    from data.tokenizer import load_tokenizer

    exact = rosa.load_adapter(Llama.from_pretrained("ckpt", dtype=torch.float32), "adapter")
    rounded = Llama.from_pretrained("out", dtype=torch.float32)
    prompts = [tasks.encode_prompt(example, load_tokenizer("ckpt")) for example in toy.examples("test", 4)]
    with torch.inference_mode():
        before, after = (torch.cat([model(torch.tensor([prompt]))[0] for prompt in prompts]) for model in (exact, rounded))
    assert float(words[words.index("by") + 1]) == pytest.approx((after - before).abs().max().item(), rel=0.06)  # two digits
    assert int(words[words.index("next") - 1]) == len(before)
    first, second = before.topk(2).values.unbind(-1)
    ties = (first - second < bound(**of_model(exact.config)) * before.abs().max()).sum()  # either of the two may be the next token
    assert abs(int(words[words.index("tokens") + 1]) - (before.argmax(-1) == after.argmax(-1)).sum()) <= ties
    assert (after - before).abs().max() > 1e-3  # bfloat16 does cost something


def test_float32_weights_lose_nothing(ckpt, capsys):
    Llama.from_pretrained("ckpt", dtype=torch.float32).save_pretrained("ckpt")
    merge()
    words = capsys.readouterr().out.split()
    largest = float(words[words.index("is") + 1].rstrip(");"))
    assert float(words[words.index("by") + 1]) < bound(**of_model(Llama.from_pretrained("ckpt").config)) * largest


@pytest.mark.parametrize("arguments, message", [
    (["--out", "ckpt"], "ckpt exists already"), (["--out", "half"], "half.partial exists already"),
    (["--ckpt", "absent"], "no checkpoint 'absent'"), (["--adapter", "absent"], "absent is no adapter directory"),
    (["--adapter", "ckpt"], "ckpt is no adapter directory"), (["--adapter", "ia3"], "of type IA3: only peft can merge it"),
    (["--adapter", "other"], "other is an adapter for another model: missing"), (["--rank", "3"], "unrecognized arguments: --rank 3"),
])
def test_a_mistake_is_one_line_and_nothing_is_left_behind(ckpt, capsys, arguments, message):
    Path("half.partial").mkdir()
    rosa.save_adapter(rosa.attach(random_model(num_hidden_layers=2), 4, 8), "other")
    shutil.copytree("adapter", "ia3")
    Path("ia3/adapter_config.json").write_text('{"peft_type": "IA3"}')
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        merge(*arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("merge: ") and message in error
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


def test_the_directory_is_made_with_those_above_it(ckpt, capsys):
    merge("--out", "a/b/out")
    assert capsys.readouterr().out.startswith("a/b/out holds the merged checkpoint.")
    assert Llama.from_pretrained("a/b/out")(random_tokens(1, 5)).shape == (1, 5, 1024)
