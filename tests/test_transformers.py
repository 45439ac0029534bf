"""Statements about what goes in from transformers and PEFT, and out to them: checkpoints,
tokenizers, adapters."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rounding
import sentencepiece
import torch
from helpers import BASE, ROOT, random_model, random_tokens, randomise_adapters
from safetensors.torch import load_file, save_file
from test_readme import DIFFS, apply

import rosa
from data import tasks, toy
from data.tokenizer import HERE as DATA
from data.tokenizer import load_tokenizer
from extras import adapters
from extras import merge as merge_file
from extras.checkpoints import load_model
from model import Llama, LlamaConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.numeric
ALL = "q,k,v,o,gate,up,down"
SMALL = {
    name: value
    for name, value in BASE.items()
    if name not in ("model_type", "rms_norm_eps", "hidden_act")
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, **SCALING}
LLAMA32 = {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 8}


def rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


FAMILIES = {  # name -> (model_type, the fields of the config that make the family, sizes aside)
    "LLaMA 2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "LLaMA 3": (
        "llama",
        {"rms_norm_eps": 1e-5, **rope(500000.0), "bos_token_id": 95, "eos_token_id": 96},
    ),
    "LLaMA 3.1": (
        "llama",
        {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "eos_token_id": [94, 95, 96]},
    ),
    "LLaMA 3.2": ("llama", {"rms_norm_eps": 1e-5, **LLAMA32}),
    "TinyLlama": ("llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 1}),
    "SmolLM 2": ("llama", {"rms_norm_eps": 1e-5, **rope(100000.0), "tie_word_embeddings": True}),
    "Qwen2.5 0.5B": (
        "qwen2",
        {**rope(1e6), "tie_word_embeddings": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "Qwen2.5 7B": ("qwen2", {**rope(1e6), "sliding_window": 20, "use_sliding_window": False}),
    "Mistral 0.1": ("mistral", {"sliding_window": 60, "rms_norm_eps": 1e-5}),
    "Mistral Nemo": ("mistral", {"sliding_window": None, "head_dim": 12, **rope(1e6)}),
}


@pytest.fixture(params=FAMILIES)
def theirs(request):
    """A random model that transformers has made, one of each family. Its weights are so large that
    every part of the model matters."""
    family, changes = FAMILIES[request.param]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **SMALL | changes)
    )
    model.load_state_dict(random_model(model_type=family, **changes).state_dict())
    return model.float().eval()


def as_theirs(model, directory):
    model.save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def assert_close(ours, theirs):
    rounding.assert_close(ours, theirs, **rounding.of_model(LlamaConfig(**SMALL)))


@torch.inference_mode()
def test_every_family_comes_in_and_goes_out(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = Llama.from_pretrained(tmp_path / "theirs"), random_tokens(2, 40)
    expected = theirs(tokens).logits
    assert_close(ours(tokens), expected)
    prompts = [tokens[0, :7].tolist(), tokens[1, :30].tolist()]
    for prompt, answer in zip(prompts, ours.generate(prompts, 20, None)):
        ids = torch.tensor([prompt])
        ids = theirs.generate(
            ids, attention_mask=ids * 0 + 1, max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        rounding.assert_greedy(ours, [prompt], [ids[0, len(prompt) :].tolist()], 20)
        rounding.assert_greedy(ours, [prompt], [answer], 20)
    again = as_theirs(ours, tmp_path / "ours")
    assert type(again) is type(theirs)
    assert_close(again(tokens).logits, expected)
    names = "num_key_value_heads rms_norm_eps rope_parameters tie_word_embeddings".split()
    for name in [*names, "eos_token_id", "head_dim"]:
        if hasattr(theirs.config, name):  # qwen2 has no head_dim of its own
            assert getattr(again.config, name) == getattr(theirs.config, name), name
    if theirs.config.model_type == "mistral":
        assert again.config.sliding_window == theirs.config.sliding_window


AS_STORED = [  # changes of config.json, as other programs write it
    {"tie_word_embeddings": True},  # though the file holds an lm_head of its own
    {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": SCALING | {"rope_type": "llama3"},
    },
    {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "rope_scaling": None,
    },
]


@torch.inference_mode()
def test_what_was_saved_without_its_lm_head_comes_in(tmp_path):
    transformers.LlamaModel(
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    ).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(2, 40)
    assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits)


@torch.inference_mode()
@pytest.mark.parametrize("changes", AS_STORED)
def test_what_a_checkpoint_says_twice_counts_as_with_them(tmp_path, changes):
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(2, 40)
    assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits)


SWITCHED_ON = [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20}, "use_sliding_window|layer_types"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic' is not impl",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, **rope(1e4)},
        "'yarn' is not implemented",
    ),
    ("llama4_text", {}, "model_type 'llama4_text' is not implemented"),
]


@pytest.mark.parametrize("family, changes, message", SWITCHED_ON)
def test_what_a_config_of_theirs_asks_for_and_we_lack_is_refused(
    tmp_path, family, changes, message
):
    transformers.AutoConfig.for_model(
        family, **SMALL | changes, max_window_layers=1
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_file(tmp_path)


PARTS = (
    " |  |   |\n|\n\n|\t|\r\n|a|The| the|hello| world|123|4567| 8|3.14|é|naïve|e\u0301|中文|"
    "日本語|한국어|😀|👩‍👩‍👧|🇩🇪|"
    "\x00|\x01|\x7f|\u200b|\u00a0|\ufeff|▁| ▁|'s|don't|...|!?|<unk>|</s>|<s>|"
    "[INST]|<¦endoftext¦>|<¦im_start¦>|<0x0A>|ﬁ|İ|ß|٣|१|# include| = |def f(x):\n    return "
    "x|\u2028|\ud7ff|\U000e0001"
)
RANGES = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def strings(count=2000):
    """Texts that are hard to tokenize."""
    rng, parts = random.Random(0), [part.replace("¦", "|") for part in PARTS.split("|")]
    texts = [
        "",
        *parts,
        *(mixed for part in parts for mixed in (" " + part, "  " + part, part + " ")),
    ]
    while len(texts) < count:
        anything = [chr(rng.randint(*rng.choice(RANGES))) for _ in range(12)]
        texts.append("".join(rng.choices(parts + anything, k=rng.randint(1, 12))))
    return texts


def write_tokenizer(directory, model, **config):
    """Write a directory as it lies on the Hub: tokenizer.model, tokenizer_config.json, and a
    tokenizer.json made of tokenizer.model, with merges in the order of the pieces' scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model.read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    converted = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    converted.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    converted.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [
        AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type in (2, 3)
    ]
    converted.add_special_tokens(special)
    directory.mkdir()
    converted.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    config |= {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def assert_same_ids(directory, ours=None):
    ours, theirs = (
        ours or load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    controls = {ours.bos_id, ours.eos_id}
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not controls & set(ids), text  # "</s>" in somebody's text is four characters
        ids.append(ours.eos_id)
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected, text


def test_sentencepiece_ids_are_those_of_transformers(tmp_path):
    pytest.importorskip("google.protobuf")
    (directory,) = pytest.importorskip("mistral_common").__path__
    for model in (
        DATA / "tiny" / "tokenizer.model",
        *sorted((DATA / directory / "data").glob("*.model*")),
    ):
        assert_same_ids(write_tokenizer(tmp_path / model.name, model))
        # From a tokenizer.model alone transformers makes merges in the order of ids. In some models
        # this is not the order of scores.
        (tmp_path / "alone").mkdir(exist_ok=True)
        (tmp_path / "alone" / "tokenizer.model").write_bytes(model.read_bytes())
        stated = (tmp_path / model.name / "tokenizer_config.json").read_text()
        (tmp_path / "alone" / "tokenizer_config.json").write_text(stated)
        assert_same_ids(tmp_path / model.name, load_tokenizer(tmp_path / "alone"))
    unprefixed = write_tokenizer(tmp_path / "unprefixed", model, add_prefix_space=False)
    assert_same_ids(unprefixed)
    (tmp_path / "alone" / "tokenizer_config.json").write_text(
        (unprefixed / "tokenizer_config.json").read_text()
    )
    assert_same_ids(unprefixed, load_tokenizer(tmp_path / "alone"))


TRAINED = {  # options of SentencePiece's trainer
    "its defaults": {},
    "no prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "normalising": {"remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("options", TRAINED)
def test_ids_of_a_llama_tokenizer_are_those_of_transformers_whatever_the_models_own_settings(
    tmp_path, options
):
    pytest.importorskip("google.protobuf")
    sentences = [example["instruction"] for example in toy.examples("train", 200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        model_writer=model,
        sentence_iterator=iter(sentences),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **TRAINED[options],
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    for flags in ({}, {"single_word": True}, {"lstrip": True, "rstrip": True}):
        token = {"content": "<two>", "special": False} | flags
        stated = config | {"add_bos_token": True, "added_tokens_decoder": {str(size): token}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
        ours = load_tokenizer(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in [
            *strings(500),
            " two",
            "one  two",
            "a<two> two",
            "<two>",
            "a <two> b",
            "é<two>",
        ]:
            expected = theirs.encode(text, split_special_tokens=True)
            assert [ours.bos_id, *ours.encode(text)] == expected, text


def test_the_bundled_checkpoint_is_theirs_too():
    theirs = transformers.AutoTokenizer.from_pretrained(DATA / "tiny")
    ours = load_tokenizer("tiny")
    for example in toy.examples("test", 20):
        text = tasks.prompt_text(example)
        assert theirs.encode(text) == tasks.encode_prompt(example, ours)


def test_ids_of_a_tokenizer_json_are_those_of_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = {"vocab_size": 600, "initial_alphabet": level.alphabet(), "show_progress": False}
    options["special_tokens"] = ["<s>", "</s>", "<|im_start|>", "<|endoftext|>"]
    tokenizer.train_from_iterator(strings(1000), tokenizers.trainers.BpeTrainer(**options))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("ratio, targets", [(0.25, "k"), (1.0, ALL), (0.5, ALL)])
def test_our_adapters_go_out(tmp_path, theirs, ratio, targets):
    peft = pytest.importorskip("peft")
    theirs.save_pretrained(tmp_path / "base")
    model, tokens = Llama.from_pretrained(tmp_path / "base"), random_tokens(2, 20)
    before = model(tokens).detach()
    randomise_adapters(rosa.attach(model, 4, 6.5, ratio, targets))
    rosa.save_adapter(model, tmp_path / "adapter")
    with torch.inference_mode():
        assert (model(tokens) - before).abs().max() > 0.01
        assert_close(
            peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(tokens).logits,
            model(tokens),
        )
        named = peft.AutoPeftModelForCausalLM.from_pretrained(
            tmp_path / "adapter", dtype=torch.float32
        )
        # peft has found the base model by its name
        assert_close(named.eval()(tokens).logits, model(tokens))


def their_adapter(theirs, directory, dtype=torch.float32, **options):
    """Save an adapter that PEFT has made, with random weights as if it had been trained, in this
    dtype. Returns the adapted model."""
    peft = pytest.importorskip("peft")
    modules = [module.split(".")[1] for module in rosa.TARGETS.values()]
    options = {"r": 3, "lora_alpha": 7, "target_modules": modules, "lora_dropout": 0.1} | options
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).to(dtype))
    adapted.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return adapted.eval()


COMING = [
    {"target_modules": r".*\.(q|down)_proj"},
    {"use_rslora": True, "init_lora_weights": "gaussian"},
]
COMING += [{"dtype": torch.bfloat16}]
COMING += [  # on a part of the layers or modules
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": r".*layers\.[02]\.self_attn\.(q|k)_proj"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"},
    {"exclude_modules": ["model.layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]},
]


@pytest.mark.parametrize("options", COMING, ids=str)
def test_their_adapters_come_in(tmp_path, theirs, options):
    theirs.save_pretrained(tmp_path / "base")
    adapted, tokens = their_adapter(theirs, tmp_path / "adapter", **options), random_tokens(2, 20)
    model = adapters.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert all(
        adapter.A.dtype == adapter.B.dtype == torch.float32
        for adapter in rosa.adapters(model).values()
    )
    with torch.inference_mode():
        assert_close(model(tokens), adapted(tokens).logits)
        # Saved again, the adapter is a plain LoRA: the scaling of rsLoRA is part of alpha now
        rosa.save_adapter(model, tmp_path / "again")
        again = adapters.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "again")
        assert torch.equal(again(tokens), model(tokens))  # the same operations on the same values
        assert_close(rosa.merge(model)(tokens), adapted(tokens).logits)


LACKED = {
    "use_dora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "bias": "all",
}
LACKED |= {"modules_to_save": ["lm_head"], "lora_bias": True}
LACKED |= {
    "trainable_token_indices": [3],
    "init_lora_weights": "pissa",
    "target_modules": ["q_proj", "lm_head"],
}
INSTEAD = {
    "target_modules": (
        "holds base_model.model.lm_head.base_layer.weight, which is in no layer: let PEFT"
    )
}


@pytest.mark.parametrize("name", LACKED)
def test_what_their_adapters_have_and_we_lack_is_refused_by_name(tmp_path, name):
    base = as_theirs(random_model(attention_bias=True), tmp_path / "base")
    their_adapter(base, tmp_path / "adapter", **{name: LACKED[name]})
    model = Llama.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError) as error:
        adapters.load_adapter(model, tmp_path / "adapter")
    message = str(error.value)
    assert INSTEAD.get(name, f"{name} = {LACKED[name]!r} is not implemented") in message
    assert "\n" not in message and str(tmp_path / "adapter") in message and not rosa.adapters(model)


@pytest.mark.parametrize("shard", [5 * 10**9, 9000])
def test_a_merged_checkpoint_is_theirs(ckpt, shard, monkeypatch):
    monkeypatch.setattr(merge_file, "SHARD", shard)
    model, tokens = (
        randomise_adapters(rosa.attach(Llama.from_pretrained("ckpt"), 4, 8, 0.5, ALL)),
        random_tokens(2, 30),
    )
    rosa.save_adapter(model, "adapter")
    merge_file.run("--ckpt ckpt --adapter adapter --out merged".split())
    assert Path("merged/model.safetensors.index.json").is_file() == (shard == 9000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    with torch.inference_mode():
        assert_close(theirs.eval()(tokens).logits, model(tokens))


PHI3 = """if True:
    import json, sys, torch, transformers, rosa
    from extras import checkpoints, merge
    torch.manual_seed(0)
    sizes = dict(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, sliding_window=200))
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained("phi")
    tokens = torch.randint(1024, (2, 40))
    model = checkpoints.load_model("phi")
    bound = float(sys.argv[1])
    def differ(a, b):
        return (a - b).norm() / b.norm()
    assert differ(model(tokens), theirs.eval()(tokens).logits) < bound
    rosa.attach(model, 4, 8)
    for adapter in rosa.adapters(model).values():
        adapter.B.data.normal_(0, 0.1)
    assert differ(model(tokens), theirs(tokens).logits) > 100 * bound
    rosa.save_adapter(model, "adapter")
    merge.run("--ckpt phi --adapter adapter --out merged".split())
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert type(merged) is transformers.Phi3ForCausalLM
    assert differ(merged.eval()(tokens).logits, model(tokens)) < bound
"""


def test_what_merging_makes_of_a_fused_checkpoint_is_one_of_theirs(tmp_path):
    """The recipe of extras/README.md for Phi-3, applied to a copy of the project."""
    (diff,) = [text for text in DIFFS.values() if text.startswith("# stored: ")]
    for name in ("model.py", "rosa.py", "data", "extras"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    apply(diff, tmp_path)
    (tmp_path / "phi").mkdir()
    shutil.copy(DATA / "tiny" / "tokenizer.model", tmp_path / "phi")
    bound = rounding.bound(**rounding.of_model(random_model().config))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PHI3, str(bound)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
