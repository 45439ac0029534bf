"""The loss on what was not trained, without an adapter and with it: what fine-tuning has made the
model forget.
Its numbers are nats per token, of the responses of another task or of any text.
Without it: model.loss(tokens, labels) on text of one's own.

    python -m extras.forgetting other_task.json notes.txt --ckpt tiny --adapter runs/tiny-toy-rosa
"""

import math
import os
from pathlib import Path

import torch
from tqdm import tqdm

from data import tasks
from data.errors import UserError, read_text
from data.tokenizer import load_tokenizer
from extras import adapters, checkpoints
from extras.checkpoints import (
    choose_device_and_dtype,
    find_checkpoint,
    load_model,
    say_if_bfloat16_is_slow,
)
from extras.commands import add_model_arguments, command_parser, count, run_script
from extras.records import (
    add_result,
    hash_of,
    make_writable,
    origin_of,
    result_code,
    say_if_unfinished,
)

PIECE = 256  # tokens


def load_texts(file, tokenizer, limit, skip_empty):
    """A file as (place, (context ids, ids to predict)): the examples of a .json or .jsonl, else the
    text in pieces."""
    if file.suffix in (".json", ".jsonl"):
        placed = tasks.placed_examples(file, skip_empty=skip_empty)[:limit]
        return [(place, tasks.encode_example(example, tokenizer)) for place, example in placed]
    ids = tokenizer.encode(read_text(file))
    if not ids:
        raise UserError(f"{file} holds no text")
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    pieces = [ids[i : i + PIECE] for i in range(0, len(ids), PIECE)]
    return [(f"piece {i}", ([start], piece)) for i, piece in enumerate(pieces[:limit], 1)]


def check_lengths(texts, context_length):
    """Raise UserError for what is longer than the model's context. texts: file -> `load_texts`."""
    for file, placed in texts.items():
        for place, (context, predicted) in placed:
            length = len(context) + len(predicted) - 1
            if length > context_length:
                problem = f"{length} tokens exceed the model's context of {context_length}"
                raise UserError(f"{file}, {place}: {problem}: leave it out")


@torch.inference_mode()
def mean_loss(model, pairs, file, note=""):
    """Mean cross-entropy of the predicted tokens, in nats per token. Raises FloatingPointError
    naming file and note."""
    total = 0.0
    for context, predicted in tqdm(
        sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1])),
        desc=f"{file.name}{note}",
        leave=False,
    ):
        tokens, labels = tasks.tokens_and_labels(context, predicted)
        tokens = torch.tensor([tokens], device=model.device)
        labels = torch.tensor([labels], device=model.device)
        total += model.loss(tokens, labels).item()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss on {file}{note} is {total}: try --dtype float32")
    return total / sum(len(predicted) for _, predicted in pairs)


def main(args):
    """Print the loss on each file, with --adapter that of the model alone too; add them to
    losses.json in --out."""
    # --- what warns or refuses, before the work ---
    ckpt = find_checkpoint(args.ckpt)
    adapter = Path(args.adapter) if args.adapter else None
    if adapter:
        adapters.read_adapter(adapter)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    placed = {file: load_texts(file, tokenizer, args.limit, args.skip_empty) for file in args.files}
    model = load_model(ckpt, device, dtype, quantization=args.quantize)
    check_lengths(placed, model.config.context)
    checkpoints.check_finite(model)
    say_if_bfloat16_is_slow(device, dtype)
    say_if_unfinished(adapter or ckpt)
    out = Path(args.out or adapter or f"runs/{Path(os.path.abspath(ckpt)).name}-base")
    make_writable(out)

    # --- the losses ---
    texts = {file: [pair for _, pair in pairs] for file, pairs in placed.items()}
    alone = {}
    if adapter:
        for file, pairs in texts.items():
            alone[file] = mean_loss(model, pairs, file, ", without the adapter")
        adapters.load_adapter(model, adapter)
        checkpoints.check_finite(model)
    code = result_code("loss", adapter, own=[mean_loss], quantization=args.quantize)
    settings = [dtype, args.quantize] if args.quantize else dtype
    result = origin_of(ckpt, adapter, settings, code) | {"ckpt": str(args.ckpt)}
    result |= {"losses": {}, "losses_alone": {}, "tokens": {}, "texts": {}}
    names = {file: file.with_suffix("").as_posix() for file in texts}
    for file, pairs in texts.items():
        name = names[file]
        if list(names.values()).count(name) > 1:  # notes.txt beside notes.json
            name = file.as_posix()
        loss = mean_loss(model, pairs, file)
        num_tokens = sum(len(predicted) for _, predicted in pairs)
        result["losses"][name] = loss
        result["tokens"][name] = num_tokens
        result["texts"][name] = hash_of(pairs)
        change = ""
        if file in alone:
            result["losses_alone"][name] = alone[file]
            change = f", without the adapter {alone[file]:.4f}: {loss - alone[file]:+.4f}"
        print(f"{name:<32}{num_tokens:>9,} tokens   {loss:.4f} nats per token{change}")
    identifying = ("checkpoint", "adapter", "settings", "code")
    add_result(out / "losses.json", result, identifying, with_other_files)


def with_other_files(old, new):
    """The losses on other files, which the same model has by the same code, beside the new ones."""
    by_file = ("losses", "losses_alone", "tokens", "texts")
    return new | {name: old.get(name, {}) | new[name] for name in by_file}


def parse_args(arguments=None):
    parser = command_parser("forgetting", __doc__)
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".json or .jsonl of training examples, or any other text",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--skip-empty", action="store_true", help="leave out examples with an empty field"
    )
    parser.add_argument(
        "--limit", type=count, help="only the first so many examples or pieces of each file"
    )
    parser.add_argument(
        "--out",
        help="where losses.json goes (default: the adapter's directory, or runs/<ckpt>-base)",
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("forgetting", parse_args, main, arguments)


if __name__ == "__main__":
    run()
