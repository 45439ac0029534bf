"""Mutated files by the thousand: each is refused in a line or read rightly.

python tests/fuzz/bench_fuzz.py [--cases 5000] [--seed 0]
python tests/fuzz/bench_fuzz.py --seed 0 --case 1234          # one of them again
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import fuzz  # noqa: E402 - beside this file


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=5000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides them (default: %(default)s)")
    parser.add_argument("--case", type=int, help="only the one of this number")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        try:
            counts = fuzz.run(range(args.cases) if args.case is None else [args.case], args.seed, Path(directory))
        except fuzz.Bad as error:
            sys.exit(f"bad outcome: {error}")
    print(f"{'file':<20}{'cases':>7}{'refused':>9}{'accepted and correct':>22}")
    for kind, count in counts.items():
        print(f"{kind:<20}{count['cases']:>7,}{count['refused']:>9,}{count['accepted']:>22,}")
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
