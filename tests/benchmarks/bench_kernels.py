"""What each kernel of extras/kernels.py is worth: time and memory without it, as multiples of those
with all of them.

    python tests/benchmarks/bench_kernels.py --ckpt checkpoints/smollm2-135m \\
        --train-file data.json [--rounds 7]

Train: the forward and backward pass of a batch in the micro-batches of `train.py`, with adapters of
RoSA at their defaults in every layer. Saved: what autograd keeps of these forward passes for the
backward pass, exactly; each storage counts once, the weights of the model do not count. Generation:
`extras.inference.generate` of --max-new-tokens tokens after each of --prompts prompts; in float32
the adapters are merged, in bfloat16 they stay beside the weights, as in `eval.py`. The rows are all
kernels, all but one of them, and none. All rows are in one process, on the same weights, and take
turns, one way round and then the other; a multiple is computed within each round, and the table
shows its median, and the lowest and the highest. A kernel that cannot be used on this machine is
named in a line above the table."""

import statistics

import torch

# common.py is beside this file
from common import encoded_examples, parse_args, saved_bytes
from torch.utils.benchmark import timer

import rosa
import train
from extras import inference, kernels
from extras.checkpoints import load_model

ALL = "all kernels"
CASES = {ALL: []}  # the name of a row -> the kernels that are left out
CASES |= {f"without {kernel.stands_for}": [kernel] for kernel in kernels.KERNELS}
CASES["no kernels"] = kernels.KERNELS


def main(arguments=None):
    sizes = {"rounds": 7, "batch_size": 4, "max_len": 256, "prompts": 16, "max_new_tokens": 8}
    where = {"dtype": "float32,bfloat16", "device": "cpu"}
    args = parse_args(__doc__, arguments, ckpt="data/tiny", train_file="", **where, **sizes)
    print("| | dtype | train | saved | generation |\n|---|---|---|---|---|")
    for dtype in args.dtype.split(","):
        print_rows(args, dtype)


def print_rows(args, dtype):
    examples = encoded_examples(args)[: max(args.batch_size, args.prompts)]
    models = Models(args, dtype, examples)
    cases = list(CASES)
    seconds = {case: {"train": [], "generation": []} for case in cases}
    for number in range(-1, args.rounds):  # round -1 is for warming up
        for case in cases[:: -1 if number % 2 else 1]:
            train_seconds, generation_seconds = models.measure(case)
            if number >= 0:
                seconds[case]["train"].append(train_seconds)
                seconds[case]["generation"].append(generation_seconds)
    base, all_saved = seconds[ALL], models.saved(ALL)
    cells = [f"{statistics.median(base['train']):.3g} s", f"{all_saved:,.0f} MiB"]
    cells.append(f"{statistics.median(base['generation']):.3g} s")
    print(f"| {ALL} | {dtype} | {' | '.join(cells)} |", flush=True)
    for case in cases[1:]:
        cells = [ratio(seconds[case]["train"], base["train"])]
        cells.append(f"{models.saved(case) / all_saved:.2f}")
        cells.append(ratio(seconds[case]["generation"], base["generation"]))
        print(f"| {case} | {dtype} | {' | '.join(cells)} |", flush=True)


def ratio(seconds, base):
    ratios = sorted(a / b for a, b in zip(seconds, base))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


class Models:
    """One model that trains and one that generates, in which kernels are switched on and off, so
    that all rows have the same memory. What is laid out anew for the kernel of Linear.forward is of
    no use without it: hence another model that generates."""

    def __init__(self, args, dtype, examples):
        self.trains = build(args, dtype)
        self.generates = build(args, dtype, for_inference=True)
        pack, kernels.pack = kernels.pack, lambda module: None
        self.generates_unpacked = build(args, dtype, for_inference=True)
        kernels.pack = pack
        self.micro_batches = []
        for micro_batch in train.own_micro_batches(examples[: args.batch_size]):
            self.micro_batches.append(train.collate(micro_batch, args.device))
        self.prompts = [prompt for prompt, _ in examples[: args.prompts]]
        self.max_new_tokens = args.max_new_tokens

    def measure(self, case):
        """The seconds of a forward and backward pass, and of generation."""
        switch(self.trains, case)
        start = timer()
        for tokens, labels in self.micro_batches:
            self.trains.loss(tokens, labels).backward()
        self.trains.zero_grad()
        train_seconds = timer() - start
        packed = all(kernel.cls is not torch.nn.Linear for kernel in CASES[case])
        generates = self.generates if packed else self.generates_unpacked
        switch(generates, case)
        start = timer()
        inference.generate(generates, self.prompts, self.max_new_tokens, None)
        return train_seconds, timer() - start

    def saved(self, case):
        """What autograd keeps, in MiB."""
        switch(self.trains, case)
        return sum(saved_bytes(self.trains, *batch) for batch in self.micro_batches) / 2**20


def switch(model, case):
    """Let the methods run as written whose kernels are left out, and the kernels of the others."""
    left_out = [kernel.stands_for for kernel in CASES[case]]
    for kernel in kernels.KERNELS:
        for module in model.modules():
            if type(module) is kernel.cls and kernel.name in vars(module):
                module.exchanged = vars(module).pop(kernel.name)
            if type(module) is kernel.cls and kernel.stands_for not in left_out:
                if hasattr(module, "exchanged"):
                    setattr(module, kernel.name, module.exchanged)


def build(args, dtype, for_inference=False):
    """A model whose adapters are random, as if they had been trained."""
    torch.manual_seed(0)
    model = rosa.attach(load_model(args.ckpt, args.device, getattr(torch, dtype)))
    for adapter in rosa.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.01)
    if for_inference and model.dtype == torch.float32:
        rosa.merge(model)
    kernels.accelerate(model, for_inference)
    return model


if __name__ == "__main__":
    main()
