"""A self-contained LLaMA: Hugging Face directory in, logits and greedy answers out, Hugging Face directory out.

This file owns the architecture, the safetensors files, the key/value cache and greedy generation. It deals in
token ids: text is `data/`'s business. It knows nothing of adapters: `rosa.py` wraps its linear layers from outside.
Modules and parameters are named as in a Hugging Face checkpoint, so a tensor's name there is its name here.

    tokens [B, T] -> embed_tokens -> L x ( x += self_attn(input_layernorm(x)) ; x += mlp(post_attention_layernorm(x)) )
                  -> norm -> lm_head -> logits [B, T, V]

Implemented: `model_type` "llama" (LLaMA 1, 2, 3, SmolLM, TinyLlama, ...), "mistral" (the same), and "qwen2" (the same with
biases on q, k and v). Whatever else a config.json asks for is refused by name.

Letters in shapes: B rows, T tokens, D hidden_size, H query heads, K key/value heads, d head_dim, V vocab_size,
L layers, S positions in the cache.
"""

import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

FAMILIES = {  # model_type -> its architecture, and what it takes for a field on which config.json is silent, where not as below
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
}
@dataclass
class LlamaConfig:
    """The fields of a Hugging Face config.json that this file implements, under the same names."""

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
    attention_bias: bool = False  # on q, k, v and o; llama alone: qwen2 has biases on q, k and v, mistral has none
    mlp_bias: bool = False  # llama alone
    sliding_window: int | None = None  # mistral alone: as many tokens attention sees; None: all
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
            value = getattr(self, name)
            optional = name in ("num_key_value_heads", "head_dim", "sliding_window")
            most = 2**10 if name == "num_hidden_layers" else 2**24  # beyond, even a model without memory cannot be made
            if not (optional and value is None) and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{name} must be a whole number from 1 to {most:,}, not {value!r}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of "
                                 f"num_attention_heads {self.num_attention_heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if self.num_attention_heads * self.head_dim > 2**24:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} x head_dim {self.head_dim} is more than 2^24")
        for name in ("rms_norm_eps", "rope_theta"):
            setattr(self, name, positive(name, getattr(self, name)))
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if getattr(self, name) not in (True, False, None):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for token in self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]:
            if token is not None and type(token) is not int:
                raise ValueError("eos_token_id, here or in generation_config.json, must be a token id or a list of them, "
                                 f"not {self.eos_token_id!r}")
        if str(self.model_type) not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not implemented: only {', '.join(FAMILIES)} are")
        if self.model_type != "llama":
            self.attention_bias = self.mlp_bias = False
        if self.model_type != "mistral":
            self.sliding_window = None
        if not rope_inverse_frequencies(self).isfinite().all():
            raise ValueError(f"rope_theta {self.rope_theta} with rope_scaling {self.rope_scaling} gives no finite frequencies")

    @property
    def context(self):
        """The longest sequence, in tokens: within it a sliding window hides nothing."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def limit(self):
        """What sets `context`, in words."""
        windowed = self.context < self.max_position_embeddings
        return f"{'sliding window' if windowed else 'context'} of {self.context}"

    @classmethod
    def from_file(cls, path):
        """Read a config.json, or the one in a directory. Raises ValueError naming the file and the field."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw = read_json(path)
        try:
            return cls(**implemented_fields(raw, read_json(path.parent / "generation_config.json", missing={})))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def implemented_fields(raw, generation):
    """The LlamaConfig fields in a raw config.json. Raises ValueError for a setting that this file does not implement."""
    raw = dict(raw)
    required = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [name for name in required if name not in raw]:
        raise ValueError(f"the key {absent[0]!r} is missing")
    architecture, silent = FAMILIES.get(str(raw["model_type"]), (None, {}))
    if architecture and str(raw.get("architectures") or [architecture]).lower() != str([architecture]).lower():
        raise ValueError(f"architectures = {raw['architectures']!r} is not implemented (only {[architecture]!r} is)")
    layer_types = raw.get("layer_types")
    if isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"layer_types = {layer_types!r} is not implemented (only 'full_attention' is)")
    raw = silent | raw
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # rope_parameters: transformers 5
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be an object, not {rope!r}")
    rope = dict(rope)
    refusals = {"hidden_act": "silu", "quantization_config": None, "use_sliding_window": False,
                "attention_dropout": 0, "partial_rotary_factor": 1}
    for name, implemented in refusals.items():
        if (value := rope.get(name, raw.get(name))) not in (implemented, None):
            raise ValueError(f"{name} = {value!r} is not implemented (only {implemented!r} is)")
    raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    raw["rope_scaling"] = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
    if generation.get("eos_token_id") is not None:
        raw["eos_token_id"] = generation["eos_token_id"]
    return {name: raw[name] for name in LlamaConfig.__dataclass_fields__ if name in raw}


def rope_inverse_frequencies(config):
    """Radians per position of each RoPE pair i, `theta ** (-2i / d)` as scaled by `rope_scaling`. [d/2], float32."""
    # On the CPU even while parameters are made on the meta device, and in float32 whatever the weights' dtype.
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    needed = {"linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if str(kind) not in needed:
        raise ValueError(f"rope_scaling type {kind!r} is not implemented: only linear and llama3 are")
    scaling = {name: positive(f"rope_scaling's {name}", scaling.get(name)) for name in needed[kind]}
    if kind == "linear":
        return frequencies / scaling["factor"]
    # LLaMA 3.1: wavelengths beyond the original context are stretched, short ones kept, the ones between blended.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # full turns in that context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if low >= high:
        raise ValueError(f"rope_scaling's low_freq_factor {low} is not below its high_freq_factor {high}")
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is; 0: divided by factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def positive(name, value):
    """A config.json's number as a float. Raises ValueError for what is none, or not positive."""
    if type(value) not in (int, float) or not 0 < value < 1e38:  # within float32
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return float(value)


class Llama(nn.Module):
    """The decoder-only transformer with its vocabulary projection. `Llama(config)` is randomly initialised."""

    def __init__(self, config):
        super().__init__()
        Operators.look_up()
        self.config = config
        self.checkpoint_activations = False
        self.inv_freq = rope_inverse_frequencies(config)  # no buffer: `.to(bfloat16)` must not round it
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False),
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
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
        """Logits of the next token at every position: LongTensor [B, T] -> [B, T, V], in the weights' dtype.

        Attention is causal, so rows of different lengths share a batch padded on the right with any id."""
        return self.lm_head(self.hidden_states(tokens))

    def hidden_states(self, tokens, cache=None):
        """What `lm_head` reads: [B, T] -> [B, T, D]. With a cache the tokens follow those that it holds."""
        _, T = tokens.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens are more than the model's {self.config.limit}")
        positions = torch.arange(T, device=tokens.device)  # [T]
        if cache is not None:
            positions = cache.advance(positions)  # [B, T]
        rope = rope_table(positions, self.inv_freq)
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():  # keep x alone, compute the layer again later
                x = checkpoint(layer, x, rope, cache, i, use_reentrant=False)
            else:
                x = layer(x, rope, cache, i)
        return self.model.norm(x)

    def loss(self, tokens, labels):
        """Summed cross-entropy, in nats: a float32 scalar.

        tokens [B, T], padded on the right; labels [B, T], the token that follows each position, or -100 where there
        is nothing to predict. Only labelled positions reach the vocabulary projection."""
        labelled = labels != -100
        return SummedCrossEntropy.apply(self.hidden_states(tokens)[labelled], self.lm_head.weight, labels[labelled])

    def generate(self, prompts, max_new_tokens, eos_id, on_token=None, batch_size=None):
        """Greedy continuation of prompts, lists of ids of any lengths. Returns the new ids of each, the end-of-sequence
        token left out; `eos_id` is one id or several. An answer does not depend on the others.
        `on_token(i, ids)` is called with the new ids of prompt i, a list, each time that there is one more. At most
        `batch_size` prompts are answered at a time (None: all).

        Raises ValueError, before anything runs, for an empty prompt or one whose answer may not fit the context."""
        answers = dict(self.stream(prompts, max_new_tokens, eos_id, on_token, batch_size))
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, eos_id, on_token=None, batch_size=None):
        """What `generate` returns, each answer as it ends: yields (i, new ids of prompt i). The next prompts take the
        places of those answered, so that a long answer does not keep the places beside it empty."""
        eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) + max_new_tokens > self.config.context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                                 f"model's {self.config.limit}")
        answers = [[] for _ in prompts]
        if not prompts or max_new_tokens < 1:
            yield from enumerate(answers)
            return
        places = min(batch_size or len(prompts), len(prompts))
        cache = self.common_cache(prompts, places, max_new_tokens)
        waiting, running = list(range(len(prompts))), []  # running[slot]: the prompt that this row of the cache belongs to
        x = torch.empty(0, self.config.hidden_size, device=self.device, dtype=self.dtype)
        while waiting or running:
            free = places - len(running)
            if waiting and free >= min(len(waiting), max(1, places // 4)):  # several at a time: one alone is slow to read
                some, waiting = waiting[:free], waiting[free:]
                x = torch.cat((x, self.read_prompts([prompts[i] for i in some], cache, len(running))))
                running += some
            next_ids = self.lm_head(x).float().argmax(-1)  # [n]; float: on a CPU argmax is slow in bfloat16
            unfinished = []
            for slot, (i, token) in enumerate(zip(running, next_ids.tolist())):
                if token not in eos_ids:
                    answers[i].append(token)
                    if on_token:
                        on_token(i, answers[i])
                if token in eos_ids or len(answers[i]) == max_new_tokens:
                    yield i, answers[i]
                else:
                    unfinished.append(slot)
            if len(unfinished) < len(running):
                slots = cache.keep(unfinished)
                running = [running[slot] for slot in slots]
                next_ids = next_ids[slots]
            x = self.hidden_states(next_ids[:, None], cache)[:, 0] if running else x[:0]

    @torch.inference_mode()
    def log_likelihoods(self, prompts, continuations):
        """Summed log-probability, in nats, of each of a prompt's continuations: continuations[i] is a list of lists of
        ids that may follow prompts[i], and so many numbers come back for it. A prompt is computed once for all of its own.

        Raises ValueError for a text beyond the model's context."""
        longest = max(len(prompt) + len(ids) for prompt, some in zip(prompts, continuations) for ids in some)
        if longest > self.config.context:
            raise ValueError(f"{longest} tokens are more than the model's {self.config.limit}")
        owner = torch.tensor([i for i, some in enumerate(continuations) for _ in some], device=self.device)  # [N]
        ids, lengths = pad([ids for some in continuations for ids in some])  # [N, T]
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        cache = self.common_cache(prompts, len(prompts), ids.shape[1])
        x = self.read_prompts(prompts, cache)
        cache.select(owner)
        x = x[owner, None]  # [N, 1, D]: what sees all before the first id
        if ids.shape[1] > 1:
            x = torch.cat((x, self.hidden_states(ids[:, :-1], cache)), 1)  # [N, T, D]
        totals = torch.zeros(len(ids), device=self.device)
        for t in range(ids.shape[1]):  # an id at a time: [N, V] logits in memory, not [N, T, V]
            log_probs = self.lm_head(x[:, t]).float().log_softmax(-1).gather(1, ids[:, t, None])[:, 0]
            totals += torch.where(t < lengths, log_probs, 0)
        totals = iter(totals.tolist())
        return [[next(totals) for _ in some] for some in continuations]

    def common_cache(self, prompts, rows, room):
        """A cache of so many rows, each of which holds what all the prompts, lists of ids, begin with, computed once, and has
        space for the longest of them and `room` more positions."""
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        cache = KVCache(self, rows, longest + room)
        # commonprefix serves any sequences; of each prompt at least a token is left to be computed on its own.
        common = min(len(os.path.commonprefix(prompts)), shortest - 1) if len(prompts) > 1 else 0
        if common:
            self.hidden_states(torch.tensor([prompts[0][:common]], device=self.device), cache.begin(slice(0, 1)))
            for tensor in cache.keys + cache.values:
                tensor[1:, :, :common] = tensor[:1, :, :common]
        cache.common = common
        return cache

    def read_prompts(self, prompts, cache, first=0):
        """Prompts through the model into the rows of a `common_cache` from `first` on; all rows so far come next. Returns the
        hidden state of each one's last token, [n, D]."""
        # On a CPU a few at a time: what one operation writes is still in the processor's cache when the next one reads it.
        some = 8 if self.device.type == "cpu" else len(prompts)
        last = []
        for i in range(0, len(prompts), some):
            tokens, ends = pad([prompt[cache.common:] for prompt in prompts[i : i + some]])
            rows = slice(first + i, first + i + len(ends))
            cache.lengths[rows] = cache.common
            x = self.hidden_states(tokens.to(self.device), cache.begin(rows))  # [n, T, D]
            last.append(x[torch.arange(len(x)), ends - 1])
            cache.lengths[rows] = cache.common + ends.to(self.device)  # the padding's keys lie beyond: hidden, then overwritten
        cache.begin(slice(0, first + len(prompts)))
        return torch.cat(last)

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=None, mapped=False):
        """Load a Hugging Face directory. dtype None: as stored.

        One tensor at a time goes from the memory-mapped file to its place: file by file, as disks read fastest, of each
        the largest first, so that resident memory never exceeds the model by much. mapped: weights that are on the CPU and
        of the stored dtype stay in their files; they take memory as they are read, and what is not read takes none. Raises
        ValueError or OSError with a line for the user."""
        directory = Path(directory)
        config = LlamaConfig.from_file(directory)
        with torch.device("meta"):
            model = cls(config)
        # In Hugging Face's cache a checkpoint is models--org--name/snapshots/<commit>.
        cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+$", directory.as_posix())
        model.name_or_path = "/".join(cached.groups()) if cached else str(directory)
        table = tensor_table(directory, model)
        for name in sorted(table, key=lambda name: (table[name].file, -math.prod(table[name].shape))):
            tensor = read_tensor(table, name).to(device=device, dtype=dtype, copy=not mapped)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    @torch.no_grad()
    def pack(self):
        """Lay the weights of the linear layers out as an x86 CPU multiplies by them fastest, each in its own place; elsewhere
        nothing happens. For inference alone: packed weights can be neither trained nor merged into nor saved. Returns the
        model."""
        if self.dtype in Operators.onednn and self.device.type == "cpu":
            for module in self.modules():
                if isinstance(module, nn.Linear) and module.weight.layout == torch.strided:
                    module.weight = nn.Parameter(packed(module.weight.detach()), requires_grad=False)
        return self

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors in Hugging Face layout; an existing file is replaced at once, whole.

        Raises ValueError where adapters are attached: merge them first, or save them on their own."""
        with torch.device("meta"):
            names = set(Llama(self.config).state_dict())
        tensors = self.state_dict()
        if extra := sorted(set(tensors) - names):
            raise ValueError(f"cannot save a model with adapters ({extra[0]}, ...): call rosa.merge(model) first")
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        raw = {key: value for key, value in asdict(self.config).items() if value is not None}
        raw |= {"architectures": [FAMILIES[self.config.model_type][0]], "hidden_act": "silu",
                "torch_dtype": str(self.dtype).removeprefix("torch.")}
        if self.config.model_type == "mistral":
            raw["sliding_window"] = self.config.sliding_window  # null: none; were it absent, that would say 4096
        partial = directory / "model.safetensors.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, directory / "model.safetensors")
        partial = directory / "config.json.partial"
        partial.write_text(json.dumps(raw, indent=2) + "\n")
        os.replace(partial, directory / "config.json")


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache, layer):
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
        self.q_proj = Linear(config.hidden_size, query_size, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, d]
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache.write(layer, k, v)
        if cache is not None and not cache.fresh:
            k, v, mask = cache.read(layer)  # [B, K, S, d] twice, [B, 1, H/K * T, S]
            y = attend(q.reshape(B, k.shape[1], -1, self.head_dim), k, v, mask).view(B, -1, T, self.head_dim)
        elif x.device.type == "cpu" and x.dtype == torch.bfloat16 and T <= SHORT:
            y = CausalAttention.apply(q, k, v)
        else:
            if q.requires_grad and q.device.type == "cpu":  # PyTorch's backward pass there takes twice as long in bfloat16
                q, k, v = q.float(), k.float(), v.float()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).to(x.dtype)  # [B, H, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


SHORT = 512  # tokens: so far all scores of a head are held at once where that is faster


def attend(q, k, v, mask):
    """Attention of a few queries each, after what the cache holds: the heads that share a key/value head stand in for a
    longer sequence, so that nothing is repeated. q [B, K, H/K * T, d]; k, v [B, K, S, d]; mask [B, 1, H/K * T, S], added
    to the scores."""
    if q.device.type != "cpu" or q.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # In plain matrix products: for a few queries PyTorch's own kernel takes half as long again.
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)  # [B, K, H/K * T, S]
    return scores.add_(mask).softmax(-1).to(v.dtype) @ v


class CausalAttention(torch.autograd.Function):
    """Causal attention in plain matrix products: in bfloat16 on a CPU three times as fast as PyTorch's kernel, backward pass
    included, for texts that are SHORT: it keeps their [T, T] probabilities. q [B, H, T, d]; k, v [B, K, T, d]."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, d = q.shape
        K = k.shape[1]
        # The heads that share a key/value head stand in for a longer sequence.
        q, k, v = q.reshape(B * K, -1, d), k.reshape(B * K, T, d), v.reshape(B * K, T, d)
        # What is taken from all keys alike changes all scores of a query alike, and softmax does not see it. Scores come out in
        # bfloat16, which is finest near zero: without their mean keys give smaller ones (Qwen2.5's have a large bias).
        centred = (k.float() - k.float().mean(1, keepdim=True)).to(k.dtype)
        mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1).repeat(H // K, 1)  # [H/K * T, T]
        probabilities = torch.baddbmm(mask, q, centred.transpose(1, 2), alpha=d**-0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, probabilities)
        return (probabilities @ v).view(B, H, T, d)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probabilities = ctx.saved_tensors
        B, H, T, d = grad.shape
        grad = grad.reshape(q.shape)
        grad_v = probabilities.transpose(1, 2) @ grad
        grad_scores = Operators.softmax_backward(grad @ v.transpose(1, 2), probabilities).mul_(d**-0.5)
        grad_q, grad_k = grad_scores @ k, grad_scores.transpose(1, 2) @ q
        return grad_q.view(B, H, T, d), grad_k.view(B, -1, T, d), grad_v.view(B, -1, T, d)


def rope_table(positions, inv_freq):
    """What `rotate` multiplies by: the cosines [.., 1, T, d] and the sines, negative in the first half, of positions
    [.., T]. Float32; the same for every head and layer."""
    angles = positions[..., None].float() * inv_freq.to(positions.device)  # [.., T, d/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-3), torch.cat((-sin, sin), -1).unsqueeze(-3)


def rotate(x, cos, sin):
    """RoPE: turn pair i, the dimensions (i, i + d/2), by its angle, in float32. x [B, heads, T, d]."""
    h = x.float()
    return torch.addcmul(h * cos, h.roll(h.shape[-1] // 2, -1), sin).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """x @ weight.T + bias: [.., in], [out, in], [out] -> [.., out].

    In float32 on an x86 CPU through oneDNN, which PyTorch itself calls for bfloat16 alone: the same sums at twice the
    rate of MKL where that does not use AVX-512 (measured on an AMD EPYC). The weight may be packed: `Llama.pack`."""
    if x.dtype in Operators.onednn and x.device.type == "cpu" and (x.dtype == torch.float32 or weight.is_mkldnn):
        return OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_linear(x, weight, bias):  # [.., in], [out, in], [out] or None
    call = torch.ops.rosa.linear if torch.compiler.is_compiling() else call_onednn
    return Operators.reshaped(call(x.flatten(0, -2), weight, bias), (*x.shape[:-1], weight.shape[0]))


def call_onednn(x, weight, bias):  # [N, in]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile cannot compile that call itself, but any operator that is registered with the shape of its result.
if not hasattr(torch.ops.rosa, "linear"):  # when this file is loaded once more
    OPERATORS = torch.library.Library("rosa", "DEF")
    OPERATORS.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    OPERATORS.impl("linear", call_onednn, "CPU")
    torch.library.register_fake("rosa::linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]), lib=OPERATORS)


class Operators:
    """What PyTorch has and does not document, asked for here alone. As written these are the plain formulas; `look_up` puts the
    operator in the place of its formula where this PyTorch has it, this processor takes it, and both compute the same."""

    formulas = {}  # name -> the formula, once all were looked up
    onednn = frozenset()  # the dtypes in which oneDNN's product serves for F.linear, with packed weights too

    @staticmethod
    def reshaped(y, shape):
        """y in another shape, as a tensor of its own, which may be added to in place."""
        return y.view(shape).clone()

    @staticmethod
    def silu_backward(grad, x):
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))

    @staticmethod
    def softmax_backward(grad, probabilities):
        grad = grad * probabilities
        return grad - probabilities * grad.sum(-1, keepdim=True)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def look_up(cls):
        """Once in a process, when a model is made: not while this file is imported, for operators start threads, which a fork loses."""
        if cls.formulas:
            return
        aten, x, w, p = torch.ops.aten, *torch.linspace(-2, 2, 48, device="cpu").view(3, 4, 4)
        for name, operator, given in (
            ("reshaped", lambda y, shape: aten._unsafe_view(y, shape), (x, (2, 2, 4))),
            ("silu_backward", lambda grad, x: aten.silu_backward(grad, x), (x, w)),
            ("softmax_backward", lambda grad, p: torch._softmax_backward_data(grad, p, -1, p.dtype), (x, p.softmax(-1))),
        ):
            cls.formulas[name] = getattr(cls, name)
            if does_the_same(operator, cls.formulas[name], *given):
                setattr(cls, name, staticmethod(operator))
        if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
            cls.onednn = frozenset(
                dtype for dtype in (torch.float32, torch.bfloat16)
                if does_the_same(call_onednn, F.linear, x.to(dtype), w.to(dtype), p[0].to(dtype))
                and does_the_same(lambda x, w: call_onednn(x, packed(w), None), F.linear, x.to(dtype), w.to(dtype)))

    @staticmethod
    def allow_recompiling(times):
        """Let torch.compile make so many forms of a function, where PyTorch still has that setting, before it gives up and runs it plain."""
        if hasattr(torch._dynamo.config, "recompile_limit"):
            torch._dynamo.config.recompile_limit = times

    @staticmethod
    def computes_bfloat16(device):
        """Whether a device has instructions for bfloat16. Where it has none PyTorch computes it in software, slower than float32."""
        if device.type == "cpu":
            names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
            return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def does_the_same(operator, formula, *given):
    """Whether an operator is there and computes what the formula does, roughly: of rounding this decides nothing."""
    try:
        return torch.allclose(operator(*given), formula(*given), rtol=0.05, atol=0.05)
    except (AttributeError, RuntimeError, TypeError):  # absent, refused on this processor, called otherwise by now
        return False


def packed(weight):  # [out, in], as oneDNN reads it fastest
    return torch.ops.mkldnn._reorder_linear_weight(weight)


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (linear(grad, weight.T) if ctx.needs_input_grad[0] else None,
                linear(grad.flatten(0, -2).T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None,
                grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistic in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


class RMSNormFunction(torch.autograd.Function):
    """Keeps x and one number a token for the backward pass, where autograd would keep every intermediate."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)  # [.., 1]
        ctx.save_for_backward(x, weight, scale)
        return (h * scale).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        h = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_h = (grad * weight).float()
            grad_x = (grad_h - h * (grad_h * h).mean(-1, keepdim=True)).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * h).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate = Operators.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[label], some rows at a time.

    The gradients are made in the forward pass, slice by slice, while the logits are at hand: what is kept for the
    backward pass is [N, D], never [N, V]."""

    SLICE = 2**23  # float32 logits held at once: 32 MiB

    @staticmethod
    def forward(ctx, hidden, weight, labels):  # [N, D], [V, D], [N]
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = max(1, SummedCrossEntropy.SLICE // weight.shape[0])
        for start in range(0, len(hidden), rows):
            h, label = hidden[start : start + rows], labels[start : start + rows, None]
            log_probs = linear(h, weight).log_softmax(-1, dtype=torch.float32)  # [rows, V]
            at_label = log_probs.gather(1, label)
            loss -= at_label.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_probs.exp_().scatter_add_(1, label, -torch.ones_like(at_label)).to(h.dtype)  # softmax - 1
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = linear(grad, weight.T)
            if grad_weight is not None:
                grad_weight += linear(grad.T, h.T)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *(None if grad is None else grad * grad_loss for grad in ctx.saved_tensors), None


class KVCache:
    """The keys (rotated) and values of every layer for the rows in generation: `lengths[row]` positions are filled."""

    def __init__(self, model, rows, positions):
        config = model.config
        n, K, S, d = rows, config.num_key_value_heads, positions, config.head_dim

        def zeros(*shape):  # not whatever memory held: what a row masks out still meets its weights of 0, and 0 * nan is nan
            return [torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in model.model.layers]

        # On a CPU keys lie in memory as [n, K, d, S]: so a few queries multiply them faster.
        self.keys = [keys.transpose(2, 3) for keys in zeros(n, K, d, S)] if model.device.type == "cpu" else zeros(n, K, S, d)
        self.values = zeros(n, K, S, d)
        self.common = 0  # so many positions are filled alike in every row
        self.lengths = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.group = config.num_attention_heads // config.num_key_value_heads

    def begin(self, rows):
        """Let the next tokens be those of these rows, a slice. Returns the cache."""
        self.rows = rows
        return self

    def advance(self, offsets):
        """Once a step, for all layers: where its tokens stand, [n, T], and in the cache, how far any row now reaches, and the
        mask that hides from each token what lies beyond it, once for each query head of a group."""
        device = self.lengths.device
        positions = offsets + self.lengths[self.rows, None]  # [n, T]
        self.lengths[self.rows] += len(offsets)
        self.reach = int(self.lengths[self.rows].max())
        self.fresh = self.reach == len(offsets)  # nothing lies before these tokens
        self.places = torch.arange(len(self.lengths), device=device)[self.rows, None], slice(None), positions  # [n, T] of rows
        if not self.fresh:
            beyond = torch.arange(self.reach, device=device) > positions[..., None]  # [n, T, S]
            mask = torch.zeros(beyond.shape, device=device, dtype=self.keys[0].dtype).masked_fill_(beyond, -torch.inf)
            self.mask = mask[:, None].expand(-1, self.group, -1, -1).flatten(1, 2)[:, None]  # [n, 1, H/K * T, S]
        return positions

    def write(self, layer, k, v):  # [n, K, T, d]
        self.keys[layer][self.places], self.values[layer][self.places] = k.transpose(1, 2), v.transpose(1, 2)

    def read(self, layer):
        """Keys and values as far as any row reaches, [n, K, S, d], and the mask over them, [n, 1, H/K * T, S]."""
        return self.keys[layer][self.rows, :, : self.reach], self.values[layer][self.rows, :, : self.reach], self.mask

    def select(self, rows):
        """Let row i be what row rows[i] was; a row may be taken several times."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        self.lengths = self.lengths[rows]
        self.begin(slice(0, len(rows)))

    def keep(self, slots):
        """Drop all rows but `slots` (ascending). Returns the slot that each remaining row comes from: the last rows
        move into the holes, so that no more is copied than was dropped."""
        count = len(slots)
        movers = [slot for slot in slots if slot >= count]
        holes = sorted(set(range(count)) - set(slots))
        order = list(range(count))
        for hole, mover in zip(holes, movers):
            order[hole] = mover
        if holes:
            for tensor in self.keys + self.values:
                tensor[holes] = tensor[movers]
        self.lengths[:count] = self.lengths[order]
        self.begin(slice(0, count))
        return order


def pad(rows):
    """Lists of ids as one LongTensor [B, T], padded on the right with 0, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = torch.tensor(ids)
    return tokens, lengths


@torch.inference_mode()
def logits_layer_by_layer(config, tokens, read):
    """What `Llama` computes, tokens [B, T] -> logits [B, T, V], with one layer's weights in memory at a time: `read(name)`
    returns a tensor of the checkpoint, of any device and dtype, the same for all."""
    with torch.device("meta"):
        model = Llama(config)

    def filled(name):
        module = model.get_submodule(name)
        module.load_state_dict({key: read(f"{name}.{key}") for key in module.state_dict()}, assign=True)
        return module

    rope = rope_table(torch.arange(tokens.shape[1], device=tokens.device), model.inv_freq)
    x = filled("model.embed_tokens")(tokens)
    model.model.embed_tokens = None  # its weights go
    for i in range(config.num_hidden_layers):
        x = filled(f"model.layers.{i}")(x, rope, None, i)
        model.model.layers[i] = None
    x = filled("model.norm")(x)
    return linear(x, read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"))


class Stored(NamedTuple):
    file: Path
    shape: tuple
    dtype: str  # as safetensors names it: BF16


def tensor_table(directory, model):
    """name -> Stored of every parameter of the model, which may be on the meta device, from the headers of the files in a
    checkpoint directory. Raises ValueError or OSError, naming the first tensors that do not fit."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    stored = stored_tensors(directory)
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
        stored.pop("lm_head.weight", None)
    stored = {name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in wanted if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in wanted]
    problems += [f"{name} has shape {list(stored[name].shape)}, config.json says {list(shape)}"
                 for name, shape in wanted.items() if name in stored and stored[name].shape != shape]
    problems += [f"{name} is stored as {stored[name].dtype}, not as a float of 16, 32 or 64 bits"
                 for name in wanted if name in stored and stored[name].dtype not in ("F16", "BF16", "F32", "F64")]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{directory}: the tensors do not fit the config: {'; '.join(problems[:5])}{more}. Download both "
                         "again, of one model")
    return stored


def read_tensor(table, name):
    """A tensor of a checkpoint, mapped from its file: what is read of it goes when the tensor goes."""
    with safe_open(table[name].file, framework="pt") as file:
        return file.get_tensor(name)


def stored_tensors(directory):
    """name -> Stored of every tensor in a checkpoint directory."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names: download it again")
        files = [directory / file for file in sorted(set(names.values()))]
        for file in files:
            if file.parent != directory or file.name in ("", ".", ".."):
                raise ValueError(f"{index} names a file outside its directory, {file}: download the checkpoint again")
            if not file.is_file():
                raise FileNotFoundError(f"{index} names {file.name}, which is absent: download it")
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
        if pickled:
            raise ValueError(f"{directory} holds only pickled weights ({pickled[0]}), which can run code when they are "
                             "loaded: download or convert to model.safetensors")
        raise FileNotFoundError(f"{directory} has no model.safetensors and no model.safetensors.index.json: download them")
    table = {}
    for file in files:
        try:
            open(file, "rb").close()  # which says why where it cannot: safe_open calls it absent
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name in table:
                        raise ValueError(f"{name} is in {table[name].file} and in {file.name}: download the checkpoint again")
                    entry = tensors.get_slice(name)
                    table[name] = Stored(file, tuple(entry.get_shape()), entry.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from None
    return table


def read_json(path, missing=None):
    """The JSON object in a file. Raises ValueError naming the file; an absent file is `missing`, if that is given."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is None:
            raise
        return missing
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a thousand brackets
        raise ValueError(f"{path} is not a JSON file ({error}): mend or download it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object: mend or download it")
    return value
