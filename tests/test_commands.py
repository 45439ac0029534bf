"""Statements about the commands of extras/, about help texts, and about what the scripts say."""

import argparse
import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, no_package, read_log, run
from rounding import assert_close, near, of_model

import eval as eval_script
import train
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import compare, figure1, forgetting
from extras.checkpoints import NAMES
from model import Llama

pytestmark = pytest.mark.numeric


def test_the_loss_on_anything_else(ckpt):
    Path("other.json").write_text(json.dumps(toy.examples("train", 12)))
    sentences = [f"{name} has {n} pears, and no more.\n" for n, name in enumerate(toy.GIRLS * 3)]
    Path("notes.txt").write_text("".join(sentences))
    forgetting.run("other.json notes.txt --ckpt ckpt --limit 10 --out out --dtype float32".split())
    losses = json.loads(Path("out/losses.json").read_text())["losses"]
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    pairs = [tasks.encode_example(example, tokenizer) for example in toy.examples("train", 10)]
    ids = tokenizer.encode("".join(sentences))
    parts = [[tokenizer.bos_id, *ids[i : i + 256]] for i in range(0, len(ids), 256)]
    with torch.no_grad():
        examples = model.loss(*train.collate(pairs, "cpu")).item()
        text = sum(model.loss(torch.tensor([part[:-1]]), torch.tensor([part[1:]])).item() for part in parts)
    rounding = of_model(model.config)
    assert losses["other"] == near(examples / sum(len(response) for _, response in pairs), **rounding)
    assert len(parts) > 2 and losses["notes"] == near(text / len(ids), **rounding)
    for folder in "ab":
        Path(folder).mkdir()
        shutil.copy("other.json", folder)
        forgetting.run(f"{folder}/other.json --ckpt ckpt --limit 3 --out out --dtype float32".split())
    assert set(json.loads(Path("out/losses.json").read_text())["losses"]) == {"other", "notes", "a/other", "b/other"}


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
                states = model.model.layers[0].self_attn.get_submodule(f"{name}_proj")(h)[0]  # [T, heads * d]
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
    run(train, *QUICK, "--out", "runs/a")
    run(train, *QUICK, "--out", "runs/b", "--method", "lora")
    for out, adapter in (("runs/a", ["--adapter", "runs/a"]), ("runs/base", [])):
        run(eval_script, "--ckpt", "ckpt", "--limit", 8, "--max-new-tokens", 5, "--out", out, *adapter)
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
    assert b["validation loss"] == f"{read_log('runs/b')[0]['val_loss']:.4f} → {summary['val_loss']:.4f}"
    share = 100 * summary["trainable"] / summary["parameters"]
    assert b["trainable"] == f"{summary['trainable']:,} ({share:.2f}%)" and b["toy (n = 8)"] == "–"
    settings = "rosa, targets q,k, rank 4, alpha 8.0, low freq ratio 0.5, pairs low, k ratio 0.5"
    assert a["method"].startswith(settings) and b["peak memory"] == f"{summary['peak_memory'] / 2**20:,.0f} MiB"
    assert a["toy (n = 8)"].startswith("0.0% (0.0–32.4)")
    assert (base["method"], base["tokens/s"]) == ("base", "–") and float(base["loss on other"]) > 1


@pytest.mark.parametrize("how", ["trained anew", "of an earlier version"])
def test_a_result_of_another_adapter_is_not_shown(ckpt, capsys, how):
    run(train, *QUICK, "--max-steps", 2, "--out", "a")
    run(eval_script, *"--ckpt ckpt --limit 8 --max-new-tokens 5 --adapter a".split())
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--adapter", "a"])
    capsys.readouterr()
    compare.run(["a"])
    assert "toy (n = 8)" in (shown := capsys.readouterr().out) and "loss on other" in shown
    if how == "trained anew":
        run(train, *QUICK, "--max-steps", 2, "--out", "a", "--overwrite", "--seed", 1)
    else:
        results = json.loads(Path("a/results.json").read_text())
        Path("a/results.json").write_text(json.dumps({key: x for key, x in results.items() if key != "adapter"}))
        Path("a/losses.json").write_text('{"other": 1.5}')
    capsys.readouterr()
    compare.run(["a"])
    shown = capsys.readouterr().out
    assert "toy (n = 8)" not in shown and "loss on other" not in shown and "validation loss" in shown
    assert "a/results.json is not shown" in shown and "a/losses.json is not shown" in shown


# --- what the scripts say ---


def test_where_the_screen_is_not_in_utf_8_what_it_lacks_is_replaced(ckpt, monkeypatch):
    run(train, *QUICK, "--max-steps", 1, "--out", "a")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    compare.run(["a"])
    screen.flush()
    assert b" ? " in screen.buffer.getvalue()  # the arrow between two losses


def test_the_directory_that_one_is_in_has_a_name(ckpt, monkeypatch):
    monkeypatch.chdir("ckpt")
    for script in (train, eval_script):
        assert script.parse_args(["--ckpt", "."]).out.name.startswith("ckpt-toy-")


def help_text(script, option, capsys):
    """What a script prints, and its parser."""
    parsers, parse = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: (parsers.append(self), parse(self, *a)))
        script.parse_args([option])
    assert stopped.value.code == 0
    return capsys.readouterr().out, parsers[0]


@pytest.mark.parametrize("script", [train, eval_script])
@pytest.mark.parametrize("columns", ["60", "500"])
def test_help_fits_on_a_screen_and_help_all_shows_every_option(script, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)  # of the terminal
    (short, _), (dash, _), (long, parser) = (help_text(script, each, capsys) for each in ("--help", "-h", "--help-all"))
    lines, name = short.splitlines(), Path(script.__file__).name
    assert short == dash and len(lines) <= 40 and max(map(len, lines)) <= 100
    assert any(line.strip().startswith(f"python {name} --ckpt ") for line in lines)  # an example
    assert {"tiny", *NAMES} <= set(short.replace(",", " ").split())
    words = set(long.replace(",", " ").split())
    options = {option for action in parser._actions for option in action.option_strings}
    assert options <= words and {f"--{option.replace('_', '-')}" for option in vars(script.parse_args([]))} <= words
    assert options - set(short.replace(",", " ").split()) >= {"--plain", "--device", "--dtype"}
    assert all(action.help for action in parser._actions)


def test_an_absent_package_is_a_line_with_what_to_install(ckpt, monkeypatch, capsys):
    no_package(monkeypatch, "peft")
    with pytest.raises(SystemExit) as stopped:
        train.run("--ckpt ckpt --max-len 200 --val-size 20 --method peft:IA3".split())
    assert stopped.value.code == 2 and "needs the package peft: pip install peft" in capsys.readouterr().err


COMMANDS = {"no checkpoint 'absent'": "eval.py --ckpt absent", "--ckpt, --adapter, --out": "-m extras.merge"}
COMMANDS |= {"python -m extras.merge": "rosa.py merge"}  # which was the command


@functools.cache
def start_scripts():
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, *command.split()], **pipes) for command in COMMANDS.values()]


@pytest.mark.ahead(start=start_scripts)
def test_the_scripts_run_as_scripts():
    """train.py is one in test_torchrun."""
    for message, process in zip(COMMANDS, start_scripts()):
        out, error = process.communicate()
        assert process.returncode == 2 and out == "" and error.count("\n") == 1 and message in error
