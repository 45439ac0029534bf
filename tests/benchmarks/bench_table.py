"""The machine that this runs on, in three tables: training and generation beside transformers and
peft with the floor that the hardware sets, and what each kernel is worth. Under 15 minutes.

    python tests/benchmarks/bench_table.py --ckpt checkpoints/smollm2-135m --train-file data.json

They are those of bench_train.py, bench_generate.py and bench_kernels.py, with as many steps and
rounds as there is time for. bfloat16 is left out where the processor has no instructions for it."""

import sys
import time

import bench_generate  # they are beside this file
import bench_kernels
import bench_train
import torch
from common import matmul_rate, parse_args

from extras.checkpoints import computes_bfloat16


def main(arguments=None):
    args = parse_args(__doc__, arguments, ckpt="data/tiny", train_file="", rounds=3)
    start = time.perf_counter()
    dtypes = ["float32", "bfloat16"] if computes_bfloat16(torch.device("cpu")) else ["float32"]
    rates = [f"{matmul_rate(dtype, 'cpu') / 1e9:,.0f} GFLOP/s in {dtype}" for dtype in dtypes]
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, Python {sys.version.split()[0]}; a large product: {', '.join(rates)}"
    )
    options = ["--ckpt", args.ckpt, "--dtype", ",".join(dtypes)]
    rounds = ["--rounds", str(args.rounds)]
    examples = ["--train-file", args.train_file]
    sizes = ["--steps", "4", "--rows", f"{bench_train.PEER}; RoSA"]
    print("\nTraining, batches of 8 examples\n", flush=True)
    bench_train.main([*options, *rounds, *examples, *sizes])
    print("\nGreedy generation, 32 rows\n", flush=True)
    sizes = ["--limit", "32", "--max-new-tokens", "32", "--rows", "transformers; generate"]
    bench_generate.main([*options, *rounds, "--test-file", args.train_file, *sizes])
    print("\nWithout each kernel, as a multiple of all of them\n", flush=True)
    sizes = ["--batch-size", "2", "--prompts", "8"]
    bench_kernels.main([*options, *rounds, *examples, *sizes])
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
