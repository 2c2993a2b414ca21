import pytest
from tiny import comparison_rows, tiny_tokenizer
from transformers import ByT5Tokenizer

from dschat.data import tokenizer_fingerprint as module
from dschat.data.comparisons import Comparison
from dschat.data.tokenization import tokenize_sft
from dschat.data.tokenizer_fingerprint import start_tokens, tokenizer_fingerprint
from dschat.models.tokenizer import load_tokenizer


class Lowercase(ByT5Tokenizer):
    """Another tokenizer in Python, whose vocabulary is the same."""

    def _tokenize(self, text):
        return super()._tokenize(text.lower())


def test_a_tokenizer_in_python_has_a_fingerprint_of_what_it_does(tmp_path):
    byt5 = ByT5Tokenizer()
    prints = {tokenizer_fingerprint(made) for made in (byt5, ByT5Tokenizer(extra_ids=3), Lowercase())}
    assert len(prints) == 3
    byt5.add_tokens(["<|im_start|>"])
    assert tokenizer_fingerprint(byt5) not in prints
    byt5.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(ByT5Tokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(byt5)


def test_without_the_version_the_fingerprint_outlives_an_upgrade(monkeypatch):
    for made, library in ((ByT5Tokenizer(), "transformers"), (tiny_tokenizer(), "tokenizers")):
        versioned, plain = tokenizer_fingerprint(made), tokenizer_fingerprint(made, versioned=False)
        with monkeypatch.context() as patch:
            patch.setattr(getattr(module, library), "__version__", "99")
            assert tokenizer_fingerprint(made) != versioned
            assert tokenizer_fingerprint(made, versioned=False) == plain


def test_a_tokenizer_in_python_is_loaded_and_makes_tokens(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    (row,) = tokenize_sft(
        comparison_rows(Comparison("Tée?", ("Yes.",))), tokenizer, max_seq_len=99
    ).rows.to_list()
    assert tokenizer.decode(row["input_ids"]) == "\n\nHuman: Tée?\n\nAssistant: Yes.</s>"
    assert row["num_targets"] == len(" Yes.") + 1


@pytest.mark.parametrize("bos", [False, True])
def test_start_tokens_are_what_stands_before_every_text(bos):
    made = tiny_tokenizer(bos=bos)
    assert start_tokens(made) == ([made.bos_token_id] if bos else [])
    assert start_tokens(ByT5Tokenizer()) == []
