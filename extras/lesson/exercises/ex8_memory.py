"""Exercise 8: what RoSA costs in memory, on paper first.                Half an hour.

A 7B model fits on a card or it does not. One can know that before one starts. Here you count, with
pencil and paper first, and without tensors. Then the test makes the tensors and counts their bytes.
Your numbers of parameters must be exact, your bytes within 10 %.

A config has these fields: hidden_size D, intermediate_size I, num_hidden_layers L, head_dim d,
num_attention_heads H, num_key_value_heads K, vocab_size V, tie_word_embeddings.

1. The base. All matrices of one layer, none with a bias, and two norms:

    q_proj [H*d, D]    k_proj [K*d, D]    v_proj [K*d, D]    o_proj [D, H*d]
    gate_proj [I, D]   up_proj [I, D]     down_proj [D, I]   2 norms [D]

   Outside of the layers: the embedding [V, D], one more norm [D], and lm_head [V, D]. Where
   tie_word_embeddings is True, lm_head is the embedding, and counts once.

2. The adapters of Q and K in every layer (exercise 7), with n = max(1, round(ratio * d / 2)):

    q_proj    A [rank, D], B [H * 2n, rank]
    k_proj    A [rank, D], B [K * 2n, rank]

   With low_freq_ratio 1 all rows adapt. That is plain LoRA on Q and K.

3. Bytes. A number in float32 has 4 bytes, in bfloat16 2. What RoSA holds in training, between two
   probes:

    base         bfloat16. It is frozen: no gradients, no moments.
    adapters     float32. They are the masters: a small step would be rounded away in bfloat16.
    gradients    float32, of the layers that train now, max(1, round(k_ratio * L)) of the L.
    moments      float32, two for each number that AdamW has ever updated: a running mean of the
                 gradient and one of its square. A layer that rests keeps them. After some probes
                 assume that every layer has trained once.

   Full fine-tuning trains all parameters in float32: weights, gradients and moments of all.

A small example: D = 8, I = 16, L = 2, d = 4, H = 2, K = 1, V = 10, not tied; rank 2, ratio 0.5.

    a layer    q 64, k 32, v 32, o 64, MLP 3 * 128, norms 16        sum 592
    base       2 * 592 + 2 * 80 + 8 = 1352                          2704 bytes in bfloat16
    n          max(1, round(0.5 * 2)) = 1, so 2 rows a head
    adapters   a layer: q 2 * 8 + 4 * 2 = 24, k 2 * 8 + 2 * 2 = 20; both layers: 88
    bytes      adapters 352; k_ratio 0.5, so one layer trains: gradients 176; moments 704
    full       weights 5408, gradients 5408, moments 10816

Not counted here: activations, which grow with the batch and the length of the texts. They are often
the larger part. DLS saves some of them too: below the lowest layer that trains none are kept.

To do: the four functions below.
When it is done: print them for rank 64, ratio 0.5, k_ratio 0.5 and LLaMA-2-7B, which is
model.LlamaConfig(). The base has 13.5 GB, and all that RoSA adds has 0.35 GB. LoRA on Q and K is
rosa_bytes with ratio 1 and k_ratio 1: it adds 0.54 GB. Full fine-tuning needs 108 GB.

Run: python -m pytest extras/lesson/exercises -q -k ex8     (pip install pytest, if it is not there)
"""


def base_parameters(config):
    """How many numbers the base model has, an int."""
    raise NotImplementedError("exercise 8: the matrices and norms of the base; see 1")


def adapter_parameters(config, rank, low_freq_ratio):
    """How many numbers A and B of all layers have together, an int."""
    raise NotImplementedError("exercise 8: A and B of Q and K in every layer; see 2")


def rosa_bytes(config, rank, low_freq_ratio, k_ratio):
    """A dict of bytes: {"base": ..., "adapters": ..., "gradients": ..., "moments": ...}."""
    raise NotImplementedError("exercise 8: 2 or 4 bytes a number; see 3")


def full_bytes(config):
    """A dict of bytes: {"weights": ..., "gradients": ..., "moments": ...}."""
    raise NotImplementedError("exercise 8: float32, all of it; see 3")
