"""Statements about the page extras/lesson/rope.html: it is one small file that needs nothing from
outside, its formulas are the project's, and what its text says of SmolLM2 and of its own presets is
so. No browser is needed; what node can say is asked where there is node."""

import inspect
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import ROOT

import rosa
from model import LlamaConfig, rope_inverse_frequencies

LESSON = ROOT / "extras" / "lesson"
PAGE = (LESSON / "rope.html").read_text(encoding="utf-8")
FORMULAS, DRAWING = re.findall(r"<script>(.*?)</script>", PAGE, re.S)
PRESETS = [  # the label of a button, its theta, its tokens
    (label, int(theta), int(tokens))
    for theta, tokens, label in re.findall(
        r'data-state="theta=(\d+)&amp;tokens=(\d+)">(.*?)</button>', PAGE
    )
]


def frequencies(theta):
    """The project's own, of a head like the page's: 64 dimensions."""
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        rope_theta=theta,
    )
    return rope_inverse_frequencies(config)


def slow_pairs(theta, tokens):
    """The pairs that make less than half a turn over so many tokens."""
    return (tokens * frequencies(theta) < math.pi).nonzero().flatten().tolist()


def test_it_is_one_small_file_that_loads_nothing():
    assert len(PAGE.encode()) < 20_000
    fetches = r"://|\bsrc\s*=|<link|@import|url\(|\bimport\b|\bfetch\(|XMLHttpRequest|WebSocket"
    assert not re.search(fetches, PAGE)
    assert "innerHTML" not in PAGE  # what stands behind the # of an address is never markup


def test_what_its_code_asks_for_is_there():
    """With ids of the page, and a label and a number for each slider."""
    ids = re.findall(r'\bid="([\w-]+)"', PAGE)
    assert len(ids) == len(set(ids))
    asked = re.findall(r"(?:byId|setText|setSlider)\('([\w-]+)'", DRAWING)
    asked += re.findall(r"\['([\w-]+)', (?:slow|fast|\[)", DRAWING)  # the lines of picture 2
    assert len(asked) > 15 and set(asked) <= set(ids)
    sliders = re.findall(r'<input type="range" id="(\w+)"', PAGE)
    assert sliders == ["theta", "tokens", "share"]
    for slider in sliders:
        assert f'<label for="{slider}">' in PAGE and f"{slider}-value" in ids


def test_it_starts_with_the_models_numbers_and_the_projects_share():
    share = inspect.signature(rosa.attach).parameters["low_freq_ratio"].default
    start = f"theta: 100000, tokens: 8192, share: {share}, pair: 23 }}"
    assert start in DRAWING and PRESETS[1][1:] == (100000, 8192)
    norms = np.load(LESSON / "measured.npz")["smollm2_norms"]  # [layers, d/2]
    assert f"const HEAD_DIM = {2 * norms.shape[1]};" in FORMULAS
    assert norms.mean(0).argmax() == 23  # "SmolLM2's largest"


def test_its_presets_are_the_notebooks_and_say_their_numbers():
    notebook = json.loads((LESSON / "lesson.ipynb").read_text(encoding="utf-8"))
    code = "".join("".join(cell["source"]) for cell in notebook["cells"])
    for label, theta, tokens in PRESETS:
        assert label.endswith(f"theta {theta:,}, {tokens:,} tokens")
    for name, (label, theta, tokens) in zip(("tiny", "SmolLM2-135M"), PRESETS):
        assert name.startswith(label.split(":")[0])
        assert f'"{name}": ({theta:_}, {tokens})' in code
    assert json.loads((ROOT / "data/tiny/config.json").read_text())["head_dim"] == 32
    assert "heads of <i>tiny</i> have <i>d</i> = 32" in PAGE


def test_its_caption_counts_right():
    tiny, smollm2, theta100 = (slow_pairs(float(theta), tokens) for _, theta, tokens in PRESETS)
    assert "ten clocks are filled, 22 to 31" in PAGE and smollm2 == list(range(22, 32))
    assert re.search(r"256 tokens half of the\s+clocks are filled", PAGE) and len(tiny) == 16
    assert "with theta 100 only the last is" in PAGE and theta100 == [31]
    assert "pair 23: a third of a turn" in PAGE
    assert 8192 * frequencies(100000.0)[23] / (2 * math.pi) == pytest.approx(1 / 3, abs=0.01)
    for share, pair_23_is_in in ((0.25, False), (0.30, True)):
        assert (23 in rosa.adapted_rows(64, 1, share)) == pair_23_is_in


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_its_formulas_are_those_of_the_project():
    # Beside the steps of a slider: shares that tie, 8.5 and 9.5 pairs, and one of less than a pair
    shares = [step / 20 for step in range(1, 21)] + [17 / 64, 19 / 64, 0.01]
    thetas = [10.0, 100.0, 10000.0, 100000.0, 500000.0, 1000000.0]
    print_all = f"""
    const pairs = Array.from({{ length: PAIRS }}, (_, i) => i);
    console.log(JSON.stringify({{
      pairs: {shares}.map(adaptedPairs),
      rows: {shares}.map(adaptedRows),
      frequencies: {thetas}.map((theta) => pairs.map((i) => frequency(i, theta))),
      product: meanProduct(pairs, 10000, 7),
    }}));"""
    run = subprocess.run(
        ["node", "-"], input=FORMULAS + print_all, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    page = json.loads(run.stdout)
    for share, pairs, rows in zip(shares, page["pairs"], page["rows"]):
        assert rows == rosa.adapted_rows(64, 1, share).tolist(), share
        assert pairs == rows[: len(rows) // 2], share
    for theta, own in zip(thetas, page["frequencies"]):
        torch.testing.assert_close(torch.tensor(own), frequencies(theta), rtol=2e-6, atol=0)
    assert page["product"] == pytest.approx(
        (7 * frequencies(10000.0)).cos().mean().item(), abs=1e-6
    )
