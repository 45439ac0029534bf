"""Statements about `extras/source.py`: what counts in the fingerprint of a function, and which code
a call can reach."""

import functools
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

import model
import rosa
from data import tasks
from extras import source
from extras.records import result_code
from extras.source import fingerprint, reached_code, words
from model import MLP, Llama

METHOD = '''
def method(self, x):
    """What it says."""
    y = self.scale * x  # why
    if x.ndim > 2:
        raise ValueError(f"{x.ndim} dimensions: too many") from None
    return F.silu(y)
'''
SAME = [  # (old, new): edits of METHOD that leave its fingerprint as it is
    ("  # why", ""),
    ("    if", "\n    # because\n\n    if"),
    ("silu(y)", "silu(\n        y\n    )"),
    (" > ", ">"),
    ('    """What it says."""\n', ""),
    ("What it says.", "Other words.\n\n    And more."),
    (": too many", ""),
    ('f"{x.ndim} dimensions', 'f"{x.shape}'),
]
OTHER = [  # edits that change the fingerprint
    ("*", "+"),
    ("2", "2.0"),
    (">", ">="),
    ("silu", "gelu"),
    ("self.scale", "self.shift"),
    ("F.", ""),
    ("    return", "        return"),
    ("(self, x)", "(self, x, z=None)"),
    ("ValueError", "KeyError"),
    ("raise ValueError(", "y = ("),
]


def load_method(directory, text):
    """The function `method` in a file with this text."""
    (directory / "file.py").write_text(text)
    return runpy.run_path(str(directory / "file.py"))["method"]


@pytest.mark.parametrize("old, new", SAME + OTHER)
def test_a_fingerprint_is_of_what_a_function_says(tmp_path, old, new):
    before = fingerprint(load_method(tmp_path, METHOD))
    text = METHOD.replace(old, new)
    assert text != METHOD
    text = text.replace(" from None", "") if new == "y = (" else text
    assert (fingerprint(load_method(tmp_path, text)) == before) == ((old, new) in SAME)


def test_a_string_in_an_expression_counts_and_an_f_string_is_one_word_on_every_python():
    assert words('x = f"a{b + 1:.2f}c"  # d') == 'x = f"a{b + 1:.2f}c"'
    assert words('x = y("a")') != words('x = y("b")')


def test_a_decorator_counts_and_a_librarys_is_known_by_its_name():
    def plain(x):
        return x + 1

    without_gradient, wrapped = torch.no_grad()(plain), functools.wraps(plain)(lambda x: x)
    assert len({fingerprint(each) for each in (plain, without_gradient, wrapped)}) == 3
    assert fingerprint(without_gradient) == fingerprint(torch.no_grad()(plain))


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_an_installed_package_is_a_library_wherever_python_keeps_it(folder):
    assert source.is_library(f"/usr/local/lib/python3.12/{folder}/torch/utils/_contextlib.py")
    assert not source.is_library(model.__file__) and not source.is_library("<ipython-input-1>")


# --- which code a call can reach ---

HELPERS = types.ModuleType("helpers")
HELPERS.__file__ = __file__


def helper(x):
    return x * FACTOR


FACTOR = 3
HELPERS.helper = helper


def doubled(self, x):
    return self.down_proj(2 * HELPERS.helper(x))


def reached_names(*starts):
    """The names of the functions and classes that a call of these can reach."""
    search = source.Search()
    for start in starts:
        search.add(start)
    while search.new_names():
        pass
    return {name for _, name, _ in search.pieces}


def test_what_an_answer_comes_from_is_found_and_nothing_else():
    """A trace of a real call shows what the plain path calls: all of it must be found."""
    found = reached_names(Llama, model.LlamaConfig, Llama.generate)
    config = model.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    net, called = Llama(config), set()

    def trace(frame, event, _):
        if frame.f_code.co_filename == model.__file__:
            called.add(frame.f_code.co_qualname)

    sys.setprofile(trace)
    net.generate([[1, 2, 3]], 2, None)
    sys.setprofile(None)
    # A comprehension is part of the function that holds it
    called = {name for name in called if "<" not in name}
    assert len(called) > 10 and called <= found
    for name in ("Llama.loss", "Llama.save_pretrained", "adapters"):
        assert name not in found
    assert "Llama.loss" in reached_names(Llama, Llama.loss)
    assert "RoAE.forward" in reached_names(rosa.load_adapter)
    assert not reached_names(rosa.load_adapter) & {
        "merge",
        "save_adapter",
        "LayerSelector",
        "LayerSelector.after_backward",
    }


EDITS = [
    (MLP, "forward", doubled),
    (model, "rotate", lambda x, cos, sin: x),
    (model.KVCache, "update", lambda self, layer, k, v: (k, v, None)),
    (model.Llama, "__call__", lambda self, tokens: None),
    (rosa.RoAE, "forward", lambda self, x: self.linear(x)),
    (rosa, "adapted_rows", lambda *_: None),
]


@pytest.mark.parametrize(
    "owner, name, new", EDITS, ids=lambda value: getattr(value, "__name__", "")
)
def test_an_answer_is_of_the_code_that_classes_and_modules_hold_now(monkeypatch, owner, name, new):
    before = result_code("generate", adapter="a")
    assert before == result_code("generate", adapter="a")
    monkeypatch.setattr(owner, name, new, raising=False)
    after = result_code("generate", adapter="a")
    file = "rosa.py" if owner.__name__ in ("rosa", "RoAE") else "model.py"
    assert after.get("tests/test_source.py") and (after[file] != before[file] or name == "__call__")
    others = after.keys() - {file, "tests/test_source.py"}
    assert {each: after[each] for each in others} == {each: before[each] for each in others}


@pytest.mark.parametrize("value, same", [(FACTOR, True), (FACTOR + 1, False)])
def test_what_is_called_in_other_modules_and_constants_count(monkeypatch, value, same):
    monkeypatch.setattr(MLP, "forward", doubled)
    before = reached_code(Llama, Llama.generate)
    assert "helper" in reached_names(Llama, Llama.generate)
    monkeypatch.setitem(globals(), "FACTOR", value)
    assert (reached_code(Llama, Llama.generate) == before) == same


def test_a_constant_is_the_same_text_in_every_process():
    values = {"b": {2, 1}, "a": [(1, 2.5), None, True], "c": frozenset("xy")}
    assert source.constant_text(values) == source.constant_text(dict(values))
    assert (
        source.constant_text({1, 2}) == source.constant_text({2, 1}) != source.constant_text({1, 3})
    )
    assert source.constant_text(object()) is None and source.constant_text([torch]) is None
    assert source.constant_text(torch.float32) == "torch.float32" and source.constant_text(
        tasks.CHOICES
    )


def test_where_there_is_no_source_the_byte_code_counts():
    def plus_one(x):
        return x + 1

    code, typed_in_a_shell = plus_one.__code__, []
    for number in (1, 2):
        constants = tuple(number if constant == 1 else constant for constant in code.co_consts)
        in_a_shell = code.replace(co_filename="<stdin>", co_consts=constants)
        typed_in_a_shell.append(reached_code(types.FunctionType(in_a_shell, {})))
    one, two = typed_in_a_shell
    assert one.keys() == two.keys() == {"<stdin>"} and one != two


def test_a_file_whose_name_only_begins_like_extras_is_the_readers_own():
    root = Path(source.HERE)
    assert source.is_own(str(root / "extras_of_mine.py"))
    assert not source.is_own(str(root / "extras" / "kernels.py"))
