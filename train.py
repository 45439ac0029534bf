"""Fine-tune a LLaMA with RoSA, LoRA, any method of the package peft, or in full: one script, one loop.

    python train.py --ckpt tiny --task toy
    python train.py --ckpt checkpoints/llama2-7b --task arithmetic --data-dir LLM-Adapters
    python train.py --ckpt tiny --task toy --method peft:IA3 --lr 1e-2
    torchrun --nproc_per_node=8 train.py --ckpt llama2-7b --task arithmetic      # the same run, by eight processes

A run directory (--out) holds the best adapter, `args.json`, and `log.jsonl`: {"step": 0, "val_loss": x}, then a line
per optimiser step with step, loss, lr, tokens, seconds, active_layers, and val_loss where it was measured.
`layers.jsonl` has a line per selection of layers, with their scores; at its end the run adds their picture,
`layers.png`, and `summary.json`, the run in six numbers. `state.safetensors` is what --resume goes on from: a run that was
killed at any moment and resumed ends in the same bytes as one that never was.
"""

import argparse
import math
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

import rosa
from data import tasks
from data.tokenizer import load_tokenizer
from extras import peft_methods, runs
from extras.checkpoints import NAMES, choose_device_and_dtype, find_checkpoint, say_if_bfloat16_is_slow
from extras.distributed import all_reduce_gradients, died, gather, join_processes, own_micro_batches, processes, shard
from extras.runs import Help, one_line
from model import Llama, Operators, read_json

ADAPTER = {"targets": "q,k", "rank": 64, "alpha": None, "lr": 1e-3}  # alpha: twice the rank
METHODS = {  # method -> its own options and their defaults; another method refuses them
    "rosa": ADAPTER | {"low_freq_ratio": 0.5, "pairs": "low", "k_ratio": 0.5},
    "lora": ADAPTER | {"k_ratio": 1.0},
    "full": {"lr": 2e-5, "k_ratio": 1.0},
    "peft": {"lr": 1e-3, "k_ratio": 1.0, "peft_config": None},
}


def parse_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    p.error = fail
    p.add_argument("--ckpt", default="tiny", help="checkpoint: a directory, a name in checkpoints/, "
                   f"an org/name in Hugging Face's cache, or a name known: {', '.join(NAMES)}; tiny is bundled")
    p.add_argument("--task", default="toy", help="toy, arithmetic, commonsense, or test sets (gsm8k,SVAMP) with --train-file")
    p.add_argument("--method", default="rosa", help="rosa; lora: every row of the targets adapts; full: every weight trains; "
                   "peft:NAME: a method of the package peft, such as peft:IA3, peft:OFT, peft:LN_TUNING")
    own = {"default": argparse.SUPPRESS}  # their defaults are the method's: METHODS
    p.add_argument("--targets", **own,
                   help="of q,k,v,o,gate,up,down; RoSA adapts the others than q and k by LoRA (default: q,k)")
    p.add_argument("--rank", type=int, **own, help="rank of each low-rank update (default: 64)")
    p.add_argument("--alpha", type=float, **own, help="updates are scaled by alpha / rank (default: twice the rank)")
    p.add_argument("--low-freq-ratio", type=float, **own,
                   help="share of each head's RoPE pairs that RoSA adapts (default: 0.5)")
    p.add_argument("--pairs", choices=("low", "high", "random", "all"), **own,
                   help="which pairs RoSA adapts; all but low are ablations (default: low)")
    p.add_argument("--peft-config", **own, help="JSON file of options for a method of the package peft")
    p.add_argument("--k-ratio", type=float, **own,
                   help="share of the layers that train at a time (default: rosa 0.5, others 1)")
    p.add_argument("--select", default="grad", choices=("grad", "random", "static", "all"),
                   help="how layers are selected; all but grad are ablations")
    p.add_argument("--select-every", type=int, default=25, help="optimiser steps between selections of layers")
    p.add_argument("--score-ema", type=float, default=0.0, help="share of the old score in a layer's new one")
    p.add_argument("--lr", type=float, **own, help="peak learning rate: warm-up over 5 %% of the steps, then cosine "
                   "(default: 1e-3; full 2e-5)")
    p.add_argument("--epochs", type=int, default=3, help="passes over the training examples")
    p.add_argument("--batch-size", type=int, default=16, help="examples per optimiser step")
    p.add_argument("--micro-batch-size", type=int, default=4, help="examples per forward pass")
    p.add_argument("--max-len", type=int, default=512, help="tokens; longer examples are left out")
    p.add_argument("--max-steps", type=int, help="stop after so many optimiser steps")
    p.add_argument("--seed", type=int, default=0, help="of the adapters, the held-out examples and the order")
    p.add_argument("--val-size", type=int, default=300, help="training examples held out for validation")
    p.add_argument("--eval-every", type=int, default=100, help="optimiser steps between validations")
    p.add_argument("--save-every", type=int, default=100, help="optimiser steps between saves for --resume")
    begin = p.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue the run in --out from its last save")
    begin.add_argument("--overwrite", action="store_true", help="start anew in an --out that holds a run already")
    p.add_argument("--data-dir", default=tasks.DATA_DIR, help="directory laid out as LLM-Adapters' repository")
    p.add_argument("--train-file", help="train on this JSON file instead of the task's own; also looked for in --data-dir")
    p.add_argument("--out", type=Path, help="run directory (default: runs/<ckpt>-<task>-<method>)")
    p.add_argument("--checkpoint-activations", action="store_true", help="keep one tensor a layer for the backward pass and "
                   "compute the rest again: slower, in less memory")
    p.add_argument("--shard", action="store_true", help="under torchrun: keep a share of the frozen weights in each process "
                   "(FSDP2), for models larger than a device")
    p.add_argument("--compile", action="store_true", help="compile the layers with torch.compile: faster after a minute or so")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base model")
    args = p.parse_args(arguments)
    kind = "peft" if args.method.startswith("peft:") else args.method
    if kind not in METHODS or args.method == "peft":
        fail(f"--method {args.method!r} is unknown: choose rosa, lora, full, or peft:NAME, such as peft:IA3")
    for name in sorted(set().union(*METHODS.values()) - set(METHODS[kind])):
        if hasattr(args, name):
            fail(f"--{name.replace('_', '-')} is no option of --method {args.method}"
                 + (": give its own options with --peft-config FILE.json" if kind == "peft" else ""))
    for name, value in METHODS[kind].items():
        vars(args).setdefault(name, value)
    if "alpha" in args and args.alpha is None:
        args.alpha = 2.0 * args.rank
    if args.method == "full" and args.dtype == "bfloat16":
        fail("--method full needs --dtype float32: a bfloat16 weight does not see updates below 1/256 of itself")
    if args.method == "full":
        args.dtype = "float32"
    if args.out is None:
        args.out = Path("runs") / f"{Path(args.ckpt).name}-{args.task}-{args.method.replace(':', '-')}"
    for name in ("epochs", "batch_size", "micro_batch_size", "max_len", "max_steps", "val_size", "eval_every", "save_every",
                 "rank", "select_every"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("low_freq_ratio", "k_ratio"):
        if not 0 < getattr(args, name, 1) <= 1:
            fail(f"--{name.replace('_', '-')} must be in (0, 1], not {getattr(args, name)}")
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    if args.batch_size % args.micro_batch_size:
        fail(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}")
    for target in getattr(args, "targets", "q").split(","):
        if target not in rosa.TARGETS:
            fail(f"--targets has the unknown target {target!r}: choose from {','.join(rosa.TARGETS)}")
    for name in ("lr", "alpha"):
        if not 0 < getattr(args, name, 1) < math.inf:
            fail(f"--{name} must be a positive number, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed must be a whole number from 0 to 2^32 - 1, not {args.seed}")
    if args.shard:
        if processes()[1] == 1:
            fail("--shard needs several processes: torchrun --nproc_per_node=N train.py ...")
        if kind not in ("rosa", "lora"):
            fail(f"--shard shards weights that are frozen, with --method rosa or lora: not with {args.method}")
        if args.compile or args.checkpoint_activations:
            fail("--shard goes with neither --compile nor --checkpoint-activations")
    return args


def fail(message):
    """A user's mistake: one line, exit status 2."""
    gather(problem=("train.py", one_line(message)))


def stop(message, status=1):
    """What befalls a run on its way: one line, told by the first process, and the end."""
    for bar in list(tqdm._instances):  # the line shall be one of its own
        bar.close()
    if processes()[0] == 0:
        print(f"train.py: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def main(args):
    # --- the model and its adapters ---
    rank, world = processes()
    ckpt = find_checkpoint(args.ckpt)
    if (args.out / "args.json").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"--out {args.out} holds a run already: --resume goes on with it, --overwrite starts anew")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: choose a directory for the run")
    if args.out.resolve() == ckpt.resolve():
        raise ValueError(f"--out {args.out} is the checkpoint itself: choose another directory for the run")
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    tokenizer = load_tokenizer(ckpt)
    train_set, val_set, records, too_long = load_data(args, tokenizer)
    args.dtype = str(dtype).removeprefix("torch.")  # of "auto" the answer is part of the run
    # A process reads of the weights only the rows that `shard` leaves it.
    model = Llama.from_pretrained(ckpt, mapped=True) if args.shard else Llama.from_pretrained(ckpt, device, dtype)
    if args.max_len > model.config.context:
        raise ValueError(f"--max-len {args.max_len} exceeds the model's {model.config.limit}")
    description = runs.describe(args, ckpt, model, train_set, val_set)
    if args.resume:
        runs.check_same(args, description)
    torch.manual_seed(args.seed)
    attach(args, model)
    selector = rosa.LayerSelector(model, args.k_ratio, args.select_every, args.score_ema, args.select)
    # What trains is registered once, here. AdamW passes over what has no gradient: a frozen layer's moments stay.
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.lr, weight_decay=0.0)
    batches_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = min(args.epochs * batches_per_epoch, args.max_steps or math.inf)

    trainable_count, count = (sum(p.numel() for p in some) for some in (trainable.values(), model.parameters()))
    lengths = [len(prompt) + len(response) for prompt, response in train_set]
    say_if_bfloat16_is_slow(device, dtype)
    print(f"model      {ckpt}: {len(model.model.layers)} layers, {args.dtype} on {device}; what trains in float32"
          + (f"; {world} processes" if world > 1 else ""))
    print(f"method     {args.method}{f' on {args.targets}' if 'targets' in args else ''}; "
          f"{selector.count} of {len(model.model.layers)} layers train at a time")
    print(f"trainable params: {trainable_count:,} || all params: {count:,} || trainable%: {100 * trainable_count / count:.4f}")
    print(f"data       {len(train_set):,} examples of {sum(lengths):,} tokens to train on, {len(val_set):,} held out; "
          f"{too_long:,} longer than {args.max_len} tokens left out")
    print(f"steps      {total_steps:,}: {total_steps / batches_per_epoch:.3g} epochs in batches of {args.batch_size}, "
          f"{args.micro_batch_size} at a time")

    model.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        compile_layers(model)

    # --- where to begin ---
    step = None
    if args.resume and (args.out / "state.safetensors").exists():
        step, best = runs.load_state(args, trainable, optimizer, selector)
    if len(set(gather(step))) > 1:
        raise ValueError(f"--resume: {args.out} holds different states on different machines: share it, or copy it to each")
    process_group = None  # the processes, as a group in which one that is silent for so long is taken for dead
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        process_group = torch.distributed.new_group(backend=backend, timeout=timedelta(seconds=50))
    if args.shard:
        shard(model, process_group, device, dtype)
        optimizer.load_state_dict(optimizer.state_dict())  # its moments follow the adapters to their device
    if step is None:
        step = 0
        runs.begin(args, description)
        best = validate(model, val_set, args)
        if not math.isfinite(best):
            stop(f"the validation loss is {best} before training: is {ckpt} whole?")
        print(f"validation loss {best:.4f} before training")
        runs.save_best(args, model, ckpt)
        if rank == 0:
            runs.write_log(args.out / "log.jsonl", {"step": 0, "val_loss": best})
        runs.save_state(args, trainable, optimizer, selector, step, best)

    # --- the loop ---
    first_step = saved = step
    skipped = 0  # steps in a row that were not applied
    model.train()  # for the dropout that a method of peft may have
    layers = range(len(model.model.layers))
    bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True, disable=rank > 0,
               bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}")
    signals = runs.note_signals()  # finish the step, save, stop
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

        # What dropout or a random selection draws depends on the step alone, so that a resumed run draws the same.
        torch.manual_seed(args.seed + step)
        selector.before_forward(step)
        torch.manual_seed(args.seed + step + rank * total_steps)  # all processes select the same, each drops what it likes

        # Gradients of the mean loss per response token, over the micro-batches of all processes together.
        response_tokens = sum(len(response) for _, response in batch)
        loss = 0.0
        for micro_batch in own_micro_batches(batch, args.micro_batch_size):
            tokens, labels = collate(micro_batch, device)
            micro_loss = model.loss(tokens, labels) / response_tokens
            micro_loss.backward()
            loss += micro_loss.item()
        loss, noted = all_reduce_gradients(process_group, model, loss, len(signals))
        selector.after_backward()

        # A step that is not finite would spoil the weights for good: it is not applied, and after three in a row the run ends.
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0).item()
        skipped = 0 if math.isfinite(loss) and math.isfinite(norm) else skipped + 1
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        seconds = time.perf_counter() - start
        token_count = sum(len(prompt) + len(response) for prompt, response in batch)
        record = {"step": step, "loss": loss, "lr": lr, "tokens": token_count, "seconds": seconds,
                  "active_layers": selector.active}
        if skipped:
            record["skipped"] = True
            culprits = f"loss {loss:.3g}, gradient {norm:.3g}, examples {[records[i] for i in batches[position]]}"
            tqdm.write(f"step {step:5}  not applied: {culprits}")
        if step % args.eval_every == 0 or step == total_steps:
            record["val_loss"] = validate(model, val_set, args)
            tqdm.write(f"step {step:5}  validation loss {record['val_loss']:.4f}")
            if record["val_loss"] < best:  # the adapter kept is the best one, not the last one
                best = record["val_loss"]
                runs.save_best(args, model, ckpt)
        if rank == 0:
            runs.write_log(args.out / "log.jsonl", record)
        if rank == 0 and selector.probing:
            selection = {"step": step, "scores": selector.scores.tolist(), "active_layers": selector.active}
            runs.write_log(args.out / "layers.jsonl", selection)
        stopping = (noted if process_group else len(signals)) > 0  # asked once: a signal from here on ends the next step
        if skipped == 3:
            stop(f"step {step} was the third in a row that is not finite: {culprits}, counted from 0 in the training data. The "
                 f"last good state, of step {saved}, is in {args.out / 'state.safetensors'}")
        if not skipped and (step % args.save_every == 0 or step == total_steps or stopping):
            runs.save_state(args, trainable, optimizer, selector, step, best)
            saved = step
        strip = "".join("█" if i in selector.active else "·" for i in layers)
        bar.set_postfix_str(f"loss {loss:.3f}  lr {lr:.1e}  {token_count / seconds:,.0f} tokens/s  {strip}", refresh=False)
        bar.update()
        if stopping and step < total_steps:
            bar.close()
            raise runs.Stopped(f"stopped after step {step}", 128 + (signals or [signal.SIGTERM])[0])
    bar.close()
    if rank == 0:
        runs.write_summary(args, trainable_count, count, best, device)
        runs.draw_layers(args.out)
    print(f"best validation loss {best:.4f}; its {'checkpoint' if args.method == 'full' else 'adapter'} is in {args.out}")


def compile_layers(model):
    """Have every layer compiled at its first call, if anything can be compiled here."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=model.device))
    except Exception as error:  # no C++ compiler, no Triton, a Python that is not supported: each its own class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return print(f"compile    nothing can be compiled here ({reason.strip()}): going on without")
    Operators.allow_recompiling(64)  # a layer that trains, is probed, is frozen, runs without gradients: each is code
    for layer in model.model.layers:
        layer.compile(dynamic=True)


def attach(args, model):
    """Let train what --method says, and nothing else."""
    if args.method in ("rosa", "lora"):
        low_freq_ratio, pairs = (args.low_freq_ratio, args.pairs) if args.method == "rosa" else (1.0, "all")
        rosa.attach(model, args.rank, args.alpha, low_freq_ratio, args.targets, pairs)
    elif args.method == "full":
        model.requires_grad_(True)
    else:
        peft_methods.attach_peft(model, args.method.removeprefix("peft:"), read_json(args.peft_config) if args.peft_config else {})


def load_data(args, tokenizer):
    """(training examples, validation examples, the training examples' places in their file, how many were longer than
    --max-len). An example is (prompt ids, response ids)."""
    examples = tasks.train_examples(args.task, args.data_dir, args.train_file)
    encoded = [tasks.encode_example(example, tokenizer)
               for example in tqdm(examples, desc="tokenizing", leave=False, disable=processes()[0] > 0 or None)]
    kept = [i for i, (prompt, response) in enumerate(encoded) if len(prompt) + len(response) <= args.max_len]
    if len(kept) <= args.val_size:
        raise ValueError(f"{len(kept)} of {len(encoded)} examples have at most --max-len {args.max_len} tokens: too few to "
                         f"hold --val-size {args.val_size} of them out and train on the rest")
    random.Random(args.seed).shuffle(kept)
    held_out, records = kept[: args.val_size], kept[args.val_size :]
    return [encoded[i] for i in records], [encoded[i] for i in held_out], records, len(encoded) - len(kept)


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
    """Pad on the right: tokens [B, T], and labels [B, T], the next token where it belongs to the response, else -100. No
    examples are one token, and nothing to predict."""
    width = max((len(prompt) + len(response) for prompt, response in examples), default=2) - 1
    tokens = torch.zeros(max(1, len(examples)), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, response) in enumerate(examples):
        ids = prompt + response
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(response)
    return tokens.to(device), labels.to(device)


@torch.no_grad()
def validate(model, examples, args):
    """Mean cross-entropy per response token, in nats."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    total = 0.0
    micro_batches = own_micro_batches(by_length, args.micro_batch_size)
    for micro_batch in tqdm(micro_batches, desc="validation", leave=False, disable=processes()[0] > 0 or None):
        tokens, labels = collate(micro_batch, model.device)
        total += model.loss(tokens, labels).item()
    model.train()
    return sum(gather(total)) / sum(len(response) for _, response in examples)


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        join_processes()
        main(parse_args(arguments))
        gather()  # nobody leaves before all are done
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except runs.Stopped as stopped:
        message, status = stopped.args
        print(f"{message}. To go on: {runs.resume_command(arguments)}")
        sys.exit(status)
    except runs.CannotWrite as error:
        stop(f"{error}: {runs.resume_command(arguments)}")
    except KeyboardInterrupt:
        stop("interrupted before its first step: what was saved before is whole", 130)
    except RuntimeError as error:
        if not died(error):
            raise
        stop(f"another process has ended, and the run with it. To go on: {runs.resume_command(arguments)}")
    finally:
        for number, handler in handlers.items():  # as they were, where `run` is called by another program
            signal.signal(number, handler)


if __name__ == "__main__":
    run()
