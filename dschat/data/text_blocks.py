"""Plain text, such as models are pre-trained on, as blocks of equally many tokens.

The texts' tokens stand one after the other, each text's followed by the end token, and are cut into blocks;
what is left over at the end fills no block. A .txt file is one text. Of a file or data set of rows each row
is one: the row itself, its column "text", or its only column.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dschat.data.cache import cache_folder, cached
from dschat.data.files import readable, sound_rows, user_path
from dschat.data.sources import open_source
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.errors import UserError
from dschat.fingerprint import files_fingerprint, fingerprint

FORMAT = 1
"""Raised where equal input makes other blocks than before."""

FLAG = "--unsupervised_dataset_name"
READ_AT_ONCE = 1 << 20
TEXTS_AT_ONCE = 1000
FILE_NAME = "tokens.bin"

Piece = tuple[str, bool]
"""Some text, and whether a text ends with it."""


def text_blocks(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    config_name: str | None = None,
    data_output_path: str | None = None,
) -> np.ndarray:
    """Blocks of token ids, int32 [N, block_size], on disk and mapped into memory.

    `names` are hub ids (of the configuration `config_name`) or local files; tokens are made once and found
    again as in `dschat.data.cache`. Raises `UserError` for what cannot be read and for less than one block.
    """
    opened = [_open(name, config_name) for name in names]
    key = fingerprint(
        {
            "format": FORMAT,
            "kind": "text blocks",
            "texts": [identity for identity, _ in opened],
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
    )
    pieces = (piece for _, read in opened for piece in read())
    folder = cached(cache_folder(data_output_path), key, partial(_write_tokens, pieces, tokenizer))
    num_tokens = (folder / FILE_NAME).stat().st_size // np.dtype(np.int32).itemsize
    num_blocks = num_tokens // block_size
    if num_blocks == 0:
        raise UserError(
            f"{FLAG} {' '.join(names)} has {num_tokens} tokens and a block takes {block_size} "
            "(--max_prompt_seq_len and --max_answer_seq_len together); give more text."
        )
    tokens = np.memmap(folder / FILE_NAME, dtype=np.int32, mode="r")
    return tokens[: num_blocks * block_size].reshape(num_blocks, block_size)


def _open(name: str, config_name: str | None) -> tuple[str, partial[Iterator[Piece]]]:
    """What identifies the content of `name`, and what reads it."""
    if name.lower().endswith(".txt"):
        path = user_path(name)
        with readable(path):
            if not path.is_file():
                raise UserError(
                    f"{FLAG} {name}: there is no such file, seen from {Path.cwd()}; correct the path."
                )
            return f"text {files_fingerprint([path])}", partial(_file_pieces, path)
    source = open_source(name, FLAG, config_name=config_name)
    if source.weight is not None:
        raise UserError(f"{FLAG} {name}: texts have no weights; leave it out, or give a text several times.")
    return source.fingerprint, partial(_row_pieces, sound_rows(source.training))


def _file_pieces(path: Path) -> Iterator[Piece]:
    """Whole lines, about a MiB at once, so that a file of any size fits."""
    try:
        with readable(path), path.open(encoding="utf-8-sig") as file:
            while lines := file.readlines(READ_AT_ONCE):
                yield "".join(lines), False
            yield "", True
    except UnicodeDecodeError as error:
        raise UserError(f"{FLAG} {path}: the file is not UTF-8 ({error}); convert it.") from error


def _row_pieces(rows: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    for place, row in rows:
        text = row
        if isinstance(row, dict):
            text = row.get("text", next(iter(row.values())) if len(row) == 1 else None)
        if not isinstance(text, str):
            columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f'{place}: {FLAG} needs rows with a column "text" (found: {columns}); rename the column.'
            )
        if text.strip():
            yield text, True


def _write_tokens(pieces: Iterator[Piece], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    end = tokenizer.eos_token_id
    with (folder / FILE_NAME).open("wb") as file:
        while some := list(islice(pieces, TEXTS_AT_ONCE)):
            texts = [text for text, _ in some]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids, (_, ends) in zip(encoded["input_ids"], some, strict=True):
                file.write(np.asarray([*ids, *([end] if ends else [])], dtype=np.int32).tobytes())
