"""Exercise 4, from a merge by hand to bfloat16. The adapters are those of rosa.py."""

import numpy as np
import torch
from checking import check, check_dtype, fail, random_numbers, tensor, yours
from torch import nn

import rosa

pytest_plugins = ["short_messages"]

ex4_merge = yours("ex4_merge")
merge = ex4_merge.merge

NOT_IN_PLACE = "the weight is what it was: write into adapter.linear.weight itself"
SCALE = "alpha / rank"


def adapter_of(W, A, B, alpha, num_heads=1, ratio=0.5, bias=None, dtype=torch.float32):
    """An adapter with these numbers around a frozen linear layer."""
    out_features, in_features = W.shape
    linear = nn.Linear(in_features, out_features, bias is not None, dtype=dtype)
    linear.requires_grad_(False)
    linear.weight.copy_(tensor(W))
    if bias is not None:
        linear.bias.copy_(tensor(bias))
    with torch.random.fork_rng():
        adapter = rosa.RoAE(linear, num_heads, len(A), alpha, ratio)
    with torch.no_grad():
        adapter.A.copy_(tensor(A)), adapter.B.copy_(tensor(B))
    return adapter


def merged(model):
    """The reader's merge. A copy of the model is said first, and alone."""
    found = merge(model)
    if isinstance(found, nn.Module) and found is not model:
        hint = "no copy: change the model that came, and `return model`"
        fail("merge: expected the model that was given, came another model", hint)
    return found


def merge_one(adapter):
    """The reader's merge of a model that is this adapter alone. Returns the weight."""
    linear = adapter.linear
    merged(nn.ModuleDict({"q_proj": adapter}))
    return linear.weight


def add(W, rows, update):
    W = W.copy()
    for number, row in enumerate(rows):
        W[row] += update[number]
    return W


# W [8, 7], A [3, 7], B [4, 3]: no two sizes are the same. 2 heads of 4: the rows are 1, 3, 5, 7.
ROWS, RANK, ALPHA = [1, 3, 5, 7], 3, 10
# A second adapter with other sizes: W [4, 5], A [2, 5], B [2, 2]; one head of 4, rows 1 and 3.
ROWS_2, RANK_2, ALPHA_2 = [1, 3], 2, 5


def numbers_of(*shapes, seed):
    return [random_numbers(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def first_problem():
    """W, A, B and the bias of the first adapter."""
    return numbers_of((8, 7), (3, 7), (4, 3), (8,), seed=0)


def second_problem():
    return numbers_of((4, 5), (2, 5), (2, 2), (4,), seed=10)


def first_adapter():
    W, A, B, bias = first_problem()
    return adapter_of(W, A, B, ALPHA, num_heads=2, bias=bias)


def second_adapter():
    W, A, B, bias = second_problem()
    return adapter_of(W, A, B, ALPHA_2, bias=bias)


def model_of_two():
    """layers.0.self_attn.q_proj and layers.1.mlp.up_proj are adapters; beside them stands a linear
    layer without one."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.layers[0].self_attn = nn.Module()
    model.layers[0].self_attn.q_proj = first_adapter()
    model.layers[0].self_attn.o_proj = nn.Linear(3, 3)
    model.layers[1].mlp = nn.Module()
    model.layers[1].mlp.up_proj = second_adapter()
    return model


ADAPTED = ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]


def expected_weights():
    W, A, B, _ = first_problem()
    W_2, A_2, B_2, _ = second_problem()
    return [add(W, ROWS, ALPHA / RANK * B @ A), add(W_2, ROWS_2, ALPHA_2 / RANK_2 * B_2 @ A_2)]


def test_two_rows_by_hand():
    W, A, B = np.ones((4, 2)), np.array([[1.0, 2.0]]), np.array([[1.0], [10.0]])
    update = 3 * np.array([[1.0, 2.0], [10.0, 20.0]])  # rank 1, B A = [[1, 2], [10, 20]]
    mistakes = {
        NOT_IN_PLACE: W,
        "B @ A came transposed": add(W, [1, 3], update.T),
        "the rows were replaced: add to them": [[1, 1], update[0], [1, 1], update[1]],
        "these are the first rows: W[rows]": add(W, [0, 1], update),
        "merged twice: the update counts double": add(W, [1, 3], 2 * update),
        "subtracted: add it": add(W, [1, 3], -update),
        f"not scaled: {SCALE}": add(W, [1, 3], update / 3),
        f"scaled by 2, whatever alpha and rank are: {SCALE}": add(W, [1, 3], 2 / 3 * update),
    }
    found = merge_one(adapter_of(W, A, B, 3))
    expected = [[1, 1], [4, 7], [1, 1], [31, 61]]
    check("weight of ones, rows 1 and 3", found, expected, mistakes)


def test_the_scale():
    W, A, B, _ = first_problem()
    update = B @ A
    mistakes = {
        NOT_IN_PLACE: W,
        f"scaled by alpha alone: {SCALE}": add(W, ROWS, ALPHA * update),
        f"not scaled: {SCALE}": add(W, ROWS, update),
        f"alpha // rank cuts the fraction off: {SCALE}": add(W, ROWS, ALPHA // RANK * update),
        f"scaled by 2, whatever alpha and rank are: {SCALE}": add(W, ROWS, 2 * update),
        "the rank is adapter.rank; 64 is only its default": add(W, ROWS, ALPHA / 64 * update),
        f"scaled by 1 / rank: {SCALE}": add(W, ROWS, update / RANK),
        "merged twice: the update counts double": add(W, ROWS, 2 * ALPHA / RANK * update),
        f"scaled by rank / alpha: {SCALE}": add(W, ROWS, RANK / ALPHA * update),
        "scaled by alpha / len(rows): the rank is the number of A's rows": add(
            W, ROWS, ALPHA / len(B) * update
        ),
        "scaled by alpha / D: the rank is the number of A's rows": add(
            W, ROWS, ALPHA / A.shape[1] * update
        ),
        f"scaled by alpha / sqrt(rank), which is rsLoRA: {SCALE}": add(
            W, ROWS, ALPHA / RANK**0.5 * update
        ),
        "subtracted: add it": add(W, ROWS, -ALPHA / RANK * update),
    }
    found = merge_one(first_adapter())
    check(f"weight [8, 7], alpha {ALPHA}, rank {RANK}", found, expected_weights()[0], mistakes)


def test_rows_are_rows():
    """A square weight, on which rows and columns can be exchanged without an error."""
    W, A, B = numbers_of((8, 8), (2, 8), (4, 2), seed=20)
    update = 3 * B @ A
    mistakes = {
        NOT_IN_PLACE: W,
        "these are columns: W[rows], not W[:, rows]": add(W.T, ROWS, update).T,
        "these are the first rows: W[rows]": add(W, range(4), update),
    }
    found = merge_one(adapter_of(W, A, B, 6, num_heads=2))
    check("weight [8, 8]", found, add(W, ROWS, update), mistakes)


def left_out(name):
    return f"{name} was left out: every adapter, return behind the loop"


def test_every_adapter_is_merged():
    model = model_of_two()
    weights = [model.get_submodule(name).linear.weight for name in ADAPTED]
    before = [weight.clone() for weight in weights]
    merged(model)
    W, A, B, _ = second_problem()
    scaled_as_first = add(W, ROWS_2, ALPHA / RANK * B @ A)
    some_are_merged = any(not torch.equal(*pair) for pair in zip(weights, before))
    for i, (name, weight, expected) in enumerate(zip(ADAPTED, weights, expected_weights())):
        mistakes = {}
        if some_are_merged:
            mistakes[left_out(name)] = before[i]
        if i == 1:
            hint = "scaled as the first adapter: each has an alpha and a rank of its own"
            mistakes[hint] = scaled_as_first
        check(f"the weight of {name}", weight, expected, mistakes, hint="first the tests above")


def test_the_layer_stands_where_its_adapter_stood():
    model = model_of_two()
    linears = {name: model.get_submodule(name).linear for name in ADAPTED}
    names_before = {name for name, _ in model.named_parameters()}
    merged(model)
    left = [name for name in ADAPTED if isinstance(model.get_submodule(name), rosa.RoAE)]
    for name, linear in linears.items():
        found = model.get_submodule(name)
        if name in left:
            hint = "the adapter was left in its place: model.set_submodule(name, adapter.linear)"
            if left != ADAPTED:
                hint = left_out(name)
            fail(f"{name} is an adapter after merging", hint)
        if found is not linear:
            hint = "not the layer itself: model.set_submodule(name, adapter.linear)"
            fail(f"{name} is another {type(found).__name__} than adapter.linear", hint)
    kept = {name.replace(".linear", "") for name in names_before if name.count(".linear")}
    kept |= {name for name in names_before if "o_proj" in name}
    found = {name for name, _ in model.named_parameters()}
    if found != kept:
        names = ", ".join(sorted(found ^ kept))
        fail(f"the model's parameters are others than before attach: {names}", "see 2 in the text")


def test_the_model_comes_back():
    model = model_of_two()
    found = merged(model)
    if found is not model:
        fail(f"expected the model, came {type(found).__name__}", "return model")


def test_a_model_without_adapters_stays():
    model = nn.ModuleDict({"q_proj": first_adapter().linear})
    before = model["q_proj"].weight.clone()
    merged(model)
    if not torch.equal(model["q_proj"].weight, before):
        fail("a model without adapters has changed", "merge what adapters(model) has, no more")


def test_other_rows_and_the_bias_stay_bit_for_bit():
    before, adapter = first_adapter().linear, first_adapter()
    after = adapter.linear
    merge_one(adapter)
    others = [row for row in range(8) if row not in ROWS]
    if not torch.equal(after.weight[others], before.weight[others]):
        fail(
            "rows outside `rows` have changed",
            "other rows changed: write W[rows] alone, and round nothing else",
        )
    if after.bias is None or not torch.equal(after.bias, before.bias):
        fail("the bias has changed", "the update has no bias: leave linear.bias alone")


def test_in_place():
    adapter = first_adapter()
    linear, weight, memory = adapter.linear, adapter.linear.weight, adapter.linear.weight.data_ptr()
    merge_one(adapter)
    if linear.weight is not weight or linear.weight.data_ptr() != memory:
        fail(
            "linear.weight is another tensor now",
            "not in place: W[rows] = ... with W = adapter.linear.weight, under torch.no_grad()",
        )


def test_autograd_does_not_see_it():
    adapter = first_adapter()
    before = adapter.linear.weight
    weight = merge_one(adapter)
    if weight is before and (weight.grad_fn is not None or weight.requires_grad):
        fail("the weight is a result of A and B for autograd now", "merge under torch.no_grad()")


def test_the_same_function():
    adapter = first_adapter()
    x = tensor(random_numbers(5, 7, seed=30))
    expected, linear = adapter(x), adapter.linear
    merge_one(adapter)
    hint = "first the tests above; then compare W[rows] x and B (A x)"
    check("merged(x), as the adapted layer's", linear(x), expected, hint=hint)


def test_bfloat16_is_rounded_once():
    """From 1 on bfloat16 goes in steps of 1/128. 1 + 1/256 + 1/131072 is just above the middle of
    the first step. The update alone rounds to 1/256, and the sum, now in the middle, to the even
    neighbour, 1."""
    A, B = np.ones((1, 1)), np.array([[1 / 256 + 1 / 131072], [1]])
    adapter = adapter_of(np.ones((2, 1)), A, B, 1, ratio=1.0, dtype=torch.bfloat16)
    weight = merge_one(adapter)
    check_dtype("weight", weight, torch.bfloat16, "a merged weight keeps its dtype")
    mistakes = {
        "rounded twice: add in float32, then cast the sum": [1, 2],
        ".float() is a copy where the weight is bfloat16: write the sum into the weight": [1, 1],
    }
    check(
        "1 + a little more than 1/256, and 1 + 1, in bfloat16",
        weight[:, 0],
        [1 + 1 / 128, 2],
        mistakes,
    )
