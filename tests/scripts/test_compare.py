import json

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.errors import UserError
from scripts import compare

PROMPTS = [
    "\n\nHuman: Help Anna think of three fruits.\n\nAssistant:",
    "\n\nHuman: I need two tools for Ben.\n\nAssistant:",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def arguments(*flags):
    return compare.parse(
        [*flags, "--max-answer-seq-len", "6", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "SFT"], "not of the form NAME=PATH"),
        (["--model", "a=b", "--reference", "c", "--prompt", "x"], "--reference c is none of the models: a"),
        (["--model", "a=b"], "nothing to ask"),
        (["--model", "a=b", "--prompt", "x", "--temperature", "0"], "--temperature must be positive"),
        (["--model", "a=b", "--prompt", "x", "--temperature", "nan"], "--temperature must be positive"),
        (["--model", "a=b", "--prompt", "x", "--temperature", "inf"], "--temperature must be positive"),
        (["--model", "a=b", "--prompt", "x", "--num-prompts", "-1"], "--num-prompts must lie in .0, 2"),
        (["--model", "a=b", "--prompt", "x", "--num-shown", "-1"], "--num-shown must lie in"),
        (["--model", "a=b", "--prompt", "x", "--seed", "-1"], "--seed must lie in"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        compare.parse(flags)


def test_a_row_without_a_prompt_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    assert compare.read_prompts(compare.parse(["--model", "a=b", "--prompt", "x"])) == ["x"]
    args = compare.parse(["--model", "a=b", "--data-path", str(path)])
    with pytest.raises(UserError, match=r'rows\.jsonl:2: the row has no "answer"; its columns are: question'):
        compare.read_prompts(args)


def test_the_same_command_gives_the_same_answers_and_another_seed_others(model):
    flags = ("--model", f"a={model}")
    first, again, other = (
        compare.compare(arguments(*flags, *seed))[1]["a"] for seed in ((), (), ("--seed", "5"))
    )
    assert first == again != other


def test_greedy_answers_do_not_depend_on_the_batch(model):
    flags = ("--model", f"a={model}", "--greedy")
    together = compare.compare(arguments(*flags))[1]
    alone = compare.compare(arguments(*flags, "--batch-size", "1"))[1]
    assert together == alone


def test_kl_is_zero_to_the_same_model_and_the_gap_of_log_likelihoods_to_another(model, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    args = arguments("--model", f"a={model}", "--model", f"b={other}", "--reference", "a")
    _, _, figures = compare.compare(args)
    assert figures["a"]["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["b"]["kl"] != pytest.approx(0, abs=1e-5)


def test_a_log_likelihood_is_the_sum_over_the_answer_alone(model):
    llama = AutoModelForCausalLM.from_pretrained(model).eval()
    # Two rows of different lengths, so that one of them is padded.
    answers = compare.Answers(["", ""], [[5, 6, 7], [8]], [[9, 10], [11]])
    actual = compare.log_likelihoods(llama, answers, pad_id=1, batch_size=2)
    with torch.no_grad():
        long = llama(torch.tensor([[5, 6, 7, 9, 10]])).logits.log_softmax(-1)[0]
        short = llama(torch.tensor([[8, 11]])).logits.log_softmax(-1)[0]
    expected = [(long[2, 9] + long[3, 10]).item(), short[0, 11].item()]
    assert actual == pytest.approx(expected, abs=1e-4)


def test_the_demo_task_is_checked_and_the_figures_are_written(model, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    flags = ["--demo-task", "--max-answer-seq-len", "4", "--prompt", PROMPTS[0]]
    compare.main(["--model", f"a={model}", "--output", str(figures), *flags])
    # A random model's four tokens are no list of three fruits.
    assert json.loads(figures.read_text())["a"]["success"] == 0
    assert "wrong:" in capsys.readouterr().out
