"""Score a LLaMA, with or without an adapter, on the test sets of a task: greedy answers, exact
match.

    python eval.py --ckpt tiny --task toy --adapter runs/tiny-toy-rosa
    python eval.py --ckpt llama2-7b --task gsm8k,SVAMP --adapter runs/llama2-7b-arithmetic-rosa
    python eval.py --ckpt tiny --prompt "Tom has 3 pens. He buys 4 more. How many has he now?"
    torchrun --nproc_per_node=8 eval.py ...             # eight processes, each scores its share

Read first: `main`, whose loop is extract, compare, write, and then `generate_responses` and
`choose_options`, the two ways to answer. Skip at first reading: check_lengths, print_table, and the
options at the end.

Every answer is a line of predictions.jsonl as soon as it is there; the scores are in results.json.
Both lie beside the adapter, or under --out. Questions that the same adapter, code and options have
answered already are not asked again."""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import tasks
from data.errors import UserError
from data.tokenizer import load_tokenizer
from extras import adapters, inference, kernels, merge
from extras.checkpoints import (
    check_finite,
    choose_device_and_dtype,
    find_checkpoint,
    load_model,
    say_if_begin_is_unstated,
    say_if_bfloat16_is_slow,
)
from extras.commands import (
    add_device_arguments,
    add_quantize_argument,
    count,
    run_script,
    script_parser,
)
from extras.distributed import gather, is_first, share_out
from extras.predictions import Predictions
from extras.records import hash_of, origin_of, result_code, say_if_unfinished


class Question(NamedTuple):
    """A record of a test set, and the ids of its prompt."""

    number: int  # among all questions
    test_set: str
    index: int  # among the questions of the test set
    place: str  # in the file of the test set, such as "record 3"
    example: dict  # of texts: "instruction", "input" where there is one, "answer"
    prompt: list  # ids


def main(args):
    # --- the questions and the model ---
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    if args.prompt is None:
        test_sets = tasks.test_sets(args.task)
        questions, absent = load_questions(args, test_sets, tokenizer)
    else:
        check_prompt(args.prompt)
        questions = []
    model = load_model(ckpt, device, dtype, quantization=args.quantize)
    too_long = check_lengths(args, questions, model.config, tokenizer)
    if args.adapter:
        adapters.load_adapter(model, args.adapter)
    check_finite(model)
    respond = generate_responses if args.score == "generate" else choose_options
    origin = origin_of_answers(args, ckpt, dtype, model, respond)
    # What follows makes answers faster. It replaces no method that you have edited, so that your
    # edit is what runs: extras/source.py compares the hash of a method's code with that of the
    # original.
    if args.adapter and dtype == torch.float32 and not args.quantize:
        # rosa.merge makes RoAE's update part of the weights, so that RoAE.forward need not run.
        # Weights of 16 or 8 bits would round the update away.
        merge.merge_unless_edited(model)
    gather()  # wait: no process begins before all of them are set up
    engine = OneByOne  # what answers: this class, or the module extras/inference.py
    if not args.plain:
        # Faster code with the same results replaces methods of model.py; a line says which. Where
        # you have edited such a method, or log_likelihood below, the engine stays OneByOne.
        engine, replaced_by_engine = inference.choose_engine(OneByOne, args.score)
        replaced_in_model, _ = kernels.accelerate(model, inference=True)
        kernels.say_what_runs(replaced_in_model, replaced_by_engine)
    say_if_bfloat16_is_slow(device, dtype)
    say_if_unfinished(args.adapter or ckpt)
    if args.prompt is not None:
        if is_first():
            answer_prompt(args, engine, model, tokenizer)
        return
    say_if_begin_is_unstated(ckpt, tokenizer)
    stored = str(dtype).removeprefix("torch.")
    if args.quantize:
        stored += f", {args.quantize} weights"
    print(
        f"model      {ckpt}: {len(model.model.layers)} layers, {stored} on {device}; "
        f"adapter: {args.adapter or 'none'}"
    )

    # --- the loop ---
    predictions = Predictions(args.out, origin, questions)
    # predictions.lines has the lines of the questions that are answered already, by the question's
    # number. Their responses are kept, and what a response is worth is judged anew.
    for number, line in predictions.lines.items():
        line.update(judge(questions[number], line["response"]))
    # --long-is-wrong: these questions leave no room for an answer, and are not asked.
    for number in too_long - predictions.lines.keys():
        predictions.add(number, "", "no room", judge(questions[number], ""))
    right = sum(line["correct"] for line in predictions.lines.values())
    new_tokens = 0
    bar = tqdm(
        total=len(questions),
        initial=len(predictions.lines),
        unit="example",
        dynamic_ncols=True,
        disable=not is_first(),
    )
    start = time.perf_counter()

    def answer(some_questions):  # a generator
        return respond(args, engine, model, tokenizer, some_questions)

    # Each process runs answer() on its share of the questions. After every 32 answers the processes
    # exchange what they have, and so this loop sees all answers, in every process.
    for number, response, num_tokens in share_out(answer, predictions.unanswered(), at_a_time=32):
        judged = judge(questions[number], response)
        is_cut = args.score == "generate" and num_tokens == args.max_new_tokens
        finish_reason = "length" if is_cut else "stop"
        # Every process adds the answer to predictions.lines; the first also writes it to the file.
        predictions.add(number, response, finish_reason, judged)
        right += judged["correct"]
        new_tokens += num_tokens
        status = f"accuracy {right / len(predictions.lines):.1%}"
        if new_tokens:
            status += f"  {new_tokens / (time.perf_counter() - start):,.0f} new tokens/s"
        bar.set_postfix_str(status, refresh=False)
        bar.update()
    bar.close()

    # --- the table ---
    correct = {name: [] for name in test_sets if name not in absent}
    for line in predictions.lines.values():
        correct[line["set"]].append(line["correct"])
    results = summary(correct) | origin
    results |= {"score": args.score, "ckpt": str(args.ckpt)}
    results["max_new_tokens"] = args.max_new_tokens if args.score == "generate" else None
    results["questions"] = {}
    for name in correct:  # by these hashes extras/compare.py recognises the same questions
        examples = [question.example for question in questions if question.test_set == name]
        results["questions"][name] = hash_of(examples)
    print_table(test_sets, results)
    cut = sum(line["finish_reason"] == "length" for line in predictions.lines.values())
    if cut:
        print(f"{cut:,} answers were cut at --max-new-tokens {args.max_new_tokens}")
    if absent:
        print(
            f"absent from {args.data_dir}: {', '.join(absent)}. To get them: "
            f"{tasks.how_to_get(args.data_dir)}"
        )
    predictions.finish(results)


def origin_of_answers(args, ckpt, dtype, model, respond):
    """What an answer depends on, as a dict of hashes: the checkpoint, the adapter, the options
    --score, --max-new-tokens, --dtype and --quantize, and the code. A question that has an answer
    of the same origin is not asked again. (--plain and --batch-size change rounding alone.)"""
    limit = args.max_new_tokens if args.score == "generate" else None
    # result_code knows the code of model.py, rosa.py, the tokenizers and the faster code. `own` is
    # for what it does not know: this file's part, and modules that you may have written elsewhere.
    # (Among the classes it ignores those of torch, and those that it knows.)
    module_classes = {type(module) for module in model.modules()}
    own = [respond, OneByOne, *module_classes]
    code = result_code(args.score, args.adapter, own, args.quantize)
    settings = [args.score, limit, dtype]
    if args.quantize:
        settings.append(args.quantize)
    return origin_of(ckpt, args.adapter, settings, code)


def judge(question, response):
    """What a response answers to a question, and whether that is right."""
    extracted = tasks.extract_answer(question.test_set, response)
    correct = tasks.is_right(question.test_set, extracted, question.example["answer"])
    return {"extracted": extracted, "correct": correct}


# --- two ways to answer ---


def generate_responses(args, engine, model, tokenizer, questions):
    """--score generate. Yields (question's number, response, how many tokens it has), as the
    questions are answered."""
    prompts = [question.prompt for question in questions]
    eos_ids = eos_tokens(model, tokenizer)
    answers = engine.stream(model, prompts, args.max_new_tokens, eos_ids, args.batch_size)
    for i, ids in answers:
        yield questions[i].number, tokenizer.decode(ids), len(ids)


def choose_options(args, engine, model, tokenizer, questions):
    """--score likelihood. Yields (question's number, the option of highest summed log-probability
    as text, 0), as the questions are answered."""
    size = args.batch_size or 32
    for first in range(0, len(questions), size):
        batch = questions[first : first + size]
        options = [tasks.options(question.test_set, question.example) for question in batch]
        prompts = [question.prompt for question in batch]
        ids = []
        for question, texts in zip(batch, options):
            ids.append([option_ids(question, text, tokenizer) for text in texts])
        likelihoods = engine.log_likelihoods(model, prompts, ids)
        for question, texts, values in zip(batch, options, likelihoods):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError("the likelihoods are not finite: try --dtype float32")
            yield question.number, texts[int(np.argmax(values))], 0


def option_ids(question, option, tokenizer):
    """The ids of an option as a response to the question, without the end-of-sequence token."""
    example = question.example | {"output": option}
    _, response = tasks.encode_example(example, tokenizer)
    return response[:-1]


class OneByOne:
    """The plain engine: it answers one question after the other, by model.py's own methods. The
    other engine is the module extras/inference.py: it has two functions of the same names and
    arguments, and answers many questions at a time."""

    @staticmethod
    def stream(model, prompts, max_new_tokens, eos_id, batch_size=None, on_token=None):
        """Yields (i, new ids of prompt i). This engine makes no use of the last two arguments."""
        for i, prompt in enumerate(prompts):
            yield i, model.generate([prompt], max_new_tokens, eos_id)[0]

    @staticmethod
    def log_likelihoods(model, prompts, continuations):
        """Summed log-probability, in nats, of each of a prompt's continuations, lists of ids."""
        likelihoods = []
        for prompt, options in zip(prompts, continuations):
            likelihoods.append([log_likelihood(model, prompt, ids) for ids in options])
        return likelihoods


@torch.no_grad()
def log_likelihood(model, prompt, ids):
    """Summed log-probability, in nats, of ids after a prompt."""
    tokens, labels = tasks.tokens_and_labels(prompt, ids)
    tokens = torch.tensor([tokens], device=model.device)
    labels = torch.tensor([labels], device=model.device)
    return -model.loss(tokens, labels).item()


def answer_prompt(args, engine, model, tokenizer):
    """Print the answer to --prompt, as its text grows."""
    shown = ""

    def show(_, ids):
        """Called with all ids so far, whenever there is a new one; OneByOne does not call it."""
        nonlocal shown
        text = tokenizer.decode(ids)
        # The text ends in U+FFFD while the bytes of its last character have not all come.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    prompt = tasks.encode_prompt({"instruction": args.prompt}, tokenizer)
    room = model.config.context - len(prompt)
    if room < 1:
        raise UserError(
            f"--prompt has {len(prompt)} tokens, the model's context {model.config.context}: make "
            "it shorter, there is no room for an answer"
        )
    limit = min(args.max_new_tokens, room)
    eos_ids = eos_tokens(model, tokenizer)
    _, ids = next(engine.stream(model, [prompt], limit, eos_ids, on_token=show))
    print(tokenizer.decode(ids)[len(shown) :])


def eos_tokens(model, tokenizer):
    """The set of the ids that end an answer."""
    eos = model.config.eos_token_id  # one, several or none
    if eos is None:
        eos = []
    if isinstance(eos, int):
        eos = [eos]
    return {tokenizer.eos_id, *eos}


# --- the questions ---


def load_questions(args, test_sets, tokenizer):
    """(the questions of some test sets, the names of the test sets that are absent)."""
    questions = []
    absent = []
    for name in test_sets:
        placed = tasks.test_examples(name, args.data_dir, args.skip_empty)
        if placed is None:
            absent.append(name)
            continue
        for i, (place, example) in enumerate(placed[: args.limit]):
            if args.score == "likelihood":
                tasks.options(name, example)  # raises UserError for what is no multiple choice
            prompt = tasks.encode_prompt(example, tokenizer)
            questions.append(Question(len(questions), name, i, place, example, prompt))
    if not questions:
        raise UserError(
            f"{args.data_dir} has no test set of {args.task}. To get them: "
            f"{tasks.how_to_get(args.data_dir)}"
        )
    return questions, absent


def check_prompt(text):
    if not text.strip() or not tasks.is_unicode(text):
        raise UserError("--prompt is empty, or not text in UTF-8")


def check_lengths(args, questions, config, tokenizer):
    """The numbers of the questions that leave no room for their answer. Raises UserError for these
    unless --long-is-wrong asks to score them as wrong."""
    too_long = []
    for number, question in enumerate(questions):
        if len(question.prompt) + answer_room(args, question, tokenizer) > config.context:
            too_long.append(number)
    if too_long and not args.long_is_wrong:
        first = questions[too_long[0]]
        answer = "an answer"
        if args.score == "generate":
            answer = f"--max-new-tokens {args.max_new_tokens}"
        raise UserError(
            f"{first.test_set}, {first.place}: the prompt has {len(first.prompt)} tokens; "
            f"with {answer} it exceeds the model's context of {config.context} ({len(too_long)} of "
            f"{len(questions)} prompts do; --long-is-wrong counts them as wrong)"
        )
    return set(too_long)


def answer_room(args, question, tokenizer):
    """How many tokens an answer to the question may take."""
    if args.score == "generate":
        return args.max_new_tokens
    options = tasks.options(question.test_set, question.example)
    # option_ids would be exact, but encodes the whole prompt again. Encoded alone, an option may
    # lack one token, that of the space before it: hence the 1.
    return 1 + max(len(tokenizer.encode(option)) for option in options)


# --- the table ---


def summary(correct):
    """correct: test set -> list of bools. Returns what results.json has of them: the score of each
    test set, their average over all examples (micro), and over the test sets (macro)."""
    scores = {}
    counts = {}
    intervals = {}
    for name, each in correct.items():
        scores[name] = sum(each) / len(each)
        counts[name] = len(each)
        intervals[name] = tasks.wilson_interval(sum(each), len(each))
    right = sum(map(sum, correct.values()))
    return {
        "scores": scores,
        "micro": right / sum(counts.values()),
        "macro": sum(scores.values()) / len(scores),
        "counts": counts,
        "intervals": intervals,
    }


def print_table(test_sets, results):
    print(f"{'test set':<16}{'examples':>9}{'accuracy':>10}   95 % interval")
    for name in test_sets:
        if name not in results["scores"]:
            print(f"{name:<16}{'absent':>9}")
            continue
        count, accuracy = results["counts"][name], results["scores"][name]
        low, high = results["intervals"][name]
        print(f"{name:<16}{count:>9,}{accuracy:>10.1%}   {low:.1%} to {high:.1%}")
    if len(results["scores"]) > 1:
        total = sum(results["counts"].values())
        micro, macro = results["micro"], results["macro"]
        low, high = tasks.wilson_interval(round(micro * total), total)
        print(f"{'micro average':<16}{total:>9,}{micro:>10.1%}   {low:.1%} to {high:.1%}")
        print(f"{'macro average':<16}{len(results['scores']):>4} sets{macro:>10.1%}")


# --- options ---


def parse_args(arguments=None):
    usage, _, _ = __doc__.partition("    torchrun")
    parser = script_parser("eval.py", usage.rstrip())
    add = parser.add_argument_group("model and data").add_argument
    add("--ckpt", default="tiny", help="directory, or a name such as llama2-7b or org/name")
    add(
        "--adapter",
        type=Path,
        help="adapter directory, as train.py writes it (default: the model alone)",
    )
    add("--task", default="toy", help="toy, arithmetic, commonsense, or test sets by commas")
    add("--data-dir", default=tasks.DATA_DIR, help="laid out as LLM-Adapters' repository")
    add(
        "--out", type=Path, help="where results go (default: --adapter, or runs/<ckpt>-<task>-base)"
    )
    add = parser.add_argument_group("answers").add_argument
    add("--prompt", help="instead of scoring: answer this one question")
    add("--limit", type=count, help="only the first so many examples of each test set")
    add(
        "--batch-size",
        type=count,
        help="examples at a time (default: as memory allows; by likelihood 32)",
    )
    add("--max-new-tokens", type=count, default=256, help="longest answer, in tokens")
    add(
        "--score",
        default="generate",
        choices=("generate", "likelihood"),
        help="judge the answer that is generated, or the option that is likeliest",
    )
    more = parser.add_argument_group("more")
    add = more.add_argument
    add("--skip-empty", action="store_true", help="leave out examples with an empty field")
    add(
        "--long-is-wrong",
        action="store_true",
        help="prompts that leave no room for an answer count as wrong",
    )
    add(
        "--plain",
        action="store_true",
        help="model.py alone: nothing from extras/kernels.py and extras/inference.py",
    )
    add_quantize_argument(more)
    add_device_arguments(more)
    args = parser.parse_args(arguments)
    if args.out is None:
        base = f"{Path(os.path.abspath(args.ckpt)).name}-{args.task}-base"
        args.out = args.adapter or Path("runs") / base
    return args


def last_sentence(arguments):
    """The sentence that ends the error message of a stopped run."""
    return "What was scored so far is kept, and not asked again"


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own. run_script also sets up
    torch.distributed under torchrun, and prints a UserError as one line."""
    run_script("eval.py", parse_args, main, arguments, last_sentence)


if __name__ == "__main__":
    run()
