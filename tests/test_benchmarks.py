"""Statements about `tests/benchmarks/`: what it measures on large models runs on a small one."""

import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow
OF_BUNDLED = {
    "bench_kernels.py": "--rounds 2 --batch-size 2 --prompts 2 --max-new-tokens 2",
    "bench_train.py": "--rounds 1 --steps 4 --batch-size 2 --dtype float32 --rows RoSA",
    "bench_generate.py": "--rounds 1 --limit 4 --max-new-tokens 2 --dtype float32 --rows generate",
}


def table(script, *options):
    """The rows of the tables that a benchmark prints: name -> cells."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / script, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {name: cells for name, *cells in rows}, result.stdout


@pytest.mark.parametrize("script", OF_BUNDLED)
def test_a_benchmark_prints_its_table(script):
    rows, _ = table(script, *OF_BUNDLED[script].split())
    assert len(rows) > 1 and all(cells[1] for cells in rows.values())  # cells[0] is the dtype


def test_the_benchmark_for_a_gpu_runs_on_a_cpu():
    """Our rows, with a small model. Those of transformers and peft are empty where the packages are
    not installed."""
    options = "--device cpu --shape small --steps 4 --batch-size 4 --generation 1,32 --skip-tests"
    rows, shown = table("bench_gpu.py", *options.split(), "--rows", "RoSA; RoSA --plain")
    for name in ("RoSA", "RoSA --plain", "RoSA, 1 rows", "RoSA, 32 rows"):
        assert float(rows[name][1].replace(",", "")) > 0, shown
