"""Owns the checkpoint with an adapter folded in: weights of 5 GB a file, in the dtype in which they are stored, config and tokenizer.
It makes a fine-tuned model that everything reads which reads Hugging Face's, in little memory, and says what rounding has cost.
Without it: rosa.merge(model) and model.save_pretrained(directory), with the whole model in memory.

    python -m extras.merge --ckpt tiny --adapter runs/tiny-toy-rosa --out merged
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import rosa
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras.checkpoints import copy_companions, find_checkpoint
from extras.runs import command_parser, run_command
from model import Llama, LlamaConfig, logits_layer_by_layer, pad, read_tensor, tensor_table

SHARD = 5 * 10**9  # bytes of a file at most
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def merge_checkpoint(ckpt, adapter, out):
    """Write the checkpoint in directory `ckpt` with an adapter folded into its weights, each in the dtype that it is stored
    in, as the Hugging Face directory `out`. No more is in memory than the tensors of one file, 5 GB.

    Returns what rounding has cost: the logits of a few prompts, [positions, V] in float32, with the adapter beside the
    weights, and as merged. Raises ValueError or OSError with a line for the user, and then leaves nothing behind."""
    partial = out.with_name(out.name + ".partial")
    for directory in (out, partial):
        if directory.exists():
            raise FileExistsError(f"{directory} exists already: delete it, or choose another --out")
    tokenizer = load_tokenizer(ckpt)
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_file(ckpt))
    table, updated = tensor_table(ckpt, model), updater(model, adapter)
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
            index = {"metadata": {"total_size": sum(sizes.values())},
                     "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.copyfile(ckpt / "config.json", partial / "config.json")
        copy_companions(ckpt, partial)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise

    merged = tensor_table(out, model)
    tokens, lengths = pad([tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 4)])
    real = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, T]: where there is no padding
    return (logits_layer_by_layer(model.config, tokens, lambda name: updated(name, read_tensor(table, name)).float())[real],
            logits_layer_by_layer(model.config, tokens, lambda name: read_tensor(merged, name).float())[real])


def updater(model, directory):
    """A function from a weight's name and the weight to the weight plus its update by the adapter in a directory, in float32;
    a weight that has none is returned as it is. The model, whose adapter it must be, may be on the meta device."""
    known, tensors = rosa.read_adapter(directory)
    if "peft" in known:
        raise ValueError(f"{directory} is an adapter of peft's own, of type {known['peft']['peft_type']}: only peft can merge it")
    rosa.check_lora(directory, tensors, model, known)

    def updated(name, weight):
        name = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" not in tensors:
            return weight
        A, B = (tensors[f"{name}.lora_{factor}.weight"].float() for factor in "AB")
        return weight.float() + (known["alpha"] / known["rank"]) * B @ A

    return updated


def main(args):
    """Merge, and say what it has cost."""
    before, after = merge_checkpoint(find_checkpoint(args.ckpt), args.adapter, args.out)
    same = (before.argmax(-1) == after.argmax(-1)).sum()
    print(
        f"{args.out} holds the merged checkpoint. Its rounding moved a logit by {(after - before).abs().max():.2g} at most (the "
        f"largest is {before.abs().max():.3g}); of {len(before)} next tokens {same} are the same."
    )


def run(arguments=None):
    parser = command_parser("merge", __doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint: a directory, or a name as train.py takes it")
    parser.add_argument("--adapter", required=True, type=Path, help="adapter directory, as train.py or PEFT writes it")
    parser.add_argument("--out", required=True, type=Path, help="directory to be made: a complete Hugging Face checkpoint")
    run_command("merge", main, parser.parse_args(arguments))


if __name__ == "__main__":
    run()
