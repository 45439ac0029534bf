"""Statements about the commands of extras/, about help texts, and about what the scripts say."""

import argparse
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SHORT_ROSA_RUN,
    best_step,
    no_package,
    read_log,
    read_validations,
    run,
    write_test_sets,
    write_tiny_checkpoint,
)
from rounding import assert_close, near, of_model

import eval as eval_script
import rosa
import train
from data import tasks, toy
from data.errors import UserError
from data.tokenizer import SentencePieceTokenizer, load_tokenizer
from extras import (
    commands,
    compare,
    distributed,
    figure1,
    forgetting,
    inference,
    make_tiny,
    merge,
    records,
)
from extras.checkpoints import NAMES
from model import Llama

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("unflushed")]


def test_the_loss_on_anything_else(ckpt, capsys):
    Path("other.json").write_text(json.dumps(toy.examples("train", 12)))
    sentences = [f"{name} has {n} pears, and no more.\n" for n, name in enumerate(toy.GIRLS * 3)]
    Path("notes.txt").write_text("".join(sentences), encoding="utf-8-sig")  # as Notepad does
    forgetting.run(
        "other.json notes.txt --ckpt ckpt --limit 10 --out runs/out --dtype float32".split()
    )
    losses = json.loads(Path("runs/out/losses.json").read_text())["losses"]
    printed = capsys.readouterr().out
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    pairs = [tasks.encode_example(example, tokenizer) for example in toy.examples("train", 10)]
    ids = tokenizer.encode("".join(sentences))
    parts = [[tokenizer.bos_id, *ids[i : i + 256]] for i in range(0, len(ids), 256)]
    with torch.no_grad():
        examples = model.loss(*train.collate(pairs, "cpu")).item()
        text = sum(
            model.loss(torch.tensor([part[:-1]]), torch.tensor([part[1:]])).item() for part in parts
        )
    rounding = of_model(model.config)
    num_tokens = sum(len(response) for _, response in pairs)
    assert losses["other"] == near(examples / num_tokens, **rounding)
    assert len(parts) > 2 and losses["notes"] == near(text / len(ids), **rounding)
    for name, count in (("other", num_tokens), ("notes", len(ids))):
        assert f"{count:,} tokens   {losses[name]:.4f} nats per token" in printed
    for folder in "ab":
        Path(folder).mkdir()
        shutil.copy("other.json", folder)
        forgetting.run(
            f"{folder}/other.json --ckpt ckpt --limit 1 --out runs/out --dtype float32".split()
        )
    kept = json.loads(Path("runs/out/losses.json").read_text())["losses"]
    assert (
        set(kept) == {"other", "notes", "a/other", "b/other"} and kept["other"] == losses["other"]
    )


def test_what_was_forgotten_is_the_loss_with_the_adapter_beside_that_without_it(
    ckpt, monkeypatch, capsys
):
    adapter = rosa.attach(Llama.from_pretrained("ckpt"), 4, 8)
    with torch.no_grad():
        for each in rosa.adapters(adapter).values():
            each.B.normal_(std=0.3)
    rosa.save_adapter(adapter, "a")
    Path("notes.txt").write_text("Tom has 3 pears, and no more. " * 20)
    losses = {}
    for model, options in (("ckpt", ""), ("a", "--adapter a")):
        forgetting.run(f"notes.txt --ckpt ckpt --dtype float32 --out out/{model} {options}".split())
        losses[model] = json.loads(Path(f"out/{model}/losses.json").read_text())
    alone, changed = losses["ckpt"]["losses"]["notes"], losses["a"]["losses"]["notes"]
    assert (
        alone != changed
        and losses["ckpt"]["losses_alone"] == {}
        and losses["a"]["losses_alone"] == {"notes": alone}
    )
    change = (
        f"{changed:.4f} nats per token, without the adapter {alone:.4f}: {changed - alone:+.4f}"
    )
    assert change in capsys.readouterr().out
    compare.run(["out/a"])
    assert f"| {alone:.4f} → {changed:.4f} |" in capsys.readouterr().out
    monkeypatch.setattr(Llama, "loss", lambda self, tokens, labels: torch.tensor(torch.inf))
    with pytest.raises(SystemExit):
        forgetting.run("notes.txt --ckpt ckpt --adapter a".split())
    assert (
        "the loss on notes.txt, without the adapter is inf: try --dtype" in capsys.readouterr().err
    )


def test_empty_records_are_left_out_where_a_user_says_so(ckpt, capsys):
    records = toy.examples("train", 6)
    whole = [*records]
    records.insert(2, records[0] | {"output": ""})
    for name, content in (("records", records), ("whole", whole)):
        Path(f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        forgetting.run("records.json --ckpt ckpt".split())
    assert "--skip-empty" in capsys.readouterr().err
    forgetting.run("records.json whole.json --ckpt ckpt --skip-empty --out out".split())
    losses = json.loads(Path("out/losses.json").read_text())["losses"]
    assert losses["records"] == losses["whole"]
    write_test_sets(".", ["gsm8k"])
    file = Path("dataset/gsm8k/test.json")
    file.write_text(
        json.dumps([{"instruction": "", "output": "1", "answer": 1}, *json.loads(file.read_text())])
    )
    command = "--ckpt ckpt --task gsm8k --data-dir . --out out --max-new-tokens 1".split()
    with pytest.raises(ValueError, match="--skip-empty"):
        run(eval_script, *command)
    run(eval_script, *command, "--skip-empty")
    assert json.loads(Path("out/results.json").read_text())["counts"] == {"gsm8k": 5}


@pytest.mark.slow
def test_the_bundled_checkpoint_is_what_make_tiny_makes(tmp_path, capsys):
    """The vocabulary and the config are the same. To make the same weights would take half an
    hour."""
    make_tiny.run([str(tmp_path / "new" / "tiny"), "--minutes", "0.005"])
    assert "2,337,216 parameters" in capsys.readouterr().out
    made, bundled = (
        Llama.from_pretrained(path) for path in (tmp_path / "new" / "tiny", ROOT / "data" / "tiny")
    )
    assert (made.config, made.dtype) == (bundled.config, bundled.dtype)
    ours, theirs = (
        load_tokenizer(path).plain for path in (tmp_path / "new" / "tiny", ROOT / "data" / "tiny")
    )
    assert [ours.id_to_piece(i) for i in range(1024)] == [
        theirs.id_to_piece(i) for i in range(1024)
    ]
    tokens = torch.tensor([[1, *ours.encode("Tom has 3 pens. He buys 4 more. Now he has 7 pens.")]])
    torch.manual_seed(0)  # as make_tiny begins
    before, after = (
        model.float().loss(tokens[:, :-1], tokens[:, 1:]) for model in (Llama(made.config), made)
    )
    assert after < before  # it has learned something


def test_activations_are_the_norms_of_q_and_k(ckpt, monkeypatch, capsys):
    figure1.run("new/figures/fig1.png --ckpt ckpt --limit 5 --dtype float32".split())
    means = np.load("new/figures/fig1.npz")
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    d, expected = model.config.head_dim, {"q": 0, "k": 0}
    with torch.no_grad():
        for example in toy.examples("test", 5):
            x = model.model.embed_tokens(torch.tensor([tasks.encode_prompt(example, tokenizer)]))
            h = model.model.layers[0].input_layernorm(x)
            for name in expected:
                # [T, heads * d]
                states = model.model.layers[0].self_attn.get_submodule(f"{name}_proj")(h)[0]
                expected[name] += states.view(len(states), -1, d).square().sum(0).sqrt().mean(0) / 5
    for name in expected:
        assert means[name].shape == (4, d)
        assert_close(means[name][0], expected[name], **of_model(model.config))
    assert means["first_low_frequency_pair"] == d // 2 - max(1, round(0.5 * d / 2))
    assert "by quarter of the pairs" in capsys.readouterr().out
    no_package(monkeypatch, "matplotlib")
    figure1.run(["other.png", "--ckpt", "ckpt"])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert Path("other.npz").is_file() and not Path("other.png").exists()


def test_runs_side_by_side(ckpt, capsys):
    run(train, *SHORT_ROSA_RUN, "--out", "runs/a")
    run(train, *SHORT_ROSA_RUN, "--out", "runs/b", "--method", "lora")
    for out, adapter in (("runs/a", ["--adapter", "runs/a"]), ("runs/base", [])):
        run(
            eval_script,
            "--ckpt",
            "ckpt",
            "--limit",
            8,
            "--max-new-tokens",
            5,
            "--out",
            out,
            *adapter,
        )
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--out", "runs/base"])
    capsys.readouterr()
    compare.run(["runs/base", "runs/a", "runs/b"])
    lines = capsys.readouterr().out.splitlines()
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(rows) == ["base", "a", "b"] and set(rule) == {"---"}
    base, a, b = rows.values()
    summary = json.loads(Path("runs/b/summary.json").read_text())
    assert (
        b["validation loss"] == f"{read_validations('runs/b')[0]:.4f} → {summary['val_loss']:.4f}"
    )
    share = 100 * summary["trainable"] / summary["parameters"]
    assert b["trainable"] == f"{summary['trainable']:,} ({share:.2f}%)" and b["toy (n = 8)"] == "–"
    settings = "rosa, targets q,k, rank 4, alpha 8, low freq ratio 0.5, pairs low, k ratio 0.5"
    assert (
        a["method"].startswith(settings)
        and b["peak memory"] == f"{summary['peak_memory'] / 2**20:,.0f} MiB"
    )
    assert a["toy (n = 8)"].startswith("0.0% (0.0–32.4)")
    (loss,) = (
        value
        for column, value in base.items()
        if re.fullmatch(r"loss on other \([0-9]+ tokens\)", column)
    )
    assert (base["method"], base["tokens/s"]) == ("base", "–") and float(loss) > 1


def test_a_run_that_was_stopped_or_has_learned_nothing_says_so_in_the_table(ckpt, capsys):
    run(train, *SHORT_ROSA_RUN, "--out", "stopped", "--max-steps", 2)
    Path("stopped/summary.json").unlink()
    run(train, *SHORT_ROSA_RUN, "--out", "nothing", "--max-steps", 1, "--lr", 1e-30)
    capsys.readouterr()
    compare.run(["stopped", "nothing"])
    *_, stopped, nothing = capsys.readouterr().out.splitlines()
    before = f"{read_validations('nothing')[0]:.4f}"
    assert (
        "| toy, 2 steps of 8 | – | not finished |" in stopped
        and f"| {before} → {before} (untrained) |" in nothing
    )


@pytest.mark.slow
def test_an_adapter_of_a_run_that_was_stopped_or_has_learned_nothing_is_used_with_a_line(
    ckpt, capsys
):
    for out, more in (("whole", []), ("nothing", ["--max-steps", 1, "--lr", 1e-30])):
        run(train, *SHORT_ROSA_RUN, "--out", out, *more)
    shutil.copytree("whole", "stopped")
    Path("stopped/summary.json").unlink()
    best = best_step("stopped")
    assert best > 0
    expected = {
        "whole": "",
        "nothing": "untrained  nothing: no step",
        "stopped": f"best so far, of step {best}\n",
    }
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    for out, line in expected.items():
        for script, more in (
            (eval_script, "--limit 1 --max-new-tokens 1"),
            (merge, f"--out merged-{out}"),
            (forgetting, "other.json"),
        ):
            capsys.readouterr()
            script.run(f"{more} --ckpt ckpt --adapter {out}".split())
            shown = capsys.readouterr().out
            assert line in shown and (line or not re.search("unfinished|untrained", shown))


def test_forgetting_warns_and_refuses_before_its_work(ckpt, monkeypatch, capsys):
    run(train, *SHORT_ROSA_RUN, "--out", "stopped", "--max-steps", 1)
    Path("stopped/summary.json").unlink()
    Path("other.json").write_text(json.dumps(toy.examples("train", 2)))
    Path("file").write_text("")

    def refused(arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            forgetting.run(f"other.json --ckpt ckpt {arguments}".split())
        return capsys.readouterr()

    def work(*_):
        raise UserError("this is the work")

    monkeypatch.setattr(forgetting, "mean_loss", work)
    monkeypatch.setattr(forgetting, "say_if_bfloat16_is_slow", lambda *_: print("it is slow"))
    shown = refused("--adapter stopped")
    assert shown.err == "forgetting: this is the work\n"
    assert "it is slow\nunfinished stopped: its run has not ended" in shown.out
    assert refused("--adapter ckpt").err.startswith("forgetting: ckpt is no adapter directory")
    assert refused("--out file").err == "forgetting: file: File exists\n"

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert refused("--out out").err == "forgetting: out: Read-only file system\n"


def test_a_run_of_an_earlier_format_is_read_as_one_of_today(ckpt, capsys):
    """Before format 4 a validation stood in the line of its step."""
    run(train, *SHORT_ROSA_RUN, "--out", "now")
    shutil.copytree("now", "before")
    steps = {}
    for record in read_log("now"):
        steps.setdefault(record["step"], {}).update(record)
    lines = [json.dumps(record) + "\n" for record in steps.values()]
    Path("before/log.jsonl").write_text("".join(lines))
    assert records.best_step(Path("before")) == best_step("now") > 0
    for unfinished in (False, True):
        if unfinished:
            Path("now/summary.json").unlink()
            Path("before/summary.json").unlink()
        capsys.readouterr()
        compare.run(["now", "before"])
        *_, now, before = capsys.readouterr().out.splitlines()
        assert now == before.replace("| before |", "| now |")
        assert ("| toy, 6 steps of 8 |" in now) and ("| not finished |" in now) == unfinished
        records.say_if_unfinished(Path("now"))
        records.say_if_unfinished(Path("before"))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 * unfinished
    assert lines[0] == lines[1].replace(" before:", " now:")


@pytest.mark.parametrize("how", ["trained anew", "of an earlier version"])
def test_a_result_of_another_adapter_is_not_shown(ckpt, capsys, how):
    run(train, *SHORT_ROSA_RUN, "--max-steps", 2, "--out", "a")
    run(eval_script, *"--ckpt ckpt --limit 8 --max-new-tokens 5 --adapter a".split())
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--adapter", "a"])
    capsys.readouterr()
    compare.run(["a"])
    assert "toy (n = 8)" in (shown := capsys.readouterr().out) and "loss on other" in shown
    if how == "trained anew":
        run(train, *SHORT_ROSA_RUN, "--max-steps", 2, "--out", "a", "--overwrite", "--seed", 1)
    else:
        results = json.loads(Path("a/results.json").read_text())
        Path("a/results.json").write_text(
            json.dumps({key: x for key, x in results.items() if key != "adapter"})
        )
        Path("a/losses.json").write_text('{"other": 1.5}')
    capsys.readouterr()
    compare.run(["a"])
    shown = capsys.readouterr().out
    assert (
        "toy (n = 8)" not in shown and "loss on other" not in shown and "validation loss" in shown
    )
    removed = not Path("a/results.json").exists() and not Path("a/predictions.jsonl").exists()
    assert removed == (how == "trained anew") == (not Path("a/losses.json").exists())
    assert (
        removed or "a/results.json is not shown" in shown and "a/losses.json is not shown" in shown
    )


# --- what the scripts say ---


@pytest.mark.slow
def test_where_the_screen_is_not_in_utf_8_what_it_lacks_is_replaced(ckpt, monkeypatch):
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a")
    monkeypatch.setattr(
        inference, "generate", lambda *given, on_token: [on_token(0, [0xF0, 0x9F])] and [[]]
    )
    monkeypatch.setattr(SentencePieceTokenizer, "decode", lambda self, ids: "\N{HOT SPRINGS} hot")
    # compare prints an arrow between two losses, eval.py the answer to a prompt
    for call, shown in ((compare.run, b" ? "), (eval_script.run, b"? hot")):
        screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", screen)
        call(["a"] if call is compare.run else ["--prompt", "a"])
        screen.flush()
        assert shown in screen.buffer.getvalue()


CLOSED = ["2>&-", ">&-", ">&- 2>&-"]


@functools.cache
def start_shells():
    """Have a shell start a run of one step on few examples, once with each of these streams closed
    and once with a full disk as its output. Returns, for each, the directory in which it runs and
    the process: both must be held for as long as they are needed."""
    options = "--ckpt ckpt --max-len 200 --train-file few.json --val-size 1 --max-steps 1 --out a"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {}
    for streams in [*CLOSED, "> /dev/full"]:
        directory = tempfile.TemporaryDirectory()
        write_tiny_checkpoint(Path(directory.name, "ckpt"))
        Path(directory.name, "few.json").write_text(json.dumps(toy.examples("train", 4)))
        process = subprocess.Popen(
            f"{sys.executable} {ROOT}/train.py {options} {streams}",
            shell=True,
            cwd=directory.name,
            stdin=subprocess.DEVNULL,
            **pipes,
        )
        started[streams] = directory, process
    return started


@pytest.mark.ahead(start=start_shells)
@pytest.mark.parametrize("closed", CLOSED)
def test_a_stream_that_the_shell_has_closed_is_not_missed(closed):
    """Without it the first file that is opened would get the number of that stream."""
    directory, process = start_shells()[closed]
    out, error = process.communicate()
    assert process.returncode == 0 and not re.search("[Ee]rror", out + error)
    assert ("best validation loss" in out) == (closed == "2>&-")
    assert [line["step"] for line in read_log(Path(directory.name, "a"))] == [0, 1, 1]


@pytest.mark.ahead(start=start_shells)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_where_the_disk_of_the_output_is_full_a_line_says_so():
    _, process = start_shells()["> /dev/full"]
    _, error = process.communicate()
    assert process.returncode == 1 and "Traceback" not in error
    assert "train.py: what it prints: No space left on device. To resume: " in error


def test_two_files_of_one_name_have_a_loss_each(ckpt):
    Path("a.json").write_text(json.dumps(toy.examples("train", 2)))
    Path("a.txt").write_text("It is what it is.")
    forgetting.run("a.json a.txt --ckpt ckpt --out out --limit 1".split())
    assert json.loads(Path("out/losses.json").read_text())["losses"].keys() == {"a.json", "a.txt"}


def test_the_parent_directory_as_a_checkpoint_gives_a_run_its_name(ckpt, monkeypatch):
    Path("ckpt/inner").mkdir()
    monkeypatch.chdir("ckpt/inner")
    assert train.parse_args(["--ckpt", ".."]).out == Path("runs/ckpt-toy-rosa")
    assert eval_script.parse_args(["--ckpt", ".."]).out == Path("runs/ckpt-toy-base")


VALUES = {
    "count": (["1", "99"], ["0", "-1", "1.5", "x"]),
    "fraction": (["1", "1e-9"], ["0", "1.01", "nan"]),
}
VALUES |= {
    "positive": (["1e-9", "7"], ["0", "-1", "inf", "nan"]),
    "seed": (["0", "4294967295"], ["-1", "4294967296"]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_what_an_option_takes(kind):
    right, wrong = VALUES[kind]
    assert [vars(commands)[kind](text) for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=f", not {text}$"):
            vars(commands)[kind](text)


def test_the_directory_that_one_is_in_has_a_name(ckpt, monkeypatch):
    monkeypatch.chdir("ckpt")
    for script in (train, eval_script):
        assert script.parse_args(["--ckpt", "."]).out.name.startswith("ckpt-toy-")


def help_text(script, option, capsys):
    """What a script prints with --help or the like, and its parser."""
    parsers, parse = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(
            argparse.ArgumentParser,
            "parse_args",
            lambda self, *a: (parsers.append(self), parse(self, *a)),
        )
        script.parse_args([option])
    assert stopped.value.code == 0
    return capsys.readouterr().out, parsers[0]


@pytest.mark.parametrize("script", [train, eval_script])
@pytest.mark.parametrize("columns", ["60", "500"])
def test_help_fits_on_a_screen_and_help_all_shows_every_option(
    script, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)  # of the terminal
    (short, _), (dash, _), (long, parser) = (
        help_text(script, each, capsys) for each in ("--help", "-h", "--help-all")
    )
    lines, name = short.splitlines(), Path(script.__file__).name
    assert short == dash and len(lines) <= 40 and max(map(len, lines)) <= 100
    assert any(line.strip().startswith(f"python {name} --ckpt ") for line in lines)  # an example
    assert {"tiny", *NAMES} <= set(short.replace(",", " ").split())
    words = set(long.replace(",", " ").split())
    options = {option for action in parser._actions for option in action.option_strings}
    assert (
        options <= words
        and {f"--{option.replace('_', '-')}" for option in vars(script.parse_args([]))} <= words
    )
    assert options - set(short.replace(",", " ").split()) >= {"--plain", "--device", "--dtype"}
    assert all(action.help for action in parser._actions) and "None" not in long
    for action in parser._actions:  # defaults are said, once
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            assert " ".join(f"{action.help} (default: {action.default})".split()) in " ".join(
                long.split()
            )
    assert "default: 64) (default" not in " ".join(long.split()) and long.count("(default: ") > 9


def test_an_absent_package_is_a_line_with_what_to_install(ckpt, monkeypatch, capsys):
    no_package(monkeypatch, "peft")
    with pytest.raises(SystemExit) as stopped:
        train.run("--ckpt ckpt --max-len 200 --val-size 20 --method peft:IA3".split())
    assert (
        stopped.value.code == 2
        and "needs the package peft: pip install peft" in capsys.readouterr().err
    )


LEFT = [
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": ""},
    {"RANK": "1"},
    {"RANK": ""},
    {"RANK": "x", "WORLD_SIZE": "1"},
]
# A rank that cannot be: the fourth of two processes
LEFT += [dict(zip(distributed.LAUNCHER, ("3", "0", "2", "localhost", "1")))]
CALLS = {
    train: "--ckpt ckpt",
    eval_script: "--ckpt ckpt --limit 1",
    compare: "a",
    merge: "--ckpt a --adapter b --out c",
}
CALLS |= {figure1: "a.png", forgetting: "a.txt", make_tiny: "made"}


@pytest.mark.parametrize("left", LEFT, ids=str)
def test_what_a_launcher_left_in_the_environment_is_one_line(ckpt, monkeypatch, capsys, left):
    for script, arguments in CALLS.items():
        with monkeypatch.context() as patch:
            for name, value in left.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as stopped:
                script.run(arguments.split())
            # A process that goes on is one without a launcher
            assert not set(left) & set(os.environ)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1, error
        assert "the environment has " in error and f"unset {' '.join(left)}" in error
    assert sorted(path.name for path in Path().iterdir()) == ["ckpt"]


COMMANDS = {
    "no checkpoint 'absent'": "eval.py --ckpt absent",
    "--ckpt, --adapter, --out": "-m extras.merge",
}


@functools.cache
def start_scripts():
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *command.split()], **pipes)
        for command in COMMANDS.values()
    ]


@pytest.mark.ahead(start=start_scripts)
def test_the_scripts_run_as_scripts():
    """test_distributed.py runs train.py as a script, under torchrun."""
    for message, process in zip(COMMANDS, start_scripts()):
        out, error = process.communicate()
        assert process.returncode == 2 and out == "" and error.count("\n") == 1 and message in error
