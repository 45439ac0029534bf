"""Score a LLaMA, with or without an adapter, on the test sets of a task: greedy answers, exact
match.

    python eval.py --ckpt tiny --task toy --adapter runs/tiny-toy-rosa
    python eval.py --ckpt llama2-7b --task gsm8k,SVAMP --adapter runs/llama2-7b-arithmetic-rosa
    python eval.py --ckpt tiny --prompt "Tom has 3 pens. He buys 4 more. How many has he now?"
    torchrun --nproc_per_node=8 eval.py ...             # eight processes, each scores its share

Writes predictions.jsonl, a line per example as it is answered, and results.json beside the adapter,
or under --out. Run again it goes on where it stopped: what the same adapter has answered with the
same settings is not asked again."""

import math
import sys
import time
from pathlib import Path

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
    say_if_bfloat16_is_slow,
)
from extras.commands import count, run_script, script_parser
from extras.distributed import gather, gather_rounds, is_first, processes
from extras.predictions import Predictions
from extras.records import hash_of, origin_of, result_code, say_if_unfinished

MOVED = {
    "--loss": "forgetting FILE ...",
    "--activations": "figure1 PNG",
    "--compare": "compare RUN ...",
}


def parse_args(arguments=None):
    for argument in sys.argv[1:] if arguments is None else arguments:
        if command := MOVED.get(argument.split("=")[0]):
            raise UserError(
                f"{argument.split('=')[0]} is a command of its own now: python -m extras.{command}"
            )
    parser = script_parser("eval.py", "\n".join(__doc__.split("\n")[:5]))
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
    add("--batch-size", type=count, default=32, help="examples at a time")
    add("--max-new-tokens", type=count, default=256, help="longest answer, in tokens")
    scores = ("generate", "likelihood")
    add(
        "--score", default="generate", choices=scores, help="by its answer, or its likeliest option"
    )
    add = parser.add_argument_group("more").add_argument
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
    add("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    add(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model"
    )
    args = parser.parse_args(arguments)
    args.out = (
        args.out
        or args.adapter
        or Path("runs") / f"{Path(args.ckpt).absolute().name}-{args.task}-base"
    )
    return args


def main(args):
    # --- the questions and the model ---
    rank, world = processes()
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    if args.prompt is not None and not (args.prompt.strip() and tasks.is_unicode(args.prompt)):
        raise UserError("--prompt is empty, or not text in UTF-8")
    names, absent, questions = ([], [], []) if args.prompt else load_questions(args, tokenizer)
    model = load_model(ckpt, device, dtype)
    too_long = check_lengths(args, questions, model.config, tokenizer)
    if args.adapter:
        # One of RoSA's, by rosa.load_adapter, or of PEFT's own
        adapters.load_adapter(model, args.adapter)
    check_finite(model)
    # Bfloat16 weights would round it away; PEFT's own stay as they are
    if args.adapter and dtype == torch.float32:
        merge.merge_if_unedited(model)
    gather()  # wait: none begins before all are set up
    if not args.plain:
        exchanged, _ = kernels.accelerate(model, inference=True)
        kernels.say_what_runs(exchanged, inference.stand_ins(stood_for(args.score)))
    say_if_bfloat16_is_slow(device, dtype)
    say_if_unfinished(args.adapter or ckpt)
    if args.prompt:
        return answer_prompt(args, model, tokenizer) if rank == 0 else None
    adapter = args.adapter or "none"
    print(
        f"model      {ckpt}: {len(model.model.layers)} layers, {str(dtype)[6:]} on {device}; "
        f"adapter: {adapter}"
    )

    # --- the loop ---
    limit = args.max_new_tokens if args.score == "generate" else None
    respond = choose_options if args.score == "likelihood" else generate_responses
    code = result_code(args.score, args.adapter, own=[respond])
    origin = origin_of(ckpt, args.adapter, [args.score, limit, dtype], code)
    predictions = Predictions(args.out, origin, questions)  # what is answered already
    # The response is kept, what it is worth is judged anew
    for number, line in predictions.lines.items():
        line |= judge(questions[number], line["response"])
    for number in too_long - predictions.lines.keys():
        predictions.add(number, "", "no room", judge(questions[number], ""))
    right, new_tokens = sum(line["correct"] for line in predictions.lines.values()), 0
    bar = tqdm(
        total=len(questions),
        initial=len(predictions.lines),
        unit="example",
        dynamic_ncols=True,
        disable=not is_first(),
    )
    start = time.perf_counter()
    numbers = predictions.unanswered()  # long prompts first
    mine = numbers[rank::world]  # so that each process has long and short ones
    responses = respond(args, model, tokenizer, [questions[number] for number in mine])
    # By number, not place in mine
    answers = ((mine[i], response, num_tokens) for i, response, num_tokens in responses)
    per_round = 1 if world == 1 else args.batch_size  # answers of each process
    # A round hands every process the answers of all; the first alone writes them.
    for answered in gather_rounds(
        answers, per_round, math.ceil(len(numbers) / (per_round * world))
    ):
        for number, response, num_tokens in answered:
            judged = judge(questions[number], response)
            finish_reason = "length" if num_tokens == limit else "stop"
            predictions.add(number, response, finish_reason, judged)
            right += judged["correct"]
            new_tokens += num_tokens
        speed = (
            f"  {new_tokens / (time.perf_counter() - start):,.0f} new tokens/s"
            if new_tokens
            else ""
        )
        bar.set_postfix_str(f"accuracy {right / len(predictions.lines):.1%}{speed}", refresh=False)
        bar.update(len(answered))
    bar.close()

    # --- the table ---
    correct = {name: [] for name in names if name not in absent}
    for line in predictions.lines.values():
        correct[line["set"]].append(line["correct"])
    results = (
        score(correct)
        | {"score": args.score, "max_new_tokens": limit, "ckpt": str(args.ckpt)}
        | origin
    )
    results["questions"] = {
        name: hash_of([q[2] for q in questions if q[0] == name]) for name in correct
    }
    print_table(names, results)
    if cut := sum(line["finish_reason"] == "length" for line in predictions.lines.values()):
        print(f"{cut:,} answers were cut at --max-new-tokens {limit}")
    if absent:
        print(
            f"absent from {args.data_dir}: {', '.join(absent)}. To get them: "
            f"{tasks.how_to_get(args.data_dir)}"
        )
    predictions.finish(results)


def judge(question, response):
    """What a response answers to a question, (test set, index, example, prompt ids), and whether
    that is right."""
    name, _, example, _ = question
    extracted = tasks.extract_answer(name, response)
    return {"extracted": extracted, "correct": tasks.is_correct(name, response, example["answer"])}


def choose_options(args, model, tokenizer, questions):
    """For --score likelihood: yield (place in `questions`, the likeliest option as text, 0) as
    questions, (test set, index, example, prompt ids), are answered."""
    # The faster way asks for all options at once; where a method that it replaces was edited, a
    # line says so.
    instead = "asking Llama.loss, one option after the other"
    plain = args.plain or inference.stands_aside(stood_for("likelihood"), instead)
    for first in range(0, len(questions), args.batch_size):
        responses = most_likely(plain, model, tokenizer, questions[first : first + args.batch_size])
        yield from ((i, response, 0) for i, response in enumerate(responses, first))


def stood_for(score):
    """What extras/inference.py stands for with --score: {(class or module, name): fingerprint}."""
    if score == "generate":
        return inference.PLAIN
    return inference.LIKELIHOODS | {
        (sys.modules[__name__], "log_likelihood"): inference.LOG_LIKELIHOOD
    }


def generate_responses(args, model, tokenizer, questions):
    """Yield (place in `questions`, response, its new tokens) as questions, (test set, index,
    example, prompt ids), are answered."""
    prompts = [prompt for *_, prompt in questions]
    limit, eos = args.max_new_tokens, eos_tokens(model, tokenizer)
    if args.plain:
        answers = ((i, model.generate([prompt], limit, eos)[0]) for i, prompt in enumerate(prompts))
    else:
        answers = inference.stream(model, prompts, limit, eos, args.batch_size)
    yield from ((i, tokenizer.decode(ids), len(ids)) for i, ids in answers)


def most_likely(plain, model, tokenizer, questions):
    """The option of highest summed log-probability, as text, for each (test set, index, example,
    prompt ids)."""
    options = [tasks.options(name, example) for name, _, example, _ in questions]
    prompts, ids = [prompt for *_, prompt in questions], []
    for (_, _, example, _), texts in zip(questions, options):
        responses = [
            tasks.encode_example(example | {"output": text}, tokenizer)[1] for text in texts
        ]
        ids.append([response[:-1] for response in responses])  # without the end-of-sequence token
    if plain:
        scores = [
            [log_likelihood(model, prompt, option) for option in each]
            for prompt, each in zip(prompts, ids)
        ]
    else:
        scores = inference.log_likelihoods(model, prompts, ids)
    if not all(map(math.isfinite, sum(scores, []))):
        raise FloatingPointError("the likelihoods are not finite: try --dtype float32")
    return [texts[int(np.argmax(score))] for texts, score in zip(options, scores)]


@torch.no_grad()
def log_likelihood(model, prompt, ids):
    """Summed log-probability, in nats, of ids after a prompt."""
    tokens = torch.tensor([prompt + ids], device=model.device)
    labels = tokens[:, 1:].clone()
    labels[:, : len(prompt) - 1] = -100
    return -model.loss(tokens[:, :-1], labels).item()


def score(correct):
    """test set -> list of bools, as results.json has it: scores, averages over examples (micro) and
    sets (macro)."""
    scores = {name: sum(each) / len(each) for name, each in correct.items()}
    counts = {name: len(each) for name, each in correct.items()}
    intervals = {
        name: tasks.wilson_interval(sum(each), len(each)) for name, each in correct.items()
    }
    micro = sum(map(sum, correct.values())) / sum(counts.values())
    macro = sum(scores.values()) / len(scores)
    return {
        "scores": scores,
        "micro": micro,
        "macro": macro,
        "counts": counts,
        "intervals": intervals,
    }


def print_table(names, results):
    print(f"{'test set':<16}{'examples':>9}{'accuracy':>10}   95 % interval")
    for name in names:
        if name not in results["scores"]:
            print(f"{name:<16}{'absent':>9}")
            continue
        low, high = results["intervals"][name]
        print(
            f"{name:<16}{results['counts'][name]:>9,}{results['scores'][name]:>10.1%}   {low:.1%} "
            f"to {high:.1%}"
        )
    if len(results["scores"]) > 1:
        total = sum(results["counts"].values())
        low, high = tasks.wilson_interval(round(results["micro"] * total), total)
        print(
            f"{'micro average':<16}{total:>9,}{results['micro']:>10.1%}   {low:.1%} to {high:.1%}"
        )
        print(f"{'macro average':<16}{len(results['scores']):>4} sets{results['macro']:>10.1%}")


def answer_prompt(args, model, tokenizer):
    """Print the answer to --prompt as it is made: of its text so far, what is new."""
    shown = ""

    def show(_, ids):
        nonlocal shown
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes have not all come yet
            print(text[len(shown) :], end="", flush=True)
            shown = text

    prompt = tasks.encode_prompt({"instruction": args.prompt}, tokenizer)
    if (room := model.config.context - len(prompt)) < 1:
        problem = f"--prompt has {len(prompt)} tokens, the model's context {model.config.context}"
        raise UserError(f"{problem}: make it shorter, there is no room for an answer")
    limit, eos = min(args.max_new_tokens, room), eos_tokens(model, tokenizer)
    if args.plain:
        (ids,) = model.generate([prompt], limit, eos)
    else:
        (ids,) = inference.generate(model, [prompt], limit, eos, on_token=show)
    print(tokenizer.decode(ids)[len(shown) :])


def eos_tokens(model, tokenizer):
    """Every id that ends an answer."""
    eos = model.config.eos_token_id  # one, several or none
    return {tokenizer.eos_id, *([] if eos is None else eos if isinstance(eos, list) else [eos])}


def load_questions(args, tokenizer):
    """(names of the task's test sets, those of them that are absent, questions as (test set, index,
    example, prompt ids))."""
    names, absent, questions = tasks.test_sets(args.task), [], []
    for name in names:
        examples = tasks.test_examples(name, args.data_dir, args.skip_empty)
        if examples is None:
            absent.append(name)
            continue
        for i, example in enumerate(examples[: args.limit]):
            if args.score == "likelihood":
                tasks.options(name, example)  # refuses what is no multiple choice
            questions.append((name, i, example, tasks.encode_prompt(example, tokenizer)))
    if not questions:
        advice = tasks.how_to_get(args.data_dir)
        raise UserError(f"{args.data_dir} has no test set of {args.task}. To get them: {advice}")
    return names, absent, questions


def check_lengths(args, questions, config, tokenizer):
    """The numbers of the questions that leave no room for their answer. Raises UserError for these
    unless asked to score them as wrong."""
    too_long, problem = set(), ""
    for number, (name, i, example, prompt) in enumerate(questions):
        room, answer = args.max_new_tokens, f"--max-new-tokens {args.max_new_tokens}"
        if args.score == "likelihood":
            room, answer = (
                len(tokenizer.encode(max(tasks.options(name, example), key=len))),
                "an answer",
            )
        if len(prompt) + room > config.context:
            problem = (
                problem or f"{name}, record {i}: the prompt has {len(prompt)} tokens; with {answer}"
            )
            too_long.add(number)
    if too_long and not args.long_is_wrong:
        more = (
            f" ({len(too_long)} of {len(questions)} prompts do; --long-is-wrong scores the others)"
        )
        raise UserError(f"{problem} it exceeds the model's context of {config.context}{more}")
    return too_long


def go_on(arguments):
    """What run_script adds to its line where a run ends before its time."""
    return "What was scored so far is kept, and not asked again"


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own."""
    run_script("eval.py", parse_args, main, arguments, go_on)


if __name__ == "__main__":
    run()
