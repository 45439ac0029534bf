"""Statements about exercises 7 and 8 of extras/lesson/exercises, in which all files of a student
run together: right files pass, and a mistake that no earlier exercise can see is called by its
name."""

import re
import runpy
import shutil
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.numeric
FOLDER = ROOT / "extras" / "lesson" / "exercises"
# Exercises 1 to 6 have tests of their own: where the project's own code does what one asks for, it
# stands here.
SOLUTIONS = {
    "ex1_rotation": """
from model import rope_inverse_frequencies, rope_table, rotate
""",
    "ex2_rows": """
from rosa import adapted_rows
""",
    "ex3_roae": """
import math, torch
from ex2_rows import adapted_rows
from torch import nn
class RoAE(nn.Module):
    def __init__(self, linear, num_heads, rank=64, alpha=128, low_freq_ratio=0.5):
        super().__init__()
        self.linear, self.rank, self.alpha = linear, rank, alpha
        rows = adapted_rows(linear.out_features, num_heads, low_freq_ratio)
        self.register_buffer("rows", rows, persistent=False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(len(rows), rank))
    def forward(self, x):
        update = x @ self.A.to(x.dtype).T @ self.B.to(x.dtype).T
        return self.linear(x).index_add(-1, self.rows, self.alpha / self.rank * update)
""",
    "ex4_merge": """
import torch
def adapters(model):
    parts = ("A", "B", "rows", "linear")
    return {n: m for n, m in model.named_modules() if all(hasattr(m, part) for part in parts)}
@torch.no_grad()
def merge(model):
    for name, adapter in adapters(model).items():
        update = adapter.alpha / adapter.rank * adapter.B @ adapter.A
        adapter.linear.weight[adapter.rows] += update
        model.set_submodule(name, adapter.linear)
    return model
""",
    "ex5_layers": """
from rosa import LayerSelector, gradient_norm
""",
    "ex6_micro_batches": """
import torch
import torch.nn.functional as F
from train import collate as train_collate
def collate(examples, device="cpu"):
    return train_collate(examples, device)
def accumulate_gradients(model, micro_batches):
    N, total = sum((labels != -100).sum() for _, labels in micro_batches), 0.0
    for tokens, labels in micro_batches:
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / N
        loss.backward()
        total += loss.item()
    return total
""",
}
# Exercise 7 in the pieces that mistakes move
ATTACH = """
import copy, torch
from ex3_roae import RoAE
from ex5_layers import LayerSelector
from ex6_micro_batches import accumulate_gradients, collate
def attach(model, rank, alpha, low_freq_ratio):
    model.requires_grad_(False)
    head_dim = model.config.head_dim
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            linear = getattr(layer.self_attn, name)
            num_heads = linear.out_features // head_dim
            adapter = RoAE(linear, num_heads, rank, alpha, low_freq_ratio)
            setattr(layer.self_attn, name, adapter)
    return model
"""
TRAIN = """
def train(model, batches, learning_rate, k_ratio=0.5, select_every=10, micro_batch_size=2):
    losses, n = [], micro_batch_size
"""
SELECTOR = "    selector = LayerSelector(model, k_ratio, select_every)\n"
TRAINABLE = "    trainable = [p for p in model.parameters() if p.requires_grad]\n"
ADAMW = "    optimizer = torch.optim.AdamW(trainable, weight_decay=0)\n"
LOOP = "    for step, batch in enumerate(batches):\n"
RATE = """        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
"""
BEFORE = "        selector.before_forward(step)\n"
PARTS = "        parts = [collate(batch[i : i + n]) for i in range(0, len(batch), n)]\n"
ACCUMULATE = "        loss = accumulate_gradients(model, parts)\n"
AFTER = "        selector.after_backward()\n"
STEP = "        optimizer.step()\n"
ZERO = "        optimizer.zero_grad()\n"
RETURN = """        losses.append(loss)
    return losses
"""
MADE = TRAINABLE + ADAMW
TO_BACKWARD = BEFORE + PARTS + ACCUMULATE
TO_STEP = RATE + TO_BACKWARD + AFTER + STEP
SOLUTIONS["ex7_training"] = ATTACH + TRAIN + SELECTOR + MADE + LOOP + TO_STEP + ZERO + RETURN


def inside(lines, condition=""):
    """These lines in the body of a loop, or of a condition in it."""
    indented = re.sub("^(?=.)", "    ", lines, flags=re.MULTILINE)
    return f"        {condition}\n{inside(indented)}" if condition else indented


WRONG_ROTATION = """rotate as turn
def rotate(x, cos, sin):
    return turn(x, cos, -sin)
"""
FAST_ROWS = """adapted_rows as rows
def adapted_rows(*arguments):
    return rows(*arguments, "high")
"""
FIRST_LAYERS = """gradient_norm
class LayerSelector(LayerSelector):
    def after_backward(self):
        self.activate([0, 1])
"""
# exercise -> (a function that is a stub in one test; a text, and in another test what stands there)
EARLIER = {
    "ex1_rotation": ("rotate", "rotate\n", WRONG_ROTATION),
    "ex2_rows": ("adapted_rows", "adapted_rows\n", FAST_ROWS),
    "ex3_roae": ("RoAE", "self.alpha / self.rank", "self.alpha"),
    "ex4_merge": ("merge", "adapter.alpha / adapter.rank", "adapter.alpha"),
    "ex5_layers": ("LayerSelector", "gradient_norm\n", FIRST_LAYERS),
    "ex6_micro_batches": ("collate", "total += loss.item()", "total += loss.item() / 2"),
}
# (a text in the solution of exercise 7, the mistake in its place, words of the hint)
ATTACHING = [
    ("linear.out_features // head_dim", "model.config.num_attention_heads", "K has fewer heads"),
    ("    model.requires_grad_(False)\n", "", "the base is not frozen"),
    ("    return model\n", "    return model.requires_grad_(False)\n", "frozen with the rest"),
    ('("q_proj", "k_proj")', '("q_proj",)', "k_proj too"),
    ('("q_proj", "k_proj")', '("q_proj", "k_proj", "v_proj")', "q_proj and k_proj alone"),
    ("model.model.layers:", "model.model.layers[1:]:", "missing: [0]"),
    ("rank, alpha, low_freq_ratio)\n    ", "alpha, rank, low_freq_ratio)\n    ", "are swapped"),
    ("rank, alpha, low_freq_ratio)\n    ", "rank, alpha)\n    ", "in this order"),
    ("RoAE(linear,", "RoAE(copy.deepcopy(linear),", "the model's own linear layer"),
    ("    return model\n", "    return copy.deepcopy(model)\n", "change the model in place"),
    ("    return model\n", "", "change the model in place"),
    ("setattr(layer.self_attn, name,", "setattr(layer, name,", "set each RoAE in the place"),
    (
        "setattr(layer.self_attn, name, adapter)",
        "setattr(layer.self_attn, name, adapter); setattr(layer, name, adapter)",
        "stands in one place",
    ),
]
FIVE_STEPS = [
    (SELECTOR + MADE + LOOP, MADE + LOOP + inside(SELECTOR), "a new one forgets which layers"),
    (BEFORE, inside(BEFORE, "if step == 0:"), "in every step, not only in the first"),
    ("before_forward(step)", "before_forward(0)", "every step is a probe"),
    (
        MADE + LOOP + TO_STEP,
        LOOP + TO_BACKWARD + AFTER + inside(MADE, "if step == 0:") + RATE + STEP,
        "it holds the selected layers alone",
    ),
    (
        MADE + LOOP + TO_STEP,
        LOOP + BEFORE + inside(MADE, "if step == 0:") + RATE + PARTS + ACCUMULATE + AFTER + STEP,
        "it must not hold the norms",
    ),
    (ADAMW + LOOP, LOOP + inside(ADAMW), "forgotten AdamW's moments"),
    ("learning_rate(step)", "learning_rate(0)", "read once"),
    ('group["lr"] =', "lr =", "not set in the optimizer"),
]
MORE_IN_FIVE_STEPS = [
    (AFTER + STEP, STEP + AFTER, "after_backward before optimizer.step"),
    (ZERO, "", "no zero_grad"),
    ("enumerate(batches)", "enumerate([batches[0]] * len(batches))", "the first batch again"),
    (
        "accumulate_gradients(model, parts)",
        "sum(accumulate_gradients(model, [p]) for p in parts)",
        "each call divides by its own tokens",
    ),
    (
        "batch[i : i + n]",
        "[(p[:1], p[1:] + r) for p, r in batch[i : i + n]]",
        "the prompt was learnt",
    ),
    (SELECTOR, "    model.requires_grad_(False)\n" + SELECTOR, "make it when all of A and B do"),
    ("(model, k_ratio, select_every)", "(model)", "hand k_ratio and select_every on"),
    ("before_forward(step)", "before_forward(step + 1)", "counted from 0, and step 0"),
    ("[p for p in", '[p for n, p in model.named_parameters() if n[-1] == "B"]  #', "A and B both"),
    ("in model.p", "in model.model.layers[:2].p", "all A and B of the model"),
    ("AdamW(trainable, weight_decay=0)", "SGD(trainable, lr=0.01)", "AdamW: its steps have"),
    ("weight_decay=0", "lr=1e-3", "weight_decay=0"),
    (RATE + TO_BACKWARD + AFTER + STEP, TO_BACKWARD + AFTER + STEP + RATE, "one step late"),
    (AFTER, "", "after_backward() in every step"),
    (AFTER + STEP + ZERO, AFTER + ZERO + STEP, "zero_grad comes after optimizer.step"),
    (
        ACCUMULATE,
        "        for part in parts:\n" + inside(ZERO + ACCUMULATE.replace("parts", "[part]")),
        "only the last part",
    ),
    (
        ACCUMULATE + AFTER + STEP,
        "        for part in parts:\n"
        + inside(ACCUMULATE.replace("parts", "[part]") + AFTER + STEP),
        "one optimizer.step for each batch",
    ),
    ("range(0, len(batch), n)", "range(0, len(batch) - 1, n)", "cut the batch to its end"),
    ("[], micro_batch_size", "[], len(batches[0])", "the whole batch went through at once"),
    ("    return losses\n", "", "a function gives back"),
    ("    return losses\n", "    return losses[-1]\n", "return the list of losses"),
    ("[], micro_batch_size", "[], 2", "their size is the argument micro_batch_size"),
    ("[], micro_batch_size", "[], len(batches[0]) // 2", "parts of 2"),
    (
        "micro_batch_size\n",
        "micro_batch_size\n    batches = [2 * b for b in batches]\n",
        "goes through once",
    ),
    (TO_BACKWARD, PARTS + ACCUMULATE + BEFORE, "before_forward comes before the forward pass"),
    (
        "[p for p in model.parameters() if p.requires_grad]",
        '[p for n, p in model.named_parameters() if "norm" not in n]',
        "all A and B of the model, and nothing else",
    ),
]
SIXTY_STEPS = [
    ("weight_decay=0", "weight_decay=0, maximize=True", "it grows: a sign"),
    ("weight_decay=0", "weight_decay=0, eps=1.0", "nearly nothing was learnt"),
    (STEP, inside(STEP, "if step < 5:"), "one optimizer.step for each batch"),
    ("enumerate(batches)", "enumerate(batches[:5])", "in every step"),
    ("learning_rate(step)", "learning_rate(min(step, 4))", 'group["lr"] = learning_rate(step)'),
]

SOLUTIONS["ex8_memory"] = """
def base_parameters(c):
    D, d = c.hidden_size, c.head_dim
    H, K = c.num_attention_heads, c.num_key_value_heads
    attention = 2 * H * d * D + 2 * K * d * D
    mlp = 3 * D * c.intermediate_size
    embeddings = c.vocab_size * D * (1 if c.tie_word_embeddings else 2)
    return c.num_hidden_layers * (attention + mlp + 2 * D) + embeddings + D
def adapter_parameters(c, rank, low_freq_ratio):
    D, L, d = c.hidden_size, c.num_hidden_layers, c.head_dim
    H, K = c.num_attention_heads, c.num_key_value_heads
    n = max(1, round(low_freq_ratio * d / 2))
    return L * (rank * D + H * 2 * n * rank + rank * D + K * 2 * n * rank)
def rosa_bytes(c, rank, low_freq_ratio, k_ratio):
    P, L = adapter_parameters(c, rank, low_freq_ratio), c.num_hidden_layers
    train = P * max(1, round(k_ratio * L)) // L
    base = 2 * base_parameters(c)
    return {"base": base, "adapters": 4 * P, "gradients": 4 * train, "moments": 8 * P}
def full_bytes(c):
    N = base_parameters(c)
    return {"weights": 4 * N, "gradients": 4 * N, "moments": 8 * N}
"""
# (a text in the solution of exercise 8, the mistake in its place, words of the hint)
MEMORY = [
    ("2 * K * d * D", "2 * H * d * D", "k_proj and v_proj have K heads"),
    ("2 * H * d * D + 2 * K * d * D", "3 * H * d * D + K * d * D", "v_proj has K heads too"),
    ("3 * D * c.int", "2 * D * c.int", "gate, up and down"),
    ("(1 if c.tie_word_embeddings else 2)", "2", "tied: lm_head is the embedding"),
    ("(1 if c.tie_word_embeddings else 2)", "1", "embedding and lm_head both"),
    ("embeddings + D", "embeddings", "the last norm is missing"),
    ("(attention + mlp + 2 * D)", "(attention + mlp)", "two norms, and none"),
    ("K * 2 * n * rank", "H * 2 * n * rank", "K has fewer heads than Q"),
    (
        "H * 2 * n * rank + rank * D + K * 2 * n",
        "H * n * rank + rank * D + K * n",
        "both rows of a",
    ),
    ("H * 2 * n * rank + rank * D + K", "H * 2 * n * rank + K", "Q and K each have an A"),
    ("+ rank * D + K * 2 * n * rank", "", "k has an adapter too"),
    ("H * 2 * n * rank + rank * D + K * 2 * n", "2 * n * rank + rank * D + 2 * n", "in every head"),
    ("return L * (rank", "return (rank", "one layer: there are"),
    ("low_freq_ratio * d / 2", "low_freq_ratio * d", "n counts pairs"),
    ("round(low", "int(low", "n was rounded down"),
    ("max(1, round(low_freq_ratio * d / 2))", "round(low_freq_ratio * d / 2)", "no pair is left"),
    ("2 * H * d * D +", "2 * D * D +", "H*d need not be D"),
    ("rank + rank * D + K * 2", "rank + rank * K * d + K * 2", "the A of k has D columns"),
    ("base = 2 * base_parameters(c)", "base = 2 * base_parameters(c) + 4 * P", "the base alone"),
    ("train = P * max(1, round(k_ratio * L)) // L", "train = k_ratio * P", "whole layers train"),
    ("max(1, round(k_ratio * L))", "round(k_ratio * L)", "one layer trains at least"),
    ("base = 2 *", "base = 4 *", "the base is frozen and stays in bfloat16"),
    ("base = 2 *", "base =", "not bytes"),
    ('"adapters": 4 * P', '"adapters": 2 * P', "A and B are masters in float32"),
    ('"adapters": 4 * P', '"adapters": 4 * train', "the layers that rest have their adapters"),
    ("4 * train", "4 * P", "the layers that rest have no gradients"),
    ("4 * train", "2 * train", "gradients are float32"),
    ("round(k_ratio", "int(k_ratio", "the count was rounded down"),
    ('"moments": 8 * P', '"moments": 4 * P', "AdamW keeps two moments"),
    ('"moments": 8 * P', '"moments": 8 * train', "a layer that rests keeps its moments"),
    ('"moments": 8 * P', '"moments": 8 * (P + base // 2)', "the base is frozen: AdamW"),
    ('"weights": 4', '"weights": 2', "what trains is float32"),
    ('"moments": 8 * N', '"moments": 4 * N', "AdamW keeps two moments"),
]


def forget():
    """The modules that a test has imported from the exercises, or from a student's files."""
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    forget()
    yield
    forget()


@pytest.fixture
def first_failure(monkeypatch, tmp_path):
    """A function that runs the tests of an exercise on these files of a student, the others being
    right. It returns the first failure, or None. Those of exercise 7 begin with the tests of
    exercises 1 to 6: here only where a file of these is given, or none at all."""

    def call(exercise, **files):
        for name, code in (SOLUTIONS | files).items():
            (tmp_path / f"{name}.py").write_text(code)
        forget()
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.syspath_prepend(tmp_path)
        for name, test in runpy.run_path(FOLDER / f"test_{exercise}.py").items():
            if name.startswith("test_"):
                if list(files) == ["ex7_training"]:
                    test.__globals__["earlier_exercises"] = lambda: None
                try:
                    test()
                except (Exception, pytest.fail.Exception) as error:
                    return error
        return None

    return call


def check_hint(error, hint):
    """The failure is no guess, or a guess where nothing better can be known, and has this hint."""
    assert isinstance(error, pytest.fail.Exception), repr(error)
    assert hint in str(error).partition("\nhint: ")[2], str(error)


def mutated(exercise, right, wrong):
    assert SOLUTIONS[exercise].count(right) == 1, right
    return SOLUTIONS[exercise].replace(right, wrong)


@pytest.mark.slow
def test_right_files_train_tiny(first_failure):
    error = first_failure("ex7_training")
    assert error is None, str(error)
    told = "\n".join(sys.modules["checking"].STORY)
    assert re.fullmatch(
        r"""loss      [\d.]+ before, 0\.[01]\d+ after 60 steps, on questions held out
trained   24,576 numbers, which are 1.0% of the model
selected  step (\d0? [#.]{6}(, )?){6}
question  .*\?
expected  (.*)
before    .*
after     (.*)
merged    \4 \(no adapter is left\)""",
        told,
    ), told


def name(row):
    return row[2]  # words of the hint


SLOW = [pytest.param(row, marks=pytest.mark.slow) for row in MORE_IN_FIVE_STEPS]


@pytest.mark.parametrize("row", ATTACHING + FIVE_STEPS + SLOW, ids=name)
def test_a_mistake_in_the_loop_is_called_by_its_name(row, first_failure):
    right, wrong, hint = row
    error = first_failure("ex7_training", ex7_training=mutated("ex7_training", right, wrong))
    check_hint(error, hint)
    assert error.sure


@pytest.mark.parametrize("exercise", EARLIER)
def test_a_stub_of_an_earlier_exercise_is_to_do_first(exercise, first_failure):
    number, (function, _, _) = exercise[2], EARLIER[exercise]
    stub = f"""
def {function}(*arguments, **options):
    raise NotImplementedError("exercise {number}: to do")
"""
    error = first_failure("ex7_training", **{exercise: SOLUTIONS[exercise] + stub})
    assert isinstance(error, NotImplementedError)
    assert str(error).startswith(f"exercise {number} first") and "\n" not in str(error)


@pytest.mark.parametrize("exercise", EARLIER)
def test_a_mistake_in_an_earlier_exercise_is_to_be_mended_first(exercise, first_failure):
    _, right, wrong = EARLIER[exercise]
    code = mutated(exercise, right, wrong)
    error = first_failure("ex7_training", **{exercise: code})
    assert str(error).startswith(f"exercise {exercise[2]} first") and "\n" not in str(error)


# (exercise, a text in its solution, the mistake in its place): exercise 7 itself sees none of them
UNSEEN = [
    ("ex1_rotation", "rotate\n", "rotate as turn\ndef rotate(x, *tables):\n    return turn(x, *"
     "(table.to(x.dtype) for table in tables))\n"),
    ("ex2_rows", "adapted_rows\n", "adapted_rows as rows\ndef adapted_rows(out, heads, ratio):\n"
     "    half = out // heads // 2\n"
     "    return rows(out, heads, max(1, int(ratio * half)) / half)\n"),
    ("ex2_rows", "adapted_rows\n", "adapted_rows as rows\ndef adapted_rows(out, heads, ratio):\n"
     "    half = out // heads // 2\n"
     "    return rows(out, heads, max(1, int(ratio * half + 0.5)) / half)\n"),
    ("ex3_roae", "rows = adapted", "linear.requires_grad_(False); rows = adapted"),
    ("ex3_roae", "x @ self.A", "x.detach() @ self.A"),
    ("ex3_roae", "        return self.linear(x).index_add(",
     "        y = self.linear(x)\n        return y + torch.zeros_like(y).index_add("),
    ("ex3_roae", 'self.register_buffer("rows", rows, persistent=False)', "self.rows = rows"),
    ("ex3_roae", ", a=math.sqrt(5)", ""),
    ("ex4_merge", "+= update", "+= update; adapter.linear.weight = torch.nn.Parameter("
     "adapter.linear.weight.clone(), False)"),
    ("ex4_merge", "@torch.no_grad()\n", ""),
    ("ex5_layers", "gradient_norm\n", "gradient_norm as norm\ndef gradient_norm(weights):\n"
     "    return sum(norm([weight]) for weight in weights)\n"),
    ("ex5_layers", "gradient_norm\n", "gradient_norm\nclass LayerSelector(LayerSelector):\n"
     "    def __init__(self, model, k_ratio=0.5, select_every=25):\n"
     "        super().__init__(model, k_ratio, select_every)\n"
     "        self.count = max(1, int(k_ratio * len(model.model.layers)))\n"),
    ("ex5_layers", "gradient_norm\n", "gradient_norm\nclass LayerSelector(LayerSelector):\n"
     "    def after_backward(self):\n        super().after_backward()\n"
     "        [w.requires_grad_() for pair in self.norms for w in pair if self.probing]\n"),
    ("ex6_micro_batches", "    return total\n", "    return torch.tensor(total)\n"),
    ("ex6_micro_batches", "        loss.backward()\n        total += loss.item()\n    return total",
     "        total = total + loss\n    total.backward()\n    return total.item()"),
]  # fmt: skip


UNSEEN_ROWS = [
    pytest.param(row, marks=[pytest.mark.slow] * (i > 2)) for i, row in enumerate(UNSEEN)
]


@pytest.mark.parametrize("row", UNSEEN_ROWS, ids=[f"{row[0]}: {row[2][:40]}" for row in UNSEEN])
def test_a_mistake_that_exercise_7_cannot_see_is_to_be_mended_first(row, first_failure):
    exercise, right, wrong = row
    error = first_failure("ex7_training", **{exercise: mutated(exercise, right, wrong)})
    assert str(error).startswith(f"exercise {exercise[2]} first"), str(error)


def test_a_stub_of_this_exercise_says_what_is_missing(first_failure):
    stub = (FOLDER / "ex7_training.py").read_text()
    assert str(first_failure("ex7_training", ex7_training=stub)).startswith("exercise 7: freeze")
    stub_of_train = stub.partition("def train(")[2]
    code = f"{ATTACH}\ndef train({stub_of_train}"
    assert str(first_failure("ex7_training", ex7_training=code)).startswith("exercise 7: a step")


def test_what_a_student_reads(tmp_path, monkeypatch, capsys):
    """One mistake, told once, though three tests need what it breaks."""
    for key, value in {
        "COLUMNS": "80",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }.items():
        monkeypatch.setenv(key, value)
    for path in FOLDER.glob("*.py"):
        if path.stem != "test_ex8_memory":
            shutil.copy(path, tmp_path)
    for key, code in SOLUTIONS.items():
        (tmp_path / f"{key}.py").write_text(code)
    (tmp_path / "ex7_training.py").write_text(mutated("ex7_training", *ATTACHING[0][:2]))
    (tmp_path / "pytest.ini").write_text("[pytest]")
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    assert pytest.main([str(tmp_path / "test_ex7_training.py"), *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:-1] == [
        "ex7_training.py: model.layers.0.self_attn.k_proj: expected num_heads 2, came 6",
        "    hint: K has fewer heads than Q: num_heads is out_features // head_dim",
        "    and 2 more like it",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("row", SIXTY_STEPS, ids=name)
def test_a_mistake_that_shows_in_sixty_steps_is_found(row, first_failure):
    right, wrong, hint = row
    error = first_failure("ex7_training", ex7_training=mutated("ex7_training", right, wrong))
    check_hint(error, hint)


@pytest.fixture(scope="module")
def memory_tests(tmp_path_factory):
    """The tests of exercise 8. What they have counted and measured they keep for all tests here."""
    file = tmp_path_factory.mktemp("ex8") / "ex8_memory.py"
    file.write_text(SOLUTIONS["ex8_memory"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(file.parent), str(FOLDER), *sys.path])
        names = runpy.run_path(FOLDER / "test_ex8_memory.py")
    forget()
    return names


def test_right_numbers_are_what_is_measured(memory_tests):
    for key, test in memory_tests.items():
        if key.startswith("test_"):
            test()


@pytest.mark.parametrize("row", MEMORY, ids=name)
def test_a_mistake_on_paper_is_called_by_its_name(row, memory_tests, monkeypatch, tmp_path):
    right, wrong, hint = row
    (tmp_path / "student.py").write_text(mutated("ex8_memory", right, wrong))
    for key, function in runpy.run_path(tmp_path / "student.py").items():
        if callable(function):
            monkeypatch.setattr(memory_tests["ex8_memory"], key, function)
    with pytest.raises(pytest.fail.Exception) as raised:
        for key, test in memory_tests.items():
            if key.startswith("test_"):
                test()
    check_hint(raised.value, hint)
    assert raised.value.sure
