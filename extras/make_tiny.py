"""How the bundled checkpoint `data/tiny` was made: a SentencePiece tokenizer, and a LLaMA of 2.3
million parameters.
Thanks to this checkpoint the first command needs no download.
Without it: any other checkpoint.

    python -m extras.make_tiny OUT_DIR --minutes 30
    python -m extras.make_tiny OUT_DIR --minutes 14 --theta 100     # a RoPE for short texts

The model is pretrained on synthetic prose about quantities: little stories in which people gain,
lose and share things, with the sums written out, and lists of sums. No text has the form of an
instruction and its response, and no story has the numbers of a test problem of `toy.py`. So the
model knows the words and the arithmetic, and cannot do the task."""

import io
import json
import math
import random
import string
import time
from pathlib import Path

import sentencepiece
import torch

from data import toy
from data.errors import user_file
from extras.commands import command_parser, positive, run_script
from model import Llama, LlamaConfig

CONTEXT = 256  # tokens in a training row
ROWS = 16  # training rows in a step
PUNCTUATION = "#:?!,.'\"$%&()*;<>[]{}@_/=+-"  # the characters of this kind that get pieces


def story(rng):
    """A problem of the training split told as prose."""
    key, setup, question, steps, conclusion = toy.problem(rng)
    while toy.split_of(key) != "train":
        key, setup, question, steps, conclusion = toy.problem(rng)
    if rng.random() < 0.25:
        setup += f" {question}"
    work = ""
    if rng.random() >= 0.2:
        work = rng.choice([" ", " ", "\n", "\n\n"]) + " ".join(steps)
    return f"{setup}{work} {conclusion}"


def sums(rng):
    """A list of equations."""
    lines = []
    for _ in range(rng.randint(2, 6)):
        a = rng.randint(1, 60)
        b = rng.randint(1, 30)
        m = rng.randint(2, 12)
        n = rng.randint(2, 9)
        a, b = max(a, b), min(a, b)
        equations = [
            f"{a} + {b} = {a + b}.",
            f"{b} + {a} = {a + b}.",
            f"{a} - {b} = {a - b}.",
            f"{m} x {n} = {m * n}.",
            f"{m * n} / {n} = {m}.",
        ]
        lines.append(rng.choice(equations))
    return " ".join(lines)


def note(rng):
    """A note in the words of the prompts' templates, so that the tokenizer and the model have met
    these words."""
    name = rng.choice(toy.GIRLS)
    other = rng.choice(toy.BOYS)
    item = rng.choice(toy.ITEMS)
    count = rng.randint(2, 60)
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
    """The bytes of a SentencePiece `tokenizer.model` with 1,024 pieces. Each digit is a piece, and
    characters that have no piece are spelt in bytes."""

    def lines_of_documents():
        for _ in range(20000):
            for line in document(rng).split("\n"):
                if line:
                    yield line

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines_of_documents(),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars=PUNCTUATION
        + string.digits
        + string.ascii_uppercase
        + string.ascii_lowercase,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def rows(rng, tokenizer, count):
    """`count` rows of CONTEXT + 1 ids, cut from documents that follow each other without a gap."""
    stream = []
    while len(stream) < count * (CONTEXT + 1):
        stream += [tokenizer.bos_id(), *tokenizer.encode(document(rng)), tokenizer.eos_id()]
    return torch.tensor(stream[: count * (CONTEXT + 1)]).view(count, CONTEXT + 1)


# How transformers shall use tokenizer.model: every text begins with <s>.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


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
            rope_theta=args.theta,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    start = time.monotonic()
    step = 0
    tokens = 0
    while True:
        done = (time.monotonic() - start) / (60 * args.minutes)  # the part of the time that is over
        if done >= 1:
            break
        warmup = min(1, (step + 1) / 200)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        lr = 2e-3 * warmup * (0.05 + 0.95 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = rows(rng, tokenizer, ROWS)
        loss = model.loss(batch[:, :-1], batch[:, 1:].contiguous()) / (ROWS * CONTEXT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += ROWS * CONTEXT
        if step % 100 == 0:
            speed = tokens / (time.monotonic() - start)
            print(
                f"step {step}  {tokens:,} tokens  loss {loss.item():.4f}  lr {lr:.1e}  "
                f"{speed:,.0f} tokens/s",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def parse_args(arguments=None):
    parser = command_parser("make_tiny", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to be made")
    parser.add_argument("--minutes", type=float, default=30, help="training time (default: 30)")
    parser.add_argument(
        "--theta", type=positive, default=10000.0, help="RoPE's base (default: 10000)"
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("make_tiny", parse_args, main, arguments)


if __name__ == "__main__":
    run()
