"""Where the tokens of a batch stand in the rows that a model reads: rows of round widths, maybe packed.

A sequence stands at the left of a row of its own, or shares one with others. So padding is on the right only,
where no token looks, and a causal model needs no mask for it. Widths are multiples of a number, because a
processor computes matrix products of round shapes faster and prepares a kernel for each new shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dschat.data.moving import moved

SeparatedBy = Literal["positions", "mask"]
"""What tells a model which tokens of a row belong together: positions that begin anew, as transformers' own
packing has it, or a mask of four dimensions."""

PACKED_WIDTH = 256
"""Tokens of a packed row, more where a sequence is longer: attention's dense masks cost its square."""


@dataclass(frozen=True)
class RowLayout:
    """How batches are laid out in rows."""

    multiple_of: int = 1
    """Widths are multiples of it."""
    separated_by: SeparatedBy | None = None
    """None: every sequence has a row of its own."""
    in_one_row: bool = False
    """Pack all sequences of a batch into one row, for attention that costs nothing across sequences."""
    limit: int | None = None
    """The positions that the model has learned: a row of one sequence is no wider, unless that is."""

    def rounded(self, number: int) -> int:
        """The smallest multiple of `multiple_of` that is not below the number."""
        return -(-number // self.multiple_of) * self.multiple_of

    def width_of(self, width: int) -> int:
        """The width of rows that hold so many tokens."""
        rounded = self.rounded(width)
        if self.limit is None or self.separated_by is not None:  # packed rows have positions of their own
            return rounded
        return max(width, min(rounded, self.limit))

    def rows_of(self, lengths: np.ndarray) -> list[list[int]]:
        """Which sequences share a row: each goes, the longest first, into the first row with room for it."""
        if self.separated_by is None:
            return [[number] for number in range(len(lengths))]
        if self.in_one_row:
            return [list(range(len(lengths)))]
        width = max(PACKED_WIDTH, int(lengths.max()))
        rows: list[list[int]] = []
        room: list[int] = []
        for number in np.argsort(-lengths, kind="stable").tolist():
            row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(width)
            rows[row].append(number)
            room[row] -= int(lengths[number])
        return rows

    def rows_and_width(self, lengths: np.ndarray) -> tuple[list[list[int]], int]:
        """`rows_of`, and the width of all of them."""
        rows = self.rows_of(lengths)
        return rows, self.width_of(max(int(lengths[members].sum()) for members in rows))

    def num_places(self, lengths: np.ndarray) -> int:
        """The tokens of all rows of sequences of such lengths, padding included."""
        rows, width = self.rows_and_width(lengths)
        return len(rows) * width

    def tokens_per_sequence(self, batches: Sequence[np.ndarray]) -> float:
        """The tokens of rows, padding included, that a sequence takes on average in batches of lengths."""
        return sum(map(self.num_places, batches)) / max(sum(map(len, batches)), 1)


PADDED = RowLayout()
"""A row for every sequence, as wide as the longest."""


@dataclass(frozen=True)
class Placement:
    """A batch of B sequences in R rows of W tokens, and the M outputs that predict the K labels."""

    source: Tensor
    """[R, W] int64: each place's token, by its number in the batch's `input_ids`; any token for padding."""
    outputs: Tensor
    """[M] int64: the places whose outputs are needed, counted through the rows. K of them, then others."""
    label_places: Tensor
    """[K] int64: the labels that they predict, by their number in the batch's labels."""
    last_tokens: Tensor
    """[B] int64: the place of each sequence's last token, counted through the rows."""
    position_ids: Tensor | None = None
    """[R, W] int64, where sequences share rows: each token's position in its own."""
    segments: Tensor | None = None
    """[R, W] int64, where a mask separates the sequences of a row: the number of each token's."""
    ends_here: Tensor | None = None
    """[B] bool, of a rank's part: whether it has the sequence's last token; None: the rows are whole."""

    @staticmethod
    def of(
        is_token: np.ndarray, label_mask: np.ndarray, *, first_output: int, layout: RowLayout
    ) -> "Placement":
        """Place rows whose tokens are marked in `is_token` [B, L], one after the other without a gap.

        `label_mask` [B, N] marks the labels that count, the first of which the output at column
        `first_output` predicts.
        """
        lengths = is_token.sum(axis=1)
        first_columns = is_token.argmax(axis=1)
        rows, width = layout.rows_and_width(lengths)
        shape = (len(rows), width)
        source, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        positions = np.tile(np.arange(width), (len(rows), 1))
        starts = np.empty(len(lengths), np.int64)
        for row, members in enumerate(rows):
            begin = 0
            for number in members:
                columns = np.arange(lengths[number])
                places = begin + columns
                source[row, places] = number * is_token.shape[1] + first_columns[number] + columns
                segments[row, places] = number
                positions[row, places] = columns
                starts[number] = row * width + begin
                begin += len(columns)
            source[row, begin:] = source[row, 0]
            positions[row, begin:] = 0
        numbers, columns = label_mask.nonzero()
        if not len(numbers) and label_mask.size:  # fillers alone: without an output there is no gradient
            numbers, columns = np.zeros(1, np.int64), np.zeros(1, np.int64)
        outputs = starts[numbers] + np.maximum(first_output + columns - first_columns[numbers], 0)
        num_outputs = layout.rounded(max(1, len(outputs)))
        is_packed = layout.separated_by is not None
        return Placement(
            source=torch.from_numpy(source),
            outputs=torch.from_numpy(np.append(outputs, starts[:1].repeat(num_outputs - len(outputs)))),
            label_places=torch.from_numpy(numbers * label_mask.shape[1] + columns),
            last_tokens=torch.from_numpy(starts + lengths - 1),
            position_ids=torch.from_numpy(positions) if is_packed else None,
            segments=torch.from_numpy(segments) if layout.separated_by == "mask" else None,
        )

    def part(self, rank: int, size: int) -> "Placement":
        """What one of `size` ranks reads that share the tokens of rows, each of which has one sequence.

        The parts are as wide as each other: behind the rows their last token is repeated, which no token
        before it sees. A part has the labels that its own outputs predict, and one output where it has none.
        """
        num_rows, width = self.source.shape
        part_width = -(-width // size)
        first = rank * part_width
        columns = torch.arange(first, first + part_width, device=self.source.device).clamp(max=width - 1)

        def inside(places: Tensor) -> tuple[Tensor, Tensor]:
            row, column = places // width, places % width
            return column // part_width == rank, row * part_width + column - first

        has_label, outputs = inside(self.outputs[: len(self.label_places)])
        ends_here, last_tokens = inside(self.last_tokens)
        outputs = outputs[has_label]
        return Placement(
            source=self.source[:, columns],
            outputs=outputs if len(outputs) else outputs.new_zeros(1),
            label_places=self.label_places[has_label],
            last_tokens=torch.where(ends_here, last_tokens, 0),
            position_ids=columns.expand(num_rows, -1),
            ends_here=ends_here,
        )

    def per_label(self, values: Tensor, like: Tensor) -> Tensor:
        """Numbers [K] or [M] of the labels that count, at their labels [B, N], 0 at all others."""
        whole = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
        return whole.index_copy(0, self.label_places, values[: len(self.label_places)]).view(like.shape)

    def lengths(self) -> Tensor:
        """The tokens of each sequence of the only row, and of the padding behind: [1, 1, 1, S] int64."""
        assert self.segments is not None, "told apart by a mask"
        return self.segments[0].unique_consecutive(return_counts=True)[1].view(1, 1, 1, -1)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention's scores where a mask separates the sequences: [R, 1, W, W].

        0 where a token sees another: not after itself, and of its own sequence; else the least finite number.
        """
        assert self.segments is not None, "told apart by a mask"
        is_own = self.segments.unsqueeze(2) == self.segments.unsqueeze(1)
        return torch.where(is_own.tril(), 0, torch.finfo(dtype).min).to(dtype).unsqueeze(1)

    def to(self, device: torch.device | str) -> "Placement":
        """The same on that device."""
        return moved(self, device)
