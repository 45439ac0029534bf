"""The processes that torchrun starts: what each computes, how gradients are summed, how all end
with one; FSDP2.
With them a run may use several devices or machines, and a model may be larger than one of them.
Without it: one process on one device, which is all there is for this file too unless torchrun has
started it.
"""

import math
import os
import sys
from datetime import timedelta
from itertools import islice

import torch
from tqdm import tqdm

from data.errors import UserError

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def processes():
    """(the index of this process, the number of processes), which torchrun tells each process that
    it starts; a process that is alone is (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this is the first process, which writes the files and shows the progress bars.
    A `print` need not ask: what the others print goes nowhere (`join_processes`)."""
    return processes()[0] == 0


def check_launcher():
    """Raise UserError where the environment has some of the variables that torchrun sets, but not
    all: they were left there. They are taken out then, so that this process knows itself to be
    alone."""
    values = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    numbers = [
        values.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    ]
    is_alone = values.get("WORLD_SIZE", "1") == "1" and values.get("RANK", "0") == "0"
    if is_alone:
        return
    is_whole = len(values) == len(LAUNCHER) and all(number.isdecimal() for number in numbers)
    if is_whole and int(values["RANK"]) < int(values["WORLD_SIZE"]):
        return
    for name in values:
        del os.environ[name]
    shown = " ".join(f"{name}={value}" for name, value in values.items())
    raise UserError(
        f"the environment has {shown} and no launcher that goes with it: unset {' '.join(values)}"
    )


def join_processes():
    """Meet the other processes that torchrun has started, if it has started any. From here on only
    the first process prints. Raises UserError for an environment that no launcher has made."""
    check_launcher()
    if processes()[1] > 1:
        # The others wait in `gather` while the first process writes gigabytes, so the timeout is
        # long. A process that dies is noticed at once.
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=1))
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def gather(value=None, problem=None):
    """The values that all processes give, in the order of their indices; each process waits here
    until all have come. If one comes with a problem instead, (script, what is wrong, exit status),
    all end with that status, and the first process prints every problem once."""
    gathered = [(value, problem)] * processes()[1]
    if len(gathered) > 1:
        torch.distributed.all_gather_object(gathered, (value, problem))
    problems = [problem for _, problem in gathered]
    if not any(problems):
        return [value for value, _ in gathered]
    close_bars()
    for index, problem in enumerate(problems):
        if is_first() and problem and problem not in problems[:index]:
            script, what, _ = problem
            whose = f"process {index}: " if index > 0 else ""
            print(f"{script}: {whose}{what}", file=sys.stderr)
    sys.exit(max(problem[2] for problem in problems if problem))


def close_bars():
    """Close every progress bar, so that what is printed next is a line of its own."""
    for bar in list(tqdm._instances):
        bar.close()


def share_out(work, items, at_a_time):
    """Yield the results of work(some of the items), an iterator, from all processes: each process
    works on its share of the items, `at_a_time` of them between two exchanges, and gets the results
    of every process."""
    index, count = processes()
    if not items:
        return
    if count == 1:
        yield from work(items)
        return
    own_results = iter(work(items[index::count]))
    for _ in range(math.ceil(len(items) / (at_a_time * count))):
        for results in gather(list(islice(own_results, at_a_time))):
            yield from results


def died(error):
    """Whether an error says that another process has ended or no longer answers. Gloo's is a plain
    RuntimeError."""
    if processes()[1] == 1 or not isinstance(error, RuntimeError):
        return False
    return "gloo" in str(error) or isinstance(error, torch.distributed.DistError)


def by_the_first(save):
    """Decorates what saves: the first process does it, and the others wait until it is done."""

    def saving_once(*arguments):
        if is_first():
            save(*arguments)
        gather()

    return saving_once


def gradient_group(device):
    """The processes as a group in which one that is silent for 50 seconds is taken for dead; None
    for one alone."""
    if processes()[1] == 1:
        return None
    backend = "nccl" if device.type == "cuda" else "gloo"
    return torch.distributed.new_group(backend=backend, timeout=timedelta(seconds=50))


# So many tokens, padding included, are computed at a time where --micro-batch-size does not say how
# many examples are. tests/README.md has how speed and memory depend on it.
TOKENS_AT_A_TIME = 1280


def own_micro_batches(examples, size=None):
    """The examples, (prompt ids, response ids), that this process computes, in micro-batches of at
    most `size`, or where it is None of as many as TOKENS_AT_A_TIME allows. All processes have the
    same number of micro-batches, since those of a sharded model compute in step: where the examples
    are too few for that, the last micro-batch is empty."""
    if size is None:
        longest = max(len(prompt) + len(response) for prompt, response in examples)
        shared = len(os.path.commonprefix([prompt for prompt, _ in examples]))
        size = fitting(longest, shared)
    index, count = processes()
    rounds, size = evenly(len(examples), size)
    micro_batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    return (micro_batches[index::count] + [[]])[:rounds]


def fitting(longest, shared):
    """How many examples have TOKENS_AT_A_TIME, if the longest has so many tokens, and all begin
    with `shared` tokens that are computed once (prefix.py)."""
    return max(1, (TOKENS_AT_A_TIME - shared) // (longest - shared))


def evenly(examples, size):
    """(how many micro-batches each process computes, how many examples are in one), for so many
    examples, at most `size` in a micro-batch."""
    count = processes()[1]
    rounds = math.ceil(examples / (size * count))
    return rounds, math.ceil(examples / (rounds * count))


def all_reduce_gradients(process_group, model, *numbers):
    """Add up the gradients of all processes, in place, and some numbers, or tensors of one number,
    in one message of float32. Returns the sums of the numbers, which on a GPU waits for what was
    asked of it so far."""
    if process_group is None:
        return [float(number) for number in numbers]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    pieces = [grad.flatten().float() for grad in grads]
    for number in numbers:
        pieces.append(torch.as_tensor(number, dtype=torch.float32, device=model.device).view(1))
    flat = torch.cat(pieces)
    torch.distributed.all_reduce(flat, group=process_group)
    *sums, numbers = flat.split([*(grad.numel() for grad in grads), len(numbers)])
    for grad, total in zip(grads, sums):
        grad.copy_(total.view_as(grad))
    return numbers.tolist()


def shard(model, optimizer, process_group, device, dtype):
    """Leave each process some rows of every frozen weight (FSDP2). A layer's weights are brought
    together while it computes, those of the embedding and lm_head from the forward to the backward
    pass. Every process has all adapters and norms, which are small: they move to the device in
    place, and the optimizer's moments follow them."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    mesh = DeviceMesh.from_group(process_group, device.type)
    kept = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "norm" in name:
            is_wide = parameter.requires_grad or dtype == torch.float16  # see LossScale
            its_dtype = torch.float32 if is_wide else dtype
            parameter.data = parameter.data.to(device, its_dtype, copy=True)
            kept.add(parameter)

    def in_dtype(tensor):
        return tensor.to(dtype) if isinstance(tensor, DTensor) else tensor

    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=kept)
        module._apply(in_dtype)
    register_fsdp_forward_method(model, "loss")
    optimizer.load_state_dict(optimizer.state_dict())  # puts moments where their parameters are
