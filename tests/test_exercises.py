"""Statements about extras/lesson/exercises: the tests of an exercise are red until it is solved,
and green with our own code in the place of the reader's; and the hint for a mistake names the
mistake."""

import ast
import re
import runpy
import shutil
import sys
from types import ModuleType

import pytest
from helpers import ROOT

pytestmark = pytest.mark.numeric
FOLDER = ROOT / "extras" / "lesson" / "exercises"
IMPORTS = """import torch, model, rosa, train
from torch import nn
from types import SimpleNamespace as Object
"""
# exercise -> a solution that calls the project's own code
SOLUTIONS = {
    "ex1_rotation": """
def rope_inverse_frequencies(head_dim, theta=10000.0):
    return model.rope_inverse_frequencies(model.LlamaConfig(head_dim=head_dim, rope_theta=theta))
def rope_table(positions, inv_freq):
    cos, sin = model.rope_table(positions, inv_freq)  # [1, T, d] twice
    return cos[0, :, : len(inv_freq)], sin[0, :, len(inv_freq) :]
def rotate(x, cos, sin):
    return model.rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))""",
    "ex2_rows": "adapted_rows = rosa.adapted_rows",
    "ex3_roae": """
class RoAE(rosa.RoAE):
    def __init__(self, linear, rows, rank, alpha):
        super().__init__(linear.requires_grad_(False), 1, rank, alpha, low_freq_ratio=1.0)
        self.rows, self.B = rows, nn.Parameter(torch.zeros(len(rows), rank))
    def forward(self, x):
        return super().forward(x)""",
    "ex4_merge": """
def merge(linear, rows, A, B, alpha):
    adapter = rosa.RoAE(linear, 1, len(A), alpha, low_freq_ratio=1.0)
    adapter.rows, adapter.A, adapter.B = rows, nn.Parameter(A), nn.Parameter(B)
    rosa.merge(nn.ModuleDict({"q_proj": adapter}))""",
    "ex5_layers": """
def selector_of(norms, k_ratio):
    layers = [nn.Module() for _ in norms]
    for layer, (first, second) in zip(layers, norms):
        layer.input_layernorm = nn.ParameterList([first])
        layer.post_attention_layernorm = nn.ParameterList([second])
    selector = rosa.LayerSelector(Object(model=Object(layers=layers)), k_ratio)
    selector.before_forward(0)
    return selector
def layer_scores(losses, norms):
    selector = selector_of(norms, 1)
    for first, second in norms:
        first.grad = second.grad = None
    for loss in losses:
        loss.backward()
    selector.after_backward()
    return selector.scores
def select_layers(scores, k_ratio):
    norms = [[nn.Parameter(score.reshape(1)) for _ in range(2)] for score in scores]
    selector = selector_of(norms, k_ratio)
    loss = sum((first.square() / 2).sum() + 0 * second.sum() for first, second in norms)
    loss.backward()  # the gradients are the scores
    selector.after_backward()
    return selector.active
def activate(parameters, active):
    rosa.LayerSelector.activate(Object(parameters=parameters), active)""",
    "ex6_micro_batches": """
def collate(examples):
    tokens, labels = train.collate(examples, "cpu")
    return tokens, labels
def accumulate_gradients(network, micro_batches):
    llama, total = Object(hidden_states=network, logits=lambda x: x), 0.0
    response_tokens = sum((labels != -100).sum() for _, labels in micro_batches)
    for tokens, labels in micro_batches:
        loss = model.Llama.loss(llama, tokens, labels) / response_tokens
        loss.backward()
        total += loss.item()
    return total""",
}
# The solutions in which mistakes are made below. Where a mistake is in code that the solution above
# only calls, the solution is written out.
WRITTEN_OUT = SOLUTIONS | {
    "ex2_rows": """
def adapted_rows(out_features, num_heads, low_freq_ratio):
    half = out_features // num_heads // 2
    n = max(1, round(low_freq_ratio * half))
    return torch.arange(out_features).view(num_heads, 2, half)[:, :, -n:].flatten()""",
    "ex4_merge": """
@torch.no_grad()
def merge(linear, rows, A, B, alpha):
    weight, update = linear.weight, alpha / len(A) * B @ A
    weight[rows] += update""",
    "ex5_layers": """
def layer_scores(losses, norms):
    for first, second in norms:
        first.grad = second.grad = None
    for loss in losses:
        loss.backward()
    return torch.stack([torch.cat([weight.grad for weight in pair]).norm() for pair in norms])
def select_layers(scores, k_ratio):
    count = max(1, round(k_ratio * len(scores)))
    return sorted(scores.argsort(descending=True)[:count].tolist())
def activate(parameters, active):
    for i, layer in enumerate(parameters):
        for p in layer:
            p.requires_grad_(i in active)
            p.grad = p.grad if i in active else None""",
}
# Texts that stand in these solutions, or in the mistakes, more than once or at length
RETURN_ROTATED_HALVES = (
    "return model.rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))"
)
RETURN_ROTATED_NEIGHBOURS = (
    "a, b = x[..., ::2], x[..., 1::2]; return torch.stack((a * cos - b * sin, a * sin + "
    "b * cos), -1).flatten(-2)"
)
READ_NEIGHBOURS_RETURN_HALVES = RETURN_ROTATED_NEIGHBOURS.replace("stack", "cat").replace(
    ".flatten(-2)", ""
)
FREQUENCIES = (
    "model.rope_inverse_frequencies(model.LlamaConfig(head_dim=head_dim, rope_theta=theta))"
)
RETURN_END_OF_EACH_HEAD = """d = 2 * half
    return torch.tensor([r for r in range(out_features) if r % d >= d - int(low_freq_ratio * d)])
    """
CLEAR_GRADIENTS_OF_EACH_LOSS = (
    "in losses:\n        for first, second in norms:\n            first.grad = second.grad = None\n"
)
RETURN_LOWEST_SCORES = "return scores.argsort()[:count].tolist()"
MEAN_RESPONSE_TOKENS = "labels != -100).sum() / len(micro_batches"
IGNORE_FIRST_RESPONSE_TOKEN = (
    "for i, (prompt, _) in enumerate(examples):\n        labels[i, len(prompt) - 1] = -100\n  "
    "  return"
)
# (exercise, a text in the written-out solution, the mistake in its place, words of the hint)
MISTAKES = [
    (
        "ex1_rotation",
        RETURN_ROTATED_HALVES,
        RETURN_ROTATED_NEIGHBOURS,
        "these pairs are neighbours",
    ),
    ("ex1_rotation", "(-sin, sin)", "(sin, -sin)", "this turns clockwise"),
    (
        "ex1_rotation",
        RETURN_ROTATED_HALVES,
        RETURN_ROTATED_NEIGHBOURS.replace("sin", "-sin"),
        "neighbours for pairs, and clockwise",
    ),
    (
        "ex1_rotation",
        "model.rope_table(positions",
        "model.rope_table(positions + 1",
        "positions are off by one",
    ),
    ("ex1_rotation", "rope_theta=theta))", "rope_theta=theta)).flip(0)", "in reverse order"),
    (
        "ex1_rotation",
        "rope_theta=theta))",
        "rope_theta=theta)).sqrt()",
        "the exponent is -2i / d, not -i / d",
    ),
    (
        "ex1_rotation",
        RETURN_ROTATED_HALVES,
        READ_NEIGHBOURS_RETURN_HALVES,
        "read as neighbours (0::2, 1::2) and written as halves",
    ),
    (
        "ex1_rotation",
        FREQUENCIES,
        "theta ** (-1.0 * (torch.arange(head_dim // 2) // head_dim))",
        "// cuts",
    ),
    ("ex1_rotation", "rope_theta=theta", "rope_theta=10000.0", "theta is an argument"),
    ("ex2_rows", "-n:]", ":n]", "these are the first pairs"),
    ("ex2_rows", "[:, :, -n:]", "[:, 1:, -n:]", "one half only"),
    ("ex2_rows", "[:, :, -n:]", "[:1, :, -n:]", "these are the rows of head 0 alone"),
    ("ex2_rows", "ratio * half", "ratio * 2 * half", "n counts pairs"),
    (
        "ex2_rows",
        "num_heads, 2, half)[:, :, -n:]",
        "num_heads, half, 2)[:, -n:]",
        "the end of each head in one piece",
    ),
    ("ex2_rows", "round(", "int(", "n was rounded down"),
    (
        "ex2_rows",
        "max(1, round(low_freq_ratio * half))",
        "int(low_freq_ratio * half)",
        "the slice [-n:] is everything",
    ),
    (
        "ex2_rows",
        "return",
        f"{RETURN_END_OF_EACH_HEAD}return",
        "the end of each head in one piece: RoAE adapts pairs",
    ),
    ("ex2_rows", ".flatten()", ".flatten().flip(0).tolist()", "one list in ascending order"),
    ("ex3_roae", "zeros(len(rows)", "zeros(linear.out_features", "B has a row for each of `rows`"),
    ("ex3_roae", "rank, alpha, low", "rank, alpha * rank, low", "scaled by alpha alone"),
    ("ex3_roae", "torch.zeros(", "torch.randn(", "B is zero at the start"),
    ("ex3_roae", "self.rows,", "self.A.data.zero_(); self.rows,", "with A and B both zero"),
    ("ex3_roae", "self.rows,", "self.A.data.normal_(); self.rows,", "kaiming_uniform_"),
    (
        "ex3_roae",
        "self.B = rows,",
        "self.B = torch.arange(len(rows)),",
        "the update went to the first rows",
    ),
    ("ex3_roae", ".requires_grad_(False)", "", "the base is not frozen"),
    ("ex3_roae", "forward(x)", "forward(x) - self.linear.bias", "the bias is lost"),
    ("ex3_roae", "forward(x)", "forward(x).float()", "cast A and B to x.dtype"),
    ("ex4_merge", "/ len(A)", "", "scaled by alpha alone"),
    ("ex4_merge", "+= update", "+= 2 * update", "merged twice"),
    ("ex4_merge", "linear.weight,", "linear.weight.clone(),", "the weight is what it was"),
    ("ex4_merge", "weight[rows] +=", "weight[:, rows] += update.T  #", "these are columns"),
    (
        "ex4_merge",
        "+= update",
        "+= update.T if len(rows) == len(A.T) else update",
        "B @ A came transposed",
    ),
    ("ex4_merge", "weight[rows]", "weight *= 1.001; weight[rows]", "other rows changed"),
    (
        "ex4_merge",
        "+= update",
        "+= update; linear.weight = nn.Parameter(weight.clone(), False)",
        "not in place",
    ),
    ("ex4_merge", "@torch.no_grad()", "", "merge under torch.no_grad()"),
    ("ex4_merge", "+= update", "+= update.to(weight.dtype)", "rounded twice"),
    (
        "ex5_layers",
        "torch.cat([weight.grad for",
        "sum([weight.grad.norm() for",
        "the sum of two norms",
    ),
    ("ex5_layers", "pair]).norm()", "pair]).abs().sum()", "the sum of absolute values"),
    ("ex5_layers", "in losses:", "in losses[:-1] or losses:", "read before the last micro-batch"),
    ("ex5_layers", "in losses:\n", CLEAR_GRADIENTS_OF_EACH_LOSS, "only the last micro-batch"),
    ("ex5_layers", "first.grad = second.grad = None", "pass", "the gradients of the probe before"),
    ("ex5_layers", "descending=True", "descending=False", "these are the lowest scores"),
    (
        "ex5_layers",
        "return sorted(scores",
        f"{RETURN_LOWEST_SCORES}  # (scores",
        "lowest scores, and not in the order",
    ),
    ("ex5_layers", "sorted(", "(", "sort the indices"),
    (
        "ex5_layers",
        "max(1, round(k_ratio * len(scores)))",
        "int(k_ratio * len(scores))",
        "no layer: max(1, ...)",
    ),
    ("ex5_layers", "round(", "int(", "the count was rounded down"),
    ("ex5_layers", "if i in active else None", "", "frozen layers keep their gradient"),
    (
        "ex5_layers",
        "requires_grad_(i in active)",
        "requires_grad_(i in active and p.requires_grad)",
        "stays frozen",
    ),
    ("ex6_micro_batches", "/ response_tokens", f"/ ({MEAN_RESPONSE_TOKENS})", "a mean of means"),
    (
        "ex6_micro_batches",
        "/ response_tokens",
        "/ len(micro_batches)",
        "divided by the number of micro-batches",
    ),
    ("ex6_micro_batches", "/ response_tokens", "", "a sum: divide"),
    (
        "ex6_micro_batches",
        "(labels != -100).sum()",
        "labels.numel()",
        "padding and prompt were counted",
    ),
    (
        "ex6_micro_batches",
        "loss.backward()",
        "network.zero_grad(); loss.backward()",
        "no zero_grad between the passes",
    ),
    (
        "ex6_micro_batches",
        "return tokens",
        f"{IGNORE_FIRST_RESPONSE_TOKEN} tokens",
        "the first response token is lost",
    ),
    ("ex6_micro_batches", "tokens, labels\n", "tokens, labels.clamp(min=0)\n", "its label is -100"),
    (
        "ex6_micro_batches",
        "tokens, labels\n",
        "tokens, labels.roll(1, 1) - 0 * tokens\n",
        "not shifted",
    ),
]


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Modules that a test imports from the exercises, or from a copy of the exercises, are
    forgotten after the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for path in FOLDER.glob("*.py"):
        monkeypatch.setitem(sys.modules, path.stem, None)
        del sys.modules[path.stem]


@pytest.fixture
def failures(monkeypatch, tmp_path):
    """A function that runs the tests of an exercise with this code in the place of the reader's. It
    returns a pair for each test that failed: whether the hint is sure, that is, no guess, and the
    message."""
    monkeypatch.syspath_prepend(FOLDER)

    def call(exercise, code):
        reader, found = ModuleType(exercise), []
        (tmp_path / "reader.py").write_text(IMPORTS + code)
        vars(reader).update(runpy.run_path(tmp_path / "reader.py"))
        monkeypatch.setitem(sys.modules, exercise, reader)
        for name, test in runpy.run_path(FOLDER / f"test_{exercise}.py").items():
            if name.startswith("test_"):
                try:
                    test()
                except (Exception, pytest.fail.Exception) as error:
                    found.append((getattr(error, "sure", False), f"{name}: {error}"))
        return found

    return call


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_our_own_code_solves_it_and_so_does_what_is_broken_below(exercise, failures):
    assert (
        failures(exercise, SOLUTIONS[exercise]) == failures(exercise, WRITTEN_OUT[exercise]) == []
    )


@pytest.mark.parametrize(
    "exercise, right, wrong, hint", MISTAKES, ids=[f"{row[0]}: {row[3]}" for row in MISTAKES]
)
def test_a_mistake_is_called_by_its_name(exercise, right, wrong, hint, failures):
    assert right in WRITTEN_OUT[exercise]
    found = failures(exercise, WRITTEN_OUT[exercise].replace(right, wrong))
    assert any(sure and hint in message.partition("hint: ")[2] for sure, message in found), found


@pytest.fixture
def run_pytest(tmp_path, monkeypatch, capsys):
    """A function that runs `python -m pytest -q` on a copy of the exercises, in which some files
    hold this code. It returns the exit status and the lines that a reader sees in 80 columns."""
    for name, value in {
        "COLUMNS": "80",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(
        FOLDER, tmp_path, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )
    # pytest shall not read the settings of the project
    (tmp_path / "pytest.ini").write_text("[pytest]")

    def run(**files):
        for exercise, code in files.items():
            (tmp_path / f"{exercise}.py").write_text(IMPORTS + code)
        status = pytest.main(
            [str(tmp_path), "-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        )
        return status, capsys.readouterr().out.splitlines()

    return run


def stub_messages(source):
    """The messages of the stubs of an exercise, in the order of the file."""
    raises = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    raises.sort(key=lambda node: node.lineno)
    return [node.exc.args[0].value for node in raises if "NotImplementedError" in ast.unparse(node)]


def test_every_stub_is_red_and_says_what_is_missing(run_pytest):
    missing = []
    for exercise in SOLUTIONS:
        messages = stub_messages((FOLDER / f"{exercise}.py").read_text())
        missing += [f"{exercise}.py: {message}" for message in messages]
    if len(missing) < 12:
        pytest.skip("somebody is at work on the exercises")
    status, lines = run_pytest()
    del missing[5]  # RoAE.forward is not called as long as RoAE.__init__ is missing
    assert status == 1 and lines[2:-1] == missing and all(": exercise " in line for line in missing)
    assert re.fullmatch(r"\d+ to do in .*", lines[-1]) and max(map(len, lines)) <= 80


def test_what_is_wrong_is_said_in_a_few_lines(run_pytest):
    wrong = {
        "ex2_rows": WRITTEN_OUT["ex2_rows"].replace("-n:]", ":n]"),
        "ex4_merge": "def merge(*layer):\n    layer[9]",
    }
    status, lines = run_pytest(ex1_rotation=SOLUTIONS["ex1_rotation"], **wrong)
    assert (
        "ex4_merge.py:5: IndexError: tuple index out of range" in lines
        and "    in: layer[9]" in lines
    )
    assert lines.count("    hint: these are the first pairs, which turn fast: take the last") == 1
    assert "    and 6 more like it" in lines
    assert status == 1 and re.fullmatch(r"\d+ passed, \d+ wrong.*", lines[-1]) and len(lines) < 60


def test_where_a_mistake_is_known_no_guess_is_shown(run_pytest):
    code = WRITTEN_OUT["ex5_layers"].replace(
        "return sorted(scores", f"{RETURN_LOWEST_SCORES}  # (scores"
    )
    _, lines = run_pytest(ex5_layers=code.replace("torch.stack(", "3 * torch.stack("))
    hints = [line.strip() for line in lines if "hint" in line]
    assert hints == ["hint: these are the lowest scores, and not in the order of the layers"]
    assert "ex5_layers.py: 9 more tests fail, perhaps by the same mistake" in lines
