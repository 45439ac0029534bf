"""Statements about the house: what is read in an evening knows nothing of what serves it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {path.stem: path for path in (ROOT / "extras").glob("*.py")}


def imported(path):
    """The modules of ours that a file imports, wherever in it: "model", "data.tasks", "extras.runs", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name.split(".")[0] in ("model", "rosa", "train", "eval", "data", "extras")}


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_a_loop_can_be_read_aloud(name):
    main = next(node for node in ast.parse((ROOT / name).read_text()).body if getattr(node, "name", "") == "main")
    lengths = {node: node.end_lineno - node.lineno + 1 for node in main.body if isinstance(node, ast.While | ast.For)}
    loop = max(lengths, key=lengths.get)
    assert 5 < lengths[loop] <= 60
    assert "rank" not in ast.unparse(loop).replace("rank * total_steps", "")  # each process's own dropout


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{path.name}:{node.name}"
        for path in (*ROOT.glob("*.py"), *EXTRAS.values(), *(ROOT / "data").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    }
    assert long <= {"train.py:main", "eval.py:main", "train.py:parse_args"}


def test_the_arrows_point_one_way():
    assert imported(ROOT / "model.py") == imported(ROOT / "rosa.py") == set()
    for path in (ROOT / "data").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {"data"}, path
    for path in EXTRAS.values():
        assert {name.split(".")[0] for name in imported(path)} <= {"model", "rosa", "data", "extras"}, path


def test_the_files_of_extras_import_each_other_without_cycles():
    arrows = {name: {each.split(".")[1] for each in imported(path) if each.count(".")} for name, path in EXTRAS.items()}
    while leaves := [name for name in arrows if not arrows[name] & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows


@pytest.mark.parametrize("name", EXTRAS.keys() - {"__init__"})
def test_a_file_of_extras_says_what_it_is_what_it_is_good_for_and_how_one_lives_without_it(name):
    lines = ast.get_docstring(ast.parse(EXTRAS[name].read_text())).splitlines()[:3]
    assert all(line.endswith(".") for line in lines) and lines[2].startswith("Without ")
