"""How far apart two right computations of the same thing may lie: where the tests have their
tolerances from.

Every operation rounds its result by up to eps / 2 of it. A sum of `length` products has been
rounded that often, in an order that is the machine's own, and `depth` computations one after the
other hand their errors on. Roundings go up as often as down, so they add up as a random walk does:
the typical error of a whole tensor is sqrt(length * depth) * eps / 2 of its norm. PyTorch adds up
in float32 at least; in bfloat16 each of the `depth` results is rounded once more. MARGIN is for two
such errors and for what softmax and norms do to them. An error in a formula is hundreds of times as
large."""

import math

import pytest
import torch

MARGIN = 4


def bound(dtype=torch.float32, length=1, depth=1):
    """The share of its norm by which a tensor may be off."""
    eps, eps_of_sums = (
        torch.finfo(of).eps
        for of in (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    )
    return MARGIN * math.sqrt(depth) * (eps + math.sqrt(length) * eps_of_sums)


def of_model(config, passes=1):
    """The `length` and `depth` of a model's logits: some ten computations in each layer. passes: 2
    with the backward pass, 2 a step of training."""
    length = max(
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    return {"length": length, "depth": passes * (10 * config.num_hidden_layers + 3)}


def assert_close(found, expected, length=1, depth=1, dtype=None):
    """Two tensors are the same but for rounding. dtype: the one of lowest precision that either was
    computed in."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    off, size = (found.double() - expected.double()).norm(), expected.double().norm()
    limit = bound(dtype or found.dtype, length, depth)
    assert off <= limit * size, (
        f"off by {off / size:.3g} of its norm; rounding explains {limit:.3g}"
    )


def assert_no_worse(found, plain, exact):
    """`found` is as near to the float64 result as `plain` is, which is computed in the same
    precision another way: two errors of the same kind, of whole tensors, are hardly ever twice as
    large as one another."""
    error, usual = ((tensor.double() - exact.double()).norm() for tensor in (found, plain))
    assert error <= 2 * usual + bound(torch.float32) * exact.double().norm(), (
        f"off by {error:.3g}, the plain way by {usual:.3g}"
    )


def near(value, length=1, depth=1, dtype=torch.float32):
    """What a number may be, a loss in nats, say: a sum of logarithms of numbers around 1, so that
    at least 1 is its unit."""
    return pytest.approx(value, rel=bound(dtype, length, depth), abs=bound(dtype, length, depth))


def assert_greedy(model, prompts, answers, count, eos_ids=()):
    """The answers are greedy ones: each of their tokens is the likeliest after those before it
    (where two are equally likely but for rounding, either is), and they end where one of eos_ids
    would come next, or after `count` tokens."""
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]))[
                0, len(prompt) - 1 :
            ].double()  # what each token is chosen by, and the end
        likely = (
            logits
            >= logits.amax(-1, keepdim=True)
            - bound(model.dtype, **of_model(model.config)) * logits.abs().max()
        )
        assert all(likely[t, token] for t, token in enumerate(answer)), (prompt, answer)
        assert not set(answer) & set(eos_ids)
        assert len(answer) == count or len(answer) < count and likely[-1, list(eos_ids)].any()
