"""Fine-tune a LLaMA with RoSA or LoRA: one script, one loop.

    python train.py --ckpt tiny --task toy
    python train.py --ckpt checkpoints/llama2-7b --task arithmetic --data-dir LLM-Adapters

A run directory (--out) holds the best adapter, `args.json`, and `log.jsonl`: {"step": 0, "val_loss": x}, then a line
per optimiser step with step, loss, lr, tokens, seconds, active_layers, and val_loss where it was measured.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from model import Llama, choose_device_and_dtype, find_checkpoint


def parse_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = fail
    p.add_argument("--ckpt", default="tiny", help="checkpoint: a directory, a name in checkpoints/, or the bundled tiny")
    p.add_argument("--task", default="toy", help="toy, arithmetic, commonsense, or one test set with --train-file")
    p.add_argument("--method", default="rosa", choices=("rosa", "lora"), help="lora: every row of the targets adapts")
    p.add_argument("--targets", default="q,k", help="of q,k,v,o,gate,up,down; RoSA adapts the others than q and k by LoRA")
    p.add_argument("--rank", type=int, default=64, help="rank of each low-rank update")
    p.add_argument("--alpha", type=float, default=128, help="updates are scaled by alpha / rank")
    p.add_argument("--low-freq-ratio", type=float, default=0.25, help="share of each head's RoPE pairs that RoSA adapts")
    p.add_argument("--k-ratio", type=float, help="share of the layers that train at a time (default: 0.5; lora: 1)")
    p.add_argument("--select-every", type=int, default=25, help="optimiser steps between selections of layers")
    p.add_argument("--score-ema", type=float, default=0.0, help="share of the old score in a layer's new one")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate: warm-up over 5 %% of the steps, then cosine")
    p.add_argument("--epochs", type=int, default=3, help="passes over the training examples")
    p.add_argument("--batch-size", type=int, default=16, help="examples per optimiser step")
    p.add_argument("--micro-batch-size", type=int, default=4, help="examples per forward pass")
    p.add_argument("--max-len", type=int, default=512, help="tokens; longer examples are left out")
    p.add_argument("--max-steps", type=int, help="stop after so many optimiser steps")
    p.add_argument("--seed", type=int, default=0, help="of the adapters, the held-out examples and the order")
    p.add_argument("--val-size", type=int, default=300, help="training examples held out for validation")
    p.add_argument("--eval-every", type=int, default=100, help="optimiser steps between validations")
    p.add_argument("--save-every", type=int, default=100, help="optimiser steps between saves for --resume")
    p.add_argument("--resume", action="store_true", help="continue the run in --out from its last save")
    p.add_argument("--data-dir", default=tasks.DATA_DIR, help="directory laid out as LLM-Adapters' repository")
    p.add_argument("--train-file", help="train on this JSON file instead of the task's own")
    p.add_argument("--out", type=Path, help="run directory (default: runs/<ckpt>-<task>-<method>)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model")
    args = p.parse_args(arguments)
    if args.k_ratio is None:
        args.k_ratio = 0.5 if args.method == "rosa" else 1.0
    if args.out is None:
        args.out = Path("runs") / f"{Path(args.ckpt).name}-{args.task}-{args.method}"
    for name in ("epochs", "batch_size", "micro_batch_size", "max_len", "max_steps", "val_size", "eval_every", "save_every"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    if args.batch_size % args.micro_batch_size:
        fail(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}")
    if not 0 < args.lr < math.inf:
        fail(f"--lr must be a positive number, not {args.lr}")
    return args


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


def main(args):
    # --- the model and its adapters ---
    ckpt = find_checkpoint(args.ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    train_set, val_set, too_long = load_data(args, tokenizer)
    model = Llama.from_pretrained(ckpt, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{ckpt}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}")
    if args.max_len > model.config.max_position_embeddings:
        raise ValueError(f"--max-len {args.max_len} exceeds the context of {ckpt}: {model.config.max_position_embeddings}")
    torch.manual_seed(args.seed)
    low_freq_ratio = args.low_freq_ratio if args.method == "rosa" else 1.0
    rosa.attach(model, args.rank, args.alpha, low_freq_ratio, args.targets)
    selector = rosa.LayerSelector(model, args.k_ratio, args.select_every, args.score_ema)
    parameters = [p for adapter in rosa.adapters(model).values() for p in (adapter.A, adapter.B)]
    # All adapters are registered, once. AdamW passes over those without a gradient: a frozen layer's moments stay.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    batches_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = min(args.epochs * batches_per_epoch, args.max_steps or math.inf)

    trainable, everything = (sum(p.numel() for p in some) for some in (parameters, model.parameters()))
    lengths = [len(prompt) + len(response) for prompt, response in train_set]
    print(f"model      {ckpt}: {len(model.model.layers)} layers, {str(dtype)[6:]} on {device}; adapters in float32")
    print(f"method     {args.method} on {args.targets}; {selector.count} of {len(model.model.layers)} layers train at a time")
    print(f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {100 * trainable / everything:.4f}")
    print(f"data       {len(train_set):,} examples of {sum(lengths):,} tokens to train on, {len(val_set):,} held out; "
          f"{too_long:,} longer than {args.max_len} tokens left out")
    print(f"steps      {total_steps:,}: {total_steps / batches_per_epoch:.3g} epochs in batches of {args.batch_size}, "
          f"{args.micro_batch_size} at a time")

    # --- where to begin ---
    if args.resume:
        step, best = load_state(args, model, optimizer, selector)
    else:
        step = 0
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "args.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
        best = validate(model, val_set, args)
        rosa.save_adapter(model, args.out)
        write_log(args.out, {"step": 0, "val_loss": best}, mode="w")
        print(f"validation loss {best:.4f} before training")

    # --- the loop ---
    first_step = step
    bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True,
               bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}")
    while step < total_steps:
        epoch, position = divmod(step, batches_per_epoch)
        if position == 0 or step == first_step:
            batches = make_batches(lengths, args.batch_size, f"{args.seed} {epoch}")
        batch = [train_set[i] for i in batches[position]]
        start = time.perf_counter()

        # Learning rate: linear warm-up over the first 5 % of the steps, then a cosine down to zero.
        warmup = max(1, math.ceil(0.05 * total_steps))
        progress = max(0, step - warmup) / max(1, total_steps - warmup)
        lr = args.lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Gradients of the mean loss per response token, over all micro-batches together.
        selector.before_forward(step)
        response_tokens = sum(len(response) for _, response in batch)
        loss = 0.0
        for i in range(0, len(batch), args.micro_batch_size):
            tokens, labels = collate(batch[i : i + args.micro_batch_size], device)
            micro_loss = model.loss(tokens, labels) / response_tokens
            micro_loss.backward()
            loss += micro_loss.item()
        selector.after_backward()

        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        seconds = time.perf_counter() - start
        token_count = sum(len(prompt) + len(response) for prompt, response in batch)
        record = {"step": step, "loss": loss, "lr": lr, "tokens": token_count, "seconds": seconds,
                  "active_layers": selector.active}
        if step % args.eval_every == 0 or step == total_steps:
            record["val_loss"] = validate(model, val_set, args)
            tqdm.write(f"step {step:5}  validation loss {record['val_loss']:.4f}")
            if record["val_loss"] < best:  # the adapter kept is the best one, not the last one
                best = record["val_loss"]
                rosa.save_adapter(model, args.out)
        write_log(args.out, record)
        if step % args.save_every == 0 or step == total_steps:
            save_state(args, model, optimizer, selector, step, best)
        strip = "".join("█" if i in selector.active else "·" for i in range(len(model.model.layers)))
        bar.set_postfix_str(f"loss {loss:.3f}  lr {lr:.1e}  {token_count / seconds:,.0f} tokens/s  {strip}", refresh=False)
        bar.update()
    bar.close()
    print(f"best validation loss {best:.4f}; its adapter is in {args.out}")


def load_data(args, tokenizer):
    """(training examples, validation examples, how many were longer than --max-len), as (prompt ids, response ids)."""
    examples = tasks.train_examples(args.task, args.data_dir, args.train_file)
    encoded = [tasks.encode_example(example, tokenizer)
               for example in tqdm(examples, desc="tokenizing", leave=False, disable=None)]
    kept = [pair for pair in encoded if len(pair[0]) + len(pair[1]) <= args.max_len]
    if len(kept) <= args.val_size:
        raise ValueError(f"{len(kept)} of {len(encoded)} examples have at most --max-len {args.max_len} tokens: too few to "
                         f"hold --val-size {args.val_size} of them out and train on the rest")
    random.Random(args.seed).shuffle(kept)
    return kept[args.val_size :], kept[: args.val_size], len(encoded) - len(kept)


def make_batches(lengths, batch_size, seed):
    """The batches of an epoch, as lists of indices: examples of similar length share a batch, so that little is padded,
    and the batches come in random order. Sorting within pools of 64 batches keeps their company changing."""
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    pool = 64 * batch_size
    order = [i for start in range(0, len(order), pool)
             for i in sorted(order[start : start + pool], key=lambda i: lengths[i])]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples, device):
    """Pad on the right: tokens [B, T], and labels [B, T], the next token where it belongs to the response, else -100."""
    width = max(len(prompt) + len(response) for prompt, response in examples) - 1
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, response) in enumerate(examples):
        ids = prompt + response
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(response)
    return tokens.to(device), labels.to(device)


@torch.no_grad()
def validate(model, examples, args):
    """Mean cross-entropy per response token, in nats."""
    by_length = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    total = 0.0
    for i in tqdm(range(0, len(by_length), args.micro_batch_size), desc="validation", leave=False, disable=None):
        tokens, labels = collate(by_length[i : i + args.micro_batch_size], model.device)
        total += model.loss(tokens, labels).item()
    return total / sum(len(response) for _, response in examples)


def write_log(out, record, mode="a"):
    with open(out / "log.jsonl", mode, encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


NOT_COMPARED = ("resume", "out", "device", "save_every")  # what may differ between a run and its resumption


def save_state(args, model, optimizer, selector, step, best):
    """Everything that the rest of the run depends on, in one file, replaced whole."""
    tensors = {f"adapter.{name}": p.detach().cpu() for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value.cpu() for key, value in moments.items()}
    tensors["scores"] = selector.scores
    progress = {"step": step, "best": best, "active": selector.active,
                "args": {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}}
    partial = args.out / "state.safetensors.partial"
    save_file(tensors, partial, metadata={"progress": json.dumps(progress, default=str)})
    os.replace(partial, args.out / "state.safetensors")


def load_state(args, model, optimizer, selector):
    """Undo `save_state`; returns (step, best validation loss). Log lines beyond that step are dropped."""
    path = args.out / "state.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is absent: nothing was saved there yet; run without --resume")
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for key, value in progress["args"].items():
        if (now := json.loads(json.dumps(vars(args)[key], default=str))) != value:
            raise ValueError(f"--resume: the run in {args.out} has --{key.replace('_', '-')} {value}, not {now}")
    named = dict(model.named_parameters())
    moments = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adapter":
                named[rest].copy_(tensor)
            elif kind == "optimizer":
                i, key = rest.split(".")
                moments.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    selector.scores = tensors["scores"]
    selector.activate(progress["active"])
    log = args.out / "log.jsonl"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= progress["step"]]
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return progress["step"], progress["best"]


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own."""
    try:
        main(parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    run()
