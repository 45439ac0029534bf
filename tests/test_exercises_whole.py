"""Statements about exercises 7 and 8 of extras/lesson/exercises, in which all files of a student
run together: right files pass, and a mistake that no earlier exercise can see is called by its
name."""

import re
import runpy
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
    (SELECTOR, "    model.requires_grad_(False)\n" + SELECTOR, "make it when all of A and B do"),
    (SELECTOR + MADE + LOOP, MADE + LOOP + inside(SELECTOR), "a new one forgets which layers"),
    ("(model, k_ratio, select_every)", "(model)", "hand k_ratio and select_every on"),
    (BEFORE, inside(BEFORE, "if step == 0:"), "in every step, not only in the first"),
    ("before_forward(step)", "before_forward(0)", "every step is a probe"),
    ("before_forward(step)", "before_forward(step + 1)", "counted from 0, and step 0"),
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
    ("[p for p in", '[p for n, p in model.named_parameters() if n[-1] == "B"]  #', "A and B both"),
    ("in model.p", "in model.model.layers[2].p", "all A and B of the model"),
    ("AdamW(trainable, weight_decay=0)", "SGD(trainable, lr=0.01)", "AdamW: its steps have"),
    ("weight_decay=0", "lr=1e-3", "weight_decay=0"),
    ("learning_rate(step)", "learning_rate(0)", "read once"),
    ('group["lr"] =', "lr =", "not set in the optimizer"),
    (RATE + TO_BACKWARD + AFTER + STEP, TO_BACKWARD + AFTER + STEP + RATE, "one step late"),
    (AFTER + STEP, STEP + AFTER, "after_backward before optimizer.step"),
    (AFTER, "", "after_backward() in every step"),
    (ZERO, "", "no zero_grad"),
    (AFTER + STEP + ZERO, AFTER + ZERO + STEP, "zero_grad comes after optimizer.step"),
    ("enumerate(batches)", "enumerate([batches[0]] * len(batches))", "the first batch again"),
    (
        "accumulate_gradients(model, parts)",
        "sum(accumulate_gradients(model, [p]) for p in parts)",
        "each call divides by its own tokens",
    ),
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
    (
        "batch[i : i + n]",
        "[(p[:1], p[1:] + r) for p, r in batch[i : i + n]]",
        "the prompt was learnt",
    ),
    ("    return losses\n", "", "a function gives back"),
]
SIXTY_STEPS = [
    ("weight_decay=0", "weight_decay=0, maximize=True", "it grows: a sign"),
    ("weight_decay=0", "weight_decay=0, eps=1.0", "nearly nothing was learnt"),
    (STEP, inside(STEP, "if step < 5:"), "one optimizer.step for each batch"),
    ("enumerate(batches)", "enumerate(batches[:5])", "in every step"),
    ("learning_rate(step)", "learning_rate(min(step, 4))", 'group["lr"] = learning_rate(step)'),
]


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Modules that a test imports from the exercises, or from a student's files, are forgotten
    after the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for path in FOLDER.glob("*.py"):
        monkeypatch.setitem(sys.modules, path.stem, None)
        del sys.modules[path.stem]


@pytest.fixture
def first_failure(monkeypatch, tmp_path):
    """A function that runs the tests of an exercise on these files of a student, the others being
    right. It returns the first failure, or None."""

    def call(exercise, **files):
        for name, code in (SOLUTIONS | files).items():
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.syspath_prepend(tmp_path)
        for name, test in runpy.run_path(FOLDER / f"test_{exercise}.py").items():
            if name.startswith("test_"):
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


def test_right_files_train_tiny(first_failure):
    error = first_failure("ex7_training")
    assert error is None, str(error)


def name(row):
    return row[2]


@pytest.mark.parametrize("row", ATTACHING + FIVE_STEPS, ids=name)
def test_a_mistake_in_the_loop_is_called_by_its_name(row, first_failure):
    right, wrong, hint = row
    error = first_failure("ex7_training", ex7_training=mutated("ex7_training", right, wrong))
    check_hint(error, hint)
    assert error.sure


@pytest.mark.slow
@pytest.mark.parametrize("row", SIXTY_STEPS, ids=name)
def test_a_mistake_that_shows_in_sixty_steps_is_found(row, first_failure):
    right, wrong, hint = row
    error = first_failure("ex7_training", ex7_training=mutated("ex7_training", right, wrong))
    check_hint(error, hint)
