"""Statements about results: what a row of `extras.compare` shows is of that run, and no answer is
lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SHORT_ROSA_RUN, SHORT_RUN, random_model, run, write_test_sets

import eval as eval_script
import rosa
import train
from data import toy
from extras import compare, forgetting
from extras.records import checkpoint_hash
from model import Llama

ASK = "--limit 4 --max-new-tokens 3 --dtype float32".split()


def evaluate(*options):
    run(eval_script, *ASK, *options)


def table(capsys, *runs):
    """Run `extras.compare`. Returns its table as run -> column -> cell, and the lines that it
    prints before the table."""
    capsys.readouterr()
    compare.run([str(run) for run in runs])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| run"))
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]
    ]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}, lines[:first]


def lines_of(directory):
    return [
        json.loads(line) for line in Path(directory, "predictions.jsonl").read_text().splitlines()
    ]


def results_of(directory):
    return json.loads(Path(directory, "results.json").read_text())


# --- of which checkpoint and adapter ---


def test_a_full_run_shows_the_score_of_the_checkpoint_that_is_there_now(ckpt, capsys):
    full = ["--ckpt", "ckpt", *SHORT_RUN[2:], "--method", "full", "--out", "full", "--max-steps", 1]
    run(train, *full)
    evaluate("--ckpt", "full", "--out", "full")
    assert "toy (n = 4)" in table(capsys, "full")[0]["full"]
    asked = len(lines_of("full"))
    # The results in a checkpoint's directory are no part of the checkpoint
    evaluate("--ckpt", "full", "--out", "full")
    assert (
        "4 of 4 are in full/predictions.jsonl already" in capsys.readouterr().out
        and len(lines_of("full")) == asked
    )
    kept = {name: Path("full", name).read_bytes() for name in ("results.json", "predictions.jsonl")}
    run(train, *full, "--overwrite", "--seed", 1)
    # The results of the checkpoint that was overwritten are removed
    assert not any(Path("full", name).exists() for name in kept)
    for name, content in kept.items():
        Path("full", name).write_bytes(content)
    rows, said = table(capsys, "full")
    assert "toy (n = 4)" not in rows["full"] and said[0].startswith(
        "full/results.json is not shown: "
    )


def test_the_hash_of_a_checkpoint_is_of_nothing_that_is_written_beside_it(ckpt):
    before = checkpoint_hash(Path("ckpt"))
    for name in (
        "results.json",
        "losses.json",
        "args.json",
        "summary.json",
        "notes.txt",
        "state.safetensors",
    ):
        Path("ckpt", name).write_text("{}")
    assert checkpoint_hash(Path("ckpt")) == before
    for name in (
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "model.safetensors",
    ):
        content = Path("ckpt", name).read_bytes() if Path("ckpt", name).exists() else b"{}"
        Path("ckpt", name).write_bytes(content + b" ")
        assert checkpoint_hash(Path("ckpt")) != before
        before = checkpoint_hash(Path("ckpt"))


def test_a_score_of_the_adapter_on_another_checkpoint_is_not_the_runs(ckpt, capsys):
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a")
    shutil.copytree("ckpt", "other")
    random_model(
        9, vocab_size=1024, num_hidden_layers=4, max_position_embeddings=256
    ).save_pretrained("other")
    evaluate("--ckpt", "other", "--adapter", "a")
    Path("texts.json").write_text(json.dumps(toy.examples("train", 2)))
    forgetting.run("texts.json --ckpt other --adapter a --dtype float32".split())
    rows, said = table(capsys, "a")
    assert "toy (n = 4)" not in rows["a"] and len(said) == 2
    assert said[0].startswith(
        "a/results.json is not shown: of another adapter or checkpoint (other) than this run's"
    )
    evaluate("--ckpt", "ckpt", "--adapter", "a")
    rows, said = table(capsys, "a")
    assert "toy (n = 4)" in rows["a"] and said[0].startswith(
        "1 of the 2 results in a/results.json are not shown: "
    )
    Path("ckpt").rename("moved")  # a checkpoint that is gone is known by its name
    assert "toy (n = 4)" in table(capsys, "a")[0]["a"]


# --- columns ---


def multiple_choice(count):
    instruction = "Is it {}?\n\nAnswer format: true/false"
    records = [{"instruction": instruction.format(i), "answer": "true"} for i in range(count)]
    Path("dataset/boolq").mkdir(parents=True, exist_ok=True)
    Path("dataset/boolq/test.json").write_text(json.dumps(records))


def test_what_cannot_be_compared_has_columns_of_its_own(ckpt, capsys):
    multiple_choice(4)
    command = "--ckpt ckpt --task boolq --data-dir . --dtype float32 --max-new-tokens"
    run(eval_script, *f"{command} 3 --out a".split())
    run(eval_script, *f"{command} 3 --out b --score likelihood".split())
    run(eval_script, *f"{command} 5 --out c".split())
    Path("texts.json").write_text(json.dumps(toy.examples("train", 4)))
    for out, limit in (("a", 4), ("b", 1)):
        forgetting.run(
            f"texts.json --ckpt ckpt --out {out} --limit {limit} --dtype float32".split()
        )
    rows, _ = table(capsys, "a", "b")
    columns = [column for column in rows["a"] if column.startswith(("boolq", "loss"))]
    assert {"boolq (n = 4)", "boolq (n = 4, by likelihood)"} <= set(columns) and len(columns) == 4
    assert all((rows["a"][column] == "–") != (rows["b"][column] == "–") for column in columns)
    rows, _ = table(capsys, "a", "c")
    shown = {f"boolq (n = 4), answers of up to {n} tokens" for n in (3, 5)}
    assert {column for column in rows["a"] if column.startswith("boolq")} == shown
    multiple_choice(5)
    run(eval_script, *f"{command} 3 --out d --limit 4".split())  # the same four
    assert "other questions" not in str(table(capsys, "a", "d")[0])
    Path("dataset/boolq/test.json").write_text(
        Path("dataset/boolq/test.json").read_text().replace("Is it", "Was it")
    )
    run(eval_script, *f"{command} 3 --out e --limit 4".split())
    rows, _ = table(capsys, "a", "e")
    assert {"boolq (n = 4)", "boolq (n = 4), other questions 2"} <= set(rows["a"])


def test_a_directory_without_results_has_a_line_and_the_others_their_table(ckpt, capsys):
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a")
    evaluate("--ckpt", "ckpt", "--out", "begun")
    Path("begun/results.json").unlink()
    Path("empty").mkdir()
    shutil.copytree("a", "scores")
    Path("scores/results.json").write_text("{")
    said = table(capsys, "a", "scores")[1]
    assert len(said) == 1 and said[0].startswith("left out: scores/results.json is not a JSON file")
    Path("broken").mkdir()
    Path("broken/args.json").write_text("{")
    rows, said = table(capsys, "empty", "begun", "a", "broken", "nowhere")
    assert (
        list(rows) == ["a"]
        and len(said) == 4
        and all(line.startswith("left out: ") for line in said)
    )
    assert (
        said[1]
        == "left out: begun holds an evaluation that has not ended, 4 answers and no results.json"
    )
    with pytest.raises(SystemExit) as stopped:
        compare.run(["empty", "nowhere"])
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and error.count("\n") == 1 and "empty is no run directory" in error
    )


# --- nothing is lost ---


def test_evaluations_of_one_adapter_stand_side_by_side(ckpt, capsys):
    write_test_sets(".", ["gsm8k", "SVAMP"])
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a")
    answers = {}
    for name in ("gsm8k", "SVAMP"):
        evaluate("--ckpt", "ckpt", "--adapter", "a", "--task", name, "--data-dir", ".")
        answers[name] = results_of("a")["scores"]
    evaluate(
        "--ckpt",
        "ckpt",
        "--adapter",
        "a",
        "--task",
        "gsm8k",
        "--data-dir",
        ".",
        "--max-new-tokens",
        5,
    )
    results = results_of("a")
    assert list(results["scores"]) == ["gsm8k"] and [
        list(each["scores"]) for each in results["others"]
    ] == [
        ["gsm8k"],
        ["SVAMP"],
    ]
    assert all(
        {"checkpoint", "adapter", "settings", "code", "micro", "macro"} <= each.keys()
        for each in results["others"]
    )
    rows, said = table(capsys, "a")
    titles = [column for column in rows["a"] if "(n = " in column]
    wanted = {
        "gsm8k (n = 4), answers of up to 3 tokens",
        "gsm8k (n = 4), answers of up to 5 tokens",
        "SVAMP (n = 4)",
    }
    assert set(titles) == wanted and not said
    assert len(lines_of("a")) == 12
    evaluate("--ckpt", "ckpt", "--adapter", "a", "--task", "gsm8k", "--data-dir", ".")
    assert "4 of 4 are in a/predictions.jsonl already" in capsys.readouterr().out
    # An evaluation that is repeated replaces its former result
    assert len(results_of("a")["others"]) == 2 and len(lines_of("a")) == 12


def test_two_evaluations_at_a_time_keep_each_others_answers(ckpt, monkeypatch):
    """The second evaluation begins and ends while the first is half way."""
    write_test_sets(".", ["gsm8k", "SVAMP"])
    stream, inner = eval_script.inference.stream, []

    def interrupted(model, prompts, *rest):
        for count, answer in enumerate(stream(model, prompts, *rest)):
            if count == 2 and not inner:
                inner.append(True)
                evaluate("--ckpt", "ckpt", "--out", "out", "--task", "SVAMP", "--data-dir", ".")
                assert [line["set"] for line in lines_of("out")].count("SVAMP") == 4
            yield answer

    monkeypatch.setattr(eval_script.inference, "stream", interrupted)
    evaluate("--ckpt", "ckpt", "--out", "out", "--task", "gsm8k", "--data-dir", ".")
    assert [line["set"] for line in lines_of("out")] == ["gsm8k"] * 4 + ["SVAMP"] * 4
    results = results_of("out")
    assert list(results["scores"]) == ["gsm8k"] and list(results["others"][0]["scores"]) == [
        "SVAMP"
    ]


def test_a_line_that_a_kill_has_cut_costs_one_answer_and_no_other(ckpt):
    evaluate("--ckpt", "ckpt", "--out", "out")
    whole = Path("out/predictions.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    Path("out/predictions.jsonl").write_text("".join([lines[0], lines[1][:40]]))
    evaluate("--ckpt", "ckpt", "--out", "out")
    assert Path("out/predictions.jsonl").read_text() == whole


def test_losses_on_other_files_and_of_other_adapters_stay(ckpt):
    rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4, 8), "adapter")
    for name in ("one", "two"):
        Path(f"{name}.json").write_text(json.dumps(toy.examples("train", 2)))
    for command in ("one.json", "one.json --adapter adapter", "two.json"):
        forgetting.run(f"{command} --ckpt ckpt --out out --dtype float32".split())
    losses = json.loads(Path("out/losses.json").read_text())
    assert (
        set(losses["losses"]) == set(losses["tokens"]) == {"one", "two"}
        and losses["adapter"] is None
    )
    assert [(set(each["losses"]), bool(each["adapter"])) for each in losses["others"]] == [
        ({"one"}, True)
    ]


def test_results_of_what_is_not_replaced_stay_where_a_run_begins(ckpt):
    evaluate("--ckpt", "ckpt", "--out", "a")  # of the model alone
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a")
    assert results_of("a")["scores"] and len(lines_of("a")) == 4
    evaluate("--ckpt", "ckpt", "--adapter", "a")
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a", "--resume")
    assert len(results_of("a")["others"]) == 1
    run(train, *SHORT_ROSA_RUN, "--max-steps", 1, "--out", "a", "--overwrite")
    assert not Path("a/results.json").exists() and not Path("a/predictions.jsonl").exists()


def test_a_merge_that_does_not_fit_float16_is_refused(ckpt, capsys):
    from extras import merge

    model = Llama.from_pretrained("ckpt", dtype=torch.float16)
    model.save_pretrained("ckpt")
    rosa.attach(model, 4, 8)
    with torch.no_grad():
        for adapter in rosa.adapters(model).values():
            adapter.B.fill_(1e6)
    rosa.save_adapter(model, "adapter")
    with pytest.raises(
        FloatingPointError,
        match="q_proj: the merged weight is not finite in torch.float16|k_proj: the",
    ):
        rosa.merge(model)
    with pytest.raises(SystemExit) as stopped:
        merge.run("--ckpt ckpt --adapter adapter --out out".split())
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 1
        and error.count("\n") == 1
        and "not finite in torch.float16: train with" in error
    )
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "ckpt"]
    shutil.copytree("ckpt", "other")
    with pytest.raises(SystemExit):
        merge.run("--ckpt other --adapter adapter --out out".split())
    assert "adapter    adapter was trained on ckpt, not on" in capsys.readouterr().out
