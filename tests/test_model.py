"""Statements about `model.py`, against the NumPy float64 reference and, where installed, transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import (
    BASE,
    forkserver,
    generator_of,
    random_model,
    random_tokens,
    seed_torch,
    without_operators,
    write_checkpoint,
)
from rounding import assert_close, assert_greedy, assert_no_worse, near, of_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from extras.checkpoints import find_checkpoint, hub_cache
from model import CausalAttention, Llama, LlamaConfig, RMSNormFunction, SummedCrossEntropy, SwiGLU, attend, linear
from rosa import attach

pytestmark = pytest.mark.numeric
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "heads left out": {"num_key_value_heads": None},
    "explicit head_dim": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "large eps": {"rms_norm_eps": 0.1},
    "rope_theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 100.0},
    "rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "rope_parameters default": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 8},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "mistral, window": {"model_type": "mistral", "sliding_window": 60, "architectures": ["MistralForCausalLM"]},
}


def checkpoint(directory, changes):
    config = BASE | changes
    fields = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    return write_checkpoint(directory, config, random_model(**fields))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree_with_the_reference(tmp_path, changes):
    directory = checkpoint(tmp_path, changes)
    tokens = random_tokens(40)
    model = Llama.from_pretrained(directory)
    assert_close(model(tokens[None])[0], reference.logits(directory, tokens.tolist()), **of_model(model.config), dtype=torch.float32)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_greedy_ids_agree_with_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    directory = checkpoint(tmp_path, changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = Llama.from_pretrained(directory)
    lengths = [5, 40, 17]
    tokens, mask = random_tokens(3, 40), torch.arange(40) < torch.tensor(lengths)[:, None]
    assert_close(ours(tokens)[mask], theirs(tokens, attention_mask=mask.long()).logits[mask], **of_model(ours.config))
    prompt = tokens[2, :17]
    expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 17:].tolist()
    assert_greedy(ours, [prompt.tolist()], [expected], 20)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert_close(again(tokens).logits, theirs(tokens).logits, **of_model(ours.config))


def test_padding_on_the_right_changes_nothing_before_it(model):
    tokens = random_tokens(1, 20)
    padded = torch.cat((tokens, random_tokens(1, 15, seed=1)), dim=1)
    assert_close(model(padded)[:, :20], model(tokens), **of_model(model.config))


def test_qwen2_has_biases_on_q_k_and_v_alone():
    biased = {name for name, _ in random_model(model_type="qwen2").named_parameters() if name.endswith("bias")}
    assert biased == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"}


def test_the_statistic_of_a_norm_is_float32():
    seed_torch(0)
    x, weight = torch.randn(50, 64).bfloat16(), torch.rand(64).bfloat16()
    h = x.double()
    expected = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).bfloat16() * weight
    # One product in 10,000 or so, the ratio of the two eps, lies so near the middle of two bfloat16 numbers that float32 falls to the
    # other side; of a statistic in bfloat16 every second would.
    assert (RMSNormFunction.apply(x, weight, 1e-5) != expected).float().mean() < 0.01


@pytest.mark.parametrize("operators", ["as found", "absent"])
def test_gradients_of_our_own_functions_are_those_of_autograd(operators, monkeypatch):
    if operators == "absent":
        without_operators(monkeypatch)
    seed_torch(0)
    x, y, weight, matrix, bias, out, wide = (torch.randn(*shape, requires_grad=True) for shape in (
        (2, 300, 64), (2, 300, 64), (64,), (48, 64), (48,), (2, 300, 64), (2, 300, 48)))
    for ours, theirs, inputs, grad in (
        (lambda: RMSNormFunction.apply(x, weight, 1e-5), lambda: F.rms_norm(x, (64,), weight, 1e-5), (x, weight), out),
        (lambda: SwiGLU.apply(x, y), lambda: F.silu(x) * y, (x, y), out),
        (lambda: linear(x, matrix, bias), lambda: F.linear(x, matrix, bias), (x, matrix, bias), wide),
    ):
        assert_close(ours(), theirs(), length=64)
        found, expected = (torch.autograd.grad(function(), inputs, grad) for function in (ours, theirs))
        for a, b in zip(found, expected):
            assert_close(a, b, length=600, depth=3)  # 2 x 300 tokens


@pytest.mark.parametrize("operators", ["as found", "absent"])
@pytest.mark.parametrize("heads, kv_heads, length", [(4, 2, 37), (3, 3, 1), (6, 1, 64)])
def test_our_attention_is_causal_attention(heads, kv_heads, length, operators, monkeypatch):
    if operators == "absent":
        without_operators(monkeypatch)
    seed_torch(heads)
    q, k, v = (torch.randn(2, n, length, 16, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    grad = torch.randn(2, heads, length, 16, dtype=torch.float64)
    ours, theirs = CausalAttention.apply(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(ours, theirs, length=length, depth=3, dtype=torch.float32)  # the keys' mean is taken in float32
    # All gradients as one: of a single token those of q and k are zero, but for rounding.
    found, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(y, (q, k, v), grad)]) for y in (ours, theirs))
    assert_close(found, expected, length=length, depth=5, dtype=torch.float32)


@pytest.mark.parametrize("queries", [1, 6, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_what_the_cache_holds(queries, dtype):
    seed_torch(queries)
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, 40, 40))
    hidden = torch.rand(2, 1, queries, 40) < 0.3
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
    scores = (q.double() @ k.double().transpose(2, 3) / 4).masked_fill(hidden, -torch.inf)
    assert_close(attend(q, k, v, mask), scores.softmax(-1) @ v.double(), length=40, depth=2)


def test_our_attention_rounds_no_more_than_pytorchs():
    seed_torch(0)
    q, k, v = (torch.randn(2, n, 100, 64) for n in (4, 2, 2))
    k += 10 * torch.randn(64)  # keys with a large bias
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(2, 4, 100, 64).bfloat16()


    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def outcome(function, inputs, grad):
        y = function(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad)

    results = outcome(CausalAttention.apply, inputs, grad), outcome(sdpa, inputs, grad), outcome(sdpa, exact, grad.double())
    for ours, theirs, expected in zip(*results):
        assert_no_worse(ours, theirs, expected)


def test_bfloat16_weights_keep_float32_rotation(model):
    exact = model.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).inv_freq, exact) and exact.dtype == torch.float32


# --- files ---


def test_save_and_load_return_the_same_tensors(tmp_path, model):
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path, model):
    with pytest.raises(ValueError, match="merge"):
        attach(model).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtype_is_as_stored_or_as_asked(tmp_path):
    random_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Llama.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def shard(directory):
    """Split model.safetensors in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_shards_load_as_one_file_does(tmp_path, model):
    model.save_pretrained(tmp_path)
    shard(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(random_tokens(1, 9)), model(random_tokens(1, 9)))


def test_every_tensor_that_does_not_fit_is_named(tmp_path, model):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    for part in ("missing model.norm.weight", "unexpected extra", "lm_head.weight has shape [3, 5]", "up_proj.weight is stored as I8"):
        assert part in str(error.value)


def test_derivable_tensors_of_old_checkpoints_are_ignored(tmp_path):
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def measure_loading():
    """In a process of its own: peaks.json, the peak memory of loading ./large in two dtypes, in sizes of the model. A small one is loaded
    first, for what the first use of a library costs is not the model's."""
    peaks = []
    for directory, dtype in (("small", None), ("large", torch.bfloat16), ("large", torch.float32)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmHWM")
        model = Llama.from_pretrained(directory, dtype=dtype)
        peaks.append((resident("VmHWM") - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
        del model
    Path("peaks.json").write_text(json.dumps(peaks[1:]))


def resident(kind):
    return 1024 * int(re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads peak memory from /proc")
def test_loading_needs_no_second_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("small")
    random_model(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
                 num_hidden_layers=4, vocab_size=4000, dtype=torch.bfloat16).save_pretrained("large")
    processes = forkserver()
    child = processes.Process(target=measure_loading)
    child.start()
    child.join()
    for ratio in json.loads(Path("peaks.json").read_text()):
        assert 0.9 < ratio < 1.1  # a second copy of the largest tensor, or of the file's pages, would be 1.2 at least


@pytest.mark.parametrize("changes, message", [
    ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures = \['LlamaForSequenceClassification'\]"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not implemented"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling's factor must be a positive number"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
])
def test_what_a_config_asks_for_and_is_not_implemented_is_refused_by_name(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(ValueError, match=message) as error:
        LlamaConfig.from_file(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_generation_config_decides_the_end_of_sequence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert LlamaConfig.from_file(tmp_path).eos_token_id == [2, 7]


def test_checkpoints_are_found_by_name(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("checkpoints/mine")
    assert find_checkpoint("mine").samefile("checkpoints/mine") and find_checkpoint("tiny").name == "tiny"
    with pytest.raises(FileNotFoundError, match="no checkpoint 'other'.* names known are tiny, llama2-7b, "):
        find_checkpoint("other")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        find_checkpoint("checkpoints")


@pytest.mark.parametrize("name, repository", [("llama2-7b", "meta-llama/Llama-2-7b-hf"), ("some.org/A-model_1", "some.org/A-model_1")])
def test_a_name_is_looked_for_here_then_in_the_cache_of_hugging_face(tmp_path, monkeypatch, model, name, repository):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", "$PWD/cache")
    monkeypatch.setenv("PWD", str(tmp_path))
    command = f"To download it .*: hf download {repository} --include '\\*.json' --include 'tokenizer\\*' --include 'model\\*.safetensors'"
    with pytest.raises(FileNotFoundError, match=command):
        find_checkpoint(name)
    cached = tmp_path / "cache" / ("models--" + repository.replace("/", "--"))
    model.save_pretrained(cached / "snapshots" / "0123abc")
    with pytest.raises(FileNotFoundError, match=command):  # no revision is the main one yet
        find_checkpoint(name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    assert find_checkpoint(name) == cached / "snapshots" / "0123abc"
    assert Llama.from_pretrained(find_checkpoint(name)).name_or_path == repository  # which an adapter's config will name
    (cached / "snapshots" / "0123abc" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=command):  # config.json alone is no checkpoint
        find_checkpoint(name)
    for nearer in (f"checkpoints/{name}", name):
        model.save_pretrained(nearer)
        assert find_checkpoint(name).samefile(nearer)
    assert Llama.from_pretrained(find_checkpoint(name)).name_or_path == name


@pytest.mark.parametrize("environment", [{}, {"HF_HOME": "~/h"}, {"XDG_CACHE_HOME": "/x"}, {"HF_HOME": "$HOME/h", "HF_HUB_CACHE": "/c"},
                                         {"HF_HUB_CACHE": "~/c", "XDG_CACHE_HOME": "/x"}])
def test_the_cache_is_where_hugging_face_has_it(monkeypatch, environment):
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert str(hub_cache()) == theirs


# --- a sliding window ---


def test_no_sequence_is_longer_than_a_sliding_window():
    model = random_model(model_type="mistral", sliding_window=20)
    prompt = random_tokens(20).tolist()
    assert model(torch.tensor([prompt])).shape == (1, 20, 97)
    with pytest.raises(ValueError, match="21 tokens are more than the model's sliding window of 20"):
        model(random_tokens(1, 21))
    with pytest.raises(ValueError, match="21 tokens are more than the model's sliding window of 20"):
        model.log_likelihoods([prompt], [[[3]]])
    with pytest.raises(ValueError, match="prompt 0 has 20 tokens; with 1 new ones it exceeds the model's sliding window of 20"):
        model.generate([prompt], 1, None)
    assert random_model(sliding_window=20)(random_tokens(1, 21)).shape == (1, 21, 97)  # mistral's alone


def test_a_mistral_config_that_says_nothing_of_a_window_has_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in BASE.items() if key != "num_key_value_heads"}
                                                     | {"model_type": "mistral", "num_attention_heads": 8, "max_position_embeddings": 9999}))
    config = LlamaConfig.from_file(tmp_path)
    assert (config.sliding_window, config.context, config.num_key_value_heads) == (4096, 4096, 8)


def test_logits_layer_by_layer_are_the_logits(tmp_path):
    for changes in ({}, {"tie_word_embeddings": True}, {"model_type": "qwen2"}):
        model, tokens = random_model(**changes), random_tokens(2, 20)
        weights = model.state_dict()
        if changes.get("tie_word_embeddings"):
            del weights["lm_head.weight"]  # as in a file
        assert_close(model_file.logits_layer_by_layer(model.config, tokens, weights.get), model(tokens), **of_model(model.config))


# --- loss ---


def labelled(shape, seed=3):
    labels = random_tokens(*shape, seed=seed)
    return labels.masked_fill(torch.rand(shape, generator=generator_of(seed)) < 0.5, -100)


@pytest.mark.parametrize("slice_size", [97, 500, 2**24])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch, slice_size):
    monkeypatch.setattr(SummedCrossEntropy, "SLICE", slice_size)
    tokens, labels = random_tokens(3, 20), labelled((3, 20))
    gradients = []
    for plain in (True, False):
        model = random_model(dtype=torch.float64)
        if plain:
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
        else:
            loss = model.loss(tokens, labels)
        (3 * loss).backward()
        gradients.append([loss.detach().double()] + [p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients):
        assert_close(ours, theirs, **of_model(model.config, 2), dtype=torch.float32)  # the logits are float32 in ours


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_tensor_holds_the_logits_of_all_positions(monkeypatch):
    monkeypatch.setattr(SummedCrossEntropy, "SLICE", 8 * 5000)
    model = attach(random_model(vocab_size=5000), rank=2)
    tokens, labels = random_tokens(4, 50, vocab_size=5000), labelled((4, 50))
    with LargestTensor() as largest:
        model.loss(tokens, labels).backward()
    assert largest.numel == 5000 * 32  # the vocabulary projection's weight, transposed; logits come 8 rows at a time


# --- generation ---


def ragged(*lengths):
    return [random_tokens(n, seed=n).tolist() for n in lengths]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"model_type": "qwen2"}, {"head_dim": 12}])
def test_generation_with_a_cache_is_generation_without(changes):
    model = random_model(**changes)
    prompts = ragged(1, 13, 5, 30, 2, 13)
    assert_greedy(model, prompts, model.generate(prompts, 25, None), 25)


@pytest.mark.parametrize("lengths, common", [([5, 1, 9] * 4, 20), ([0, 3], 19), ([2, 2, 2], 21), ([4], 0)])
def test_what_all_prompts_begin_with_is_computed_once(model, lengths, common):
    prompts = [random_tokens(20, seed=50).tolist() + rest for rest in ragged(*lengths)]
    counts = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    answers = model.generate(prompts, 15, None)
    hook.remove()
    assert_greedy(model, prompts, answers, 15)
    groups = [prompts[i : i + 8] for i in range(0, len(prompts), 8)]
    assert counts == [*[common] * (common > 0), *(len(group) * (max(map(len, group)) - common) for group in groups), *[len(prompts)] * 14]


def test_every_new_token_is_announced(model):
    prompts, seen = [random_tokens(n, seed=n).tolist() for n in (5, 9, 7)], []
    eos_id = model.generate(prompts[:1], 12, None)[0][6]  # ends one answer, if no other
    answers = model.generate(prompts, 12, eos_id, lambda row, ids: seen.append((row, list(ids))))
    assert answers == [[ids for row, ids in seen if row == i][-1] if any(row == i for row, _ in seen) else [] for i in range(3)]
    assert len(seen) == sum(map(len, answers)) and len(answers[0]) <= 6


def test_rows_end_at_their_own_end_of_sequence(model):
    prompts = ragged(9, 3, 14, 6, 21, 1, 8)
    free = model.generate(prompts, 25, None)
    eos_ids = {free[0][3], free[2][10], free[4][20]}
    answers = model.generate(prompts, 25, eos_ids)
    assert_greedy(model, prompts, answers, 25, eos_ids)
    assert len({len(answer) for answer in answers}) > 2
    assert model.generate(prompts, 25, free[1][0])[1] == []


def test_finished_rows_cost_nothing(model):
    prompts = ragged(9, 3, 14, 6, 21, 1, 8)
    free = model.generate(prompts, 25, None)
    eos_ids = {free[0][3], free[2][10]}
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    answers = model.generate(prompts, 25, eos_ids)
    assert rows == [sum(len(answer) >= step for answer in answers) for step in range(len(rows))]
    assert rows[-1] < rows[0]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 30])
def test_the_next_prompts_take_the_places_of_those_answered(batch_size):
    """With and without a common beginning: the same answers, never more at a time, each once and as it ends, and fewer steps
    than batch after batch takes."""
    model = random_model()
    for shared in ([], random_tokens(11, seed=3).tolist()):
        prompts = [shared + rest for rest in ragged(9, 3, 14, 6, 21, 1, 8, 2, 2, 17, 5, 30, 4, 11, 7, 7, 1, 19, 3, 12)]
        free = model.generate(prompts, 16, None)
        eos_ids = {free[0][3], free[2][10], free[9][1], free[11][15], free[17][0]}
        rows = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        ended = sorted((i, list(ids)) for i, ids in model.stream(prompts, 16, eos_ids, batch_size=batch_size))
        hook.remove()
        answers = [ids for _, ids in ended]
        assert [i for i, _ in ended] == list(range(20)) and max(rows) == min(batch_size, 20)
        assert_greedy(model, prompts, answers, 16, eos_ids)
        lengths = [min(16, len(answer) + 1) for answer in answers]
        assert len(set(lengths)) > 3 and sum(rows) == sum(lengths)
        batches = [max(lengths[i : i + batch_size]) for i in range(0, 20, batch_size)]
        assert len(rows) == sum(batches) if batch_size in (1, 30) else len(rows) < sum(batches)
        assert model.generate(prompts, 16, eos_ids, batch_size=batch_size) == answers


def test_generation_stops_when_all_are_done(model):
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    assert model.generate(ragged(4, 6), 50, list(range(97))) == [[], []]
    assert len(calls) == 1


def test_generation_refuses_before_anything_runs(model):
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="prompt 1 has 100 tokens; with 29 new ones it exceeds the model's context of 128"):
        model.generate(ragged(4, 100), 29, None)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate([[1], []], 5, None)
    assert model.generate([], 5, None) == []
    with pytest.raises(ValueError, match="129 tokens are more than the model's context of 128"):
        model.hidden_states(random_tokens(1, 129))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "rope_theta": 100.0}])
def test_the_likelihood_of_a_continuation_is_that_of_the_whole_text(changes):
    model = random_model(**changes)
    prompts = [random_tokens(n, seed=n).tolist() for n in (7, 1, 12, 30)]
    continuations = [[random_tokens(n, seed=100 * i + n).tolist() for n in lengths] for i, lengths in enumerate([(1, 3), (5,), (2, 2, 1, 6), (4, 1)])]
    for chosen in (slice(None), slice(2), slice(3, 4)):
        found = model.log_likelihoods(prompts[chosen], continuations[chosen])
        for prompt, some, scores in zip(prompts[chosen], continuations[chosen], found, strict=True):
            for ids, score in zip(some, scores, strict=True):
                log_probs = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
                plain = sum(log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))
                assert score == near(plain, **of_model(model.config))
    with pytest.raises(ValueError, match="129 tokens are more than the model's context of 128"):
        model.log_likelihoods([[3] * 120, [4]], [[[5] * 8], [[6], [7] * 9]][::-1])
    single = model.log_likelihoods(prompts, [[[3], [4]]] * 4)
    assert single[1] == near(model(torch.tensor([prompts[1]]))[0, -1].log_softmax(-1)[[3, 4]].tolist(), **of_model(model.config))
