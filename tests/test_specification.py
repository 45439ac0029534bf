"""Statements about model.py as the specification: the plain run is the run, and an edit of it edits everything."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK, read_log, run
from rounding import near, of_model

import eval as eval_script
import model
import rosa
import train as train_script
from extras import merge
from model import Llama

pytestmark = pytest.mark.numeric


def test_the_plain_run_is_the_run(ckpt):
    """To rounding in float32; in bfloat16 one is as near to the float32 run as the other."""
    losses, layers = {}, {}
    for dtype in ("float32", "bfloat16"):
        for plain in ((), ("--plain",)):
            options = [*QUICK, "--max-steps", 20, "--select-every", 5, "--dtype", dtype, "--overwrite"]
            run(train_script, *options, "--out", "out", *plain)
            losses[dtype, *plain] = torch.tensor([record["loss"] for record in read_log("out")[1:]])
            layers[dtype, *plain] = [record["active_layers"] for record in read_log("out")[1:]]
    exact = losses["float32", "--plain"]
    assert len(exact) == 20 and (losses["float32",] - exact).abs().max() < 1e-4
    assert layers["float32",] == layers["float32", "--plain"]
    fast, plain = ((losses["bfloat16", *how] - exact).norm() for how in ((), ("--plain",)))
    assert max(fast, plain) < 3 * min(fast, plain) + 1e-3


def edited_rotate(x, cos, sin):
    return rotate(x, cos, 2 * sin)


def edited_rope_table(positions, inv_freq):
    return rope_table(2 * positions, inv_freq)


def edited_hidden_states(self, tokens, cache=None):
    return 3 * hidden_states(self, tokens, cache)


def edited_norm(self, x):
    return 1.5 * x * self.weight


def edited_mlp(self, x):
    return self.down_proj(self.gate_proj(x))


def edited_attend(self, q, k, v, mask):
    return 2 * torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def edited_loss(self, tokens, labels):
    return 2 * loss(self, tokens, labels)


def edited_generate(self, prompts, max_new_tokens, eos_id):
    return [[5, 6, 7] for _ in prompts]


rotate, rope_table, hidden_states, loss = model.rotate, model.rope_table, Llama.hidden_states, Llama.loss
EDITS = {  # what is edited: where, into what, what it changes
    "rotate": (model, edited_rotate, {"loss", "answers", "logits"}),
    "rope_table": (model, edited_rope_table, {"loss", "answers", "logits"}),
    "hidden_states": (Llama, edited_hidden_states, {"loss", "logits"}),  # thrice the logits have the same largest ones
    "RMSNorm.forward": (model.RMSNorm, edited_norm, {"loss", "answers", "logits"}),
    "MLP.forward": (model.MLP, edited_mlp, {"loss", "answers", "logits"}),
    "Attention.attend": (model.Attention, edited_attend, {"loss", "answers", "logits"}),
    "loss": (Llama, edited_loss, {"loss"}),
    "generate": (Llama, edited_generate, {"answers"}),
}


UNEDITED = {}  # what the unedited model gives


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_model_is_an_edit_of_training_evaluation_and_merging(ckpt, monkeypatch, capsys, name):
    """What is edited runs, with kernels and without, in all alike; where a kernel stepped aside a line says so."""
    rosa.save_adapter(rosa.attach(Llama.from_pretrained(ckpt), 4, 8), "adapter")

    def first_loss(*plain):
        run(train_script, *QUICK, "--max-steps", 1, "--overwrite", "--out", "out", *plain)
        return read_log("out")[1]["loss"]

    def results():
        questions = "--ckpt ckpt --limit 6 --max-new-tokens 8 --dtype float32 --out scored".split()
        run(eval_script, *questions)
        answers = [json.loads(line)["response"] for line in Path("scored/predictions.jsonl").read_text().splitlines()]
        shutil.rmtree("scored")
        logits, _ = merge.merge_checkpoint(Path("ckpt"), Path("adapter"), Path("merged"))
        shutil.rmtree("merged")
        return {"loss": first_loss(), "answers": answers, "logits": logits.flatten().tolist()}

    before = UNEDITED or results()
    UNEDITED.update(before)
    where, edited, changed = EDITS[name]
    monkeypatch.setattr(where, name.split(".")[-1], edited)
    capsys.readouterr()
    after, printed = results(), capsys.readouterr().out
    rounding = of_model(Llama.from_pretrained(ckpt).config, 2)
    same = {"answers": after["answers"] == before["answers"]}
    same |= {key: after[key] == near(before[key], **rounding) for key in ("loss", "logits")}
    assert {key for key in same if not same[key]} == changed
    assert after["loss"] == near(first_loss("--plain"), **rounding)
    assert ("has been edited: " in printed) == (where is not model and name != "hidden_states")
