"""Arithmetic word problems from templates, in the JSON format of the real benchmarks: a task that
needs no download.

    {"instruction":
         "Anna has 7 shells. She finds 5 more shells. How many shells does Anna have now?",
     "input": "", "output": "7 + 5 = 12. The answer is 12.", "answer": "12"}

Train and test are disjoint in the strong sense: a kind of problem with certain numbers ("gain", 7,
5) belongs to one of the two for ever, whatever the seed and whoever owns the shells.

    python data/toy.py train 2000 > train.json
"""

import json
import random
import sys
import zlib

GIRLS = (
    "Anna Clara Ella Emma Eva Fiona Grace Hanna Ida Julia "
    "Kate Laura Lily Lucy Maria Mia Nina Olga Rosa Sara"
).split()
BOYS = (
    "Adam Alex Ben Carl David Eric Felix Frank George Hugo "
    "Ivan Jack Leo Liam Mark Max Noah Oscar Paul Tom"
).split()
ITEMS = (
    "apples balls beads books bottles cakes candles cards coins cookies cups eggs flowers grapes "
    "hats kites lemons "
    "marbles nuts oranges pears pencils pens plums potatoes ribbons rings seeds shells stamps "
    "stickers stones "
    "tickets tomatoes toys"
).split()
BOXES = "bags baskets bowls boxes crates drawers jars nets rows sacks shelves trays".split()
GAINS = "buys finds gets wins collects".split()
LOSSES = "loses sells eats breaks throws".split()


def problem(rng):
    """One random problem as (key, setup, question, steps, conclusion): `key` is its kind and
    numbers, `steps` its equations, the last of which ends in the answer, `conclusion` the answer as
    a sentence."""
    girl, boy = rng.choice(GIRLS), rng.choice(BOYS)
    (name, pronoun, other) = rng.choice([(girl, "She", boy), (boy, "He", girl)])
    item, box = rng.choice(ITEMS), rng.choice(BOXES)
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    a, b = max(a, b), min(a, b)
    a += 2 * (a - b < 2)  # never "1 apples"
    kind = rng.choice("gain loss gift total more groups share gain_loss gain_gain".split())
    owns = f"{name} has {a} {item}."
    now = f"How many {item} does {name} have now?"
    gain = f"{pronoun} {rng.choice(GAINS)} {b} more {item}."
    numbers = (a, b)
    if kind == "gain":
        setup, question, steps = f"{owns} {gain}", now, [f"{a} + {b} = {a + b}."]
        conclusion = f"Now {name} has {a + b} {item}."
    elif kind == "loss":
        setup, question, steps = (
            f"{owns} {pronoun} {rng.choice(LOSSES)} {b} {item}.",
            now,
            [f"{a} - {b} = {a - b}."],
        )
        conclusion = f"Now {name} has {a - b} {item}."
    elif kind == "gift":
        setup, question = (
            f"{owns} {pronoun} gives {b} {item} to {other}.",
            f"How many {item} are left for {name}?",
        )
        steps, conclusion = [f"{a} - {b} = {a - b}."], f"{name} has {a - b} {item} left."
    elif kind == "total":
        setup, question = (
            f"{owns} {other} has {b} {item}.",
            f"How many {item} do {name} and {other} have together?",
        )
        steps, conclusion = [f"{a} + {b} = {a + b}."], f"Together they have {a + b} {item}."
    elif kind == "more":
        setup, question = (
            f"{owns} {other} has {b} {item}.",
            f"How many more {item} does {name} have than {other}?",
        )
        steps, conclusion = (
            [f"{a} - {b} = {a - b}."],
            f"{name} has {a - b} more {item} than {other}.",
        )
    elif kind == "groups":
        numbers = m, n = rng.randint(2, 12), rng.randint(2, 9)
        setup, question = (
            f"{name} has {m} {box} with {n} {item} in each.",
            f"How many {item} does {name} have?",
        )
        steps, conclusion = [f"{m} x {n} = {m * n}."], f"{name} has {m * n} {item}."
    elif kind == "share":
        numbers = m, n = rng.randint(2, 12), rng.randint(2, 9)
        setup = f"{name} puts {m * n} {item} into {n} {box}, the same number in each."
        question = f"How many {item} are in each of the {box}?"
        steps, conclusion = [f"{m * n} / {n} = {m}."], f"There are {m} {item} in each."
    else:
        verb, sign = {
            "gain_loss": (rng.choice(LOSSES), "-"),
            "gain_gain": (rng.choice(GAINS), "+"),
        }[kind]
        c = rng.randint(2, min(20, a + b - 2))
        total = a + b - c if sign == "-" else a + b + c
        numbers = (a, b, c)
        setup, question = f"{owns} {gain} Then {pronoun.lower()} {verb} {c} {item}.", now
        steps = [f"{a} + {b} = {a + b}.", f"{a + b} {sign} {c} = {total}."]
        conclusion = f"Now {name} has {total} {item}."
    return (kind, *numbers), setup, question, steps, conclusion


def split_of(key):
    """ "train" or "test", for ever the same for the same key."""
    return "test" if zlib.crc32(repr(key).encode()) % 10 == 0 else "train"


def examples(split, count, seed=0):
    """`count` different problems of a split, as a list of {"instruction", "input", "output",
    "answer"}."""
    rng, seen, found = random.Random(f"{split} {seed}"), set(), []
    while len(found) < count:
        key, setup, question, steps, _ = problem(rng)
        instruction = f"{setup} {question}"
        if split_of(key) == split and instruction not in seen:
            seen.add(instruction)
            answer = steps[-1].rstrip(".").split(" = ")[1]
            output = f"{' '.join(steps)} The answer is {answer}."
            found.append(
                {"instruction": instruction, "input": "", "output": output, "answer": answer}
            )
    return found


if __name__ == "__main__":
    print(json.dumps(examples(sys.argv[1], int(sys.argv[2])), indent=1))
