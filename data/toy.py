"""The toy task, which needs no download: arithmetic word problems made from templates, in the JSON
format of the real benchmarks.

    {"instruction":
         "Anna has 7 shells. She finds 5 more shells. How many shells does Anna have now?",
     "input": "", "output": "7 + 5 = 12. The answer is 12.", "answer": "12"}

Train and test are disjoint in a strong sense: a kind of problem with certain numbers, such as
("gain", 7, 5), always belongs to the same one of the two, whatever the seed and whoever owns the
shells.

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
    """One random problem as (key, setup, question, steps, conclusion): `key` is the kind of problem
    and its numbers, `steps` are its equations, the last of which ends in the answer, and
    `conclusion` is the answer as a sentence."""
    girl = rng.choice(GIRLS)
    boy = rng.choice(BOYS)
    name, pronoun, other = rng.choice([(girl, "She", boy), (boy, "He", girl)])
    item = rng.choice(ITEMS)
    box = rng.choice(BOXES)
    a = rng.randint(2, 30)
    b = rng.randint(2, 30)
    a, b = max(a, b), min(a, b)
    if a - b < 2:  # "1 apples" never remains
        a += 2
    kind = rng.choice("gain loss gift total more groups share gain_loss gain_gain".split())
    owns = f"{name} has {a} {item}."
    now = f"How many {item} does {name} have now?"
    gain = f"{pronoun} {rng.choice(GAINS)} {b} more {item}."
    numbers = (a, b)
    if kind == "gain":
        setup = f"{owns} {gain}"
        question = now
        steps = [f"{a} + {b} = {a + b}."]
        conclusion = f"Now {name} has {a + b} {item}."
    elif kind == "loss":
        setup = f"{owns} {pronoun} {rng.choice(LOSSES)} {b} {item}."
        question = now
        steps = [f"{a} - {b} = {a - b}."]
        conclusion = f"Now {name} has {a - b} {item}."
    elif kind == "gift":
        setup = f"{owns} {pronoun} gives {b} {item} to {other}."
        question = f"How many {item} are left for {name}?"
        steps = [f"{a} - {b} = {a - b}."]
        conclusion = f"{name} has {a - b} {item} left."
    elif kind == "total":
        setup = f"{owns} {other} has {b} {item}."
        question = f"How many {item} do {name} and {other} have together?"
        steps = [f"{a} + {b} = {a + b}."]
        conclusion = f"Together they have {a + b} {item}."
    elif kind == "more":
        setup = f"{owns} {other} has {b} {item}."
        question = f"How many more {item} does {name} have than {other}?"
        steps = [f"{a} - {b} = {a - b}."]
        conclusion = f"{name} has {a - b} more {item} than {other}."
    elif kind == "groups":
        numbers = m, n = rng.randint(2, 12), rng.randint(2, 9)
        setup = f"{name} has {m} {box} with {n} {item} in each."
        question = f"How many {item} does {name} have?"
        steps = [f"{m} x {n} = {m * n}."]
        conclusion = f"{name} has {m * n} {item}."
    elif kind == "share":
        numbers = m, n = rng.randint(2, 12), rng.randint(2, 9)
        setup = f"{name} puts {m * n} {item} into {n} {box}, the same number in each."
        question = f"How many {item} are in each of the {box}?"
        steps = [f"{m * n} / {n} = {m}."]
        conclusion = f"There are {m} {item} in each."
    else:
        loses = rng.choice(LOSSES)
        gains = rng.choice(GAINS)
        c = rng.randint(2, min(20, a + b - 2))
        if kind == "gain_loss":
            verb = loses
            sign = "-"
            total = a + b - c
        else:
            verb = gains
            sign = "+"
            total = a + b + c
        numbers = (a, b, c)
        setup = f"{owns} {gain} Then {pronoun.lower()} {verb} {c} {item}."
        question = now
        steps = [f"{a} + {b} = {a + b}.", f"{a + b} {sign} {c} = {total}."]
        conclusion = f"Now {name} has {total} {item}."
    return (kind, *numbers), setup, question, steps, conclusion


def split_of(key):
    """The split, "train" or "test", to which a key of `problem` belongs."""
    return "test" if zlib.crc32(repr(key).encode()) % 10 == 0 else "train"


def examples(split, count, seed=0):
    """`count` different problems of a split, as a list of {"instruction", "input", "output",
    "answer"}."""
    rng = random.Random(f"{split} {seed}")
    seen = set()
    found = []
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
