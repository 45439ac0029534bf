"""Statements about `extras/inference.py`: what model.py answers, many prompts at a time."""

import copy

import pytest
import torch
from helpers import decisive_model, random_model, random_tokens, randomise_adapters
from rounding import assert_close, assert_greedy, near, of_model

from extras import inference
from extras.inference import BatchedCache, generate, log_likelihoods, stream
from extras.kernels import accelerate
from model import Attention, KVCache, Llama
from rosa import attach

pytestmark = pytest.mark.numeric
CHANGES = [
    {},
    {"num_key_value_heads": 4},
    {"model_type": "qwen2", "num_key_value_heads": 1},
    {"head_dim": 12},
]


@pytest.fixture(params=["plain", "accelerated"])
def kernels(request):
    return accelerate if request.param == "accelerated" else lambda model: None


def ragged(*lengths, after=()):
    return [[*after, *random_tokens(n, seed=n).tolist()] for n in lengths]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("parts", [(20,), (7, 1, 12), (1,) * 20])
def test_through_either_cache_or_none_logits_and_answers_are_the_same(kernels, changes, parts):
    """Also where several tokens follow others: then KVCache has a mask of bools, BatchedCache one
    of floats. Neither result depends on what the memory held before: in this mode PyTorch fills new
    memory with nan."""
    model, tokens = randomise_adapters(attach(random_model(**changes), 4, 8)), random_tokens(3, 20)
    expected = model(tokens)
    kernels(model)
    torch.set_deterministic_debug_mode("error")
    try:
        batched = BatchedCache(model, 5, 25).use(slice(1, 4))
        assert not any(tensor.any() for tensor in (*batched.keys, *batched.values, batched.lengths))
        for cache in (KVCache(model.config), batched):
            with torch.inference_mode():
                x = torch.cat(
                    [model.hidden_states(part, cache) for part in tokens.split(parts, 1)], 1
                )
                assert_close(model.logits(x), expected, **of_model(model.config))
            assert torch.as_tensor(cache.length).eq(20).all()
    finally:
        torch.set_deterministic_debug_mode("default")
    prompts = ragged(1, 13, 5, 30, 2, 13)
    assert_greedy(model, prompts, generate(model, prompts, 15, None), 15)


def test_rows_of_different_lengths_go_on_together_each_after_its_own_tokens(kernels, model):
    tokens, cache, logits, ends = (
        random_tokens(4, 40),
        BatchedCache(model, 4, 40),
        [[] for _ in range(4)],
        [0] * 4,
    )
    expected = model(tokens)
    kernels(model)
    for first, last, count in ((1, 3, 5), (0, 4, 7), (3, 4, 1), (0, 2, 12), (0, 4, 3)):
        part = torch.stack(
            [tokens[row, ends[row] : ends[row] + count] for row in range(first, last)]
        )
        with torch.inference_mode():
            part_logits = model.logits(model.hidden_states(part, cache.use(slice(first, last))))
        for row in range(first, last):
            logits[row].append(part_logits[row - first])
            ends[row] += count
    assert cache.lengths.tolist() == ends == [22, 27, 15, 11]
    for row in range(4):
        assert_close(torch.cat(logits[row]), expected[row, : ends[row]], **of_model(model.config))


@pytest.mark.parametrize(
    "lengths, common", [([5, 1, 9] * 4, 20), ([0, 3], 19), ([2, 2, 2], 21), ([4], 0)]
)
def test_what_all_prompts_begin_with_is_computed_once(model, lengths, common):
    prompts, counts = ragged(*lengths, after=random_tokens(20, seed=50).tolist()), []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: counts.append(args[0].numel())
    )
    answers = generate(model, prompts, 15, None)
    hook.remove()
    assert_greedy(model, prompts, answers, 15)
    groups = [prompts[i : i + 8] for i in range(0, len(prompts), 8)]
    first = [len(group) * (max(map(len, group)) - common) for group in groups]
    assert counts == [*[common] * (common > 0), *first, *[len(prompts)] * 14]


def test_every_new_token_is_announced(model):
    prompts, seen = ragged(5, 9, 7), {0: [[]], 1: [[]], 2: [[]]}
    # With this token as end of sequence at least the first answer ends early
    eos_id = generate(model, prompts[:1], 12, None)[0][6]
    answers = generate(
        model, prompts, 12, eos_id, on_token=lambda row, ids: seen[row].append(list(ids))
    )
    for row, answer in enumerate(answers):
        assert seen[row] == [answer[:count] for count in range(len(answer) + 1)]
    assert len(answers[0]) <= 6


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 30, None])
@pytest.mark.parametrize("shared", [0, 11])
def test_the_next_prompts_take_the_places_of_those_answered(batch_size, shared):
    """With and without a common beginning of the prompts. The answers are the same, each is yielded
    once, as soon as it has ended, and no more than batch_size prompts are answered at a time. A
    finished row costs nothing, and all prompts together take fewer steps than batch after batch."""
    model, shared = random_model(), random_tokens(shared, seed=3).tolist()
    prompts = ragged(
        9, 3, 14, 6, 21, 1, 8, 2, 2, 17, 5, 30, 4, 11, 7, 7, 1, 19, 3, 12, after=shared
    )
    free, rows = generate(model, prompts, 16, None), []
    eos_ids = {free[0][3], free[2][10], free[9][1], free[11][15], free[17][0]}
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    ended = sorted(
        (i, list(ids)) for i, ids in stream(model, prompts, 16, eos_ids, batch_size=batch_size)
    )
    hook.remove()
    answers, width = [ids for _, ids in ended], batch_size or 20
    assert [i for i, _ in ended] == list(range(20)) and max(rows) == min(width, 20)
    assert_greedy(model, prompts, answers, 16, eos_ids)
    lengths = [min(16, len(answer) + 1) for answer in answers]
    assert len(set(lengths)) > 3 and sum(rows) == sum(lengths) and answers[17] == []
    one_batch = [sum(length > step for length in lengths) for step in range(max(lengths))]
    batches = sum(max(lengths[i : i + width]) for i in range(0, 20, width))
    assert rows == one_batch if width >= 20 else len(rows) < batches or width == 1
    assert generate(model, prompts, 16, eos_ids, batch_size) == answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_rows_are_answered_at_a_time_as_memory_allows(monkeypatch, kernels, dtype):
    """What the cache holds in memory is what the number of rows was computed from."""
    model, prompts, rows = random_model().to(dtype), ragged(*range(3, 33)), []
    kernels(model)
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    cache = BatchedCache(model, 1, 32 + 4)
    a_row = sum(tensor.untyped_storage().nbytes() for tensor in cache.keys + cache.values)
    for memory, expected in ((11.5 * a_row, 11), (a_row, 8), (99 * a_row, 30)):
        monkeypatch.setattr(inference, "MEMORY_OF_CACHE", int(memory))
        rows.clear()
        generate(model, prompts, 4, None)
        assert max(rows) == expected
    monkeypatch.setattr(inference, "MOST_ROWS", 9)
    rows.clear()
    generate(model, prompts, 4, None)
    assert max(rows) == 9


def test_in_bfloat16_answers_are_as_near_to_the_exact_ones_as_those_of_the_plain_cache(kernels):
    """The kernel's cache holds keys in float32; any other attention gets them as they came."""
    model = randomise_adapters(attach(random_model(), 4, 8)).to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    tokens = random_tokens(3, 20)
    with torch.inference_mode():
        wanted = exact(tokens)
        usual = (model(tokens).double() - wanted).norm()
        kernels(model)
        x = model.hidden_states(tokens[:, :12], cache := BatchedCache(model, 3, 20).use(slice(3)))
        x = torch.cat(
            [x, *(model.hidden_states(tokens[:, t, None], cache) for t in range(12, 20))], 1
        )
        assert (model.logits(x).double() - wanted).norm() <= 2 * usual
    accelerated = kernels is accelerate
    assert {keys.dtype for keys in cache.keys} == {torch.float32 if accelerated else torch.bfloat16}


def test_generation_stops_when_all_are_done_and_refuses_before_anything_runs(model):
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    assert generate(model, ragged(4, 6), 50, list(range(97))) == [[], []] and len(calls) == 1
    assert generate(model, [], 5, None) == [] and generate(model, ragged(4, 6), 0, None) == [[], []]
    with pytest.raises(
        ValueError,
        match="prompt 1 has 100 tokens; with 29 new ones it exceeds the model's context of",
    ):
        generate(model, ragged(4, 100), 29, None)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 5, None)
    assert len(calls) == 1


EDITS = {
    "generate": lambda answers: [ids[::-1] for ids in answers],
    "update": lambda held: (held[0], -held[1], held[2]),
}


@pytest.mark.parametrize("cls, name", [(Llama, "generate"), (KVCache, "update")])
def test_an_edited_method_answers_as_written_and_a_line_names_it(
    monkeypatch, capsys, model, cls, name
):
    prompts, plain = ragged(4, 9, 6), getattr(cls, name)
    before = generate(model, prompts, 12, None)
    monkeypatch.setattr(cls, name, lambda self, *args: EDITS[name](plain(self, *args)))
    answers = generate(model, prompts, 12, None)
    assert answers == model.generate(prompts, 12, None) and answers != before
    reason = f"{cls.__name__}.{name} has been edited"
    line = f"inference  {reason}: answering with Llama.generate, one prompt after the other\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("changes", [*CHANGES, {"num_key_value_heads": 4, "rope_theta": 100.0}])
def test_the_likelihood_of_a_continuation_is_that_of_the_whole_text(kernels, changes):
    model, prompts = random_model(**changes), ragged(7, 1, 12, 30)
    kernels(model)
    continuations = [ragged(*lengths) for lengths in ((1, 3), (5,), (2, 2, 1, 6), (4, 1))]
    continuations[2][1] = [5, 6]
    for part in (slice(None), slice(2), slice(3, 4)):
        answers = log_likelihoods(model, prompts[part], continuations[part])
        for prompt, options, scores in zip(
            prompts[part], continuations[part], answers, strict=True
        ):
            for ids, score in zip(options, scores, strict=True):
                log_probs = model(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
                plain = sum(
                    log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(ids)
                )
                assert score == near(plain, **of_model(model.config))
    single = log_likelihoods(model, prompts, [[[3], [4]]] * 4)[1]
    expected = model(torch.tensor([prompts[1]]))[0, -1].log_softmax(-1)[[3, 4]].tolist()
    assert single == near(expected, **of_model(model.config))
    with pytest.raises(ValueError, match="129 tokens are more than the model's context of 128"):
        log_likelihoods(model, [[4], [3] * 120], [[[6], [7] * 9], [[5] * 9]])
    windowed = random_model(model_type="mistral", sliding_window=20)
    with pytest.raises(ValueError, match="21 tokens are more than the model's context of 20"):
        log_likelihoods(windowed, [[3] * 20], [[[3]]])


def test_an_attend_that_a_reader_has_written_gets_the_masks_that_the_plain_cache_gives(monkeypatch):
    def attend(self, q, k, v, mask):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask
        # Also an edit: the scores are not divided by the root of d
        scores = (q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(Attention, "attend", attend)
    prompts = [[3, 4, 5], [7] * 9, [6, 5]]
    model = decisive_model(prompts, 6)
    assert generate(model, prompts, 6, None) == model.generate(prompts, 6, None)
