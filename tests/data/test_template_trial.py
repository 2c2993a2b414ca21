"""A template that cannot serve, or takes all time or memory, is refused before anything needs it."""

import pytest
from chat_templates import CHATML, CHATML_ASKED, TURNS, templated
from tiny import tiny_tokenizer

from dschat.data import template_trial
from dschat.data.template_trial import configure_template
from dschat.data.templates import NONE, PLAIN, ChatTemplate
from dschat.errors import UserError

BAD = {
    "{% for m in messages %}\n{{ messages[0]['content']": r"not sound Jinja \(line 2: unexpected end",
    "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}": "does not work",
    "{{ messages | length }}": "cannot be trained with",
    "{{ raise_exception('never') }}": "never",
    "{{ 1 / 0 }}": "does not work with a conversation of user .ZeroDivisionError: division by zero",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for a in [1] %}" * 25 + "{% endfor %}" * 25: "too many statically nested blocks",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    CHATML + "{{ 'x' * 10**6 }}": "makes 1,000,[0-9]* characters",
    CHATML + "{{ '\\ud800' }}": "half of a surrogate pair",
}


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_cannot_serve_is_refused_with_the_flag(tmp_path, template):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(UserError, match=BAD[template]) as error:
        configure_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))
    assert str(error.value).count("--chat_template") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10 ** 11 }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",  # which no signal handler of Python's interrupts
    ],
)
def test_a_template_that_takes_all_time_or_memory_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(template_trial, "TRIAL_SECONDS", 1)
    (tmp_path / "t.jinja").write_text(bomb + CHATML)
    with pytest.raises(UserError, match=r"needs more than 1 seconds or 1024 MiB.*--chat_template"):
        configure_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    ("own", "choice", "settled"),
    [(None, None, PLAIN), (CHATML, None, CHATML), (CHATML, "plain", PLAIN), (CHATML, "none", NONE)],
)
def test_the_tokenizers_own_template_goes_before_the_plain_one_and_a_choice_before_both(own, choice, settled):
    tokenizer = templated(own)
    configure_template(tokenizer, choice)
    assert tokenizer.chat_template == settled


def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML)
    tokenizer = tiny_tokenizer()
    configure_template(tokenizer, str(tmp_path / "t.jinja"))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = type(tokenizer).from_pretrained(tmp_path / "saved")
    configure_template(loaded, None)
    assert ChatTemplate(loaded).prompt(TURNS) == CHATML_ASKED


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (" \n", "is empty")])
def test_a_template_file_that_is_missing_or_empty_is_named(tmp_path, content, message):
    if content:
        (tmp_path / "t.jinja").write_text(content)
    with pytest.raises(UserError, match=rf"--chat_template .*t\.jinja {message}"):
        configure_template(tiny_tokenizer(), str(tmp_path / "t.jinja"))
