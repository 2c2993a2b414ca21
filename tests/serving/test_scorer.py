from dataclasses import replace

import pytest
import torch
from chat_templates import CHATML
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from dschat.data.comparisons import Turn
from dschat.rlhf.rollout.backend import Sampling
from dschat.serving.scorer import Scorer

PROMPT = (Turn("user", "Name a tea."),)


def expected_score(folder, ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


@pytest.fixture(scope="module")
def said(speaker):
    ids, _ = speaker.read(PROMPT)
    return ids, speaker.answer(ids, Sampling(max_answer_length=8, seed=1))


def test_a_reward_model_of_the_same_tokens_scores_what_was_sampled(speaker, folder, tmp_path, said):
    ids, answer = said
    reward_model = save_reward_model(folder, tmp_path / "rm")
    scorer = Scorer(str(reward_model), "--reward_model", speaker)
    expected = expected_score(reward_model, [*ids, *answer.ids])
    assert scorer.score(PROMPT, ids, answer) == pytest.approx(expected, abs=1e-5)
    assert scorer.described(PROMPT, ids, answer) == f"score {scorer.score(PROMPT, ids, answer):.4g}"
    endless = replace(answer, ids=answer.ids * 100)
    assert scorer.described(PROMPT, ids, endless) == "no score, for the reward model has 512 positions"


def test_a_reward_model_of_another_template_reads_the_text(speaker, tmp_path, said):
    ids, answer = said
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    reward_model = save_reward_model(base, tmp_path / "rm")
    scorer = Scorer(str(reward_model), "--reward_model", speaker)
    answer = replace(answer, text="Assam.", end="stop")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a tea."}, {"role": "assistant", "content": "Assam."}],
        tokenize=False,
    )
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a tea."}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(head)
    expected = [
        *tokenizer(head)["input_ids"],
        *tokenizer(text[len(head) :].strip())["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert scorer.score(PROMPT, ids, answer) == pytest.approx(
        expected_score(reward_model, expected), abs=1e-5
    )
