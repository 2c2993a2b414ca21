"""Turns are found where the rendered conversation shows them, whatever else it repeats or moves."""

from chat_templates import ANSWER, EACH, STYLES, SYSTEM, SYSTEM_LAST, TURNS, template_of, templated

from dschat.data.comparisons import Turn
from dschat.data.templates import ChatTemplate


@EACH
def test_the_pieces_together_are_the_whole(name):
    template = template_of(name)
    pieces, _ = template.pieces(TURNS, ANSWER)
    assert "".join(text for text, _ in pieces) == template.prompt(TURNS) + template.answer(TURNS, ANSWER)
    said = [text for text, learned in pieces if learned]
    assert said == [STYLES[name].learned[0], STYLES[name].answered]


def test_an_answer_that_repeats_an_earlier_text_is_found_in_its_own_place():
    turns = (Turn("user", "Yes."), Turn("assistant", "Yes."), Turn("user", "Yes."))
    for name in STYLES:
        positions, position = [], 0
        for text, learned in template_of(name).pieces(turns, "Yes.")[0]:
            positions += [position + text.index("Yes.")] if learned else []
            position += len(text)
        whole = template_of(name).prompt(turns) + template_of(name).answer(turns, "Yes.")
        assert [whole[: p + 4].count("Yes.") for p in positions] == [2, 4]


def test_an_earlier_answer_is_found_where_the_template_moves_the_system_message():
    template = ChatTemplate(templated(SYSTEM_LAST))
    pieces, _ = template.pieces((SYSTEM, *TURNS), ANSWER)
    assert pieces == [
        ("[INST] Tea? [/INST]", False),
        (" Yes.<|endoftext|>", True),
        ("[INST] Be brief. Milk? [/INST]", False),
        (" A drop.", True),
    ]


def test_an_earlier_answer_that_is_shown_in_another_form_is_not_learned():
    turns = (
        Turn("user", "Tea?"),
        Turn("assistant", "hm</think>Yes."),
        Turn("user", "Milk?"),
        Turn("assistant", "No."),
        Turn("user", "Now?"),
    )
    pieces, num_missed = template_of("thinking").pieces(turns, ANSWER)
    assert num_missed == 1
    assert "hm" not in "".join(text for text, _ in pieces)
    assert [text for text, learned in pieces if learned] == [
        "No.<|im_end|>",
        "<think>\n\n</think>\n\nA drop.",
    ]
