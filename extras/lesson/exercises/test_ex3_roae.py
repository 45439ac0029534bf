"""Exercise 3, from the rows to the forward pass in bfloat16."""

import traceback

import numpy as np
import torch
from checking import SEED, as_array, check, check_dtype, fail, random_numbers, tensor, yours
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest_plugins = ["short_messages"]

ex2_rows = yours("ex2_rows")
ex3_roae = yours("ex3_roae")
RoAE = ex3_roae.RoAE

# All sizes differ, so that a shape says which tensor it is: x is [BATCH, T, D].
BATCH, T, D, OUT, HEADS, RANK, ALPHA = 5, 7, 12, 16, 2, 3, 7
ROWS = [2, 3, 6, 7, 10, 11, 14, 15]
RIGHT_ROWS = {  # (out_features, num_heads, low_freq_ratio) -> rows
    (16, 2, 0.5): ROWS,
    (8, 2, 0.5): [1, 3, 5, 7],
    (4, 1, 1.0): [0, 1, 2, 3],
    (4, 1, 0.5): [1, 3],
}
SCALE = "alpha / rank"
CALL = "adapted_rows(linear.out_features, num_heads, low_freq_ratio)"


def adapter_of(linear, num_heads, rank, alpha, ratio):
    """The reader's RoAE. Where its rows are wrong because those of exercise 2 are, or it fails
    because exercise 2 fails, this is said, and nothing else."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)  # the numbers in a failure are the same in each run
            adapter = RoAE(linear, num_heads, rank, alpha, ratio)
    except Exception as error:
        blame_exercise_2(linear, num_heads, ratio)
        called = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if "adapted_rows" in called or "adapted_rows() " in str(error):
            fail(f"adapted_rows, called by RoAE: {error}", CALL)
        raise
    blame_exercise_2(linear, num_heads, ratio)
    what = f"rows of {linear.out_features} outputs, {num_heads} head(s), low_freq_ratio {ratio}"
    if not hasattr(adapter, "rows"):
        fail("RoAE has no attribute rows", 'self.register_buffer("rows", rows, persistent=False)')
    right = RIGHT_ROWS[linear.out_features, num_heads, ratio]
    check(what, adapter.rows, right, hint=CALL)
    return adapter


def blame_exercise_2(linear, num_heads, ratio):
    """Fail if the rows of exercise 2 are wrong or missing."""
    try:
        found = ex2_rows.adapted_rows(linear.out_features, num_heads, ratio)
        found = as_array("rows", found).tolist()
    except NotImplementedError:
        raise NotImplementedError("exercise 2 first: RoAE asks adapted_rows for its rows") from None
    except BaseException as error:
        found = f"{type(error).__name__}"
    if found != RIGHT_ROWS[linear.out_features, num_heads, ratio]:
        fail(
            f"exercise 2's adapted_rows({linear.out_features}, {num_heads}, {ratio}): came {found}",
            "the rows come from exercise 2: first make its tests green",
        )


def layer(B=None, dtype=torch.float32):
    """The reader's layer around a random linear one, with this B, or the one that it begins with;
    weight and bias."""
    W, bias = random_numbers(OUT, D, seed=1), random_numbers(OUT, seed=2)
    linear = nn.Linear(D, OUT, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(tensor(W)), linear.bias.copy_(tensor(bias))
    adapter = adapter_of(linear, HEADS, RANK, ALPHA, 0.5)
    if B is not None:
        with torch.no_grad():
            adapter.B.copy_(tensor(B))
    return adapter, W, bias


def x_of(dtype=torch.float32, seed=3):
    return tensor(random_numbers(BATCH, T, D, seed=seed), dtype)


def random_B():
    return random_numbers(len(ROWS), RANK, seed=4)


def test_the_rows():
    for out_features, num_heads, ratio in RIGHT_ROWS:
        adapter_of(nn.Linear(3, out_features), num_heads, 2, 4, ratio)


def test_shapes_of_A_and_B():
    adapter, _, _ = layer()
    for name, shape in (("A", [RANK, D]), ("B", [len(ROWS), RANK])):
        parameter = getattr(adapter, name, None)
        if not isinstance(parameter, nn.Parameter):
            fail(f"{name} is a {type(parameter).__name__}", f"self.{name} = nn.Parameter(...)")
        if not parameter.requires_grad:
            fail(
                f"{name} has no requires_grad", f"{name} is what trains: self.{name} = nn.Parameter"
            )
        found = list(parameter.shape)
        if found != shape:
            hint = "A [rank, D], B [len(rows), rank]"
            if found == shape[::-1]:
                hint = f"transposed: {hint}"
            if found == [OUT, RANK]:
                hint = (
                    "B has a row for each of `rows`, not for each output: the other outputs stay "
                    "what they are"
                )
            fail(f"{name}: expected shape {shape}, came {found}", hint)


def test_A_and_B_are_float32_beside_bfloat16():
    adapter, _, _ = layer(dtype=torch.bfloat16)
    for name in ("A", "B"):
        hint = "what trains is float32, whatever the dtype of the weight and of x"
        check_dtype(f"{name} beside a bfloat16 weight", getattr(adapter, name), torch.float32, hint)


def test_B_begins_at_zero():
    B = layer()[0].B
    if B.any():
        largest = B.abs().max().item()
        fail(
            f"B: expected zeros, the largest number is {largest:.4g}",
            "B is zero at the start, so that the update is; A is the random one",
        )


def test_A_begins_uniform():
    adapter = adapter_of(nn.Linear(100, 4), 1, 8, 16, 0.5)
    if adapter.A.shape != (8, 100):
        return  # the shapes have a test of their own
    largest = adapter.A.abs().max().item()  # of 800 numbers between -0.1 and 0.1
    if largest == 0:
        fail(
            "A: expected random numbers, came zeros",
            "with A and B both zero no gradient is ever anything else",
        )
    if not 0.09 < largest <= 0.1001:
        hint = "kaiming_uniform_ with a=math.sqrt(5) gives -1/sqrt(D) to 1/sqrt(D)"
        if 0.9 * 8**-0.5 < largest <= 8**-0.5:  # larger by sqrt(100 / 8) everywhere
            hint = "uniform up to 1/sqrt(rank): fill A as [rank, D]; [D, rank].T has another bound"
        elif 0.22 < largest <= 0.06**0.5:
            hint = "a=math.sqrt(5) is missing: kaiming_uniform_'s own bound is sqrt(6 / D)"
        fail(f"the largest number of A [8, 100]: expected nearly 0.1, came {largest:.4g}", hint)


def test_it_keeps_the_layer_and_holds_what_merging_needs():
    linear = nn.Linear(D, OUT)
    adapter = adapter_of(linear, HEADS, RANK, ALPHA, 0.5)
    if adapter.linear is not linear:
        fail("adapter.linear is not the layer that came", "self.linear = linear, and no copy")
    if not (linear.weight.requires_grad and linear.bias.requires_grad):
        hint = "RoAE freezes nothing: attach does that, for the whole model"
        fail("the linear layer has lost its requires_grad", hint)
    for name, value in (("rank", RANK), ("alpha", ALPHA)):
        found = getattr(adapter, name, None)
        if found != value:
            fail(f"adapter.{name}: expected {value}, came {found}", f"self.{name} = {name}")
    adapter = RoAE(nn.Linear(4, 8), 2)
    if (adapter.rank, adapter.alpha) != (64, 128) or len(adapter.rows) != 4:
        fail("rank, alpha and rows of RoAE(linear, 2) are others", "the defaults are as given")


def test_what_a_file_holds_and_what_moves():
    adapter, _, _ = layer()
    if "rows" in adapter.state_dict():
        fail("rows is in the state_dict", 'register_buffer("rows", rows, persistent=False)')
    found = sorted(adapter.state_dict())
    expected = ["A", "B", "linear.bias", "linear.weight"]
    if found != expected:
        fail(f"state_dict: expected {expected}, came {found}", "two parameters, A and B")
    if not adapter.to("meta").rows.is_meta:
        hint = 'register_buffer("rows", rows, persistent=False): a plain tensor stays on the CPU'
        fail("rows does not move with the model", hint)


def test_it_begins_as_the_base_layer():
    adapter, W, bias = layer()
    x = random_numbers(BATCH, T, D, seed=3)
    mistakes = {"the bias is lost: call self.linear": x @ W.T}
    hint = "an update of zero: is B zero? is y = self.linear(x) before it?"
    check("the layer before training", adapter(tensor(x)), x @ W.T + bias, mistakes, hint)


def test_the_same_x_gives_the_same_y():
    adapter, _, _ = layer(random_B())
    x = x_of()
    before = x.clone()
    first, second = adapter(x), adapter(x)
    if not torch.equal(x, before):
        fail("x has changed after a forward pass", "build the sum elsewhere: x is the caller's")
    if not torch.equal(first, second):
        difference = (first - second).abs().max().item()
        hint = "nothing random in forward (no dropout), and nothing that a call leaves behind"
        fail(f"two calls with the same x: expected the same y, came {difference:.4g} apart", hint)


def test_the_update_goes_into_the_rows():
    """Number by number."""
    B, x = random_B(), random_numbers(BATCH, T, D, seed=5)
    adapter, W, bias = layer(B)
    A = adapter.A.detach().double().numpy()
    base, update = x @ W.T + bias, x @ A.T @ B.T  # [.., OUT], [.., len(ROWS)]

    def add(scale, rows=ROWS):
        y = base.copy()
        for number, row in enumerate(rows):
            y[..., row] += scale * update[..., number]
        return y

    right = add(ALPHA / RANK)
    others = np.array([row for row in range(OUT) if row not in ROWS])
    mistakes = {
        f"scaled by alpha alone: {SCALE}": add(ALPHA),
        f"not scaled: {SCALE}": add(1),
        f"divided by rank alone: {SCALE}": add(1 / RANK),
        f"scaled by rank / alpha: {SCALE}": add(RANK / ALPHA),
        f"scaled by alpha / sqrt(rank), which is rsLoRA: {SCALE}": add(ALPHA / RANK**0.5),
        f"scaled by alpha / len(rows): {SCALE}": add(ALPHA / len(ROWS)),
        f"scaled twice: {SCALE}": add((ALPHA / RANK) ** 2),
        f"alpha // rank cuts the fraction off: {SCALE}": add(ALPHA // RANK),
        "subtracted: add the update": add(-ALPHA / RANK),
        "the update went to the first rows: y[.., rows] += ...": add(
            ALPHA / RANK, range(len(ROWS))
        ),
        "the update went to the other rows: y[.., rows] += ...": add(ALPHA / RANK, others),
        "the update went to all rows: y[.., rows] += ...": base
        + ALPHA / RANK * np.tile(update, OUT // len(ROWS)),
        "the bias is lost: call self.linear": right - bias,
        "the bias was added twice": right + bias,
        index_add_was_lost(B): base,
        "the update took the place of the outputs: add it": right
        - base * np.isin(np.arange(OUT), ROWS),
    }
    check("y for x [5, 7, D]", adapter(tensor(x)), right, mistakes)


def index_add_was_lost(B):
    """The hint where y is linear(x): whether a second tensor of its size was made."""
    tensors, base, y = record(torch.float32)
    if base is not None and y is not None:
        for made in tensors:
            is_wide = made.numel() == BATCH * T * OUT and made.shape[-1] == OUT
            if is_wide and made.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
                return "the update is missing: index_add returns a new tensor: return that one"
    return "this is the base layer alone: the update is missing"


class Recorder(TorchDispatchMode):
    """Keeps every tensor that PyTorch's operations return."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.tensors += [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        return result


def record(dtype):
    """A forward pass: the tensors that were made, the output of the layer itself, and y; or, where
    it fails because dtypes differ, in the place of y the error."""
    adapter, _, _ = layer(random_B(), dtype)
    outputs = []
    adapter.linear.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x, recorder = x_of(dtype), Recorder()
    try:
        with recorder:
            y = adapter(x)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        y = error
    return recorder.tensors, outputs[0] if outputs else None, y


def sizes(tensor):
    """Its shape without the ones and in no order: so it is the same of a transposed matrix."""
    return sorted(size for size in tensor.shape if size != 1)


def test_what_is_large_is_never_made():
    tensors, base, y = record(torch.float32)
    for made in tensors:
        if sizes(made) == sorted([len(ROWS), D]):
            hint = "B @ A was made: A x first, then B of that; two products with x, F.linear twice"
            fail(f"forward makes a tensor {list(made.shape)}, [len(rows), D]", hint)
    for made in tensors:
        if sizes(made) == sorted([OUT, RANK]):
            hint = "B was filled up with zeros for all rows: B has len(rows) rows, index_add adds"
            fail(f"forward makes a tensor {list(made.shape)}, [out, rank]", hint)
    if base is None:
        return  # the layer was not called: the next test says so
    own = {each.untyped_storage().data_ptr() for each in (base, y)}
    for made in tensors:
        is_wide = made.numel() == BATCH * T * OUT and made.shape[-1] == OUT
        if is_wide and made.untyped_storage().data_ptr() not in own:
            hint = (
                "an update for all outputs was made: it is [.., len(rows)], and index_add adds it"
            )
            fail(f"forward makes a tensor {list(made.shape)} beside linear(x) and y", hint)


def test_it_calls_the_layer():
    adapter, _, _ = layer()
    calls = []
    adapter.linear.register_forward_hook(lambda *_: calls.append(1))
    adapter(x_of())
    if len(calls) != 1:
        hint = "y = self.linear(x), once: it may be any layer, with a bias or without"
        fail(f"calls of self.linear in a forward pass: expected 1, came {len(calls)}", hint)


def test_bfloat16_activations_stay_bfloat16():
    tensors, base, y = record(torch.bfloat16)
    hints = {
        D: "x was cast up: cast A and B to x.dtype, and not x",
        OUT: "linear(x) was cast up: cast A and B to x.dtype, and then nothing is float32",
    }
    update = "an update for all outputs was made, and in float32: cast A and B to x.dtype"
    for made in tensors:
        size = made.shape[-1] if made.dim() else 0
        is_activation = made.is_floating_point() and made.numel() == BATCH * T * size
        if is_activation and made.dtype != torch.bfloat16:
            if size == OUT and base is not None and not torch.equal(made, base.to(made.dtype)):
                hints[OUT] = update
            fail(
                f"x in bfloat16: forward makes a tensor {list(made.shape)} in {made.dtype}",
                hints.get(
                    size, "A x or B (A x) was cast up: cast A and B to x.dtype, nothing else"
                ),
            )
    if isinstance(y, RuntimeError):
        hint = "A and B are float32, x is not: self.A.to(x.dtype), self.B.to(x.dtype) in forward"
        fail(f"x in bfloat16: {y}", hint)
    hint = "y has the dtype of x: cast A and B to x.dtype"
    check_dtype("y for x in bfloat16", y, torch.bfloat16, hint)


def test_A_and_B_stay_float32_after_a_forward_pass():
    adapter, _, _ = layer(dtype=torch.bfloat16)
    if adapter.A.dtype != torch.float32:
        return  # it began so, which has a test of its own
    try:
        adapter(x_of(torch.bfloat16))
    except RuntimeError:
        return  # the test above says what is wrong
    hint = "self.A.to(x.dtype) is a copy for this pass; self.A itself stays what it is"
    check_dtype("A after a forward pass in bfloat16", adapter.A, torch.float32, hint)
    check_dtype("B after a forward pass in bfloat16", adapter.B, torch.float32, hint)


def test_gradients_reach_A_and_B_and_x():
    """With y.sum() as the loss every gradient is a sum that can be written down."""
    B, numbers = random_B(), random_numbers(BATCH, T, D, seed=7)
    adapter, W, bias = layer(B)
    x = tensor(numbers).requires_grad_()
    y = adapter(x)
    if not (adapter.A.requires_grad and adapter.B.requires_grad):
        return  # the test of the shapes says so
    if torch.allclose(y, tensor(numbers @ W.T + bias), atol=1e-4):
        return  # there is no update, which the test above says
    if not y.requires_grad:
        fail("no gradient goes through forward", "no torch.no_grad() and no detach in forward")
    y.sum().backward()
    A, scale = adapter.A.detach().double().numpy(), ALPHA / RANK
    x_sum = numbers.sum((0, 1))
    for name, expected in (
        ("A", scale * np.outer(B.sum(0), x_sum)),
        ("B", scale * np.tile(A @ x_sum, (len(ROWS), 1))),
    ):
        gradient = getattr(adapter, name).grad
        if gradient is None:
            fail(f"{name} got no gradient", "no detach, no .data, no torch.no_grad() in forward")
        check(f"the gradient of {name}", gradient, expected, hint="first the tests above")
    base_only = np.broadcast_to(W.sum(0), x.shape)
    expected = base_only + scale * B.sum(0) @ A
    if x.grad is None:
        fail("x got no gradient", "no detach, no .data, no torch.no_grad() in forward")
    mistakes = {
        "the update passes no gradient on to x: no x.detach()": base_only,
        "the base passes its gradient on: no torch.no_grad() around linear": expected - base_only,
    }
    check("the gradient of x", x.grad, expected, mistakes, hint="first the tests above")


def test_x_may_have_any_number_of_dimensions():
    adapter, _, _ = layer(random_B())
    x = x_of()
    y = adapter(x)
    for what, part, expected in (("[T, D]", x[0], y[0]), ("[D]", x[0, 0], y[0, 0])):
        hint = "F.linear(x, M), and index_add with the dimension -1, take any x [.., D]"
        try:
            found = adapter(part)
        except (IndexError, RuntimeError) as error:
            fail(f"y for x {what}: {error}", hint)
        check(f"y for x {what}", found, expected, hint=hint)
