"""Statements about machines: what PyTorch does not document may be absent, refuse or be wrong, and bfloat16 may be software."""

import subprocess
import sys
from pathlib import Path

import as_machine
import pytest
import torch
from conftest import random_model, random_tokens, randomise_adapters, without_operators
from rounding import assert_close, of_model

import eval as eval_script
import model as model_file
import train as train_script
from data.tokenizer import HERE as DATA
from model import Operators
from rosa import attach

pytestmark = pytest.mark.numeric


def refuse(*given):
    raise RuntimeError("this processor has no such instruction")


def absent(*given):
    return torch.ops.mkldnn.no_such_operator(*given)


def wrong(x, weight, bias):
    return 2 * torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@pytest.mark.parametrize("operator", [refuse, absent, wrong])
def test_an_operator_that_cannot_be_used_leaves_its_formula(monkeypatch, operator):
    without_operators(monkeypatch)
    monkeypatch.setattr(Operators, "formulas", {})  # not asked yet
    monkeypatch.setattr(model_file, "call_onednn", operator)
    model = random_model()  # asks
    assert Operators.onednn == frozenset() and set(Operators.formulas) == {"reshaped", "silu_backward", "softmax_backward"}
    weights = [p.clone() for p in model.parameters()]
    assert all(torch.equal(p, w) and not p.is_mkldnn for p, w in zip(model.pack().parameters(), weights))


def test_it_is_asked_for_once(monkeypatch):
    random_model()
    monkeypatch.setattr(model_file, "does_the_same", lambda *given: pytest.fail("asked again"))
    random_model()


@pytest.mark.parametrize("missing", ["all", "reshaped", "silu_backward", "softmax_backward"])
def test_a_model_without_those_operators_is_the_same_model(monkeypatch, missing):
    model, tokens = randomise_adapters(attach(random_model(), 4, 8)), random_tokens(2, 30)
    trained, results = [p for p in model.parameters() if p.requires_grad], []
    for _ in range(2):
        model.loss(tokens, tokens).backward()
        results.append(torch.cat([model(tokens).detach().flatten(), *(p.grad.flatten() for p in trained)]))
        model.zero_grad()
        if missing == "all":
            without_operators(monkeypatch)
        else:
            monkeypatch.setattr(Operators, missing, staticmethod(Operators.formulas[missing]))
    assert_close(*results, **of_model(model.config, 2))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_bfloat16_in_software_is_a_line_that_says_what_to_type(tmp_path, monkeypatch, capsys, native, dtype):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Operators, "computes_bfloat16", lambda device: native)
    random_model(vocab_size=1024, num_hidden_layers=1, max_position_embeddings=256).save_pretrained("ckpt")
    Path("ckpt/tokenizer.model").write_bytes((DATA / "tiny" / "tokenizer.model").read_bytes())
    line = "this processor computes bfloat16 in software, slowly: --dtype float32 is faster here\n"
    for run, arguments in ((train_script.run, ["--max-steps", "1", "--max-len", "200", "--val-size", "90"]),
                           (eval_script.run, ["--limit", "1", "--max-new-tokens", "3"])):
        run(["--ckpt", "ckpt", "--device", "cpu", "--dtype", dtype, *arguments])
        printed = capsys.readouterr()
        assert printed.err.count(line) == (dtype == "bfloat16" and not native)
        assert f"{'bfloat16' if dtype == 'bfloat16' or dtype == 'auto' and native else 'float32'} on cpu" in printed.out


ASK = """if True:
    import subprocess, sys, torch
    def takes(dtype):
        try:
            x = torch.ones(4, 4, dtype=dtype)
            return torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "").dtype == dtype
        except (AttributeError, RuntimeError):
            return False
    print(takes(torch.float32), takes(torch.bfloat16), torch.cpu._is_avx512_bf16_supported(), flush=True)
    sys.argv[1:] and subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)"""


def test_a_lesser_machine_is_imitated_in_every_python_that_the_command_starts():
    random_model()
    if not Operators.onednn:
        pytest.skip("no operators to take away")
    kinds = {"avx2": [ASK], "no-onednn": []}
    started = [subprocess.Popen([sys.executable, as_machine.__file__, kind, "--", sys.executable, "-c", ASK, *more], stdout=subprocess.PIPE,
                                text=True) for kind, more in kinds.items()]
    avx2, no_onednn = (process.communicate()[0].splitlines() for process in started)
    assert avx2 == ["True False False"] * 2
    assert [line.split()[:2] for line in no_onednn] == [["False", "False"]]
