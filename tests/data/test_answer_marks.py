"""What a template writes around an answer is found, and undone."""

import pytest
from chat_templates import ANSWER, CHATML, EACH, STYLES, template_of, templated
from tiny import comparison_rows

from dschat.data.comparisons import Comparison
from dschat.data.template_trial import configure_template
from dschat.data.tokenization import tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.errors import UserError


@EACH
@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_alone_is_read_back_as_its_content(name, ended):
    template = template_of(name)
    shown = template.answer_alone(f" {ANSWER} ", ended)
    assert shown == STYLES[name].answered.partition(ANSWER)[0] + ANSWER + (
        STYLES[name].answered.partition(ANSWER)[2] if ended else ""
    )
    assert template.content(shown) == ANSWER


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'x ' * add_generation_prompt }}",
            r"its generation prompt ends with 'x ', which the same answer .* remove that text",
        ),
        (CHATML.replace("assistant\\n'", "assistant\\n<answer>'"), r".*ends with '<answer>', which"),
        ("{{ messages[0]['content'] }}", "it does not show an answer as it is"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "it shows a question in another form once it is answered",
        ),
    ],
)
def test_a_template_that_shows_no_answer_to_learn_still_asks_and_is_refused_by_steps_1_and_2(
    template, problem
):
    tokenizer = templated(None)
    tokenizer.chat_template = template
    configure_template(tokenizer, None)
    rows = comparison_rows(Comparison("Tea?", ("Yes.", "No.")))
    assert len(tokenize_prompts(rows, tokenizer, max_prompt_seq_len=99).rows) == 1
    for tokenize in (tokenize_sft, tokenize_pairs):
        with pytest.raises(UserError, match=f"cannot be trained with: {problem}.*--chat_template"):
            tokenize(rows, tokenizer, max_seq_len=99)
