"""Exercise 8: first the numbers of parameters, exactly, then bytes, within 10 %. The models are
made on the meta device, which has shapes and no memory. The adapters of 7B and AdamW's moments are
made really: 0.4 GB."""

import functools
from pathlib import Path

import torch
from checking import check, fail, yours
from torch import nn

import model as llama
import rosa

pytest_plugins = ["short_messages"]

ex8_memory = yours("ex8_memory")

TINY = Path(llama.__file__).parent / "data" / "tiny"
EXAMPLE = llama.LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=10,
)
CONFIGS = {
    "the example in the text": EXAMPLE,
    "heads of another size, H * d = 60 and D = 36": llama.LlamaConfig(
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        vocab_size=10,
    ),
    "tiny": llama.LlamaConfig.from_file(TINY),
    "LLaMA-2-7B": llama.LlamaConfig(),
    "LLaMA-3-8B": llama.LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, vocab_size=128256
    ),
}
# Of 6 layers 4 train, and not 3: half of the moments would look like one of two.
RANK, RATIO, K_RATIO = 64, 0.25, 0.6


# --- what is there, counted ---


def meta_model(config):
    with torch.device("meta"):
        return llama.Llama(config).bfloat16()


@functools.cache
def counted_base(name):
    return sum(p.numel() for p in meta_model(CONFIGS[name]).parameters())


@functools.cache
def counted_adapters(name, rank, ratio):
    model = rosa.attach(meta_model(CONFIGS[name]), rank, 2 * rank, ratio)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def bytes_in_training(model, trainable, selector=None):
    """What one AdamW step of all layers leaves behind, and then a selection."""
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    for p in trainable:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if selector is not None:
        selector.activate(range(selector.count))  # the others lose their gradient
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    trained = {id(p) for p in trainable}
    return {
        "base": bytes_of(p for p in model.parameters() if id(p) not in trained),
        "adapters": bytes_of(trainable),
        "gradients": bytes_of(p.grad for p in trainable if p.grad is not None),
        "moments": bytes_of(moments),
    }


@functools.cache
def measured_rosa(name, ratio, k_ratio):
    """The adapters and their optimizer, made really around a model that has no memory."""
    model = rosa.attach(meta_model(CONFIGS[name]), RANK, 2 * RANK, ratio)
    for adapter in rosa.adapters(model).values():
        adapter.A = nn.Parameter(torch.zeros(adapter.A.shape))
        adapter.B = nn.Parameter(torch.zeros(adapter.B.shape))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return bytes_in_training(model, trainable, rosa.LayerSelector(model, k_ratio))


@functools.cache
def measured_full():
    model = llama.Llama.from_pretrained(TINY, dtype=torch.float32)
    found = bytes_in_training(model, list(model.parameters()))
    return {"weights": found["adapters"], **{key: found[key] for key in ("gradients", "moments")}}


# --- checks ---


def check_base(name):
    c, N = CONFIGS[name], counted_base(name)
    D, I, L, d = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.head_dim  # noqa: E741
    H, K, embedding = c.num_attention_heads, c.num_key_value_heads, c.vocab_size * c.hidden_size
    mistakes = {
        "the norms are missing: two in each layer, and one": N - 2 * L * D - D,
        "the last norm is missing, which stands after the layers": N - D,
        "each layer has two norms, and none is there": N - 2 * L * D,
        "each layer has two norms, not one": N - L * D,
        "each layer has three matrices in its MLP: gate, up and down": N - L * D * I,
        "o_proj is missing: each layer has q, k, v and o": N - L * H * d * D,
        "one layer: there are num_hidden_layers of them": N - (L - 1) * layer_of(c),
    }
    if H * d != D:
        mistakes["q_proj is [H*d, D] and o_proj [D, H*d]: H*d need not be D"] = (
            N - 2 * L * (H * d - D) * D
        )
    if c.tie_word_embeddings:
        mistakes["tied: lm_head is the embedding, and counts once"] = N + embedding
    else:
        mistakes["embedding and lm_head both: they are not tied"] = N - embedding
    if H != K:
        mistakes |= {
            "k_proj and v_proj have K heads, not H": N + 2 * L * (H - K) * d * D,
            "v_proj has K heads too, not H": N + L * (H - K) * d * D,
        }
    hint = "the list of matrices and norms is in 1 in the text"
    check(f"{name}: numbers in the base", ex8_memory.base_parameters(c), N, mistakes, hint)


def layer_of(c):
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    return (attention + 3 * c.intermediate_size + 2) * c.hidden_size


def check_adapters(name, rank, ratio):
    c = CONFIGS[name]
    D, L, half = c.hidden_size, c.num_hidden_layers, c.head_dim // 2
    H, K, n = c.num_attention_heads, c.num_key_value_heads, max(1, round(ratio * half))

    def of(rows, inputs=2 * D):
        return L * rank * (inputs + rows)

    def rows(n):
        return (H + K) * 2 * n

    expected = counted_adapters(name, rank, ratio)
    mistakes = {
        "both rows of a pair adapt: 2n rows in a head, not n": of(rows(n) // 2),
        "Q and K each have an A: rank * D twice": of(rows(n), D),
        "A is missing: rank * D, for q and for k": of(rows(n), 0),
        "the A of k has D columns, as all matrices that read x: rank * D": of(
            rows(n), D + K * c.head_dim
        ),
        "this is q alone: k has an adapter too": of(H * 2 * n, D),
        "2n rows in every head, H heads of q and K of k": of(2 * 2 * n),
        "the rows of a layer count once for q and once for k": of(2 * n),
        "one layer: there are num_hidden_layers of them": expected // L,
        "n counts pairs, of which a head has d / 2": of(rows(max(1, round(ratio * 2 * half)))),
        "n was rounded down: round, not int": of(rows(max(1, int(ratio * half)))),
        "these are all rows, which is LoRA: 2n rows in a head": of(rows(half)),
    }
    no_rows = "B is missing: rank * rows" if round(ratio * half) else "no pair is left: max(1, ...)"
    mistakes[no_rows] = of(0)
    if H != K:
        mistakes["K has fewer heads than Q: num_key_value_heads"] = of(2 * H * 2 * n)
    wrong = {hint: number for hint, number in mistakes.items() if number != expected}
    what = f"{name}: numbers in A and B, rank {rank}, ratio {ratio}"
    found = ex8_memory.adapter_parameters(c, rank, ratio)
    check(what, found, expected, wrong, "A and B of Q and of K: see 2 in the text")


def check_bytes(what, found, measured, mistakes):
    """found, measured: dicts. mistakes: key -> {hint: number}. 10 % are allowed."""
    if not isinstance(found, dict) or set(found) != set(measured):
        came = sorted(found) if isinstance(found, dict) else type(found).__name__
        fail(f"{what}: expected a dict of {sorted(measured)}, came {came}", "see its docstring")
    for key, expected in measured.items():
        number = found[key]
        if isinstance(number, int | float) and abs(number - expected) <= 0.1 * expected:
            continue
        wrong = {hint: each for hint, each in mistakes[key].items() if each != expected}
        hint = "numbers times bytes a number: see 3 in the text"
        check(f"{what}: bytes of {key} (within 10 %)", number, expected, wrong, hint)


def check_rosa(name, rank, ratio, k_ratio, measured):
    N, P = counted_base(name), counted_adapters(name, rank, ratio)
    L = CONFIGS[name].num_hidden_layers
    active = P // L * max(1, round(k_ratio * L))
    rounded_down = P // L * max(1, int(k_ratio * L))
    mistakes = {
        "base": {
            "the base is frozen and stays in bfloat16: 2 bytes": 4 * N,
            "these are numbers, not bytes: 2 bytes each": N,
            "the adapters have a line of their own: the base alone": 2 * N + 4 * P,
        },
        "adapters": {
            "A and B are masters in float32, not bfloat16: 4 bytes": 2 * P,
            "these are numbers, not bytes: 4 bytes each": P,
            "the layers that rest have their adapters too": 4 * active,
        },
        "gradients": {
            "the layers that rest have no gradients: k_ratio of the layers": 4 * P,
            "whole layers train: max(1, round(k_ratio * L)) of them": 4 * k_ratio * P,
            "one layer trains at least: max(1, round(k_ratio * L))": 0,
            "gradients are float32, as A and B are: 4 bytes": 2 * active,
            "these are numbers, not bytes: 4 bytes each": active,
            "the count was rounded down: max(1, round(k_ratio * L))": 4 * rounded_down,
            "the base is frozen: it has no gradients": 4 * (N + active),
        },
        "moments": {
            "AdamW keeps two moments in float32: 8 bytes for each number": 4 * P,
            "a layer that rests keeps its moments: all layers count": 8 * active,
            "all layers count, and two moments: 8 bytes for each number": 4 * active,
            "these are numbers, not bytes: two moments of 4 bytes each": 2 * P,
            "the base is frozen: AdamW has no moments of it": 8 * (N + P),
        },
    }
    found = ex8_memory.rosa_bytes(CONFIGS[name], rank, ratio, k_ratio)
    check_bytes(name, found, measured, mistakes)


def check_full(name, measured):
    N = counted_base(name)
    mistakes = {
        "weights": {"what trains is float32, not bfloat16: 4 bytes": 2 * N},
        "gradients": {"gradients are float32: 4 bytes": 2 * N},
        "moments": {"AdamW keeps two moments in float32: 8 bytes for each number": 4 * N},
    }
    found = ex8_memory.full_bytes(CONFIGS[name])
    check_bytes(f"{name}, full fine-tuning", found, measured, mistakes)


# --- the tests; the later ones begin with the numbers, on which the bytes rest ---


def check_numbers():
    for name in CONFIGS:
        check_base(name)
    for name in (
        "heads of another size, H * d = 60 and D = 36",
        "tiny",
        "LLaMA-2-7B",
        "LLaMA-3-8B",
    ):
        check_adapters(name, RANK, RATIO)
    check_adapters("tiny", 8, 0.3)  # 4.8 pairs
    check_adapters("tiny", 8, 0.01)  # 0.16 pairs
    check_adapters("tiny", 8, 1.0)  # LoRA
    check_adapters("the example in the text", 2, 0.5)


def test_the_numbers_of_the_base():
    for name in CONFIGS:
        check_base(name)


def test_the_numbers_of_the_adapters():
    check_numbers()


def test_the_bytes_of_tiny_as_measured():
    check_numbers()
    for ratio, k_ratio in ((RATIO, K_RATIO), (RATIO, 0.01), (1.0, 1.0)):  # and LoRA
        check_rosa("tiny", RANK, ratio, k_ratio, measured_rosa("tiny", ratio, k_ratio))
    check_full("tiny", measured_full())


def test_the_bytes_of_7B_as_measured():
    check_numbers()
    measured = measured_rosa("LLaMA-2-7B", RATIO, K_RATIO)
    check_rosa("LLaMA-2-7B", RANK, RATIO, K_RATIO, measured)


def test_the_bytes_of_the_example():
    check_numbers()
    measured = {"base": 2704, "adapters": 352, "gradients": 176, "moments": 704}
    check_rosa("the example in the text", 2, 0.5, 0.5, measured)
    measured = {"weights": 5408, "gradients": 5408, "moments": 10816}
    check_full("the example in the text", measured)
