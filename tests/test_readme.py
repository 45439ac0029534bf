"""Statements about the README files: what they quote, name, link to and claim is so, and their
commands run."""

import ast
import glob
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run, write_test_sets

import eval as eval_script
import rosa
import train
from data import download, toy
from model import Llama

READMES = ["README.md", "data/README.md", "extras/README.md", "tests/README.md"]
TEXT = {name: (ROOT / name).read_text() for name in READMES}
FENCED = re.compile(
    r"(?:<!-- from (?P<file>\S+?)(?P<order>, in this order)? -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)```",
    re.S,
)
SCRIPTS = {"train.py": train, "eval.py": eval_script, "data/download.py": download}


def commands():
    """Every command in the README files that starts Python, as (README, command), in the order of
    the files."""
    for name, text in TEXT.items():
        lines = [line for block in FENCED.finditer(text) for line in block["text"].split("\n")]
        lines += re.findall(r"^    (.*)", FENCED.sub("", text), re.M)  # indented code
        spans = re.findall(r"`([^`]+)`", FENCED.sub("", text))
        for line in lines + [" ".join(span.split()) for span in spans]:
            for command in line.split(" && "):
                command = re.sub(r"  +#.*|  +<-.*", "", command).strip()
                if re.match(r"(\w+=\w+ )*(python3?|torchrun) (?!-c )", command):
                    yield name, command


COMMANDS = list(dict.fromkeys(commands()))


def split_command(command):
    """Split a command into the script or module and a list of arguments."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if "as_machine.py" in command:  # the command that it runs follows "--"
        words = words[words.index("--") + 1 :]
    if words[0] == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
        return words[0], words[1:]
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def parse_arguments(name, arguments):
    """Let a script or a command of extras/ parse its arguments, and do nothing else."""
    if name in SCRIPTS:
        SCRIPTS[name].parse_args(arguments)
        return
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name))["parse_args"](arguments)
        return
    importlib.import_module(name).parse_args(arguments)


@pytest.mark.parametrize("command", [command for _, command in COMMANDS])
def test_a_command_is_one_that_exists_with_options_that_exist(command, monkeypatch):
    name, arguments = split_command(command)
    if name in ("pytest", "venv"):
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
        return
    if not arguments:  # the text names the script or the module, and shows no command
        assert name in SCRIPTS or importlib.import_module(name).run
        return
    if "torchrun" in command:
        monkeypatch.setenv("WORLD_SIZE", "2")
    # "..." stands for the value of an option, or for more options: these are left out
    before = ["", *arguments]
    parse_arguments(
        name,
        [word for word, last in zip(arguments, before) if word != "..." or last.startswith("--")],
    )


def test_every_option_that_is_named_exists():
    """It is an option of ours, or of another program that a README calls."""
    ours = "".join(
        (ROOT / file).read_text()
        for file in ("train.py", "eval.py", "data/download.py", "extras/commands.py")
    )
    ours += "".join(path.read_text() for path in (ROOT / "extras").glob("*.py"))
    others = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--include"}
    for name, text in TEXT.items():
        for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - others:
            assert f'"{option}"' in ours, f"{name} names {option}"


def test_what_is_quoted_stands_in_the_file():
    quotes = [match for text in TEXT.values() for match in FENCED.finditer(text) if match["file"]]
    assert len(quotes) >= 3
    for quote in quotes:
        squeezed = " ".join((ROOT / quote["file"]).read_text().split())
        lines = [re.sub(r"  +#.*", "", line) for line in quote["text"].strip().split("\n")]
        parts = lines if quote["order"] else [quote["text"]]
        for part in (" ".join(part.split()) for part in parts):
            assert part in squeezed, f"{part} is not in {quote['file']}"
            squeezed = squeezed[squeezed.index(part) + len(part) :] if quote["order"] else squeezed


def test_every_link_leads_somewhere_and_every_file_named_is_there():
    for name, text in TEXT.items():
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if target.startswith("https://arxiv.org/abs/"):  # a paper
                continue
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), f"{name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
                slugs = {
                    re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                    for heading in headings
                }
                assert anchor in slugs, f"{name} links to {target}#{anchor}"
        for file in re.findall(r"`((?:[a-z]+/)*[a-z_0-9]+\.py)`", text):
            places = (
                ROOT,
                (ROOT / name).parent,
                *(ROOT / folder for folder in ("extras", "tests", "tests/benchmarks")),
            )
            assert any((place / file).is_file() for place in places), f"{name} names {file}"


def test_each_file_of_extras_says_in_its_own_words_what_it_is():
    said = " ".join(TEXT["extras/README.md"].split())
    for path in (ROOT / "extras").glob("[a-z]*.py"):
        first = " ".join(path.read_text().split('"""')[1].split("\n\n")[0].split())
        advice = f"extras/README.md lists each file of extras/: add how {path.name} begins"
        assert first in said, f"{advice}: {first}"


def number(pattern, text=TEXT["README.md"]):
    """The numbers that a sentence of a README states, in the groups of a pattern."""
    match = re.search(pattern, " ".join(text.split()))
    assert match, f"README.md no longer says {pattern}"
    return [float(group.replace(",", "")) for group in match.groups()]


def test_numbers_are_those_of_the_code():
    model = Llama.from_pretrained(ROOT / "data" / "tiny")
    parameters = sum(p.numel() for p in model.parameters())
    assert number(r"([\d.]+) million parameters\) was pre") == [round(parameters / 1e6, 1)]
    adapted = rosa.attach(model, rank=8, alpha=16)
    adapters = [p for adapter in rosa.adapters(adapted).values() for p in (adapter.A, adapter.B)]
    trained = sum(p.numel() for p in adapters)
    assert number(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)") == [
        trained,
        trained + parameters,
    ]
    args = train.parse_args([])
    assert number(r"--rank (\d+) --alpha (\d+) --select-every (\d+)") == [
        args.rank,
        args.alpha,
        args.select_every,
    ]
    assert number(r"`--low-freq-ratio` \(([\d.]+)\)") == [args.low_freq_ratio]
    assert number(r"Every (\d+)th step") == [args.select_every] and number(
        r"every (\d+) steps"
    ) == [args.eval_every]
    assert (
        len((ROOT / "requirements.txt").read_text().split()) == 5
        and "five packages" in TEXT["README.md"]
    )


# --- what takes longer ---


@pytest.mark.slow
def test_the_first_command_teaches_what_it_says(tmp_path):
    """Looks at the run that the first command has left in runs/, or makes the run anew."""
    out = ROOT / "runs" / "tiny-toy-rosa"
    if not (out / "results.json").is_file():
        out = tmp_path / "out"
        train_it = "train.py --rank 8 --lr 1e-2 --out".split()
        for script in (train_it, ["eval.py", "--adapter"]):
            subprocess.run(
                [sys.executable, *script, out], cwd=ROOT, check=True, capture_output=True
            )
    assert json.loads((out / "args.json").read_text())["max_steps"] is None
    low, high = number(r"\*\*(\d+) to (\d+) %\*\* after")
    assert low / 100 <= json.loads((out / "results.json").read_text())["micro"] <= high / 100
    lines = ROOT / "runs" / "tiny-toy-base" / "results.json"
    if lines.is_file():
        assert (
            json.loads(lines.read_text())["micro"] <= number(r"\*\*under (\d+) %\*\* of")[0] / 100
        )


@pytest.mark.slow
def test_every_command_runs_on_the_bundled_model(tmp_path, monkeypatch):
    """Commands without a placeholder run in the order of the README files, with the checkpoint
    `tiny` in the place of others, and with few steps and few questions."""
    monkeypatch.chdir(tmp_path)
    write_test_sets("LLM-Adapters", ["gsm8k", "SVAMP"])
    Path("LLM-Adapters/ft-training_set").mkdir()
    Path("LLM-Adapters/ft-training_set/math_10k.json").write_text(
        json.dumps(toy.examples("train", 40))
    )
    (block,) = [
        match["text"]
        for match in FENCED.finditer(TEXT["data/README.md"])
        if '"instruction"' in match["text"]
    ]
    Path("mine.jsonl").write_text(block)
    Path("examples.json").write_text(json.dumps(toy.examples("train", 40)))
    kinds = {"extras.figure1": ["--limit", "2"], "extras.make_tiny": ["--minutes", "0.005"]}
    kinds |= {"train.py": [], "eval.py": [], "extras.merge": [], "extras.compare": []}
    ran = 0
    for name, words in (
        split_command(command)
        for _, command in COMMANDS
        if not re.search("FILE|torchrun|help", command)
    ):
        if name not in kinds or "..." in words or not words:
            continue
        ckpt = "tiny"
        if "--ckpt" in words:
            place = words.index("--ckpt") + 1
            ckpt, words[place] = words[place], "tiny"
        if name == "train.py":
            out = str(train.parse_args(words).out).replace("tiny", ckpt, 1)
            words += [] if "--resume" in words else ["--overwrite"]
            run(train, *words, *f"--out {out} --max-steps 2 --eval-every 2 --val-size 1".split())
        elif name == "eval.py":
            run(eval_script, *words, *"--limit 2 --max-new-tokens 2".split())
        else:
            words = [
                path
                for word in words
                for path in (sorted(glob.glob(word)) if "*" in word else [word])
            ]
            importlib.import_module(name).run([*words, *kinds[name]])
        shutil.rmtree("merged", ignore_errors=True)
        ran += 1
    assert ran > 8


DIFFS = {
    match["text"].split("\n")[0]: match["text"]
    for match in FENCED.finditer(TEXT["extras/README.md"])
    if match["language"] == "diff"
}


def apply(diff, root):
    """Change the files of a copy as a diff says. A new file is written. Each text that the diff
    replaces must be in its file exactly once, unless the diff was applied before."""
    for part in re.split(r"^--- (?:a/.*|/dev/null)\n\+\+\+ b/", diff, flags=re.M)[1:]:
        file, *hunks = re.split(r"^@@.*\n|\n(?=@@)", part, flags=re.M)
        path = root / file.strip()
        for hunk in filter(str.strip, hunks):
            lines = [line for line in hunk.split("\n") if line]
            old, new = (
                "\n".join(line[1:] for line in lines if line[0] in f" {sign}") for sign in "-+"
            )
            if not old:
                path.write_text(new + "\n")
                continue
            text = path.read_text()
            if text.count(new + "\n") == 1:
                continue
            whose = "that is its author's business, and says nothing of your change there"
            problem = (
                f"a diff in extras/README.md does not fit {file.strip()} any more "
                f"({whose}): it has not, or not once"
            )
            assert text.count(old + "\n") == 1, f"{problem}:\n{old}"
            path.write_text(text.replace(old + "\n", new + "\n"))


TRIED = {  # kind of change -> a program that tries what the diff of that kind adds
    "method": """import train, eval
train.run("--method norms --max-steps 3 --val-size 9 --out n".split())
eval.run("--ckpt n --limit 2 --max-new-tokens 2".split())
from extras.records import read_log; from pathlib import Path
log = read_log(Path("n/log.jsonl")); assert log[-1]["val_loss"] < log[0]["val_loss"]""",
    "adapter": """import json, shutil, torch, rosa, row_scale, train, eval
from pathlib import Path
from extras import adapters, checkpoints, merge
train.run("--method scale --max-steps 3 --val-size 9 --out s --dtype bfloat16".split())
eval.run("--adapter s --limit 2 --max-new-tokens 2".split())
(probe,) = [json.loads(line) for line in Path("s/layers.jsonl").read_text().splitlines()]
assert len(probe["active_layers"]) == 3  # of 6: DLS selects among the new adapters
shutil.copytree("data/tiny", "base")
model = checkpoints.load_model("base", dtype=torch.float32)
model.save_pretrained("base")
tokens = torch.randint(5, 1000, (2, 30))
before = model(tokens)
row_scale.attach(model)
for module in row_scale.scales(model).values():
    module.scale.data = 1 + torch.rand(module.scale.shape)
adapters.save_adapter(model, "a")
again = adapters.load_adapter(checkpoints.load_model("base"), "a")
assert torch.equal(again(tokens), model(tokens))
merge.run("--ckpt base --adapter a --out merged".split())
merged = checkpoints.load_model("merged")
assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-3, atol=1e-3)
assert (merged(tokens) - before).abs().max() > 0.1""",
    "data": """import json, train
chat = [{"role": "user", "content": f"Say {i}."} for i in range(2)]
chat = [[chat[0], {"role": "assistant", "content": str(i)}, chat[1],
         {"role": "assistant", "content": "Yes"}] for i in range(20)]
text = "".join(json.dumps({"messages": messages}) + chr(10) for messages in chat)
open("mine.jsonl", "w").write(text)
from data import tasks
(place, example), *_ = tasks.placed_examples("mine.jsonl")
assert (place, example["output"]) == ("line 1", "Yes")
assert example["instruction"] == "user: Say 0.\\nassistant: 0\\nuser: Say 1."
train.run("--train-file mine.jsonl --max-steps 1 --val-size 2".split())""",
    "stored": """import json, shutil, torch, rosa
from pathlib import Path
from safetensors.torch import load_file, save_file
from extras import checkpoints, merge
shutil.copytree("data/tiny", "phi")
expected = checkpoints.load_model("phi")
tensors = load_file("phi/model.safetensors")
for i in range(6):
    for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        block = whole.split(".")[0]
        names = [f"model.layers.{i}.{block}.{part}_proj.weight" for part in parts]
        tensors[f"model.layers.{i}.{whole}.weight"] = torch.cat([tensors.pop(n) for n in names])
save_file(tensors, "phi/model.safetensors")
config = json.loads(Path("phi/config.json").read_text())
config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "sliding_window": 900}
Path("phi/config.json").write_text(json.dumps(config))
model, tokens = checkpoints.load_model("phi"), torch.randint(5, 1000, (2, 30))
assert model.config.context == 900 and torch.equal(model(tokens), expected(tokens))
rosa.attach(model)
for adapter in rosa.adapters(model).values():
    adapter.B.data.normal_(0, 0.02)
rosa.save_adapter(model, "a")
merge.run("--ckpt phi --adapter a --out merged".split())
assert json.loads(Path("merged/config.json").read_text()) == config
assert load_file("merged/model.safetensors").keys() == tensors.keys()
merged = checkpoints.load_model("merged")
assert torch.equal(merged(tokens), rosa.merge(model)(tokens))""",
    "task": """from data import tasks; assert tasks.test_sets("strategy") == ["strategyqa"]
assert tasks.is_correct("strategyqa", "I say yes, not no", "yes")
assert not tasks.is_correct("strategyqa", "So no.", "yes")""",
    "family": """import torch, rosa
from model import Llama, LlamaConfig
from extras import kernels
torch.manual_seed(0)
config = LlamaConfig(model_type="qwen3", vocab_size=97, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
model, tokens = Llama(config), torch.randint(97, (2, 9))
before = model(tokens); model.model.layers[1].self_attn.q_proj.weight.data.mul_(7)
# q is normalised: the size of the weights no longer matters
torch.testing.assert_close(model(tokens), before, rtol=1e-3, atol=1e-3)
model.save_pretrained("q"); again = Llama.from_pretrained("q"); kernels.accelerate(again)
torch.testing.assert_close(again(tokens), model(tokens)); rosa.attach(again)""",
    "score": """from data import tasks
assert tasks.is_correct("capitals", "I know. The answer is Paris.", "paris")
assert not tasks.is_correct("capitals", "The answer is Rome.", "Paris")""",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRIED)
def test_a_change_of_each_kind_is_a_short_diff_that_runs(tmp_path, kind):
    (diff,) = [text for text in DIFFS.values() if f"# {kind}" in text.split("\n")[0]]
    # An adapter of a new kind is a class of some sixty lines.
    assert len(diff.strip().split("\n")) < (110 if kind == "adapter" else 30)
    for name in ("model.py", "rosa.py", "train.py", "eval.py", "data", "extras"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    apply(diff, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    (try_it,) = re.findall(r"^# try: python (.*)", diff, re.M)
    needs_download = kind in ("family", "stored")
    try_it = re.sub(r"--ckpt \S+/\S+", "--ckpt tiny", try_it)
    for arguments in (["-c", TRIED[kind]], shlex.split(try_it)):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (shown,) = re.findall("^# shows: (.*)", diff, re.M)
    pattern = r"\d" if needs_download else rf"^{re.escape(shown)}\d*$"
    assert re.search(pattern, done.stdout, re.M)


@pytest.mark.slow
def test_with_every_diff_applied_the_suite_is_green(tmp_path):
    """Tests that guard the order of the files and the method must not forbid a change that was
    meant. Where this processor has AVX-512 they run as on one without it, where numbers are rounded
    otherwise: so one run of the suite states both."""
    copy = tmp_path / "changed"
    left_out = shutil.ignore_patterns(".*", "runs", "LLM-Adapters", "checkpoints", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    for diff in DIFFS.values():
        apply(diff, copy)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        command = [sys.executable, "tests/as_machine.py", "avx2", "--", *command]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_diffs_fit_the_files(tmp_path):
    assert len(DIFFS) == len(TRIED)
    for diff in DIFFS.values():
        for name in set(re.findall(r"^--- a/(.*)", diff, re.M)):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        apply(diff, tmp_path)
        for name in set(re.findall(r"^\+\+\+ b/(.*)", diff, re.M)):
            ast.parse((tmp_path / name).read_text())
