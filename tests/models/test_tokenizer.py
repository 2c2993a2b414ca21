"""Tokenizers: end and padding tokens are settled once and stay so."""

import pytest
from tiny import tiny_tokenizer
from transformers import AutoTokenizer

from dschat.errors import UserError
from dschat.models.tokenizer import check_same_tokenizer, load_tokenizer


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
    tokenizer = load_tokenizer(folder, add_eot_token=True, eot_token="<|stop|>")
    assert tokenizer.eos_token == "<|stop|>"
    assert tokenizer("a<|stop|>")["input_ids"][-1] == tokenizer.eos_token_id
    again = load_tokenizer(saved(tmp_path / "b", tokenizer))
    assert again.eos_token_id == tokenizer.eos_token_id


def test_an_end_token_of_the_vocabulary_is_not_added_again(tmp_path):
    source = tiny_tokenizer()
    tokenizer = load_tokenizer(saved(tmp_path, source), add_eot_token=True)
    assert (len(tokenizer), tokenizer.eos_token_id) == (len(source), source.eos_token_id)


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_equals_itself_reloaded(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, tiny_tokenizer(bos=True)))
    check_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tmp_path))


def test_tokenizers_differ_by_their_first_token_id():
    ours, theirs = tiny_tokenizer(["aaab"]), tiny_tokenizer(["abbb"])
    # What is learnt has ids from 258 on, after two special tokens and 256 bytes: "aa" here, "bb" there.
    with pytest.raises(UserError, match="--critic_model_name_or_path") as caught:
        check_same_tokenizer(ours, theirs)
    assert "'aa' has id 258 for the actor, None for the reward model" in str(caught.value)


def test_tokenizers_differ_by_an_added_token():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    theirs.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="None for the actor"):
        check_same_tokenizer(ours, theirs)


def test_tokenizers_differ_by_their_end_token():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    theirs.eos_token = "<|pad|>"
    with pytest.raises(UserError, match="eos_token"):
        check_same_tokenizer(ours, theirs)
