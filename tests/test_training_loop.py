"""Statements about train.py: what a run does, step by step, and what it leaves, on a random tiny
model."""

import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHORT_ROSA_RUN,
    SHORT_RUN,
    random_model,
    random_tokens,
    randomise_adapters,
    read_log,
    read_steps,
    read_validations,
    seed_torch,
    smooth_adamw,
)
from rounding import assert_close, assert_no_worse, near, of_model

import eval as eval_script
import rosa
import train
from data import toy
from data.tokenizer import load_tokenizer
from extras import adapters, kernels, prefix, runs
from model import Llama

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("unflushed")]


def run(*arguments, out="out"):
    """train.main with these arguments, in this process. Returns its parsed arguments."""
    args = train.parse_args([*map(str, arguments), "--out", str(out)])
    train.main(args)
    return args


def saved(out="out", name="adapter_model.safetensors"):
    return Path(out, name).read_bytes()


def adapted(out="out", dtype=torch.float32):
    return rosa.load_adapter(Llama.from_pretrained("ckpt", dtype=dtype), out)


def validated(model, args):
    """The validation loss of a run's model, with the rounding that another computation may have."""
    _, held_out, *_ = train.load_data(args, load_tokenizer("ckpt"))
    kernels.accelerate(model)  # as in the run: in bfloat16 the plain way rounds otherwise
    return near(train.validate(model, held_out, args), **of_model(model.config))


def same_to_rounding(log, other, steps):
    rounding = of_model(Llama.from_pretrained("ckpt").config, 2 * steps)
    for a, b in zip(log, other, strict=True):
        for name in ("loss", "val_loss"):
            assert a.get(name, 0) == near(b.get(name, 0), **rounding)
        assert all(a.get(name) == b.get(name) for name in ("step", "active_layers", "tokens"))


# --- what a run leaves ---

RUNS = {
    "": 2,
    "--k-ratio 1": 4,
    "--method lora --targets q,k,v,o,gate,up,down": 4,
    "--method lora --k-ratio 0.25": 1,
    "--targets q,k,v,down --dtype bfloat16": 2,
    "--pairs random --select random": 2,
    "--select all": 4,
}


@pytest.mark.parametrize("options, active", RUNS.items())
def test_a_run_leaves_the_best_adapter_its_arguments_and_a_line_per_step_and_selection(
    ckpt, options, active, capsys
):
    for _ in range(1 if options else 2):  # a new run in the same place begins new logs
        args = run(*SHORT_ROSA_RUN, "--overwrite", *options.split())
    fields = ["step", "loss", "lr", "tokens", "seconds", "active_layers"]
    lines = [(record["step"], list(record)) for record in read_log("out")]
    steps = {step: (step, fields) for step in (1, 2, 3, 4, 5, 6)}
    validations = {step: (step, ["step", "val_loss"]) for step in (0, 3, 6)}
    assert lines == [
        validations[0],
        *(steps[1], steps[2], steps[3], validations[3]),
        *(steps[4], steps[5], steps[6], validations[6]),
    ]
    log, losses = read_steps("out"), read_validations("out")
    assert all(len(record["active_layers"]) == active for record in log)
    assert min(losses[3], losses[6]) < losses[0] - 0.02
    written = json.loads(Path("out/args.json").read_text())
    assert (written["rank"], written["format"], written["dtype"]) == (4, runs.FORMAT, args.dtype)

    probes = read_log("out", "layers.jsonl")
    assert [probe["step"] for probe in probes] == [1, 3, 5]
    for probe in probes:
        assert probe["active_layers"] == sorted(np.argsort(probe["scores"])[-active:])
        assert log[probe["step"] - 1]["active_layers"] == probe["active_layers"]

    model = adapted(dtype=getattr(torch, args.dtype))
    trainable = sum(a.A.numel() + a.B.numel() for a in rosa.adapters(model).values())
    everything = trainable + sum(p.numel() for p in Llama.from_pretrained("ckpt").parameters())
    printed = capsys.readouterr()
    assert f"trainable params: {trainable:,} || all params: {everything:,} || " in printed.out
    assert "tokens/s" in printed.err
    best = min(losses.values())
    assert best == validated(model, args)
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["trainable"], summary["parameters"], summary["val_loss"]) == (
        trainable,
        everything,
        best,
    )
    tokens, seconds = (sum(record[name] for record in log) for name in ("tokens", "seconds"))
    assert (
        summary["tokens_per_second"] == pytest.approx(tokens / seconds)
        and 2**27 < summary["peak_memory"] < 2**36
    )


@pytest.mark.parametrize("log, probes", [(0, 0), (0, 3), (2, 0)])
def test_a_run_is_drawn_without_a_screen_where_matplotlib_is_there(
    ckpt, monkeypatch, capsys, log, probes
):
    """Also a run of which no step was applied, or no probe was finite."""
    run(*SHORT_ROSA_RUN)
    if (picture := Path("out/run.png")).exists():
        assert picture.read_bytes().startswith(b"\x89PNG")
        size = len(picture.read_bytes())
        lines = [
            record | {"loss": None} if "loss" in record and log < record["step"] < 4 else record
            for record in read_log("out")
        ]
        Path("out/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Path("out/layers.jsonl").write_text(
            "".join(Path("out/layers.jsonl").read_text().splitlines(True)[:probes])
        )
        runs.draw_run(Path("out"))
        assert 10000 < len(picture.read_bytes()) != size
        picture.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    runs.draw_run(Path("out"))
    assert "pip install matplotlib" in capsys.readouterr().out and not picture.exists()


def test_a_run_is_named_by_what_it_trains_on():
    for options, name in (
        ("", "toy"),
        ("--train-file a/mine.jsonl", "mine"),
        ("--task gsm8k --train-file m", "gsm8k"),
    ):
        args = train.parse_args(options.split())
        assert args.out == Path(f"runs/tiny-{name}-rosa") and args.task == (
            "gsm8k" if "gsm8k" in name else "toy"
        )


def test_full_training_leaves_a_checkpoint_with_its_tokenizer(ckpt, capsys):
    Path("ckpt/additional_chat_templates").mkdir()
    Path("ckpt/additional_chat_templates/tool.jinja").write_text("x")
    raw = json.loads(Path("ckpt/config.json").read_text())
    Path("ckpt/config.json").write_text(json.dumps(raw | {"eos_token_id": 9}))
    args = run(*SHORT_RUN, *"--method full --k-ratio 0.5 --lr 1e-3".split())
    losses = read_validations("out")
    count = sum(p.numel() for p in Llama.from_pretrained("ckpt").parameters())
    assert f"trainable params: {count:,} || all params: {count:,}" in capsys.readouterr().out
    assert [len(record["active_layers"]) for record in read_steps("out")] == [2] * 6
    assert losses[6] < losses[0] - 0.02
    assert losses[6] == validated(Llama.from_pretrained("out"), args)
    assert Path("out/additional_chat_templates/tool.jinja").read_text() == "x"
    # the token that ended all responses ends an answer
    assert Llama.from_pretrained("out").config.eos_token_id == [9, 2]
    eval_script.main(
        eval_script.parse_args("--ckpt out --limit 3 --max-new-tokens 5 --out scores".split())
    )


def test_a_method_of_peft_runs_in_the_same_loop_and_is_read_back(ckpt):
    pytest.importorskip("peft")
    Path("options.json").write_text(
        '{"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}'
    )
    arguments = [
        *SHORT_RUN,
        *"--method peft:IA3 --peft-config options.json --k-ratio 0.5 --lr 1e-1".split(),
    ]
    assert train.parse_args(arguments).out == Path("runs/ckpt-toy-peft-IA3")
    args = run(*arguments)
    losses = read_validations("out")
    assert losses[6] < losses[0] - 0.01
    assert all(len(record["active_layers"]) == 2 for record in read_steps("out"))
    model = adapters.load_adapter(Llama.from_pretrained("ckpt"), "out")
    assert losses[6] == validated(model, args)
    run(*arguments, "--save-every", 1, out="parts")
    assert saved("parts") == saved()


def test_dropout_acts_in_training_alone(ckpt, monkeypatch):
    monkeypatch.setattr(prefix, "WORTH_IT", math.inf)  # with dropout nothing is shared
    pytest.importorskip("peft")
    first = []
    for dropout in (0.0, 0.9):
        Path("options.json").write_text(json.dumps({"lora_dropout": dropout}))
        run(
            *SHORT_RUN,
            *"--method peft:LORA --peft-config options.json --lr 1e-2 --overwrite".split(),
        )
        first.append([record.get("val_loss") or record["loss"] for record in read_log("out")])
    # Dropout shows in the second step only: in the first B is still zero
    assert first[0][:2] == first[1][:2] and first[0][2] != first[1][2]
    model = adapters.load_adapter(Llama.from_pretrained("ckpt"), "out")
    args = train.parse_args([*SHORT_RUN, "--method", "lora"])
    assert read_validations("out")[6] == validated(model, args)


def test_the_best_adapter_is_kept_when_training_gets_worse(ckpt, monkeypatch):
    """From the fourth step on the loss is climbed, not descended."""
    loss, before, steps = Llama.loss, rosa.LayerSelector.before_forward, []

    def before_forward(self, step):
        steps.append(step)
        before(self, step)

    def climbing(self, *inputs):
        return loss(self, *inputs) * (-1 if torch.is_grad_enabled() and steps[-1] > 2 else 1)

    monkeypatch.setattr(rosa.LayerSelector, "before_forward", before_forward)
    monkeypatch.setattr(Llama, "loss", climbing)
    args = run(*SHORT_ROSA_RUN, "--max-steps", 7, "--eval-every", 1)
    losses = list(read_validations("out").values())
    assert min(losses) == min(losses[1:5]) < losses[-1] and min(losses) == validated(
        adapted(), args
    )


# --- what decides the numbers ---


@pytest.mark.slow
def test_plain_formulas_and_the_default_are_the_same_run(monkeypatch, tmp_path):
    """In bfloat16 the losses of either run are as near to those in float32 as the other's."""
    logs = {}
    for options in (
        "--dtype float32",
        "--dtype bfloat16",
        "--plain --dtype float32",
        "--plain --dtype bfloat16",
    ):
        if "--plain" in options:
            monkeypatch.setattr(kernels, "accelerate", None)  # is not called
        steps = "--max-steps 20 --batch-size 2 --select-every 2 --val-size 2 --rank 8 --device cpu"
        run("--ckpt", "tiny", *steps.split(), *options.split(), out=tmp_path / options)
        logs[options] = read_steps(tmp_path / options)
    default, default16, plain, plain16 = (
        np.array([record["loss"] for record in log]) for log in logs.values()
    )
    assert np.abs(default - plain).max() < 1e-4
    layers = [[record["active_layers"] for record in log] for log in logs.values()]
    assert layers[0] == layers[2] and len({str(active) for active in layers[0]}) > 1
    off, plain_off = (np.linalg.norm(losses - plain) for losses in (default16, plain16))
    assert 0 < off < 3 * plain_off and plain_off < 3 * off


@pytest.mark.parametrize("rank", [0, 3])
def test_a_step_is_seeded_by_its_number_for_the_selection_and_by_the_rank_too_for_dropout(
    ckpt, monkeypatch, rank
):
    calls = []

    def recorded(owner, name, entry):
        plain = getattr(owner, name)

        def recording(*inputs):
            if name != "loss" or torch.is_grad_enabled():
                calls.append(entry or inputs[0])
            return plain(*inputs)

        monkeypatch.setattr(owner, name, recording)

    recorded(torch, "manual_seed", None)
    recorded(rosa.LayerSelector, "before_forward", "selection")
    recorded(Llama, "loss", "forward")
    monkeypatch.setattr(train, "processes", lambda: (rank, 1))
    run(*SHORT_ROSA_RUN, "--max-steps", 3, "--seed", 50)
    steps = [[50 + step, "selection", 50 + step + 3 * rank, "forward"] for step in range(3)]
    assert calls == [50, *sum(steps, [])]


def test_pairs_all_is_lora(model):
    settings = []
    for options in ("--pairs all --low-freq-ratio 0.1", "--method lora"):
        other = copy.deepcopy(model)
        train.attach(train.parse_args([*options.split(), "--rank", "4"]), other)
        settings.append(rosa.attach_arguments(other))
    assert settings[0] == settings[1] and settings[0]["low_freq_ratio"] == 1


def test_alpha_follows_the_rank_and_the_learning_rate_the_method():
    args = [
        train.parse_args(options.split())
        for options in ("", "--rank 8", "--rank 8 --alpha 3", "--method full")
    ]
    assert [vars(options).get("alpha") for options in args] == [128, 16, 3, None]
    assert [options.lr for options in args] == [1e-3, 1e-3, 1e-3, 2e-5] and args[0].rank == 64


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(ckpt):
    run(
        *SHORT_ROSA_RUN,
        "--max-steps",
        40,
        "--batch-size",
        2,
        "--micro-batch-size",
        2,
        "--val-size",
        2,
        "--eval-every",
        100,
    )
    lr = [record["lr"] for record in read_steps("out")]
    assert lr[:2] == [0.005, 0.01] and max(lr) == 0.01
    assert (
        lr[2:] == sorted(lr[2:], reverse=True)
        and lr[21] == pytest.approx(0.005)
        and 0 < lr[-1] < 1e-4
    )


def test_micro_batches_change_nothing_but_memory(ckpt, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())
    for size in (2, 8):
        run(*SHORT_ROSA_RUN, "--micro-batch-size", size, out=f"out{size}")
    same_to_rounding(read_log("out2"), read_log("out8"), 6)


def test_the_seed_decides_everything(ckpt):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*SHORT_ROSA_RUN, "--max-steps", 3, "--seed", seed, out=out)
    assert saved("a") == saved("b") != saved("c")


def test_gradients_are_clipped_to_norm_1(ckpt, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recording(parameters, max_norm):
        norm = clip(parameters, max_norm)
        norms.append(
            torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        )
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    run(*SHORT_ROSA_RUN, "--alpha", 10000)
    assert len(norms) == 6 and max(norms) == near(1, length=10**4)  # numbers


# --- batches ---


def test_batches_hold_every_example_once_and_similar_lengths():
    lengths = [(7 * i) % 101 for i in range(1003)]
    batches = train.make_batches(lengths, 8, "0 0")
    assert sorted(sum(batches, [])) == list(range(1003)) and len(batches) == 126
    padding = sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)
    assert padding < 0.05 * sum(lengths)
    assert batches == train.make_batches(lengths, 8, "0 0") != train.make_batches(lengths, 8, "0 1")
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest[:60] != sorted(longest[:60])


def test_only_the_response_and_its_end_are_labelled():
    tokens, labels = train.collate([([5, 6, 7], [8, 2]), ([5], [9, 9, 9, 2])], "cpu")
    assert tokens.tolist() == [[5, 6, 7, 8], [5, 9, 9, 9]]
    assert labels.tolist() == [[-100, -100, 8, 2], [9, 9, 9, 2]]


def test_held_out_examples_are_not_trained_on(ckpt):
    examples, held_out, *_ = train.load_data(
        train.parse_args([*map(str, SHORT_ROSA_RUN)]), load_tokenizer("ckpt")
    )
    assert (len(examples), len(held_out)) == (92, 8)
    assert not {tuple(prompt) for prompt, _ in examples} & {tuple(prompt) for prompt, _ in held_out}


@pytest.mark.parametrize(
    "count, typed, held_out", [(100, [], 10), (5, [], 1), (100, ["--val-size", 60], 60)]
)
def test_a_tenth_is_held_out_unless_typed_otherwise(ckpt, count, typed, held_out):
    Path("data.json").write_text(json.dumps(toy.examples("train", count)))
    args = train.parse_args(["--ckpt", "ckpt", "--train-file", "data.json", *map(str, typed)])
    examples, validation, *_ = train.load_data(args, load_tokenizer("ckpt"))
    assert (len(examples), len(validation)) == (count - held_out, held_out)


def test_examples_with_an_empty_field_are_left_out_when_asked_to(ckpt, capsys):
    examples = toy.examples("train", 40)
    examples[3]["output"] = examples[9]["output"] = ""
    Path("data.json").write_text(json.dumps(examples))
    with pytest.raises(
        ValueError, match="'output' is empty in 2 records, the first is record 3: .* --skip-empty"
    ):
        run(*SHORT_ROSA_RUN, "--train-file", "data.json")
    run(*SHORT_ROSA_RUN, "--train-file", "data.json", "--skip-empty", "--max-steps", 1)
    assert "30 examples" in capsys.readouterr().out


def test_a_run_in_which_nothing_improved_says_so(ckpt, monkeypatch, capsys):
    run(*SHORT_ROSA_RUN, "--max-steps", 3, out="better")
    assert "nothing improved" not in capsys.readouterr().out
    monkeypatch.setattr(train, "validate", lambda *_: 5.0)
    run(*SHORT_ROSA_RUN, "--max-steps", 3)
    assert (
        "nothing improved on the loss before training: the adapter kept is the untrained"
        in capsys.readouterr().out
    )


def test_examples_that_are_too_long_are_counted_not_cut(ckpt, capsys):
    examples = toy.examples("train", 60)
    for example in examples[:7]:
        example["output"] = "seven " * 300
    Path("data.json").write_text(json.dumps(examples))
    run(*SHORT_ROSA_RUN, "--train-file", "data.json", "--max-steps", 1)
    assert "7 longer than 200 tokens left out" in capsys.readouterr().out


# --- less memory, and compiled ---

RECOMPUTED = (
    "",
    "--dtype bfloat16",
    "--k-ratio 1",
    "--method lora --targets q,down",
    "--method full --lr 1e-3",
)


@pytest.mark.parametrize("options", RECOMPUTED)
def test_recomputed_activations_change_not_a_bit(ckpt, options, monkeypatch):
    monkeypatch.setattr(
        prefix, "WORTH_IT", math.inf
    )  # with --checkpoint-activations none is shared
    options = [
        *SHORT_RUN,
        *([] if "full" in options else ["--rank", 4, "--lr", 1e-2]),
        *options.split(),
    ]
    for out, more in (("kept", []), ("again", ["--checkpoint-activations"])):
        run(*options, "--max-steps", 3, "--val-size", 4, *more, out=out)
    kept, again = (
        [record | {"seconds": 0} for record in read_log(out)] for out in ("kept", "again")
    )
    name = "model.safetensors" if "full" in options else "adapter_model.safetensors"
    assert kept == again and saved("kept", name) == saved("again", name)


@pytest.mark.parametrize("recomputed", [True, False])
def test_recomputed_activations_do_not_grow_with_depth(recomputed):
    counts = []
    for layers in (2, 6):
        model = rosa.attach(random_model(num_hidden_layers=layers), rank=4)
        # Otherwise layer 0 would keep its activations, since its input requires no gradient
        model.model.embed_tokens.requires_grad_(True)
        kernels.accelerate(model)
        if recomputed:
            kernels.checkpoint_activations(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x) or x, lambda x: x
        ):
            model.hidden_states(torch.arange(40).view(2, 20))
        counts.append(len({tensor.data_ptr() for tensor in kept}))
    assert (counts[1] - counts[0] == 4) == recomputed


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--checkpoint-activations", "--quantize int8"])
def test_compiled_layers_compute_the_same(ckpt, monkeypatch, option):
    """The layers are traced and differentiated as torch.compile does it, but not compiled to C++,
    which takes a minute: bench_train.py does that."""
    random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained(
        "ckpt"
    )
    compiled, real = [], torch.compile

    def compile(function, **options):
        compiled.append(function)
        return real(function, **options | {"backend": "aot_eager"})

    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())
    monkeypatch.setattr(torch, "compile", compile)
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        run(*SHORT_ROSA_RUN, *option.split(), "--max-steps", 3, *more, out=out)
    assert len(compiled) == 1 + 2  # whether anything can be compiled here, and the layers
    same_to_rounding(read_log("compiled"), read_log("plain"), 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_the_same_gradients(dtype):
    """And it is compiled once, whatever the sizes of later batches."""
    seed_torch(0)
    plain = rosa.attach(random_model(num_hidden_layers=1, dtype=dtype), rank=4)
    for adapter in rosa.adapters(plain).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    models = {
        "exact": copy.deepcopy(plain).double(),
        "plain": plain,
        "compiled": copy.deepcopy(plain),
    }
    graphs, gradients = [], {}
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    for name, model in models.items():
        trained, gradients[name] = [p for p in model.parameters() if p.requires_grad], []
        if name != "exact":
            kernels.accelerate(model)
        if name == "compiled":
            model.model.layers[0].compile(
                dynamic=True, backend=lambda *graph: graphs.append(1) or aot_eager(*graph)
            )
        for size in ((2, 15), (3, 22), (5, 9), (4, 31)):
            tokens = random_tokens(*size)
            model.loss(tokens, tokens).backward()
            gradients[name].append(torch.cat([p.grad.flatten() for p in trained]))
            model.zero_grad()
    assert len(trained) == 4 and 0 < len(graphs) <= 2
    for exact, plain, compiled in zip(*gradients.values()):
        assert_no_worse(compiled, plain, exact)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_compiler_takes_the_fast_matrix_product(tmp_path, monkeypatch):
    """Compiles to machine code, which the two tests above do not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kernels.Operators.look_up()
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 16), (8, 16), (8,))]
    grad, results = torch.randn(3, 5, 8), []
    for function in (kernels.linear, torch.compile(kernels.linear, dynamic=True)):
        results.append([function(*inputs), *torch.autograd.grad(function(*inputs), inputs, grad)])
    for plain, compiled in zip(*results):
        assert_close(compiled, plain, length=16)


def test_where_nothing_can_be_compiled_a_line_says_so(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 1 / 0)
    run(*SHORT_ROSA_RUN, "--compile")
    assert (
        "compile    nothing can be compiled here (division by zero): going on without\n"
        in capsys.readouterr().out
    )
    assert len(read_steps("out")) == 6


def test_a_rank_that_an_update_cannot_have_is_said(capsys):
    """K has two heads, of which RoAE adapts eight rows: no product B A with eight rows has a larger
    rank than eight."""
    model = randomise_adapters(rosa.attach(random_model(), rank=12))
    train.say_if_rank_is_too_large(model)
    said = capsys.readouterr().out
    assert re.search(r"rank +12 is more .* k_proj .* --rank 8 ", said)
    adapter = model.model.layers[0].self_attn.k_proj
    assert torch.linalg.matrix_rank((adapter.B @ adapter.A).detach()) == 8
    train.say_if_rank_is_too_large(rosa.attach(random_model(), rank=8))
    assert not capsys.readouterr().out
