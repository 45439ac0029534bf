"""Statements about model.py as the specification: an edit of it is an edit of everything that runs
it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise_adapters, read_steps, run
from rounding import assert_close, near, of_model

import eval as eval_script
import model
import rosa
import train
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import merge
from model import Llama

pytestmark = pytest.mark.numeric
rotate, rope_table, hidden_states, loss = (
    model.rotate,
    model.rope_table,
    Llama.hidden_states,
    Llama.loss,
)


def edited_norm(self, x):
    return x * self.weight


def edited_mlp(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)))


def edited_attend(self, q, k, v, mask):
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=0.1, enable_gqa=True
    )


def edited_rotate(x, cos, sin):
    return rotate(x, cos, -sin)


def edited_rope_table(positions, inv_freq):
    return rope_table(3 * positions, inv_freq)


def edited_hidden_states(self, tokens, cache=None):
    """An edit: the embedding is scaled by 5."""
    hook = self.model.embed_tokens.register_forward_hook(lambda module, inputs, x: 5 * x)
    x = hidden_states(self, tokens, cache)
    hook.remove()
    return x


def edited_loss(self, tokens, labels):
    return 2 * loss(self, tokens, labels)


def edited_generate(self, prompts, max_new_tokens, eos_id):
    return [[5, 6, 7] for _ in prompts]


ALL = {"loss", "answers", "logits"}
# What is edited -> (where it is, the edited method or function, what the edit changes, whether a
# kernel stood in for the original)
EDITS = {
    "RMSNorm.forward": (model.RMSNorm, edited_norm, ALL, True),
    "MLP.forward": (model.MLP, edited_mlp, ALL, True),
    "Attention.attend": (model.Attention, edited_attend, ALL, True),
    "rotate": (model, edited_rotate, ALL, False),
    "rope_table": (model, edited_rope_table, ALL, False),
    "Llama.hidden_states": (Llama, edited_hidden_states, ALL, False),
    "Llama.loss": (Llama, edited_loss, {"loss"}, True),
    "Llama.generate": (Llama, edited_generate, {"answers"}, True),
}


def results(*plain):
    """Run the scripts. Returns the loss of a step, and the answers and the logits of a model with
    an adapter."""
    steps = (
        "--ckpt ckpt --max-steps 1 --max-len 200 --batch-size 2 --val-size 1 --device cpu "
        "--dtype float32 --overwrite"
    )
    run(train, *steps.split(), "--out", "out", *plain)
    shutil.rmtree("scores", ignore_errors=True)
    asking = (
        "--ckpt ckpt --adapter adapter --limit 3 --max-new-tokens 4 --dtype float32 --out scores"
    )
    run(eval_script, *asking.split(), *plain)
    lines = [json.loads(line) for line in Path("scores/predictions.jsonl").read_text().splitlines()]
    adapted, tokenizer = (
        rosa.load_adapter(Llama.from_pretrained("ckpt"), "adapter"),
        load_tokenizer("ckpt"),
    )
    prompts = [tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 4)]
    with torch.no_grad():
        logits = torch.cat([adapted(torch.tensor([prompt]))[0] for prompt in prompts])
    return {
        "loss": read_steps("out")[0]["loss"],
        "answers": [line["response"] for line in lines],
        "logits": logits,
    }


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_model_is_an_edit_of_training_evaluation_and_merging(
    ckpt, monkeypatch, capsys, name
):
    """The default run computes what the plain run of the edited file does. Where a kernel is no
    longer used, a line says so."""
    monkeypatch.setitem(tasks.TOY_SIZES, "train", 5)
    unedited = Llama.from_pretrained(ckpt)
    rounding = of_model(unedited.config, 2)
    rosa.save_adapter(randomise_adapters(rosa.attach(unedited, 4, 8)), "adapter")
    before = results("--plain")
    where, edited, changes, has_kernel = EDITS[name]
    monkeypatch.setattr(where, name.split(".")[-1], edited)
    capsys.readouterr()
    after, printed, plain = results(), capsys.readouterr().out, results("--plain")
    assert (f"{name} has been edited" in printed) == has_kernel
    assert after["loss"] == near(plain["loss"], **rounding) and after["answers"] == plain["answers"]
    assert_close(
        merge.merge_checkpoint(Path("ckpt"), Path("adapter"), Path("merged"))[0],
        plain["logits"],
        **rounding,
    )
    different = {"loss": after["loss"] != near(before["loss"], **rounding)}
    different |= {"answers": after["answers"] != before["answers"]}
    different |= {
        "logits": (plain["logits"] - before["logits"]).norm() > 0.1 * before["logits"].norm()
    }
    assert {key for key, value in different.items() if value} == changes
