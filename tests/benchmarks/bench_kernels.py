"""What each kernel of extras/kernels.py is worth: time and memory without it, as multiples of those
with all of them.

    python tests/benchmarks/bench_kernels.py --ckpt checkpoints/smollm2-135m \\
        --train-file data.json [--rounds 5]

Train: the forward and backward pass of --steps batches, with adapters of RoSA at their defaults in
every layer. Saved: what autograd keeps of these forward passes for the backward pass, exactly; each
storage counts once, the weights of the model do not count. Generation: `extras.inference.generate`
of --max-new-tokens tokens after each of --prompts prompts; in float32 the adapters are merged, in
bfloat16 they stay beside the weights, as in `eval.py`. The rows are all kernels, all but one of
them, and none. Where a kernel cannot be used on this machine, its row has as many kernels in use as
the first."""

import torch

# common.py is beside this file
from common import encoded_examples, parse_args, print_table, saved_bytes, timer_of

import rosa
import train
from extras import inference, kernels
from extras.checkpoints import load_model

ALL, NONE = "all kernels", "no kernels"


def main():
    sizes = {
        "rounds": 3,
        "steps": 2,
        "batch_size": 4,
        "max_len": 256,
        "prompts": 16,
        "max_new_tokens": 16,
    }
    where = {"dtype": "float32,bfloat16", "device": "cpu"}
    args = parse_args(__doc__, None, ckpt="data/tiny", train_file="", **where, **sizes)
    # This prints which kernels cannot be used on this machine, and why
    kernels.accelerate(rosa.attach(load_model(args.ckpt)))
    rows = [ALL, *(f"without {kernel.stands_for}" for kernel in kernels.KERNELS), NONE]
    ratios = {
        f"{name} / all": (name, ALL)
        for name in ("train, seconds", "saved, MiB", "generation, seconds")
    }
    print_table(args, rows, measure, ratios)


def measure(args, case):
    kernels.KERNELS[:] = [
        kernel for kernel in kernels.KERNELS if case not in (NONE, f"without {kernel.stands_for}")
    ]
    pairs = encoded_examples(args)
    batches = train.make_batches(
        [len(prompt) + len(response) for prompt, response in pairs], args.batch_size, 0
    )
    model, used = build(args)
    batches = [
        train.collate([pairs[i] for i in batch], model.device) for batch in batches[: args.steps]
    ]

    def train_step():
        for tokens, labels in batches:
            model.loss(tokens, labels).backward()
            model.zero_grad()

    seconds = timer_of(train_step).timeit(1).mean
    saved = sum(saved_bytes(model, *batch) for batch in batches)
    model, used_in_inference = build(args, for_inference=True)
    prompts = [prompt for prompt, _ in pairs[: args.prompts]]
    generation = (
        timer_of(lambda: inference.generate(model, prompts, args.max_new_tokens, None))
        .timeit(1)
        .mean
    )
    results = {
        "train, seconds": seconds,
        "saved, MiB": saved / 2**20,
        "generation, seconds": generation,
    }
    return results | {"in use": len({*used, *used_in_inference})}


def build(args, for_inference=False):
    """A model whose adapters are random, as if they had been trained, and the names of the kernels
    in use."""
    model = rosa.attach(load_model(args.ckpt, args.device, getattr(torch, args.dtype)))
    for adapter in rosa.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.01)
    if for_inference and model.dtype == torch.float32:
        rosa.merge(model)
    return model, kernels.accelerate(model, for_inference)[0]


if __name__ == "__main__":
    main()
