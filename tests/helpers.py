"""What several test files use: random tiny models, the scripts run as a user runs them, and the
logs of these runs."""

import functools
import json
import multiprocessing.forkserver
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rounding import bound, of_model

from data import toy
from extras import inference
from extras.operators import Operators
from model import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
# Is added to each seed. The tests must pass for other random numbers too: ROSA_TEST_SEED=7 draws
# them.
OFFSET = 1000 * int(os.environ.get("ROSA_TEST_SEED", 0))
BASE = {  # the config.json of the tiny models
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def seed_torch(seed):
    torch.manual_seed(OFFSET + seed)


def generator_of(seed):
    return torch.Generator().manual_seed(OFFSET + seed)


def random_model(seed=0, dtype=torch.float32, **changes):
    """A Llama with random weights. They are so large that every part of the model matters, norms
    and biases included. `changes`: fields of the config other than those of BASE."""
    fields = {
        name: value
        for name, value in (BASE | changes).items()
        if name in LlamaConfig.__dataclass_fields__
    }
    model = Llama(LlamaConfig(**fields))
    generator = generator_of(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model.to(dtype).eval()


def decisive_model(prompts, count, **changes):
    """A random model whose greedy answers to these prompts do not depend on rounding: at every
    token the most likely one is ahead of the second by more than rounding can make up for."""
    for seed in range(50):
        model = random_model(seed, **changes)
        for prompt, ids in zip(prompts, inference.generate(model, prompts, count, None)):
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 :]
            first, second = logits.topk(2).values.unbind(-1)
            if (first - second).min() <= 2 * bound(
                **of_model(model.config)
            ) * logits.square().mean().sqrt():
                break
        else:
            return model
    raise AssertionError("the answers of fifty models in a row depend on rounding")


def write_checkpoint(directory, config, model):
    """Save a model as a checkpoint whose config.json is exactly `config`."""
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_tiny_checkpoint(directory):
    """Save a random model with a tokenizer as a checkpoint: 1,024 tokens, 4 layers, a context of
    256."""
    model = random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256)
    model.save_pretrained(directory)
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory)


def random_tokens(*shape, seed=0, vocab_size=97):
    return torch.randint(vocab_size, shape, generator=generator_of(seed))


def assert_same_tensors(model, expected):
    """Two models have the same parameters, to the bit: reading and writing a file round nothing.
    The outputs of the two models are the same to rounding only: the order in which a product is
    added up may depend on where a tensor lies in memory, and a tensor that is mapped from a file
    lies elsewhere."""
    tensors, others = model.state_dict(), expected.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def randomise_adapters(model, seed=1):
    """Give the adapters random matrices B, as if they had been trained. A new adapter has B = 0."""
    from rosa import adapters

    generator = generator_of(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.B.copy_(0.1 * torch.randn(adapter.B.shape, generator=generator))
    return model


def smooth_adamw():
    """AdamW for runs that are compared to rounding. AdamW divides a gradient by the gradient's own
    size, so that a gradient which is nearly zero, and all rounding, makes a whole step. With an eps
    far above rounding the steps of two runs differ as little as their gradients do."""
    return functools.partial(torch.optim.AdamW, eps=1e-3)


def without_operators(monkeypatch):
    """Take away the operators of PyTorch that are not documented, as if this machine, or this
    PyTorch, had none of them."""
    Operators.look_up()
    monkeypatch.setattr(Operators, "onednn", frozenset())
    for name, formula in Operators.formulas.items():
        monkeypatch.setattr(Operators, name, staticmethod(formula))


def forkserver():
    """A server that starts processes which need not import torch: each is a fork of the server, and
    the server has imported it."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["train", "eval", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.figure"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13 the server does not take over sys.path: PYTHONPATH tells it
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return processes


# --- the scripts, as a user runs them ---


def run(script, *arguments):
    """Run a script with these arguments, in this process. Returns the parsed arguments."""
    args = script.parse_args([str(argument) for argument in arguments])
    script.main(args)
    return args


# Options of train.py: six steps on a tiny checkpoint `ckpt`, by the method that a test adds, or by
# RoSA of rank 4
SHORT_RUN = (
    "--ckpt ckpt --max-steps 6 --batch-size 8 --micro-batch-size 8 --val-size 8 --eval-every 3 "
    "--max-len 200 --select-every 2 --device cpu --dtype float32"
).split()
SHORT_ROSA_RUN = (*SHORT_RUN, "--rank", 4, "--alpha", 8, "--lr", 1e-2)


def read_log(out, name="log.jsonl"):
    """The lines of a log; none where the run has not come to its first."""
    path = Path(out, name)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_steps(out):
    """The lines of a run's log that are of steps."""
    return [record for record in read_log(out) if "val_loss" not in record]


def read_validations(out):
    """step -> validation loss, as a run's log has them."""
    validations = [record for record in read_log(out) if "val_loss" in record]
    return {record["step"]: record["val_loss"] for record in validations}


def best_step(out):
    """The step of the lowest validation loss of a run."""
    losses = read_validations(out)
    return min(losses, key=losses.get)


def no_package(monkeypatch, name):
    """Make the import of an optional package fail, as if it were not installed."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


def write_test_sets(directory, names):
    for i, name in enumerate(names):
        file = Path(directory, "dataset", name, "test.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(toy.examples("test", 5 + 4 * i, seed=i)))
