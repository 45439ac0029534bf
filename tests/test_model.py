"""Statements about `model.py` alone, against the NumPy float64 reference and, where installed,
transformers."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import reference
import torch
from helpers import BASE, forkserver, generator_of, random_model, random_tokens, write_checkpoint
from rounding import assert_close, assert_greedy, of_model

import model as model_file
import rosa
from extras.checkpoints import load_model, read_checkpoint
from model import FAMILIES, Llama, LlamaConfig
from rosa import attach

pytestmark = pytest.mark.numeric
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {"rope_type": "llama3", **SCALING}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 12}
VARIANTS = {
    "grouped-query": {},
    "multi-head, other theta": {"num_key_value_heads": 4, "rope_theta": 500000.0},
    "multi-query, large eps": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "heads left out, explicit head_dim": {"num_key_value_heads": None, "head_dim": 12},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
    "other biases": {"mlp_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 100.0},
    "rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}},
    "rope_parameters default": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 8,
    },
    "mistral, which has no biases": MISTRAL | {"attention_bias": True, "mlp_bias": True},
    "mistral, window": MISTRAL | {"sliding_window": 60, "architectures": ["MistralForCausalLM"]},
}


def checkpoint(directory, changes):
    config = BASE | changes
    fields = {
        key: value
        for key, value in config.items()
        if key not in ("rope_parameters", "rope_scaling")
    }
    return write_checkpoint(directory, config, random_model(**fields))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree_with_the_reference(tmp_path, changes):
    directory, tokens = checkpoint(tmp_path, changes), random_tokens(40)
    model = Llama.from_pretrained(directory)
    expected = reference.logits(directory, tokens.tolist())
    assert_close(model(tokens[None])[0], expected, **of_model(model.config), dtype=torch.float32)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_greedy_ids_agree_with_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    directory = checkpoint(tmp_path, changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    ours, tokens = Llama.from_pretrained(directory), random_tokens(3, 40)
    mask = torch.arange(40) < torch.tensor([5, 40, 17])[:, None]
    assert_close(
        ours(tokens)[mask],
        theirs(tokens, attention_mask=mask.long()).logits[mask],
        **of_model(ours.config),
    )
    prompt = tokens[2, :17]
    expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)[
        0, 17:
    ].tolist()
    assert_greedy(ours, [prompt.tolist()], [expected], 20)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32
    ).eval()
    assert_close(again(tokens).logits, theirs(tokens).logits, **of_model(ours.config))


def test_padding_on_the_right_changes_nothing_before_it(model):
    tokens = random_tokens(1, 35)
    assert_close(model(tokens)[:, :20], model(tokens[:, :20]), **of_model(model.config))


def test_a_model_begins_with_weights_of_the_usual_size():
    """Weights are normal with a standard deviation of 0.02, as in GPT-2; biases are 0, norms 1."""
    config = LlamaConfig(
        **{name: BASE[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    )
    config.intermediate_size, config.num_hidden_layers, config.attention_bias = 48, 2, True
    for name, parameter in Llama(config).named_parameters():
        if parameter.dim() == 2:
            deviations = (parameter.std() / 0.02 - 1, parameter.mean() / 0.02)
            # Either deviation is below six standard errors
            assert max(map(abs, deviations)) < 6 / parameter.numel() ** 0.5, name
        else:
            assert parameter.eq(0 if name.endswith("bias") else 1).all(), name


def test_qwen2_has_biases_on_q_k_and_v_alone():
    biased = {
        name
        for name, _ in random_model(model_type="qwen2").named_parameters()
        if name.endswith("bias")
    }
    assert biased == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"}


def test_bfloat16_weights_keep_float32_rotation(model):
    exact = model.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).inv_freq, exact) and exact.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_return_the_same_tensors_in_the_dtype_asked_for(tmp_path, dtype):
    model = random_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    again, other = (
        Llama.from_pretrained(tmp_path),
        Llama.from_pretrained(tmp_path, dtype=torch.float64),
    )
    assert again.config == model.config and (again.dtype, other.dtype) == (dtype, torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(
            other.state_dict()[name], tensor.double()
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="merge"):
        attach(model).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def measure_loading():
    """For a new process: load ./large in two dtypes and write to peaks.json by how much the memory
    grew at its peak, as a multiple of the model's size. A small model is loaded first, because the
    first use of a library takes memory too."""
    peaks, status = [], Path("/proc/self/status")
    for directory, dtype in (("small", None), ("large", torch.bfloat16), ("large", torch.float32)):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        model = load_model(directory, dtype=dtype)
        grown = 1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before)
        peaks.append(grown / sum(p.numel() * p.element_size() for p in model.parameters()))
        del model
    Path("peaks.json").write_text(json.dumps(peaks[1:]))


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="reads peak memory from /proc"
)
def test_loading_needs_no_second_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("small")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    large = random_model(num_hidden_layers=4, vocab_size=4000, dtype=torch.bfloat16, **sizes)
    large.save_pretrained("large")
    child = forkserver().Process(target=measure_loading)
    child.start()
    child.join()
    for ratio in json.loads(Path("peaks.json").read_text()):
        # A second copy of the largest tensor, or of the file's pages, would be 1.2 at least
        assert 0.9 < ratio < 1.1


NOT_IMPLEMENTED = {
    "architectures": ["LlamaForSequenceClassification"],
    "layer_types": ["sliding_attention"],
}
NOT_IMPLEMENTED |= {
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "quantization_config": {"bits": 4},
}
REFUSED = [({name: value}, f"{name} = {value!r} is not") for name, value in NOT_IMPLEMENTED.items()]
PARTIAL = {"partial_rotary_factor": 0.5}


REFUSED += [
    (PARTIAL, "partial_rotary_factor = 0.5 is not"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | PARTIAL},
        "partial_rotary_factor = 0.5 is not",
    ),
    (
        {"model_type": "gemma"},
        f"model_type 'gemma' is not implemented: only {', '.join(FAMILIES)} are",
    ),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not implemented"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling {'factor': 2.0} has no rope_type"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
]
SENSELESS = [  # what read_checkpoint refuses besides
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling's factor must be a positive number"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor must be a positive number",
    ),
]


@pytest.mark.parametrize("changes, message", REFUSED + SENSELESS)
def test_what_a_config_asks_for_and_is_not_implemented_is_refused_by_name(
    tmp_path, changes, message
):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    for read in (read_checkpoint, LlamaConfig.from_file)[: 1 + ((changes, message) in REFUSED)]:
        with pytest.raises(ValueError) as error:
            read(tmp_path)
        assert (
            message in str(error.value)
            and "config.json" in str(error.value)
            and "\n" not in str(error.value)
        )


def test_what_a_config_leaves_out_its_family_or_the_generation_config_says(tmp_path):
    """A config of family mistral that says nothing of a window has one of 4096. The end-of-sequence
    tokens are those in generation_config.json."""
    config = BASE | {
        "model_type": "mistral",
        "num_attention_heads": 8,
        "max_position_embeddings": 9999,
    }
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = LlamaConfig.from_file(tmp_path)
    assert (config.sliding_window, config.context, config.num_key_value_heads) == (4096, 4096, 8)
    assert config.eos_token_id == [2, 7]


WINDOW = {"sliding_window": 20}  # only the family mistral uses it


LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 1.5}}
CONTEXTS = [
    (MISTRAL | WINDOW, 20),
    (WINDOW, 128),
    (LINEAR, 128),
    (MISTRAL | WINDOW | LINEAR, 20),
]


@pytest.mark.parametrize("changes, length", CONTEXTS)
def test_no_sequence_is_longer_than_the_context(changes, length):
    model, limit = random_model(**changes), f"context of {length}"
    assert model(random_tokens(1, length)).shape == (1, length, 97)
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for call in (model, model.hidden_states, lambda tokens: model.loss(tokens, tokens)):
        with pytest.raises(
            ValueError, match=f"{length + 1} tokens are more than the model's {limit}"
        ):
            call(random_tokens(1, length + 1))
    refused = f"prompt 1 has {length - 4} tokens; with 5 new ones it exceeds the model's {limit}"
    with pytest.raises(ValueError, match=refused):
        model.generate([[1], [3] * (length - 4)], 5, None)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate([[1], []], 5, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_cross_entropy_of_what_is_labelled_and_computes_no_other_logits(dtype):
    model, tokens, labels = (
        random_model(dtype=dtype),
        random_tokens(3, 20),
        random_tokens(3, 20, seed=3),
    )
    labels[torch.rand(labels.shape, generator=generator_of(3)) < 0.5] = -100
    log_probs, labelled = model(tokens).double().log_softmax(-1), labels != -100
    expected = -log_probs[labelled].gather(1, labels[labelled][:, None]).sum()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert_close(
        model.loss(tokens, labels), expected, **of_model(model.config), dtype=torch.float32
    )
    assert rows == [labelled.sum()]
    assert model.loss(tokens, torch.full_like(labels, -100)) == 0


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"model_type": "qwen2"}, {"head_dim": 12}]
)
def test_generation_with_a_cache_is_generation_without_and_computes_a_token_once(changes):
    model, counts, prompts = (
        random_model(**changes),
        [],
        [random_tokens(n, seed=n).tolist() for n in (1, 13, 5, 30)],
    )
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: counts.append(args[0].numel())
    )
    answers = model.generate(prompts, 25, None)
    hook.remove()
    assert counts == [count for prompt in prompts for count in (len(prompt), *[1] * 24)]
    assert_greedy(model, prompts, answers, 25)


@pytest.mark.parametrize("kind", [int, list, set])
def test_an_answer_ends_at_any_end_of_sequence(model, kind):
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 3, 14)]
    free = model.generate(prompts, 25, None)
    eos_ids = {free[0][3]} if kind is int else {free[0][3], free[2][10]}
    answers = model.generate(prompts, 25, free[0][3] if kind is int else kind(eos_ids))
    ends = [
        min([i for i, token in enumerate(answer) if token in eos_ids], default=25)
        for answer in free
    ]
    assert answers == [answer[:end] for answer, end in zip(free, ends)] and min(ends) <= 3
    assert model.generate(prompts, 0, None) == [[], [], []] and model.generate([], 5, None) == []


ALONE = """if True:
    import importlib.util, sys, torch
    import rosa
    from model import Llama
    model, tokens = Llama.from_pretrained("ckpt"), torch.arange(40).view(2, 20)
    selector = rosa.LayerSelector(rosa.attach(model, rank=4), k_ratio=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    selector.before_forward(0)
    model.loss(tokens, tokens).backward()
    selector.after_backward()
    optimizer.step()
    rosa.save_adapter(model, "adapter")
    adapted = rosa.load_adapter(Llama.from_pretrained("ckpt"), "adapter")
    assert torch.equal(adapted(tokens), model(tokens))
    assert any(adapter.B.any() for adapter in rosa.adapters(adapted).values())
    rosa.merge(model).save_pretrained("merged")
    assert not {"extras", "train", "eval"} & set(sys.modules)
    assert not importlib.util.find_spec("extras")
    print(model.generate([[1, 2, 3], [4]], 5, 2))"""


@functools.cache
def start_alone():
    """Start the program ALONE in a directory that holds model.py, rosa.py and a checkpoint, and
    nothing else. Returns the directory and the process."""
    directory = tempfile.TemporaryDirectory()
    for file in (model_file.__file__, rosa.__file__):
        shutil.copy(file, directory.name)
    random_model().save_pretrained(Path(directory.name, "ckpt"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return directory, subprocess.Popen(
        [sys.executable, "-c", ALONE], cwd=directory.name, env=environment, **pipes
    )


@pytest.mark.ahead(start=start_alone)
def test_model_and_rosa_alone_load_adapt_train_save_merge_and_answer(model):
    assert importlib.util.find_spec("extras")
    directory, process = start_alone()
    printed, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    tokens, directory = torch.arange(40).view(2, 20), Path(directory.name)
    merged, adapted = (
        Llama.from_pretrained(directory / "merged"),
        rosa.load_adapter(model, directory / "adapter"),
    )
    assert_close(merged(tokens), adapted(tokens), **of_model(model.config))
    assert_greedy(merged, [[1, 2, 3], [4]], json.loads(printed), 5, [2])
