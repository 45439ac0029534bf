"""Statements about scoring: which answer is read out of a response, which options a question has,
how sure an accuracy is.

The rules are those of LLM-Adapters, odd outcomes included, so that our numbers can be compared with
published ones. A comment says where the outcome of a row is not that of LLM-Adapters."""

import random

import pytest

from data.tasks import TASKS, extract_answer, is_correct, options, wilson_interval

# Arithmetic: the answer is the last number of the response, commas removed.
# (response, reference answer, extracted, whether it is right)
NUMBERS = [
    ("The answer is 12.", "12.0", "12", True),  # every reference of these sets ends in .0
    ("12.", "12", "12", True),
    ("3 + 4 = 7, so she has 7 - 2 = 5 left.", "5.0", "5", True),
    ("It is 7, or rather 8.", "7", "8", False),  # the last number counts
    ("The answer is 5. I counted twice, in 2 ways.", "5", "2", False),
    ("", "0", "", False),
    ("twelve", "12", "", False),
    # units, currency, commas
    ("30%", "30", "30", True),
    ("$12.50", "12.5", "12.50", True),
    ("1,234.5", "1234.5", "1234.5", True),
    ("1,234,567", "1,234,567", "1234567", True),
    ("12,5", "12.5", "125", False),  # a decimal comma is removed as well
    ("The sides are 3,4,5", "5", "345", False),
    ("The sides are 3, 4, 5", "5", "5", True),
    ("Rs.75", "75", "75", True),
    ("about .5", "0.5", ".5", True),  # LLM-Adapters reads 5
    ("-.5", "-0.5", "-.5", True),  # LLM-Adapters reads 5
    ("It is $1.23.The end", "1.23", "1.23", True),
    # signs
    ("-5", "-5.0", "-5", True),
    ("5", "-5", "5", False),
    ("- 5", "-5", "5", False),  # a sign apart from its number is not read
    ("\N{MINUS SIGN}5", "-5", "-5", True),
    ("\N{EN DASH}5", "-5", "5", False),  # a dash is no sign
    # LaTeX's thousands
    (r"9{,}500", "9500", "9500", True),
    (r"$9\,500$", "9500", "9500", True),
    (r"1{,}234{,}567.5 and 10,\!000", "10000", "10000", True),
    (r"3\,kg, 4\,500 g", "4500", "4500", True),
    (r"9{,}\!500 or 9\:500", "9500", "9500", True),
    ("9\N{NARROW NO-BREAK SPACE}500", "9500", "9500", True),
    (
        r"\N{MINUS SIGN}".replace(r"\N{MINUS SIGN}", "\N{MINUS SIGN}") + "$9{,}500",
        "-9500",
        "-9500",
        True,
    ),
    (r"(9,\,500)", "500", "500", True),
    (r"4\,5", "5", "5", True),  # these are two numbers
    ("5-3", "2", "-3", False),  # nothing is computed: a 5, then a -3
    # fractions, powers, dates
    ("3/4", "0.75", "4", False),  # nothing is computed: a 3, then a 4
    ("1e3", "1000", "3", False),
    ("on 2024-05-06", "6", "-06", False),
    # within 1e-3
    ("0.3333", "0.33333", "0.3333", True),
    ("12.0009", "12", "12.0009", True),
    ("12.0011", "12", "12.0011", False),
    # more digits than a float can hold: as a float infinite, and never right
    ("9" * 400, "9", "9" * 400, False),
    ("0." + "3" * 400, "0.3333", "0." + "3" * 400, True),
    ("inf", "12", "", False),
    ("nan", "12", "", False),
    # digits of other scripts count, superscripts do not
    ("\u0661\u0662", "12", "\u0661\u0662", True),  # Arabic-Indic
    ("\uff11\uff12", "12", "\uff11\uff12", True),  # full-width
    ("\uff11\uff12\uff0e\uff15", "12.5", "\uff15", False),  # the full-width point is no point
    ("5 m\u00b2", "5", "5", True),
    ("\u00b2", "2", "", False),
]

# AQuA: the answer is the last letter that is said to be the answer, or, where none is, the last
# letter that stands alone.
LETTERS = [
    ("The answer is (C).", "C", "C", True),
    ("the answer is (C).", "C", "C", True),
    (
        "\nRationale: A train travels 60 km. Because Bob is Early, it takes 2 hours.The answer "
        "is (D).",
        "D",
        "D",
        True,
    ),
    ("The answer is: B", "B", "B", True),
    ("The answer is **E**, not D", "E", "E", True),
    ("Answer: D", "D", "D", True),
    ("Answer: D. Then E is 13.", "D", "D", True),
    ("**Answer:** (D), for E is 13", "D", "D", True),
    ("(C)", "C", "C", True),
    (r"$\boxed{B}$", "B", "B", True),
    ("It costs 5 dollars each, (B).", "B", "B", True),
    # other capitals
    ("A train travels 60 km.", "A", "", False),
    ("Two set out. A train leaves at noon", "A", "", False),
    ("Answer: A train travels 60 km.", "A", "A", True),  # no other letter is said to be the answer
    ("Because B is right", "B", "B", True),
    ("CABBAGE, B2, ABCDE", "E", "", False),
    ("The answer is Eight", "E", "", False),
    ("The answer is Eight, that is (B)", "B", "B", True),
    ("", "A", "", False),
    # A is a letter inside a sentence and before "is", an article where it opens one
    ("A is correct.", "A", "A", True),
    ("I choose A because it fits", "A", "A", True),
    ("The answer is A because E is wrong", "A", "A", True),
    ("A", "A", "A", True),
    # several letters
    ("I think A and B are wrong; the answer is C", "C", "C", True),
    ("The answer is C because D and E are too large", "C", "C", True),
    ("The answer is not B but C", "C", "C", True),
    ("The answer is B. No, the answer is D.", "D", "D", True),
    ("B or D", "B", "D", False),
    ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", "A", "E", False),
    # case counts, as in LLM-Adapters
    ("the answer is b", "B", "", False),
    ("(b)", "B", "", False),
]

# AQuA: a letter that is said to be the answer is the choice, whatever comes after it. The article A
# is no such letter. (response, letter)
SAID = [
    ("Answer: A because the sum is 12", "A"),
    ("The answer is: A since B is too small", "A"),
    ("Answer: A as D and E fail", "A"),
    ("Answer: A and not B", "A"),
    ("Answer: A for B is too small", "A"),
    ("Answer: A gives 12, B gives 13", "A"),
    ("Answer: A was right, not E", "A"),
    ("**Answer:** A by elimination of B to E", "A"),
    ("Answer: (A) because C is 13", "A"),
    ("Answer: A, because C is 13", "A"),
    ("Answer: A = 12 km, D = 13 km", "A"),
    ("The answer is A and E is wrong", "A"),
    ("Answer: B because A is too small", "B"),
    ("The answer is: E since C is 3", "E"),
    ("Answer: A because the sum is 12. No, the answer is (D).", "D"),
    ("The answer is: D. Wait. Answer: A since the sum is 12", "A"),
    ("The answer is: A student has 5 marbles. The answer is (C).", "C"),
    ("The answer is: A student has 5 marbles, which is (B)", "B"),
    ("Answer: A by-pass is 3 km long, so (E)", "E"),
    # whatever brackets, quotes and marks stand around the letter
    (r"The answer is \boxed{B}. Option A ignores the tax.", "B"),
    (r"The final answer is $\boxed{\text{(B)}}$, as A and C fail", "B"),
    (r"The answer is \(\mathbf{D}\) because E is 3", "D"),
    ("The correct option is **(C)**. A ignores the tax", "C"),
    (
        "The right choice: \N{LEFT DOUBLE QUOTATION MARK}D\N{RIGHT DOUBLE QUOTATION MARK}. Not E",
        "D",
    ),
    ("Answer: __B__ and not C", "B"),
    ("ANSWER: 'C' since D is 5", "C"),
    ("answer is: option (E). A is 5", "E"),
    ("Correct choice is letter D, not E", "D"),
    ("The answer is <b>B</b>, not A", "B"),
    ("The answer must be [C], as D is 5", "C"),
    ("The answer is:\n\n`B`\n\nC is 12", "B"),
    ("B is the correct answer, since A ignores the tax", "B"),
    ("Option B is correct. Option A is wrong, as it ignores the tax", "B"),
    ("The correct answer is therefore option (B). A is excluded", "B"),
    ("**Answer** (B), because A is too small", "B"),
    ("The  answer\nis  C. A is 5", "C"),
    ("Answer\N{FULLWIDTH COLON}C, A", "C"),
    ("The answer is $A = 12$, which is option (B).", "B"),
    ("The answer is 5 (option C). A is wrong", "C"),
    ("**C** is the right option. A is not", "C"),
    ("Option A is wrong. So is B. The answer is C, as D", "C"),
    ("Answer choices: A, B. The answer is A.", "A"),
    ("(D). A train is late. Answer: A train takes 2 h", "D"),
    ("(B), for 12 fits. A gives 13", "B"),
]

BOOLEANS = [
    ("the correct answer is true", "true", "true", True),
    ("the correct answer is false", "false", "false", True),
    ("the correct answer is true", "false", "true", False),
    ("true", "true", "true", True),
    ("false.", "false", "false", True),
    ("**true**", "true", "true", True),
    ("true/false", "false", "true", False),
    ("false, not true", "false", "false", True),
    # The first option named counts, whatever is said of it
    ("It is not true", "false", "true", False),
    ("True", "true", "", False),  # case counts
    ("TRUE", "true", "", False),
    ("untrue", "false", "", False),  # LLM-Adapters reads true
    ("It is untrue, so false", "false", "false", True),  # LLM-Adapters reads true
    ("a falsehood", "false", "", False),  # LLM-Adapters reads false
    ("yes", "true", "", False),
    ("", "true", "", False),
]


def numbered(word, last):
    """Rows for a set whose options are word1, word2, ... up to the number `last`."""
    one, two, end, title = f"{word}1", f"{word}2", f"{word}{last}", word.title()
    rows = [(f"the correct answer is {option}", option, option, True) for option in (two, end)]
    rows += [
        (f"the correct answer is {one}.", two, one, False),
        (one, one, one, True),
        (f"**{one}**", one, one, True),
    ]
    rows += [
        (f"{one} or {two}", one, one, True),
        (f"{one} or {two}", two, one, False),
        (f"{two}/{one}", two, two, True),
    ]
    # No question has twelve options: these are read as the first option named
    rows += [(f"{word}12", one, one, True), (f"{two}{two}", two, two, True)]
    none = [f"{word}{last + 1}", f"{word}0", f"{word} 1", f"the {word} is 1", "I do not know", ""]
    none += [f"{title}2", f"{title} 1"]  # case counts
    return rows + [
        (response, two if response == f"{title}2" else one, "", False) for response in none
    ]


ANSWERS = numbered("answer", 5) + [("the correct answer is answer4", "answer4", "answer4", True)]
TABLE = {
    **dict.fromkeys(("MultiArith", "gsm8k", "AddSub", "SingleEq", "SVAMP", "mawps"), NUMBERS),
    **dict.fromkeys(("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), ANSWERS),
    "AQuA": LETTERS,
    "boolq": BOOLEANS,
    "piqa": numbered("solution", 2),
    "hellaswag": numbered("ending", 4),
    "winogrande": numbered("option", 2),
}


def test_every_benchmark_set_has_its_table():
    assert set(TABLE) == {*TASKS["arithmetic"], *TASKS["commonsense"]} and len(TABLE) == 15


@pytest.mark.parametrize("name", TABLE)
def test_what_a_response_answers_and_whether_it_is_right(name):
    for response, answer, extracted, right in TABLE[name]:
        judged = extract_answer(name, response), is_correct(name, response, answer)
        assert judged == (extracted, right), (response, answer)


@pytest.mark.parametrize("response, letter", SAID)
def test_a_letter_said_to_be_the_answer_is_the_choice_whatever_comes_after_it(response, letter):
    assert extract_answer("AQuA", response) == letter


@pytest.mark.parametrize("name", TABLE)
def test_no_response_whatever_is_an_error(name):
    rng = random.Random(0)
    characters = "A B(C).,-0123456789e\n\u0661\uff12\u00b2\u2167\u00a0\x00truefalseanswer is"
    for _ in range(2000):
        response = "".join(rng.choices(characters, k=rng.randrange(40)))
        assert is_correct(name, response, "1") in (True, False)


# --- options ---

LISTED = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "winogrande": ["option1", "option2"],
}
LISTED |= {"hellaswag": [f"ending{i}" for i in range(1, 5)], "AQuA": ["A", "B", "C", "D"]}
ANSWER_COUNTS = {"social_i_qa": 3, "ARC-Easy": 5, "ARC-Challenge": 3, "openbookqa": 4}
LISTED |= {
    name: [f"answer{i}" for i in range(1, count + 1)] for name, count in ANSWER_COUNTS.items()
}
CHOOSE = "Please choose the correct answer to"
INSTRUCTIONS = {
    "boolq": (
        "Please answer the following question with true or false, question: is it untrue "
        "that ice floats?\n\n"
    ),
    "piqa": (
        "Please choose the correct solution to the question: Dry a cup.\n\nSolution1: Use a "
        "cloth.\n\n"
        "Solution2: Use a hose.\n\n"
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Swimming: She "
        "dives and\n\n"
        "Ending1: flies. Ending2: swims. Ending3: reads. Ending4: bakes.\n\n"
    ),
    "winogrande": (
        f"{CHOOSE} fill in the blank to complete the given sentence: The cup fits in "
        "the box as the _ is "
        "small.\n\nOption1: cup Option2: box "
    ),
    "social_i_qa": f"{CHOOSE} the question: Ann found a coat. What next?\n\n"
    "Answer1: eat it Answer2: return it Answer3: plant it\n\n",
    "ARC-Easy": f"{CHOOSE} the question: What is hot?\n\n"
    "Answer1: ice Answer2: the sun Answer3: snow Answer4: fog Answer5: dew\n\n",
    "ARC-Challenge": (
        f"{CHOOSE} the question: What melts?\n\nAnswer1: ice Answer2: sand Answer3: air\n\n"
    ),
    "openbookqa": f"{CHOOSE} the question: Is the Answer format: answer5/answer4 odd?\n\n"
    "Answer1: no Answer2: yes Answer3: answer5 Answer4: both\n\n",
}
INSTRUCTIONS = {
    name: f"{text}Answer format: {'/'.join(LISTED[name])}" for name, text in INSTRUCTIONS.items()
}
INSTRUCTIONS["openbookqa"] += "\n"
INSTRUCTIONS["AQuA"] = (
    "Pipe (A) fills a tub in 2 h and pipe (F) in 2 h. How long do both take? "
    "Answer Choices: (A) 1 h (B) 2 h (C) 3 h (D) (A) or (B)"
)


@pytest.mark.parametrize("name", LISTED)
def test_the_options_are_those_that_the_instruction_lists_in_the_wording_of_the_training_data(name):
    responses = options(name, {"instruction": INSTRUCTIONS[name]})
    wording = "The answer is ({})." if name == "AQuA" else "the correct answer is {}"
    assert responses == [wording.format(option) for option in LISTED[name]]
    assert [extract_answer(name, response) for response in responses] == LISTED[name]


@pytest.mark.parametrize("name", ["toy", *(name for name in TASKS["arithmetic"] if name != "AQuA")])
def test_a_set_that_is_not_multiple_choice_has_no_options(name):
    with pytest.raises(
        ValueError, match=f"^{name} is not multiple choice: choose from AQuA, boolq, .*openbookqa$"
    ):
        options(name, {"instruction": INSTRUCTIONS["ARC-Easy"] + INSTRUCTIONS["AQuA"]})


@pytest.mark.parametrize("name", LISTED)
def test_an_instruction_with_fewer_than_two_options_is_named(name):
    marker = "Answer Choices:" if name == "AQuA" else "Answer format:"
    every = INSTRUCTIONS[name].rpartition(marker)[2]
    one = marker + every.split("(B)" if name == "AQuA" else "/")[0]
    for instruction in (
        "",
        "A question\nof two lines",
        every,
        marker,
        f"{marker} yes/no",
        one,
        f"{one}/{one}",
    ):
        with pytest.raises(ValueError, match=f"^{name}: fewer than two options") as error:
            options(name, {"instruction": instruction})
        assert "\n" not in str(error.value) and repr(instruction[-60:]) in str(error.value)


# --- the interval of an accuracy ---


# R. G. Newcombe, Statistics in Medicine 17 (1998), table I
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)]
OF_FEW = [
    (0, 10, 0, 0.2775),
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1),
    (0, 1, 0, 0.7935),
    (1, 1, 0.2065, 1),
]


@pytest.mark.parametrize("right, count, low, high", OF_FEW + NEWCOMBE)
def test_the_interval_is_that_of_published_tables(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5.1e-5)


def solve(f, low, high):
    """The place between `low`, where f is negative, and `high`, where it is positive, at which f is
    zero."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    "right, count", [(1, 2), (1, 3), (7, 9), (50, 254), (1300, 1319), (1635, 3270)]
)
def test_the_interval_ends_where_the_proportion_is_z_standard_errors_away(right, count):
    p = right / count

    def excess(q):
        return abs(p - q) - 1.959964 * (q * (1 - q) / count) ** 0.5

    low, high = wilson_interval(right, count)
    assert low == pytest.approx(solve(lambda q: -excess(q), 0, p), abs=1e-12)
    assert high == pytest.approx(solve(excess, p, 1), abs=1e-12)


def test_the_interval_lies_within_0_and_1_mirrors_and_narrows():
    for count in (*range(1, 60), 1319, 10000):
        for right in {0, 1, count // 3, count // 2, count}:
            low, high = wilson_interval(right, count)
            assert 0 <= low < high <= 1 and low - 1e-12 <= right / count <= high + 1e-12
            assert wilson_interval(count - right, count) == pytest.approx(
                (1 - high, 1 - low), abs=1e-12
            )
            narrow_low, narrow_high = wilson_interval(4 * right, 4 * count)
            assert narrow_high - narrow_low < high - low


@pytest.mark.parametrize("right, count", [(0, 0), (1, 0), (-1, 3), (4, 3)])
def test_there_is_no_interval_of_nothing(right, count):
    with pytest.raises(AssertionError):
        wilson_interval(right, count)
