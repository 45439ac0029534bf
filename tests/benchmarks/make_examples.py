"""Make the file of examples that the comparisons in tests/README.md train on, from two test sets
that data/download.py fetches: the problems of GSM8K and SVAMP whose worked answers are right.

    python data/download.py arithmetic
    python tests/benchmarks/make_examples.py examples.json [--data-dir LLM-Adapters]

LLM-Adapters' test sets hold an answer of a language model to each problem. Where its number is the
right one, problem and answer become an example, of 1,574 in all. The comparisons look at the loss
on held-out examples. These are test problems: after training on them an accuracy on GSM8K or SVAMP
says nothing."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import tasks


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="the file to write")
    parser.add_argument("--data-dir", default=tasks.DATA_DIR, help="where download.py has put them")
    return parser.parse_args(arguments)


def main(args):
    examples = []
    for name in ("gsm8k", "SVAMP"):
        path = Path(args.data_dir) / "dataset" / name / "test.json"
        if not path.is_file():
            sys.exit(f"{path} is missing: python data/download.py arithmetic --dir {args.data_dir}")
        for record in json.loads(path.read_text(encoding="utf-8")):
            if tasks.is_correct(name, record["output"], record["answer"]):
                response = record["output"].strip().removeprefix("A:").strip()
                examples.append({"instruction": record["instruction"], "output": response})
    args.file.write_text(json.dumps(examples, indent=1) + "\n")
    print(f"{len(examples):,} examples in {args.file}")


if __name__ == "__main__":
    main(parse_args())
