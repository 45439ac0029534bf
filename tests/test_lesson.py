"""Statements about the notebook of extras/lesson: its code runs as a script, and what its text says
is so."""

import json
import os
import re
import runpy

import numpy as np
import pytest
from helpers import ROOT

LESSON = ROOT / "extras" / "lesson"
CELLS = json.loads((LESSON / "lesson.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_its_outputs_are_saved_in_order_and_tell_of_no_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        source = "".join(cell["source"])
        if (
            "plt.show()" in source
            and "def show" not in source
            or re.search(r"^print\(", source, re.M)
        ):
            assert cell["outputs"], source
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    text = json.dumps(CELLS)
    assert not re.search(r"/(tmp|root|home|Users|work)/|Warning", text) and len(text) < 900_000


def test_the_norms_that_are_kept_are_those_that_the_text_speaks_of():
    kept = np.load(LESSON / "norms.npz")
    assert kept["smollm2"].shape == (30, 64) and kept["theta100"].shape == kept[
        "theta10000"
    ].shape == (6, 32)
    pairs = {
        name: np.sqrt(x[:, : x.shape[1] // 2] ** 2 + x[:, x.shape[1] // 2 :] ** 2).mean(0)
        for name, x in kept.items()
        if x.ndim > 1
    }
    fast, *_, slow = [part.mean() for part in np.array_split(pairs["smollm2"], 4)]
    assert 1.5 < slow / fast < 2.2  # "nearly doubles", in README.md too
    assert set(np.argsort(pairs["smollm2"])[-2:]) == {23, 24}
    assert kept["smollm2_rises"].argmax() == 3
    # Level, and falling to half
    for name, shares in (("theta100", (0.85, 1.15)), ("theta10000", (0.4, 0.65))):
        quarters = [part.mean() for part in np.array_split(pairs[name], 4)]
        assert shares[0] < quarters[3] / quarters[0] < shares[1]
    assert kept["theta100_rises"][3] > 0.1 > 0.05 > kept["theta10000_rises"][3]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_what_it_says(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # the numbers that are kept
    monkeypatch.chdir(LESSON)
    (tmp_path / "lesson.py").write_text("\n\n".join("".join(cell["source"]) for cell in CODE))
    found = runpy.run_path(str(tmp_path / "lesson.py"))
    assert os.getcwd() == str(ROOT)
    tiny = [part.mean() for part in np.array_split(found["norms"]["tiny"].mean(0), 4)]
    assert (
        tiny[0] > 1.2 * tiny[3] and found["difference"] < 1e-4 and found["merge_difference"] < 1e-3
    )
    assert max(found["rises"]["tiny"][2:]) < 0.2 * min(found["rises"]["tiny"][:2])
    assert found["strip"].sum(1).tolist()[1:] == [3] * 159 and found["strip"].any(0).sum() > 3
    assert found["losses"][-1] < 0.2 * found["losses"][0]
    assert found["curves"]["all layers (k_ratio 1)"][-1] < 0.6 * found["losses"][-1]
    assert found["accuracy"]["before"] < 0.1 and found["accuracy"]["after"] > 0.5
