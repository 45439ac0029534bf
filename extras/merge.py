"""A checkpoint with an adapter folded in, each weight in the dtype in which it is stored, in files of at most 5 GB.
What reads Hugging Face's models reads it; little memory is enough, and what rounding has cost is said.
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
from data.tokenizer import load_tokenizer
from extras import peft_methods, runs
from extras.checkpoints import copy_companions, find_checkpoint, meta_model, read_json, read_tensor
from extras.commands import command_parser, run_command
from extras.inference import pad
from model import FAMILIES

SHARD = 5 * 10**9  # bytes of a file at most
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def merge_checkpoint(ckpt, adapter, out):
    """Write the checkpoint in directory `ckpt` with an adapter folded into its weights, each in the dtype that it is
    stored in, as the Hugging Face directory `out`. No more is in memory than the tensors of one file, 5 GB.

    Returns what rounding has cost: the logits of a few prompts, [positions, V] in float32, with the adapter beside the
    weights, and as merged. Raises ValueError or OSError with a line for the user, and then leaves nothing behind."""
    partial = out.with_name(out.name + ".partial")
    for directory in (out, partial):
        if directory.exists():
            raise FileExistsError(f"{directory} exists already: delete it, or choose another --out")
    tokenizer = load_tokenizer(ckpt)
    model, table = meta_model(ckpt)
    updated = updater(model, adapter)
    sizes = {name: math.prod(stored.shape) * SIZES[stored.dtype] for name, stored in table.items()}
    shards = [[]]
    for name in table:
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + sizes[name] > SHARD:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]

    partial.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(partial).free) < sum(sizes.values()):
            raise OSError(f"--out {out} needs {sum(sizes.values()) / 1e9:.1f} GB, only {free / 1e9:.1f} are free there")
        for file, names in zip(files, shards):
            tensors = {name: read_tensor(table, name) for name in names}  # mapped, not read yet
            tensors = {name: updated(name, tensor).to(tensor.dtype) for name, tensor in tensors.items()}
            save_file(tensors, partial / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {name: file for file, names in zip(files, shards) for name in names},
            }
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.copyfile(ckpt / "config.json", partial / "config.json")
        stated = read_json(ckpt / "config.json")
        config = stated | {"architectures": [FAMILIES[model.config.model_type][0]]}
        if config.get("tie_word_embeddings") and not model.config.tie_word_embeddings:  # its lm_head is another
            print("lm_head is not the embedding to which config.json ties it: both are kept, and untied")
            config["tie_word_embeddings"] = False
        if config != stated:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(ckpt, partial)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise

    _, merged = meta_model(out)
    tokens, lengths = pad([tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 4)])
    real = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]: where there is no padding
    before = logits_layer_by_layer(model, tokens, lambda name: updated(name, read_tensor(table, name)))
    return before[real], logits_layer_by_layer(model, tokens, lambda name: read_tensor(merged, name))[real]


@torch.inference_mode()
def logits_layer_by_layer(model, tokens, read):
    """model(tokens) in float32, [B, T, V], of a model on the meta device, with one part's weights in memory at a time:
    each part reads its own by name before it computes, and drops them afterwards."""
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
            part.load_state_dict({key: read(f"{prefix}.{key}").float() for key in part.state_dict()}, assign=True)

        def drop(part, inputs, output):
            part.to("meta")

        hooks += [part.register_forward_pre_hook(load), part.register_forward_hook(drop)]
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits


def updater(model, directory):
    """A function from a weight's name and the weight to the weight that rosa.merge makes of it with the adapter in a
    directory, in float32 at least; a weight that has no adapter is returned as it is. The model may be on the meta
    device."""
    peft_methods.check_files(directory)
    arguments, tensors = rosa.read_adapter(directory, as_lora=True)
    if "peft" in arguments:
        peft_type = arguments["peft"]["peft_type"]
        raise ValueError(f"{directory} is an adapter of peft's own, of type {peft_type}: only peft can merge it")
    rosa.check_lora(directory, tensors, model, arguments)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{directory}: {name} holds numbers that are not finite: train it again")
    without_memory = rosa.adapters(rosa.attach(copy.deepcopy(model).to("meta"), **arguments))

    @torch.no_grad()
    def updated(name, weight):
        name = name.removesuffix(".weight")
        if name not in without_memory:
            return weight
        like = without_memory[name]
        linear = nn.Linear(like.linear.in_features, like.linear.out_features, bias=False, device="meta")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        linear.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        adapter = rosa.RoAE(linear, like.num_heads, like.rank, like.alpha, like.low_freq_ratio, like.pairs)
        adapter.A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        adapter.B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"][adapter.rows])
        return rosa.merge(nn.ModuleDict({"adapted": adapter})).adapted.weight

    return updated


def main(args):
    """Merge, and say what it has cost."""
    runs.say_if_unfinished(args.adapter)
    before, after = merge_checkpoint(find_checkpoint(args.ckpt), args.adapter, args.out)
    same = (before.argmax(-1) == after.argmax(-1)).sum()
    moved, largest = (after - before).abs().max(), before.abs().max()
    print(
        f"{args.out} holds the merged checkpoint. Its rounding moved a logit by {moved:.2g} at most (the largest is "
        f"{largest:.3g}); of {len(before)} next tokens {same} are the same."
    )


def run(arguments=None):
    parser = command_parser("merge", __doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint: a directory, or a name as train.py takes it")
    parser.add_argument("--adapter", required=True, type=Path, help="adapter directory, as train.py or PEFT writes it")
    parser.add_argument(
        "--out", required=True, type=Path, help="directory to be made: a complete Hugging Face checkpoint"
    )
    run_command("merge", main, parser.parse_args(arguments))


if __name__ == "__main__":
    run()
