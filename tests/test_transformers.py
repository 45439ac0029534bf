"""Statements about what goes in from transformers and PEFT, and out to them: checkpoints, tokenizers, adapters, merged models."""

import json
import random

import pytest
import rounding
import torch
from conftest import generator_of, random_model, random_tokens, randomise_adapters, seed_torch
from safetensors.torch import load_file, save_file

import rosa
from data.tokenizer import HERE as DATA
from data.tokenizer import load_tokenizer
from extras import merge as merge_file
from model import Llama, LlamaConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.numeric
ALL = "q,k,v,o,gate,up,down"
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


FAMILIES = {  # what tells their configs apart, the sizes aside
    "LLaMA 1": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "LLaMA 2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "LLaMA 3": ("llama", {"rms_norm_eps": 1e-5, **rope(500000.0), "bos_token_id": 95, "eos_token_id": 96}),
    "LLaMA 3.1": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "eos_token_id": [94, 95, 96]}),
    "LLaMA 3.2": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True,
                            "head_dim": 8}),
    "TinyLlama": ("llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 1}),
    "SmolLM 2": ("llama", {"rms_norm_eps": 1e-5, **rope(100000.0), "tie_word_embeddings": True}),
    "Qwen2.5 0.5B": ("qwen2", {**rope(1e6), "tie_word_embeddings": True, "sliding_window": 20, "max_window_layers": 1}),
    "Qwen2.5 7B": ("qwen2", {**rope(1e6), "sliding_window": 20, "use_sliding_window": False}),
    "Mistral 0.1": ("mistral", {"sliding_window": 60, "rms_norm_eps": 1e-5}),
    "Mistral 0.3": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-5, **rope(1e6)}),
    "Mistral Nemo": ("mistral", {"sliding_window": None, "head_dim": 12, **rope(1e6)}),
}


@pytest.fixture(params=FAMILIES)
def theirs(request):
    """A random model of transformers' own of each family, every part of it large enough to matter."""
    family, changes = FAMILIES[request.param]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SMALL | changes))
    generator = generator_of(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model.float().eval()


def as_theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def assert_close(ours, theirs):
    rounding.assert_close(ours, theirs, **rounding.of_model(LlamaConfig(**SMALL)))


# --- checkpoints ---


@torch.inference_mode()
def test_every_family_comes_in_and_goes_out(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = Llama.from_pretrained(tmp_path / "theirs"), random_tokens(2, 40)
    expected = theirs(tokens).logits
    assert_close(ours(tokens), expected)
    prompts = [tokens[0, :7].tolist(), tokens[1, :30].tolist()]
    for prompt, answer in zip(prompts, ours.generate(prompts, 20, None)):
        ids = torch.tensor([prompt])
        ids = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)
        rounding.assert_greedy(ours, [prompt], [ids[0, len(prompt):].tolist()], 20)
        rounding.assert_greedy(ours, [prompt], [answer], 20)
    ours.save_pretrained(tmp_path / "ours")
    again = as_theirs(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert_close(again(tokens).logits, expected)
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "eos_token_id", "head_dim"):
        if hasattr(theirs.config, name):  # qwen2 has no head_dim of its own
            assert getattr(again.config, name) == getattr(theirs.config, name), name
    if theirs.config.model_type == "mistral":
        assert again.config.sliding_window == theirs.config.sliding_window


def test_every_other_architecture_is_refused_by_name(tmp_path):
    names = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES) - {"llama", "mistral", "qwen2"}
    assert len(names) > 200
    for name in names:
        (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": name}))
        with pytest.raises(ValueError, match=f"model_type {name!r} is not implemented"):
            LlamaConfig.from_file(tmp_path)


@pytest.mark.parametrize("family, changes, message", [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, "use_sliding_window|layer_types"),
    ("llama", rope(1e4) | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not implemented"),
])
def test_what_a_familys_config_switches_on_and_we_lack_is_refused(tmp_path, family, changes, message):
    transformers.AutoConfig.for_model(family, **SMALL | changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_file(tmp_path)


# --- tokenizers ---


def strings(count=4000):
    """Texts made to hurt."""
    rng = random.Random(0)
    parts = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "a", "The", " the", "hello", " world", "123", "4567", " 8", "3.14", "é", "naïve",
             "e\u0301", "中文", "日本語", "한국어", "😀", "👩‍👩‍👧", "🇩🇪", "\x00", "\x01", "\x7f", "\u200b", "\u00a0", "\ufeff", "▁", " ▁", "'s", "don't",
             "...", "!?", "<unk>", "</s>", "<s>", "[INST]", "<|endoftext|>", "<|im_start|>", "<0x0A>", "ﬁ", "İ", "ß", "٣", "१", "# include", " = ",
             "def f(x):\n    return x", "\u2028", "\ud7ff", "\U000e0001"]
    texts = ["", *parts, *(" " + part for part in parts), *("  " + part for part in parts), *(part + " " for part in parts)]
    ranges = [(1, 0x7f), (0x80, 0x7ff), (0x800, 0xd7ff), (0xe000, 0xffff), (0x10000, 0x10ffff)]
    while len(texts) < count:
        anything = rng.random() < 0.15
        texts.append("".join(chr(rng.randint(*rng.choice(ranges))) if anything else rng.choice(parts) for _ in range(rng.randint(1, 12))))
    return texts


def sentencepiece_models():
    yield "tiny", DATA / "tiny" / "tokenizer.model"
    mistral_common = pytest.importorskip("mistral_common")
    for directory in mistral_common.__path__:
        for file in sorted((DATA / directory / "data").glob("*.model*")):
            yield file.name, file


def write_tokenizer(directory, model, **config):
    """A directory as it lies on the Hub: tokenizer.model, the tokenizer.json made of it (merges in the order of the pieces'
    scores), tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model.read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    converted = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    converted.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    converted.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    converted.add_special_tokens([AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type in (2, 3)])
    directory.mkdir()
    converted.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def assert_same_ids(directory):
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    controls = {ours.bos_id, ours.eos_id}
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not controls & set(ids), text  # "</s>" in somebody's text is four characters
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), text


def test_sentencepiece_ids_are_those_of_transformers(tmp_path):
    pytest.importorskip("google.protobuf")
    for name, model in sentencepiece_models():
        assert_same_ids(write_tokenizer(tmp_path / name, model, legacy=False))
    assert_same_ids(write_tokenizer(tmp_path / "unprefixed", model, add_prefix_space=False))


def test_ids_of_a_tokenizer_json_are_those_of_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, digits in (("like LLaMA 3 and Qwen", r"\p{N}{1,3}"), ("like SmolLM", r"\p{N}")):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
                                 + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                                 special_tokens=["<s>", "</s>", "<|im_start|>", "<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(strings(1000), trainer)
        directory = tmp_path / name
        directory.mkdir()
        tokenizer.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        assert_same_ids(directory)


# --- adapters ---


def trained(model, k_ratio):
    """Three steps of training, with DLS where k_ratio < 1: some adapters then are still zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, selector = torch.optim.AdamW(parameters, lr=1e-2), rosa.LayerSelector(model, k_ratio, select_every=2)
    for step in range(3):
        selector.before_forward(step)
        model.loss(random_tokens(4, 16), random_tokens(4, 16, seed=1)).backward()
        selector.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("k_ratio", [1.0, 0.34])
@pytest.mark.parametrize("ratio, targets", [(0.25, "q,k"), (0.5, "k"), (1.0, ALL), (0.5, ALL)], ids=["RoSA", "RoSA on k", "LoRA", "both"])
def test_our_adapters_go_out(tmp_path, theirs, ratio, targets, k_ratio):
    peft = pytest.importorskip("peft")
    theirs.save_pretrained(tmp_path / "base")
    seed_torch(0)
    model, tokens = Llama.from_pretrained(tmp_path / "base"), random_tokens(2, 20)
    before = model(tokens).detach()
    trained(rosa.attach(model, 4, 6.5, ratio, targets), k_ratio)
    rosa.save_adapter(model, tmp_path / "adapter")
    assert (model(tokens) - before).abs().max() > 0.01
    with torch.inference_mode():
        assert_close(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(tokens).logits, model(tokens))
        named = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()  # finds its base
        assert_close(named(tokens).logits, model(tokens))


def their_adapter(theirs, directory, dtype=torch.float32, **options):
    """An adapter of PEFT's, B random, saved; and the adapted model."""
    peft = pytest.importorskip("peft")
    modules = [module.split(".")[1] for module in rosa.TARGETS.values()]
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": modules, "lora_dropout": 0.1} | options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return adapted.eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}, {"target_modules": ["v_proj"]},
                                     {"target_modules": r".*\.(q_proj|down_proj)"}, {"init_lora_weights": "gaussian"}], ids=str)
def test_their_adapters_come_in(tmp_path, theirs, options):
    theirs.save_pretrained(tmp_path / "base")
    adapted, tokens = their_adapter(theirs, tmp_path / "adapter", **options), random_tokens(2, 20)
    model = rosa.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.inference_mode():
        assert_close(model(tokens), adapted(tokens).logits)
        rosa.save_adapter(model, tmp_path / "again")  # and out again: rsLoRA's scaling is in alpha now
        again = rosa.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "again")
        assert torch.equal(again(tokens), model(tokens))
        assert_close(rosa.merge(model)(tokens), adapted(tokens).logits)


@pytest.mark.parametrize("options, message", [
    ({"use_dora": True}, "use_dora = True is not implemented"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not implemented"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not implemented"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"bias": "all"}, "bias = 'all' is not implemented"),
    ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base weights"),
    ({"target_modules": ["q_proj", "lm_head"]}, "unexpected base_model.model.lm_head.lora_A.weight"),
])
def test_what_their_adapters_have_and_we_lack_is_refused_by_name(tmp_path, options, message):
    random_model(attention_bias=True).save_pretrained(tmp_path / "base")
    their_adapter(as_theirs(tmp_path / "base"), tmp_path / "adapter", **options)
    model = Llama.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message) as error:
        rosa.load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(error.value) and str(tmp_path / "adapter") in str(error.value) and not rosa.adapters(model)


def test_a_pickled_adapter_is_refused(tmp_path):
    their_adapter(as_theirs_of(random_model(), tmp_path / "base"), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors, only adapter_model.bin, a pickle"):
        rosa.load_adapter(random_model(), tmp_path)


def as_theirs_of(model, directory):
    model.save_pretrained(directory)
    return as_theirs(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_their_adapters_of_16_bits_come_in(tmp_path, dtype):
    their_adapter(as_theirs_of(random_model(), tmp_path / "base"), tmp_path / "adapter", dtype=dtype)
    model = rosa.load_adapter(random_model(), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, adapter in rosa.adapters(model).items():
        assert adapter.B.dtype == torch.float32
        assert torch.equal(adapter.B, stored[f"base_model.model.{name}.lora_B.weight"].float())


# --- merged models ---


@pytest.mark.parametrize("shard", [5 * 10**9, 9000])
def test_a_merged_checkpoint_is_theirs(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(merge_file, "SHARD", shard)
    model = random_model(vocab_size=1024, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes((DATA / "tiny" / "tokenizer.model").read_bytes())
    rosa.save_adapter(randomise_adapters(rosa.attach(model, 4, 8, 0.5, ALL)), tmp_path / "adapter")
    merge_file.run(["--ckpt", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file() == (shard == 9000)
    tokens = random_tokens(2, 30)
    with torch.inference_mode():
        assert_close(as_theirs(tmp_path / "merged")(tokens).logits, model(tokens))
