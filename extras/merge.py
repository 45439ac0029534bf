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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import rosa
from data import tasks, toy
from data.errors import UserError, refusals_of, user_file
from data.tokenizer import load_tokenizer
from extras import adapters, records
from extras.checkpoints import (
    checkpoint_files,
    copy_companions,
    find_checkpoint,
    hub_name,
    meta_model,
    read_json,
    read_tensor,
)
from extras.commands import command_parser, run_script
from extras.inference import pad
from extras.kernels import edited
from model import FAMILIES

SHARD = 5 * 10**9  # bytes of a file at most
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# A merged weight stands for RoAE.forward, as long as both are as they were written.
MERGED = {(rosa.RoAE, "forward"): "19f590aa9e30", (rosa, "merge"): "e814ae8f17db"}


def merge_if_unedited(model):
    """rosa.merge(model) where that computes what the adapters compute; else they stay, and a line
    says so."""
    if reason := edited(MERGED):
        print(f"adapter    {reason}: running RoAE.forward as written, not merged")
    else:
        rosa.merge(model)


def merge_checkpoint(ckpt, adapter, out):
    """Write the checkpoint in directory `ckpt` with an adapter folded into its weights, each in the
    dtype that it is stored in, as the Hugging Face directory `out`. No more is in memory than the
    tensors of one file, 5 GB.

    Returns what rounding has cost: the logits of a few prompts, [positions, V] in float32, with the
    adapter beside the weights, and as merged. Whatever it raises, it leaves nothing behind."""
    partial = out.with_name(out.name + ".partial")
    for directory in (out, partial):
        if directory.exists():
            raise UserError(f"{directory} exists already: delete it, or choose another --out")
    tokenizer = load_tokenizer(ckpt)
    model, table = meta_model(ckpt)
    updated = updater(model, adapter)
    adapters.say_if_of_another_base(adapter, hub_name(ckpt))
    sizes = {name: math.prod(stored.shape) * SIZES[stored.dtype] for name, stored in table.items()}
    parameters = dict(model.named_parameters())
    check_names(
        ckpt, [table[name].name for name in table], [parameters[name].shape for name in table]
    )
    files = split_into_files(sizes)

    with user_file(partial):
        partial.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(partial).free) < sum(sizes.values()):
            raise UserError(
                f"--out {out} needs {sum(sizes.values()) / 1e9:.1f} GB, only {free / 1e9:.1f} are "
                "free there"
            )
        for file, names in files.items():
            tensors = {name: read_tensor(table, name) for name in names}  # mapped, not read yet
            tensors = {
                table[name].name: rounded(name, updated(name, tensor), tensor.dtype)
                for name, tensor in tensors.items()
            }
            with user_file(partial / file):
                save_file(tensors, partial / file, metadata={"format": "pt"})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {
                    table[name].name: file for file, names in files.items() for name in names
                },
            }
            (partial / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )
        shutil.copyfile(ckpt / "config.json", partial / "config.json")
        stated = read_json(ckpt / "config.json")
        config = stated | {"architectures": [FAMILIES[model.config.model_type][0]]}
        # Its lm_head is another
        if config.get("tie_word_embeddings") and not model.config.tie_word_embeddings:
            print(
                "lm_head is not the embedding to which config.json ties it: both are kept, and "
                "untied"
            )
            config["tie_word_embeddings"] = False
        if config != stated:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        written = shapes_in_files(partial)
        check_names(ckpt, list(written), list(written.values()))
        copy_companions(ckpt, partial)
        _, merged = meta_model(partial)
        tokens, lengths = pad(
            [tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 4)]
        )
        real = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]: where there is no padding
        before = logits_layer_by_layer(
            model, tokens, lambda name: updated(name, read_tensor(table, name))
        )[real]
        after = logits_layer_by_layer(model, tokens, lambda name: read_tensor(merged, name))[real]
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return before, after


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


def shapes_in_files(directory):
    """Name -> shape of every tensor in the files of a checkpoint directory, as they stand there."""
    shapes = {}
    for path in checkpoint_files(directory):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def check_names(ckpt, names, shapes):
    """Raise UserError unless these tensors, under these names and in these shapes, stand in the
    checkpoint's files too: then whoever reads the checkpoint reads what is written."""
    stored = shapes_in_files(ckpt)
    for name, shape in zip(names, shapes, strict=True):
        if stored.get(name) != tuple(shape) or names.count(name) > 1:
            problem = (
                f"the model's tensors are not those of its files, {name} {list(shape)} among them"
            )
            advice = (
                "rosa.merge(model) and model.save_pretrained write what Llama.from_pretrained reads"
            )
            raise UserError(f"{ckpt}: {problem}: nobody else could read what is written; {advice}")


@torch.inference_mode()
def logits_layer_by_layer(model, tokens, read):
    """model(tokens) in float32, [B, T, V], of a model on the meta device, with one part's weights
    in memory at a time: each part reads its own by name before it computes, and drops them
    afterwards."""
    parts = [
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        *(f"model.layers.{i}" for i in range(len(model.model.layers))),
    ]
    hooks = []
    for name in parts:
        part = model.get_submodule(name)

        def load(part, inputs, name=name):
            tied = name == "lm_head" and model.config.tie_word_embeddings
            prefix = "model.embed_tokens" if tied else name
            part.load_state_dict(
                {key: read(f"{prefix}.{key}").float() for key in part.state_dict()}, assign=True
            )

        def drop(part, inputs, output):
            part.to("meta")

        hooks += [part.register_forward_pre_hook(load), part.register_forward_hook(drop)]
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def updater(model, directory):
    """A function from a weight's name and the weight to the weight that rosa.merge makes of it with
    the adapter in a directory, in float32 at least; a weight that has no adapter is returned as it
    is. The model may be on the meta device."""
    adapters.check_files(directory)
    with refusals_of("rosa"):
        arguments, tensors = rosa.read_adapter(directory, as_lora=True)
    if "peft" in arguments:
        peft_type = arguments["peft"]["peft_type"]
        advice = "load both with the package peft, and call merge_and_unload()"
        raise UserError(
            f"{directory} is an adapter of type {peft_type}, which rosa.merge cannot merge: "
            f"{advice}"
        )
    adapters.check_targets(directory, arguments["targets"])
    with refusals_of("rosa"):
        rosa.check_lora(directory, tensors, model, arguments)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"{directory}: {name} holds numbers that are not finite: train it again"
            )
    without_memory = rosa.adapters(rosa.attach(copy.deepcopy(model).to("meta"), **arguments))
    checked = set()  # the names of the weights whose merging was compared with RoAE.forward
    merged = {
        f"base_model.model.{name}.lora_{factor}.weight"
        for name in without_memory
        for factor in "AB"
    }
    if others := sorted(tensors.keys() - merged):
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
        linear = nn.Linear(
            like.linear.in_features, like.linear.out_features, bias=False, device="meta"
        )
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
    before, after = merge_checkpoint(find_checkpoint(args.ckpt), args.adapter, args.out)
    same = (before.argmax(-1) == after.argmax(-1)).sum()
    moved, largest = (after - before).abs().max(), before.abs().max()
    print(
        f"{args.out} holds the merged checkpoint. Its rounding moved a logit by {moved:.2g} at "
        "most (the largest is "
        f"{largest:.3g}); of {len(before)} next tokens {same} are the same."
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
