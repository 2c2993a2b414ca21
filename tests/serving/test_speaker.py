from dataclasses import replace

import pytest
import torch
from chat_templates import CHATML
from tiny import comparison_rows, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.arguments import RolloutArguments
from dschat.data.comparisons import Comparison, Turn
from dschat.data.tokenization import tokenize_prompts
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.answering import answer
from dschat.rlhf.rollout.backend import Sampling
from dschat.serving.speaker import AnswerText, Interrupted, Speaker

CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "Name a tea."),
    Turn("assistant", "Assam."),
    Turn("user", "Another?"),
)
SAMPLING = Sampling(max_answer_length=24, temperature=0.9, top_p=0.95, seed=5)


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chatml"])
def test_a_prompt_has_the_tokens_that_step_3_samples_from(tmp_path, template):
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = template
    served = Speaker(str(save_tiny_model(tmp_path / "m", tokenizer=tokenizer)), "MODEL")
    rows = comparison_rows(Comparison(CONVERSATION))
    trained_on = tokenize_prompts(rows, load_tokenizer(str(tmp_path / "m")), max_prompt_seq_len=400).rows
    assert served.read(CONVERSATION) == (trained_on[0]["input_ids"], False)


def test_an_answer_is_that_of_a_comparison_with_the_same_seed(speaker):
    settings = RolloutArguments(max_answer_seq_len=24, temperature=0.9, top_p=0.95)
    compared = answer(speaker.model, [CONVERSATION, CONVERSATION], settings, seed=5)
    ids, _ = speaker.read(CONVERSATION)
    for sample in (0, 1):
        said = speaker.answer(ids, SAMPLING, sample=sample)
        assert said.text == compared.texts[sample]
        assert [*ids, *said.ids] == compared.token_ids[sample]


def test_the_likeliest_tokens_are_those_of_transformers(speaker, folder):
    ids, _ = speaker.read("Count to five.")
    said = speaker.answer(ids, replace(SAMPLING, greedy=True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    assert said.ids == expected.tolist()


def test_the_pieces_of_an_answer_are_its_text(speaker):
    ids, _ = speaker.read("How do I boil an egg?")
    for sample in range(5):
        pieces = []
        said = speaker.answer(ids, SAMPLING, pieces.append, sample=sample)
        assert "".join(pieces) == said.text
        assert len(list(filter(None, pieces))) > 1


def test_a_listener_ends_an_answer(speaker):
    ids, _ = speaker.read("How do I boil an egg?")
    whole = speaker.answer(ids, SAMPLING)
    calls = []

    def listen(piece):
        calls.append(piece)
        if len(calls) == 6:  # the prompt, then five tokens
            raise Interrupted

    said = speaker.answer(ids, SAMPLING, listen)
    assert (said.ids, said.end) == (whole.ids[:5], "interrupted")


def heard(words, *, stops=(), end_ids=(0,), content=str.strip):
    """The answer of these words, token by token: its pieces and what was heard."""
    tokenizer = tiny_tokenizer()
    pieces = []
    text = AnswerText(tokenizer, end_ids, pieces.append, stops=stops, content=content)
    text.put(torch.tensor([[1, 2, 3]]))  # the prompt
    try:
        for token in [*tokenizer(words)["input_ids"], *end_ids]:
            text.put(torch.tensor([token]))
        text.end()
    except Interrupted:
        pass
    return [piece for piece in pieces if piece], text


def test_an_answer_ends_before_a_stop_text_of_which_nothing_is_shown():
    pieces, text = heard(" one two STOP three", stops=["STOP", "thr"])
    assert ("".join(pieces), text.text, text.end_reason) == ("one two", "one two", "stop")
    pieces, text = heard(" one two ST", stops=["STOP"])  # which only begins
    assert ("".join(pieces), text.end_reason) == ("one two ST", "stop")


def test_a_character_is_shown_once_all_its_bytes_are_there():
    pieces, _ = heard(" caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{TEACUP WITHOUT HANDLE}")
    assert "".join(pieces) == "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{TEACUP WITHOUT HANDLE}"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_first_exchanges_give_way_where_a_conversation_is_too_long(speaker):
    whole, is_cut = speaker.read(CONVERSATION)
    assert not is_cut
    shorter = (CONVERSATION[0], CONVERSATION[3])
    assert speaker.read(CONVERSATION, max_tokens=len(whole) - 1) == (speaker.read(shorter)[0], True)
    # A question alone cannot be shortened.
    assert speaker.read("Name a tea.", max_tokens=3) == (speaker.read("Name a tea.")[0], False)


def test_text_goes_on_as_it_stands(speaker):
    tokenizer = speaker.tokenizer
    assert speaker.read_text("Count to") == tokenizer("Count to", add_special_tokens=False)["input_ids"]
    assert speaker.read_text("") == [tokenizer.eos_token_id]
    pieces, text = heard(" one two \n", content=None)
    assert "".join(pieces) == text.text == " one two \n"
