"""Statements about the loop of `eval.py`: answers, scores, predictions, one question."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK, decisive_model, random_model, run, write_test_sets
from rounding import bound, of_model

import eval as eval_script
import rosa
import train as train_script
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import inference
from model import Llama

pytestmark = pytest.mark.numeric
ROOT = Path(train_script.__file__).parent


def test_scores_predictions_and_absent_sets(ckpt, capsys, monkeypatch):
    write_test_sets("data", ["gsm8k", "SVAMP"])
    answers = {e["instruction"]: e["answer"] for i in range(2) for e in toy.examples("test", 5 + 4 * i, seed=i)}
    tokenizer = load_tokenizer("ckpt")

    def stream(model, prompts, max_new_tokens, eos_ids, batch_size):  # right on every problem about Anna to Hugo, say
        for i, prompt in reversed(list(enumerate(prompts))):
            text = tokenizer.decode(prompt).split("Instruction:\n")[1].split("\n")[0]
            yield i, tokenizer.encode(f"The answer is {answers[text]}." if text < "I" else "No.")

    monkeypatch.setattr(inference, "stream", stream)
    run(eval_script, *"--ckpt ckpt --task arithmetic --data-dir data --out out --max-new-tokens 50".split())
    lines = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert [(line["set"], line["index"]) for line in lines] == [("gsm8k", i) for i in range(5)] + [
        ("SVAMP", i) for i in range(9)
    ]
    for line in lines:
        assert (
            line["correct"] == (line["instruction"] < "I") and (line["extracted"] == line["answer"]) == line["correct"]
        )
    scores = {
        name: sum(line["correct"] for line in lines if line["set"] == name) / count
        for name, count in (("gsm8k", 5), ("SVAMP", 9))
    }
    results = json.loads(Path("out/results.json").read_text())
    right = sum(line["correct"] for line in lines)
    assert (results["scores"], results["micro"], results["macro"]) == (scores, right / 14, sum(scores.values()) / 2)
    assert results["counts"] == {"gsm8k": 5, "SVAMP": 9}
    low, high = results["intervals"]["SVAMP"]
    assert 0 <= low < scores["SVAMP"] < high <= 1 and high - low > 0.3
    printed = capsys.readouterr().out
    assert (
        printed.count("absent") == 6
        and "python data/download.py all --dir data" in printed
        and f"{results['macro']:.1%}" in printed
    )


@pytest.fixture
def decisive(ckpt):
    """The checkpoint's answers to 25 questions do not hang on rounding."""
    tokenizer = load_tokenizer(ckpt)
    prompts = [tasks.encode_prompt(example, tokenizer) for example in tasks.test_examples("toy", "")[:25]]
    decisive_model(prompts, 30, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained(ckpt)
    return ckpt


def test_an_evaluation_goes_on_where_it_stopped(decisive, monkeypatch, capsys):
    stream, asked = inference.stream, []

    def counting(model, prompts, *rest):
        asked.append(len(prompts))
        assert rest[-1] == 4  # the batch size
        for count, answer in enumerate(stream(model, prompts, *rest)):
            if count == stop_after:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(inference, "stream", counting)
    arguments = ["--ckpt", "ckpt", "--limit", 20, "--batch-size", 4, "--max-new-tokens", 10, "--dtype", "float32"]
    stop_after = None
    run(eval_script, *arguments, "--out", "whole")
    asked.clear()
    stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        run(eval_script, *arguments, "--out", "parts")
    with open("parts/predictions.jsonl", "a") as file:
        file.write('{"set": "toy", "ind')  # killed while it wrote
    stop_after = None
    asked.clear()
    capsys.readouterr()
    run(eval_script, *arguments, "--out", "parts")
    assert asked == [7] and "13 of 20 are in parts/predictions.jsonl already" in capsys.readouterr().out
    for name in ("predictions.jsonl", "results.json"):
        assert Path("whole", name).read_text() == Path("parts", name).read_text()
    asked.clear()
    run(eval_script, *arguments, "--out", "parts", "--limit", 25)
    assert asked == [5]
    run(eval_script, *arguments, "--out", "parts", "--limit", 5)
    assert asked == [5] and json.loads(Path("parts/results.json").read_text())["counts"] == {"toy": 5}
    for changed in (["--max-new-tokens", 11], ["--dtype", "bfloat16"], ["--ckpt", "other"], ["--adapter", "adapter"]):
        if changed[0] == "--ckpt":
            shutil.copytree("ckpt", "other")
            random_model(seed=99, vocab_size=1024, num_hidden_layers=2, max_position_embeddings=256).save_pretrained(
                "other"
            )
        if changed[0] == "--adapter":
            rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4), "adapter")
        run(eval_script, *arguments, "--out", "parts")
        asked.clear()
        run(eval_script, *arguments, "--out", "parts", *changed)
        assert sum(asked) == 20 and "starting anew" in capsys.readouterr().out


def test_several_sets_separated_by_commas(ckpt, capsys):
    write_test_sets("data", ["gsm8k", "SVAMP", "mawps"])
    run(eval_script, *"--ckpt ckpt --task mawps,gsm8k --data-dir data --out out --max-new-tokens 3".split())
    assert json.loads(Path("out/results.json").read_text())["counts"] == {"mawps": 13, "gsm8k": 5}


def choice(i):
    count = 3 + i % 3
    named = " ".join(f"Answer{n + 1}: {'xyz'[n % 3] * (n + i % 4 + 1)}" for n in range(count))
    wanted = "/".join(f"answer{n + 1}" for n in range(count))
    return {
        "instruction": f"Which is best, number {i}?\n\n{named}\n\nAnswer format: {wanted}",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }


def test_the_likeliest_option_is_the_answer(ckpt):
    file = Path("data/dataset/openbookqa/test.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([choice(i) for i in range(11)]))
    for out, size in (("a", 1), ("b", 4)):
        run(
            eval_script,
            *"--ckpt ckpt --task openbookqa --data-dir data --score likelihood --out".split(),
            out,
            *"--batch-size".split(),
            size,
            *"--dtype float32".split(),
        )
    lines = [[json.loads(line) for line in Path(out, "predictions.jsonl").read_text().splitlines()] for out in "ab"]
    model, tokenizer = Llama.from_pretrained("ckpt", dtype=torch.float64), load_tokenizer("ckpt")
    chosen = set()
    for i, both in enumerate(zip(*lines, strict=True)):
        scores = {}
        for n in range(3 + i % 3):  # the plain way: each question with each option as one text
            option = f"the correct answer is answer{n + 1}"
            prompt, response = tasks.encode_example(choice(i) | {"output": option}, tokenizer)
            log_probs = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
            scores[option] = sum(log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(response[:-1]))
        for line in both:  # one of two that are equally likely but for rounding is as right as the other
            assert scores[line["response"]] >= max(scores.values()) * (1 + bound(**of_model(model.config)))
            chosen.add(line["response"])
    assert len(chosen) > 1 or len({line["response"] for line in lines[0]}) == 1


def test_one_question_is_answered_as_it_is_asked(ckpt, capsys, monkeypatch):
    run(eval_script, "--ckpt", "ckpt", "--prompt", "Why?", "--max-new-tokens", 30, "--dtype", "float32")
    printed = capsys.readouterr().out
    tokenizer, model = load_tokenizer("ckpt"), Llama.from_pretrained("ckpt")
    prompt = tasks.encode_prompt({"instruction": "Why?"}, tokenizer)
    (ids,) = model.generate([prompt], 30, tokenizer.eos_id)
    assert printed == tokenizer.decode(ids) + "\n" and len(ids) == 30 and not Path("runs").exists()

    # The bytes of a character come one by one; the answer may fill the context, and no more.
    characters = tokenizer.encode("a🙂é")
    pieces, counts = [], []

    def generate(model, prompts, count, eos, on_token):
        counts.append(count)
        for n in range(1, len(characters) + 1):
            on_token(0, characters[:n])
        return [characters]

    monkeypatch.setattr(inference, "generate", generate)
    monkeypatch.setattr("builtins.print", lambda text, **_: pieces.append(text))
    run(eval_script, "--ckpt", "ckpt", "--prompt", "Why?", "--max-new-tokens", 5000)
    assert "".join(pieces) == "a🙂é" and not any("\ufffd" in piece for piece in pieces) and "🙂" in pieces
    assert counts == [256 - len(prompt)]


def test_predictions_do_not_depend_on_the_batch(decisive):
    model = Llama.from_pretrained("ckpt")
    for out, size in (("a", 1), ("b", 7), ("c", 32)):
        run(
            eval_script,
            *"--ckpt ckpt --limit 20 --batch-size".split(),
            size,
            *"--max-new-tokens 30 --out".split(),
            out,
            *"--dtype float32".split(),
        )
    lines = [Path(out, "predictions.jsonl").read_text() for out in "abc"]
    assert lines[0] == lines[1] == lines[2]
    tokenizer = load_tokenizer("ckpt")
    example = toy.examples("test", 20)[3]
    ids = model.generate([tasks.encode_prompt(example, tokenizer)], 30, tokenizer.eos_id)[0]
    assert json.loads(lines[0].splitlines()[3])["response"] == tokenizer.decode(ids)


def test_the_adapter_acts_and_results_lie_beside_it(ckpt):
    run(train_script, *QUICK, "--out", "run")
    for adapter in ((), ("--adapter", "run")):
        run(eval_script, "--ckpt", "ckpt", "--limit", 10, "--max-new-tokens", 20, "--dtype", "float32", *adapter)
    base, adapted = Path("runs/ckpt-toy-base/predictions.jsonl"), Path("run/predictions.jsonl")
    assert base.read_text() != adapted.read_text() and Path("run/results.json").is_file()
