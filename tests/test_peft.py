"""Statements about the methods of the optional package peft, in our model, loop and files; our LoRA
is PEFT's, too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import generator_of, random_model, random_tokens, seed_torch, smooth_adamw
from rounding import assert_close, near, of_model
from torch import nn

import rosa
import train as train_script
from data.errors import UserError
from data.tokenizer import HERE as DATA
from extras import adapters, merge
from extras.kernels import accelerate
from model import MLP, Llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.numeric
METHODS = {
    "LORA": {},
    "IA3": {},
    "LN_TUNING": {},
    "HRA": {},
    "OFT": {"oft_block_size": 4},
    "MISS": {"r": 4},
}
METHODS |= {"SHIRA": {"r": 2}, "ADALORA": {"total_step": 100}, "FOURIERFT": {"n_frequency": 10}}
METHODS |= {"LORA with DoRA": {"use_dora": True}}


def train(model, parameters, k_ratio=1.0, steps=5, adamw=torch.optim.AdamW):
    """Train for some steps. Returns the loss of each step, and the layers that were active last."""
    optimizer, selector = (
        adamw(parameters, lr=1e-2, weight_decay=0.0),
        rosa.LayerSelector(model, k_ratio, 2),
    )
    losses = []
    for number in range(steps):
        selector.before_forward(number)
        loss = model.loss(random_tokens(4, 16), random_tokens(4, 16, seed=1)) / 64
        loss.backward()
        losses.append(loss.item())
        selector.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, selector.active


def test_all_linear_layers_are_those_of_the_layers(model):
    adapters.attach_peft(model, "LORA", {"target_modules": "all-linear"})
    adapted = {
        name.split(".lora_A")[0].split(".", 3)[3]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    assert adapted == set(rosa.TARGETS.values())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}]
)
def test_a_plain_lora_that_peft_has_trained_here_is_merged_and_no_other(tmp_path, options):
    model, tokens = random_model(vocab_size=1024, max_position_embeddings=256), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "ckpt")
    shutil.copy(DATA / "tiny" / "tokenizer.model", tmp_path / "ckpt")
    adapters.attach_peft(model, "LORA", options)
    train(model, [p for p in model.parameters() if p.requires_grad])
    adapters.save_adapter(model, tmp_path / "a")
    merge.merge_checkpoint(tmp_path / "ckpt", tmp_path / "a", tmp_path / "out")
    merged = Llama.from_pretrained(tmp_path / "out")
    assert_close(merged(tokens), model.eval()(tokens), **of_model(merged.config))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="use_dora = True is not implemented"):
        merge.merge_checkpoint(tmp_path / "ckpt", tmp_path / "a", tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_peft_trains_layer_by_layer_and_comes_back_from_its_files(
    tmp_path, name, dtype
):
    seed_torch(0)
    model, tokens = random_model(dtype=dtype), random_tokens(2, 20)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapters.attach_peft(model, name.split()[0], METHODS[name])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(p.dtype == torch.float32 for p in trainable.values())
    start = {name: p.detach().clone() for name, p in trainable.items()}
    losses, active = train(model, trainable.values(), k_ratio=0.4, steps=2)  # 1 of 3 layers
    moved = {name for name, p in trainable.items() if not torch.equal(p, start[name])}
    moved = {int(name.split(".")[2]) for name in moved if name.startswith("model.layers.")}
    assert moved == set(active) and len(moved) == 1
    losses += train(model, trainable.values(), steps=6)[0]
    assert losses[-1] < losses[0] - 0.01
    for name, p in model.named_parameters():
        if (name := name.replace("base_layer.", "")) in frozen:
            assert torch.equal(p, frozen[name])

    adapters.save_adapter(model, tmp_path)
    again, base = (
        adapters.load_adapter(random_model(dtype=dtype), tmp_path),
        random_model(dtype=dtype),
    )
    # To the bit, because the files hold all trained values in float32
    assert torch.equal(again(tokens), model(tokens)) and not torch.equal(
        again(tokens), base(tokens)
    )
    with pytest.raises(
        ValueError, match="was trained on another model: model.layers.3.* is absent, this one needs"
    ):
        adapters.load_adapter(random_model(num_hidden_layers=4), tmp_path)


@pytest.mark.parametrize(
    "name, options", [*METHODS.items(), ("LORA on lm_head", {"target_modules": ["lm_head"]})]
)
def test_kernels_leave_its_layers_as_they_are_and_compute_the_same(name, options):
    """PEFT may read or call a linear layer that it has wrapped. Where PEFT adapts lm_head, the loss
    includes the adapter."""
    model, tokens, results = random_model(), random_tokens(2, 20), []
    adapters.attach_peft(model, name.split()[0], options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.data += 0.05 * torch.randn(p.shape, generator=generator_of(p.numel()))
    for kernels in (False, True):
        exchanged = accelerate(model)[0] if kernels else []
        loss = model.loss(tokens, tokens)
        results.append(
            torch.cat([g.flatten() for g in (model(tokens), *torch.autograd.grad(loss, trainable))])
        )
    assert "Attention.attend" in exchanged and ("Llama.loss" in exchanged) == (
        name != "LORA on lm_head"
    )
    assert_close(*results, **of_model(model.config, 2))
    for wrapper in (module for module in model.modules() if module.__module__.startswith("peft")):
        inside = [module for module in wrapper.modules() if isinstance(module, nn.Linear)]
        assert not any("forward" in vars(module) for module in inside)


def test_a_mistake_in_the_model_is_a_traceback_and_what_peft_refuses_a_line(monkeypatch):
    """The trial pass in attach_peft runs into both."""
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: forward(self, x.view(3, -1)))
    with pytest.raises(RuntimeError, match="shape"):
        adapters.attach_peft(random_model(), "IA3", METHODS["IA3"])
    monkeypatch.setattr(MLP, "forward", forward)
    with pytest.raises(UserError, match="peft:LORA with .*no_such.* in float32: .*no_such"):
        adapters.attach_peft(random_model(), "LORA", {"no_such": 1})
    # An error inside the package peft
    monkeypatch.setattr(peft.tuners.lora.Linear, "_cast_input_dtype", torch.linalg.inv)
    with pytest.raises(UserError, match="peft:LORA with .*inv"):
        adapters.attach_peft(random_model(), "LORA", {"target_modules": ["q_proj"]})


DROPOUT = [("LORA", {"lora_dropout": 0.5}), ("LORA", {"lora_dropout": 0.5, "use_dora": True})]
DROPOUT += [("BOFT", {"boft_block_size": 4, "boft_dropout": 0.5})]


@pytest.mark.parametrize("name, options", DROPOUT, ids=str)
def test_dropout_acts_in_training_alone(tmp_path, name, options):
    """PEFT adds its modules in training mode, even to a model in evaluation mode."""
    model, tokens = random_model(), random_tokens(2, 20)
    adapters.attach_peft(model, name, options)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator_of(p.numel()))
    assert torch.equal(model(tokens), model(tokens))  # no dropout in evaluation mode
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    adapters.save_adapter(model, tmp_path)
    again = adapters.load_adapter(random_model(), tmp_path)
    assert not any(module.training for module in again.modules())
    assert_close(again(tokens), model.eval()(tokens), **of_model(model.config))
    in_training = adapters.attach_peft(random_model().train(), name, options)
    assert all(module.training for module in in_training.modules())


def test_layers_are_selected_among_those_in_which_something_trains(ckpt):
    """With PEFT's option layers_to_transform only some layers have adapters."""
    model = random_model(num_hidden_layers=6)
    adapters.attach_peft(
        model, "LORA", {"target_modules": ["q_proj"], "layers_to_transform": [4, 5]}
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    selector = rosa.LayerSelector(model, k_ratio=0.34, select_every=2)
    assert (selector.count, selector.active) == (1, [4, 5]) and rosa.LayerSelector(
        model, 1.0
    ).count == 2
    losses, active = train(model, parameters, k_ratio=0.34, steps=6)
    assert len(active) == 1 and set(active) <= {4, 5} and losses[-1] < losses[0]


INITIAL = [True, False, "gaussian", "Gaussian", "pissa", "olora", "OLoRA", "orthogonal", "eva"]


@pytest.mark.parametrize("initial", [*INITIAL, "pissa_niter_4", "pissa_niter_16"])
def test_an_adapter_reads_back_as_the_model_that_was_trained_however_it_began(tmp_path, initial):
    """Some of PEFT's initialisations change the base weights. When the adapter is read, the base
    must be changed in the same way."""
    options = {"init_lora_weights": initial, "r": 4, "target_modules": ["q_proj", "up_proj"]}
    model, tokens = random_model(), random_tokens(2, 20)
    if initial not in INITIAL:
        with pytest.raises(
            UserError,
            match=f"peft:LORA with init_lora_weights '{initial}': peft draws the base anew",
        ):
            adapters.attach_peft(model, "LORA", options)
        return
    adapters.attach_peft(model, "LORA", options)
    train(model, [p for p in model.parameters() if p.requires_grad], steps=3)
    adapters.save_adapter(model, tmp_path)
    again = adapters.load_adapter(random_model(), tmp_path)
    assert_close(again(tokens), model(tokens), **of_model(model.config))


def test_an_adapters_config_is_no_file_of_options(ckpt, capsys):
    rosa.save_adapter(rosa.attach(random_model(), 2, 4), "a")
    command = "--ckpt ckpt --method peft:LORA --max-len 200 --peft-config a/adapter_config.json"
    with pytest.raises(SystemExit) as stopped:
        train_script.run(command.split())
    assert stopped.value.code == 2
    assert "names an adapter's adapter_config.json" in capsys.readouterr().err


def test_where_nothing_in_a_layer_trains_layers_cannot_be_selected(ckpt, capsys):
    Path("options.json").write_text('{"target_modules": ["lm_head"]}')
    with pytest.raises(SystemExit) as stopped:
        train_script.run(
            "--ckpt ckpt --method peft:LORA --k-ratio 0.5 --max-len 200".split()
            + ["--peft-config", "options.json"]
        )
    line = (
        "train.py: nothing that peft:LORA trains is in a layer, so no layer can be selected: "
        "--k-ratio 1\n"
    )
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("name", ["IA3", "OFT", "LN_TUNING"])
def test_its_files_load_into_a_transformers_model(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model, tokens = random_model(), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "base")
    adapters.attach_peft(model, name, METHODS[name])
    train(model, [p for p in model.parameters() if p.requires_grad])
    adapters.save_adapter(model, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert_close(model(tokens), theirs(tokens).logits, **of_model(model.config))


@pytest.mark.parametrize("targets", ["q,k", "q,k,v,o,gate,up,down"])
def test_our_lora_is_pefts(targets):
    ours, theirs = random_model(), random_model()
    rosa.attach(ours, rank=4, alpha=8, low_freq_ratio=1.0, targets=targets)
    modules = [rosa.TARGETS[target].split(".")[1] for target in targets.split(",")]
    adapters.attach_peft(theirs, "LORA", {"r": 4, "lora_alpha": 8, "target_modules": modules})
    with torch.no_grad():
        for name, adapter in rosa.adapters(ours).items():
            theirs.get_submodule(name).lora_A["default"].weight.copy_(adapter.A)
    trainable = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    losses = [
        train(model, each, adamw=smooth_adamw())[0]
        for model, each in zip((ours, theirs), trainable)
    ]
    assert (
        losses[0] == near(losses[1], **of_model(ours.config, 2 * 5))
        and losses[0][-1] < losses[0][0] - 0.1
    )


REFUSED = [
    ("LORE", {}, "has no method 'LORE': choose from ADALORA, "),
    ("LORA", {"rank": 4}, "unexpected keyword argument 'rank'"),
    ("LORA", {"target_modules": ["query"]}, "Target modules"),
    ("PREFIX_TUNING", {}, "does not support prompt learning"),
    ("ADALORA", {}, "total_step"),
    ("POLY", {}, "task_ids"),  # the package fails in the forward pass only
]


@pytest.mark.parametrize("method, options, message", REFUSED)
def test_what_cannot_run_is_refused_in_a_line(model, method, options, message):
    with pytest.raises(ValueError, match=message) as error:
        adapters.attach_peft(model, method, options)
    assert "\n" not in str(error.value)


def test_adapters_from_elsewhere_that_we_do_not_implement_run_by_peft(tmp_path):
    model, tokens = random_model(), random_tokens(2, 20)
    theirs = peft.get_peft_model(random_model(), peft.IA3Config())
    for parameter in (parameter for parameter in theirs.parameters() if parameter.requires_grad):
        parameter.data *= 1.5
    theirs.save_pretrained(tmp_path)
    assert_close(
        adapters.load_adapter(model, tmp_path)(tokens),
        theirs.model(tokens),
        **of_model(model.config),
    )
