"""Text that spells special tokens, of which a tokenizer would make control tokens."""

import re
from itertools import pairwise

from transformers import PreTrainedTokenizerBase


class SpecialText:
    """The texts of a tokenizer's special tokens, but of those of one character, which cannot be cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        texts = {text for text in (*added, *tokenizer.all_special_tokens) if len(text) > 1}
        # Matches ahead, not past it: one that overlaps another is found too. `(?!)` never matches.
        self._begins = re.compile(f"(?={'|'.join(map(re.escape, texts))})" if texts else "(?!)")

    def is_in(self, text: str) -> bool:
        """Whether the text spells a special token."""
        return self._begins.search(text) is not None

    def cut(self, text: str) -> list[str]:
        """The text in pieces, to be encoded one by one, none of which spells a special token."""
        places = [0, *(match.start() + 1 for match in self._begins.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(places)]
