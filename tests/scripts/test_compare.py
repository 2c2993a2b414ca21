import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import comparison_rows, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.arguments import RolloutArguments
from dschat.data.comparisons import Comparison
from dschat.data.loaders import build_eval_prompts
from dschat.data.tokenization import tokenize_prompts
from dschat.errors import UserError
from dschat.rlhf import answering
from dschat.rlhf.monitoring.evaluation import EVALUATION
from dschat.rlhf.rewards.retokenize import answer_texts
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
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
    figures = compare.compare(args)[2]
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
    _, answers, figures = compare.compare(arguments(*models, *greedy))
    assert answers["a"] == answers["b"]
    assert figures["a"] == figures["b"]
    assert max(len(text) for text in answers["a"]) > 1


def test_answers_are_those_of_an_evaluation_of_step_3(model):
    args = arguments("--model", f"a={model}", "--temperature", "0.7", "--seed", "3")
    asked = answering.load(str(model), "a")
    rows = tokenize_prompts(
        comparison_rows(*map(Comparison, PROMPTS)), asked.tokenizer, max_prompt_seq_len=99
    )
    (batch,) = build_eval_prompts(
        rows.rows, num_prompts=9, pad_id=asked.tokenizer.pad_token_id, batch_size=9, rank=0, world_size=1
    )
    settings = RolloutArguments(max_answer_seq_len=6, temperature=0.7)
    backend = HuggingFaceGenerate(asked, asked.tokenizer)
    with backend.session():
        evaluated = backend.generate(batch, replace(Sampling.of(settings, seed=3), ppo_step=EVALUATION))
    texts = dict(zip(evaluated.prompt_rows.tolist(), answer_texts(evaluated, asked.tokenizer), strict=True))
    assert compare.compare(args)[1]["a"] == [texts[0], texts[1]]


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
    assert json.loads(figures.read_text())["a"]["success"] == 0
    assert "wrong:" in capsys.readouterr().out
