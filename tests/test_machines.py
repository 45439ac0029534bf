"""Statements about machines: an operator of PyTorch may be absent or wrong, bfloat16 may be
computed in software, and there may be a GPU."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import as_machine
import pytest
import torch
from helpers import random_model, random_tokens, randomise_adapters, without_operators
from rounding import assert_close, of_model
from torch._subclasses.fake_tensor import FakeTensorMode

import eval as eval_script
import train as train_script
from data.tokenizer import HERE as DATA
from extras import checkpoints, operators
from extras.inference import BatchedCache
from extras.kernels import accelerate
from extras.operators import Operators
from model import KVCache, Llama
from rosa import attach

pytestmark = pytest.mark.numeric
OPERATORS = {"reshaped", "silu_backward", "softmax_backward"}


def refuses(*arguments):
    raise RuntimeError("this processor has no such instruction")


def absent(*arguments):
    return torch.ops.mkldnn.no_such_operator(*arguments)


def takes_no_arguments():
    return torch.ones(())


def wrong(x, *arguments):
    return 2 * torch.ones_like(x)


UNUSABLE = [refuses, absent, takes_no_arguments, wrong]  # functions in the place of an operator


@pytest.mark.parametrize("unusable", UNUSABLE)
@pytest.mark.parametrize("name", ["call_onednn", "reordered"])
def test_without_a_product_of_onednn_linear_layers_stay_as_they_are_and_a_line_says_so(
    monkeypatch, capsys, unusable, name
):
    without_operators(monkeypatch)
    # No operator has been looked up yet: accelerate does it
    monkeypatch.setattr(Operators, "formulas", {})
    monkeypatch.setattr(operators, name, unusable)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    model = random_model()
    weights = [p.clone() for p in model.parameters()]
    exchanged, left = accelerate(model, inference=True)
    reason = "this PyTorch or processor has no oneDNN product"
    assert (
        Operators.onednn == frozenset()
        and set(Operators.formulas) == OPERATORS
        and left == {"Linear.forward": reason}
    )
    assert capsys.readouterr().out == f"kernels    {reason}: running Linear.forward as written\n"
    assert "Linear.forward" not in exchanged and "forward" not in vars(model.lm_head)
    assert all(
        torch.equal(p, w) and not p.is_mkldnn
        for p, w in zip(model.parameters(), weights, strict=True)
    )


def test_on_a_processor_of_intel_float32_is_left_to_mkl_and_nothing_is_said_of_it(
    monkeypatch, capsys
):
    without_operators(monkeypatch)
    monkeypatch.setattr(Operators, "formulas", {})
    monkeypatch.setattr(Operators, "is_intel", staticmethod(lambda: True))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    model = random_model()
    exchanged, left = accelerate(model, inference=True)
    assert torch.float32 not in Operators.onednn and not left
    assert "Linear.forward" not in exchanged and not model.lm_head.weight.is_mkldnn
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("unusable", UNUSABLE)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_operator_that_cannot_be_used_leaves_its_formula_and_is_asked_for_once(
    monkeypatch, unusable, name
):
    owner, operator = {
        "reshaped": (torch.ops.aten, "_unsafe_view"),
        "silu_backward": (torch.ops.aten, "silu_backward"),
        "softmax_backward": (torch, "_softmax_backward_data"),
    }[name]
    without_operators(monkeypatch)
    formulas = dict(Operators.formulas)
    monkeypatch.setattr(Operators, "formulas", {})
    monkeypatch.setattr(owner, operator, unusable)
    Operators.look_up()
    assert getattr(Operators, name) is formulas[name]
    monkeypatch.setattr(operators, "does_the_same", lambda *arguments: pytest.fail("asked again"))
    Operators.look_up()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", ["all", *sorted(OPERATORS)])
def test_a_model_without_those_operators_is_the_same_model(monkeypatch, missing, dtype):
    base = randomise_adapters(attach(random_model(dtype=dtype), 4, 8))
    tokens, results = random_tokens(2, 30), []
    for _ in range(2):  # with all operators, then without those that are missing
        accelerate(model := copy.deepcopy(base))
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = model(tokens), *torch.autograd.grad(model.loss(tokens, tokens), trained)
        results.append(torch.cat([part.detach().flatten() for part in parts]))
        if missing == "all":
            without_operators(monkeypatch)
        else:
            monkeypatch.setattr(Operators, missing, staticmethod(Operators.formulas[missing]))
    assert_close(*results, **of_model(model.config, 2), dtype=dtype)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_bfloat16_in_software_is_a_line_that_says_what_to_type(
    tmp_path, monkeypatch, capsys, native, dtype
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "computes_bfloat16", lambda device: native)
    random_model(vocab_size=1024, num_hidden_layers=1, max_position_embeddings=256).save_pretrained(
        "ckpt"
    )
    Path("ckpt/tokenizer.model").write_bytes((DATA / "tiny" / "tokenizer.model").read_bytes())
    line = "this processor computes bfloat16 in software, slowly: --dtype float32 is faster here\n"
    expected = {"auto": "bfloat16" if native else "float32"}.get(dtype, dtype)
    for script, options in (
        (train_script, "--max-steps 1 --max-len 200 --val-size 90"),
        (eval_script, "--limit 1 --max-new-tokens 3"),
    ):
        script.run(f"--ckpt ckpt --device cpu --dtype {dtype} {options}".split())
        printed = capsys.readouterr()
        assert (
            printed.err.count(line) == (dtype == "bfloat16" and not native)
            and f"{expected} on cpu" in printed.out
        )


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["plain", "accelerated"])
def test_with_cuda_every_tensor_is_made_on_the_device(monkeypatch, kernels, dtype, adapted):
    """This test needs no GPU: a fake tensor has a shape, a dtype and a device, but no numbers, and
    an operation on fake tensors of two devices fails."""
    Operators.look_up()
    config = random_model().config
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)
        with torch.device("cuda"):
            model, tokens = Llama(config), torch.zeros(3, 5, dtype=torch.long)
        torch.set_default_dtype(torch.float32)
        if adapted:
            attach(model, 4, 8, 0.5, "q,k,v,up")
        if kernels == "accelerated":
            accelerate(model, inference=True)
        batched = BatchedCache(model, 4, 20).use(slice(1, 4))
        logits = [model(tokens)]
        for cache in (KVCache(config), batched):
            # A cache asks a tensor for the position of the last token; a fake tensor has no numbers
            for last in (4, 9):
                monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor, last=last: last)
                logits.append(model.logits(model.hidden_states(tokens, cache)))
        for tensor in (*logits, *batched.keys, *batched.values):
            assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
    assert {tuple(each.shape) for each in logits} == {(3, 5, 97)}


PRINT_WHAT_ONEDNN_TAKES = """if True:
    import subprocess, sys, torch
    def takes(dtype):
        try:
            x = torch.ones(4, 4, dtype=dtype)
            return torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "").dtype == dtype
        except (AttributeError, RuntimeError):
            return False
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    print(takes(torch.float32), takes(torch.bfloat16), has_bfloat16, flush=True)
    sys.argv[1:] and subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)"""


@functools.cache
def start_imitations():
    """Start the program on an imitated avx2 machine, where it starts itself once more, and on one
    without oneDNN."""
    command = [sys.executable, "-c", PRINT_WHAT_ONEDNN_TAKES]
    started = []
    for kind, more in {"avx2": [PRINT_WHAT_ONEDNN_TAKES], "no-onednn": []}.items():
        imitated = [sys.executable, as_machine.__file__, kind, "--", *command, *more]
        started.append(subprocess.Popen(imitated, stdout=subprocess.PIPE, text=True))
    return started


@pytest.mark.ahead(start=start_imitations)
def test_a_lesser_machine_is_imitated_in_every_python_that_the_command_starts():
    Operators.look_up()
    avx2, no_onednn = (process.communicate()[0].splitlines() for process in start_imitations())
    if not Operators.onednn:
        pytest.skip("no operators to take away")
    assert avx2 == ["True False False"] * 2
    assert [line.split()[:2] for line in no_onednn] == [["False", "False"]]


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_emulates_bfloat16_is_said_to_lack_it(monkeypatch, native):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert checkpoints.computes_bfloat16(torch.device("cuda")) == native
