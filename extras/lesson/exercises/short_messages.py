"""A pytest plugin, named in each test file: failures as a line or two, in the place of tracebacks.

It is no conftest.py because the project's own tests have one: of two with this name Python imports
one."""

import shutil
import textwrap
import traceback
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.parent == HERE and call.excinfo is not None and report.failed:
        exercise = item.path.name.removeprefix("test_")
        report.longrepr = message(exercise, call.excinfo.value)
        report.sure = getattr(call.excinfo.value, "sure", False)
        report.exercise = (
            "to do" if isinstance(call.excinfo.value, NotImplementedError) else "wrong"
        )
    return report


def message(exercise, error):
    """What the line begins with is where to look: the reader's file, for an exception also the line
    in there."""
    if isinstance(error, (NotImplementedError, pytest.fail.Exception)):
        return f"{exercise}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        [frame for frame in frames if Path(frame.filename).name == name]
        for name in (exercise, f"test_{exercise}")
    ]
    frame = (places[0] or places[1] or frames)[-1]
    first_line = str(error).strip().split("\n")[0]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{place}: {type(error).__name__}: {first_line}\nin: {frame.line}"


def pytest_report_teststatus(report):
    """Counted under their own names, these failures are left out of pytest's pages of FAILURES."""
    if kind := getattr(report, "exercise", None):
        return kind, {"to do": "-", "wrong": "F"}[kind], kind.upper()


def pytest_terminal_summary(terminalreporter):
    width = shutil.get_terminal_size().columns
    for kind in ("wrong", "to do"):
        reports = terminalreporter.getreports(kind)
        if reports:
            terminalreporter.section(kind)
        # Where a mistake is known, a guess at what else may be wrong in that file would mislead.
        known = {report.fspath for report in reports if report.sure}
        guesses = Counter(
            report.fspath for report in reports if report.fspath in known and not report.sure
        )
        alike = {}  # one mistake, many tests: what the first of them says, with its hint
        for report in reports:
            if report.fspath in guesses and not report.sure:
                continue
            first, _, hint = report.longrepr.partition("\n")
            alike.setdefault((report.fspath, hint or first), []).append((first, hint))
        for (first, hint), *others in alike.values():
            terminalreporter.line(textwrap.fill(first, width, subsequent_indent="    "))
            if hint:
                terminalreporter.line(
                    textwrap.fill(hint, width, initial_indent="    ", subsequent_indent="    ")
                )
            if hint and others:
                terminalreporter.line(f"    and {len(others)} more like it")
        for path, count in guesses.items():
            exercise = Path(path).name.removeprefix("test_")
            terminalreporter.line(
                f"{exercise}: {count} more tests fail, perhaps by the same mistake"
            )
