"""Fingerprint of what a tokenizer does with text, and the tokens that it puts before every text."""

import json

import tokenizers
import transformers
import xxhash
from transformers import PreTrainedTokenizerBase

PROBES = (
    "",
    "a",
    " two  spaces, a tab\tand lines\r\n\n\nof it ",
    "def f(x): return {'a': x[0] ** 2 != 1e-3}  # 0123456789",
    "Grüße, naïve façade; ÅNGSTRÖM ﬁ … “q” — 50 €",
    "Привет мир. 你好,世界。こんにちは 안녕 مرحبا नमस्ते שלום",
    "👩‍👩‍👧 🇩🇪 e\u0301 \u200b \u2028 \ufffd \x00 \x7f",
    "antidisestablishmentarianism HTTPServerError2xx  THE the The tHe",
    "<s></s><|im_start|>user<|im_end|>[INST]<think>\n",
)
"""Texts of many kinds, by whose tokens tokenizers are told apart that are programs of their own."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, versioned: bool = True) -> str:
    """32 hex digits that change with anything that decides a tokenizer's tokens, its template aside.

    Of a fast tokenizer that is its whole state; of one in Python its class, its vocabulary and what it makes
    of `PROBES`. The library's version is among it; without `versioned` it is not, for files that outlive an
    upgrade.
    """
    known = [
        _fast_state(tokenizer) or _slow_state(tokenizer),
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        start_tokens(tokenizer),
        *([_version(tokenizer)] if versioned else []),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, such as its BOS token; often nothing."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = (n for n in range(len(whole)) if bare and whole[n : n + len(bare)] == bare)
    return whole[: next(places, 0)]


def _fast_state(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # What the last call happened to ask for is not part of the tokenizer.
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None}


def _slow_state(tokenizer: PreTrainedTokenizerBase) -> list:
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return [type(tokenizer).__name__, tokenizer.get_vocab(), added, encoded]


def _version(tokenizer: PreTrainedTokenizerBase) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None) is not None
    return tokenizers.__version__ if fast else transformers.__version__
