"""Statements about `extras/memory.py`: what a run will need is said before the model is loaded, and
a run that has run out of memory ends in a line that says where."""

import argparse
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHORT_ROSA_RUN, SHORT_RUN, random_model, read_steps

import eval as eval_script
import train
from extras import checkpoints, inference, memory
from extras.distributed import own_micro_batches
from extras.operators import call_onednn
from model import Attention

HUGE = 2**52  # bytes: more than a processor can address
CPU = torch.device("cpu")


def options_of(*words):
    options = vars(train.parse_args([str(word) for word in words]))
    return options | ({"dtype": "float32"} if options["dtype"] == "auto" else {})


def need_of(*words, longest=200, shared=0, **changes):
    options = options_of(*words)
    model = random_model(**changes)
    shape = memory.largest_micro_batch(model.config, options, [longest], shared, CPU)
    return memory.need(model, options, shape, CPU)


# --- before ---


def test_weights_are_counted_as_they_are_held():
    model = random_model(intermediate_size=400)
    numbers = sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert need_of("--dtype", dtype, intermediate_size=400).weights == numbers * size
        int8 = need_of("--dtype", dtype, "--quantize", "int8", intermediate_size=400).weights
        assert int8 == (numbers - in_layers) * size + in_layers


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--low-freq-ratio 0.2",
        "--pairs all",
        "--method lora --targets q,v,o,up,down",
        "--rank 3",
    ],
)
def test_what_trains_is_counted_as_attach_makes_it(words):
    args = train.parse_args(["--rank", "5", *words.split()])
    model = random_model(num_key_value_heads=1)
    train.attach(args, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert need_of("--rank", 5, *words.split(), num_key_value_heads=1).trained == 16 * trained


def test_each_option_that_saves_memory_is_seen_to_save_it():
    now = need_of("--micro-batch-size", 8)
    assert need_of("--micro-batch-size", 4).activations < 0.6 * now.activations
    recomputed = need_of("--micro-batch-size", 8, "--checkpoint-activations")
    deep = {"num_hidden_layers": 12}
    kept = need_of("--micro-batch-size", 8, **deep)
    few_kept = need_of("--micro-batch-size", 8, "--checkpoint-activations", **deep)
    assert few_kept.activations < 0.6 * kept.activations
    assert need_of("--micro-batch-size", 8, longest=400).activations > 2 * now.activations
    # What all examples begin with is computed once, unless it is recomputed
    assert need_of("--micro-batch-size", 8, shared=100).activations < 0.6 * now.activations
    whole = need_of("--micro-batch-size", 8, "--checkpoint-activations", shared=100)
    assert whole.activations == recomputed.activations


def test_the_largest_micro_batch_is_one_that_train_makes(model):
    for shared, lengths in ((0, [60, 200]), (40, [90, 200]), (10, [900, 1300])):
        examples = [([1] * (length - 20), [2] * 20) for length in lengths for _ in range(16)]
        for example in examples:
            example[0][shared:] = range(3 + len(example[0]), 3 + 2 * len(example[0]) - shared)
        shape = memory.largest_micro_batch(model.config, options_of(), lengths, shared, CPU)
        made = []
        for length in lengths:
            batch = [example for example in examples if sum(map(len, example)) == length]
            for n, example in enumerate(batch):
                example[0][shared] = -n  # here they differ
            made += [(len(part), length) for part in own_micro_batches(batch)]
        assert shape[:2] in made
        for rows, length in made:
            assert rows * (length - shared) + shared <= shape.computed


def test_of_micro_batches_of_equally_many_tokens_the_one_with_longer_rows_needs_more(model):
    """Each token keeps a probability for each token before it. 8 x 160 tokens and 3 x 420."""
    shape = memory.largest_micro_batch(model.config, options_of(), [160, 420], 0, CPU)
    assert shape == (3, 420, 1260)
    assert need_of(longest=420).activations > 1.2 * need_of(longest=160).activations


def test_the_line_comes_before_anything_is_loaded_and_names_what_helps(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    monkeypatch.setattr(checkpoints, "computes_bfloat16", lambda device: True)

    class Loading(Exception):
        pass

    def load(*arguments, **options):
        raise Loading

    monkeypatch.setattr(train, "load_model", load)
    with pytest.raises(Loading):
        train.main(train.parse_args([*map(str, SHORT_ROSA_RUN)]))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("memory")]
    pattern = (
        r"memory     about ([\d.]+) GB: weights 0.0, what trains and its optimiser 0.0, "
        r"activations [\d.]+ \(8 x \d+ tokens\), the program [\d.]+; only 0.0 GB are free: "
        r"with (--[\w 8-]+) about ([\d.]+), with (--[\w 8-]+) about ([\d.]+)"
    )
    total, first, less, second, other = re.fullmatch(pattern, line).groups()
    assert float(less) <= float(other) <= float(total) and first != second
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    with pytest.raises(Loading):
        train.main(train.parse_args([*map(str, SHORT_ROSA_RUN)]))
    assert "are free" not in capsys.readouterr().out


def test_the_free_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2000 kB\nMemFree: 1 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(memory, "CONTAINERS", (tuple(files),))
    device = torch.device("cpu")
    assert memory.free_memory(device) == 1000 * 1024  # no container
    files[0].write_text("max\n")
    files[1].write_text("400000\n")
    files[2].write_text("anon 3\ninactive_file 50000\nactive_file 7\n")
    assert memory.free_memory(device) == 1000 * 1024  # one without a limit
    files[0].write_text("500000\n")
    assert memory.free_memory(device) == 150000
    meminfo.unlink()
    files[0].unlink()
    assert memory.free_memory(device) is None  # nobody says


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        "135M: 137-161: --dtype float32 --batch-size 8 --max-steps 3",
        "135M: 161-161: --dtype float32 --quantize int8 --batch-size 8 --max-steps 2",
    ],
)
def test_what_is_said_is_what_it_takes(row):
    """Within 15 per cent; tests/benchmarks/bench_memory.py has more rows."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "bench_memory.py", "--rows", row]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, said, took, ratio = done.stdout.strip().splitlines()[-1].strip("| ").split(" | ")
    assert 0.85 <= float(ratio) <= 1.15, done.stdout


# --- while it runs ---


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_products_of_new_shapes_are_not_all_kept():
    """Without the two limits in extras/memory.py 300 shapes would hold 170 MiB."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    weight = torch.ones(64, 64)

    def multiply(lengths):
        for length in lengths:
            call_onednn(torch.ones(length, 64), weight, None)

    try:
        multiply(range(200, 264))  # as many as are kept
    except RuntimeError:
        pytest.skip("this processor has no oneDNN product")
    held = resident()
    multiply(range(300, 600))
    assert resident() < held + 40 * 2**20


def resident():
    """The resident set of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# --- after ---


def huge(*_, **__):
    return torch.zeros(HUGE, dtype=torch.uint8)


def ends(script, words, capsys):
    """The line on stderr of a script that runs out of memory."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.run([str(word) for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    lines = [line for line in lines if line.startswith(("train.py: ", "eval.py: "))]
    assert stopped.value.code == 1 and len(lines) == 1
    return lines[0]


def edited_attend(when):
    """Attention.attend as a student may have edited it: it needs too much where `when` says so."""
    attend = Attention.attend

    def attend_and_more(self, q, k, v, mask):
        y = attend(self, q, k, v, mask)
        if when(q):
            extra = torch.zeros(HUGE, dtype=torch.uint8)
            return y + extra
        return y

    return attend_and_more


def test_out_of_memory_while_loading_is_a_line(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "read_tensor", huge)
    line = ends(train, [*SHORT_RUN, "--out", "out"], capsys)
    place = r"\(test_memory.py:\d+, huge\)"
    pattern = rf"train.py: out of memory while the model was loaded {place}: try --quantize int8.*"
    assert re.fullmatch(pattern, line) and "To resume" not in line
    assert not Path("out").exists()
    line = ends(eval_script, ["--ckpt", "ckpt", "--limit", 2, "--quantize", "int8"], capsys)
    assert re.fullmatch(rf"eval.py: out of memory while the model was loaded {place}", line)


def test_out_of_memory_in_a_step_names_it_and_the_line_of_code_and_the_run_goes_on(
    ckpt, monkeypatch, capsys
):
    calls = []

    def fifth_step(q):
        calls.append(q.requires_grad)
        return sum(calls) > 4 * 4  # four layers, four steps of one micro-batch

    options = [*SHORT_ROSA_RUN, "--save-every", 1, "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "attend", edited_attend(fifth_step))
        line = ends(train, options, capsys)
    pattern = (
        r"train.py: out of memory in step 5, at 8 x \d+ tokens "
        r"\(test_memory.py:\d+, edited_attend.<locals>.attend_and_more\): try --micro-batch-size 4 "
        r"or --checkpoint-activations or --quantize int8 in a new run. To resume: python .*"
    )
    assert re.fullmatch(pattern, line)
    assert not list(Path("out").glob("*.partial"))
    train.run([*map(str, options), "--resume", "--micro-batch-size", "4"])
    assert [step["step"] for step in read_steps("out")] == [1, 2, 3, 4, 5, 6]
    # What is set already is not advised.
    monkeypatch.setattr(Attention, "attend", edited_attend(lambda q: q.requires_grad))
    more = ["--micro-batch-size", 1, "--checkpoint-activations", "--quantize", "int8"]
    line = ends(train, [*SHORT_ROSA_RUN, *more, "--out", "other"], capsys)
    assert (
        "in step 1, at 1 x " in line and ": try a smaller --max-len than 200, in a new run" in line
    )


def test_out_of_memory_in_the_backward_pass_is_one_in_its_step(ckpt, monkeypatch, capsys):
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.zeros(HUGE, dtype=torch.uint8)

    attend = Attention.attend
    monkeypatch.setattr(Attention, "attend", lambda *inputs: Greedy.apply(attend(*inputs)))
    line = ends(train, [*SHORT_RUN, "--out", "out"], capsys)
    assert re.search(r"out of memory in step 1, at 8 x \d+ tokens \(\w+.py:\d+, [\w.<>]+\)", line)


def test_out_of_memory_in_a_later_validation_has_the_size_of_its_own_examples(
    ckpt, monkeypatch, capsys
):
    trained = []

    def once_trained(q):
        trained.append(q.requires_grad)
        return any(trained) and not q.requires_grad

    monkeypatch.setattr(Attention, "attend", edited_attend(once_trained))
    line = ends(train, [*SHORT_RUN, "--val-size", 3, "--out", "out"], capsys)
    assert "out of memory in validation, at 3 x " in line


def test_out_of_memory_in_validation_and_in_an_answer_is_a_line(ckpt, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "attend", edited_attend(lambda q: not q.requires_grad))
        line = ends(train, [*SHORT_RUN, "--out", "out"], capsys)
        assert "out of memory in validation, at " in line and "--checkpoint" not in line
        common = ["--ckpt", "ckpt", "--limit", 6, "--device", "cpu", "--max-new-tokens", 4]
        line = ends(eval_script, [*common, "--plain"], capsys)
        assert "out of memory in generation, at 1 x " in line and "attend_and_more" in line
        line = ends(eval_script, [*common[:2], "--prompt", "a", "--max-new-tokens", 4], capsys)
        assert "out of memory in generation" in line
    monkeypatch.setattr(inference.BatchedCache, "locate", huge)
    line = ends(eval_script, common, capsys)
    assert re.search(
        r"out of memory in generation, at 6 x \d+ tokens \(.*\): try --batch-size 3", line
    )


def test_which_errors_are_out_of_memory():
    with pytest.raises(RuntimeError) as on_cpu:
        huge()
    assert memory.ran_out(on_cpu.value) and memory.ran_out(MemoryError())
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not memory.ran_out(RuntimeError("shape '[2]' is invalid for input of size 3"))
    line = memory.out_of_memory(MemoryError(), argparse.Namespace(), "")
    assert line == "out of memory"
