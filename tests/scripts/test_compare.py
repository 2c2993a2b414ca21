import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_judge import FakeJudge, judging
from tiny import comparison_rows, save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.arguments import RolloutArguments
from dschat.data.comparisons import Comparison
from dschat.data.held_out import RecordedData, SplitText
from dschat.data.loaders import build_eval_prompts
from dschat.data.rows import Rows
from dschat.data.tokenization import tokenize_prompts
from dschat.errors import UserError
from dschat.rlhf import answering
from dschat.rlhf.monitoring.evaluation import EVALUATION
from dschat.rlhf.rewards.retokenize import answer_texts
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from scripts import compare, compare_page
from scripts.compare_prompts import Asked
from scripts.judge import Judge

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
        (["--model", "a=b", "--model", "a=c"], "two models have one name"),
        (["--model", "a=b", "--judge", "http://x/v1"], "--judge and --judge-model go together"),
        (["--model", "a=b", "--prompt", "x", "--top-p", "0"], r"--top-p must lie in \(0, 1\], got 0"),
        (["--model", "a=b", "--prompt", "x", "--top-k", "-1"], "--top-k must lie in"),
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
    assert compare.read_prompts(compare.parse(["--model", "a=b", "--prompt", "x"])).prompts == ["x"]
    args = compare.parse(["--model", "a=b", "--data-path", str(path)])
    with pytest.raises(UserError, match=r'rows\.jsonl:2: the row has no "answer"; its columns are: question'):
        compare.read_prompts(args)


def test_the_same_command_gives_the_same_answers_and_another_seed_others(model):
    flags = ("--model", f"a={model}")
    first, again, other = (
        compare.compare(arguments(*flags, *seed)).answers["a"] for seed in ((), (), ("--seed", "5"))
    )
    assert first == again != other


def test_greedy_answers_do_not_depend_on_the_batch(model):
    flags = ("--model", f"a={model}", "--greedy")
    together = compare.compare(arguments(*flags)).answers
    alone = compare.compare(arguments(*flags, "--batch-size", "1")).answers
    assert together == alone


def test_kl_is_zero_to_the_same_model_and_the_gap_of_log_likelihoods_to_another(model, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    args = arguments("--model", f"a={model}", "--model", f"b={other}", "--reference", "a")
    figures = compare.compare(args).figures
    assert figures["a"]["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["b"]["kl"] != pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_measured_at_the_temperature_that_answers_are_sampled_at(model, tmp_path, temperature):
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    flags = [
        "--model",
        f"a={model}",
        "--model",
        f"b={other}",
        "--reference",
        "a",
        "--temperature",
        temperature,
    ]
    args = arguments(*map(str, flags))
    figures = compare.compare(args).figures
    said = compare.ask(answering.load(str(other), "b"), PROMPTS, args)
    gaps = []
    for batch, ids in zip(said.batches, [said.token_ids], strict=True):
        for row, length in zip(ids, batch.answer_lengths.tolist(), strict=True):
            of_models = []
            for path in (other, model):
                with torch.no_grad():
                    llama = AutoModelForCausalLM.from_pretrained(path).eval()
                    logprobs = (llama(torch.tensor([row])).logits[0, :-1] / temperature).log_softmax(-1)
                places = range(len(row) - 1 - length, len(row) - 1)
                of_models.append(sum(logprobs[place, row[place + 1]].item() for place in places))
            gaps.append(of_models[0] - of_models[1])
    assert figures["b"]["kl"] == pytest.approx(sum(gaps) / 2, abs=1e-4)


CHATTING = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 2.0,
    "min_length": 500, "min_new_tokens": 6, "bad_words_ids": [[token] for token in range(20, 60)],
    "forced_bos_token_id": 9, "forced_eos_token_id": 0, "suppress_tokens": list(range(60, 99)),
    "begin_suppress_tokens": [7, 8],
    "sequence_bias": [[[11], -50.0]], "exponential_decay_length_penalty": [1, 9.0], "guidance_scale": 3.0,
    "temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.2, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "do_sample": True, "num_beams": 3, "renormalize_logits": True, "max_new_tokens": 1,
    "stop_strings": ["e"], "prompt_lookup_num_tokens": 3,
}  # fmt: skip


@pytest.mark.parametrize("greedy", [[], ["--greedy"]])
def test_nothing_that_a_checkpoint_ships_for_chatting_acts(model, tmp_path, greedy):
    """Nor in rollouts and evaluations, whose sampling this is."""
    chatting = shutil.copytree(model, tmp_path / "chatting")
    config = json.loads((chatting / "generation_config.json").read_text())
    (chatting / "generation_config.json").write_text(json.dumps(config | CHATTING))
    models = ("--model", f"a={model}", "--model", f"b={chatting}", "--reference", "a")
    found = compare.compare(arguments(*models, *greedy))
    answers, figures = found.answers, found.figures
    assert answers["a"] == answers["b"]
    assert figures["a"] == figures["b"]
    assert max(len(text) for text in answers["a"]) > 1


def test_answers_are_those_of_an_evaluation_of_step_3(model):
    args = arguments("--model", f"a={model}", "--temperature", "0.7", "--seed", "3")
    asked = answering.load(str(model), "a")
    rows = tokenize_prompts(
        comparison_rows(*map(Comparison, PROMPTS)), asked.tokenizer, max_prompt_seq_len=99
    )
    pad_id = asked.tokenizer.pad_token_id
    (batch,) = build_eval_prompts(
        Rows.of(rows.rows), num_prompts=9, pad_id=pad_id, batch_size=9, rank=0, world_size=1
    )
    settings = RolloutArguments(max_answer_seq_len=6, temperature=0.7)
    backend = HuggingFaceGenerate(asked, asked.tokenizer)
    with backend.session():
        evaluated = backend.generate(batch, replace(Sampling.of(settings, seed=3), ppo_step=EVALUATION))
    texts = dict(zip(evaluated.prompt_rows.tolist(), answer_texts(evaluated, asked.tokenizer), strict=True))
    assert compare.compare(args).answers["a"] == [texts[0], texts[1]]


def test_models_of_other_tokens_have_no_kl(model, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama", tokenizer=tiny_tokenizer(["zebra zebra"]))
    args = arguments("--model", f"a={model}", "--model", f"b={other}", "--reference", "a")
    with pytest.raises(UserError, match="--reference a: the tokens of b are not those of a"):
        compare.compare(args)


def test_the_demo_task_is_checked_and_the_figures_are_written(model, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    flags = ["--demo-task", "--max-answer-seq-len", "4", "--prompt", PROMPTS[0]]
    compare.main(["--model", f"a={model}", "--output", str(figures), *flags])
    # A random model's four tokens are no list of three fruits.
    assert json.loads(figures.read_text())["figures"]["a"]["success"] == 0
    assert "wrong:" in capsys.readouterr().out


CHECKER = """
def length(prompts, answers, letter):
    assert all(prompt.startswith("\\n\\nHuman: ") for prompt in prompts)
    return [len(answer) if column == "a" else 0.0 for answer, column in zip(answers, letter)]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of step 3 as far as a comparison knows it, another model, a reward model and a checker."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"Name {n} things.", "letter": "ab"[n % 2]} for n in range(30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "ppo" / "actor")
    save_tiny_model(folder / "other", seed=1)
    save_reward_model(folder / "other", folder / "reward")
    data = {"data_path": [str(folder / "prompts.jsonl")], "eval_fraction": 0.4, "data_split": "0,0,1"}
    record = json.dumps({"data": data, "run": {"seed": 5}})
    (folder / "ppo" / "arguments.json").write_text(record)
    (folder / "checks.py").write_text(CHECKER)
    return folder


def of_run_flags(run):
    models = ["--model", f"SFT={run / 'other'}", "--model", f"PPO={run / 'ppo' / 'actor'}"]
    return [*models, "--max-answer-seq-len", "6"]


def of_run(run, *flags):
    return compare.parse([*of_run_flags(run), *map(str, flags)])


@pytest.fixture(scope="module")
def endpoint():
    with judging() as url:
        yield url


def test_the_page_in_a_browser(browser, tmp_path):
    asked = Asked(["\n\nHuman: Name a tea.", "<script>"], "held out", [{}, {}], ["--data-path: careful"])
    answers = {"SFT": ["a", "b " * 99], "PPO/with_a_long_name": ["c", "<img>"]}
    figures = {
        name: {"score by reward model": 4.5, "score by reward model_interval": (2.125, 1012.5), "kl": 0.5}
        for name in answers
    }
    scores = {"reward model": {name: np.array([1.0, 2.0]) for name in answers}}
    found = compare.Comparison(asked, answers, figures, scores, verdicts=[("PPO is better: wins", "good")])
    path = tmp_path / "comparison.html"
    path.write_text(compare_page.as_page(compare.parse(["--model", "SFT=a", "--model", "PPO=b"]), found))
    browser.check(path, "comparison")


def test_held_out_prompts_are_asked_and_every_source_gives_scores_and_win_rates(
    run, endpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    FakeJudge.requests.clear()
    flags = ["--reward-model", run / "reward", "--reward-function", f"{run / 'checks.py'}:length"]
    flags += ["--judge", endpoint, "--judge-model", "fake", "--html", tmp_path / "c.html"]
    args = of_run(run, *flags, "--output", tmp_path / "c.json")
    compare.main([*of_run_flags(run), *map(str, flags), "--output", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["prompts"]["number"] == 12  # 0.4 of thirty
    assert "held out" in found["prompts"]["which"]
    assert found["prompts"]["warnings"] == [
        "SFT has no record of its data: it may have been trained on these prompts"
    ]
    split = SplitText.of_run(RecordedData.of(str(run / "ppo" / "actor")))
    held_out = set(split.prompts(split.held_out()))
    assert {sample["prompt"] for sample in found["samples"]} == held_out
    # scores are those of the reward model as transformers reads it, in the template of the answers
    reward = AutoModelForSequenceClassification.from_pretrained(run / "reward").eval()
    said = compare.ask(answering.load(str(run / "other"), ""), compare.read_prompts(args).prompts, args)
    with torch.no_grad():
        scores = [reward(torch.tensor([ids])).logits.item() for ids in said.token_ids]
    found_scores = [sample["scores"]["reward model"]["SFT"] for sample in found["samples"]]
    assert sorted(found_scores) == pytest.approx(sorted(scores), abs=1e-4)
    for sample in found["samples"]:
        number = int(re.search(r"\d+", sample["prompt"])[0])
        for name, text in sample["answers"].items():
            assert sample["scores"]["length"][name] == (0.0 if number % 2 else len(text))
        ours, theirs = (sample["scores"]["reward model"][name] for name in ("PPO", "SFT"))
        assert sample["wins"]["reward model"] == {"PPO": 0.5 if ours == theirs else float(ours > theirs)}
        assert sample["wins"]["judge"] == {"PPO": expected_of_judge(sample["answers"])}
    figures = found["figures"]["PPO"]
    for source in ("reward model", "length", "judge"):
        wins = [sample["wins"][source]["PPO"] for sample in found["samples"]]
        assert figures[f"win rate by {source}"] == pytest.approx(sum(wins) / 12)
        low, high = figures[f"win rate by {source}_interval"]
        assert low < figures[f"win rate by {source}"] < high
        assert f"against SFT by {source}" in printed
    assert figures["kl"] != found["figures"]["SFT"]["kl"] == pytest.approx(0, abs=1e-5)
    assert {request["path"] for request in FakeJudge.requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in FakeJudge.requests} == {"Bearer secret"}
    assert "secret" not in printed + (tmp_path / "c.json").read_text() + (tmp_path / "c.html").read_text()


def expected_of_judge(answers: dict[str, str]) -> float:
    ours, theirs = answers["PPO"], answers["SFT"]
    if ours == theirs or "?" in ours + theirs or "x" in ours + theirs or len(ours) == len(theirs):
        return 0.5
    return float(len(ours) > len(theirs))


def test_a_judge_is_asked_in_both_orders_and_must_speak_as_asked(endpoint):
    judge = Judge(endpoint, "fake", first_pause=0.01)
    prompts = ["p"] * 5
    answers, others = ["long", "s", "x", "same", "?"], ["s", "long", "xx", "same", "b"]
    assert judge.wins(prompts, answers, others) == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert (judge.inconsistent, judge.unreadable) == (1, 1)
    with pytest.raises(UserError, match=r"2 of 2 pairs got a reply without \[\[A\]\]"):
        judge.wins(["p"] * 2, ["?", "?"], ["a", "b"])
    with pytest.raises(UserError, match=r"Connection refused, 4 times in a row"):
        Judge("http://127.0.0.1:9/v1", "fake", first_pause=0.001).wins(["p"], ["a"], ["bb"])


def test_prompts_that_models_were_trained_on_are_asked_with_a_warning_and_runs_must_agree(run, tmp_path):
    asked = compare.read_prompts(of_run(run, "--data-path", run / "prompts.jsonl"))
    assert len(asked.prompts) == 30
    assert "18 of the prompts are in the training data of PPO's run" in asked.warnings[0]
    assert len(compare.read_prompts(of_run(run, "--num-prompts", "5")).prompts) == 5
    other = tmp_path / "ppo2"
    shutil.copytree(run / "ppo", other)
    record = json.loads((other / "arguments.json").read_text())
    (other / "arguments.json").write_text(json.dumps({**record, "run": {"seed": 6}}))
    with pytest.raises(UserError, match="PPO and B come from runs that held out different prompts"):
        compare.read_prompts(of_run(run, "--model", f"B={other / 'actor'}"))
    with pytest.raises(UserError, match="nothing to ask: none of the models has"):
        compare.read_prompts(compare.parse(["--model", f"a={run / 'other'}"]))
    with pytest.raises(UserError, match=r"--reward-function nowhere.py:f: nowhere.py is no file"):
        compare.compare(of_run(run, "--reward-function", "nowhere.py:f"))
    with pytest.raises(UserError, match=r"--html nowhere/c.html: there is no folder nowhere"):
        compare.compare(of_run(run, "--html", "nowhere/c.html"))


def test_what_cannot_score_is_told_before_the_answers_and_why_it_gives_no_score(run, tmp_path, capsys):
    (tmp_path / "no.py").write_text("def no(prompts, answers):\n    raise ValueError('no idea')\n")
    for flags in (["--reward-function", f"{tmp_path / 'no.py'}:yes"], ["--reward-model", run / "other"]):
        with pytest.raises(UserError, match=r"no function 'yes'|A reward model comes from step 2"):
            compare.compare(of_run(run, *flags))
    assert "answers in" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no gives none of the answers"):
        compare.compare(of_run(run, "--reward-function", f"{tmp_path / 'no.py'}:no", "--num-prompts", "1"))
    assert "no has no score for 1 of 1 answers: ValueError: no idea (no.py:2)" in capsys.readouterr().out


def test_repetition_is_the_share_of_pieces_of_four_tokens_that_stood_there_before():
    ids = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 0, 0, 0, 0, 0]])
    batch = SimpleNamespace(answers=ids, answer_lengths=torch.tensor([8, 8, 3]))
    # 1212 2121 1212 2121 1212: two of five are new; all of the second are; the third is too short
    assert compare.repetition(SimpleNamespace(batches=[batch])) == pytest.approx((3 / 5 + 0 + 0) / 3)
