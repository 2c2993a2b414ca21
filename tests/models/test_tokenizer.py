"""Tokenizers: end and padding tokens are settled once and stay so."""

import json

import pytest
from tiny import tiny_tokenizer

from dschat.arguments import TokenizerArguments
from dschat.data.templates import NONE, PLAIN
from dschat.errors import UserError
from dschat.models.tokenizer import first_difference, load_tokenizer, reads_otherwise


def saved(folder, tokenizer, **special) -> str:
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padding_of_its_own_is_kept(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, tiny_tokenizer(pad_token="<mypad>")))
    assert tokenizer.pad_token == "<mypad>"


def test_padding_that_is_the_end_token_is_replaced_by_a_pad_token_of_the_vocabulary(tmp_path):
    source = tiny_tokenizer(pad_token="[PAD]")
    tokenizer = load_tokenizer(saved(tmp_path, source, pad_token="<|endoftext|>"))
    assert tokenizer.pad_token == "[PAD]"
    assert len(tokenizer) == len(source)


def test_the_unknown_token_pads_where_there_is_no_pad_token(tmp_path):
    source = tiny_tokenizer(pad_token="<unk>")
    tokenizer = load_tokenizer(saved(tmp_path, source, pad_token=None, unk_token="<unk>"))
    assert tokenizer.pad_token == "<unk>"


def test_an_unknown_token_that_also_ends_answers_does_not_pad(tmp_path):
    source = tiny_tokenizer(pad_token=None)
    tokenizer = load_tokenizer(saved(tmp_path, source, unk_token="<|endoftext|>"))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == len(source)


def test_an_added_padding_token_is_said_and_survives_saving(tmp_path, capsys):
    first = load_tokenizer(saved(tmp_path / "a", tiny_tokenizer(pad_token=None)))
    assert "<|pad|> was added" in capsys.readouterr().out
    again = load_tokenizer(saved(tmp_path / "b", first))
    assert capsys.readouterr().out == ""
    assert again.get_vocab() == first.get_vocab()
    assert (again.pad_token, again.eos_token) == ("<|pad|>", "<|endoftext|>")


def test_a_tokenizer_without_end_token_needs_add_eot_token(tmp_path):
    folder = saved(tmp_path / "a", tiny_tokenizer(), eos_token=None)
    with pytest.raises(UserError, match="--add_eot_token"):
        load_tokenizer(folder)
    tokenizer = load_tokenizer(folder, TokenizerArguments(add_eot_token=True, eot_token="<|stop|>"))
    assert tokenizer.eos_token == "<|stop|>"
    assert tokenizer("a<|stop|>")["input_ids"][-1] == tokenizer.eos_token_id
    again = load_tokenizer(saved(tmp_path / "b", tokenizer))
    assert again.eos_token_id == tokenizer.eos_token_id


def test_an_end_token_of_the_vocabulary_is_not_added_again(tmp_path):
    source = tiny_tokenizer()
    tokenizer = load_tokenizer(saved(tmp_path, source), TokenizerArguments(add_eot_token=True))
    assert (len(tokenizer), tokenizer.eos_token_id) == (len(source), source.eos_token_id)


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_differ_by_what_they_make_of_a_conversation():
    ours, template = tiny_tokenizer(), tiny_tokenizer()
    assert first_difference(ours, template) is None
    assert not reads_otherwise(ours, template)
    template.chat_template = NONE
    assert first_difference(ours, template) is None
    assert reads_otherwise(ours, template)
    other_padding = tiny_tokenizer()
    other_padding.pad_token = other_padding.eos_token
    assert first_difference(ours, other_padding) == (
        "pad_token is '<|pad|>' for the actor, '<|endoftext|>' for the other"
    )


def test_the_template_is_settled_and_saved(tmp_path):
    folder = saved(tmp_path / "a", tiny_tokenizer())
    assert load_tokenizer(folder).chat_template == PLAIN
    chosen = load_tokenizer(folder, TokenizerArguments(chat_template="none"))
    assert load_tokenizer(saved(tmp_path / "b", chosen)).chat_template == NONE
    own = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    own += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "own.jinja").write_text(own)
    settings = TokenizerArguments(chat_template=str(tmp_path / "own.jinja"))
    assert load_tokenizer(folder, settings).chat_template == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ("{% for %}", "the chat template is not sound Jinja"),
        ("{{ messages | length }}", "cannot be trained with: it does not show a question"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.jinja").write_text(content)
    settings = TokenizerArguments(chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match=message):
        load_tokenizer(saved(tmp_path / "a", tiny_tokenizer()), settings)


def test_a_name_too_long_for_a_path_is_no_tokenizer():
    with pytest.raises(UserError, match="is no folder, seen from"):
        load_tokenizer("x" * 300)


def test_settings_that_break_only_in_use_are_found_when_the_tokenizer_is_read(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": {}}))
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        load_tokenizer(str(tmp_path))
