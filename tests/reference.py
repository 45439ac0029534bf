"""An independent LLaMA: NumPy, float64, one sequence, no cache, no cleverness. What `model.py` is
compared with."""

import json

import numpy as np
from safetensors.numpy import load_file


def logits(directory, tokens):
    """Logits [T, V] in float64 for a list of T token ids, from a checkpoint directory with float32
    tensors."""
    config = json.loads((directory / "config.json").read_text())
    weights = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
    heads, d = (
        config["num_attention_heads"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    kv_heads, T = config.get("num_key_value_heads") or heads, len(tokens)
    angles = np.outer(np.arange(T), inverse_frequencies(config, d))  # [T, d/2]

    def linear(x, name):
        y = x @ weights[name + ".weight"].T
        return y + weights[name + ".bias"] if name + ".bias" in weights else y

    def norm(x, name):
        return (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + config.get("rms_norm_eps", 1e-6))
            * weights[name + ".weight"]
        )

    def rotate(x):  # [T, d]: pair i as the complex number x[i] + j x[i + d/2]
        z = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * angles)
        return np.concatenate((z.real, z.imag), axis=1)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (linear(h, layer + f"self_attn.{name}_proj") for name in "qkv")
        out = np.zeros((T, heads * d))
        for head in range(heads):
            shared = head // (heads // kv_heads) * d
            query, key = rotate(q[:, head * d : (head + 1) * d]), rotate(k[:, shared : shared + d])
            scores = query @ key.T / np.sqrt(d)
            for t in range(T):
                p = np.exp(scores[t, : t + 1] - scores[t, : t + 1].max())
                out[t, head * d : (head + 1) * d] = p / p.sum() @ v[: t + 1, shared : shared + d]
        x = x + linear(out, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate = linear(h, layer + "mlp.gate_proj")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(h, layer + "mlp.up_proj"), layer + "mlp.down_proj"
        )
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return norm(x, "model.norm") @ weights[head + ".weight"].T


def inverse_frequencies(config, d):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type"))
    found = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        if kind == "linear":
            f /= rope["factor"]
        elif kind == "llama3":
            context, wavelength = rope["original_max_position_embeddings"], 2 * np.pi / f
            if wavelength > context / rope["low_freq_factor"]:
                f /= rope["factor"]
            elif wavelength > context / rope["high_freq_factor"]:
                smooth = (context / wavelength - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"]
                )
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        found.append(f)
    return np.array(found)
