"""Mutated files by the thousand: each is refused in a line or read rightly.

python tests/fuzz/bench_fuzz.py [--cases 5000] [--seed 0]
python tests/fuzz/bench_fuzz.py --seed 0 --case 1234          # one of them again
"""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import fuzz  # noqa: E402 - beside this file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"cases": 5000, "seed": 0, "case": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = fuzz.run(range(args.cases) if args.case is None else [args.case], args.seed, Path(directory))
    for kind, count in counts.items():
        print(f"{kind:<20}{count['cases']:>7} cases, {count['refused']} refused, {count['accepted']} read rightly")


if __name__ == "__main__":
    main()
