"""A self-contained LLaMA: a Hugging Face directory in, logits and greedy answers out, and a Hugging
Face directory out.

Read first: `Llama.forward` and `hidden_states`, then DecoderLayer, Attention and `rotate`; they are
the transformer. Skip at first reading: everything about files, which is from_pretrained,
save_pretrained, and all that follows KVCache.

This file owns the architecture, the safetensors files, the key/value cache and greedy generation.
It deals in token ids: text is `data/`'s business. It knows nothing of adapters: `rosa.py` wraps its
linear layers from outside. Modules and parameters are named as in a Hugging Face checkpoint, so a
tensor's name there is its name here. train.py and eval.py replace some of these methods by faster
ones, and a line on the screen says which; with `--plain` every method runs as it is written here.

    tokens [B, T] -> embed_tokens
      -> L x ( x += self_attn(input_layernorm(x)) ; x += mlp(post_attention_layernorm(x)) )
      -> norm -> lm_head -> logits [B, T, V]

Implemented are the directories that transformers writes for `model_type` "llama" (LLaMA 1, 2, 3,
SmolLM, TinyLlama, ...), "mistral" (the same network), and "qwen2" (the same with biases on q, k and
v). Whatever else a config.json asks for is refused by name. `extras/checkpoints.py` reads the other
directories that there are, and translates them to what this file implements.

Letters in shapes: B rows, T tokens, D hidden_size, H query heads, K key/value heads, d head_dim, V
vocab_size, L layers, S all positions that attention sees, those in the cache and the T new ones.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


class Llama(nn.Module):
    """The decoder-only transformer with its vocabulary projection. `Llama(config)` is randomly
    initialised."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # inv_freq is no buffer: `model.to(bfloat16)` would round a buffer.
        self.inv_freq = rope_inverse_frequencies(config)
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(layers)
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.tie_weights()

    def tie_weights(self):
        """Let lm_head and the embedding be one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def forward(self, tokens):
        """Logits of the next token at every position: LongTensor [B, T] -> [B, T, V], in the
        weights' dtype.

        Attention is causal, so rows of different lengths share a batch padded on the right with any
        id."""
        return self.logits(self.hidden_states(tokens))

    def logits(self, x):
        """The vocabulary projection, the one place that applies lm_head: hidden states [.., D] ->
        [.., V]."""
        return self.lm_head(x)

    def hidden_states(self, tokens, cache=None):
        """What `logits` reads: [B, T] -> [B, T, D]. With a cache the new tokens follow those in the
        cache. The check below does not count the tokens in the cache: `generate` has called
        check_prompts, which counts all."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(
                f"{T} tokens are more than the model's context of {self.config.context}"
            )
        positions = torch.arange(T, device=tokens.device)  # [T]
        if cache is not None:
            # A KVCache has one length for all rows. The cache of extras/inference.py has one for
            # each row, [B, 1], and so the positions are [B, T].
            positions = cache.length + positions
        rope = rope_table(positions, self.inv_freq)
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, cache, i)
        return self.model.norm(x)

    def loss(self, tokens, labels):
        """Summed cross-entropy, in nats: a float32 scalar.

        tokens [B, T], padded on the right; labels [B, T], the token that follows each position, or
        -100 where there is nothing to predict. Only labelled positions reach the vocabulary
        projection."""
        labelled = labels != -100
        x = self.hidden_states(tokens)[labelled]  # [N, D]
        return F.cross_entropy(self.logits(x).float(), labels[labelled], reduction="sum")

    def generate(self, prompts, max_new_tokens, eos_id):
        """Greedy continuation of prompts (lists of ids), one prompt at a time. Returns the new ids
        of each, the end-of-sequence token left out; `eos_id` is one id, several, or None.

        Raises ValueError for an empty prompt, and for one that leaves no room for the new
        tokens."""
        check_prompts(prompts, max_new_tokens, self.config)
        eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        answers = []
        for prompt in prompts:
            cache = KVCache(self.config)
            ids = prompt  # what the model has not read yet; what it has read is in the cache
            answer = []
            while len(answer) < max_new_tokens:
                with torch.inference_mode():
                    tokens = torch.tensor([ids], device=self.device)
                    x = self.hidden_states(tokens, cache)  # [1, T, D]
                    token = self.logits(x[:, -1]).argmax().item()
                if token in eos_ids:
                    break
                answer.append(token)
                ids = [token]
            answers.append(answer)
        return answers

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=None):
        """Load a directory that transformers has written: config.json, and the weights in
        safetensors files. dtype None: as stored. Raises ValueError or OSError for a directory whose
        tensors are not exactly those of the config's model."""
        directory = Path(directory)
        config = LlamaConfig.from_file(directory)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        tensors = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as stored:  # memory-mapped
                for name in stored.keys():
                    if name in tensors:
                        raise ValueError(f"{name} is in {file} and in another file of the model")
                    if not name.endswith("rotary_emb.inv_freq"):  # from before transformers 4.32
                        tensors[name] = stored.get_tensor(name)
        # named_parameters() lists a tied weight once, as the embedding, and the files store it so.
        check_tensors(directory, tensors, dict(model.named_parameters()), dtype)
        # copy: each tensor leaves its file and gets memory of its own.
        tensors = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
        # strict=False accepts that a tied lm_head is missing; check_tensors has refused all else.
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        model.name_or_path = str(directory)
        return model.eval()

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors as transformers writes them. Raises ValueError
        for a parameter that Llama(config) does not have, such as an adapter's."""
        directory = Path(directory)
        with torch.device("meta"):
            expected = Llama(self.config).state_dict()
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name not in expected:
                raise ValueError(
                    f"cannot save {name}, which Llama(config) does not have: call "
                    "rosa.merge(model) if it is an adapter's; if you have added it, add a field to "
                    "LlamaConfig by which Llama(config) makes it"
                )
            tensors[name] = tensor.contiguous()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # stored once, as the embedding

        raw = {name: value for name, value in asdict(self.config).items() if value is not None}
        raw["architectures"] = [FAMILIES[self.config.model_type][0]]
        raw["hidden_act"] = "silu"
        raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        if self.config.model_type == "mistral":
            # Write null, not nothing: transformers' default for Mistral is a window of 4096.
            raw["sliding_window"] = self.config.sliding_window

        # Each file replaces an older one by a rename, so that no file is ever half-written.
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors.partial", metadata={"format": "pt"})
        os.replace(directory / "model.safetensors.partial", directory / "model.safetensors")
        (directory / "config.json.partial").write_text(json.dumps(raw, indent=2) + "\n")
        os.replace(directory / "config.json.partial", directory / "config.json")


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache, layer):
        """[B, T, D] -> [B, T, D]. rope: what `rope_table` returns; layer: the index of this
        layer."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal self-attention in which H / K query heads share each key/value head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        q, k = rotate(q, *rope), rotate(k, *rope)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)  # [B, K, S, d] twice
        y = self.attend(q, k, v, mask)  # [B, H, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        """softmax(q k^T / sqrt(d)) v: [B, H, T, d]. mask: what each token sees, as `KVCache.update`
        returns it."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )


def rope_inverse_frequencies(config):
    """Radians per position of each RoPE pair i, `theta ** (-2i / d)` as scaled by `rope_scaling`.
    [d/2], float32. Raises ValueError for a scaling that is not implemented."""
    # The frequencies are made on the CPU, even while parameters are made on the meta device, and in
    # float32, whatever the dtype of the weights.
    dimensions = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (dimensions / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") != "llama3":
        raise ValueError(
            f"rope_scaling with rope_type {scaling.get('rope_type')!r} is not implemented: only "
            "linear and llama3 are"
        )
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if name not in scaling:
            raise ValueError(f"rope_scaling with rope_type 'llama3' has no {name}")
    # LLaMA 3.1 divides the frequencies of the pairs that turn little within the original context,
    # keeps those of the pairs that turn often, and blends between the two.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept as it is; 0: divided by the factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rope_table(positions, inv_freq):
    """The two tables that `rotate` needs. It splits a head into its halves (a, b) and computes

        (a, b) * (cos, cos) + (b, a) * (-sin, sin)

    This function returns (cos, cos) and (-sin, sin) for the positions [T] or [B, T]. Each table is
    [.., 1, T, d], in float32; all heads and layers share them."""
    angles = positions[..., None].float() * inv_freq.to(positions.device)  # [.., T, d/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-3), torch.cat((-sin, sin), -1).unsqueeze(-3)


def rotate(x, cos, sin):
    """RoPE, in float32: turn pair i, the dimensions (i, i + d/2), by its angle. x [B, heads, T, d].

    A pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    h = x.float()
    swapped = h.roll(h.shape[-1] // 2, -1)  # (b, a)
    return torch.addcmul(h * cos, swapped, sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, intermediate, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, intermediate, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate, D, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistic in float32. The weight is cast to the dtype
    of x because it may be float32: `train.py --method peft:LN_TUNING` trains it so."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight.to(x.dtype)


class KVCache:
    """The keys (rotated) and values of the tokens so far, for every layer. Attention uses only
    `update`, hidden_states only `length`: any class with these two can stand in its place."""

    def __init__(self, config):
        self.length = 0  # how many tokens the cache holds, which is the position of the next one
        self.keys = [None] * config.num_hidden_layers
        self.values = [None] * config.num_hidden_layers

    def update(self, layer, k, v):
        """Add the k and v of T new tokens, [B, K, T, d]. Returns the k and v of all S tokens, [B,
        K, S, d], and a mask. The mask is None where nothing lies before the new tokens: then their
        attention is plain causal attention. Else it is [1, 1, T, S], true where a new token sees a
        position."""
        T = k.shape[2]
        S = self.length + T
        mask = None
        if self.length:
            k = torch.cat((self.keys[layer], k), 2)
            v = torch.cat((self.values[layer], v), 2)
            # New token i sees the positions up to S - T + i.
            mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=k.device).tril(S - T)
        self.keys[layer], self.values[layer] = k, v
        # The tokens of a forward pass begin at the same position in every layer, so the length
        # changes after the last one.
        if layer == len(self.keys) - 1:
            self.length = S
        return k, v, mask


# --- config.json, and what files must hold ---

MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
# model_type -> the name of its architecture, and transformers' defaults for the fields that a
# config.json leaves out, where they differ from LLaMA's
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", MISTRAL),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
}
# Fields of a config.json that have no defaults
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Fields of which one value alone is implemented; absent and null mean that value too
IMPLEMENTED = {
    "hidden_act": "silu",
    "quantization_config": None,
    "use_sliding_window": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
}


@dataclass
class LlamaConfig:
    """The fields of a Hugging Face config.json that this file implements, under the same names.

    Raises ValueError for a combination that the model would compute wrongly."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", ...}
    attention_bias: bool = False  # llama: biases on q, k, v and o; qwen2 always has them on q, k, v
    mlp_bias: bool = False  # llama: biases on gate, up and down
    sliding_window: int | None = None  # mistral: how many tokens attention sees; None: all
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        self.rms_norm_eps = float(self.rms_norm_eps)
        self.rope_theta = float(self.rope_theta)
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not implemented: only {', '.join(FAMILIES)} are"
            )
        # transformers reads the two bias fields for llama alone, and sliding_window for mistral. A
        # qwen2 has a window only if it says use_sliding_window, which IMPLEMENTED refuses.
        if self.model_type != "llama":
            self.attention_bias = False
            self.mlp_bias = False
        if self.model_type != "mistral":
            self.sliding_window = None
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{heads}"
                )
            self.head_dim = self.hidden_size // heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if not rope_inverse_frequencies(self).isfinite().all():
            raise ValueError(
                f"rope_theta {self.rope_theta}, rope_scaling {self.rope_scaling}: frequencies not "
                "finite"
            )

    @property
    def context(self):
        """The longest sequence, in tokens. A sliding window is not implemented. A sequence that is
        no longer than the window is not affected by it, so longer ones are not allowed."""
        if self.sliding_window is None:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.sliding_window)

    @classmethod
    def from_file(cls, path):
        """Read a config.json, or the one in a directory. Raises ValueError naming the file and the
        field."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        generation = path.with_name("generation_config.json")
        generation_config = {}
        if generation.is_file():
            generation_config = json.loads(generation.read_text(encoding="utf-8-sig"))
        try:
            return cls.from_dict(raw, generation_config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw, generation_config):
        """Make a config of what the two JSON files hold. Where generation_config.json names the
        end-of-sequence tokens, it decides. Raises ValueError for what this file does not
        implement."""
        for name in REQUIRED:
            if name not in raw:
                raise ValueError(f"the key {name!r} is missing")
        model_type = raw.get("model_type")
        if model_type not in FAMILIES:
            return cls(model_type=model_type)  # __post_init__ refuses it
        architecture, defaults = FAMILIES[model_type]
        # A default replaces a field that is absent, not one that is null: a Mistral that has no
        # window says "sliding_window": null.
        raw = defaults | raw
        # transformers 4 writes rope_theta, and rope_scaling where RoPE is scaled. transformers 5
        # writes one dict, rope_parameters, which holds rope_theta beside the scaling. If a file has
        # both, rope_scaling counts, as it does for transformers.
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                raw[name] = rope.pop(name)
        # What is left in rope is the scaling.
        if rope and "rope_type" not in rope:
            raise ValueError(f"rope_scaling {rope!r} has no rope_type")
        is_scaled = rope.get("rope_type", "default") != "default"
        raw["rope_scaling"] = rope if is_scaled else None

        if raw.get("architectures") not in (None, [architecture]):
            raise ValueError(
                f"architectures = {raw['architectures']!r} is not implemented (only "
                f"{[architecture]!r} is)"
            )
        for name, value in IMPLEMENTED.items():
            if raw.get(name) not in (value, None):
                raise ValueError(f"{name} = {raw[name]!r} is not implemented (only {value!r} is)")
        for layer_type in raw.get("layer_types") or ():
            if layer_type != "full_attention":
                raise ValueError(
                    f"layer_types = {[layer_type]!r} is not implemented (only full_attention is)"
                )
        if generation_config.get("eos_token_id") is not None:
            raw["eos_token_id"] = generation_config["eos_token_id"]
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})


def check_prompts(prompts, max_new_tokens, config):
    """Raise ValueError for a prompt, a list of ids, that is empty or leaves no room for so many new
    tokens."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) + max_new_tokens > config.context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds "
                f"the model's context of {config.context}"
            )


def weight_files(directory):
    """The safetensors files of a checkpoint directory: the one, or those that the index names."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
    return [directory / name for name in sorted(set(weight_map.values()))]


# An integer tensor is quantised: it would need its scales.
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def check_tensors(directory, tensors, parameters, dtype):
    """Raise ValueError unless the tensors, name -> tensor, are floats with exactly the names and
    shapes of the parameters. If no dtype is given to convert them to, they must share one."""
    unmatched = sorted(tensors.keys() ^ parameters.keys())
    if unmatched:
        name = unmatched[0]
        problem = "is missing" if name in parameters else "belongs to no parameter of this model"
        raise ValueError(f"{directory}: the tensor {name} {problem}")
    for name, tensor in tensors.items():
        shape = parameters[name].shape
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise ValueError(
                f"{directory}: {name} is {tensor.dtype} {list(tensor.shape)}, not floats "
                f"{list(shape)}"
            )
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) > 1 and dtype is None:
        raise ValueError(f"{directory} stores {' and '.join(sorted(dtypes))}: choose a dtype")
