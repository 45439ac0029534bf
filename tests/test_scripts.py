"""Statements about `train.py` and `eval.py`, run as a user runs them, on a random tiny model with the bundled tokenizer."""

import copy
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import decisive_model, random_model, random_tokens, seed_torch, smooth_adamw
from rounding import assert_close, assert_no_worse, bound, near, of_model

import eval as eval_script
import rosa
import train as train_script
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import compare, figure1, forgetting, peft_methods, runs
from extras.checkpoints import NAMES
from model import Llama, linear

pytestmark = pytest.mark.numeric
ROOT = Path(train_script.__file__).parent


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 1,024 tokens, 4 layers, a context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256).save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    return "ckpt"


def run(script, *arguments):
    """The script's main with these arguments, in this process. Returns its parsed arguments."""
    args = script.parse_args([str(argument) for argument in arguments])
    script.main(args)
    return args


SHORT = ("--ckpt", "ckpt", "--max-steps", 6, "--batch-size", 8, "--micro-batch-size", 8, "--val-size", 20, "--eval-every", 3, "--max-len", 200,
         "--select-every", 2, "--device", "cpu", "--dtype", "float32")
QUICK = (*SHORT, "--rank", 4, "--alpha", 8, "--lr", 1e-2)


def read_log(out, name="log.jsonl"):
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


def no_package(monkeypatch, name):
    """As on a machine where an optional package is absent."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


# --- training ---


@pytest.mark.parametrize("options, active", [
    ((), 2), (("--k-ratio", 1), 4), (("--method", "lora", "--targets", "q,k,v,o,gate,up,down"), 4),
    (("--method", "lora", "--k-ratio", 0.25), 1), (("--targets", "q,k,v,down", "--dtype", "bfloat16"), 2),
    (("--pairs", "random", "--select", "random"), 2), (("--select", "all"), 4),
])
def test_a_run_leaves_the_best_adapter_its_arguments_and_a_line_per_step(ckpt, options, active, capsys):
    args = run(train_script, *QUICK, "--out", "out", *options)
    first, *log = read_log("out")
    assert set(first) == {"step", "val_loss"} and first["step"] == 0
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    for record in log:
        assert set(record) - {"val_loss"} == {"step", "loss", "lr", "tokens", "seconds", "active_layers"}
        assert len(record["active_layers"]) == active and ("val_loss" in record) == (record["step"] in (3, 6))
    assert min(log[2]["val_loss"], log[5]["val_loss"]) < first["val_loss"] - 0.02
    assert json.loads(Path("out/args.json").read_text())["rank"] == 4
    printed = capsys.readouterr()
    trainable = sum(a.A.numel() + a.B.numel() for a in rosa.adapters(rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")).values())
    assert f"trainable params: {trainable:,} || all params: " in printed.out and "tokens/s" in printed.err

    model = rosa.load_adapter(Llama.from_pretrained("ckpt", dtype=getattr(torch, args.dtype)), "out")
    _, held_out, *_ = train_script.load_data(args, load_tokenizer("ckpt"))
    best = min(record["val_loss"] for record in [first, *log] if "val_loss" in record)
    assert train_script.validate(model, held_out, args) == near(best, **of_model(model.config))


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--k-ratio", 1), ("--method", "lora", "--targets", "q,down"),
                                     ("--method", "full", "--lr", 1e-3)])
def test_recomputed_activations_change_not_a_bit(ckpt, options):
    options = options if "full" in options else ("--rank", 4, "--lr", 1e-2, *options)
    for out, more in (("kept", ()), ("again", ("--checkpoint-activations",))):
        run(train_script, *SHORT, "--max-steps", 3, "--val-size", 4, "--out", out, *options, *more)
    kept, again = ([record | {"seconds": 0} for record in read_log(out)] for out in ("kept", "again"))
    assert kept == again
    name = "model.safetensors" if "full" in options else "adapter_model.safetensors"
    assert (Path("kept") / name).read_bytes() == (Path("again") / name).read_bytes()


@pytest.mark.parametrize("recomputed", [True, False])
def test_recomputed_activations_do_not_grow_with_depth(recomputed):
    counts = []
    for layers in (2, 6):
        model = rosa.attach(random_model(num_hidden_layers=layers), rank=4)
        model.model.embed_tokens.requires_grad_(True)  # else layer 0, whose input asks for no gradient, keeps its own
        model.checkpoint_activations = recomputed
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            model.hidden_states(torch.arange(40).view(2, 20))
        counts.append(len({tensor.data_ptr() for tensor in kept}))
    assert (counts[1] - counts[0] == 4) == recomputed


@pytest.mark.slow
def test_compiled_layers_compute_the_same(ckpt, monkeypatch):
    """Traced and differentiated as torch.compile does, but run without a C++ compiler's minute: bench_train.py has that."""
    random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained("ckpt")
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(function)
                        or real(function, **how | {"backend": "aot_eager"}))
    for out, more in (("plain", ()), ("compiled", ("--compile",))):
        run(train_script, *QUICK, "--checkpoint-activations", "--max-steps", 3, "--out", out, *more)
    rounding = of_model(Llama.from_pretrained("ckpt").config, 2 * 3)
    assert len(compiled) == 1 + 2  # whether anything can be compiled here, and the layers
    for one, other in zip(read_log("plain"), read_log("compiled")):
        assert other["step"] == one["step"] and other.get("active_layers") == one.get("active_layers")
        assert other.get("loss", 0) == near(one.get("loss", 0), **rounding)
        assert other.get("val_loss", 0) == near(one.get("val_loss", 0), **rounding)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_the_same_gradients(dtype):
    """And is compiled once, whatever the sizes of the batches that follow."""
    seed_torch(0)
    plain = rosa.attach(random_model(num_hidden_layers=1, dtype=dtype), rank=4)
    for adapter in rosa.adapters(plain).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    models, graphs, found = {"exact": copy.deepcopy(plain).double(), "plain": plain, "compiled": copy.deepcopy(plain)}, [], {}
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    for name, model in models.items():
        trained, found[name] = [p for p in model.parameters() if p.requires_grad], []
        if name == "compiled":
            model.model.layers[0].compile(dynamic=True, backend=lambda *given: graphs.append(1) or aot_eager(*given))
        for size in ((2, 15), (3, 22), (5, 9), (4, 31)):
            tokens = random_tokens(*size)
            model.loss(tokens, tokens).backward()
            found[name].append(torch.cat([p.grad.flatten() for p in trained]))
            model.zero_grad()
    assert len(trained) == 4 and len(graphs) <= 2
    for exact, plain, compiled in zip(*found.values()):
        assert_no_worse(compiled, plain, exact)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_compiler_takes_the_fast_matrix_product(tmp_path, monkeypatch):
    """The whole way to machine code, which the two tests above leave out."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 16), (8, 16), (8,)))
    grad, found = torch.randn(3, 5, 8), []
    for function in (linear, torch.compile(linear, dynamic=True)):
        found.append([function(x, weight, bias), *torch.autograd.grad(function(x, weight, bias), (x, weight, bias), grad)])
    for plain, compiled in zip(*found):
        assert_close(compiled, plain, length=16)


def test_where_nothing_can_be_compiled_a_line_says_so(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 1 / 0)
    run(train_script, *QUICK, "--out", "out", "--compile")
    assert "compile    nothing can be compiled here (division by zero): going on without\n" in capsys.readouterr().out
    assert len(read_log("out")) == 7


def test_full_training_leaves_a_checkpoint_with_its_tokenizer(ckpt, capsys):
    arguments = [*SHORT, "--method", "full", "--k-ratio", 0.5, "--lr", 1e-3]
    args = run(train_script, *arguments, "--out", "out")
    first, *log = read_log("out")
    count = sum(p.numel() for p in Llama.from_pretrained("ckpt").parameters())
    assert f"trainable params: {count:,} || all params: {count:,}" in capsys.readouterr().out
    assert [len(record["active_layers"]) for record in log] == [2] * 6 and log[-1]["val_loss"] < first["val_loss"] - 0.02
    model = Llama.from_pretrained("out")
    _, held_out, *_ = train_script.load_data(args, load_tokenizer("out"))
    assert train_script.validate(model, held_out, args) == near(log[-1]["val_loss"], **of_model(model.config))
    run(eval_script, "--ckpt", "out", "--limit", 3, "--max-new-tokens", 5, "--out", "scores")


def test_a_method_of_peft_runs_in_the_same_loop_and_is_read_back(ckpt):
    pytest.importorskip("peft")
    Path("options.json").write_text('{"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}')
    arguments = [*SHORT, "--method", "peft:IA3", "--peft-config", "options.json", "--k-ratio", 0.5, "--lr", 1e-1]
    args = run(train_script, *arguments)
    assert args.out == Path("runs/ckpt-toy-peft-IA3")
    first, *log = read_log(args.out)
    assert log[-1]["val_loss"] < first["val_loss"] - 0.01 and all(len(record["active_layers"]) == 2 for record in log)
    model = peft_methods.load_adapter(Llama.from_pretrained("ckpt"), args.out)
    _, held_out, *_ = train_script.load_data(args, load_tokenizer("ckpt"))
    assert train_script.validate(model, held_out, args) == near(log[-1]["val_loss"], **of_model(model.config))
    files = [(args.out / "adapter_model.safetensors").read_bytes()]
    run(train_script, *arguments, "--out", "parts", "--save-every", 1)
    files.append(Path("parts/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_the_selections_of_a_run_are_written_and_drawn(ckpt, monkeypatch, capsys):
    for _ in range(2):  # a new run in the same place begins a new log
        run(train_script, *QUICK, "--out", "out", "--overwrite")
    probes = read_log("out", "layers.jsonl")
    assert [probe["step"] for probe in probes] == [1, 3, 5]
    for probe in probes:
        assert probe["active_layers"] == sorted(np.argsort(probe["scores"])[-2:])
        assert read_log("out")[probe["step"]]["active_layers"] == probe["active_layers"]
    no_package(monkeypatch, "matplotlib")
    Path("out/layers.png").unlink(missing_ok=True)
    runs.draw_layers(Path("out"))
    assert "pip install matplotlib" in capsys.readouterr().out and not Path("out/layers.png").exists()


def test_layers_png_is_a_picture_without_a_screen(ckpt):
    pytest.importorskip("matplotlib")
    run(train_script, *QUICK, "--out", "out")
    assert Path("out/layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_counts_parameters_tokens_and_bytes(ckpt):
    run(train_script, *QUICK, "--out", "out")
    summary, log = json.loads(Path("out/summary.json").read_text()), read_log("out")[1:]
    adapters = rosa.adapters(rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")).values()
    assert summary["trainable"] == sum(a.A.numel() + a.B.numel() for a in adapters)
    assert summary["parameters"] - summary["trainable"] == sum(p.numel() for p in Llama.from_pretrained("ckpt").parameters())
    assert summary["val_loss"] == min(record["val_loss"] for record in log if "val_loss" in record)
    assert summary["tokens_per_second"] == pytest.approx(sum(r["tokens"] for r in log) / sum(r["seconds"] for r in log))
    assert 2**27 < summary["peak_memory"] < 2**36


def test_alpha_follows_the_rank(ckpt):
    parse = train_script.parse_args
    assert (parse([]).rank, parse([]).alpha, parse(["--rank", "8"]).alpha) == (64, 128, 16)
    assert parse(["--rank", "8", "--alpha", "3"]).alpha == 3 and parse(["--method", "full"]).lr == 2e-5


def test_the_best_adapter_is_kept_when_training_gets_worse(ckpt, monkeypatch):
    """Uphill from the fourth step on."""
    loss, before, steps = Llama.loss, rosa.LayerSelector.before_forward, []
    monkeypatch.setattr(rosa.LayerSelector, "before_forward", lambda self, step: (steps.append(step), before(self, step)))
    monkeypatch.setattr(Llama, "loss", lambda self, *given: loss(self, *given) * (-1 if torch.is_grad_enabled() and steps[-1] > 2 else 1))
    run(train_script, *QUICK, "--out", "out", "--max-steps", 9, "--eval-every", 1)
    losses = [record["val_loss"] for record in read_log("out")]
    assert min(losses) == min(losses[1:5]) < losses[-1]
    model = rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")
    args = train_script.parse_args([str(a) for a in QUICK])
    _, held_out, *_ = train_script.load_data(args, load_tokenizer("ckpt"))
    assert train_script.validate(model, held_out, args) == near(min(losses), **of_model(model.config))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(ckpt):
    run(train_script, *QUICK, "--max-steps", 40, "--batch-size", 2, "--eval-every", 100, "--out", "out")
    lr = [record["lr"] for record in read_log("out")[1:]]
    assert lr[:2] == [0.005, 0.01] and max(lr) == 0.01
    assert lr[2:] == sorted(lr[2:], reverse=True) and lr[21] == pytest.approx(0.005) and 0 < lr[-1] < 1e-4


def test_micro_batches_change_nothing_but_memory(ckpt, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", smooth_adamw())
    for size in (2, 8):
        run(train_script, *QUICK, "--micro-batch-size", size, "--out", f"out{size}")
    for a, b in zip(read_log("out2")[1:], read_log("out8")[1:]):
        assert a["loss"] == near(b["loss"], **of_model(Llama.from_pretrained("ckpt").config, 2 * 6))
        assert (a["active_layers"], a["tokens"]) == (b["active_layers"], b["tokens"])


def test_the_seed_decides_everything(ckpt):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(train_script, *QUICK, "--out", out, "--seed", seed)
    files = [Path(out, "adapter_model.safetensors").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("options", [["--score-ema", 0.5], ["--dtype", "bfloat16"], ["--select", "random"], ["--method", "full", "--lr", 1e-3],
                                     ["--method", "peft:LORA", "--peft-config", "dropout.json", "--k-ratio", 0.5]], ids=str)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(ckpt, monkeypatch, options):
    if "peft:LORA" in options:
        pytest.importorskip("peft")
        Path("dropout.json").write_text('{"lora_dropout": 0.5}')
    arguments = [*(SHORT if "--method" in options else QUICK), "--save-every", 1, *options]
    run(train_script, *arguments, "--out", "whole")
    save = runs.save_state

    def stop(*arguments):
        save(*arguments)
        if arguments[4] == stop.after:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_state", stop)
    for stop.after, resume in ((3, ()), (4, ("--resume",)), (None, ("--resume",))):
        try:
            run(train_script, *arguments, "--out", "parts", *resume)
        except KeyboardInterrupt:
            for name in ("log.jsonl", "layers.jsonl"):  # it had gone on beyond what was saved
                with open(f"parts/{name}", "a") as log:
                    log.write(json.dumps({"step": stop.after + 1, "loss": 0}) + "\n")
    best = "model.safetensors" if "full" in options else "adapter_model.safetensors"
    for name in (best, "state.safetensors", "layers.jsonl"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()
    without_times = [[record | {"seconds": 0} for record in read_log(out)] for out in ("whole", "parts")]
    assert without_times[0] == without_times[1]
    with pytest.raises(ValueError, match="has --batch-size 8, not 4"):
        run(train_script, *arguments, "--out", "parts", "--resume", "--batch-size", 4)


def test_a_run_is_not_begun_over_another_unless_asked_to(ckpt, capsys):
    run(train_script, *QUICK, "--out", "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        train_script.run([str(argument) for argument in (*QUICK, "--out", "out", "--seed", 1)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("--out out holds a run already: --resume goes on with it, --overwrite starts anew\n")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

    # A run that starts anew and dies before its first step leaves nothing of the old one to resume.
    with pytest.MonkeyPatch.context() as patch:
        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(train_script, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(train_script, *QUICK, "--out", "out", "--overwrite", "--seed", 1)
    run(train_script, *QUICK, "--out", "out", "--resume", "--seed", 1)
    run(train_script, *QUICK, "--out", "other", "--seed", 1)
    for name in ("adapter_model.safetensors", "state.safetensors", "layers.jsonl"):
        assert Path("out", name).read_bytes() == Path("other", name).read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(ckpt, number, code, monkeypatch, capsys):
    arguments = [*map(str, QUICK), "--select-every", "4", "--max-steps", "8"]
    train_script.run([*arguments, "--out", "whole"])
    before, handlers = rosa.LayerSelector.before_forward, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self, step):
        if step == 4:
            signal.raise_signal(number)
        before(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(rosa.LayerSelector, "before_forward", signalled)
        with pytest.raises(SystemExit) as stopped:
            train_script.run([*arguments, "--out", "a run"])
    *_, last = capsys.readouterr().out.splitlines()
    assert stopped.value.code == code and len(read_log("a run")) == 1 + 5
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers  # as they were
    python, script, *resuming = shlex.split(last.removeprefix("stopped after step 5. To go on: "))
    assert python == "python" and Path(script).resolve() == ROOT / "train.py" and resuming == [*arguments, "--out", "a run", "--resume"]
    train_script.run(resuming)
    lines = [[{key: value for key, value in line.items() if key != "seconds"} for line in read_log(out)] for out in ("whole", "a run")]
    assert lines[0] == lines[1]
    name = "adapter_model.safetensors"
    assert Path("whole", name).read_bytes() == Path("a run", name).read_bytes()


@pytest.mark.parametrize("script", [train_script, eval_script])
def test_an_interruption_while_loading_is_a_line(ckpt, script, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "from_pretrained", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.run(["--ckpt", "ckpt", "--max-len", "200", "--val-size", "20"] if script is train_script else ["--ckpt", "ckpt", "--limit", "1",
                                                                                                         "--max-new-tokens", "9"])
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith(f"{script.__name__}.py: interrupted")


def test_a_second_signal_ends_a_run_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        noted = runs.note_signals()
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        assert [signal.getsignal(number) for number in before] == [signal.SIG_DFL, signal.SIG_DFL]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_dropout_acts_in_training_alone(ckpt):
    pytest.importorskip("peft")
    first = []
    for dropout in (0.0, 0.9):
        Path("options.json").write_text(json.dumps({"lora_dropout": dropout}))
        run(train_script, *SHORT, "--method", "peft:LORA", "--peft-config", "options.json", "--lr", 1e-2, "--out", "out",
            "--overwrite")
        first.append([record.get("val_loss") or record["loss"] for record in read_log("out")])
    assert first[0][:2] == first[1][:2] and first[0][2] != first[1][2]  # step 0, step 1 (B is zero), step 2
    args = train_script.parse_args([str(a) for a in (*SHORT, "--method", "lora")])
    model = peft_methods.load_adapter(Llama.from_pretrained("ckpt"), "out")
    _, held_out, *_ = train_script.load_data(args, load_tokenizer("ckpt"))
    assert train_script.validate(model, held_out, args) == near(read_log("out")[-1]["val_loss"], **of_model(model.config))


def test_batches_hold_every_example_once_and_similar_lengths():
    lengths = [(7 * i) % 101 for i in range(1003)]
    batches = train_script.make_batches(lengths, 8, "0 0")
    assert sorted(sum(batches, [])) == list(range(1003)) and len(batches) == 126
    padding = sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)
    assert padding < 0.05 * sum(lengths)
    assert batches == train_script.make_batches(lengths, 8, "0 0") != train_script.make_batches(lengths, 8, "0 1")
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest[:60] != sorted(longest[:60])


def test_only_the_response_and_its_end_are_labelled():
    tokens, labels = train_script.collate([([5, 6, 7], [8, 2]), ([5], [9, 9, 9, 2])], "cpu")
    assert tokens.tolist() == [[5, 6, 7, 8], [5, 9, 9, 9]]
    assert labels.tolist() == [[-100, -100, 8, 2], [9, 9, 9, 2]]


def test_gradients_are_clipped_to_norm_1(ckpt, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recording(parameters, max_norm):
        norm = clip(parameters, max_norm)
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    run(train_script, *QUICK, "--alpha", 10000, "--out", "out")
    assert len(norms) == 6 and max(norms) == near(1, length=10**4)  # numbers


def test_held_out_examples_are_not_trained_on(ckpt):
    args = train_script.parse_args([str(a) for a in QUICK])
    train, held_out, *_ = train_script.load_data(args, load_tokenizer("ckpt"))
    assert (len(train), len(held_out)) == (80, 20)
    assert not {tuple(prompt) for prompt, _ in train} & {tuple(prompt) for prompt, _ in held_out}


def test_examples_that_are_too_long_are_counted_not_cut(ckpt, capsys):
    examples = toy.examples("train", 60)
    for example in examples[:7]:
        example["output"] = "seven " * 300
    Path("data.json").write_text(json.dumps(examples))
    run(train_script, *QUICK, "--train-file", "data.json", "--max-steps", 1, "--out", "out")
    assert "7 longer than 200 tokens left out" in capsys.readouterr().out


# --- evaluation ---


def write_test_sets(directory, names):
    for i, name in enumerate(names):
        file = Path(directory, "dataset", name, "test.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(toy.examples("test", 5 + 4 * i, seed=i)))


def test_scores_predictions_and_absent_sets(ckpt, capsys, monkeypatch):
    write_test_sets("data", ["gsm8k", "SVAMP"])
    answers = {e["instruction"]: e["answer"] for i in range(2) for e in toy.examples("test", 5 + 4 * i, seed=i)}
    tokenizer = load_tokenizer("ckpt")

    def stream(self, prompts, max_new_tokens, eos_ids, batch_size):  # right on every problem about Anna to Hugo, say
        for i, prompt in reversed(list(enumerate(prompts))):
            text = tokenizer.decode(prompt).split("Instruction:\n")[1].split("\n")[0]
            yield i, tokenizer.encode(f"The answer is {answers[text]}." if text < "I" else "No.")

    monkeypatch.setattr(Llama, "stream", stream)
    run(eval_script, "--ckpt", "ckpt", "--task", "arithmetic", "--data-dir", "data", "--out", "out", "--max-new-tokens", 50)
    lines = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [(line["set"], line["index"]) for line in lines] == [("gsm8k", i) for i in range(5)] + [("SVAMP", i) for i in range(9)]
    for line in lines:
        assert line["correct"] == (line["instruction"] < "I") and (line["extracted"] == line["answer"]) == line["correct"]
    scores = {name: sum(line["correct"] for line in lines if line["set"] == name) / count for name, count in (("gsm8k", 5), ("SVAMP", 9))}
    results = json.loads(Path("out/results.json").read_text())
    right = sum(line["correct"] for line in lines)
    assert (results["scores"], results["micro"], results["macro"]) == (scores, right / 14, sum(scores.values()) / 2)
    assert results["counts"] == {"gsm8k": 5, "SVAMP": 9}
    low, high = results["intervals"]["SVAMP"]
    assert 0 <= low < scores["SVAMP"] < high <= 1 and high - low > 0.3
    printed = capsys.readouterr().out
    assert printed.count("absent") == 6 and "python data/download.py all --dir data" in printed and f"{results['macro']:.1%}" in printed


@pytest.fixture
def decisive(ckpt):
    """The checkpoint's answers to 25 questions do not hang on rounding."""
    tokenizer = load_tokenizer(ckpt)
    prompts = [tasks.encode_prompt(example, tokenizer) for example in tasks.test_examples("toy", "")[:25]]
    decisive_model(prompts, 30, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained(ckpt)
    return ckpt


def test_an_evaluation_goes_on_where_it_stopped(decisive, monkeypatch, capsys):
    stream, asked = Llama.stream, []

    def counting(self, prompts, *rest, batch_size):
        asked.append(len(prompts))
        assert batch_size == 4
        for count, answer in enumerate(stream(self, prompts, *rest, batch_size=batch_size)):
            if count == stop_after:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(Llama, "stream", counting)
    arguments = ["--ckpt", "ckpt", "--limit", 20, "--batch-size", 4, "--max-new-tokens", 10, "--dtype", "float32"]
    stop_after = None
    run(eval_script, *arguments, "--out", "whole")
    asked.clear()
    stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        run(eval_script, *arguments, "--out", "parts")
    with open("parts/predictions.jsonl", "a") as file:
        file.write('{"set": "toy", "ind')  # killed while it wrote
    stop_after = None
    asked.clear()
    capsys.readouterr()
    run(eval_script, *arguments, "--out", "parts")
    assert asked == [7] and "13 of 20 are in parts/predictions.jsonl already" in capsys.readouterr().out
    for name in ("predictions.jsonl", "results.json"):
        assert Path("whole", name).read_text() == Path("parts", name).read_text()
    asked.clear()
    run(eval_script, *arguments, "--out", "parts", "--limit", 25)
    assert asked == [5]
    run(eval_script, *arguments, "--out", "parts", "--limit", 5)
    assert asked == [5] and json.loads(Path("parts/results.json").read_text())["counts"] == {"toy": 5}
    for changed in (["--max-new-tokens", 11], ["--dtype", "bfloat16"], ["--ckpt", "other"], ["--adapter", "adapter"]):
        if changed[0] == "--ckpt":
            shutil.copytree("ckpt", "other")
            random_model(seed=99, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained("other")
        if changed[0] == "--adapter":
            rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4), "adapter")
        run(eval_script, *arguments, "--out", "parts")
        asked.clear()
        run(eval_script, *arguments, "--out", "parts", *changed)
        assert sum(asked) == 20 and "starting anew" in capsys.readouterr().out


def test_several_sets_separated_by_commas(ckpt, capsys):
    write_test_sets("data", ["gsm8k", "SVAMP", "mawps"])
    run(eval_script, "--ckpt", "ckpt", "--task", "mawps,gsm8k", "--data-dir", "data", "--out", "out", "--max-new-tokens", 3)
    assert json.loads(Path("out/results.json").read_text())["counts"] == {"mawps": 13, "gsm8k": 5}


def choice(i):
    count = 3 + i % 3
    named = " ".join(f"Answer{n + 1}: {'xyz'[n % 3] * (n + i % 4 + 1)}" for n in range(count))
    wanted = "/".join(f"answer{n + 1}" for n in range(count))
    return {"instruction": f"Which is best, number {i}?\n\n{named}\n\nAnswer format: {wanted}", "input": "",
            "output": "the correct answer is answer2", "answer": "answer2"}


def test_the_likeliest_option_is_the_answer(ckpt):
    file = Path("data/dataset/openbookqa/test.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([choice(i) for i in range(11)]))
    for out, size in (("a", 1), ("b", 4)):
        run(eval_script, "--ckpt", "ckpt", "--task", "openbookqa", "--data-dir", "data", "--score", "likelihood", "--out", out,
            "--batch-size", size, "--dtype", "float32")
    lines = [[json.loads(line) for line in Path(out, "predictions.jsonl").read_text().splitlines()] for out in "ab"]
    model, tokenizer = Llama.from_pretrained("ckpt", dtype=torch.float64), load_tokenizer("ckpt")
    chosen = set()
    for i, both in enumerate(zip(*lines, strict=True)):
        scores = {}
        for n in range(3 + i % 3):  # the plain way: each question with each option as one text
            option = f"the correct answer is answer{n + 1}"
            prompt, response = tasks.encode_example(choice(i) | {"output": option}, tokenizer)
            log_probs = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
            scores[option] = sum(log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(response[:-1]))
        for line in both:  # one of two that are equally likely but for rounding is as right as the other
            assert scores[line["response"]] >= max(scores.values()) * (1 + bound(**of_model(model.config)))
            chosen.add(line["response"])
    assert len(chosen) > 1 or len({line["response"] for line in lines[0]}) == 1


def test_the_loss_on_anything_else(ckpt, capsys):
    Path("other.json").write_text(json.dumps(toy.examples("train", 12)))
    Path("notes.txt").write_text("".join(f"{name} has {n} pears, and no more.\n" for n, name in enumerate(toy.GIRLS * 3)))
    forgetting.run(["other.json", "notes.txt", "--ckpt", "ckpt", "--limit", "10", "--out", "out", "--dtype", "float32"])
    losses = json.loads(Path("out/losses.json").read_text())
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    pairs = [tasks.encode_example(example, tokenizer) for example in toy.examples("train", 10)]
    tokens, labels = train_script.collate(pairs, "cpu")
    with torch.no_grad():
        assert losses["other"] == near(model.loss(tokens, labels).item() / sum(len(r) for _, r in pairs), **of_model(model.config))
        ids = tokenizer.encode(Path("notes.txt").read_text())
        parts = [[tokenizer.bos_id, *ids[i : i + 256]] for i in range(0, len(ids), 256)]
        total = sum(model.loss(torch.tensor([part[:-1]]), torch.tensor([part[1:]])).item() for part in parts)
    assert len(parts) > 2 and losses["notes"] == near(total / len(ids), **of_model(model.config))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--limit", "3", "--out", "out"])
    assert set(json.loads(Path("out/losses.json").read_text())) == {"other", "notes"}


def test_activations_are_the_norms_of_q_and_k(ckpt, monkeypatch, capsys):
    figure1.run(["figures/fig1.png", "--ckpt", "ckpt", "--limit", "5", "--dtype", "float32"])
    found = np.load("figures/fig1.npz")
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    d, expected = model.config.head_dim, {"q": 0, "k": 0}
    with torch.no_grad():
        for example in toy.examples("test", 5):
            x = model.model.embed_tokens(torch.tensor([tasks.encode_prompt(example, tokenizer)]))
            h = model.model.layers[0].input_layernorm(x)
            for name in expected:
                states = model.model.layers[0].self_attn.get_submodule(f"{name}_proj")(h)[0]  # [T, heads * d]
                expected[name] += states.view(len(states), -1, d).square().sum(0).sqrt().mean(0) / 5
    for name in expected:
        assert found[name].shape == (4, d)
        assert_close(found[name][0], expected[name], **of_model(model.config))
    assert found["first_low_frequency_pair"] == d // 2 - max(1, round(0.5 * d / 2))
    assert "by quarter of the pairs" in capsys.readouterr().out
    no_package(monkeypatch, "matplotlib")
    figure1.run(["other.png", "--ckpt", "ckpt"])
    assert "pip install matplotlib" in capsys.readouterr().out and Path("other.npz").is_file() and not Path("other.png").exists()


def test_runs_side_by_side(ckpt, capsys):
    run(train_script, *QUICK, "--out", "runs/a")
    run(train_script, *QUICK, "--out", "runs/b", "--method", "lora")
    for out, adapter in (("runs/a", ["--adapter", "runs/a"]), ("runs/base", [])):
        run(eval_script, "--ckpt", "ckpt", "--limit", 8, "--max-new-tokens", 5, "--out", out, *adapter)
    Path("other.json").write_text(json.dumps(toy.examples("train", 5)))
    forgetting.run(["other.json", "--ckpt", "ckpt", "--out", "runs/base"])
    capsys.readouterr()
    compare.run(["runs/base", "runs/a", "runs/b"])
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(rows) == ["base", "a", "b"] and set(rule) == {"---"}
    summary = json.loads(Path("runs/b/summary.json").read_text())
    assert rows["b"]["validation loss"] == f"{read_log('runs/b')[0]['val_loss']:.4f} → {summary['val_loss']:.4f}" and rows["b"]["toy (n = 8)"] == "–"
    assert rows["b"]["trainable"] == f"{summary['trainable']:,} ({100 * summary['trainable'] / summary['parameters']:.2f}%)"
    assert rows["a"]["method"].startswith("rosa, targets q,k, rank 4, alpha 8.0, low freq ratio 0.5, pairs low, k ratio 0.5")
    assert rows["a"]["toy (n = 8)"].startswith("0.0% (0.0–32.4)") and rows["a"]["peak memory"].endswith("MiB")
    assert rows["base"]["method"] == "base" and rows["base"]["tokens/s"] == "–" and float(rows["base"]["loss on other"]) > 1


def test_one_question_is_answered_as_it_is_asked(ckpt, capsys, monkeypatch):
    run(eval_script, "--ckpt", "ckpt", "--prompt", "Why?", "--max-new-tokens", 30, "--dtype", "float32")
    printed = capsys.readouterr().out
    tokenizer, model = load_tokenizer("ckpt"), Llama.from_pretrained("ckpt")
    prompt = tasks.encode_prompt({"instruction": "Why?"}, tokenizer)
    ids, = model.generate([prompt], 30, tokenizer.eos_id)
    assert printed == tokenizer.decode(ids) + "\n" and len(ids) == 30 and not Path("runs").exists()

    # The bytes of a character come one by one; the answer may fill the context, and no more.
    characters = tokenizer.encode("a🙂é")
    pieces, counts = [], []

    def generate(self, prompts, count, eos, on_token):
        counts.append(count)
        for n in range(1, len(characters) + 1):
            on_token(0, characters[:n])
        return [characters]

    monkeypatch.setattr(Llama, "generate", generate)
    monkeypatch.setattr("builtins.print", lambda text, **_: pieces.append(text))
    run(eval_script, "--ckpt", "ckpt", "--prompt", "Why?", "--max-new-tokens", 5000)
    assert "".join(pieces) == "a🙂é" and not any("\ufffd" in piece for piece in pieces) and "🙂" in pieces
    assert counts == [256 - len(prompt)]


def test_predictions_do_not_depend_on_the_batch(decisive):
    model = Llama.from_pretrained("ckpt")
    for out, size in (("a", 1), ("b", 7), ("c", 32)):
        run(eval_script, "--ckpt", "ckpt", "--limit", 20, "--batch-size", size, "--max-new-tokens", 30, "--out", out, "--dtype", "float32")
    lines = [Path(out, "predictions.jsonl").read_text() for out in "abc"]
    assert lines[0] == lines[1] == lines[2]
    tokenizer = load_tokenizer("ckpt")
    example = toy.examples("test", 20)[3]
    ids = model.generate([tasks.encode_prompt(example, tokenizer)], 30, tokenizer.eos_id)[0]
    assert json.loads(lines[0].splitlines()[3])["response"] == tokenizer.decode(ids)


def test_the_adapter_acts_and_results_lie_beside_it(ckpt):
    run(train_script, *QUICK, "--out", "run")
    for adapter in ((), ("--adapter", "run")):
        run(eval_script, "--ckpt", "ckpt", "--limit", 10, "--max-new-tokens", 20, "--dtype", "float32", *adapter)
    base, adapted = Path("runs/ckpt-toy-base/predictions.jsonl"), Path("run/predictions.jsonl")
    assert base.read_text() != adapted.read_text() and Path("run/results.json").is_file()


# --- what the scripts say ---


@pytest.mark.parametrize("script", [train_script, eval_script])
def test_help_shows_the_names_that_are_known(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # unwrapped
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert stopped.value.code == 0 and {"tiny", "llama2-7b", "qwen2.5-7b", *NAMES} <= set(words)


def test_an_absent_package_is_a_line_with_what_to_install(ckpt, monkeypatch, capsys):
    no_package(monkeypatch, "peft")
    with pytest.raises(SystemExit) as stopped:
        train_script.run(["--ckpt", "ckpt", "--max-len", "200", "--val-size", "20", "--method", "peft:IA3"])
    assert stopped.value.code == 2 and "needs the package peft: pip install peft" in capsys.readouterr().err


def test_the_scripts_run_as_scripts(ckpt):
    """eval.py, and a command of extras/; train.py is one in test_torchrun. And rosa.py, which was one."""
    commands = {"no checkpoint 'absent'": ["eval.py", "--ckpt", "absent"], "--out": ["-m", "extras.merge"],
                "python -m extras.merge": ["rosa.py", "merge"]}
    started = {said: subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for said, command in commands.items()}
    for said, process in started.items():
        out, error = process.communicate()
        assert process.returncode == 2 and out == "" and error.count("\n") == 1 and said in error
