"""A fuzzer of everything that is read: config.json, an index, a safetensors header, an adapter,
data files.

A case flips, cuts and inserts bytes in one good file, or puts another value into its JSON. Then the
file is read as the scripts read it. Either it is refused, by a UserError whose message is one line,
or the result is what json and NumPy, independently, read in the same bytes; and this takes at most
5 seconds and 200 MB. The seed and the number of a case decide it, so that it can be repeated.
`python tests/fuzz/bench_fuzz.py` runs thousands of cases."""

import contextlib
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import reference
import torch
from helpers import random_model, randomise_adapters
from safetensors.torch import load_file, save_file

import rosa
from data import tasks
from data.errors import UserError
from extras import adapters
from extras.checkpoints import load_model
from extras.commands import one_line

TOKENS = [3, 1, 4, 1, 5]
SECONDS, BYTES = 5, 200 * 2**20  # the most that one case may take
MODEL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
PIECES = [b"9" * 30, b"9" * 5000, b"[" * 2000, b"\xff", b"\0", b"\n", b"\\ud800", b"\xe2\x80\xa8"]
PIECES += b'- 0 1e999 NaN -Infinity null true {} [] "" " \\ { } , : ../ /'.split()
PIECES += b".5 e9 F16 BF16 F64 llama".split()
VALUES = [None, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, 0.5, 1e300, 1e-300, math.nan, math.inf]
VALUES += [
    "",
    "1",
    "a",
    "x" * 10**5,
    "\0",
    "\ud800",
    "../a",
    "/etc/passwd",
    "inf",
    "linear",
    "mistral",
    "qwen2",
]
VALUES += [[], [[]], {}, [1, 2], {"a": 1}, {"rope_type": "linear", "factor": 2.0}]


# --- how a file is changed ---


def mutated(rng, content, part):
    """The bytes of a file with one to three changes, made in one part of it."""
    change = rng.choice((changed_bytes, changed_values))
    if part == "all":
        return change(rng, content)
    (size,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + size], content[8 + size :]
    if part == "metadata":
        header = json.loads(text)
        header["__metadata__"]["rosa"] = change(
            rng, header["__metadata__"]["rosa"].encode()
        ).decode(errors="replace")
        text = json.dumps(header).encode()
    elif rng.random() < 0.3:  # change the 8 bytes of the length too, or leave a wrong length there
        return changed_bytes(rng, content[: 8 + size]) + data
    else:
        text = change(rng, text)
    return struct.pack("<Q", len(text)) + text + data


def changed_values(rng, content):
    """Change one place in a JSON text, or in one of its lines: put another value there, take a key
    away, or give a key another name."""
    lines = content.split(b"\n") if content.count(b"\n{") > 2 else [content]
    at = rng.randrange(len(lines))
    value = holder = {"": json.loads(lines[at] or b"0")}
    key = ""
    while (
        isinstance(holder[key], (dict, list)) and holder[key] and (key == "" or rng.random() < 0.9)
    ):
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    old, others = holder[key], list(holder.values()) if isinstance(holder, dict) else holder
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
        if rng.random() < 0.5:
            holder[rng.choice(("", key + "s", key.upper(), "x" * 10**5, "\ud800\x1b", *holder))] = (
                old
            )
    else:
        number = type(old) in (int, float)
        near = (
            [old - 1, old + 1, old + 2**63, -old, old / 2, old * 10**9]
            if number
            else [[old], {"a": old}]
        )
        holder[key] = rng.choice([*near, *near, *VALUES, rng.choice(others)])
    lines[at] = json.dumps(value.get("")).encode()
    return b"\n".join(lines)


def changed_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, count = rng.randrange(len(content) or 1), rng.choice((1, 1, 2, 5, 20))
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        # A changed digit leaves the file valid JSON, which may be accepted and read wrongly
        if digits and rng.random() < 0.2:
            content[rng.choice(digits)] = rng.choice(b"0123456789")
        else:
            new = rng.choice(
                (b"", rng.randbytes(count), content[at : at + count], rng.choice(PIECES))
            )
            content[at : at + rng.choice((0, 0, 0, 1, count, len(content)))] = new
    return bytes(content)


# --- what must hold of a file that is accepted ---


def write_good_files(directory):
    ckpt, sharded, test_set = (
        directory / "ckpt",
        directory / "sharded",
        directory / "dataset" / "gsm8k",
    )
    for folder in (sharded, test_set):
        folder.mkdir(parents=True)
    model = random_model(**MODEL)
    model.save_pretrained(ckpt)
    tensors = load_file(ckpt / "model.safetensors")
    shutil.copy(ckpt / "config.json", sharded)
    weight_map = {name: f"{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
            sharded / file,
        )
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}, indent=1)
    )
    rosa.save_adapter(
        randomise_adapters(rosa.attach(model, 2, 4, 0.5, "q,v")), directory / "adapter"
    )
    rows = [
        (f"Add {i} and 1.", "é\u2028" * (i % 2), f"It is {i + 1}.", str(i + 1)) for i in range(4)
    ]
    records = [dict(zip(("instruction", "input", "output", "answer"), row)) for row in rows]
    lines = [dict(zip(("prompt", "input", "completion"), row)) for row in rows]
    (test_set / "test.json").write_text(json.dumps(records, ensure_ascii=False, indent=1))
    (directory / "data.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )


def tensors_of(content):
    """The tensors in the bytes of a safetensors file, read by json and NumPy: name -> float64
    array."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        raw = data[entry["data_offsets"][0] : entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":  # two bytes: the upper half of a float32
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry["dtype"]])
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


def check_equal(model, expected, what):
    tensors = model.state_dict()
    assert set(tensors) == set(expected), f"{what}: {sorted(set(tensors) ^ set(expected))[:3]}"
    for name, value in expected.items():
        assert np.array_equal(tensors[name].double().numpy(), value, equal_nan=True), (
            f"{what}: {name} differs"
        )


def read_config(directory, content):
    """Read config.json. The fields are those that json reads, and the model computes what the NumPy
    reference computes with them."""
    model = load_model(directory / "ckpt")
    raw, config = json.loads(content.decode("utf-8")), model.config
    for name in {*vars(config)} - {
        "rope_scaling",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
    }:
        value = raw.get(name)
        if name in ("rms_norm_eps", "rope_theta") and value is not None:
            value = float(value)
        assert value in (None, getattr(config, name)), (
            f"{name} is {getattr(config, name)!r}, config.json says {value!r}"
        )
    if config.context >= len(TOKENS):
        with np.errstate(all="ignore"), torch.inference_mode():
            expected = reference.logits(directory / "ckpt", TOKENS)
            logits = model(torch.tensor([TOKENS]))[0].double().numpy()
        same = np.allclose(logits, expected, atol=1e-3, rtol=1e-3, equal_nan=True)
        assert same, "the logits are not those of the reference"


def read_weights(directory, content):
    """Read model.safetensors. Every tensor holds what NumPy reads at its offsets, whether the file
    is copied into memory or mapped."""
    for mapped in (False, True):
        check_equal(
            load_model(directory / "ckpt", mapped=mapped), tensors_of(content), "model.safetensors"
        )


def read_index(directory, content):
    """Read the index. No shard lies outside the directory, and every tensor holds what its shard
    holds."""
    sharded, expected = directory / "sharded", {}
    model = load_model(sharded)
    for file in set(json.loads(content)["weight_map"].values()):
        assert (sharded / file).resolve().parent == sharded.resolve(), f"{file} lies outside"
        expected |= tensors_of((sharded / file).read_bytes())
    check_equal(model, expected, "the shards")


def read_adapter(directory, content):
    """Read the adapter. Whatever its metadata says, the update of each weight is alpha / rank * B
    A, with the A and B that NumPy reads."""
    model = adapters.load_adapter(random_model(**MODEL), directory / "adapter")
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = tensors_of((directory / "adapter" / "adapter_model.safetensors").read_bytes())
    scale = config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )
    modules = rosa.adapters(model)
    names = {f"base_model.model.{name}.lora_{factor}.weight" for name in modules for factor in "AB"}
    assert names == set(tensors), "other tensors are adapted"
    for name, adapter in modules.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        rows = np.zeros_like(B)
        rows[adapter.rows.numpy()] = adapter.B.detach().double().numpy()
        with np.errstate(all="ignore"):
            update = adapter.alpha / adapter.rank * rows @ adapter.A.detach().double().numpy()
            assert np.allclose(update, scale * B @ A, equal_nan=True), f"{name} has another update"


def read_train_file(directory, content):
    check_examples(
        tasks.load_examples(directory / "data.jsonl"), content, ("instruction", "output")
    )


def read_test_set(directory, content):
    examples = [example for _, example in tasks.test_examples("gsm8k", directory)]
    check_examples(examples, content, ("instruction", "answer"))
    assert all(math.isfinite(float(example["answer"].replace(",", ""))) for example in examples), (
        "no number"
    )


def check_examples(examples, content, needed):
    """The examples are the records that json reads, in an array or one on each line."""
    text = content.decode("utf-8").removeprefix("\ufeff").lstrip()
    lines = [line for line in text.split("\n") if line.strip()]
    records = json.loads(text if text[0] == "[" else f"[{','.join(lines)}]")
    assert len(examples) == len(records), f"{len(examples)} examples of {len(records)} records"
    for example, record in zip(examples, records):
        pairs = ("instruction", "output"), ("prompt", "completion"), ("question", "answer")
        every = [dict(zip(("instruction", "output"), pair)) for pair in pairs]
        names = next(
            n for n in every if all(record.get(n.get(field, field)) is not None for field in needed)
        )
        for field in (*needed, "input"):
            value = record.get(names.get(field, field))
            if isinstance(value, (bool, int, float)):
                value = json.dumps(value) if value == value else None
            right = example.get(field) == value and (
                field not in needed or isinstance(value, str) and value
            )
            assert right, f"{field} is {example.get(field)!r}, the record says {value!r}"
        tasks.prompt_text(example).encode()


KINDS = {  # kind -> (file, function that reads and checks it, part of the file that is changed)
    "config.json": ("ckpt/config.json", read_config, "all"),
    "index": ("sharded/model.safetensors.index.json", read_index, "all"),
    "safetensors header": ("ckpt/model.safetensors", read_weights, "header"),
    "adapter config": ("adapter/adapter_config.json", read_adapter, "all"),
    "adapter header": ("adapter/adapter_model.safetensors", read_adapter, "header"),
    "adapter metadata": ("adapter/adapter_model.safetensors", read_adapter, "metadata"),
    "train file": ("data.jsonl", read_train_file, "all"),
    "test set": ("dataset/gsm8k/test.json", read_test_set, "all"),
}


def run(cases, seed, directory):
    """Run the cases with these numbers, in a directory that is empty at first. Returns kind ->
    counts. Raises where a file is neither refused cleanly nor read rightly."""
    write_good_files(directory)
    contents = {kind: (directory / file).read_bytes() for kind, (file, _, _) in KINDS.items()}
    for kind, (file, read, _) in KINDS.items():
        assert outcome(read, directory, contents[kind], file) == "accepted", (
            f"{kind}: the good file is refused"
        )
    signal.signal(signal.SIGALRM, too_long)
    counts = {kind: Counter() for kind in KINDS}
    for case in cases:
        kind = list(KINDS)[case % len(KINDS)]
        file, read, part = KINDS[kind]
        content = mutated(random.Random(f"{seed} {case}"), contents[kind], part)
        (directory / file).write_bytes(content)
        before = peak_bytes()
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            counts[kind].update(["cases", outcome(read, directory, content, file)])
            assert peak_bytes() - before <= BYTES, (
                f"it took {(peak_bytes() - before) / 2**20:.0f} MB"
            )
        except BaseException as error:
            error.add_note(f"{kind}, seed {seed}, case {case}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            (directory / file).write_bytes(contents[kind])
    return counts


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def too_long(*_):
    raise AssertionError(f"it took more than {SECONDS} seconds")


def outcome(read, directory, content, file):
    """Read a file. Returns "refused" or "accepted"; raises where the file is read wrongly, or not
    refused cleanly."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            # A warning would be a line on stderr that nobody meant to print
            warnings.simplefilter("error")
            read(directory, content)
    except UserError as error:
        line = one_line(error)
        clean = line.isprintable() and len(line) <= 700 and Path(file).parts[0] in line
        assert clean, f"the refusal {line!r} names no file or is no line"
        return "refused"
    return "accepted"
