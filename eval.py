"""Score a LLaMA, with or without an adapter, on the test sets of a task: greedy answers, exact match.

    python eval.py --ckpt tiny --task toy --adapter runs/tiny-toy-rosa
    python eval.py --ckpt checkpoints/llama2-7b --task gsm8k,SVAMP --adapter runs/llama2-7b-arithmetic-rosa
    python eval.py --ckpt tiny --prompt "Tom has 3 pens. He buys 4 more. How many pens does he have?"
    torchrun --nproc_per_node=8 eval.py ...                          # eight processes, each of which scores its share

Writes predictions.jsonl, a line per example as it is answered, and results.json beside the adapter, or under --out.
Run again it goes on where it stopped: what the same adapter has answered with the same settings is not asked again.
"""

import argparse
import hashlib
import json
import sys
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from extras import peft_methods
from extras.checkpoints import NAMES, choose_device_and_dtype, find_checkpoint, say_if_bfloat16_is_slow
from extras.distributed import died, gather, join_processes, processes
from extras.runs import Help, one_line, write_whole
from model import Llama

MOVED = {"--loss": "forgetting FILE ...", "--activations": "figure1 PNG", "--compare": "compare RUN ..."}  # what older versions had


def parse_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    p.error = fail
    p.add_argument("--ckpt", default="tiny", help="checkpoint: a directory, a name in checkpoints/, "
                   f"an org/name in Hugging Face's cache, or a name known: {', '.join(NAMES)}; tiny is bundled")
    p.add_argument("--task", default="toy", help="toy, arithmetic, commonsense, or test sets, separated by commas")
    p.add_argument("--adapter", type=Path, help="adapter directory, as train.py writes it (default: the model alone)")
    p.add_argument("--limit", type=int, help="only the first so many examples of each test set or file")
    p.add_argument("--score", default="generate", choices=("generate", "likelihood"),
                   help="likelihood: of a multiple-choice question's options the most probable is the answer")
    p.add_argument("--batch-size", type=int, default=32, help="examples at a time")
    p.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    p.add_argument("--prompt", help="instead of scoring: answer this one question, printing the answer as it is made")
    p.add_argument("--data-dir", default=tasks.DATA_DIR, help="directory laid out as LLM-Adapters' repository")
    p.add_argument("--out", type=Path, help="where results go (default: the adapter's directory, or runs/<ckpt>-<task>-base)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model")
    for argument in sys.argv[1:] if arguments is None else arguments:
        if command := MOVED.get(argument.split("=")[0]):
            fail(f"{argument.split('=')[0]} is a command of its own now: python -m extras.{command}")
    args = p.parse_args(arguments)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    args.out = args.out or args.adapter or Path("runs") / f"{Path(args.ckpt).name}-{args.task}-base"
    return args


def fail(message):
    """A user's mistake: one line, exit status 2."""
    gather(problem=("eval.py", one_line(message)))


def stop(message, status):
    """What befalls an evaluation on its way: one line, told by the first process, and the end."""
    if processes()[0] == 0:
        print(f"eval.py: {message}: what was scored so far is kept, and not asked again", file=sys.stderr)
    sys.exit(status)


def main(args):
    rank, world = processes()
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    if args.prompt is not None and not (args.prompt.strip() and tasks.is_unicode(args.prompt)):
        raise ValueError("--prompt is empty, or not text in UTF-8")
    names, absent, examples = [], [], []
    if not args.prompt:
        names, absent, examples = load_questions(args, tokenizer)
    model = Llama.from_pretrained(ckpt, device, dtype)
    for name, i, example, prompt in examples:
        room, more = args.max_new_tokens, f"--max-new-tokens {args.max_new_tokens}"
        if args.score == "likelihood":
            room, more = len(tokenizer.encode(max(tasks.options(name, example), key=len))), "an answer"
        if len(prompt) + room > model.config.context:
            raise ValueError(f"{name}, record {i}: the prompt has {len(prompt)} tokens; with {more} it exceeds the model's "
                             f"{model.config.limit}")
    if args.adapter:
        peft_methods.load_adapter(model, args.adapter)
        if dtype == torch.float32:  # bfloat16 weights would round the adapter's part away
            rosa.merge(model)
    if not hasattr(model, "peft_config"):  # PEFT's layers read the weights themselves
        model.pack()
    gather()  # all are set up
    say_if_bfloat16_is_slow(device, dtype)
    if rank > 0 and args.prompt:
        return  # this the first does alone
    if args.prompt:
        return answer(args, model, tokenizer)
    print(f"model      {ckpt}: {len(model.model.layers)} layers, {str(dtype)[6:]} on {device}; "
          f"adapter: {args.adapter or 'none'}")

    # --- what is answered already ---
    path, key = args.out / "predictions.jsonl", fingerprint(args, ckpt, dtype)
    lines, *_ = gather(read_predictions(path) if rank == 0 else None)
    answered = {(line["set"], line["index"]): line for line in lines if line.get("settings") == key}
    if lines and not answered:
        print(f"answers    those in {path} are another adapter's or were made with other settings: starting anew")
    predictions = {}  # number of the example -> its line
    for j, (name, i, example, _) in enumerate(examples):
        line = answered.get((name, i))
        if line and (line["instruction"], line["answer"]) == (example["instruction"], example["answer"]):
            predictions[j] = answered.pop((name, i))
    if predictions:
        print(f"answers    {len(predictions):,} of {len(examples):,} are in {path} already")
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [*predictions.values(), *answered.values()]))

    # --- the loop: long prompts first, so that what does not fit in memory fails at once ---
    order = sorted(set(range(len(examples))) - set(predictions), key=lambda j: (-len(examples[j][3]), j))
    right, new_tokens = sum(line["correct"] for line in predictions.values()), 0
    start = time.perf_counter()
    bar = tqdm(total=len(examples), initial=len(predictions), unit="example", dynamic_ncols=True, disable=rank > 0)
    own = order[rank::world]  # long and short prompts in each process
    answers = respond(args, model, tokenizer, [examples[j] for j in own])
    some = 1 if world == 1 else args.batch_size  # answers at a time: processes wait for each other
    for _ in range(0, len(order), some * world):
        told = gather([(own[i], response, count) for i, response, count in islice(answers, some)])
        if rank > 0:
            continue
        with open(path, "a", encoding="utf-8") as file:  # at once, so that nothing is asked twice
            for j, response, count in chain(*told):
                name, i, example, _ = examples[j]
                correct = tasks.is_correct(name, response, example["answer"])
                predictions[j] = {"set": name, "index": i, "instruction": example["instruction"], "answer": example["answer"],
                                  "response": response, "extracted": tasks.extract_answer(name, response), "correct": correct,
                                  "settings": key}
                file.write(json.dumps(predictions[j]) + "\n")
                right += correct
                new_tokens += count
        speed = f"  {new_tokens / (time.perf_counter() - start):,.0f} new tokens/s" if new_tokens else ""
        bar.set_postfix_str(f"accuracy {right / len(predictions):.1%}{speed}", refresh=False)
        bar.update(sum(map(len, told)))
    bar.close()
    if rank > 0:
        return

    # --- the table ---
    results = {name: [] for name in names if name not in absent}
    for line in predictions.values():
        results[line["set"]].append(line["correct"])
    scores = {name: sum(correct) / len(correct) for name, correct in results.items()}
    intervals = {name: tasks.wilson_interval(sum(correct), len(correct)) for name, correct in results.items()}
    micro, macro = right / len(examples), sum(scores.values()) / len(scores)
    print(f"{'test set':<16}{'examples':>9}{'accuracy':>10}   95 % interval")
    for name in names:
        print(f"{name:<16}" + (f"{'absent':>9}" if name in absent else f"{len(results[name]):>9,}{scores[name]:>10.1%}"
                               f"   {intervals[name][0]:.1%} to {intervals[name][1]:.1%}"))
    if len(scores) > 1:
        low, high = tasks.wilson_interval(right, len(examples))
        print(f"{'micro average':<16}{len(examples):>9,}{micro:>10.1%}   {low:.1%} to {high:.1%}")
        print(f"{'macro average':<16}{len(scores):>4} sets{macro:>10.1%}")
    if absent:
        print(f"absent from {args.data_dir}: {', '.join(absent)}. To get them: {tasks.how_to_get(args.data_dir)}")
    lines = [predictions[j] for j in range(len(examples))] + list(answered.values())
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    counts = {name: len(correct) for name, correct in results.items()}
    results = {"scores": scores, "micro": micro, "macro": macro, "counts": counts, "intervals": intervals, "score": args.score}
    write_whole(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"every answer is in {path}")


def respond(args, model, tokenizer, questions):
    """Yields (number of the question, response, its new tokens) as questions, (set, index, example, prompt ids), are answered."""
    if args.score == "generate":
        prompts = [prompt for *_, prompt in questions]
        for i, ids in model.stream(prompts, args.max_new_tokens, eos_tokens(model, tokenizer), batch_size=args.batch_size):
            yield i, tokenizer.decode(ids), len(ids)
    else:
        for first in range(0, len(questions), args.batch_size):
            for i, response in enumerate(most_likely(model, tokenizer, questions[first : first + args.batch_size]), first):
                yield i, response, 0


def answer(args, model, tokenizer):
    """Print the answer to --prompt as it is made: of its text so far, what is new."""
    shown = ""

    def show(_, ids):
        nonlocal shown
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes have not all come yet
            print(text[len(shown):], end="", flush=True)
            shown = text

    prompt = tasks.encode_prompt({"instruction": args.prompt}, tokenizer)
    if (room := model.config.context - len(prompt)) < 1:
        raise ValueError(f"--prompt has {len(prompt)} tokens: no room for an answer is in the model's {model.config.limit}")
    ids, = model.generate([prompt], min(args.max_new_tokens, room), eos_tokens(model, tokenizer), show)
    print(tokenizer.decode(ids)[len(shown):])


def eos_tokens(model, tokenizer):
    """Every id that ends an answer."""
    eos = model.config.eos_token_id  # one, several or none
    return {tokenizer.eos_id, *([] if eos is None else eos if isinstance(eos, list) else [eos])}


def load_questions(args, tokenizer):
    """(names of the task's test sets, those of them that are absent, the examples as (set, index, example, prompt ids))."""
    names, absent, examples = tasks.test_sets(args.task), [], []
    for name in names:
        found = tasks.test_examples(name, args.data_dir)
        if found is None:
            absent.append(name)
            continue
        for i, example in enumerate(found[: args.limit]):
            if args.score == "likelihood":
                tasks.options(name, example)  # refuses what is no multiple choice
            examples.append((name, i, example, tasks.encode_prompt(example, tokenizer)))
    if not examples:
        raise FileNotFoundError(f"{args.data_dir} has no test set of {args.task}. To get them: "
                                f"{tasks.how_to_get(args.data_dir)}")
    return names, absent, examples


def most_likely(model, tokenizer, questions):
    """The option of highest summed log-probability, as text, for each (set, index, example, prompt ids)."""
    options = [tasks.options(name, example) for name, _, example, _ in questions]
    ids = [[tasks.encode_example(example | {"output": option}, tokenizer)[1][:-1] for option in some]  # without the eos
           for (_, _, example, _), some in zip(questions, options)]
    scores = model.log_likelihoods([prompt for *_, prompt in questions], ids)
    return [some[int(np.argmax(score))] for some, score in zip(options, scores)]


def fingerprint(args, ckpt, dtype):
    """What an answer depends on beside its question, in twelve characters."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(ckpt.glob("*.safetensors"))]
    adapter = args.adapter and [(args.adapter / name).read_bytes()
                                for name in ("adapter_config.json", "adapter_model.safetensors")]
    limit = args.max_new_tokens if args.score == "generate" else None
    told = [(ckpt / "config.json").read_bytes(), files, adapter, args.score, limit, dtype]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def read_predictions(path):
    """The lines of a predictions.jsonl, but a last one that was cut short, and whatever else is no answer."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if isinstance(line, dict) and {"set", "index", "instruction", "answer", "correct"} <= line.keys():
            lines.append(line)
    return lines


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own."""
    try:
        join_processes()
        main(parse_args(arguments))
        gather()  # nobody leaves before all are done
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except RuntimeError as error:
        if not died(error):
            raise
        stop("another process has ended, and this one with it", 1)


if __name__ == "__main__":
    run()
