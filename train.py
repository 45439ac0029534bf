"""Fine-tune a LLaMA with RoSA, LoRA, any method of the package peft, or in full: one script, one
loop.

    python train.py --ckpt tiny --task toy
    python train.py --ckpt checkpoints/llama2-7b --task arithmetic --data-dir LLM-Adapters
    python train.py --ckpt tiny --task toy --method peft:IA3 --lr 1e-2
    torchrun --nproc_per_node=8 train.py --ckpt llama2-7b --task arithmetic    # by eight processes

Read first: `main`, from "the loop" to its end, then `collate` and `attach`. Skip at first reading:
what main prints, and the options, from METHODS to the end.

A run directory (--out) holds `args.json` and the best adapter (with --method full the whole model,
in a form that --ckpt takes). `log.jsonl` is only appended to: first {"step": 0, "val_loss": x}, the
model before training, then a line per optimiser step with step, loss, lr, tokens, seconds and
active_layers, and for each validation a line {"step": n, "val_loss": x}. `layers.jsonl` has a line
per selection of layers, with their scores. At its end the run adds its picture, `run.png`, and
`summary.json`, the run in six numbers. `state.safetensors` is what --resume continues from."""

import argparse
import math
import os
import random
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import rosa
from data import tasks
from data.errors import UserError
from data.tokenizer import load_tokenizer
from extras import adapters, kernels, memory, prefix, runs
from extras.checkpoints import (
    choose_device_and_dtype,
    find_checkpoint,
    load_model,
    read_json,
    say_if_begin_is_unstated,
    say_if_bfloat16_is_slow,
)
from extras.commands import (
    add_device_arguments,
    add_quantize_argument,
    below_one,
    count,
    fraction,
    names_of,
    positive,
    resume_command,
    run_script,
    script_parser,
    seed,
)
from extras.distributed import (
    TOKENS_AT_A_TIME,
    all_reduce_gradients,
    gather,
    gradient_group,
    is_first,
    own_micro_batches,
    processes,
    shard,
)
from extras.loss_scale import LossScale


def main(args):
    # --- the model, what trains in it, the data ---
    ckpt = find_checkpoint(args.ckpt)
    runs.check_out(args, ckpt)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")  # what "auto" has come to is part of the run
    tokenizer = load_tokenizer(ckpt)
    train_set, val_set, places_in_file, too_long = load_data(args, tokenizer)
    memory.say_what_is_needed(args, ckpt, train_set, device)
    # With --shard each process will hold a share of the frozen weights (FSDP2). The model is then
    # memory-mapped on the CPU, and its weights stay in their files until shard() reads them.
    model = load_model(ckpt, device, dtype, mapped=args.shard, quantization=args.quantize)
    if args.max_len > model.config.context:
        raise UserError(
            f"--max-len {args.max_len} exceeds the model's context of {model.config.context}"
        )
    # What a resumed run must have in common with the run that it continues.
    description = runs.describe(args, ckpt, model, train_set, val_set)
    if args.resume:
        runs.check_same(args, description)
    torch.manual_seed(args.seed)
    attach(args, model)
    selector = rosa.LayerSelector(
        model, args.k_ratio, args.select_every, args.score_ema, args.select
    )
    # The parameters of all layers are registered here, once. AdamW skips a parameter without a
    # gradient: while a layer rests, its moments stay as they are.
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.lr, weight_decay=0.0)
    lengths = [len(prompt) + len(response) for prompt, response in train_set]
    batches_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = min(args.epochs * batches_per_epoch, args.max_steps or math.inf)
    warmup = max(1, math.ceil(0.05 * total_steps))
    say_if_bfloat16_is_slow(device, dtype)
    say_if_begin_is_unstated(ckpt, tokenizer)
    print_overview(args, ckpt, model, device, selector, trainable)
    print(
        f"data       {len(train_set):,} examples of {sum(lengths):,} tokens to train on, "
        f"{len(val_set):,} held out; {too_long:,} longer than {args.max_len} tokens left out"
    )
    print(
        f"steps      {total_steps:,}: {total_steps / batches_per_epoch:.3g} epochs in batches of "
        f"{args.batch_size}, {args.micro_batch_size or f'{TOKENS_AT_A_TIME:,} tokens'} at a time"
    )

    # --- faster, and where to begin ---
    if not args.plain:
        # Faster code with the same results replaces RMSNorm, attention, MLP and loss. What you have
        # edited is not replaced: extras/source.py compares the hash of a method's code with that of
        # the original. A line says what was replaced.
        exchanged, _ = kernels.accelerate(model)
        kernels.say_what_runs(exchanged)
    if args.compile:
        kernels.compile_layers(model)
    if args.checkpoint_activations:
        kernels.checkpoint_activations(model)
    loss_scale = LossScale(model, dtype)
    run = runs.Run(args, ckpt, tokenizer, model, trainable, optimizer, selector, loss_scale)
    # With --resume this loads the adapters, AdamW's moments, the scores, the active layers and the
    # loss scale, and returns the number of the step after which they were saved. It cuts the logs
    # back to that step; a validation that was due there is made again below. Without --resume it
    # returns None.
    step = run.resume()
    process_group = gradient_group(device)
    if args.shard:
        prefix.stop_sharing(model, "--shard")
        # Adapters and norms stay whole in every process. They move to the device, and AdamW's
        # moments with them.
        shard(model, optimizer, process_group, device, dtype)
    if step is None:
        step = 0
        run.begin(description)
        run.save_state(step)
    bar = tqdm(
        total=total_steps,
        initial=step,
        dynamic_ncols=True,
        disable=not is_first(),
        bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
    )
    run.note_signals()  # from here on Ctrl-C lets the step end, and be saved, before the run stops
    model.train()  # a method of peft may have dropout

    # --- the loop ---
    process, _ = processes()  # the index of this process
    epoch = None
    while True:
        # Validate; at step 0 that is the model before training. The state is saved by now, by
        # run.save at the end of this loop or by run.save_state above: a run that is killed while it
        # validates resumes here.
        if step % args.eval_every == 0 or step == total_steps:
            run.keep_best(step, validate(model, val_set, args))
            bar.unpause()  # the bar estimates the time that is left from the steps alone
        if step == total_steps:
            break

        if epoch != step // batches_per_epoch:
            epoch = step // batches_per_epoch
            batches = make_batches(lengths, args.batch_size, f"{args.seed} {epoch}")
        indices = batches[step % batches_per_epoch]
        # (prompt ids, response ids) of every example in the step, the same in all processes.
        batch = [train_set[i] for i in indices]
        start = time.perf_counter()

        # Learning rate: linear warm-up over the first 5 % of the steps, then a cosine down to zero.
        progress = max(0, step - warmup) / max(1, total_steps - warmup)
        lr = args.lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # DLS: at a probe every layer gets requires_grad. All processes have the same seed here,
        # since with --select random they must draw the same layers.
        torch.manual_seed(args.seed + step)
        selector.before_forward(step)

        # Gradients of the mean loss per response token. The batch is that of all processes: each
        # micro-batch's loss is divided by the response tokens of the whole batch, and the parts are
        # added up.
        response_tokens = sum(len(response) for _, response in batch)
        is_done = False
        while not is_done:
            # Each process draws its own dropout. A step is less than total_steps, so that no two
            # processes ever have the same seed. The seeds depend on step and process alone, so that
            # a resumed run draws the same.
            torch.manual_seed(args.seed + step + process * total_steps)
            loss = torch.zeros((), device=device)
            # Each process computes an even share of the examples, in as many micro-batches as the
            # other processes: with --shard they exchange weights in each pass. Where there are too
            # few examples for that, a micro-batch is empty (see collate).
            for micro_batch in own_micro_batches(batch, args.micro_batch_size):
                tokens, labels = collate(micro_batch, device)
                micro_loss = model.loss(tokens, labels) / response_tokens
                (micro_loss * loss_scale.value).backward()
                loss += micro_loss.detach()
            # Sum over the processes: the gradients (at a probe those of the norms too), the loss,
            # and the number of signals, since a Ctrl-C in one process stops all. The loss and this
            # number are floats from here on.
            loss, signals = all_reduce_gradients(process_group, model, loss, len(run.signals))
            # In float32 and bfloat16 the scale is 1, and the gradients are done. In float16 they
            # are divided by it, and computed again with a smaller one if any was too large.
            is_done = loss_scale.unscale(model, loss, step + 1)
        # A probe scores the layers and selects: the others lose this step's gradient.
        selector.after_backward()

        # The step. If the loss or the norm is not finite, can_apply prints which examples were in
        # the step, counts it, and returns False.
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0).item()
        if run.can_apply(step + 1, loss, norm, [places_in_file[i] for i in indices]):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.perf_counter() - start

        # Log.
        token_count = sum(lengths[i] for i in indices)
        record = {"step": step, "loss": loss, "lr": lr, "tokens": token_count, "seconds": seconds}
        record["active_layers"] = selector.active
        run.log(record)
        status = f"loss {loss:.3f}  lr {lr:.1e}  {token_count / seconds:,.0f} tokens/s"
        bar.set_postfix_str(f"{status}  {layer_bar(model, selector)}", refresh=False)
        bar.update()

        # Save the state: every --save-every steps, before a validation, and before the run ends.
        stop_requested = signals > 0
        run.save(step, total_steps, stop_requested)
        # Stop where there is a reason to.
        if run.skipped_in_a_row == 3:
            raise run.not_finite(step)
        if stop_requested and step < total_steps:
            raise run.stopped(step)
    bar.close()
    run.finish(device)


def print_overview(args, ckpt, model, device, selector, trainable):
    """Print the model, the method, and PEFT's line about what trains."""
    num_processes = processes()[1]
    note = f"; {num_processes} processes" if num_processes > 1 else ""
    stored = f"{args.dtype}, {args.quantize} weights" if args.quantize else args.dtype
    print(
        f"model      {ckpt}: {len(model.model.layers)} layers, {stored} on {device}; "
        f"trained parameters are float32{note}"
    )
    on_targets = f" on {args.targets}" if "targets" in args else ""
    print(
        f"method     {args.method}{on_targets}; {selector.count} of {len(selector.candidates)} "
        "layers train at a time"
    )
    trained = sum(parameter.numel() for parameter in trainable.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: "
        f"{100 * trained / total:.4f}"
    )


def layer_bar(model, selector):
    """A character a layer: whether it trains now."""
    characters = ["·"] * len(model.model.layers)
    for i in selector.active:
        characters[i] = "█"
    return "".join(characters)


def attach(args, model):
    """Make the parameters trainable that --method names, and no others."""
    if args.method == "rosa":
        ratio, pairs = args.low_freq_ratio, args.pairs
        if pairs == "all":
            ratio, pairs = 1.0, "low"
        rosa.attach(model, args.rank, args.alpha, ratio, args.targets, pairs)
    elif args.method == "lora":
        rosa.attach(model, args.rank, args.alpha, 1.0, args.targets)
    elif args.method == "full":
        model.requires_grad_(True)
    else:
        options = read_json(args.peft_config) if args.peft_config else {}
        adapters.attach_peft(model, args.method.removeprefix("peft:"), options)
    say_if_rank_is_too_large(model)
    in_layers = any(parameter.requires_grad for parameter in model.model.layers.parameters())
    if args.k_ratio < 1 and not in_layers:
        raise UserError(
            f"nothing that {args.method} trains is in a layer, so no layer can be selected: "
            "--k-ratio 1"
        )


def say_if_rank_is_too_large(model):
    """Print a line where an adapter has a larger rank than its update can have. The update is a
    matrix [rows, in], and the rank of a matrix is at most its smaller side."""
    for name, adapter in rosa.adapters(model).items():
        limit = min(len(adapter.rows), adapter.linear.in_features)
        if adapter.rank > limit and is_first():
            print(
                f"rank       {adapter.rank} is more than the update of {name.split('.')[-1]} can "
                f"have: with --rank {limit} it can become the same matrices"
            )
            return


def load_data(args, tokenizer):
    """Four things: the training examples, the validation examples, the place of each training
    example in its file, and how many examples were longer than --max-len. An example is (prompt
    ids, response ids), the end-of-sequence token included."""
    placed = tasks.train_examples(args.task, args.data_dir, args.train_file, args.skip_empty)
    kept = []  # (place, example)
    for place, example in passing_bar(placed, "tokenizing"):
        prompt, response = tasks.encode_example(example, tokenizer)
        if len(prompt) + len(response) <= args.max_len:
            kept.append((place, (prompt, response)))
    val_size = args.val_size or min(300, max(1, len(kept) // 10))
    if len(kept) <= val_size:
        fitting = (
            f"{len(kept)} of {len(placed)} examples have at most --max-len {args.max_len} tokens"
        )
        raise UserError(
            f"{fitting}: too few to hold --val-size {val_size} of them out and train on the rest"
        )
    random.Random(args.seed).shuffle(kept)
    val_set = [example for _, example in kept[:val_size]]
    train_set = [example for _, example in kept[val_size:]]
    places = [place for place, _ in kept[val_size:]]
    return train_set, val_set, places, len(placed) - len(kept)


def passing_bar(items, description):
    """The items, with a progress bar that goes away at their end. The first process shows it, and
    only in a terminal."""
    # With disable=None tqdm shows nothing where the output is no terminal.
    disable = None if is_first() else True
    return tqdm(items, desc=description, leave=False, disable=disable)


def make_batches(lengths, batch_size, seed):
    """The batches of an epoch, as lists of indices: shuffle the examples, cut them into pools of 64
    batches' size, sort each pool by length, cut it into batches, shuffle the batches. So examples
    of similar length share a batch, which needs little padding, and the batches differ from epoch
    to epoch."""
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    pool_size = 64 * batch_size
    batches = []
    for first in range(0, len(order), pool_size):
        pool = sorted(order[first : first + pool_size], key=lambda i: lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples, device):
    """Pad on the right: tokens [B, T], and labels [B, T], the next token where it belongs to the
    response, else -100. Below are two examples (prompt ids, response ids) and what the model reads
    and predicts of them; the id 2 is the end-of-sequence token.

        ([1, 5, 6], [7, 2])      tokens  1  5  6  7      labels  -100  -100     7     2
        ([1, 8], [9, 2])                 1  8  9  0              -100     9     2  -100

    A process without examples gets one token and nothing to predict, so that it can take part in
    the pass: its loss, a sum over nothing, is 0, and so are its gradients."""
    pairs = [tasks.tokens_and_labels(prompt, response) for prompt, response in examples]
    pairs = pairs or [([0], [-100])]
    tokens = pad_sequence([torch.tensor(tokens) for tokens, _ in pairs], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(labels) for _, labels in pairs], batch_first=True, padding_value=-100
    )
    return tokens.to(device), labels.to(device)


@torch.no_grad()
def validate(model, examples, args):
    """Mean cross-entropy per response token, in nats."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    micro_batches = []
    for first in range(0, len(by_length), args.batch_size):
        batch = by_length[first : first + args.batch_size]
        micro_batches += own_micro_batches(batch, args.micro_batch_size)
    total = torch.zeros((), device=model.device)
    for micro_batch in passing_bar(micro_batches, "validation"):
        total += model.loss(*collate(micro_batch, model.device))
    model.train()
    return sum(gather(total.item())) / sum(len(response) for _, response in examples)


# --- options ---

ADAPTER = {"targets": "q,k", "rank": 64, "alpha": None, "lr": 1e-3}  # alpha: twice the rank
# method -> its own options and their defaults; another method refuses them. A new method goes here
# and into `attach` above. extras/runs.py (Run.kept) decides how it is saved: as a whole checkpoint,
# or as an adapter, by save_adapter and load_adapter of extras/adapters.py.
METHODS = {
    "rosa": ADAPTER | {"low_freq_ratio": 0.5, "pairs": "low", "k_ratio": 0.5},
    "lora": ADAPTER | {"k_ratio": 1.0},
    "full": {"lr": 2e-5, "k_ratio": 1.0},
    "peft": {"lr": 1e-3, "k_ratio": 1.0, "peft_config": None},
}
METHOD_NAMES = (
    ", ".join(name for name in METHODS if name != "peft") + ", or peft:NAME such as peft:IA3"
)


def method(text):
    """A value of --method."""
    if text == "peft" or kind_of(text) not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose from {METHOD_NAMES}")
    return text


def kind_of(method):
    """The key of METHODS for a value of --method."""
    return "peft" if method.startswith("peft:") else method


def default_of(option):
    """The default of an option by method, for its help: "default: rosa 0.5, lora 1, ..."."""
    defaults = [
        f"{method} {options[option]:g}" for method, options in METHODS.items() if option in options
    ]
    return f"default: {', '.join(defaults)}"


def parse_args(arguments=None):
    title_and_first_command = "\n".join(__doc__.split("\n")[:4])
    parser = script_parser("train.py", title_and_first_command)
    # These options are absent unless given: check_args fills in the method's own default.
    of_method = {"default": argparse.SUPPRESS}

    add = parser.add_argument_group("model and data").add_argument
    add("--ckpt", default="tiny", help="directory, or a name such as llama2-7b or org/name")
    add(
        "--task",
        help="toy, arithmetic, or commonsense; with --train-file only a label (default: toy)",
    )
    add("--data-dir", default=tasks.DATA_DIR, help="laid out as LLM-Adapters' repository")
    add("--train-file", help="JSON to train on, here or in --data-dir (default: the task's)")
    add(
        "--out",
        type=Path,
        help="run directory (default: runs/<ckpt>-<task, or the train file>-<method>)",
    )
    add = parser.add_argument_group("method").add_argument
    add("--method", type=method, default="rosa", help=METHOD_NAMES)
    add("--rank", type=count, **of_method, help="of each low-rank update (default: 64)")
    add(
        "--low-freq-ratio",
        type=fraction,
        **of_method,
        help="share of each head's RoPE pairs that adapt (default: 0.5)",
    )
    add(
        "--k-ratio",
        type=fraction,
        **of_method,
        help=f"share of layers that train at a time ({default_of('k_ratio')})",
    )
    add = parser.add_argument_group("loop").add_argument
    add(
        "--lr",
        type=positive,
        **of_method,
        help=f"peak; warm-up over 5 %%, then cosine ({default_of('lr')})",
    )
    add("--epochs", type=count, default=3, help="passes over the training examples")
    add("--batch-size", type=count, default=16, help="examples per optimiser step")
    add("--max-len", type=count, default=512, help="tokens; longer examples are left out")
    add("--max-steps", type=count, help="stop after so many optimiser steps")
    add("--resume", action="store_true", help="continue the run in --out from its last save")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run already")

    more = parser.add_argument_group("more")
    add = more.add_argument
    add(
        "--targets",
        type=names_of(rosa.TARGETS, "target"),
        **of_method,
        help="of q,k,v,o,gate,up,down; with rosa v to down get a plain LoRA (default: q,k)",
    )
    add(
        "--alpha",
        type=positive,
        **of_method,
        help="updates are scaled by alpha / rank (default: twice the rank)",
    )
    pairs = ("low", "high", "random", "all")
    add(
        "--pairs",
        choices=pairs,
        **of_method,
        help="which pairs adapt; all: LoRA; high, random: ablations (default: low)",
    )
    add("--peft-config", **of_method, help="JSON file of options for a method of the package peft")
    select = ("grad", "random", "static", "all")
    add(
        "--select",
        default="grad",
        choices=select,
        help="how layers are selected; all but grad are ablations",
    )
    add(
        "--select-every",
        type=count,
        default=25,
        help="optimiser steps between selections of layers",
    )
    add(
        "--score-ema",
        type=below_one,
        default=0.0,
        help="share of the old score in a layer's new one",
    )
    add(
        "--micro-batch-size",
        type=count,
        help="examples per forward pass (default: as many as have 1,280 tokens)",
    )
    add("--seed", type=seed, default=0, help="of the adapters, the held-out examples and the order")
    add(
        "--val-size",
        type=count,
        help="examples held out for validation (default: a tenth, at most 300)",
    )
    add("--skip-empty", action="store_true", help="leave out examples with an empty field")
    add("--eval-every", type=count, default=100, help="optimiser steps between validations")
    add("--save-every", type=count, default=100, help="optimiser steps between saves for --resume")
    add(
        "--plain",
        action="store_true",
        help="model.py's own formulas: nothing from extras/kernels.py",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="less memory, slower: recompute each layer in the backward pass",
    )
    add_quantize_argument(more)
    add(
        "--shard",
        action="store_true",
        help="under torchrun: a share of the frozen weights in each process (FSDP2)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the layers: faster after a minute or so",
    )
    add_device_arguments(more)
    return check_args(parser.parse_args(arguments))


def check_args(args):
    """Fill in the method's defaults; refuse what does not go together."""
    kind = kind_of(args.method)
    own = METHODS[kind]
    of_all_methods = set()
    for options in METHODS.values():
        of_all_methods |= options.keys()
    for name in sorted(of_all_methods - own.keys()):
        if hasattr(args, name):
            advice = ": give its own options with --peft-config FILE.json" if kind == "peft" else ""
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is no option of --method {args.method}{advice}")
    for name, value in own.items():
        vars(args).setdefault(name, value)
    if kind in ("rosa", "lora") and args.alpha is None:
        args.alpha = 2.0 * args.rank
    if args.micro_batch_size:
        args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    for is_refused, message in combinations(args):
        if is_refused:
            raise UserError(message)
    if args.method == "full":
        args.dtype = "float32"
    if args.out is None:
        # A run is named after its task, else after its training file.
        trained_on = args.task or Path(args.train_file or "toy").stem
        ckpt_name = Path(os.path.abspath(args.ckpt)).name
        args.out = Path("runs") / f"{ckpt_name}-{trained_on}-{args.method.replace(':', '-')}"
    args.task = args.task or "toy"
    return args


def combinations(args):
    """The options that do not go together: (whether they are given, what is said then)."""
    sizes = (
        f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size "
        f"{args.micro_batch_size}"
    )
    return [
        (
            args.resume and args.overwrite,
            "--resume continues a run, --overwrite starts anew: choose one",
        ),
        (
            args.micro_batch_size and args.batch_size % args.micro_batch_size != 0,
            f"{sizes}: choose a multiple, so that every forward pass is full",
        ),
        (
            args.method == "full" and args.dtype not in ("auto", "float32"),
            "--method full needs --dtype float32: a bfloat16 weight does not see updates below "
            "1/256 of itself, a float16 weight below 1/2048",
        ),
        (
            args.shard and processes()[1] == 1,
            "--shard needs several processes: torchrun --nproc_per_node=N train.py ...",
        ),
        (
            args.shard and args.method not in ("rosa", "lora"),
            f"--shard shards frozen weights, with --method rosa or lora: not with {args.method}",
        ),
        (
            args.quantize and args.method == "full",
            "--quantize int8 freezes the weights that --method full trains: choose one",
        ),
        (args.quantize and args.shard, "--shard does not go with --quantize"),
        (args.shard and args.compile, "--shard does not go with --compile"),
        (
            args.shard and args.checkpoint_activations,
            "--shard does not go with --checkpoint-activations",
        ),
    ]


def last_sentence(arguments):
    """The sentence that ends the error message of a stopped run."""
    return f"To resume: {resume_command(__file__, arguments)}"


def run(arguments=None):
    """`main` with these command-line arguments, or the process's own. run_script also sets up
    torch.distributed under torchrun, and prints a UserError as one line."""
    run_script("train.py", parse_args, main, arguments, last_sentence)


if __name__ == "__main__":
    run()
