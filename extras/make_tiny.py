"""How the bundled checkpoint `data/tiny` was made: a SentencePiece tokenizer, a LLaMA of 2.3
million parameters.
Thanks to it the first command needs no download.
Without it: any other checkpoint.

    python -m extras.make_tiny OUT_DIR --minutes 30

It is pretrained on synthetic prose about quantities: little stories in which people gain, lose and
share things, with the sums written out, and lists of sums. No text has the form of an instruction
and its response, and no story has the numbers of a test problem of `toy.py`. So the model knows the
words and the arithmetic, and cannot do the task."""

import io
import math
import random
import time
from pathlib import Path

import sentencepiece
import torch

from data import toy
from data.errors import user_file
from extras.commands import command_parser, run_script
from model import Llama, LlamaConfig

CONTEXT, ROWS = 256, 16  # tokens a training row, rows a step


def story(rng):
    """A problem of the training split told as prose."""
    while toy.split_of((parts := toy.problem(rng))[0]) != "train":
        pass
    _, setup, question, steps, conclusion = parts
    if rng.random() < 0.25:
        setup += f" {question}"
    work = "" if rng.random() < 0.2 else rng.choice([" ", " ", "\n", "\n\n"]) + " ".join(steps)
    return f"{setup}{work} {conclusion}"


def sums(rng):
    """A list of equations."""
    lines = []
    for _ in range(rng.randint(2, 6)):
        a, b, m, n = rng.randint(1, 60), rng.randint(1, 30), rng.randint(2, 12), rng.randint(2, 9)
        a, b = max(a, b), min(a, b)
        lines.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}.",
                    f"{b} + {a} = {a + b}.",
                    f"{a} - {b} = {a - b}.",
                    f"{m} x {n} = {m * n}.",
                    f"{m * n} / {n} = {m}.",
                ]
            )
        )
    return " ".join(lines)


def note(rng):
    """A note that uses the words of letters and lists, so that the tokenizer and the model have met
    them."""
    name, other, item, count = (
        rng.choice(toy.GIRLS),
        rng.choice(toy.BOYS),
        rng.choice(toy.ITEMS),
        rng.randint(2, 60),
    )
    return rng.choice(
        [
            f"Below is a list that describes {count} {item}.",
            f"{name} has a task: write a note that describes {count} {item} to {other}.",
            f"{other} writes: the request is for {count} {item}. {name} completes the request "
            "appropriately.",
            f"An instruction for {name} and {other}: count the {item}. The response is {count}.",
            f"The instruction below is for {other}. It describes a request for {count} {item}.",
            f"# {item.capitalize()}\n{name} has an answer to the request: {count} {item}.",
            f"## {name} and {other}\nThe answer that completes the list is {count}.",
            f"{name}: Instruction and request.\n### {other}: Response. Write that the task is "
            "complete.",
        ]
    )


def document(rng):
    paragraphs = rng.choices([story, sums, note], weights=[7, 2, 1.5], k=rng.randint(4, 12))
    return rng.choice(["\n", "\n\n"]).join(paragraph(rng) for paragraph in paragraphs)


def train_tokenizer(rng):
    """1,024 pieces, each digit its own, bytes for whatever else: the bytes of a SentencePiece
    `tokenizer.model`."""
    lines = (line for _ in range(20000) for line in document(rng).split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars="#:?!,.'\"$%&()*;<>[]{}@_/=+-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def rows(rng, tokenizer, count):
    """`count` rows of CONTEXT + 1 ids cut from one endless stream of documents."""
    stream = []
    while len(stream) < count * (CONTEXT + 1):
        stream += [tokenizer.bos_id(), *tokenizer.encode(document(rng)), tokenizer.eos_id()]
    return torch.tensor(stream[: count * (CONTEXT + 1)]).view(count, CONTEXT + 1)


def main(args):
    rng = random.Random(0)
    torch.manual_seed(0)
    with user_file(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "tokenizer.model").write_bytes(train_tokenizer(rng))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))

    model = Llama(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size(),
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    start, step, tokens = time.monotonic(), 0, 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        lr = 2e-3 * min(1, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = rows(rng, tokenizer, ROWS)
        loss = model.loss(batch[:, :-1], batch[:, 1:].contiguous()) / (ROWS * CONTEXT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ROWS * CONTEXT
        if step % 100 == 0:
            print(
                f"step {step}  {tokens:,} tokens  loss {loss.item():.4f}  lr {lr:.1e}  "
                f"{tokens / (time.monotonic() - start):,.0f} tokens/s",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(args.out)


def parse_args(arguments=None):
    parser = command_parser("make_tiny", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to be made")
    parser.add_argument("--minutes", type=float, default=30, help="training time (default: 30)")
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("make_tiny", parse_args, main, arguments)


if __name__ == "__main__":
    run()
