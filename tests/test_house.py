"""Statements about the order of the files: model.py, rosa.py and the two loops, which are read in
an evening, know nothing of the files that serve them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {path.stem: path for path in (ROOT / "extras").glob("*.py")}


def imported(path):
    """The names of the project's modules that a file imports anywhere in its code: "model",
    "data.tasks", "extras.runs", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {
        name
        for name in names
        if name.split(".")[0] in ("model", "rosa", "train", "eval", "data", "extras")
    }


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_a_loop_can_be_read_aloud(name):
    main = next(
        node
        for node in ast.parse((ROOT / name).read_text()).body
        if getattr(node, "name", "") == "main"
    )
    lengths = {
        node: node.end_lineno - node.lineno + 1
        for node in main.body
        if isinstance(node, ast.While | ast.For)
    }
    loop = max(lengths, key=lengths.get)
    # This one use of the rank gives each process a dropout of its own
    loop_without_dropout = ast.unparse(loop).replace("rank * total_steps", "")
    assert "rank" not in loop_without_dropout, (
        f"{name}: several processes are the business of extras/distributed.py"
    )


def test_the_arrows_point_one_way():
    for name in ("model.py", "rosa.py"):
        others = imported(ROOT / name)
        assert not others, f"{name} imports {others}: it must run alone, in an empty folder"
    for path in (ROOT / "data").glob("*.py"):
        others = {name.split(".")[0] for name in imported(path)} - {"data"}
        assert not others, (
            f"data/{path.name} imports {others}: files of data/ import each other alone"
        )
    allowed = {"model", "rosa", "data", "extras"}
    for name, path in EXTRAS.items():
        others = {name.split(".")[0] for name in imported(path)} - allowed
        if name == "study":  # it runs train.py, many times
            others -= {"train"}
        assert not others, f"extras/{path.name} imports {others}: only scripts import those"


def test_the_files_of_extras_import_each_other_without_cycles():
    arrows = {
        name: {each.split(".")[1] for each in imported(path) if each.count(".")}
        for name, path in EXTRAS.items()
    }
    while leaves := [name for name in arrows if not arrows[name] & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"these files of extras/ import each other in a circle: {', '.join(arrows)}"


@pytest.mark.parametrize("name", EXTRAS.keys() - {"__init__"})
def test_a_file_of_extras_says_what_it_is_what_it_is_good_for_and_how_one_lives_without_it(name):
    text = ast.get_docstring(ast.parse(EXTRAS[name].read_text())) or ""
    first = text.split("\n\n")[0]
    what = (
        "what it is, what it is good for, and how one lives without it, each on a line of its own"
    )
    assert first.endswith(".") and "\nWithout " in first, (
        f"extras/{name}.py must begin with a docstring that says {what}; see extras/README.md"
    )
