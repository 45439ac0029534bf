"""What each kernel of extras/kernels.py is worth: time and memory without it, as multiples of those with all of them.

    python tests/benchmarks/bench_kernels.py --ckpt smollm2-135m --train-file data.json --dtype bfloat16 [--rounds 5]

Train: forward and backward pass of --steps batches, adapters of RoSA at their defaults in every layer. Saved: what
autograd keeps of these forward passes for the backward pass, in bytes, exactly; each storage counts once, the model's
weights not. Generation: `extras.inference.generate` of --max-new-tokens tokens after each of --prompts prompts, with
the adapters merged in float32 and beside the weights in bfloat16, as in `eval.py`. The cases - all kernels, all but
one, none - take turns, round after round, each with a model of its own that has done the same once before; times are
medians over the rounds of the ratio within a round.
"""

import contextlib
import io
import statistics
import time

import torch
from bench_train import parser_of, saved_bytes, synchronize  # beside this file; puts the project on sys.path

import rosa
import train
from data import tasks
from data.tokenizer import load_tokenizer
from extras import inference, kernels
from extras.checkpoints import find_checkpoint, load_model

KERNELS = {f"{kernel.cls.__name__}.{kernel.name}": kernel for kernel in kernels.KERNELS}
CASES = {"all": ()} | {name: (name,) for name in KERNELS} | {"all kernels": tuple(KERNELS)}  # -> what is left out


def load_data(args):
    """(batches of examples, prompts), each example as (prompt ids, response ids)."""
    tokenizer = load_tokenizer(find_checkpoint(args.ckpt))
    examples = tasks.load_examples(args.train_file) if args.train_file else tasks.train_examples("toy", "")
    pairs = [tasks.encode_example(example, tokenizer) for example in examples]
    pairs = [pair for pair in pairs if sum(map(len, pair)) <= args.max_len]
    batches = train.make_batches([sum(map(len, pair)) for pair in pairs], args.batch_size, 0)[: args.steps]
    return [[pairs[i] for i in batch] for batch in batches], [prompt for prompt, _ in pairs[: args.prompts]]


def build(args, left_out, for_inference=False):
    """(a model with adapters as if trained and all kernels but those left out, what accelerate returns)."""
    dtype = getattr(torch, args.dtype)
    model = rosa.attach(load_model(find_checkpoint(args.ckpt), args.device, dtype))
    with torch.no_grad():
        for adapter in rosa.adapters(model).values():
            adapter.B.normal_(std=0.01)
    if for_inference and dtype == torch.float32:
        rosa.merge(model)
    kernels.KERNELS[:] = [kernel for name, kernel in KERNELS.items() if name not in left_out]
    with contextlib.redirect_stdout(io.StringIO()):  # what is left plain stands under the table
        return model, kernels.accelerate(model, for_inference)


def timed(compute, device):
    """Seconds that the second of two calls takes."""
    compute()
    synchronize(device)
    start = time.perf_counter()
    compute()
    synchronize(device)
    return time.perf_counter() - start


def train_case(args, batches, left_out):
    """Seconds of the passes, bytes saved, the kernels in use, {kernel: why it is not}."""
    model, (exchanged, refused) = build(args, left_out)
    batches = [train.collate(batch, model.device) for batch in batches]

    def step():
        for tokens, labels in batches:
            model.loss(tokens, labels).backward()
            model.zero_grad()

    seconds = timed(step, args.device)
    saved = sum(saved_bytes(model, lambda batch=batch: model.loss(*batch))[1] for batch in batches)
    return {"train time": seconds, "saved bytes": saved}, exchanged, refused


def generate_case(args, prompts, left_out):
    model, (exchanged, refused) = build(args, left_out, for_inference=True)
    ids = prompts, args.max_new_tokens, None, args.prompts
    return {"generation time": timed(lambda: inference.generate(model, *ids), args.device)}, exchanged, refused


def main():
    sizes = {"rounds": 3, "steps": 2, "batch_size": 4, "max_len": 256, "prompts": 16, "max_new_tokens": 16}
    p = parser_of(__doc__, ckpt="tiny", train_file="", dtype="float32", device="cpu", **sizes)
    args = p.parse_args()
    batches, prompts = load_data(args)
    rounds, used, refused = [], set(), {}
    for _ in range(args.rounds):
        rounds.append({})
        for case, left_out in CASES.items():
            results = train_case(args, batches, left_out), generate_case(args, prompts, left_out)
            rounds[-1][case] = {name: value for numbers, *_ in results for name, value in numbers.items()}
            used.update(*(exchanged for _, exchanged, _ in results))
            for _, _, reasons in results:
                refused |= reasons
    everything = {name: statistics.median(r["all"][name] for r in rounds) for name in rounds[0]["all"]}
    seconds = f"train {everything['train time']:.3g} s, saved {everything['saved bytes'] / 2**20:,.1f} MiB"
    print(
        f"{args.ckpt}, {args.dtype}, all kernels: {seconds}, generation {everything['generation time']:.3g} s; without"
    )
    for case in list(CASES)[1:]:
        ratios = {name: statistics.median(r[case][name] / r["all"][name] for r in rounds) for name in everything}
        cells = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
        print(f"{case:<20}{cells}{'' if case in used or case not in KERNELS else '  (not in use here)'}")
    for name, reason in refused.items():
        print(f"{name} runs as written: {reason}")


if __name__ == "__main__":
    main()
