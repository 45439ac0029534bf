"""A pytest plugin, named in each test file: failures as a line or two, in the place of tracebacks.

It is no conftest.py because the project's own tests have one: of two with this name Python imports
one."""

import shutil
import textwrap
import traceback
from pathlib import Path

import checking
import pytest

HERE = Path(__file__).parent
ABOVE = "first the tests above"
PRINTED = 4  # lines of the reader's own print that are shown


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.parent == HERE and call.excinfo is not None and report.failed:
        exercise = item.path.name.removeprefix("test_")
        report.longrepr = message(exercise, call.excinfo.value)
        report.sure = getattr(call.excinfo.value, "sure", False)
        report.fitting = getattr(call.excinfo.value, "fitting", ())
        report.is_guess = hasattr(call.excinfo.value, "sure") and not report.sure
        report.exercise = (
            "to do" if isinstance(call.excinfo.value, NotImplementedError) else "wrong"
        )
    return report


def message(exercise, error):
    """What the line begins with is where to look: the reader's file, for an exception also the line
    in there."""
    if isinstance(error, (NotImplementedError, pytest.fail.Exception)):
        return f"{exercise}: {error}"
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or exercise).name}:{error.lineno}"
        return f"{place}: {type(error).__name__}: {error.msg}\nin: {(error.text or '').strip()}"
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
    for kind in ("wrong", "to do"):
        reports = terminalreporter.getreports(kind)
        if reports:
            terminalreporter.section(kind)
        files = {}
        for report in reports:
            files.setdefault(report.fspath, []).append(report)
        for path, failures in files.items():
            for line in lines_of(failures, Path(path).name.removeprefix("test_")):
                terminalreporter.line(line)
    if checking.STORY:
        terminalreporter.section("your RoSA")
        width = shutil.get_terminal_size().columns
        for line in checking.STORY:
            terminalreporter.line(textwrap.fill(line, width, subsequent_indent=" " * 10))
        checking.STORY.clear()


def lines_of(failures, exercise):
    """failures: the reports of a file, in the order of its tests."""
    shown, hidden = told([Failure(report) for report in failures])
    lines, width = [], shutil.get_terminal_size().columns
    printed = failures[0].capstdout.strip().splitlines()
    for what, hint, more in shown:
        lines += textwrap.wrap(what, width, subsequent_indent="    ")
        lines += textwrap.wrap(hint, width, initial_indent="    ", subsequent_indent="    ")
        if hint and more:
            lines.append(f"    and {more} more like it")
        lines += [f"    your print: {line}"[:width] for line in printed[:PRINTED]]
        if len(printed) > PRINTED:
            lines.append(f"    and {len(printed) - PRINTED} more lines; -s shows them all")
        printed = []  # of the first failure alone
    if hidden:
        tests = "test fails" if hidden == 1 else "tests fail"
        lines.append(f"{exercise}: {hidden} more {tests}, perhaps by the same mistake")
    return lines


class Failure:
    def __init__(self, report):
        self.what, _, self.hint = report.longrepr.partition("\n")
        self.sure, self.fitting, self.is_guess = report.sure, report.fitting, report.is_guess


def told(failures):
    """The failures of a file, in the order of its tests, as [what, hint, how many more have this
    hint], and how many are not told. The first is always told, as it is the simplest. Where it is
    a guess, or some hints are sure, guesses that come later are not told, because they would
    mislead. A later hint that is sure may then be about what follows from the first: "perhaps"."""
    certain = [failure.hint for failure in failures if failure.sure]
    for failure in failures:  # of several mistakes that fit, the one that another test has found
        for hint in certain:
            if not failure.sure and hint.removeprefix("hint: ") in failure.fitting:
                failure.hint, failure.sure, failure.is_guess = hint, True, False
    shown, hidden, first = {}, 0, failures[0]
    first.hint = first.hint.replace(ABOVE, "the tests above are green: how do the parts fit?")
    for failure in failures:
        key = failure.hint or failure.what
        if key in shown:
            shown[key][-1] += 1
        elif failure is first or failure.sure or not (certain or first.is_guess):
            hint = failure.hint
            if first.is_guess and failure is not first:
                hint = hint.replace("hint:", "perhaps:", 1)
            shown[key] = [failure.what, hint, 0]
        else:
            hidden += 1
    return list(shown.values()), hidden
