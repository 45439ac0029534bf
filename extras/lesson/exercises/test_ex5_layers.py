"""Exercise 5: gradient_norm, then the selector, one duty after the other, then a training run. The
losses are linear in the weights: so the gradients are the numbers that the test chose."""

import math

import numpy as np
import torch
from checking import as_array, check, check_dtype, fail, random_numbers, tensor, yours
from torch import nn

pytest_plugins = ["short_messages"]

ex5_layers = yours("ex5_layers")
LayerSelector = ex5_layers.LayerSelector
gradient_norm = ex5_layers.gradient_norm

SECTION_1 = "see 1 in the text"


class Norm(nn.Module):
    """The weights are no ones: what should be made of gradients alone shows."""

    def __init__(self, size):
        super().__init__()
        weight = 2 + tensor(random_numbers(size, seed=99)).abs()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Layer(nn.Module):
    """Two norms and a weight, all frozen, and the A and B of an adapter, which train."""

    def __init__(self, size):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)
        self.base = nn.Parameter(torch.ones(2), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    @property
    def norms(self):
        return [self.input_layernorm.weight, self.post_attention_layernorm.weight]


class Model(nn.Module):
    def __init__(self, layers, size=1):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(size) for _ in range(layers)])

    def loss(self, gradients):
        """gradients [layers, 2 norms, size]; those of A and B are 1."""
        total = 0
        for layer, numbers in zip(self.model.layers, tensor(gradients)):
            total = total + layer.A.sum() + layer.B.sum() + layer.base.sum()
            for weight, gradient in zip(layer.norms, numbers):
                total = total + (weight * gradient).sum()
        return total

    def of_layers(self, ask):
        """ask(layer) for every layer, as numbers."""
        return [float(ask(layer)) for layer in self.model.layers]


def as_scores(scores):
    """The gradients of one micro-batch for which the layers have these scores."""
    return [[[[score], [0.0]] for score in scores]]


def run_step(selector, net, gradients, step=0):
    """gradients [micro-batches, layers, 2 norms, size]. As in a training loop, but for the
    optimizer's step: before it only the gradients of the adapters are cleared."""
    for layer in net.model.layers:
        layer.A.grad = layer.B.grad = None
    selector.before_forward(step)
    if selector.probing != (step % selector.select_every == 0):
        what = f"step {step}, select_every {selector.select_every}: probing is {selector.probing}"
        fail(what, "first the test of which steps are probes", sure=False)
    for part in gradients:
        net.loss(part).backward()
    after_backward(selector, step)


def after_backward(selector, step):
    """At a step that is no probe, nothing may happen, and so nothing can fail."""
    try:
        selector.after_backward()
    except NotImplementedError:
        raise
    except Exception as error:
        if step % selector.select_every == 0:
            raise
        fail(
            f"after_backward at step {step}, select_every {selector.select_every}: "
            f"{type(error).__name__}: {error}",
            "at a step that is no probe after_backward returns at once: if not self.probing",
        )


def parameters_with_gradients(numbers):
    parameters = [
        nn.Parameter(2 + tensor(random_numbers(len(each), seed=i)).abs())
        for i, each in enumerate(numbers)
    ]
    for parameter, gradient in zip(parameters, numbers):
        parameter.grad = tensor(gradient)
    return parameters


def length(vectors):
    """L2 norms over the two norms of each layer: [layers, 2, size] -> [layers]."""
    return np.sqrt((np.asarray(vectors) ** 2).sum((1, 2)))


def mistakes_in_norms(total):
    """total [layers, 2, size], the gradients of the step."""
    single = np.sqrt((total**2).sum(-1))  # [layers, 2]
    count = total[0].size
    return [
        ("the sum of two norms: take the norm of both weights together", single.sum(-1)),
        ("the mean of two norms: take the norm of both weights together", single.mean(-1)),
        ("the larger of two norms: take the norm of both weights together", single.max(-1)),
        ("one norm weight only: both count", single[:, 0]),
        ("one norm weight only, the second: both count", single[:, 1]),
        ("the sum of absolute values: the root of the sum of squares", np.abs(total).sum((1, 2))),
        ("a plain sum, in which signs cancel: the root of the sum of squares", total.sum((1, 2))),
        ("the root is missing", length(total) ** 2),
        ("a mean, not a sum, of the squares", length(total) / math.sqrt(count)),
    ]


def mistakes_in_scores(gradients):
    once = ".grad is read once, after the last"
    return mistakes_in_norms(gradients.sum(0)) + [
        (
            "only the last micro-batch: .grad after the last backward pass is the sum of all",
            length(gradients[-1]),
        ),
        (
            "only the first micro-batch: .grad after the last backward pass is the sum of all",
            length(gradients[0]),
        ),
        (f"norms of micro-batches added up: {once}", sum(map(length, gradients))),
        ("a mean over the micro-batches: .grad as it is", length(gradients.mean(0))),
        (
            f"read after each micro-batch and added up: {once}",
            sum(map(length, gradients.cumsum(0))),
        ),
    ]


# --- gradient_norm ---


def check_norm(what, numbers):
    total = np.array([numbers], dtype=np.float64)
    mistakes = [(hint, float(each[0])) for hint, each in mistakes_in_norms(total)]
    parameters = parameters_with_gradients(numbers)
    weights = torch.cat([each.detach() for each in parameters])
    gradients = torch.cat([each.grad for each in parameters])
    mistakes += [
        ("these are norms of the weights: .grad", weights.norm()),
        (
            "gradients times weights: a score is of the gradients alone",
            (weights * gradients).norm(),
        ),
        (
            "divided by the norm of the weights: a score is of the gradients alone",
            gradients.norm() / weights.norm(),
        ),
    ]
    found = gradient_norm(parameters)
    check(what, found, float(length(total)[0]), mistakes, hint=SECTION_1)


def test_a_norm_by_hand():
    check_norm("gradients [3] and [4]: their norm", [[3.0], [4.0]])


def test_a_norm_of_several_numbers():
    check_norm("gradients [2, -1] and [-3, 1]: their norm", [[2.0, -1.0], [-3.0, 1.0]])


def test_a_norm_is_float32():
    weights = [nn.Parameter(torch.full((300,), 3, dtype=torch.bfloat16)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(300, dtype=torch.bfloat16)
    found = gradient_norm(weights)
    hint = "the norm was made in bfloat16: weight.grad.float() before it"
    if isinstance(found, torch.Tensor):
        check_dtype("the norm of bfloat16 gradients", found, torch.float32, hint)
    rounded = [float(torch.tensor(600.0).sqrt().bfloat16()), 24.375, 24.625]
    mistakes = [(hint, number) for number in rounded]
    check("600 bfloat16 gradients of 1: the norm", found, math.sqrt(600), mistakes, SECTION_1)


# --- how many layers, and when ---


def test_how_many_layers_train():
    sizes = [(5, 0.4), (4, 0.4), (4, 0.3), (3, 0.01), (3, 1.0), (5, 0.5)]
    shares = [k_ratio * layers for layers, k_ratio in sizes]  # 2, 1.6, 1.2, 0.03, 3, 2.5
    found = [LayerSelector(Model(layers), k_ratio).count for layers, k_ratio in sizes]
    mistakes = {
        "the count was rounded down: round(1.6) is 2, int(1.6) is 1": [
            max(1, int(share)) for share in shares
        ],
        "the count was rounded down, to 0: max(1, round(...))": [int(share) for share in shares],
        "the count was rounded up: round to the nearest": [math.ceil(share) for share in shares],
        "round(2.5) is 2: Python's round takes the even neighbour of a half": [
            max(1, math.floor(share + 0.5)) for share in shares
        ],
        "no layer: max(1, ...)": [round(share) for share in shares],
        "not rounded: max(1, round(...))": shares,
    }
    what = "count of 5, 4, 4, 3, 3, 5 layers, k_ratio 0.4, 0.4, 0.3, 0.01, 1, 0.5"
    check(what, found, [2, 2, 1, 1, 3, 2], mistakes, hint="see 2 in the text")


def test_which_steps_are_probes():
    net = Model(3)
    selector = LayerSelector(net, 0.5, select_every=3)
    found = []
    for step in range(7):
        selector.before_forward(step)
        found.append(selector.probing)
        net.loss(np.ones((3, 2, 1))).backward()
        after_backward(selector, step)
    mistakes = {
        "every step is a probe: step % select_every == 0": [1] * 7,
        "probes are off by one: step 0 is the first": [0, 0, 1, 0, 0, 1, 0],
        "probes are off by one, step 0 is the first": [0, 1, 0, 0, 1, 0, 0],
        "step 0 is a probe": [0, 0, 0, 1, 0, 0, 1],
        "only step 0 is a probe: step % select_every == 0": [1, 0, 0, 0, 0, 0, 0],
        "the wrong way round: step % select_every == 0 is a probe": [0, 1, 1, 0, 1, 1, 0],
        "probing was not set": [0] * 7,
    }
    what = "probing at steps 0 to 6, select_every 3"
    check(what, found, [1, 0, 0, 1, 0, 0, 1], mistakes, hint="see 5 in the text")
    selector, found = LayerSelector(Model(3), 0.5, select_every=3), []
    for step in (4, 6, 9, 2, 3):  # as after a resumed run: steps need not follow each other
        selector.before_forward(step)
        found.append(selector.probing)
    hint = "counted by itself: the step is the argument of before_forward"
    mistakes = {hint: [1, 0, 0, 1, 0]}
    what = "probing at steps 4, 6, 9, 2, 3, select_every 3"
    check(what, found, [0, 1, 1, 0, 1], mistakes, hint=hint)


# --- activate ---


def active_model(*activations):
    """A model of four layers, all of whose A and B have gradients, after these calls."""
    net = Model(4)
    selector = LayerSelector(net, 0.5)
    for layer in net.model.layers:
        layer.A.grad, layer.B.grad = torch.ones(2), torch.ones(2)
    for layers in activations:
        selector.activate(layers)
    return net, selector


def trains(net):
    """Of every layer, A and B: whether they have requires_grad."""
    return [float(p.requires_grad) for layer in net.model.layers for p in (layer.A, layer.B)]


def twice(layers):
    return [number for number in layers for _ in range(2)]


def test_only_the_active_have_requires_grad():
    net, selector = active_model([1, 3])
    mistakes = {
        "the wrong way round: these are the active": twice([1, 0, 1, 0]),
        "nothing was frozen: requires_grad_(False)": [1] * 8,
        "one parameter of each layer only": [0, 1, 1, 1, 0, 1, 1, 1],
        "one parameter of each layer only: all of self.parameters[i]": [0, 0, 1, 0, 0, 0, 1, 0],
    }
    what = "requires_grad of A and B of 4 layers after activate([1, 3])"
    check(what, trains(net), twice([0, 1, 0, 1]), mistakes, hint="see 3 in the text")
    check("active after activate([1, 3])", selector.active, [1, 3], hint="see 2 in the text")


def test_other_weights_of_a_layer_stay_frozen():
    net, _ = active_model([1, 3])
    frozen = net.of_layers(lambda layer: layer.base.requires_grad)
    if any(frozen):
        hint = "the base weights woke up: self.parameters[i] alone, not layer.requires_grad_(True)"
        fail("base weights have requires_grad after activate([1, 3])", hint)
    norms = net.of_layers(lambda layer: any(weight.requires_grad for weight in layer.norms))
    if any(norms):
        hint = "the norms woke up: they have requires_grad at a probe only"
        fail("norm weights have requires_grad after activate([1, 3])", hint)


def test_frozen_layers_lose_their_gradient():
    net, _ = active_model([1, 3])
    found = net.of_layers(lambda layer: layer.A.grad is not None and layer.B.grad is not None)
    mistakes = {
        "frozen layers keep their gradient: the optimizer would apply it; grad = None": [1] * 4,
        "the active lost theirs: a probe is a training step too": [0] * 4,
        "the wrong way round: these are the active": [1, 0, 1, 0],
    }
    check("which of 4 layers have a .grad, 1 and 3 active", found, [0, 1, 0, 1], mistakes)
    if any(p.grad is not None for i in (0, 2) for p in net.model.layers[i].parameters()):
        fail("a frozen parameter has a .grad", "every parameter of the layer: grad = None")


def test_a_layer_that_rested_trains_again():
    net, _ = active_model([1, 3], [0, 1])
    mistakes = {
        "a frozen layer stays frozen: set requires_grad in both cases": twice([0, 1, 0, 0]),
        "a layer that was active stays so: set requires_grad in both cases": twice([1, 1, 0, 1]),
        "nothing was frozen: requires_grad_(False)": [1] * 8,
    }
    what = "requires_grad of A and B, layers 0 and 1 after 1 and 3"
    check(what, trains(net), twice([1, 1, 0, 0]), mistakes, hint="see 3 in the text")


def test_active_is_in_ascending_order():
    _, selector = active_model([3, 1])
    mistakes = {"not in the order of the layers: sort the indices": [3, 1]}
    check("active after activate([3, 1])", selector.active, [1, 3], mistakes)


# --- a probe ---


def test_at_a_probe_everything_has_requires_grad():
    net = Model(4)
    selector = LayerSelector(net, 0.5, select_every=3)
    for number in (1, 2):
        selector.before_forward(3 * number)
        if not selector.probing:
            return  # the test of which steps are probes says so
        what = f"before the forward pass of probe {number}"
        for i, layer in enumerate(net.model.layers):
            if not all(weight.requires_grad for weight in layer.norms):
                hint = "a probe measures both norm weights of every layer: requires_grad_(True)"
                fail(f"{what}: a norm weight of layer {i} has no requires_grad", hint)
            if not (layer.A.requires_grad and layer.B.requires_grad):
                hint = "at a probe every layer trains, also one that rested: activate all of them"
                fail(f"{what}: layer {i} is frozen", hint)
            if layer.base.requires_grad:
                hint = "the base weights woke up: only self.parameters and self.norms"
                fail(f"{what}: the base weight of layer {i} has requires_grad", hint)
        hint = "at a probe every layer is active: activate all of them in before_forward"
        mistakes = {hint: [1, 3]}
        check(f"{what}: active", selector.active, range(4), mistakes, hint)
        net.loss(as_scores([2, 9, 1, 7])[0]).backward()
        selector.after_backward()


def check_scores(what, gradients):
    gradients = np.array(gradients, dtype=np.float64)
    net = Model(gradients.shape[1], gradients.shape[-1])
    selector = LayerSelector(net, 0.5)
    run_step(selector, net, gradients)
    if not isinstance(selector.scores, torch.Tensor):
        came = type(selector.scores).__name__
        fail(f"{what}: expected a tensor, came {came}", "self.scores = torch.stack([...])")
    expected = length(gradients.sum(0))
    check(what, selector.scores, expected, mistakes_in_scores(gradients), hint=SECTION_1)


def test_scores_of_one_micro_batch():
    check_scores("2 layers, gradients 3, 4 and 6, -8: scores", [[[[3], [4]], [[6], [-8]]]])


def test_micro_batches_add_up():
    check_scores("gradients [3] [0], then [-3] [5]: the score", [[[[3], [0]]], [[[-3], [5]]]])


def test_scores_of_many_layers_and_micro_batches():
    check_scores("4 layers, 3 micro-batches: scores", random_numbers(3, 4, 2, 6, seed=1))


def check_selection(scores, k_ratio, count):
    order = np.argsort(scores)
    best = list(order[-count:])
    mistakes = {
        "these are the lowest scores": sorted(order[:count]),
        "these are the lowest scores, and not in the order of the layers": order[:count],
        "by score: sort the indices": best[::-1],
        "by score, the highest last: sort the indices": best,
        "these are scores, not indices of layers": sorted(np.array(scores)[best]),
        "sorted(scores)[:count] are scores, and the lowest; argsort gives indices": sorted(scores)[
            :count
        ],
        "as many layers as should rest are active": sorted(order[count - len(scores) :]),
        "all layers are active after a probe: activate the best ones": range(len(scores)),
        "no layer is active": [],
        "these are the first layers, whatever the scores": range(count),
    }
    net = Model(len(scores))
    selector = LayerSelector(net, k_ratio)
    calls, activate = [], selector.activate
    selector.activate = lambda layers: activate(calls.append(list(layers)) or calls[-1])
    run_step(selector, net, as_scores(scores))
    what = f"scores {scores}, k_ratio {k_ratio}: active"
    check(what, selector.active, sorted(best), mistakes, hint="see 2 in the text")
    if not calls or sorted(calls[-1]) != sorted(best):
        hint = "after_backward calls activate with the layers that it has selected"
        fail(f"{what}, but activate was called with {calls}", hint)


def test_the_highest_are_selected():
    check_selection([2, 9, 1, 7, 3], 0.4, count=2)  # [1, 3]


def test_other_scores_are_other_layers():
    check_selection([5, 1, 4, 2], 0.5, count=2)  # [0, 2]


def test_one_layer_of_three():
    check_selection([1, 2, 0], 0.01, count=1)


def test_all_layers():
    check_selection([1, 2, 0], 1.0, count=3)


def test_the_selected_keep_the_gradient_of_the_probe():
    net = Model(4)
    run_step(LayerSelector(net, 0.5), net, as_scores([2, 9, 1, 7]))
    found = net.of_layers(lambda layer: layer.A.grad is not None)
    mistakes = {
        "the active lost theirs: a probe is a training step too": [0] * 4,
        "frozen layers keep their gradient: the optimizer would apply it; grad = None": [1] * 4,
    }
    what = "which of 4 layers have a .grad after a probe, 1 and 3 selected"
    check(what, found, [0, 1, 0, 1], mistakes, hint="see 3 in the text")


def test_norm_weights_only_measure():
    net = Model(4)
    selector = LayerSelector(net, 0.5, select_every=3)
    run_step(selector, net, as_scores([2, 9, 1, 7]))
    norms = [weight for layer in net.model.layers for weight in layer.norms]
    if any(weight.grad is not None for weight in norms):
        hint = "norms keep their gradient: the next probe would add to it; weight.grad = None"
        fail("norm weights have a .grad after the probe", hint)
    if any(weight.requires_grad for weight in norms):
        hint = "norms keep requires_grad: weight.requires_grad_(False) at the end of the probe"
        fail("norm weights have requires_grad after the probe", hint)
    selector.before_forward(1)
    if any(weight.requires_grad for weight in norms):
        hint = "norms have requires_grad at a probe only: is step 1 one?"
        fail("norm weights have requires_grad at step 1, select_every 3", hint)


def test_the_next_probe_begins_anew():
    gradients = random_numbers(2, 3, 2, 4, seed=2)
    net = Model(3, 4)
    selector = LayerSelector(net, 0.5, select_every=1)
    run_step(selector, net, gradients, 0)
    run_step(selector, net, 2 * gradients, 1)
    stale = "the gradients of the probe before are still in .grad: set it to None after a probe"
    mistakes = mistakes_in_scores(2 * gradients)
    mistakes.append((stale, length(3 * gradients.sum(0))))
    mistakes.append(("scores are those of the first probe", length(gradients.sum(0))))
    expected = length(2 * gradients.sum(0))
    what = "the second probe, with twice the gradients: scores"
    check(what, selector.scores, expected, mistakes, hint=SECTION_1)


def test_between_probes_nothing_changes():
    net = Model(4)
    selector = LayerSelector(net, 0.5, select_every=3)
    run_step(selector, net, as_scores([2, 9, 1, 7]), 0)
    scores = as_array("scores", selector.scores)
    run_step(selector, net, as_scores([9, 1, 9, 1]), 1)
    check("active after step 1, no probe", selector.active, [1, 3], hint="see 5 in the text")
    check("scores after step 1, no probe", selector.scores, scores, hint="see 5 in the text")
    found = net.of_layers(lambda layer: layer.A.grad is not None)
    check("which layers have a .grad at step 1", found, [0, 1, 0, 1], hint="see 5 in the text")


# --- a training run ---


def test_a_training_run_moves_what_is_active_and_nothing_else():
    """The run of the drawing in the text. The optimizer has all parameters of the model."""
    scores = {0: [9, 1, 2, 8], 3: [9, 8, 2, 1]}
    net = Model(4)
    selector = LayerSelector(net, 0.5, select_every=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    updated = []
    for step in range(6):
        before = [[p.clone() for p in layer.parameters()] for layer in net.model.layers]
        selector.before_forward(step)
        net.loss(as_scores(scores.get(step, [1, 1, 1, 1]))[0]).backward()
        after_backward(selector, step)
        left = [n for n, p in net.named_parameters() if "layernorm" in n and p.requires_grad]
        optimizer.step()
        optimizer.zero_grad()
        row = []
        for layer, old in zip(net.model.layers, before):
            moved = {
                name: not torch.equal(p, each)
                for (name, p), each in zip(layer.named_parameters(), old)
            }
            if moved["base"] or any(m for name, m in moved.items() if "layernorm" in name):
                hint = ".grad was left: the optimizer saw a gradient of a weight that only measures"
                if left:
                    hint = "requires_grad was left after the probe: so norms get gradients again"
                if moved["base"]:
                    hint = "only self.parameters and self.norms ever get requires_grad"
                fail(f"step {step} has moved a norm or a base weight", hint)
            row.append(moved["A"] and moved["B"])
        updated.append(row)
    expected = [[1, 0, 0, 1]] * 3 + [[1, 1, 0, 0]] * 3
    mistakes = {
        "all layers were updated at the probes: frozen layers lose the gradient of the probe": [
            [1, 1, 1, 1], *[[1, 0, 0, 1]] * 2, [1, 1, 1, 1], *[[1, 1, 0, 0]] * 2
        ],
        "the second probe selected nothing new": [[1, 0, 0, 1]] * 6,
    }  # fmt: skip
    what = "which of 4 layers were updated at steps 0 to 5"
    check(what, np.array(updated), expected, mistakes, hint="first the tests above")
