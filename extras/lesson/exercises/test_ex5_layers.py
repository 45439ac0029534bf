"""Exercise 5: scores, then the selection, then what it does. The losses are linear in the weights: their gradients are
the numbers that the test chose."""

import numpy as np
import torch
from checking import check, fail, random_numbers, tensor
from ex5_layers import activate, layer_scores, select_layers
from torch import nn

pytest_plugins = ["short_messages"]


def probe(gradients):
    """gradients [micro-batches, layers, 2 norms, D] -> their losses, the norm weights."""
    gradients = tensor(gradients)
    norms = [
        [nn.Parameter(torch.ones(gradients.shape[-1])) for _ in range(2)]
        for _ in range(gradients.shape[1])
    ]
    return losses_of(gradients, norms), norms


def losses_of(gradients, norms):
    return [
        sum((weight * g).sum() for pair, gs in zip(norms, part) for weight, g in zip(pair, gs))
        for part in gradients
    ]


def length(vectors):
    """L2 norms over the two norms of each layer: [layers, 2, D] -> [layers]."""
    return np.array([np.sqrt(sum(number**2 for number in layer.flatten())) for layer in vectors])


def mistakes_in_scores(gradients):
    total = gradients.sum(0)  # [layers, 2, D]
    return {
        "the sum of two norms: take the norm of both weights together": np.sqrt(
            (total**2).sum(-1)
        ).sum(-1),
        "one norm weight only: both count": np.sqrt((total**2).sum(-1))[:, 0],
        "one norm weight only, the second: both count": np.sqrt((total**2).sum(-1))[:, 1],
        "the sum of absolute values: the root of the sum of squares": np.abs(total).sum((1, 2)),
        "a plain sum, in which signs cancel: the root of the sum of squares": total.sum((1, 2)),
        "the root is missing": length(total) ** 2,
        "read before the last micro-batch: first all backward passes": length(
            gradients[:-1].sum(0)
        ),
        "only the first micro-batch: first all backward passes": length(gradients[0]),
        "only the last micro-batch: do not clear .grad between backward passes": length(
            gradients[-1]
        ),
        "norms of micro-batches added up: .grad is read once, after the last": sum(
            map(length, gradients)
        ),
        "a mean over the micro-batches: .grad as it is": length(total) / len(gradients),
        "read after each micro-batch and added up: .grad is a sum already": sum(
            map(length, gradients.cumsum(0))
        ),
    }


def check_scores(what, gradients):
    gradients = np.array(gradients, dtype=np.float64)
    mistakes, expected = mistakes_in_scores(gradients), length(gradients.sum(0))
    check(what, layer_scores(*probe(gradients)), expected, mistakes, hint="see 1 in the text")


def test_one_layer_by_hand():
    check_scores("gradients [3] and [4]: the score", [[[[3], [4]]]])


def test_signs_and_several_numbers():
    check_scores("gradients [2, -1] and [-3, 1]: the score", [[[[2, -1], [-3, 1]]]])


def test_micro_batches_add_up():
    check_scores("gradients [3] [0], then [-3] [5]: the score", [[[[3], [0]]], [[[-3], [5]]]])


def test_many_layers_and_micro_batches():
    check_scores("4 layers, 3 micro-batches", random_numbers(3, 4, 2, 6, seed=1))


def test_the_next_probe_begins_anew():
    gradients = random_numbers(2, 3, 2, 4, seed=2)
    losses, norms = probe(gradients)
    layer_scores(losses, norms)
    before = "the gradients of the probe before are still in .grad: start from .grad = None"
    mistakes = mistakes_in_scores(gradients) | {before: length(2 * gradients.sum(0))}
    found = layer_scores(losses_of(tensor(gradients), norms), norms)
    check(
        "the same probe once more",
        found,
        length(gradients.sum(0)),
        mistakes,
        hint="see 1 in the text",
    )


def check_selection(scores, k_ratio, count):
    order = np.argsort(scores)
    best = list(order[-count:])
    mistakes = {
        "these are the lowest scores": sorted(order[:count]),
        "these are the lowest scores, and not in the order of the layers": order[:count],
        "by score: sort the indices": best[::-1],
        "by score, the highest last: sort the indices": best,
        "these are scores, not indices of layers": sorted(np.array(scores)[best]),
        "no layer: max(1, ...)": [],
        "the count was rounded down: round(1.6) is 2, int(1.6) is 1": sorted(
            order[-max(1, count - 1) :]
        ),
        "the count was rounded up: round to the nearest": sorted(order[-count - 1 :]),
    }
    found = select_layers(tensor(scores), k_ratio)
    check(
        f"scores {scores}, k_ratio {k_ratio}",
        found,
        sorted(best),
        mistakes,
        hint="see 2 in the text",
    )


def test_the_highest_in_order():
    check_selection([2, 9, 1, 7, 3], 0.4, count=2)  # [1, 3]


def test_the_count_is_rounded_up():
    check_selection([5, 1, 4, 2], 0.4, count=2)  # 1.6


def test_the_count_is_rounded_down():
    check_selection([5, 1, 4, 2], 0.3, count=1)  # 1.2


def test_one_layer_always_trains():
    check_selection([1, 2, 0], 0.01, count=1)


def test_all_layers():
    check_selection([1, 2, 0], 1.0, count=3)


def layers_with_gradients():
    """Four layers with two parameters each."""
    parameters = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(4)]
    for parameter in sum(parameters, []):
        parameter.grad = torch.ones(3)
    return parameters


def test_only_the_selected_ask_for_gradients():
    parameters = layers_with_gradients()
    activate(parameters, [1, 3])
    found = [[parameter.requires_grad for parameter in layer] for layer in parameters]
    mistakes = {
        "the wrong way round: these are the selected": [[1, 1], [0, 0], [1, 1], [0, 0]],
        "nothing was frozen: requires_grad_(False)": [[1, 1]] * 4,
        "one parameter of each layer only": [[0, 1], [1, 1], [0, 1], [1, 1]],
    }
    check(
        "requires_grad, layers 1 and 3 of 4",
        np.array(found).flatten(),
        [0, 0, 1, 1] * 2,
        {hint: np.array(numbers).flatten() for hint, numbers in mistakes.items()},
    )


def test_frozen_layers_lose_their_gradient():
    parameters = layers_with_gradients()
    activate(parameters, [1, 3])
    found = [all(parameter.grad is not None for parameter in layer) for layer in parameters]
    mistakes = {
        "frozen layers keep their gradient: the optimizer would apply it; grad = None": [
            1,
            1,
            1,
            1,
        ],
        "the selected lost theirs: a probe is a training step too": [0, 0, 0, 0],
        "the wrong way round: these are the selected": [1, 0, 1, 0],
    }
    check("which of 4 layers have a .grad, 1 and 3 selected", found, [0, 1, 0, 1], mistakes)
    if any(parameter.grad is not None for parameter in parameters[0] + parameters[2]):
        fail("a frozen parameter has a .grad", "every parameter of the layer: grad = None")


def test_a_layer_that_rested_trains_again():
    parameters = layers_with_gradients()
    activate(parameters, [1, 3]), activate(parameters, [0, 1])
    found = [all(parameter.requires_grad for parameter in layer) for layer in parameters]
    mistakes = {
        "a frozen layer stays frozen: set requires_grad in both cases": [0, 1, 0, 0],
        "a layer that trained goes on: set requires_grad in both cases": [1, 1, 0, 1],
        "nothing was frozen: requires_grad_(False)": [1, 1, 1, 1],
    }
    check("requires_grad, layers 0 and 1 after 1 and 3", found, [1, 1, 0, 0], mistakes)
