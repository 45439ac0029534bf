"""A checkpoint with an adapter folded in, each weight in the dtype in which it is stored, in files
of at most 5 GB.
What reads Hugging Face's models reads it; little memory is enough, and what rounding has cost is
said.
Without it: rosa.merge(model) and model.save_pretrained(directory), with the whole model in memory.

    python -m extras.merge --ckpt tiny --adapter runs/tiny-toy-rosa --out merged
"""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import rosa
from data import tasks, toy
from data.errors import UserError, refusals_of, user_file
from data.tokenizer import load_tokenizer
from extras import adapters, records
from extras.checkpoints import (
    DTYPES,
    copy_companions,
    copy_json,
    find_checkpoint,
    hub_name,
    meta_model,
    name_end,
    read_checkpoint,
    read_tensor,
    usual_architecture,
)
from extras.commands import command_parser, run_script
from extras.inference import pad
from extras.quantize import Int8Linear, is_quantized
from extras.source import edited
from model import FAMILIES

SHARD = 5 * 10**9  # bytes of a file at most
# A merged weight stands for RoAE.forward, as long as both are as they were written.
MERGED = {(rosa.RoAE, "forward"): "19f590aa9e30", (rosa, "merge"): "924e5551fa4b"}


def merge_unless_edited(model):
    """rosa.merge(model) where that computes what the adapters compute; else they stay, and a line
    says so."""
    if reason := edited(MERGED):
        print(f"adapter    {reason}: running RoAE.forward as written, not merged")
    else:
        rosa.merge(model)


def merge_checkpoint(ckpt, directory, out):
    """Write the checkpoint in directory `ckpt` with the adapter in another directory folded into
    its weights, as the Hugging Face directory `out`. Every tensor that the checkpoint stores is
    written, under its name there and in its dtype, so that whoever reads the checkpoint reads the
    merged one. No more is in memory than the tensors of one file, 5 GB.

    Returns what rounding has cost: the logits of a few prompts, [positions, V] in float32, with the
    adapter beside the weights, as merged, and, if the adapter was trained on a quantised base,
    beside that base (else None). Whatever it raises, it leaves nothing behind."""
    partial = out.with_name(out.name + ".partial")
    for path in (out, partial):
        if path.exists():
            raise UserError(f"{path} exists already: delete it, or choose another --out")
    tokenizer = load_tokenizer(ckpt)
    checkpoint = read_checkpoint(ckpt)
    adapter = adapters.read_adapter(directory)
    updated = updater(meta_model(checkpoint.config), adapter)
    adapters.say_if_of_another_base(adapter, hub_name(ckpt))

    with user_file(partial):
        partial.mkdir(parents=True)
    try:
        write_weights(checkpoint, updated, partial)
        copy_json(ckpt / "config.json", partial / "config.json")
        config = merged_config(checkpoint)
        if config != checkpoint.raw:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(ckpt, partial)
        name_end(partial, tokenizer.eos_id)

        prompts = [tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 4)]
        tokens, lengths = pad(prompts)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]: where there is no padding
        before = logits_layer_by_layer(
            checkpoint.model,
            tokens,
            lambda name: updated(name, read_tensor(checkpoint.table[name])),
        )
        merged = read_checkpoint(partial)
        after = logits_layer_by_layer(
            merged.model, tokens, lambda name: read_tensor(merged.table[name])
        )
        trained = None
        if adapter.quantization:
            trained = logits_layer_by_layer(
                checkpoint.model,
                tokens,
                lambda name: updated(name, quantized_weight(checkpoint, name)),
            )
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if trained is not None:
        trained = trained[real]
    return before[real], after[real], trained


def quantized_weight(checkpoint, name):
    """A parameter of a checkpoint as --quantize int8 rounds it."""
    tensor = read_tensor(checkpoint.table[name])
    path, _, leaf = name.rpartition(".")
    if leaf == "weight" and is_quantized(path, checkpoint.model.get_submodule(path)):
        return Int8Linear(tensor, None, torch.float32).weight
    return tensor


def write_weights(checkpoint, updated, directory):
    """Write the tensors of a checkpoint into files of at most SHARD bytes, each parameter as
    `updated` makes it, and the index of the files where there are several."""
    stored = checkpoint.stored
    sizes = {
        name: math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        for name, entry in stored.items()
    }
    total_size = sum(sizes.values())
    free = shutil.disk_usage(directory).free
    if free < total_size:
        raise UserError(
            f"--out {directory.with_suffix('')} needs {total_size / 1e9:.1f} GB, only "
            f"{free / 1e9:.1f} are free there"
        )
    held = {name: {} for name in stored}  # stored name -> the parameters that the tensor holds
    for name, entry in checkpoint.table.items():
        held[entry.name][name] = entry
    weight_map = {}
    for file, names in split_into_files(sizes).items():
        tensors = {name: merged_tensor(stored[name], held[name], updated) for name in names}
        with user_file(directory / file):
            save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text)


def merged_tensor(stored, parameters, updated):
    """A stored tensor with the parameters in it, name -> Stored, as `updated` makes them. A tensor
    that holds none stays as it is; one that holds several has their rows in this order."""
    pieces = []
    for name, entry in parameters.items():
        weight = read_tensor(entry)  # memory-mapped, not read yet
        pieces.append(rounded(name, updated(name, weight), weight.dtype))
    if not pieces:
        return read_tensor(stored)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def merged_config(checkpoint):
    """config.json of a merged checkpoint: that of the checkpoint, with its architecture as
    transformers spells it, and untied where lm_head is not the embedding."""
    raw = dict(checkpoint.raw)
    if raw.get("architectures"):
        raw["architectures"] = [usual_architecture(name) for name in raw["architectures"]]
    elif raw["model_type"] in FAMILIES:
        raw["architectures"] = [FAMILIES[raw["model_type"]][0]]
    if raw.get("tie_word_embeddings") and not checkpoint.config.tie_word_embeddings:
        print(
            "lm_head is not the embedding to which config.json ties it: both are kept, and untied"
        )
        raw["tie_word_embeddings"] = False
    return raw


def rounded(name, weight, dtype):
    """The weight in a dtype. Raises FloatingPointError where that makes an infinity of a number."""
    small = weight.to(dtype)
    if small is not weight and not small.isfinite().all():
        advice = (
            "train with a smaller --lr or --alpha, or store the checkpoint in bfloat16 or float32"
        )
        raise FloatingPointError(f"{name}: the merged weight is not finite in {dtype}: {advice}")
    return small


def split_into_files(sizes):
    """File name -> the names of its tensors, SHARD bytes of them at most, from name -> bytes."""
    shards = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + size > SHARD:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)
    }


@torch.inference_mode()
def logits_layer_by_layer(model, tokens, read):
    """model(tokens) in float32, [B, T, V], of a model on the meta device, with one part's weights
    in memory at a time: each part reads its own by name before it computes, and drops them
    afterwards."""
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    hooks = []
    for name in ("model.embed_tokens", *layers, "model.norm", "lm_head"):
        part = model.get_submodule(name)

        def load(part, inputs, name=name):
            is_tied = name == "lm_head" and model.config.tie_word_embeddings
            prefix = "model.embed_tokens" if is_tied else name
            weights = {key: read(f"{prefix}.{key}").float() for key in part.state_dict()}
            part.load_state_dict(weights, assign=True)

        def drop(part, inputs, output):
            part.to("meta")

        hooks += [part.register_forward_pre_hook(load), part.register_forward_hook(drop)]
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def updater(model, adapter):
    """A function from a weight's name and the weight to the weight that rosa.merge makes of it with
    an adapter, in float32 at least; a weight that has no adapter is returned as it is. model: the
    checkpoint's on the meta device."""
    directory = adapter.directory
    if adapter.peft_type != "LORA":
        raise UserError(
            f"{directory} is an adapter of type {adapter.peft_type}, which rosa.merge cannot "
            "merge: load both with the package peft, and call merge_and_unload()"
        )
    arguments, tensors = adapters.lora_of(model, adapter)
    with refusals_of("rosa"):
        rosa.check_adapter(model, directory, arguments, tensors)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"{directory}: {name} holds numbers that are not finite: train it again"
            )
    without_memory = rosa.adapters(rosa.attach(model, **arguments))
    checked = set()  # the names of the weights whose merging was compared with RoAE.forward
    merged = set()  # the names of the tensors that are merged
    for name in without_memory:
        merged |= {f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"}
    others = sorted(tensors.keys() - merged)
    if others:
        advice = "rosa.merge(model) and model.save_pretrained merge what rosa.py knows of"
        raise UserError(
            f"{directory} holds {others[0]}, which is no part of what is merged here: {advice}"
        )

    @torch.no_grad()
    def updated(name, weight):
        name = name.removesuffix(".weight")
        if name not in without_memory:
            return weight
        like = without_memory[name]
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        linear.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        adapter = rosa.RoAE(
            linear, like.num_heads, like.rank, like.alpha, like.low_freq_ratio, like.pairs
        )
        adapter.A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        adapter.B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"][adapter.rows])
        if name not in checked:
            check_merging(name, copy.deepcopy(adapter).double())
            checked.add(name)
        return rosa.merge(nn.ModuleDict({"adapted": adapter})).adapted.weight

    return updated


def check_merging(name, adapter):
    """Raise UserError unless rosa.merge makes of an adapter in float64 the linear layer that
    computes what RoAE.forward computes."""
    x = torch.randn(4, adapter.linear.in_features, dtype=torch.float64)
    expected, without = adapter(x), adapter.linear(x)
    found = rosa.merge(nn.ModuleDict({"adapted": adapter})).adapted(x)
    if (found - expected).norm() > 1e-3 * (expected - without).norm() + 1e-6 * expected.norm():
        problem = f"merged, {name} computes something else than RoAE.forward"
        raise UserError(
            f"{problem}: has RoAE.forward or rosa.merge in rosa.py been edited without the other?"
        )


def main(args):
    """Merge, and say what it has cost."""
    records.say_if_unfinished(args.adapter)
    ckpt = find_checkpoint(args.ckpt)
    before, after, trained = merge_checkpoint(ckpt, args.adapter, args.out)
    print(
        f"{args.out} holds the merged checkpoint. Its rounding moved {difference(before, after)}."
    )
    if trained is not None:
        print(
            "The adapter was trained on a quantised base. It is merged into the base itself, "
            f"which moved {difference(trained, after)}."
        )


def difference(logits, others):
    """How far apart two tensors of logits [positions, V] are, in words."""
    same = (logits.argmax(-1) == others.argmax(-1)).sum()
    moved, largest = (others - logits).abs().max(), logits.abs().max()
    return (
        f"a logit by {moved:.2g} at most (the largest is {largest:.3g}); of {len(logits)} next "
        f"tokens {same} are the same"
    )


def parse_args(arguments=None):
    parser = command_parser("merge", __doc__)
    parser.add_argument(
        "--ckpt", required=True, help="checkpoint: a directory, or a name as train.py takes it"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        type=Path,
        help="adapter directory, as train.py or PEFT writes it",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="directory to be made: a complete Hugging Face checkpoint",
    )
    return parser.parse_args(arguments)


def run(arguments=None):
    run_script("merge", parse_args, main, arguments)


if __name__ == "__main__":
    run()
