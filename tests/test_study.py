"""Statements about `extras/study.py`: a plan becomes the runs that its rule asks for, each is in
the report, and a claim is made only where an interval leaves out zero."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, no_package, read_log

from data.errors import UserError
from extras import study
from extras.checkpoints import meta_model
from extras.commands import Stop
from extras.records import write_log
from extras.study import Cell
from model import LlamaConfig

PLAN = """
models = ["ckpt"]
baselines = ["LoRA"]
options = "--max-steps 2 --batch-size 2 --val-size 2 --max-len 200 --dtype float32"
rates = [1e-3, 3.16e-3, 1e-2, 3.16e-2]
tuning_seed = 0
seeds = [1, 2, 3]
[tasks]
toy = "--task toy"
[methods]
"RoSA" = "--rank 3"
"no DLS" = "--rank 3 --k-ratio 1"
"LoRA" = "--method lora --rank 2"
"""
METHODS = ("RoSA", "no DLS", "LoRA")


def write_plan(*edits):
    """plan.toml, with some texts replaced."""
    plan = PLAN
    for old, new in edits:
        assert plan.count(old) == 1, old
        plan = plan.replace(old, new)
    Path("plan.toml").write_text(plan)
    return Path("plan.toml")


@pytest.fixture
def sized(ckpt, monkeypatch):
    """The methods of the plan have one size, whatever their ranks."""
    monkeypatch.setattr(study, "count_trained", lambda model, options: 1000)


def simulate(monkeypatch, loss_of):
    """Take for the loss of each run what loss_of(cell) says. Returns the list of the cells that
    were run, in their order."""
    cells = []

    def start_run(plan, cell, out, device, devices, options):
        cells.append(cell)
        return study.Running(SimpleNamespace(poll=lambda: 0), out, device, 0.0)

    def record_of(plan, cell, run, signals):
        record = cell._asdict() | {"val_loss": loss_of(cell), "val_loss_before": 3.0}
        record |= {"trainable": 1000, "minutes": 6.0, "seen": cell.seed}
        record["code"] = study.code_now(plan, cell)
        return record | {"options": shlex.join(study.options_of(plan, cell))}

    monkeypatch.setattr(study, "start_run", start_run)
    monkeypatch.setattr(study, "record_of", record_of)
    return cells


def valley(cell):
    """The lowest loss is at 1e-2, for RoSA at 1e-1, beyond the rates of the plan; and a seed's own
    part is the same for all methods."""
    best = {"RoSA": -1, "no DLS": -2, "LoRA": -2}[cell.method]
    level = {"RoSA": 1.0, "no DLS": 1.1, "LoRA": 1.2}[cell.method]
    wobble = 0.001 * cell.seed if cell.method == "RoSA" else 0
    return level + 0.1 * abs(math.log10(cell.lr) - best) + 0.05 * cell.seed + wobble


# --- the rule ---


def test_a_rate_is_known_when_there_are_worse_ones_on_both_sides():
    rates = [3.16e-4, 1e-3, 3.16e-3, 1e-2]
    losses = {}
    assert study.rates_to_try(rates, losses) == rates
    losses |= {3.16e-4: 3.0, 1e-3: 2.0, 1e-2: 2.5}
    assert study.rates_to_try(rates, losses) == [3.16e-3]
    assert study.rates_to_try(rates, losses | {3.16e-3: 2.2}) == []
    falling = dict(zip(rates, (4.0, 3.0, 2.0, 1.0)))
    assert study.rates_to_try(rates, falling) == [3.16e-2]
    assert study.rates_to_try(rates, falling | {3.16e-2: 0.5}) == [1e-1]
    assert study.rates_to_try(rates, falling | {3.16e-2: None}) == []  # it diverged
    rising = dict(zip(rates, (1.0, 2.0, 3.0, None)))
    assert study.rates_to_try(rates, rising) == [1e-4]
    assert study.rates_to_try(rates, rising | {1e-4: 1.5}) == []
    assert study.rates_to_try(rates, dict.fromkeys(rates)) == []
    assert study.best_rate(dict.fromkeys(rates)) is None


def test_the_constants_are_those_of_students_distribution():
    """95 per cent of its density lie between -t and t."""
    for degrees, t in study.STUDENT.items():
        x = np.linspace(-t, t, 200001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        factor = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
        share = np.trapezoid(density, x) * factor / math.sqrt(degrees * math.pi)
        assert share == pytest.approx(0.95, abs=5e-5)


def test_an_interval_holds_the_true_mean_19_times_in_20():
    generator = np.random.default_rng(0)
    hits = 0
    for differences in generator.normal(0.3, 0.1, (2000, 5)):
        mean, low, high = study.interval(differences.tolist())
        assert mean == pytest.approx(differences.mean()) == pytest.approx((low + high) / 2)
        hits += low < 0.3 < high
    assert 0.93 < hits / 2000 < 0.97


# --- the runs of a plan ---


def test_a_plan_becomes_the_runs_of_its_rule(sized, monkeypatch, capsys):
    cells = simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    # The rates of all methods in turn; RoSA's best is found two steps beyond the plan's
    assert [cell.method for cell in cells[:6]] == [*METHODS] * 2
    tried = {m: [c.lr for c in cells if c.method == m and c.seed == 0] for m in METHODS}
    rates = [1e-3, 3.16e-3, 1e-2, 3.16e-2]
    assert tried == {"RoSA": [*rates, 1e-1, 3.16e-1], "no DLS": rates, "LoRA": rates}
    final = [cell for cell in cells if cell.seed > 0]
    assert len(final) == 9 and len(cells) == 14 + 9
    assert {(cell.method, cell.lr) for cell in final} == {
        ("RoSA", 0.1),
        ("no DLS", 0.01),
        ("LoRA", 0.01),
    }
    # Every run is a line, in the report's JSON too
    lines = read_log(".", "plan.jsonl")
    report = json.loads(Path("plan.report.json").read_text())
    assert len(lines) == len(report["runs"]) == 23
    # The differences are of pairs of the same seed
    of_rosa, without_dls = report["comparisons"]
    assert list(of_rosa["differences"].values()) == pytest.approx([-0.199, -0.198, -0.197])
    assert of_rosa["high"] == pytest.approx(-0.198 + 4.303 * 0.001 / math.sqrt(3))
    assert of_rosa["low"] < of_rosa["mean"] < of_rosa["high"] < 0
    shown = capsys.readouterr().out
    assert (
        "| RoSA | 0.1 | 1.0510 | 1.1020 | 1.1530 | 1.1020 | -0.1980 (-0.2005 to -0.1955): better"
        in shown
    )
    assert "| no DLS | 1,000 | 1.2000 | 1.1500 | **1.1000** | 1.1500 | – | – |" in shown
    assert "23 runs.\n2 intervals of 95 per cent" in shown and "0.1 of them would be" in shown


def test_several_runs_at_a_time_are_those_of_one_at_a_time(sized, monkeypatch, capsys):
    """Whichever ends first: the next takes its device."""
    one_at_a_time = simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    Path("plan.jsonl").rename("one.jsonl")
    cells = simulate(monkeypatch, valley)
    busy = []

    def first_to_end(running):
        busy.append(sorted(run.device for run in running.values()))
        return random.choice(list(running))

    monkeypatch.setattr(study, "first_to_end", first_to_end)
    monkeypatch.setattr(study, "choose_device_and_dtype", lambda device, dtype: None)
    capsys.readouterr()
    study.run(["plan.toml", "--device", "cuda:0,cuda:1,cuda:2"])
    assert len(cells) == len(one_at_a_time) and set(cells) == set(one_at_a_time)
    assert busy[0] == ["cuda:0", "cuda:1", "cuda:2"] and len(busy) == 23
    assert all(len(set(devices)) == len(devices) for devices in busy)
    assert "1 runs are done, 20 remain, about 40 minutes" in capsys.readouterr().out
    lines = [read_log(".", name) for name in ("one.jsonl", "plan.jsonl")]
    for records, number in zip(lines, (1, 3)):
        assert {record.pop("at_a_time") for record in records} == {number}
    assert sorted(map(str, lines[0])) == sorted(map(str, lines[1]))


@pytest.mark.parametrize("signal_in", [None, "start_run", "record_of"])
def test_a_signal_or_a_failure_ends_the_runs_after_their_step(
    sized, monkeypatch, capsys, signal_in
):
    """Each run gets one signal: a second would end it within its step."""
    calls = []

    def interrupt(place):
        if signal_in == place:
            os.kill(os.getpid(), signal.SIGINT)

    def start_run(plan, cell, out, device, devices, options):
        def call(name):
            return lambda: calls.append((cell.method, name))

        process = SimpleNamespace(
            poll=lambda: 0, terminate=call("terminate"), wait=call("wait"), returncode=1
        )
        if cell.method == "no DLS":
            interrupt("start_run")
        return study.Running(process, out, device, 0.0)

    def record_of(plan, cell, run, signals):
        interrupt("record_of")
        raise Stop(f"{cell.method} ended with status 1")

    monkeypatch.setattr(study, "start_run", start_run)
    monkeypatch.setattr(study, "record_of", record_of)
    write_plan()
    with pytest.raises(SystemExit) as end:
        study.run(["plan.toml", "--device", "cpu,cpu,cpu"])
    assert end.value.code == 1 and "study: RoSA ended with status 1" in capsys.readouterr().err
    terminated = [method for method, name in calls if name == "terminate"]
    waited_for = [method for method, name in calls if name == "wait"]
    if signal_in == "start_run":  # the third run was not started, and RoSA's had not ended yet
        assert terminated == ["RoSA", "no DLS"] and waited_for == ["no DLS"]
    else:
        assert terminated == waited_for == ["no DLS", "LoRA"]


@pytest.mark.parametrize("status", [1, 2])
def test_a_run_that_fails_when_it_goes_on_has_not_diverged(ckpt, status):
    """The log of a run that diverged ends in three steps that were not applied, also if the same
    command then fails for another reason."""
    out = Path("out")
    out.mkdir()
    write_log(out / "log.jsonl", {"step": 0, "val_loss": 3.0})
    for step in (1, 2, 3):
        write_log(out / "log.jsonl", {"step": step, "loss": None, "seconds": 1, "skipped": True})
    names = ("config.json of the checkpoint", "weight files of the checkpoint")
    hashes = dict.fromkeys((*names, "training examples", "held-out examples"), "")
    # The device on which it began may be another one than that on which it ends.
    args = {"hashes": hashes, "code": {}, "device": "cuda:9"}
    (out / "args.json").write_text(json.dumps(args))
    write_plan()
    plan = study.read_plan(Path("plan.toml"))
    cell = Cell("ckpt", "toy", "RoSA", 1e-3, 1)
    run = study.Running(SimpleNamespace(returncode=status), out, "cpu", time.monotonic())
    if status == 2:
        with pytest.raises(Stop, match="ended with status 2"):
            study.record_of(plan, cell, run, [])
    else:
        record = study.record_of(plan, cell, run, [])
        assert record["val_loss"] is None and record["processor"].startswith("cpu")


def test_a_run_without_a_state_begins_anew(ckpt, monkeypatch):
    """So a run whose line was deleted can be made again."""
    commands = []
    monkeypatch.setattr(study.subprocess, "Popen", lambda command, **_: commands.append(command))
    write_plan()
    plan = study.read_plan(Path("plan.toml"))
    out = Path("out")
    out.mkdir()
    (out / "args.json").write_text("{}")
    for _ in range(2):
        study.start_run(plan, Cell("ckpt", "toy", "RoSA", 1e-3, 1), out, "cpu", ["cpu"], [])
        (out / "state.safetensors").touch()
    assert [command[-1] for command in commands] == ["--overwrite", "--resume"]


def test_no_claim_is_made_where_the_interval_holds_zero(sized, monkeypatch, capsys):
    noise = {1: 0.3, 2: -0.2, 3: 0.1}

    def loss_of(cell):
        return valley(cell) + (noise.get(cell.seed, 0) if cell.method == "no DLS" else 0)

    simulate(monkeypatch, loss_of)
    write_plan()
    study.run(["plan.toml"])
    _, without_dls = json.loads(Path("plan.report.json").read_text())["comparisons"]
    assert without_dls["low"] < 0 < without_dls["high"]
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| no DLS")][1]
    assert row.endswith(": no claim |") and "-0.0333 (" in row


def test_a_run_that_diverged_is_in_the_report_and_allows_no_interval(sized, monkeypatch, capsys):
    def loss_of(cell):
        return None if cell.method == "RoSA" and (cell.lr > 0.1 or cell.seed == 2) else valley(cell)

    simulate(monkeypatch, loss_of)
    write_plan()
    study.run(["plan.toml"])
    shown = capsys.readouterr().out
    assert "| RoSA | 0.1 | 1.0510 | diverged | 1.1530 | – | a run diverged |" in shown
    first, _ = json.loads(Path("plan.report.json").read_text())["comparisons"]
    assert first["mean"] is first["low"] is None and list(first["differences"]) == ["1", "3"]


def test_a_study_goes_on_where_it_was(sized, monkeypatch, capsys):
    """A line that a kill has cut, and runs by other options, do not count."""
    cells = simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    whole = Path("plan.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    Path("plan.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
    capsys.readouterr()
    study.run(["plan.toml", "--dry-run"])
    assert "21 runs are done, 2 remain, about 12 minutes" in capsys.readouterr().out
    write_plan(("--rank 3 --k-ratio 1", "--rank 3 --k-ratio 0.9"))
    study.run(["plan.toml", "--dry-run"])
    shown = capsys.readouterr().out
    others = sum('"no DLS"' in line for line in lines[:-2])
    assert f"{others} runs in plan.jsonl are of another plan" in shown
    remain = 7 + sum('"no DLS"' not in line for line in lines[-2:])
    assert f"{21 - others} runs are done, {remain} remain" in shown
    # The cut line is not in the way of the next, and neither is an empty one
    write_plan()
    Path("plan.jsonl").write_text("".join(lines[:-2]) + "\n")
    done = len(cells)
    study.run(["plan.toml"])
    assert len(cells) == done + 2
    assert sorted(Path("plan.jsonl").read_text().splitlines(True)) == sorted(lines)


def test_a_line_in_the_middle_that_is_no_run_is_refused(sized, monkeypatch, capsys):
    """Else the runs after it would be made again."""
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    lines = Path("plan.jsonl").read_text().splitlines(keepends=True)
    Path("plan.jsonl").write_text("".join([*lines[:4], "\n", *lines[4:]]))
    with pytest.raises(SystemExit):
        study.run(["plan.toml", "--dry-run"])
    assert "plan.jsonl, line 5 is no run of a study: delete it" in capsys.readouterr().err


def test_rates_of_another_grid_do_not_count(sized, monkeypatch, capsys):
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    write_plan(("[1e-3, 3.16e-3, 1e-2, 3.16e-2]", "[2e-3, 6.32e-3, 2e-2, 6.32e-2]"))
    study.run(["plan.toml", "--dry-run"])
    shown = capsys.readouterr().out
    assert "23 runs in plan.jsonl are of another plan" in shown and "0 runs are done" in shown
    # The plan's own grid shifted: the rates are on it, those beyond it too
    write_plan(("[1e-3, 3.16e-3, 1e-2, 3.16e-2]", "[3.16e-3, 1e-2, 3.16e-2, 1e-1]"))
    study.run(["plan.toml", "--dry-run"])
    assert "of another plan" not in capsys.readouterr().out


def test_runs_at_a_rate_that_is_no_longer_the_best_are_counted(sized, monkeypatch, capsys):
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    assert "at other rates" not in capsys.readouterr().out
    records = read_log(".", "plan.jsonl")
    Path("plan.jsonl").unlink()
    for record in records:
        if record["method"] == "LoRA" and record["lr"] == 3.16e-3 and record["seed"] == 0:
            record["val_loss"] = 0.1
        write_log(Path("plan.jsonl"), record)
    study.run(["plan.toml", "--report"])
    assert "3 runs with these seeds, at other rates, are in no table." in capsys.readouterr().out


def test_a_report_of_what_there_is(sized, monkeypatch, capsys):
    write_plan()
    simulate(monkeypatch, valley)
    study.run(["plan.toml", "--dry-run"])
    assert "0 runs are done, 21 remain; the first" in capsys.readouterr().out
    assert not Path("plan.jsonl").exists()
    study.run(["plan.toml"])
    lines = Path("plan.jsonl").read_text().splitlines(keepends=True)
    Path("plan.jsonl").write_text("".join(lines[:5]))
    no_package(monkeypatch, "matplotlib")
    capsys.readouterr()
    study.run(["plan.toml", "--report"])
    shown = capsys.readouterr().out
    assert "5 runs, " in shown and "| LoRA | – | – | – | – | – |" in shown
    assert "plan.report.png needs the package matplotlib" in shown
    assert len(Path("plan.jsonl").read_text().splitlines()) == 5


def test_the_picture(sized, monkeypatch):
    pytest.importorskip("matplotlib")
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    assert Path("plan.report.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = [
    (("tuning_seed = 0", "tuning_seed = 2"), "what chose the rate cannot judge"),
    (("tuning_seed = 0", ""), "the key 'tuning_seed' is missing"),
    (("tuning_seed = 0", "tuning_seed = 0\nseed = 3"), "unknown key 'seed'"),
    (("[1, 2, 3]", "[1]"), "seeds must be 2 to 10 numbers"),
    (("[1, 2, 3]", "[1, 1, 2]"), "seeds has a number twice"),
    (("[1, 2, 3]", "3"), "seeds must be a list"),
    (("[1, 2, 3]", '["1", "2"]'), "seeds must be whole numbers"),
    (("[1e-3, 3.16e-3, 1e-2, 3.16e-2]", "[1e-3, 1e-2]"), "fewer than four"),
    (("[1e-3, 3.16e-3, 1e-2, 3.16e-2]", "[]"), "fewer than four"),
    (("[1e-3, 3.16e-3, 1e-2, 3.16e-2]", "[1e-3, 2e-3, 4e-3, 8e-3]"), "factors of 10^0.5"),
    (('["LoRA"]', '["Lora"]'), "Lora is none of the methods: RoSA, no DLS, LoRA"),
    (('["LoRA"]', "[]"), "baselines names no method"),
    (('["ckpt"]', '["ckpt", "ckpt"]'), "have the same options"),
    (('["ckpt"]', "[7]"), "must be texts"),
    (("--rank 3 --k-ratio 1", "--rank 3 --lr 1e-3"), "has --lr, which belongs into another key"),
    (("--rank 3 --k-ratio 1", "--rank 3 --ckp x"), "has --ckp, which belongs into another key"),
    (("--rank 3 --k-ratio 1", "--rank 3"), "methods have the same options"),
    (("--rank 3 --k-ratio 1", "--rank '3"), "No closing quotation"),
    (("--rank 3 --k-ratio 1", "--method full --rank 3"), "no DLS on toy: --rank is no option of"),
    (("--dtype float32", ""), "options must say the --dtype"),
    (('["ckpt"]', "[]"), "must not be empty"),
    (('["ckpt"]', '["absent"]'), "no checkpoint 'absent'"),
    (("tuning_seed = 0", "tuning_seed ="), "plan.toml is not TOML"),
    (("--rank 3 --k-ratio 1", "--rank 4"), "RoSA 1,056, no DLS 1,408, LoRA 896"),
    (("--rank 3 --k-ratio 1", "--rank x"), "--rank must be a whole number"),
]


@pytest.mark.parametrize("edit, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_in_a_plan_is_one_line_before_anything_is_run(ckpt, capsys, edit, message):
    write_plan(edit)
    with pytest.raises(SystemExit) as end:
        study.run(["plan.toml"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not Path("plan.jsonl").exists() and not Path("runs").exists()


def test_runs_of_other_code_are_said(sized, monkeypatch, capsys):
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    assert "other code" not in capsys.readouterr().out
    monkeypatch.setattr(study, "code_of", lambda args: {"rosa.py": "edited"})
    study.run(["plan.toml", "--report"])
    assert "23 of these runs were made by other code than there is now" in capsys.readouterr().out


def test_runs_of_one_seed_that_saw_different_examples_are_refused(sized, monkeypatch, capsys):
    simulate(monkeypatch, valley)
    write_plan()
    study.run(["plan.toml"])
    text = Path("plan.jsonl").read_text().replace('"seen": 2', '"seen": 4', 1)
    Path("plan.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        study.run(["plan.toml", "--report"])
    error = capsys.readouterr().err
    assert "seed 2, had different examples or checkpoints" in error
    Path("plan.jsonl").write_text('{"model": "ckpt"}\n')
    with pytest.raises(SystemExit):
        study.run(["plan.toml", "--report"])
    assert "this line is no run of a study" in capsys.readouterr().err


def test_a_search_that_only_falls_ends(sized, monkeypatch, capsys):
    cells = simulate(monkeypatch, lambda cell: 1 + cell.lr)
    write_plan()
    study.run(["plan.toml"])
    tried = sorted({cell.lr for cell in cells})
    assert tried[:4] == [1e-6, 3.16e-6, 1e-5, 3.16e-5] and tried[-1] == 3.16e-2
    assert len(cells) == 3 * (10 + 3)
    assert "The best rate of LoRA, 1e-06, is at the edge" in capsys.readouterr().out


def test_several_models_and_tasks_are_compared_each_for_itself(sized, monkeypatch, capsys):
    shutil.copytree("ckpt", "other")
    simulate(monkeypatch, lambda cell: valley(cell) * (2 if cell.model == "other" else 1))
    write_plan(('["ckpt"]', '["ckpt", "other"]'), ('["LoRA"]', '["LoRA", "RoSA"]'))
    study.run(["plan.toml"])
    compared = json.loads(Path("plan.report.json").read_text())["comparisons"]
    pairs = [(each["model"], each["method"], each["baseline"]) for each in compared]
    assert pairs[:3] == [
        ("ckpt", "RoSA", "LoRA"),
        ("ckpt", "no DLS", "LoRA"),
        ("ckpt", "no DLS", "RoSA"),
    ]
    assert len(pairs) == len(set(pairs)) == 6
    for first, second in zip(compared[:3], compared[3:]):
        assert second["mean"] == pytest.approx(2 * first["mean"])
    assert "### ckpt, toy" in capsys.readouterr().out


def test_methods_of_another_size_may_be_named(sized, monkeypatch, capsys):
    monkeypatch.setattr(study, "count_trained", lambda model, options: 10 * options["rank"])
    simulate(monkeypatch, valley)
    write_plan()
    with pytest.raises(SystemExit):
        study.run(["plan.toml", "--dry-run"])
    assert "RoSA 30, no DLS 30, LoRA 20: change --rank" in capsys.readouterr().err
    write_plan(('baselines = ["LoRA"]', 'baselines = ["LoRA"]\nunequal = ["LoRA"]'))
    study.run(["plan.toml", "--dry-run"])


# --- the runs themselves ---


@pytest.fixture
def one_cell(ckpt):
    """A plan of which one cell is left to be run, and this cell."""
    shutil.copytree(ROOT / "data" / "tiny", "tiny")
    write_plan(("--max-steps 2", "--max-steps 40 --save-every 7 --eval-every 1000"))
    plan = study.read_plan(Path("plan.toml"))
    left = Cell("ckpt", "toy", "no DLS", 0.01, 1)
    for group in study.groups(plan):
        rates = dict(zip(plan.rates, (3, 2, 1, 2)))
        cells = [Cell(*group, rate, 0) for rate in rates]
        for cell in [*cells, *(Cell(*group, 0.01, seed) for seed in plan.seeds)]:
            if cell != left:
                record = cell._asdict() | {"val_loss": rates[cell.lr], "val_loss_before": 3}
                record |= {"trainable": None, "minutes": 1, "seen": cell.seed, "code": "c"}
                record["options"] = shlex.join(study.options_of(plan, cell))
                write_log(Path("plan.jsonl"), record)
    return plan, left


STUDY = (
    "import signal, sys; from extras import study; "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # nohup, which may have begun this, ignores it
    "study.check_sizes = lambda *_: None; "
    "study.check_pairs = lambda *_: None; "
    "study.run(sys.argv[1:])"
)


def start_study(*options):
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, "plan.toml", "--runs", ".", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def run_cell(plan, cell):
    out = Path(study.directory_of(plan, cell))
    run = study.start_run(plan, cell, out, "cpu", ["cpu"], [])
    run.process.wait()
    return study.record_of(plan, cell, run, [])


def wait_for_log(out, lines, process):
    deadline = time.monotonic() + 60
    while len(read_log(out)) < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_is_one_of_train_py_and_goes_on_after_a_signal(one_cell):
    plan, cell = one_cell
    command = [sys.executable, str(ROOT / "train.py"), *study.options_of(plan, cell)]
    subprocess.run([*command, "--out", "whole"], check=True, capture_output=True)
    loss = read_log("whole")[-1]["val_loss"]
    out = study.directory_of(plan, cell)
    finished = len(read_log(".", "plan.jsonl"))
    for number, steps in ((signal.SIGTERM, 3), (signal.SIGINT, 9), (signal.SIGHUP, 15)):
        process = start_study()
        wait_for_log(out, steps, process)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        (line,) = [line for line in error.splitlines() if line.startswith("study: ")]
        assert line == f"study: stopped in {out}. The same command goes on with the study"
        assert len(read_log(".", "plan.jsonl")) == finished
    process = start_study()
    shown, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "0 remain" in shown, error
    record = read_log(".", "plan.jsonl")[-1]
    assert record["val_loss"] == loss and record["skipped"] == 0 and record["steps"] == 40
    assert not Path(out, "state.safetensors").exists()
    # Other options make another run, and leave this one alone
    before = read_log(out)
    write_plan(("--max-steps 2", "--max-steps 3 --eval-every 1000"))
    again = run_cell(study.read_plan(Path("plan.toml")), cell)
    assert again["steps"] == 3 and again["seen"] == record["seen"] and read_log(out) == before


@pytest.mark.slow
def test_two_runs_at_a_time_are_stopped_and_go_on_together(one_cell):
    plan, cell = one_cell
    *lines, last = Path("plan.jsonl").read_text().splitlines(keepends=True)
    Path("plan.jsonl").write_text("".join(lines))
    other = Cell(*(json.loads(last)[name] for name in Cell._fields))
    outs = [study.directory_of(plan, each) for each in (cell, other)]
    process = start_study("--device", "cpu,cpu")
    for out in outs:
        wait_for_log(out, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.startswith("study: stopped") and error.count("\n") == 1
    assert len(read_log(".", "plan.jsonl")) < len(lines) + 2
    stopped = [read_log(out) for out in outs]
    process = start_study("--device", "cpu,cpu")
    shown, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    records = {record["method"]: record for record in read_log(".", "plan.jsonl")[-2:]}
    assert set(records) == {cell.method, other.method}
    for each, out, log in zip((cell, other), outs, stopped):
        assert records[each.method]["steps"] == 40 and f"{out}: " in shown
        assert read_log(out)[: len(log)] == log


@pytest.mark.slow
def test_a_signal_in_the_last_step_ends_the_study_after_its_run(one_cell):
    plan, cell = one_cell
    write_plan(("--max-steps 2", "--max-steps 40 --save-every 7 --eval-every 1000"))
    process = start_study()
    wait_for_log(study.directory_of(plan, cell), 41, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and ("stopped between" in error or "stopped in" in error)
    process = start_study()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert read_log(".", "plan.jsonl")[-1]["steps"] == 40


@pytest.mark.slow
def test_a_run_whose_steps_are_not_finite_has_diverged(ckpt):
    write_plan(("--max-steps 2", "--max-steps 9"))
    plan = study.read_plan(Path("plan.toml"))
    record = run_cell(plan, Cell("ckpt", "toy", "LoRA", 1e25, 1))
    assert record["val_loss"] is None and record["skipped"] >= 3 and record["val_loss_before"] > 0


SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32),
}


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "study").glob("*.toml")))
def test_the_methods_of_the_plans_that_are_here_have_one_size(file, monkeypatch):
    monkeypatch.setattr(study, "find_checkpoint", lambda model: model)
    monkeypatch.setattr(
        study, "unloaded", lambda model: meta_model(LlamaConfig("llama", *SHAPES[model]))
    )
    plan = study.read_plan(file)
    if not set(plan.models) <= SHAPES.keys():
        pytest.skip("a plan with models of your own")
    study.check_sizes(plan, {})
    name = plan.baselines[0]
    plan.methods[name] += " --rank 1"
    with pytest.raises(UserError, match="different numbers of parameters"):
        study.check_sizes(plan, {})
