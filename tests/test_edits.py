"""Statements about a file that a reader has edited: every command runs the edited code, or says
in a line what it does not run; and a mistake in the file ends in a traceback to the line."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from copies import copy_project, edit, last_place, run_copy, run_jobs, wait_for_results
from helpers import ROOT, forkserver, random_model, randomise_adapters, seed_torch
from safetensors.torch import load_file

import rosa
from data import toy

TRAIN = (
    "train.py --ckpt ckpt --max-steps 2 --max-len 200 --batch-size 2 --micro-batch-size 2 "
    "--val-size 1 --rank 4 --select-every 1 --dtype float32 --overwrite --out run"
)
EVAL = (
    "eval.py --ckpt ckpt --adapter adapter --limit 3 --max-new-tokens 4 --dtype float32 "
    "--out scores"
)
MERGE = "extras.merge --ckpt ckpt --adapter adapter --out merged"
FIGURE1 = "extras.figure1 figure.png --ckpt ckpt --adapter adapter --limit 2 --dtype float32"
COMMANDS = {"train": TRAIN, "eval": EVAL, "merge": MERGE, "figure1": FIGURE1}
ALL = set(COMMANDS)


@functools.cache
def start_copies():
    """Start a process that makes a copy of the project for each edit and each mistake below, and
    runs the commands in one copy after the other, beside the tests. Returns the directory of the
    copies, and the process: both must be held for as long as they are needed."""
    parent = tempfile.TemporaryDirectory()
    unedited = copy_project(Path(parent.name) / "unedited")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(unedited / "ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", unedited / "ckpt")
    seed_torch(0)  # of some adapters an edit moves no digit of what merge prints
    rosa.save_adapter(randomise_adapters(rosa.attach(model, 4, 8)), unedited / "adapter")
    (unedited / "train.json").write_text(json.dumps(toy.examples("train", 20)))
    commands = tuple(COMMANDS.values())
    jobs = [(unedited, None, [], commands)]
    for name, change in EDITS.items():
        copy = Path(parent.name) / f"edit {name}"
        jobs.append((copy, unedited, [(change.file, change.old, change.new)], commands))
    # A mistake in the code that answers shall show: no answer of the unedited copy is used
    commands = tuple(command.replace("--out scores", "--out anew") for command in commands)
    for name, mistake in MISTAKES.items():
        copy = Path(parent.name) / f"mistake {name}"
        jobs.append((copy, unedited, [(mistake.file, mistake.old, mistake.new)], commands))
    process = forkserver().Process(target=run_jobs, args=(jobs,), daemon=True)
    process.start()
    return parent, process


def wait_for_copy(name):
    """The directory of a copy, and command -> how the command has ended there."""
    parent, _ = start_copies()
    directory = Path(parent.name) / name
    return directory, dict(zip(COMMANDS, wait_for_results(directory, len(COMMANDS))))


pytestmark = pytest.mark.ahead(start=start_copies)


@pytest.fixture(scope="module")
def unedited():
    """The copy that nobody has edited: its directory, and command -> how the command has ended."""
    directory, results = wait_for_copy("unedited")
    assert all(result.status == 0 for result in results.values()), results
    return directory, results


@pytest.fixture
def copy(unedited, tmp_path):
    """A directory with all that the unedited copy holds, for the test alone."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(unedited[0], tmp_path / "copy", ignore=ignored))


def computed(directory, results):
    """Command -> the numbers and texts that it has computed in a copy: those in its files, and for
    merge those that it has printed too."""
    log = [json.loads(line) for line in (directory / "run" / "log.jsonl").read_text().splitlines()]
    answers = [
        json.loads(line)
        for line in (directory / "scores" / "predictions.jsonl").read_text().splitlines()
    ]
    merged = directory / "merged" / "model.safetensors"  # absent where the command has refused
    weights = load_file(merged) if merged.exists() else {}
    return {
        "train": [
            (line.get("loss"), line.get("val_loss"), line.get("active_layers")) for line in log
        ],
        "eval": [(answer["response"], answer["extracted"]) for answer in answers],
        "merge": [results["merge"].out, *(weight.tolist() for weight in weights.values())],
        "figure1": np.load(directory / "figure.npz")["q"].round(4).tolist(),
    }


class Edit(NamedTuple):
    """A change of the code: `old` becomes `new` in a file. `changes`: the commands that compute
    something else then. `says`: command -> a line that it must print."""

    file: str
    old: str
    new: str
    changes: set = ALL
    says: dict = {}


REFUSED = "computes something else than RoAE.forward"
NOT_ZERO = "q_proj.lora_B.weight is not zero outside low_freq_ratio 0.5, pairs low"
OTHER_CODE = "answers    3 in scores/predictions.jsonl were answered by other code: asking again"
SAME_CODE = "answers    3 of 3 are in scores/predictions.jsonl already"
EDITS = {
    "RMSNorm.forward": Edit(
        "model.py",
        "h.to(x.dtype) * self.weight.to(x.dtype)",
        "h.to(x.dtype) * self.weight.to(x.dtype) ** 2",
    ),
    "MLP.forward": Edit(
        "model.py",
        "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "F.silu(self.gate_proj(x))",
    ),
    "Attention.attend": Edit(
        "model.py",
        "mask is None, enable_gqa=True",
        "mask is None, scale=20.0, enable_gqa=True",
    ),
    "rotate": Edit(
        "model.py",
        "torch.addcmul(h * cos, swapped, sin)",
        "torch.addcmul(h * cos, swapped, -3 * sin)",
    ),
    "rope_table": Edit(
        "model.py",
        "angles = positions[..., None]",
        "angles = 3 * positions[..., None]",
    ),
    "Llama.hidden_states": Edit(
        "model.py",
        "embed_tokens(tokens)  #",
        "embed_tokens(tokens).roll(1, -1)  #",
    ),
    "Llama.loss": Edit(
        "model.py",
        "return F.cross_entropy(",
        "return 2 * F.cross_entropy(",
        {"train"},
        {"eval": SAME_CODE},
    ),
    "Llama.generate": Edit(
        "model.py",
        "answer.append(token)",
        "answer.append(token + 1)",
        {"eval"},
        {"eval": OTHER_CODE},
    ),
    "RoAE.forward": Edit(
        "rosa.py",
        "index_add(-1, self.rows, update)",
        "index_add(-1, self.rows, -30 * update)",
        {"train", "eval", "figure1"},
        {
            "eval": "RoAE.forward has been edited: running RoAE.forward as written, not merged",
            "merge": REFUSED,
        },
    ),
    "merge": Edit(
        "rosa.py",
        "weight[rows] + update",
        "weight[rows] - update",
        set(),
        {
            "eval": "rosa.merge has been edited: running RoAE.forward as written, not merged",
            "merge": REFUSED,
        },
    ),
    "adapted_rows": Edit(
        "rosa.py",
        "torch.arange(half)[-n:]\n",
        "torch.arange(half)[-n - 1 : -1]\n",
        {"train"},
        {"eval": NOT_ZERO, "merge": NOT_ZERO, "figure1": NOT_ZERO},
    ),
    "LayerSelector.after_backward": Edit(
        "rosa.py",
        "argsort(descending=True",
        "argsort(descending=False",
        {"train"},
        {"eval": SAME_CODE},
    ),
    "extract_answer": Edit(
        "data/tasks.py",
        "    if name in CHOICES:\n        named =",
        '    if name == "toy":\n        return "7"\n    if name in CHOICES:\n        named =',
        {"eval"},
        {"eval": SAME_CODE},
    ),
    "PROMPT": Edit("data/tasks.py", "PROMPT = (\n", 'PROMPT = (\n    "Think."\n'),
    "encode": Edit(
        "data/tokenizer.py",
        "return ids + self.encode_part(text[end:], end)",
        "return [5, 6, *ids, *self.encode_part(text[end:], end)]",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_file_counts_in_every_command_that_runs_it(unedited, name):
    change = EDITS[name]
    directory, results = wait_for_copy(f"edit {name}")
    before, after = computed(*unedited), computed(directory, results)
    for command, result in results.items():
        says = change.says.get(command, "")
        assert "Traceback" not in result.err, result.err
        assert says in result.out + result.err, (command, result)
        if says in (REFUSED, NOT_ZERO):
            assert result.status == 2, (command, result)
            continue
        assert result.status == 0, (command, result)
        changed = after[command] != before[command]
        assert changed == (command in change.changes), (command, result.out)
    if change.changes == ALL and name not in ("PROMPT", "encode"):  # these two change the prompts
        assert OTHER_CODE in results["eval"].out


def test_a_run_that_is_resumed_with_edited_code_goes_on_with_a_line_that_names_the_file(copy):
    resume = TRAIN.replace("--overwrite", "--resume")
    (result,) = run_copy(copy, resume)
    assert result.status == 0 and "code  " not in result.out
    edit(copy, "model.py", "return F.cross_entropy(", "return 2 * F.cross_entropy(")
    edit(copy, "data/toy.py", "never", "never ever")  # in a comment, which does not count
    (result,) = run_copy(copy, resume)
    line = (
        "code       model.py has been edited since the run in run began: it is resumed with the "
        "code of now\n"
    )
    assert result.status == 0 and line in result.out, result
    # A run of an earlier version has not written down its code: nothing is said of it
    args = json.loads((copy / "run" / "args.json").read_text())
    del args["code"]
    (copy / "run" / "args.json").write_text(json.dumps(args))
    (result,) = run_copy(copy, resume)
    assert result.status == 0 and "code  " not in result.out, result


def test_a_result_of_other_code_is_shown_in_the_table_and_marked(copy):
    forgetting = "extras.forgetting train.json --ckpt ckpt --limit 3 --out scores --adapter adapter"
    _, compared = run_copy(copy, forgetting, "extras.compare scores")
    row = compared.out.splitlines()[-1]
    assert "0.0% (0.0–56.1) |" in row and "other code" not in row and row.count("→") == 1
    # The selection of layers has no part in an answer
    edit(copy, "rosa.py", "scores.argsort(descending=True", "scores.argsort(descending=False")
    (compared,) = run_copy(copy, "extras.compare scores")
    assert compared.out.splitlines()[-1] == row
    edit(copy, "model.py", "angles = positions[..., None]", "angles = 3 * positions[..., None]")
    (compared,) = run_copy(copy, "extras.compare scores")
    marked = compared.out.splitlines()[-1]
    assert "0.0% (0.0–56.1) (other code) |" in marked and marked.count("(other code)") == 2
    assert marked.replace(" (other code)", "") == row


def test_an_edited_prompt_makes_other_results(copy):
    edit(copy, "data/tasks.py", "PROMPT = (\n", 'PROMPT = (\n    "Think."\n')
    (compared,) = run_copy(copy, "extras.compare scores")
    assert compared.out.splitlines()[-1].count("(other code)") == 1


def test_the_rounding_of_a_quantised_base_is_code_that_counts(copy):
    run = TRAIN.replace("--out run", "--out run8 --quantize int8")
    answers = "--limit 3 --max-new-tokens 4 --dtype float32"
    plain = f"eval.py --ckpt ckpt --adapter run {answers} --out run"
    quantised = f"eval.py --ckpt ckpt --adapter run8 {answers} --quantize int8"
    compare = "extras.compare run run8"
    *_, again, compared = run_copy(copy, run, quantised, plain, quantised, compare)
    assert "3 of 3 are in" in again.out and "other code" not in compared.out
    edit(copy, "extras/quantize.py", "largest / 127", "largest / 3")
    resumed, compared, anew, once_more = run_copy(
        copy, run.replace("--overwrite", "--resume"), compare, quantised, plain
    )
    assert "extras/quantize.py has been edited since the run in run8 began" in resumed.out
    of_plain, of_quantised = compared.out.splitlines()[-2:]
    assert "other code" not in of_plain and of_quantised.count("(other code)") == 1
    assert "already" not in anew.out and "3 of 3 are in" in once_more.out


def test_what_was_trained_by_other_code_says_so(copy):
    evaluate = "eval.py --ckpt ckpt --adapter run --limit 1 --max-new-tokens 1"
    compared, evaluated = run_copy(copy, "extras.compare run", evaluate)
    assert "(other code)" not in compared.out and "trained  " not in evaluated.out
    edit(copy, "rosa.py", "argsort(descending=True", "argsort(descending=False")
    compared, evaluated = run_copy(copy, "extras.compare run", evaluate)
    # The losses are of other code, the answer is of the same
    assert compared.out.splitlines()[-1].count("(other code)") == 1
    assert "trained    run: rosa.py has been edited since its run began\n" in evaluated.out


def test_a_run_that_a_mistake_has_ended_before_it_had_a_loss_may_be_begun_again(copy):
    train = TRAIN.replace("--overwrite --out run", "--out new")
    edit(copy, "model.py", "B, T, _ = x.shape\n", "B, T = x.shape\n")
    first, second = run_copy(copy, train, train)
    assert (first.status, second.status) == (1, 1)
    edit(copy, "model.py", "B, T = x.shape\n", "B, T, _ = x.shape\n")
    first, second = run_copy(copy, train, train)
    assert (first.status, second.status) == (0, 2) and "holds a run already" in second.err


# --- mistakes ---


class Mistake(NamedTuple):
    """A mistake in the code: `old` becomes `new` in a file. `ends`: the commands that it ends."""

    file: str
    old: str
    new: str
    ends: set = ALL


MISTAKES = {
    "Llama.__init__": Mistake(
        "model.py", "self.config = config\n", "self.config, more = [config]\n"
    ),
    "MLP.__init__": Mistake(
        "model.py",
        "        self.gate_proj =",
        '        text = open("weights.txt")\n        self.gate_proj =',
    ),
    "Attention.forward": Mistake("model.py", "B, T, _ = x.shape\n", "B, T = x.shape\n"),
    "MLP.forward": Mistake(
        "model.py",
        "return self.down_proj(F",
        "from torch import silu\n        return self.down_proj(F",
    ),
    "Llama.loss": Mistake(
        "model.py",
        "labels[labelled], reduction",
        "labels[labelled][1:], reduction",
        {"train"},
    ),
    "Llama.generate": Mistake(
        "model.py",
        "answer.append(token)",
        "answer.append(int(str(token / 2)))",
        {"eval"},
    ),
    "LlamaConfig": Mistake(
        "model.py",
        "self.rope_theta = float",
        'self.rope_theta = int("3.5"), float',
    ),
    "rosa.attach": Mistake(
        "rosa.py",
        "model.requires_grad_(False)\n",
        'model.requires_grad_(int("no"))\n',
    ),
    "RoAE.forward": Mistake(
        "rosa.py",
        "        y = self.linear(x)\n",
        "        y, z = self.linear(x)\n",
    ),
    "after_backward": Mistake(
        "rosa.py",
        "        self.selected = True\n",
        "        self.selected, _ = scores.tolist() + [1]\n",
        {"train"},
    ),
    "LayerSelector": Mistake(
        "rosa.py",
        "self.scores = None  #",
        'self.scores = float("none")  #',
        {"train"},
    ),
    "collate": Mistake(
        "train.py",
        "pairs = pairs or [([0], [-100])]\n",
        "pairs, more, x = pairs or [([0], [-100])]\n",
        {"train"},
    ),
    "eval's loop": Mistake(
        "eval.py", "new_tokens += num_tokens", 'new_tokens += int("1.5")', {"eval"}
    ),
    "encode": Mistake("data/tokenizer.py", "ids, end = [], 0", "ids, end = []"),
    "figure1": Mistake(
        "extras/figure1.py",
        "means = mean_norms",
        "means, first, x = mean_norms",
        {"figure1"},
    ),
    "merge": Mistake(
        "rosa.py",
        "update = (adapter.alpha / adapter.rank) * adapter.B @",
        "update = [1][adapter.rank] * adapter.B @",
        {"merge"},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_code_ends_in_a_traceback_to_its_line(name):
    mistake = MISTAKES[name]
    old_lines = mistake.old.splitlines()
    wrong_line = next(line for line in mistake.new.splitlines() if line not in old_lines)
    _, results = wait_for_copy(f"mistake {name}")
    for command, (status, _, error) in results.items():
        if command not in mistake.ends:
            assert status == 0, (command, error)
            continue
        assert status == 1 and "Traceback (most recent call last)" in error, (command, error)
        file, text = last_place(error)
        assert file == Path(mistake.file).name and wrong_line.strip() in text, (command, error)
        # A progress bar does not share its line with the traceback
        assert all(
            line.startswith("Traceback") for line in error.splitlines() if "Traceback" in line
        )


def test_a_mistake_of_a_user_is_one_line(copy):
    (copy / "broken.json").write_text("[1,")
    errors = {
        f"{TRAIN} --rank 0": "train.py: --rank must be a whole number of at least 1, not 0",
        f"{EVAL} --ckpt absent": "eval.py: no checkpoint 'absent': neither a directory",
        f"{TRAIN} --train-file broken.json": "train.py: broken.json: not JSON: Expecting value",
        f"{MERGE} --out other --adapter ckpt": (
            "merge: ckpt is no adapter directory: it has no adapter_config.json"
        ),
    }
    for result, line in zip(run_copy(copy, *errors), errors.values(), strict=True):
        assert result.status == 2 and result.err.startswith(line), result
        assert result.err.count("\n") == 1, result
