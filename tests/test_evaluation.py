"""Statements about the loop of eval.py: answers, scores, predictions, one question."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHORT_ROSA_RUN, decisive_model, random_model, run, write_test_sets
from rounding import bound, of_model
from safetensors.torch import load_file, save_file

import eval as eval_script
import rosa
import train
from data import tasks, toy
from data.tokenizer import load_tokenizer
from extras import inference, kernels
from extras.records import hash_of
from model import Llama

pytestmark = pytest.mark.numeric
SMALL = {"vocab_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 256}


def evaluate(options, *more, out="out"):
    """Run eval.py on the checkpoint. Returns the lines of its predictions that it has made with
    these settings and this code, and its results."""
    run(eval_script, *"--ckpt ckpt --dtype float32 --out".split(), out, *options.split(), *more)
    lines = [json.loads(line) for line in Path(out, "predictions.jsonl").read_text().splitlines()]
    results = json.loads(Path(out, "results.json").read_text())
    made_by = (
        "-".join(str(results[name]) for name in ("checkpoint", "adapter", "settings")),
        hash_of(results["code"]),
    )
    return [line for line in lines if (line["settings"], line["code"]) == made_by], results


@pytest.fixture(scope="module")
def decisive_weights():
    """A model whose answers to 25 questions do not depend on rounding."""
    tokenizer = load_tokenizer(ROOT / "data" / "tiny")
    prompts = [tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 25)]
    return decisive_model(prompts, 30, **SMALL)


@pytest.fixture
def decisive(ckpt, decisive_weights):
    decisive_weights.save_pretrained(ckpt)


# --- answers and scores ---


def test_scores_predictions_and_absent_sets(ckpt, capsys, monkeypatch):
    write_test_sets("data", ["gsm8k", "SVAMP"])
    answers = {
        e["instruction"]: e["answer"]
        for i in range(2)
        for e in toy.examples("test", 5 + 4 * i, seed=i)
    }
    tokenizer = load_tokenizer("ckpt")

    # The answers are right where the problem begins with a letter before I: Anna to Hugo
    def stream(model, prompts, max_new_tokens, eos_ids, batch_size):
        for i, prompt in reversed(list(enumerate(prompts))):
            text = tokenizer.decode(prompt).split("Instruction:\n")[1].split("\n")[0]
            yield i, tokenizer.encode(f"The answer is {answers[text]}." if text < "I" else "No.")

    monkeypatch.setattr(inference, "stream", stream)
    lines, results = evaluate("--task arithmetic --data-dir data --max-new-tokens 50")
    asked = [("gsm8k", i) for i in range(5)] + [("SVAMP", i) for i in range(9)]
    assert [(line["set"], line["index"]) for line in lines] == asked
    right = {"gsm8k": [], "SVAMP": []}
    for line in lines:
        right[line["set"]].append(line["correct"])
        assert (
            line["correct"] == (line["instruction"] < "I") == (line["extracted"] == line["answer"])
        )
    scores = {name: sum(each) / len(each) for name, each in right.items()}
    micro = sum(sum(right.values(), [])) / 14
    assert (results["scores"], results["micro"], results["macro"]) == (
        scores,
        micro,
        sum(scores.values()) / 2,
    )
    assert results["counts"] == {"gsm8k": 5, "SVAMP": 9}
    low, high = results["intervals"]["SVAMP"]
    assert 0 <= low < scores["SVAMP"] < high <= 1 and high - low > 0.3
    printed = capsys.readouterr().out
    assert printed.count("absent") == 6 and "python data/download.py all --dir data" in printed
    assert f"{results['macro']:.1%}" in printed


@pytest.mark.parametrize("plain", [False, True])
def test_weights_are_laid_out_for_inference_unless_it_is_to_be_plain(ckpt, monkeypatch, plain):
    calls, accelerate = [], kernels.accelerate
    monkeypatch.setattr(
        kernels, "accelerate", lambda *given, **how: calls.append(how) or accelerate(*given, **how)
    )
    evaluate("--limit 1 --max-new-tokens 1" + " --plain" * plain)
    assert calls == [] if plain else calls == [{"inference": True}]


def test_several_sets_separated_by_commas(ckpt):
    write_test_sets("data", ["gsm8k", "SVAMP", "mawps"])
    _, results = evaluate("--task mawps,gsm8k --data-dir data --max-new-tokens 3")
    assert results["counts"] == {"mawps": 13, "gsm8k": 5}


def test_the_adapter_acts_and_results_lie_beside_it(ckpt):
    run(train, *SHORT_ROSA_RUN, "--out", "run")
    for adapter in ((), ("--adapter", "run")):
        run(
            eval_script,
            *"--ckpt ckpt --limit 10 --max-new-tokens 20 --dtype float32".split(),
            *adapter,
        )
    base, adapted = Path("runs/ckpt-toy-base/predictions.jsonl"), Path("run/predictions.jsonl")
    assert base.read_text() != adapted.read_text() and Path("run/results.json").is_file()


def test_predictions_depend_neither_on_the_batch_nor_on_what_computes_them(decisive, monkeypatch):
    files = []
    for out, options in zip("abcd", ("--batch-size 1", "--batch-size 7", "", "--plain")):
        if options == "--plain":  # which calls neither of these functions
            monkeypatch.setattr(inference, "stream", None)
            monkeypatch.setattr(kernels, "accelerate", None)
        lines, _ = evaluate(f"--limit 20 --max-new-tokens 30 {options}", out=out)
        files.append(Path(out, "predictions.jsonl").read_text())
    assert files == files[:1] * 4
    model, tokenizer = Llama.from_pretrained("ckpt"), load_tokenizer("ckpt")
    (ids,) = model.generate(
        [tasks.encode_prompt(toy.examples("test", 20)[3], tokenizer)], 30, tokenizer.eos_id
    )
    assert lines[3]["response"] == tokenizer.decode(ids)


# --- numbers that are none ---


def spoil(file, end):
    """Put one NaN into the tensor whose name ends in `end`."""
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith(end))].view(-1)[3] = torch.nan
    save_file(tensors, file)


@pytest.mark.parametrize(
    "spoiled, end",
    [("ckpt/model", "1.input_layernorm.weight"), ("a/adapter_model", "lora_B.weight")],
)
@pytest.mark.parametrize(
    "ask", ["--limit 4", "--limit 4 --plain", "--prompt two", "--task boolq --score likelihood"]
)
def test_a_nan_ends_an_evaluation_in_a_line_and_what_was_answered_is_kept(
    ckpt, capsys, spoiled, end, ask
):
    Path("dataset/boolq").mkdir(parents=True)
    question = {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}
    Path("dataset/boolq/test.json").write_text(json.dumps([question]))
    rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4, 8), "a")
    options = f"--adapter a --max-new-tokens 3 --data-dir . {ask}"
    if "--prompt" not in ask:
        evaluate(options)
    kept = [file.read_bytes() for file in sorted(Path("out").glob("*"))]
    spoil(f"{spoiled}.safetensors", end)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        eval_script.run(["--ckpt", "ckpt", "--dtype", "float32", "--out", "out", *options.split()])
    out, error = capsys.readouterr()
    assert stopped.value.code == 1 and error.splitlines()[-1].startswith("eval.py: model.layers.")
    assert "holds numbers that are not finite" in error and "Traceback" not in error
    assert [file.read_bytes() for file in sorted(Path("out").glob("*"))] == kept


def test_logits_that_overflow_end_an_evaluation_too(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(
        eval_script, "check_finite", lambda model: model.lm_head.weight.data[5].fill_(torch.inf)
    )
    with pytest.raises(SystemExit) as stopped:
        eval_script.run(
            "--ckpt ckpt --limit 4 --max-new-tokens 3 --out out --dtype float32".split()
        )
    assert stopped.value.code == 1 and "logits are not finite" in capsys.readouterr().err
    assert not Path("out/results.json").exists()


def test_prompts_that_leave_no_room_are_counted_and_when_asked_to_score_as_wrong(ckpt, capsys):
    write_test_sets("data", ["gsm8k"])
    file = Path("data/dataset/gsm8k/test.json")
    first, *others = json.loads(file.read_text())
    long = first | {"instruction": "word " * 300}
    empty = first | {"instruction": ""}  # what is left out keeps its place in the file
    file.write_text(json.dumps([empty, first, long, *others, long]))
    command = "--task gsm8k --data-dir data --max-new-tokens 3 --skip-empty"
    with pytest.raises(SystemExit) as stopped:
        eval_script.run(["--ckpt", "ckpt", *command.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert (
        "gsm8k, record 2: the prompt has" in error
        and "(2 of 7 prompts do; --long-is-wrong counts" in error
    )
    lines, results = evaluate(f"{command} --long-is-wrong")
    assert [
        (line["index"], line["correct"], line["response"])
        for line in lines
        if line["index"] in (1, 6)
    ] == [
        (1, False, ""),
        (6, False, ""),
    ]
    assert results["counts"] == {"gsm8k": 7} and all(
        line["response"] for line in lines if line["index"] not in (1, 6)
    )


# --- what a result belongs to ---


def test_answers_are_of_the_tokenizer_and_the_generation_config_too_and_of_the_whole_prompt(
    ckpt, capsys
):
    write_test_sets("data", ["gsm8k"])
    command, file = (
        "--task gsm8k --data-dir data --max-new-tokens 3",
        Path("data/dataset/gsm8k/test.json"),
    )

    def reused():
        capsys.readouterr()
        evaluate(command)
        return "5 of 5 are in" in capsys.readouterr().out

    assert not reused() and reused()
    for name, content in (
        ("generation_config.json", '{"eos_token_id": 7}'),
        ("tokenizer_config.json", '{"a": 1}'),
    ):
        Path("ckpt", name).write_text(content)
        assert not reused() and reused()
    records = json.loads(file.read_text())
    file.write_text(json.dumps([record | {"input": "Think."} for record in records]))
    assert not reused() and reused()


def test_an_adapter_that_names_another_base_is_used_with_a_line(ckpt, capsys):
    rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4, 8), "a")
    evaluate("--adapter a --limit 1 --max-new-tokens 3")
    assert "was trained on" not in capsys.readouterr().out
    Path("ckpt").rename("other")
    eval_script.run("--ckpt other --adapter a --limit 1 --max-new-tokens 3".split())
    assert "adapter    a was trained on ckpt, not on" in capsys.readouterr().out


def test_an_answer_says_whether_it_ended_or_was_cut(decisive, capsys):
    lines, _ = evaluate("--limit 20 --max-new-tokens 30")
    tokenizer = load_tokenizer("ckpt")
    cut = [line["finish_reason"] == "length" for line in lines]
    assert f"{sum(cut)} answers were cut at --max-new-tokens 30" in capsys.readouterr().out
    prompts = [tasks.encode_prompt(example, tokenizer) for example in toy.examples("test", 20)]
    answers = Llama.from_pretrained("ckpt").generate(prompts, 30, tokenizer.eos_id)
    assert cut == [len(answer) == 30 for answer in answers]


def choice(i):
    count = 3 + i % 3
    named = " ".join(f"Answer{n + 1}: {'xyz'[n % 3] * (n + i % 4 + 1)}" for n in range(count))
    wanted = "/".join(f"answer{n + 1}" for n in range(count))
    instruction = f"Which is best, number {i}?\n\n{named}\n\nAnswer format: {wanted}"
    return {
        "instruction": instruction,
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }


def test_the_likeliest_option_is_the_answer_whatever_computes_it(ckpt, monkeypatch):
    file = Path("data/dataset/openbookqa/test.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([choice(i) for i in range(11)]))
    lines = []
    for out, options in zip("abc", ("--batch-size 1", "--batch-size 4", "--plain")):
        if options == "--plain":
            monkeypatch.setattr(inference, "log_likelihoods", None)
        lines.append(
            evaluate(f"--task openbookqa --data-dir data --score likelihood {options}", out=out)[0]
        )
    model, tokenizer = Llama.from_pretrained("ckpt", dtype=torch.float64), load_tokenizer("ckpt")
    for i, answers in enumerate(zip(*lines, strict=True)):
        scores = {}
        for n in range(3 + i % 3):  # score the question with each of its options as one text
            option = f"the correct answer is answer{n + 1}"
            prompt, response = tasks.encode_example(choice(i) | {"output": option}, tokenizer)
            log_probs = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
            scores[option] = sum(
                log_probs[len(prompt) + t - 1, token].item()
                for t, token in enumerate(response[:-1])
            )
        # Where two options are equally likely but for rounding, either is right
        for line in answers:
            assert scores[line["response"]] >= max(scores.values()) * (
                1 + bound(**of_model(model.config))
            )


def test_an_edited_log_likelihood_is_what_scores_and_a_line_says_so(ckpt, monkeypatch, capsys):
    file = Path("data/dataset/openbookqa/test.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([choice(i) for i in range(6)]))
    command, plain = (
        "--task openbookqa --data-dir data --score likelihood",
        eval_script.log_likelihood,
    )
    lines, _ = evaluate(command)
    monkeypatch.setattr(eval_script, "log_likelihood", lambda *given: -plain(*given))
    edited, _ = evaluate(command)
    shown = capsys.readouterr().out
    assert (
        "eval.log_likelihood has been edited: asking Llama.loss, one option after the other"
        in shown
    )
    assert "6 in out/predictions.jsonl were answered by other code: asking again" in shown
    assert "extras/inference.py stands for Llama.loss" in shown  # said by the first evaluation
    assert all(one["response"] != two["response"] for one, two in zip(lines, edited, strict=True))


def test_what_is_right_is_judged_anew_from_the_stored_responses(decisive, monkeypatch, capsys):
    lines, before = evaluate("--limit 5 --max-new-tokens 10")
    monkeypatch.setattr(
        tasks, "extract_answer", lambda name, response: toy.examples("test", 1)[0]["answer"]
    )
    monkeypatch.setattr(inference, "stream", None)  # the model is not asked again
    judged, after = evaluate("--limit 5 --max-new-tokens 10")
    assert "5 of 5 are in out/predictions.jsonl already" in capsys.readouterr().out
    assert [line["response"] for line in judged] == [line["response"] for line in lines]
    right = [line["answer"] == lines[0]["answer"] for line in lines]
    assert [line["correct"] for line in judged] == right and after["micro"] == sum(
        right
    ) / 5 > before["micro"]


# --- going on ---


def test_an_evaluation_goes_on_where_it_stopped(decisive, monkeypatch, capsys):
    stream, asked, stop_after = inference.stream, [], None

    def counting(model, prompts, *rest):
        asked.append(len(prompts))
        assert rest[-1] == 4  # the batch size
        for count, answer in enumerate(stream(model, prompts, *rest)):
            if count == stop_after:
                raise KeyboardInterrupt
            yield answer

    def asks(*options, out="parts"):
        asked.clear()
        capsys.readouterr()
        _, results = evaluate("--limit 20 --batch-size 4 --max-new-tokens 10", *options, out=out)
        return sum(asked), results["counts"]["toy"]

    monkeypatch.setattr(inference, "stream", counting)
    assert asks(out="whole") == (20, 20)
    stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        asks()
    with open("parts/predictions.jsonl", "a") as file:
        file.write('{"set": "toy", "ind')  # killed while it wrote
    stop_after = None
    assert (
        asks() == (7, 20)
        and "13 of 20 are in parts/predictions.jsonl already" in capsys.readouterr().out
    )
    for name in ("predictions.jsonl", "results.json"):
        assert Path("whole", name).read_text() == Path("parts", name).read_text()
    assert asks("--limit", 25) == (5, 25) and asks("--limit", 5) == (0, 5)
    shutil.copytree("ckpt", "other")
    random_model(seed=99, **SMALL).save_pretrained("other")
    rosa.save_adapter(rosa.attach(Llama.from_pretrained("ckpt"), 4), "adapter")
    for changed in ("--max-new-tokens 11", "--dtype bfloat16", "--ckpt other", "--adapter adapter"):
        asks()
        assert asks(*changed.split())[0] == 20 and "starting anew" in capsys.readouterr().out


# --- one question ---


def test_one_question_is_answered_as_it_is_asked(decisive, capsys, monkeypatch):
    question = toy.examples("test", 1)[0]["instruction"]
    tokenizer, model = load_tokenizer("ckpt"), Llama.from_pretrained("ckpt")
    prompt = tasks.encode_prompt({"instruction": question}, tokenizer)
    (ids,) = model.generate([prompt], 30, tokenizer.eos_id)
    asking = ("--ckpt", "ckpt", "--dtype", "float32", "--prompt", question, "--max-new-tokens")
    for plain in ([], ["--plain"]):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(inference, "stream", None)
            run(eval_script, *asking, 30, *plain)
        # Where there is no oneDNN a line says first which kernels are not used
        *_, printed = capsys.readouterr().out.split("as written\n")
        assert printed == tokenizer.decode(ids) + "\n" and ids and not Path("runs").exists()

    # The bytes of a character come one by one. The answer may fill the context, and is no longer.
    characters, pieces, counts = tokenizer.encode("a🙂é"), [], []

    def stream(model, prompts, count, eos, on_token):
        counts.append(count)
        for n in range(1, len(characters) + 1):
            on_token(0, characters[:n])
        yield 0, characters

    monkeypatch.setattr(inference, "stream", stream)
    monkeypatch.setattr(kernels, "accelerate", lambda *_, **how: ([], {}))
    monkeypatch.setattr(kernels, "say_what_runs", lambda *_: None)
    monkeypatch.setattr("builtins.print", lambda text, **_: pieces.append(text))
    run(eval_script, *asking, 5000)
    assert (
        "".join(pieces) == "a🙂é"
        and not any("\ufffd" in piece for piece in pieces)
        and "🙂" in pieces
    )
    assert counts == [256 - len(prompt)]
