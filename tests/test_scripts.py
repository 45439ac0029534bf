"""Statements about `train.py` and `eval.py`, run as a user runs them, on a random tiny model with the bundled tokenizer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

import eval as eval_script
import rosa
import train as train_script
from data import tasks, toy
from data.tokenizer import load_tokenizer
from model import Llama

ROOT = Path(train_script.__file__).parent


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A checkpoint directory `ckpt` in an empty working directory: 1,024 tokens, 4 layers, a context of 256."""
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256).save_pretrained("ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", "ckpt")
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 100)
    return "ckpt"


def run(script, *arguments):
    """The script's main with these arguments, in this process. Returns its parsed arguments."""
    args = script.parse_args([str(argument) for argument in arguments])
    script.main(args)
    return args


QUICK = ("--ckpt", "ckpt", "--max-steps", 6, "--batch-size", 8, "--val-size", 20, "--eval-every", 3, "--rank", 4, "--alpha", 8,
         "--lr", 1e-2, "--max-len", 200, "--select-every", 2, "--device", "cpu", "--dtype", "float32")


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# --- training ---


@pytest.mark.parametrize("options, active", [
    ((), 2), (("--k-ratio", 1), 4), (("--method", "lora", "--targets", "q,k,v,o,gate,up,down"), 4),
    (("--method", "lora", "--k-ratio", 0.25), 1), (("--targets", "q,k,v,down", "--dtype", "bfloat16"), 2),
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
    _, held_out, _ = train_script.load_data(args, load_tokenizer("ckpt"))
    best = min(record["val_loss"] for record in [first, *log] if "val_loss" in record)
    assert train_script.validate(model, held_out, args) == pytest.approx(best, abs=1e-6)


def test_the_best_adapter_is_kept_when_training_diverges(ckpt):
    run(train_script, *QUICK, "--out", "out", "--lr", 100)
    first, *log = read_log("out")
    assert min(record.get("val_loss", torch.inf) for record in log) > first["val_loss"]
    assert all(not adapter.B.any() for adapter in rosa.adapters(rosa.load_adapter(Llama.from_pretrained("ckpt"), "out")).values())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(ckpt):
    run(train_script, *QUICK, "--max-steps", 40, "--epochs", 5, "--eval-every", 100, "--out", "out")
    lr = [record["lr"] for record in read_log("out")[1:]]
    assert lr[:2] == [0.005, 0.01] and max(lr) == 0.01
    assert lr[2:] == sorted(lr[2:], reverse=True) and lr[21] == pytest.approx(0.005) and 0 < lr[-1] < 1e-4


def test_micro_batches_change_nothing_but_memory(ckpt):
    for size in (2, 8):
        run(train_script, *QUICK, "--micro-batch-size", size, "--out", f"out{size}")
    for a, b in zip(read_log("out2")[1:], read_log("out8")[1:]):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert (a["active_layers"], a["tokens"]) == (b["active_layers"], b["tokens"])


def test_the_seed_decides_everything(ckpt):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(train_script, *QUICK, "--out", out, "--seed", seed)
    files = [Path(out, "adapter_model.safetensors").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(ckpt, monkeypatch, dtype):
    arguments = [*QUICK, "--save-every", 1, "--dtype", dtype, "--score-ema", 0.5]
    run(train_script, *arguments, "--out", "whole")
    save = train_script.save_state

    def stop(*arguments):
        save(*arguments)
        if arguments[4] == stop.after:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_script, "save_state", stop)
    for stop.after, resume in ((3, ()), (4, ("--resume",)), (None, ("--resume",))):
        try:
            run(train_script, *arguments, "--out", "parts", *resume)
        except KeyboardInterrupt:
            with open("parts/log.jsonl", "a") as log:  # it had gone on beyond what was saved
                log.write(json.dumps({"step": stop.after + 1, "loss": 0}) + "\n")
    for name in ("adapter_model.safetensors", "state.safetensors"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()
    without_times = [[record | {"seconds": 0} for record in read_log(out)] for out in ("whole", "parts")]
    assert without_times[0] == without_times[1]
    with pytest.raises(ValueError, match="has --rank 4, not 5"):
        run(train_script, *arguments, "--out", "parts", "--resume", "--rank", 5)


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
        clip(parameters, max_norm)
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    run(train_script, *QUICK, "--alpha", 10000, "--out", "out")
    assert len(norms) == 6 and max(norms) == pytest.approx(1, abs=1e-4)


def test_held_out_examples_are_not_trained_on(ckpt):
    args = train_script.parse_args([str(a) for a in QUICK])
    train, held_out, _ = train_script.load_data(args, load_tokenizer("ckpt"))
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

    def generate(self, prompts, max_new_tokens, eos_ids):  # right on every problem about Anna to Hugo, say
        texts = [tokenizer.decode(prompt).split("Instruction:\n")[1].split("\n")[0] for prompt in prompts]
        return [tokenizer.encode(f"The answer is {answers[text]}." if text < "I" else "No.") for text in texts]

    monkeypatch.setattr(Llama, "generate", generate)
    run(eval_script, "--ckpt", "ckpt", "--task", "arithmetic", "--data-dir", "data", "--out", "out", "--max-new-tokens", 50)
    lines = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [(line["set"], line["index"]) for line in lines] == [("gsm8k", i) for i in range(5)] + [("SVAMP", i) for i in range(9)]
    for line in lines:
        assert line["correct"] == (line["instruction"] < "I") and (line["extracted"] == line["answer"]) == line["correct"]
    scores = {name: sum(line["correct"] for line in lines if line["set"] == name) / count for name, count in (("gsm8k", 5), ("SVAMP", 9))}
    results = json.loads(Path("out/results.json").read_text())
    assert results == {"scores": scores, "micro": sum(line["correct"] for line in lines) / 14, "macro": sum(scores.values()) / 2}
    printed = capsys.readouterr().out
    assert printed.count("absent") == 6 and "git clone" in printed and f"{results['macro']:.1%}" in printed


def test_predictions_do_not_depend_on_the_batch(ckpt):
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


# --- a user's mistakes ---

MISTAKES = {
    "no such checkpoint": (train_script, ["--ckpt", "absent"], "no checkpoint 'absent'"),
    "no such task": (train_script, ["--task", "algebra"], "task 'algebra'"),
    "no such task, eval": (eval_script, ["--task", "algebra"], "unknown task 'algebra'"),
    "no such flag": (train_script, ["--rnak", "3"], "unrecognized arguments"),
    "not a number": (train_script, ["--rank", "x"], "--rank: invalid int value"),
    "rank 0": (train_script, ["--rank", "0"], "rank must be"),
    "ratio": (train_script, ["--low-freq-ratio", "2"], "low_freq_ratio must be in"),
    "k-ratio": (train_script, ["--k-ratio", "0"], "k_ratio must be in"),
    "target": (train_script, ["--targets", "q,z"], "unknown target 'z'"),
    "lr": (train_script, ["--lr", "nan"], "--lr must be"),
    "batches": (train_script, ["--batch-size", "6"], "--batch-size 6 is not a multiple of --micro-batch-size 4"),
    "no steps": (train_script, ["--max-steps", "0"], "--max-steps must be at least 1"),
    "max-len beyond context": (train_script, ["--max-len", "300"], "--max-len 300 exceeds the context"),
    "all too long": (train_script, ["--max-len", "9"], "0 of 100 examples have at most --max-len 9 tokens"),
    "no data": (train_script, ["--task", "arithmetic"], "git clone"),
    "no data, eval": (eval_script, ["--task", "arithmetic"], "git clone"),
    "train file absent": (train_script, ["--train-file", "absent.json"], "absent.json"),
    "device": (train_script, ["--device", "cuda:7"], "device 'cuda:7' is not available"),
    "device unknown": (eval_script, ["--device", "abacus"], "device 'abacus' is not available"),
    "nothing to resume": (train_script, ["--resume"], "nothing was saved there"),
    "no adapter": (eval_script, ["--adapter", "absent"], "no adapter_config.json"),
    "answer beyond context": (eval_script, ["--max-new-tokens", "250"], "it exceeds the context of 256"),
}


@pytest.mark.parametrize("script, arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_left_behind(ckpt, capsys, script, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        defaults = ["--ckpt", "ckpt", "--max-len", "200", "--val-size", "20"] if script is train_script else ["--ckpt", "ckpt", "--max-new-tokens", "20"]
        script.run([*defaults, *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{script.__name__}.py: ") and message in error
    assert [path for path in Path().iterdir()] == [Path("ckpt")]


@pytest.mark.parametrize("script", [train_script, eval_script])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(ckpt, script, capsys):
    random_model(vocab_size=500, max_position_embeddings=512).save_pretrained("ckpt")
    with pytest.raises(SystemExit):
        script.run(["--ckpt", "ckpt", "--val-size", "20"] if script is train_script else ["--ckpt", "ckpt"])
    assert capsys.readouterr().err == f"{script.__name__}.py: ckpt: the tokenizer has 1024 tokens, the model only 500\n"


def test_the_scripts_run_as_scripts(ckpt):
    for script in ("train.py", "eval.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--ckpt", "absent"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no checkpoint 'absent'" in done.stderr
