"""Score a LLaMA, with or without an adapter, on the test sets of a task: greedy answers, exact match.

    python eval.py --ckpt tiny --task toy --adapter runs/tiny-toy-rosa
    python eval.py --ckpt checkpoints/llama2-7b --task arithmetic --adapter runs/llama2-7b-arithmetic-rosa

Writes predictions.jsonl, a line per example, and results.json beside the adapter, or under --out.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from model import Llama, choose_device_and_dtype, find_checkpoint


def parse_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = fail
    p.add_argument("--ckpt", default="tiny", help="checkpoint: a directory, a name in checkpoints/, or the bundled tiny")
    p.add_argument("--task", default="toy", help="toy, arithmetic, commonsense, or one test set")
    p.add_argument("--adapter", type=Path, help="adapter directory, as train.py writes it (default: the model alone)")
    p.add_argument("--limit", type=int, help="only the first so many examples of each test set")
    p.add_argument("--batch-size", type=int, default=32, help="examples generated at a time")
    p.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    p.add_argument("--data-dir", default=tasks.DATA_DIR, help="directory laid out as LLM-Adapters' repository")
    p.add_argument("--out", type=Path, help="where results go (default: the adapter's directory, or runs/<ckpt>-<task>-base)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model")
    args = p.parse_args(arguments)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    args.out = args.out or args.adapter or Path("runs") / f"{Path(args.ckpt).name}-{args.task}-base"
    return args


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"eval.py: {message}", file=sys.stderr)
    sys.exit(2)


def main(args):
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    names = tasks.test_sets(args.task)
    tokenizer = load_tokenizer(ckpt)
    examples = []  # (test set, index, example, prompt ids)
    absent = []
    for name in names:
        found = tasks.test_examples(name, args.data_dir)
        if found is None:
            absent.append(name)
            continue
        examples += [(name, i, example, tasks.encode_prompt(example, tokenizer)) for i, example in enumerate(found[: args.limit])]
    if not examples:
        raise FileNotFoundError(f"{args.data_dir} has no test set of {args.task}: {tasks.HOW_TO_GET}, and point --data-dir at it")
    model = Llama.from_pretrained(ckpt, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{ckpt}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}")
    room = model.config.max_position_embeddings - args.max_new_tokens
    for name, i, _, prompt in examples:
        if len(prompt) > room:
            raise ValueError(f"{name}, record {i}: the prompt has {len(prompt)} tokens; with --max-new-tokens "
                             f"{args.max_new_tokens} it exceeds the context of {model.config.max_position_embeddings}")
    if args.adapter:
        rosa.load_adapter(model, args.adapter)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"model      {ckpt}: {len(model.model.layers)} layers, {str(dtype)[6:]} on {device}; "
          f"adapter: {args.adapter or 'none'}")

    # --- the loop: long prompts first, so that what does not fit in memory fails at once ---
    eos_ids = {tokenizer.eos_id, *as_list(model.config.eos_token_id)}
    order = sorted(range(len(examples)), key=lambda j: -len(examples[j][3]))
    predictions, right, new_tokens = {}, dict.fromkeys(names, 0), 0
    start = time.perf_counter()
    bar = tqdm(total=len(order), unit="example", dynamic_ncols=True)
    for first in range(0, len(order), args.batch_size):
        batch = order[first : first + args.batch_size]
        answers = model.generate([examples[j][3] for j in batch], args.max_new_tokens, eos_ids)
        for j, ids in zip(batch, answers):
            name, i, example, _ = examples[j]
            response = tokenizer.decode(ids)
            correct = tasks.is_correct(name, response, example["answer"])
            right[name] += correct
            new_tokens += len(ids)
            predictions[j] = {"set": name, "index": i, "instruction": example["instruction"], "answer": example["answer"],
                              "response": response, "extracted": tasks.extract_answer(name, response), "correct": correct}
        seconds = time.perf_counter() - start
        bar.set_postfix_str(f"accuracy {sum(right.values()) / len(predictions):.1%}  {new_tokens / seconds:,.0f} new tokens/s",
                            refresh=False)
        bar.update(len(batch))
    bar.close()

    # --- the table ---
    counts = {name: sum(example[0] == name for example in examples) for name in names if name not in absent}
    scores = {name: right[name] / count for name, count in counts.items()}
    micro, macro = sum(right.values()) / len(examples), sum(scores.values()) / len(scores)
    print(f"{'test set':<16}{'examples':>9}{'accuracy':>10}")
    for name in names:
        print(f"{name:<16}" + (f"{'absent':>9}" if name in absent else f"{counts[name]:>9,}{scores[name]:>10.1%}"))
    if len(scores) > 1:
        print(f"{'micro average':<16}{len(examples):>9,}{micro:>10.1%}")
        print(f"{'macro average':<16}{len(scores):>4} sets{macro:>10.1%}")
    if absent:
        print(f"absent from {args.data_dir}: {', '.join(absent)}. To get them: {tasks.HOW_TO_GET}, and point --data-dir at it")
    write(args.out / "predictions.jsonl", "".join(json.dumps(predictions[j]) + "\n" for j in range(len(examples))))
    write(args.out / "results.json", json.dumps({"scores": scores, "micro": micro, "macro": macro}, indent=2) + "\n")
    print(f"every answer is in {args.out / 'predictions.jsonl'}")


def as_list(eos):
    """A config's eos_token_id, one number, several or none, as a list."""
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def write(path, text):
    """Replace a file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own."""
    try:
        main(parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    run()
