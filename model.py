"""A self-contained LLaMA: Hugging Face directory in, logits and greedy answers out, Hugging Face
directory out.

This file owns the architecture, the safetensors files, the key/value cache and greedy generation.
It deals in token ids: text is `data/`'s business. It knows nothing of adapters: `rosa.py` wraps its
linear layers from outside. Modules and parameters are named as in a Hugging Face checkpoint, so a
tensor's name there is its name here. In train.py and eval.py faster code stands for some of the
methods here, and says so; `--plain` runs them as written.

    tokens [B, T] -> embed_tokens
      -> L x ( x += self_attn(input_layernorm(x)) ; x += mlp(post_attention_layernorm(x)) )
      -> norm -> lm_head -> logits [B, T, V]

Implemented: `model_type` "llama" (LLaMA 1, 2, 3, SmolLM, TinyLlama, ...), "mistral" (the same), and
"qwen2" (the same with biases on q, k and v). Whatever else a config.json asks for is refused by
name.

Letters in shapes: B rows, T tokens, D hidden_size, H query heads, K key/value heads, d head_dim, V
vocab_size, L layers, S all positions that attention sees, those in the cache and the T new ones.
"""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
# model_type -> its architecture, and its own defaults for fields that a config.json leaves out
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", MISTRAL),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
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
    # On q, k, v and o; llama alone: qwen2 has biases on q, k and v, mistral has none
    attention_bias: bool = False
    mlp_bias: bool = False  # llama alone
    sliding_window: int | None = None  # mistral alone: so many tokens attention sees; None: all
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # Decides where a checkpoint has tensors of several
    torch_dtype: str | None = field(default=None, compare=False)

    def __post_init__(self):
        self.rms_norm_eps, self.rope_theta = float(self.rms_norm_eps), float(self.rope_theta)
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not implemented: only {', '.join(FAMILIES)} are"
            )
        if self.model_type != "llama":
            self.attention_bias = self.mlp_bias = False
        if self.model_type != "mistral":
            self.sliding_window = None
        heads, key_value_heads = (
            self.num_attention_heads,
            self.num_key_value_heads or self.num_attention_heads,
        )
        self.num_key_value_heads = key_value_heads
        if heads % key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{key_value_heads}"
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
        """The longest sequence, in tokens. Sliding windows, not implemented, change nothing up to
        there. Where linear scaling does not say what it started from, max_position_embeddings is
        taken for that."""
        longest, scaling = self.max_position_embeddings, self.rope_scaling or {}
        if (
            scaling.get("rope_type") == "linear"
            and "original_max_position_embeddings" not in scaling
        ):
            longest = int(longest * scaling["factor"])
        return min(longest, self.sliding_window or longest)

    @classmethod
    def from_file(cls, path):
        """Read a config.json, or the one in a directory. Raises ValueError naming the file and the
        field."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        generation = path.parent / "generation_config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        if generation.is_file():  # where it names the end-of-sequence tokens, it decides
            eos_token_id = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
            raw["eos_token_id"] = raw.get("eos_token_id") if eos_token_id is None else eos_token_id
        try:
            return cls(**implemented_fields(raw))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def implemented_fields(raw):
    """The LlamaConfig fields in a raw config.json. Raises ValueError for what this file does not
    implement."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if name not in raw:
            raise ValueError(f"the key {name!r} is missing")
    if str(raw.get("model_type")) not in FAMILIES:
        return {"model_type": raw.get("model_type")}  # which LlamaConfig refuses
    architecture, defaults = FAMILIES[raw["model_type"]]
    raw = defaults | raw
    # Transformers 5 writes the second
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    # Early checkpoints say LLaMAForCausalLM, those that were saved without their lm_head
    # LlamaModel.
    spellings = [
        str(name).replace("LLaMA", "Llama") for name in raw.get("architectures") or [architecture]
    ]
    raw["architectures"] = [name.replace("Model", "ForCausalLM") for name in spellings]
    implemented = {
        "architectures": [architecture],
        "hidden_act": "silu",
        "quantization_config": None,
        "use_sliding_window": False,
        "attention_dropout": 0,
        "partial_rotary_factor": 1,
        "layer_types": ["full_attention"] * len(raw.get("layer_types") or ()),
    }
    for name, value in implemented.items():
        # Transformers 5 has partial_rotary_factor among rope_parameters
        setting = rope.get(name, raw.get(name))
        if setting not in (value, None):
            raise ValueError(f"{name} = {setting!r} is not implemented (only {value!r} is)")
    raw["torch_dtype"] = raw.get("dtype", raw.get("torch_dtype"))  # transformers 5 writes the first
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))  # early configs: type
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return {name: raw[name] for name in LlamaConfig.__dataclass_fields__ if name in raw}


def rope_inverse_frequencies(config):
    """Radians per position of each RoPE pair i, `theta ** (-2i / d)` as scaled by `rope_scaling`.
    [d/2], float32."""
    # On the CPU even while parameters are made on the meta device, and in float32 whatever the
    # weights' dtype.
    exponent = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") != "llama3":
        raise ValueError(
            f"rope_scaling {scaling.get('rope_type')!r} is not implemented: only linear and "
            "llama3 are"
        )
    # LLaMA 3.1: wavelengths beyond the original context are stretched, short ones kept, the ones
    # between blended.
    # Full turns in that context
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is; 0: divided by factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class Llama(nn.Module):
    """The decoder-only transformer with its vocabulary projection. `Llama(config)` is randomly
    initialised."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # No buffer: `.to(bfloat16)` must not round it
        self.inv_freq = rope_inverse_frequencies(config)
        # Filled below: nn.Embedding would fill it too
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.model["layers"] = nn.ModuleList(
            DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if config.tie_word_embeddings:
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
        """What `logits` reads: [B, T] -> [B, T, D]. With a cache the tokens follow those that it
        holds."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(
                f"{T} tokens are more than the model's context of {self.config.context}"
            )
        positions = torch.arange(T, device=tokens.device)  # [T]
        if cache is not None:  # after what it holds: a number, or [B] in a cache whose rows differ
            # [T] or [B, T]
            positions = torch.as_tensor(cache.length, device=tokens.device)[..., None] + positions
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
        """Greedy continuation of prompts, lists of ids, one after the other. Returns the new ids of
        each, the end-of-sequence token left out; `eos_id` is one id, several, or None.

        Raises ValueError for an empty prompt, and for one that leaves no room for the new
        tokens."""
        check_prompts(prompts, max_new_tokens, self.config)
        eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        answers = []
        for prompt in prompts:
            cache, ids, answer = KVCache(self.config), prompt, []
            while len(answer) < max_new_tokens:
                with torch.inference_mode():
                    # [1, T, D]
                    x = self.hidden_states(torch.tensor([ids], device=self.device), cache)
                    token = self.logits(x[:, -1]).argmax().item()
                if token in eos_ids:
                    break
                answer.append(token)
                ids = [token]  # what came before is in the cache
            answers.append(answer)
        return answers

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=None):
        """Load a Hugging Face directory. dtype None: as stored. A stored lm_head counts, whatever
        the config says of tying, and an equal copy is tied. Raises ValueError or OSError for what
        is not exactly the config's model.

        One tensor at a time goes from its file to its place, file by file, the largest of each
        first; the file is opened anew for each, so that what was read of it leaves memory."""
        directory = Path(directory)
        config, files = LlamaConfig.from_file(directory), tensor_files(directory)
        tied = config.tie_word_embeddings
        config.tie_word_embeddings = tied and "lm_head.weight" not in files
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        model.name_or_path = str(directory)
        parameters = dict(model.named_parameters())
        if unmatched := sorted(parameters.keys() ^ files.keys()):
            problem = (
                "is missing"
                if unmatched[0] in parameters
                else "belongs to no parameter of this model"
            )
            raise ValueError(f"{directory}: the tensor {unmatched[0]} {problem}")
        for name in sorted(files, key=lambda name: (files[name][0], -parameters[name].numel())):
            path, stored_name = files[name]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(stored_name)
            if tensor.shape != parameters[name].shape or tensor.dtype not in FLOATS:
                shape = list(parameters[name].shape)
                raise ValueError(
                    f"{directory}: {name} is {tensor.dtype} {list(tensor.shape)}, not floats "
                    f"{shape}"
                )
            module, _, leaf = name.rpartition(".")
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
        if len(dtypes := {p.dtype for p in model.parameters() if not p.is_meta}) > 1:
            stated = getattr(torch, str(config.torch_dtype), None)
            model.to(stated if stated in FLOATS else functools.reduce(torch.promote_types, dtypes))
        if (
            config.tie_word_embeddings
            or tied
            and torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        ):
            config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
        elif tied:
            print(
                f"{directory}: lm_head is not the embedding to which config.json ties it: both "
                "are kept"
            )
        return model.eval()

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors in Hugging Face layout; an existing file is
        replaced at once, whole.

        Raises ValueError for a parameter that Llama(config) does not have, such as an adapter's."""
        with torch.device("meta"):
            names = set(Llama(self.config).state_dict())
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if extra := sorted(set(tensors) - names):
            advice = (
                "rosa.merge(model) folds adapters in; a parameter of your own is made where "
                "a field of config says so"
            )
            raise ValueError(f"cannot save {extra[0]}, which Llama(config) does not have: {advice}")
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
        raw = {key: value for key, value in asdict(self.config).items() if value is not None}
        raw |= {"architectures": [FAMILIES[self.config.model_type][0]], "hidden_act": "silu"}
        raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        if self.config.model_type == "mistral":
            # Null: none; were it absent, that would say 4096
            raw["sliding_window"] = self.config.sliding_window
        save_file(tensors, directory / "model.safetensors.partial", metadata={"format": "pt"})
        (directory / "config.json.partial").write_text(json.dumps(raw, indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(directory / f"{name}.partial", directory / name)


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache, layer):  # [B, T, D] -> [B, T, D]; layer: its index
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
        q, k, mask = rotate(q, *rope), rotate(k, *rope), None
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


def rope_table(positions, inv_freq):
    """What `rotate` multiplies by: the cosines [.., 1, T, d] and the sines, negative in the first
    half, of positions [.., T]. Float32; the same for every head and layer."""
    angles = positions[..., None].float() * inv_freq.to(positions.device)  # [.., T, d/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-3), torch.cat((-sin, sin), -1).unsqueeze(-3)


def rotate(x, cos, sin):
    """RoPE: turn pair i, the dimensions (i, i + d/2), by its angle, in float32. x [B, heads, T,
    d]."""
    h = x.float()
    swapped = h.roll(h.shape[-1] // 2, -1)  # the other dimension of each pair
    return torch.addcmul(h * cos, swapped, sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias
        )
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias
        )

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistic in float32."""

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
        self.length = 0  # how many tokens it holds: the position of the next one
        self.keys, self.values = [[None] * config.num_hidden_layers for _ in range(2)]

    def update(self, layer, k, v):
        """Add the k and v of T new tokens, [B, K, T, d]. Returns those of all S tokens, [B, K, S,
        d], and a mask: None where nothing lies before the new tokens, which then is plain causal
        attention, else [B or 1, 1, T, S], true where a token (row) sees a position."""
        T, S = k.shape[2], self.length + k.shape[2]
        if self.length:
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        self.keys[layer], self.values[layer] = k, v
        mask = (
            torch.ones(1, 1, T, S, dtype=torch.bool, device=k.device).tril(S - T) if S > T else None
        )
        # For all layers of a pass the tokens begin at the same place
        if layer == len(self.keys) - 1:
            self.length = S
        return k, v, mask


def check_prompts(prompts, max_new_tokens, config):
    """Raise ValueError for a prompt, a list of ids, that is empty or leaves no room for so many new
    tokens."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) + max_new_tokens > config.context:
            problem = (
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it "
                "exceeds the model's"
            )
            raise ValueError(f"{problem} context of {config.context}")


# One of 8 bits would need its scales
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def full_name(name):
    """A tensor's name, with the prefix that checkpoints of the transformer without its lm_head
    leave out."""
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def tensor_files(directory):
    """name -> (safetensors file, name in there) of the tensors in a checkpoint directory."""
    names = {"model.safetensors"}
    if not (directory / "model.safetensors").is_file():
        names = set(
            json.loads((directory / "model.safetensors.index.json").read_text())[
                "weight_map"
            ].values()
        )
    files = {}
    for path in sorted(directory / name for name in names):
        with safe_open(path, framework="pt") as file:
            files |= {
                full_name(n): (path, n)
                for n in file.keys()
                if not n.endswith("rotary_emb.inv_freq")
            }
    return files
