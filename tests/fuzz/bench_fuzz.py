"""Mutate files by the thousand: each must be refused in a line or read rightly.

python tests/fuzz/bench_fuzz.py [CASES [SEED]]"""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import fuzz  # noqa: E402 - beside this file

cases, seed = map(int, [*sys.argv[1:], *("5000", "0")[len(sys.argv) - 1 :]])
with tempfile.TemporaryDirectory() as directory:
    for kind, count in fuzz.run(range(cases), seed, Path(directory)).items():
        print(
            f"{kind:<20}{count['cases']:>7} cases, {count['refused']} refused, "
            f"{count['accepted']} read rightly"
        )
