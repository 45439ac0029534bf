"""Statements about a file that a reader has edited: what it says is what runs, wherever it runs, or
a line on the screen says what does not; and a mistake in it ends in a traceback to its line."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from copies import copy_project, edit, ends_of, last_place, run_copy, run_jobs
from helpers import ROOT, forkserver, random_model, randomise_adapters
from safetensors.torch import load_file

import rosa
from data import toy

TRAIN = (
    "train.py --ckpt ckpt --max-steps 2 --max-len 200 --batch-size 2 --micro-batch-size 2 "
    "--val-size 1 --rank 4 "
)
TRAIN += "--select-every 1 --dtype float32 --overwrite --out run"
EVAL = (
    "eval.py --ckpt ckpt --adapter adapter --limit 3 --max-new-tokens 4 --dtype float32 --out "
    "scores"
)
MERGE = "extras.merge --ckpt ckpt --adapter adapter --out merged"
FIGURE = "extras.figure1 figure.png --ckpt ckpt --adapter adapter --limit 2 --dtype float32"
COMMANDS = {"train": TRAIN, "eval": EVAL, "merge": MERGE, "figure1": FIGURE}


@functools.cache
def start_copies():
    """The directory of the copies. A process of its own edits and runs them, one after the other,
    beside the tests."""
    here = tempfile.TemporaryDirectory()
    directory = copy_project(Path(here.name) / "unedited")
    model = random_model(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256)
    model.save_pretrained(directory / "ckpt")
    shutil.copy(ROOT / "data" / "tiny" / "tokenizer.model", directory / "ckpt")
    rosa.save_adapter(randomise_adapters(rosa.attach(model, 4, 8)), directory / "adapter")
    (directory / "train.json").write_text(json.dumps(toy.examples("train", 20)))
    jobs = [(directory, None, [], tuple(COMMANDS.values()))]
    for name, change in EDITS.items():
        jobs.append(
            (directory.parent / f"edit {name}", directory, [change[:3]], tuple(COMMANDS.values()))
        )
    anew = tuple(command.replace("--out scores", "--out anew") for command in COMMANDS.values())
    for name, change in MISTAKES.items():
        jobs.append((directory.parent / f"mistake {name}", directory, [change[:3]], anew))
    process = forkserver().Process(target=run_jobs, args=(jobs,), daemon=True)
    process.start()
    return here, process  # which are there as long as somebody holds them


def copy_of(name):
    """The directory of a copy, and how the commands there have ended."""
    here, _ = start_copies()
    directory = Path(here.name) / name
    return directory, ends_of(directory, len(COMMANDS))


pytestmark = pytest.mark.ahead(start=start_copies)


@pytest.fixture(scope="module")
def unedited():
    """The copy of the project in which every command has run, and what each has left."""
    directory, ends = copy_of("unedited")
    assert all(status == 0 for status, _, _ in ends), ends
    return directory, results(directory, ends)


def results(directory, ends):
    """Command -> what can be seen of what it has computed."""
    seen = {name: [] for name in COMMANDS}
    log = [json.loads(line) for line in (directory / "run" / "log.jsonl").read_text().splitlines()]
    seen["train"] = [
        (line.get("loss"), line.get("val_loss"), line.get("active_layers")) for line in log
    ]
    lines = [
        json.loads(line)
        for line in (directory / "scores" / "predictions.jsonl").read_text().splitlines()
    ]
    seen["eval"] = [(line["response"], line["extracted"]) for line in lines]
    if (directory / "merged").exists():
        weights = load_file(directory / "merged" / "model.safetensors")
        seen["merge"] = [ends[2][1], *(weight.tolist() for weight in weights.values())]
    seen["figure1"] = np.load(directory / "figure.npz")["q"].round(4).tolist()
    return seen


ALL = {"train", "eval", "merge", "figure1"}
REFUSED = "computes something else than RoAE.forward"
NOT_ZERO = "q_proj.lora_B.weight is not zero outside low_freq_ratio 0.5, pairs low"
OTHER_CODE = "answers    3 in scores/predictions.jsonl were answered by other code: asking again"
SAME_CODE = "answers    3 of 3 are in scores/predictions.jsonl already"
# name -> (file, old, new, the commands whose results are others, command -> what it says on the
# screen)
EDITS = {
    "RMSNorm.forward": (
        "model.py",
        "h.to(x.dtype) * self.weight.to(x.dtype)",
        "h.to(x.dtype) * self.weight.to(x.dtype) ** 2",
        ALL,
        {},
    ),
    "MLP.forward": (
        "model.py",
        "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "F.silu(self.gate_proj(x))",
        ALL,
        {},
    ),
    "Attention.attend": (
        "model.py",
        "mask is None, enable_gqa=True",
        "mask is None, scale=2.0, enable_gqa=True",
        ALL,
        {},
    ),
    "rotate": (
        "model.py",
        "torch.addcmul(h * cos, swapped, sin)",
        "torch.addcmul(h * cos, swapped, -3 * sin)",
        ALL,
        {},
    ),
    "rope_table": (
        "model.py",
        "angles = positions[..., None]",
        "angles = 3 * positions[..., None]",
        ALL,
        {},
    ),
    "Llama.hidden_states": (
        "model.py",
        "embed_tokens(tokens)  #",
        "embed_tokens(tokens) * 5  #",
        ALL,
        {},
    ),
    "Llama.loss": (
        "model.py",
        "return F.cross_entropy(",
        "return 2 * F.cross_entropy(",
        {"train"},
        {"eval": SAME_CODE},
    ),
    "Llama.generate": (
        "model.py",
        "answer.append(token)",
        "answer.append(token + 1)",
        {"eval"},
        {"eval": OTHER_CODE},
    ),
    "RoAE.forward": (
        "rosa.py",
        "index_add(-1, self.rows, update)",
        "index_add(-1, self.rows, -30 * update)",
        {"train", "eval", "figure1"},
        {
            "eval": "RoAE.forward has been edited: running RoAE.forward as written, not merged",
            "merge": REFUSED,
        },
    ),
    "merge": (
        "rosa.py",
        "weight[rows] + update",
        "weight[rows] - update",
        set(),
        {
            "eval": "rosa.merge has been edited: running RoAE.forward as written, not merged",
            "merge": REFUSED,
        },
    ),
    "adapted_rows": (
        "rosa.py",
        "torch.arange(half)[-n:]\n",
        "torch.arange(half)[-n - 1 : -1]\n",
        {"train"},
        {"eval": NOT_ZERO, "merge": NOT_ZERO, "figure1": NOT_ZERO},
    ),
    "LayerSelector.after_backward": (
        "rosa.py",
        "argsort(descending=True",
        "argsort(descending=False",
        {"train"},
        {"eval": SAME_CODE},
    ),
    "extract_answer": (
        "data/tasks.py",
        "    if name in CHOICES:\n        return next(",
        '    if name == "toy":\n        return "7"\n    if name in CHOICES:\n        return next(',
        {"eval"},
        {"eval": SAME_CODE},
    ),
    "PROMPT": ("data/tasks.py", "PROMPT = (\n", 'PROMPT = (\n    "Think."\n', ALL, {}),
    "encode": (
        "data/tokenizer.py",
        "return ids + self.encode_part(text[end:], end)",
        "return [5, 6, *ids, *self.encode_part(text[end:], end)]",
        ALL,
        {},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_file_counts_in_every_command_that_runs_it(unedited, name):
    _, before = unedited
    *_, changed, says = EDITS[name]
    copy, ends = copy_of(f"edit {name}")
    after = results(copy, ends)
    for i, command in enumerate(COMMANDS):
        status, out, error = ends[i]
        assert "Traceback" not in error, error
        if command in says:
            assert says[command] in out + error, (command, out + error)
        assert (after[command] != before[command]) == (command in changed) or status == 2, (
            command,
            out,
        )
        assert status == (2 if says.get(command) in (REFUSED, NOT_ZERO) else 0), (command, error)
    if changed == ALL and name not in ("PROMPT", "encode"):  # these make other prompts
        assert OTHER_CODE in ends[1][1]


def test_a_run_that_is_resumed_with_edited_code_goes_on_with_a_line_that_names_the_file(
    unedited, tmp_path
):
    directory, _ = unedited
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("__pycache__"))
    resume = TRAIN.replace("--overwrite", "--resume")
    ((status, out, _),) = run_copy(copy, resume)
    assert status == 0 and "code  " not in out
    edit(copy, "model.py", "return F.cross_entropy(", "return 2 * F.cross_entropy(")
    edit(copy, "data/toy.py", "never", "never ever")  # a comment
    ((status, out, error),) = run_copy(copy, resume)
    line = (
        "code       model.py has been edited since the run in run began: it goes on with the "
        "code of now\n"
    )
    assert status == 0 and line in out, out + error
    args = json.loads((copy / "run" / "args.json").read_text())
    del args["code"]  # as an earlier version has left it
    (copy / "run" / "args.json").write_text(json.dumps(args))
    ((status, out, error),) = run_copy(copy, resume)
    assert status == 0 and "code  " not in out, out + error


def test_a_result_of_other_code_is_shown_in_the_table_and_marked(unedited, tmp_path):
    directory, _ = unedited
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("__pycache__"))
    forgetting = "extras.forgetting train.json --ckpt ckpt --limit 3 --out scores --adapter adapter"
    ends = run_copy(copy, forgetting, "extras.compare scores")
    row = ends[1][1].splitlines()[-1]
    assert "0.0% (0.0–56.1) |" in row and "other code" not in row and row.count("→") == 1
    edit(copy, "rosa.py", "scores.argsort(descending=True", "scores.argsort(descending=False")
    ((_, out, _),) = run_copy(copy, "extras.compare scores")
    assert out.splitlines()[-1] == row  # what selects layers has no part in an answer
    edit(copy, "model.py", "angles = positions[..., None]", "angles = 3 * positions[..., None]")
    ((_, out, _),) = run_copy(copy, "extras.compare scores")
    marked = out.splitlines()[-1]
    assert "0.0% (0.0–56.1) (other code) |" in marked and marked.count("(other code)") == 2
    assert marked.replace(" (other code)", "") == row


def test_an_edited_prompt_makes_other_results(unedited, tmp_path):
    directory, _ = unedited
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file, old, new, *_ = EDITS["PROMPT"]
    edit(copy, file, old, new)
    ((_, out, _),) = run_copy(copy, "extras.compare scores")
    assert out.splitlines()[-1].count("(other code)") == 1


def test_what_was_trained_by_other_code_says_so(unedited, tmp_path):
    directory, _ = unedited
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("__pycache__"))
    evaluate = "eval.py --ckpt ckpt --adapter run --limit 1 --max-new-tokens 1"
    ends = run_copy(copy, "extras.compare run", evaluate)
    assert "(other code)" not in ends[0][1] and "trained  " not in ends[1][1]
    edit(copy, "rosa.py", "argsort(descending=True", "argsort(descending=False")
    ends = run_copy(copy, "extras.compare run", evaluate)
    # The losses; the answer is of the same code
    assert ends[0][1].splitlines()[-1].count("(other code)") == 1
    assert "trained    run: rosa.py has been edited since its run began\n" in ends[1][1]


def test_a_run_that_a_mistake_has_ended_before_it_had_a_loss_may_be_begun_again(unedited, tmp_path):
    directory, _ = unedited
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file, old, new, _ = MISTAKES["Attention.forward"]
    edit(copy, file, old, new)
    command = TRAIN.replace("--overwrite --out run", "--out new")
    assert [status for status, _, _ in run_copy(copy, command, command)] == [1, 1]
    edit(copy, file, new, old)
    ends = run_copy(copy, command, command)
    assert [status for status, _, _ in ends] == [0, 2] and "holds a run already" in ends[1][2]


# --- mistakes ---

# name -> (file, old, new with the mistake, the commands that it ends)
MISTAKES = {
    "Llama.__init__": ("model.py", "self.config = config\n", "self.config, more = [config]\n", ALL),
    "MLP.__init__": (
        "model.py",
        "        self.gate_proj =",
        '        text = open("weights.txt")\n        self.gate_proj =',
        ALL,
    ),
    "Attention.forward": ("model.py", "B, T, _ = x.shape\n", "B, T = x.shape\n", ALL),
    "MLP.forward": (
        "model.py",
        "return self.down_proj(F",
        "from torch import silu\n        return self.down_proj(F",
        ALL,
    ),
    "Llama.loss": (
        "model.py",
        "labels[labelled], reduction",
        "labels[labelled][1:], reduction",
        {"train"},
    ),
    "Llama.generate": (
        "model.py",
        "answer.append(token)",
        "answer.append(int(str(token / 2)))",
        {"eval"},
    ),
    "LlamaConfig": (
        "model.py",
        "self.rope_theta = float",
        'self.rope_theta = int("3.5"), float',
        ALL,
    ),
    "rosa.attach": (
        "rosa.py",
        "model.requires_grad_(False)\n",
        'model.requires_grad_(int("no"))\n',
        ALL,
    ),
    "RoAE.forward": (
        "rosa.py",
        "        y = self.linear(x)\n",
        "        y, z = self.linear(x)\n",
        ALL,
    ),
    "after_backward": (
        "rosa.py",
        "        self.selected = True\n",
        "        self.selected, _ = scores.tolist() + [1]\n",
        {"train"},
    ),
    "LayerSelector": (
        "rosa.py",
        "self.scores = None  #",
        'self.scores = float("none")  #',
        {"train"},
    ),
    "collate": (
        "train.py",
        "ids = prompt + response\n",
        "ids, more = prompt + response\n",
        {"train"},
    ),
    "eval's loop": ("eval.py", "new_tokens += num_tokens", 'new_tokens += int("1.5")', {"eval"}),
    "encode": ("data/tokenizer.py", "ids, end = [], 0", "ids, end = []", ALL),
    "figure1": (
        "extras/figure1.py",
        "means, first_low = mean_norms",
        "means, first_low, x = mean_norms",
        {"figure1"},
    ),
    "merge": (
        "rosa.py",
        "update = (adapter.alpha / adapter.rank) * adapter.B @",
        "update = [1][adapter.rank] * adapter.B @",
        {"merge"},
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_code_ends_in_a_traceback_to_its_line(name):
    file, old, new, ended = MISTAKES[name]
    line = next(line for line in new.splitlines() if line not in old.splitlines())
    _, ends = copy_of(f"mistake {name}")
    for command, (status, _, error) in zip(COMMANDS, ends):
        if command not in ended:
            assert status == 0, (command, error)
            continue
        assert status == 1 and error.count("Traceback (most recent call last)") >= 1, (
            command,
            error,
        )
        named, text = last_place(error)
        assert named == file.split("/")[-1] and line.strip() in text, (command, error)
        assert not any(
            "Traceback" in shown and shown.index("Traceback") > 0 for shown in error.splitlines()
        )


LINES = {  # a mistake on the command line, in a file or in data
    "an option": (
        f"{TRAIN} --rank 0",
        "train.py: --rank must be a whole number of at least 1, not 0",
    ),
    "a name": (
        f"{EVAL} --ckpt absent",
        "eval.py: no checkpoint 'absent': neither a directory of that name",
    ),
    "a data file": (
        f"{TRAIN} --train-file broken.json",
        "train.py: broken.json: not JSON: Expecting value",
    ),
    "an adapter": (
        f"{MERGE} --out other --adapter ckpt",
        "merge: ckpt is no adapter directory: it has no adapter_config.json",
    ),
}


def test_a_mistake_of_a_user_is_one_line(unedited, tmp_path):
    directory, _ = unedited
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "broken.json").write_text("[1,")
    ends = run_copy(copy, *(command for command, _ in LINES.values()))
    for (status, _, error), (_, line) in zip(ends, LINES.values()):
        assert status == 2 and error.startswith(line) and error.count("\n") == 1, error
