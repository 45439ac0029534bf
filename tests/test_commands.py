"""Statements about the commands of extras/, and about what the scripts say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, no_package, read_log, run
from rounding import assert_close, near, of_model

import eval as eval_script
import train as train_script
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import compare, figure1, forgetting
from extras.checkpoints import NAMES
from model import Llama

pytestmark = pytest.mark.numeric
ROOT = Path(train_script.__file__).parent


def test_the_loss_on_anything_else(ckpt, capsys):
    Path("other.json").write_text(json.dumps(toy.examples("train", 12)))
    Path("notes.txt").write_text(
        "".join(f"{name} has {n} pears, and no more.\n" for n, name in enumerate(toy.GIRLS * 3))
    )
    forgetting.run(["other.json", "notes.txt", "--ckpt", "ckpt", "--limit", "10", "--out", "out", "--dtype", "float32"])
    losses = json.loads(Path("out/losses.json").read_text())
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    pairs = [tasks.encode_example(example, tokenizer) for example in toy.examples("train", 10)]
    tokens, labels = train_script.collate(pairs, "cpu")
    with torch.no_grad():
        assert losses["other"] == near(
            model.loss(tokens, labels).item() / sum(len(r) for _, r in pairs), **of_model(model.config)
        )
        ids = tokenizer.encode(Path("notes.txt").read_text())
        parts = [[tokenizer.bos_id, *ids[i : i + 256]] for i in range(0, len(ids), 256)]
        total = sum(model.loss(torch.tensor([part[:-1]]), torch.tensor([part[1:]])).item() for part in parts)
    assert len(parts) > 2 and losses["notes"] == near(total / len(ids), **of_model(model.config))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--limit", "3", "--out", "out"])
    assert set(json.loads(Path("out/losses.json").read_text())) == {"other", "notes"}


def test_activations_are_the_norms_of_q_and_k(ckpt, monkeypatch, capsys):
    figure1.run(["figures/fig1.png", "--ckpt", "ckpt", "--limit", "5", "--dtype", "float32"])
    found = np.load("figures/fig1.npz")
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
        assert found[name].shape == (4, d)
        assert_close(found[name][0], expected[name], **of_model(model.config))
    assert found["first_low_frequency_pair"] == d // 2 - max(1, round(0.5 * d / 2))
    assert "by quarter of the pairs" in capsys.readouterr().out
    no_package(monkeypatch, "matplotlib")
    figure1.run(["other.png", "--ckpt", "ckpt"])
    assert (
        "pip install matplotlib" in capsys.readouterr().out
        and Path("other.npz").is_file()
        and not Path("other.png").exists()
    )


def test_runs_side_by_side(ckpt, capsys):
    run(train_script, *QUICK, "--out", "runs/a")
    run(train_script, *QUICK, "--out", "runs/b", "--method", "lora")
    for out, adapter in (("runs/a", ["--adapter", "runs/a"]), ("runs/base", [])):
        run(eval_script, "--ckpt", "ckpt", "--limit", 8, "--max-new-tokens", 5, "--out", out, *adapter)
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--out", "runs/base"])
    capsys.readouterr()
    compare.run(["runs/base", "runs/a", "runs/b"])
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    ]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(rows) == ["base", "a", "b"] and set(rule) == {"---"}
    summary = json.loads(Path("runs/b/summary.json").read_text())
    assert (
        rows["b"]["validation loss"] == f"{read_log('runs/b')[0]['val_loss']:.4f} → {summary['val_loss']:.4f}"
        and rows["b"]["toy (n = 8)"] == "–"
    )
    assert (
        rows["b"]["trainable"]
        == f"{summary['trainable']:,} ({100 * summary['trainable'] / summary['parameters']:.2f}%)"
    )
    assert rows["a"]["method"].startswith(
        "rosa, targets q,k, rank 4, alpha 8.0, low freq ratio 0.5, pairs low, k ratio 0.5"
    )
    assert rows["a"]["toy (n = 8)"].startswith("0.0% (0.0–32.4)") and rows["a"]["peak memory"].endswith("MiB")
    assert (
        rows["base"]["method"] == "base"
        and rows["base"]["tokens/s"] == "–"
        and float(rows["base"]["loss on other"]) > 1
    )


@pytest.mark.parametrize("script", [train_script, eval_script])
def test_help_shows_the_names_that_are_known(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # unwrapped
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert stopped.value.code == 0 and {"tiny", "llama2-7b", "qwen2.5-7b", *NAMES} <= set(words)


def test_an_absent_package_is_a_line_with_what_to_install(ckpt, monkeypatch, capsys):
    no_package(monkeypatch, "peft")
    with pytest.raises(SystemExit) as stopped:
        train_script.run(["--ckpt", "ckpt", "--max-len", "200", "--val-size", "20", "--method", "peft:IA3"])
    assert stopped.value.code == 2 and "needs the package peft: pip install peft" in capsys.readouterr().err


def test_the_scripts_run_as_scripts(ckpt):
    """eval.py, and a command of extras/; train.py is one in test_torchrun. And rosa.py, which was one."""
    commands = {
        "no checkpoint 'absent'": ["eval.py", "--ckpt", "absent"],
        "--out": ["-m", "extras.merge"],
        "python -m extras.merge": ["rosa.py", "merge"],
    }
    started = {
        said: subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for said, command in commands.items()
    }
    for said, process in started.items():
        out, error = process.communicate()
        assert process.returncode == 2 and out == "" and error.count("\n") == 1 and said in error
