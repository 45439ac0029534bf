"""Where a checkpoint lies, what other writers than transformers have put into it, what is wrong
with it, and what it runs on.
`--ckpt llama2-7b` finds the files; a file that is absent or broken is one line that says what to
download or fix.
Without it: Llama.from_pretrained(directory, device, dtype) for a directory that transformers has
written; a mistake is a traceback.
"""

import codecs
import functools
import json
import math
import os
import re
import shutil
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.errors import UserError, read_text, refusals_of, user_file
from extras.distributed import is_first, processes
from extras.quantize import Int8Linear, is_quantized, quantize
from extras.source import HERE, edited
from model import FAMILIES, Llama, LlamaConfig

NAMES = {  # short names of repositories on the Hugging Face Hub
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}


def find_checkpoint(ckpt):
    """The directory that `ckpt` names: itself, `checkpoints/<ckpt>`, the bundled `data/<ckpt>`, or
    what Hugging Face's cache holds of the repository `ckpt`, an org/name or a key of NAMES. Raises
    UserError with how to get it."""
    for directory in (Path(ckpt), Path("checkpoints") / ckpt, HERE / "data" / ckpt):
        if (directory / "config.json").is_file():
            return directory
    refuse_adapter(Path(ckpt))
    if Path(ckpt).is_dir():
        raise UserError(
            f"the directory {str(ckpt)!r} has no config.json: give that of a Hugging Face "
            "checkpoint"
        )
    repository = NAMES.get(str(ckpt), str(ckpt))
    absent = f"no checkpoint {str(ckpt)!r}: neither a directory of that name nor checkpoints/{ckpt}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(
            f"{absent}; the names known are tiny, {', '.join(NAMES)}, and any org/name on the "
            "Hugging Face Hub"
        )
    cache = hub_cache() / ("models--" + repository.replace("/", "--"))
    head = cache / "refs" / "main"
    directory = cache
    if head.is_file():
        # The file names a commit. Only the last part of that name counts, so that it leads nowhere
        # else.
        commit = Path(head.read_text(errors="replace").strip()).name
        directory = cache / "snapshots" / commit
    if is_whole(directory):
        return directory
    there = ""
    for snapshot in sorted(cache.glob("snapshots/*")):
        if is_whole(snapshot):
            raise UserError(
                f"{absent}; Hugging Face's cache holds {repository}, but {head} does not name what "
                f"is there: --ckpt {snapshot}"
            )
        refuse_adapter(snapshot)
        names = sorted(file.name for file in snapshot.iterdir())
        pickles = [name for name in names if re.match(r"(pytorch_model|consolidated).*\.", name)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            there = f" ({snapshot} has pickled weights only, {pickles[0]}, which are not read)"
    files = "['*.json', '*.txt', '*.md', '*.jinja', 'LICENSE*', 'tokenizer*', 'model*.safetensors']"
    fetch = (
        "from huggingface_hub import snapshot_download as get; "
        f"get('{repository}', allow_patterns={files})"
    )
    # Double quotes outside: so this line runs in every shell, that of Windows included.
    advice = f'To download it (pip install huggingface_hub): python -c "{fetch}"'
    if there:
        advice = "Choose a checkpoint that has model.safetensors, or convert it"
    raise UserError(
        f"{absent}, and Hugging Face's cache {hub_cache()} does not hold {repository}{there}. "
        f"{advice}"
    )


def refuse_adapter(directory):
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is an adapter's directory: give it by --adapter (eval.py), and its base "
            "model by --ckpt"
        )


def is_whole(directory):
    """Whether a directory in the cache has a config and weights."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def hub_cache():
    """Where huggingface_hub keeps what it downloads, by the variables that it heeds."""
    cache = Path("~", ".cache")
    for name, folder in (
        ("XDG_CACHE_HOME", "huggingface"),
        ("HF_HOME", "hub"),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HUB_CACHE", ""),
    ):
        cache = Path(os.environ.get(name) or cache) / folder
    return Path(os.path.expandvars(cache.expanduser()))


# The files beside config and weights on which an answer depends
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
# What a new checkpoint does not take over from an older one: weights in whatever format, pickles,
# archives, and what a run of train.py or an adapter has left there
WEIGHTS = (
    ".safetensors .bin .pt .pth .ckpt .pkl .pickle .joblib .h5 .msgpack .onnx .onnx_data .gguf"
)
WEIGHTS += " .ggml .tflite .npz .npy .distcp .nemo .zip .tar .gz .partial"
OF_A_RUN = "args.json log.jsonl layers.jsonl summary.json run.png results.json predictions.jsonl"
OF_A_RUN += " losses.json adapter_config.json"


def companions(ckpt):
    """The tokenizer's files and the generation config of a checkpoint directory."""
    files = set()
    for pattern in COMPANIONS:
        files |= {file for file in ckpt.glob(pattern) if file.is_file()}
    return sorted(files)


def copy_companions(source, directory):
    """Copy all that a checkpoint directory holds beside config and weights: the tokenizer, chat
    templates, the licence. No pickle is copied."""
    for file in [*source.iterdir(), *source.glob("additional_chat_templates/*")]:
        is_weight = file.suffix in WEIGHTS.split() or file.name.endswith(".index.json")
        is_other = file.name in ("config.json", *OF_A_RUN.split()) or file.name.startswith(".")
        if is_weight or is_other or not file.is_file():
            continue
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        if file.suffix == ".json":
            copy_json(file, copy)
        else:
            shutil.copyfile(file, copy)


def copy_json(file, copy):
    """Copy a JSON file without the byte order mark that it may have, which transformers refuses."""
    copy.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))


def name_end(directory, eos_id):
    """Let config.json and generation_config.json in a checkpoint directory name the id `eos_id`
    among those that end an answer, so that the `generate` of transformers stops there. Where the
    second file exists, transformers looks there alone."""
    config_file, generation_file = directory / "config.json", directory / "generation_config.json"
    config = read_json(config_file, missing={})
    generation = read_json(generation_file, missing={})
    in_config = as_list(config.get("eos_token_id"))
    in_generation = as_list(generation.get("eos_token_id"))
    if in_config and eos_id not in in_config:
        write_ends(config_file, config, [*in_config, eos_id])
    if eos_id not in in_generation and (generation_file.exists() or not in_config):
        others = [i for i in in_generation or in_config if i != eos_id]
        write_ends(generation_file, generation, [*others, eos_id])


def as_list(ids):
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def write_ends(file, raw, ids):
    ends = ids if len(ids) > 1 else ids[0]
    file.write_text(json.dumps(raw | {"eos_token_id": ends}, indent=2) + "\n")


def choose_device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) for two flags. Device "auto": CUDA, then MPS, then the CPU. Dtype
    "auto": bfloat16 where the device computes it natively (CUDA, CPUs with AVX512-BF16 or AMX),
    float16 on other CUDA devices, float32 elsewhere."""
    if device == "auto":
        device = "cpu"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    if device == "cuda" and processes()[1] > 1:  # each process of a machine has a device of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device).item()  # "meta" has no numbers
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(
            f"device {device!r} is not available ({reason}): choose auto, cpu, cuda or mps"
        ) from None
    device = torch.device(device)
    if dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
        if computes_bfloat16(device):
            dtype = "bfloat16"
    return device, getattr(torch, dtype)


def computes_bfloat16(device):
    """Whether a device has instructions for bfloat16. Where it has none PyTorch computes it in
    software, slowly."""
    if device.type == "cpu":
        names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def say_if_bfloat16_is_slow(device, dtype):
    """Print a warning if the user chose bfloat16 and this processor emulates it."""
    if dtype == torch.bfloat16 and not computes_bfloat16(device) and is_first():
        name = "processor" if device.type == "cpu" else "device"
        print(
            f"this {name} computes bfloat16 in software, slowly: --dtype float32 is faster here",
            file=sys.stderr,
        )


def say_if_begin_is_unstated(ckpt, tokenizer):
    """Print a line where a checkpoint does not say whether its texts begin with a token, and
    transformers begins them otherwise than data/tokenizer.py."""
    if not tokenizer.begin_is_stated and tokenizer.bos_id is not None and is_first():
        print(
            f"tokenizer  {ckpt} does not say whether token {tokenizer.bos_id} begins a text: it "
            'does here, not in transformers 5. "add_bos_token": true in tokenizer_config.json says '
            "it to both"
        )


# --- loading: what writers other than transformers do is translated here, and nowhere else ---


class Stored(NamedTuple):
    """Where a parameter of the model lies: a tensor in a file, or some of its rows."""

    file: Path
    name: str  # the tensor's name in the file
    shape: tuple  # of the parameter
    dtype: str  # as safetensors names it: BF16
    rows: slice | None = None  # None: the parameter is the whole tensor


class Checkpoint(NamedTuple):
    """What a checkpoint directory holds, in the words of model.py."""

    directory: Path
    raw: dict  # config.json as it stands
    stored: dict  # name in the files -> Stored
    config: LlamaConfig
    table: dict  # parameter's name -> Stored
    model: Llama  # the config's model on the meta device: its shapes without memory


def read_checkpoint(directory):
    """The Checkpoint in a directory: config.json and the headers of the safetensors files, each
    read once. Raises UserError for what is wrong with them, and for tensors that do not fit the
    config."""
    directory = Path(directory)
    raw, config = read_config(directory)
    stored = stored_tensors(directory)
    table = translate_names(stored, config)
    head = table.get("lm_head.weight")
    embedding = table.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and embedding:
        # The config says that lm_head is the embedding, and an lm_head is stored: it counts, unless
        # it is an equal copy.
        is_copy = torch.equal(read_tensor(head), read_tensor(embedding))
        config.tie_word_embeddings = is_copy
        if is_copy:
            del table["lm_head.weight"]
    checkpoint = Checkpoint(directory, raw, stored, config, table, meta_model(config))
    check_fit(checkpoint)
    return checkpoint


def read_config(directory):
    """(config.json as it stands, the LlamaConfig that it makes with generation_config.json)."""
    raw = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json", missing={})
    return raw, translate_config(directory, raw, generation)


def translate_config(directory, raw, generation):
    """The LlamaConfig of a config.json and a generation_config.json, whatever has written them.
    Raises UserError naming the file and the field."""
    path = directory / "config.json"
    try:
        check_config(raw, generation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    raw = dict(raw)
    if raw.get("architectures"):
        raw["architectures"] = [usual_architecture(name) for name in raw["architectures"]]
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = scaling_of(raw)
    if rope.get("rope_type") == "linear" and "original_max_position_embeddings" not in rope:
        # The config does not say whether max_position_embeddings is before or after the scaling:
        # it is taken to be before.
        longest = stated_context(raw)
        rope["original_max_position_embeddings"] = longest
        raw["max_position_embeddings"] = int(longest * rope["factor"])
    raw[key] = rope
    try:
        with refusals_of("model"):
            return LlamaConfig.from_dict(raw, generation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def scaling_of(raw):
    """rope_scaling, or rope_parameters, of a config.json, by the names of transformers 5."""
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if "type" in rope:  # as transformers called it before 4.43
        rope.setdefault("rope_type", rope.pop("type"))
    if rope.get("rope_type") == "llama3":
        # It may stand beside rope_scaling, where it comes first for transformers, or nowhere.
        context = raw.get("original_max_position_embeddings")
        if context is None:
            context = rope.get("original_max_position_embeddings", stated_context(raw))
        rope["original_max_position_embeddings"] = context
    return rope


def stated_context(raw):
    """max_position_embeddings of a config.json, or its family's default."""
    _, defaults = FAMILIES.get(raw.get("model_type"), (None, {}))
    fields = {"max_position_embeddings": LlamaConfig.max_position_embeddings} | defaults | raw
    return fields["max_position_embeddings"]


def usual_architecture(name):
    """LLaMAForCausalLM of early checkpoints, and LlamaModel of those that were saved without their
    lm_head, as LlamaForCausalLM."""
    return str(name).replace("LLaMA", "Llama").replace("Model", "ForCausalLM")


def translate_names(stored, config):
    """Parameter's name -> Stored, from the name in the files -> Stored. A tensor whose name is
    known neither here nor in model.py keeps it, and check_fit refuses it."""
    table = {}
    for stored_name, entry in stored.items():
        if stored_name.endswith("rotary_emb.inv_freq"):
            continue  # from before transformers 4.32: computed in model.py
        name = parameter_name(stored_name)
        for part, part_of_entry in split(name, entry, config).items():
            if part in table:
                both = f"{part} is in {table[part].file} and in {entry.file.name}"
                raise UserError(f"{both}: download the checkpoint again")
            table[part] = part_of_entry
    return table


def parameter_name(stored_name):
    """A tensor's name in model.py. A checkpoint that was saved without its lm_head leaves the
    prefix "model." out."""
    if stored_name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"model.{stored_name}"
    return stored_name


def fused_projections(config):
    """The projections that are stored as one: its name -> {projection: number of its rows}."""
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    mlp_size = config.intermediate_size
    return {
        "qkv_proj": {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size},
        "gate_up_proj": {"gate_proj": mlp_size, "up_proj": mlp_size},
    }


def split(name, entry, config):
    """The parameters that a tensor holds, name -> Stored: one, or where projections are fused each
    of them, which is some of the tensor's rows."""
    module, _, leaf = name.rpartition(".")  # model.layers.0.mlp.gate_up_proj, weight
    parent, _, projection = module.rpartition(".")
    sizes = fused_projections(config).get(projection, {})
    if entry.shape[:1] != (sum(sizes.values()),):
        return {name: entry}
    parts = {}
    first = 0
    for part, size in sizes.items():
        rows = slice(first, first + size)
        shape = (size, *entry.shape[1:])
        parts[f"{parent}.{part}.{leaf}"] = entry._replace(rows=rows, shape=shape)
        first += size
    return parts


# load_model replaces this method, as long as it is the one of this fingerprint.
PLAIN = {(Llama, "from_pretrained"): "5429502ac6db"}


def load_model(ckpt, device="cpu", dtype=None, mapped=False, quantization=None):
    """The model in a checkpoint directory, any that this project reads. dtype None: as stored.
    Raises UserError for what is wrong with its files.

    mapped: the weights stay memory-mapped, as stored, and take memory as they are read. Else one
    tensor at a time goes from its file to its place, file by file, the largest of each first; a
    file is opened anew for each tensor, so that what was read of it leaves memory.

    quantization: "int8" makes the linear layers of extras/quantize.py of those in the transformer's
    layers, each as soon as its weight is read."""
    if reason := edited(PLAIN):
        print(f"checkpoint {reason}: loading by Llama.from_pretrained")
        with refusals_of("model"):
            model = Llama.from_pretrained(ckpt, device, dtype)
        model.quantization = quantization
        if quantization:
            quantize(model)
        return model
    checkpoint = read_checkpoint(ckpt)
    say_what_is_inferred(checkpoint)
    model, table = checkpoint.model, checkpoint.table
    if dtype is None:
        dtype = dtype_as_stored(checkpoint)

    def file_and_size(name):
        return table[name].file, -math.prod(table[name].shape)

    for name in sorted(table, key=file_and_size):
        tensor = read_tensor(table[name])
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if quantization and leaf == "weight" and is_quantized(path, module):
            layer = Int8Linear(tensor.to(device), module.bias, dtype)
            model.set_submodule(path, layer)
            continue
        if not mapped:
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
        setattr(module, leaf, nn.Parameter(tensor))
    model.tie_weights()
    model.quantization = quantization
    model.name_or_path = hub_name(ckpt)  # PEFT looks there
    return model.eval()


def meta_model(config):
    """The model of a config on the meta device: its shapes without memory."""
    with torch.device("meta"):
        return Llama(config)


def unloaded(directory):
    """The model that `load_model` makes of a checkpoint directory, before it has weights: on the
    meta device, which holds shapes alone. Raises UserError for what is wrong with config.json."""
    if edited(PLAIN):
        with refusals_of("model"):
            return meta_model(LlamaConfig.from_file(directory))
    return meta_model(read_config(Path(directory))[1])


def say_what_is_inferred(checkpoint):
    """Print a line for each thing that is taken otherwise than config.json has it."""
    config, raw = checkpoint.config, checkpoint.raw
    if config.context != stated_context(raw):
        reason = f"linear scaling by {(config.rope_scaling or {}).get('factor')} of what it has"
        if config.context == config.sliding_window:
            reason = "the sliding window"
        print(
            f"context    taken to be {config.context} tokens, not {stated_context(raw)} as in "
            f"config.json: {reason}"
        )
    if raw.get("tie_word_embeddings") and not config.tie_word_embeddings:
        print(
            f"{checkpoint.directory}: lm_head is not the embedding to which config.json ties it: "
            "both are kept"
        )


DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def dtype_as_stored(checkpoint):
    """The dtype of a checkpoint's tensors. Where they have different dtypes: the one that
    config.json states, or else the one to which all of them can be converted exactly."""
    dtypes = {DTYPES[entry.dtype] for entry in checkpoint.table.values()}
    raw = checkpoint.raw
    stated = getattr(torch, str(raw.get("dtype", raw.get("torch_dtype"))), None)
    if len(dtypes) > 1 and stated in DTYPES.values():
        return stated
    return functools.reduce(torch.promote_types, dtypes)


def hub_name(ckpt):
    """What an adapter calls its base: org/name of a checkpoint in Hugging Face's cache, the
    directory of another."""
    # In that cache a checkpoint is models--org--name/snapshots/<commit>.
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+$", Path(ckpt).as_posix())
    return "/".join(cached.groups()) if cached else str(Path(ckpt).absolute())


def check_finite(model):
    """Raise FloatingPointError, which names a weight or an adapter's matrix that holds a NaN or an
    infinity. With such a weight no answer makes sense. The sum over a weight is not finite if one
    of its numbers is not, and takes one reading of the weight."""
    for name, parameter in model.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise FloatingPointError(
                f"{name} holds numbers that are not finite: download it, or train it, again"
            )


# Fields of config.json that are whole numbers -> the largest that is accepted. A larger one is a
# mistake: not even a model on the meta device could be made.
WHOLE_NUMBERS = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 2**24
)
WHOLE_NUMBERS |= {"num_hidden_layers": 2**10, "max_position_embeddings": 2**24}
OPTIONAL_WHOLE_NUMBERS = dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), 2**24)


def check_config(raw, generation):
    """Look at each value in config.json and generation_config.json before it is used. Raises
    UserError naming the field."""
    for name, largest in (WHOLE_NUMBERS | OPTIONAL_WHOLE_NUMBERS).items():
        value = raw.get(name, 1)
        if value is None and name in OPTIONAL_WHOLE_NUMBERS:
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(f"{name} must be a whole number from 1 to {largest:,}, not {value!r}")
    if raw.get("num_attention_heads", 1) * (raw.get("head_dim") or 1) > 2**24:
        raise UserError("num_attention_heads x head_dim is more than 2^24")
    for name in ("architectures", "layer_types"):
        if not isinstance(raw.get(name), list | None):
            raise UserError(f"{name} must be a list, not {raw[name]!r}")
    for name, field in LlamaConfig.__dataclass_fields__.items():
        if field.type is bool and raw.get(name) not in (True, False, None):
            raise UserError(f"{name} must be true or false, not {raw[name]!r}")
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = raw.get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos]
    for token in tokens:
        if token is not None and type(token) is not int:
            where = "eos_token_id, here or in generation_config.json,"
            raise UserError(f"{where} must be a token id or a list of them, not {eos!r}")
    if not isinstance(raw.get("model_type", ""), str):
        raise UserError(f"model_type {raw['model_type']!r} is not implemented")
    check_positive("rms_norm_eps", raw.get("rms_norm_eps", 1.0))
    check_rope(raw)


def check_rope(raw):
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling must be an object, not {rope!r}")
    rope = scaling_of(raw)
    check_positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 1.0)))
    numbers = {"linear": ["factor"]}
    numbers["llama3"] = [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ]
    for name in numbers.get(str(rope.get("rope_type")), ()):
        check_positive(f"rope_scaling's {name}", rope.get(name))
    low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 1)
    if low >= high:
        raise UserError(
            f"rope_scaling's low_freq_factor {low} is not below its high_freq_factor {high}"
        )


def check_positive(name, value):
    if type(value) not in (int, float) or not 0 < value < 1e38:  # within float32
        raise UserError(f"{name} must be a positive number, not {value!r}")


def check_fit(checkpoint):
    """Raise UserError naming the first tensors that do not fit the config: the parameters of its
    model are all that a checkpoint holds."""
    parameters = checkpoint.model.named_parameters()
    needed = {name: tuple(parameter.shape) for name, parameter in parameters}
    stored = checkpoint.table
    missing = [f"missing {name}" for name in sorted(needed.keys() - stored.keys())]
    unexpected = [f"unexpected {name}" for name in sorted(stored.keys() - needed.keys())]
    problems = []
    for pair in zip_longest(missing, unexpected):  # in turn, so that both kinds are shown
        problems += filter(None, pair)
    for name in [name for name in needed if name in stored]:
        entry = stored[name]
        if entry.shape != needed[name]:
            problems.append(
                f"{name} has shape {list(entry.shape)}, config.json says {list(needed[name])}"
            )
        if entry.dtype not in DTYPES:
            problems.append(
                f"{name} is stored as {entry.dtype}, not as a float of 16, 32 or 64 bits"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{checkpoint.directory}: the tensors do not fit the config: "
            f"{'; '.join(problems[:5])}{more}. Download both again, of one model; a parameter of "
            "your own, in model.py, is made only where a field of LlamaConfig says so"
        )


def read_tensor(stored):
    """A parameter of a checkpoint, memory-mapped from its file: what is read of it leaves memory
    when the tensor does."""
    with safe_open(stored.file, framework="pt") as file:
        if stored.rows is None:
            return file.get_tensor(stored.name)
        return file.get_slice(stored.name)[stored.rows]


def stored_tensors(directory):
    """Name in the file -> Stored of every tensor in a checkpoint directory. Raises UserError for a
    file that is not whole."""
    table = {}
    for file in checkpoint_files(Path(directory)):
        try:
            with user_file(file):
                open(file, "rb").close()  # says why where it cannot: safe_open calls it absent
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name in table:
                        both = f"{name} is in {table[name].file} and in {file.name}"
                        raise UserError(f"{both}: download the checkpoint again")
                    entry = tensors.get_slice(name)
                    shape = tuple(entry.get_shape())
                    table[name] = Stored(file, name, shape, entry.get_dtype())
        except SafetensorError as error:
            with open(file, "rb") as opened:
                is_pointer = opened.read(40).startswith(b"version https://git-lfs")
            if is_pointer:
                raise UserError(
                    f"{file} is a Git LFS pointer, not the weights: git lfs pull"
                ) from None
            raise UserError(
                f"{file} is not a whole safetensors file ({error}): download it again"
            ) from None
    return table


def checkpoint_files(directory):
    """The safetensors files of a checkpoint directory. Raises UserError saying what else lies
    there."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(
            file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth")
        )
        if pickled:
            problem = (
                f"{directory} holds only pickled weights ({pickled[0]}), which can run code "
                "when they are loaded"
            )
            raise UserError(f"{problem}: download or convert to model.safetensors")
        names = f"no {single.name} and no {index.name}"
        raise UserError(f"{directory} has {names}: download them")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(
            f"{index} has no weight_map from tensor names to file names: download it again"
        )
    files = [directory / file for file in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != directory or file.name in ("", ".", ".."):
            problem = f"{index} names a file outside its directory, {file}"
            raise UserError(f"{problem}: download the checkpoint again")
        with user_file(file):  # a name may be too long for a disk
            is_there = file.is_file()
        if not is_there:
            raise UserError(f"{index} names {file.name}, which is absent: download it")
    return files


def read_json(path, missing=None):
    """The JSON object in a file. Raises UserError naming the file; an absent file is `missing`, if
    that is given."""
    if missing is not None and not Path(path).exists():
        return missing
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or a thousand brackets
        raise UserError(f"{path} is not a JSON file ({error}): fix or download it") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds {type(value).__name__}, not a JSON object: fix or download it"
        )
    return value
