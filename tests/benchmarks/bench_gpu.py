"""LLaMA-2-7B's shape on a GPU: training and generation beside transformers + peft, and the tests.
One command, a few short tables, in under ten minutes.

    python tests/benchmarks/bench_gpu.py                              # on a machine with a GPU
    python tests/benchmarks/bench_gpu.py --device cpu --shape small   # the same lines, on a CPU
    python tests/benchmarks/bench_gpu.py --shape small --fake         # shapes and dtypes alone

The weights are random, in bfloat16, and so are the tokens; the examples are as long as those of the
arithmetic set. Training: `train.py` at its defaults but for what a row says, beside peft's LoRA of
rank 24 on all linear layers with PyTorch's own attention (sdpa), in batches of 16. tokens/s: median
over the steps after the first three, padding not counted. Share of the rate: the FLOPs that the
step cannot do without, over what a large matrix product does in the same time. Generation: greedy,
--max-new-tokens tokens for every prompt. Peak: of the allocator on a GPU, of the process on a CPU.
--fake runs the forward passes with all kernels and a step of generation on tensors that have a
shape, a dtype and a device, and no numbers (FakeTensorMode); it needs a PyTorch that was built for
CUDA, and no GPU."""

import random
import statistics
import subprocess
import sys
import tempfile

import torch
from bench_scale import fill, meta_model  # it, bench_train.py and common.py are beside this file
from bench_train import PEER, WARM_UP, floor_flops, train_peer
from common import ROOT, matmul_rate, parse_args, peak_mib, print_table
from torch.utils.benchmark import timer

import rosa
import train
from extras import inference, kernels, records
from extras.quantize import quantize
from model import KVCache

# The name of a row -> options of train.py
TRAINING = {
    PEER: None,
    "RoSA": "",
    "RoSA, a batch at a time": "--micro-batch-size 16",
    "RoSA --compile": "--compile",
    "RoSA --plain": "--plain",
    "RoSA --dtype float16": "--dtype float16",
    "RoSA --quantize int8": "--quantize int8",
}
# Tokens of the question and of the answer: the 5th, 15th, .. 95th percentile of the arithmetic
# set's, with SmolLM2's tokenizer. All prompts begin with the same 24 tokens.
FRAME = 24
QUESTIONS = (39, 47, 52, 58, 63, 67, 71, 77, 87, 104)
ANSWERS = (46, 57, 67, 76, 90, 98, 109, 124, 148, 184)


def main(arguments=None):
    sizes = {"rounds": 1, "steps": 12, "batch_size": 16, "max_new_tokens": 128}
    where = {"shape": "7B", "device": "cuda", "dtype": "bfloat16"}
    choice = {"rows": "; ".join(TRAINING), "generation": "1,32,128", "skip_tests": False}
    args = parse_args(__doc__, arguments, **where, **sizes, **choice, fake=False)
    if args.shape == "small":
        args.max_new_tokens = 8
    if args.fake:
        run_without_numbers(args)
        return
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    ratios = {"tokens/s / peer": ("tokens/s", PEER)}
    print_table(args, args.rows.split("; "), measure_training, ratios)
    print(flush=True)
    rows = []
    for count in args.generation.split(","):
        rows += [f"{whose}, {count} rows" for whose in ("transformers", "RoSA")]
    print_table(args, rows, measure_generation, {})
    print(flush=True)
    if not args.skip_tests:
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q"], cwd=ROOT, capture_output=True, text=True
        )
        print(f"tests: {tests.stdout.strip().splitlines()[-1]}")


def random_model(args):
    """A model of --shape with random weights on --device."""
    model = fill(meta_model(args.shape), getattr(torch, args.dtype), args.device)
    model.tie_weights()
    model.name_or_path = args.shape
    return model.eval()


def random_examples(count, vocab_size):
    """`count` pairs (prompt ids, response ids), the same at every call."""
    draw = random.Random(0)
    frame = [draw.randrange(3, vocab_size) for _ in range(FRAME)]
    examples = []
    for _ in range(count):
        question = [draw.randrange(3, vocab_size) for _ in range(draw.choice(QUESTIONS))]
        answer = [draw.randrange(3, vocab_size) for _ in range(draw.choice(ANSWERS))]
        examples.append((frame + question, answer))
    return examples


# --- training ---


def measure_training(args, row):
    """row: one of TRAINING."""
    torch.manual_seed(0)
    options = TRAINING[row]
    count = args.steps * args.batch_size
    if options is None:
        model = their_model(args)
        examples = random_examples(count, model.config.vocab_size)
        rates = train_peer(args, model, examples)
        return {"tokens/s": statistics.median(rates[WARM_UP:]), "peak MiB": peak_mib(args.device)}
    model = random_model(args)
    examples = random_examples(count + 8, model.config.vocab_size)
    places = [f"example {number}" for number in range(count)]

    def load_model(ckpt, device, dtype, quantization, **_):
        model.to(dtype)
        if quantization:
            quantize(model)
        model.quantization = quantization
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return model

    # train.py runs as it is, but for the model and the examples, which are made here.
    train.load_model = load_model
    train.load_data = lambda *_: (examples[8:], examples[:8], places, 0)
    command = f"--device {args.device} --dtype {args.dtype} --batch-size {args.batch_size} "
    command += f"--max-len 512 --max-steps {args.steps} --out {tempfile.mkdtemp()} {options}"
    options = train.parse_args(command.split())
    train.main(options)
    steps = records.steps_of(records.read_log(options.out / "log.jsonl"))[WARM_UP:]
    results = {
        "tokens/s": statistics.median(step["tokens"] / step["seconds"] for step in steps),
        "peak MiB": peak_mib(args.device),
    }
    rate = matmul_rate(args.dtype, args.device)
    results["share of the rate"] = statistics.median(
        floor_flops(args, model, step) / rate / step["seconds"] for step in steps
    )
    return results


def their_model(args):
    from transformers import AutoModelForCausalLM, LlamaConfig

    fields = vars(meta_model(args.shape).config)
    del fields["model_type"]
    config = LlamaConfig(**fields)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
        )
    return model


# --- generation ---


def measure_generation(args, row):
    """row: such as "RoSA, 32 rows"."""
    whose, count = row.removesuffix(" rows").split(", ")
    count = int(count)
    torch.manual_seed(0)
    model = their_model(args).eval() if whose == "transformers" else random_model(args)
    prompts = [prompt for prompt, _ in random_examples(count, model.config.vocab_size)]
    if whose == "transformers":
        # Padded on the left, as generation needs it.
        longest = max(map(len, prompts))
        tokens = torch.zeros(count, longest, dtype=torch.long, device=args.device)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        model.generation_config.eos_token_id = None

        def generate(new):
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, **options)

    else:
        kernels.accelerate(model, inference=True)

        def generate(new):
            inference.generate(model, prompts, new, None, batch_size=count)

    with torch.no_grad():
        generate(2)  # warms up
        start = timer()  # waits for the GPU
        generate(args.max_new_tokens)
        seconds = timer() - start
    rate = count * args.max_new_tokens / seconds
    return {"new tokens/s": rate, "peak MiB": peak_mib(args.device)}


# --- shapes alone ---


def run_without_numbers(args):
    """The passes that train.py and inference.py make, on a GPU that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels.Operators.look_up()
    model = meta_model(args.shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            where = {"dtype": getattr(torch, args.dtype), "device": args.device}
            fake = torch.nn.Parameter(torch.empty(parameter.shape, **where))
            setattr(model.get_submodule(module), leaf, fake)
        model.tie_weights()
        rosa.attach(model)
        exchanged, left = kernels.accelerate(model)
        examples = random_examples(args.batch_size, model.config.vocab_size)
        tokens, labels = train.collate(examples, args.device)
        hidden = model.hidden_states(tokens)
        print(f"training: hidden states {tuple(hidden.shape)} {hidden.dtype} on {hidden.device}")
        # The loss picks the labelled positions, which depends on numbers: here all of them. It
        # computes its gradients in the forward pass.
        states = hidden.flatten(0, 1)
        loss = kernels.SummedCrossEntropy.apply(states, model.lm_head.weight, labels.flatten())
        print(f"loss: {tuple(loss.shape)} {loss.dtype} on {loss.device}")
        with torch.no_grad():
            cache = KVCache(model.config)
            model.hidden_states(tokens, cache)
            after = model.logits(model.hidden_states(tokens[:, :1], cache))
        print(f"generation: {tuple(after.shape)} {after.dtype} after {cache.length} tokens")
        print(f"kernels: {', '.join(exchanged)}; left: {left or 'none'}")


if __name__ == "__main__":
    main()
