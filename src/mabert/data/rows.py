"""Rows of exactly L tokens, without a pad, cut from shards."""

from __future__ import annotations

import logging
from array import array
from typing import Literal, get_args

import numpy as np

from mabert.data.shards import Shards

logger = logging.getLogger(__name__)

Packing = Literal["documents", "full-sentences"]
MIN_LENGTH = 16
MIN_PIECE = 8


class Rows:
    """Row i: ``rows[i] -> (ids (length,) int64, seq_idx (length,) int32)``, without a pad.

    "documents": a row is filled with pieces ``[CLS] tokens [SEP]``, one for each document or part of a document, with
    seq_idx 0, 1, 2, …: documents never see each other. "full-sentences": a row is ``[CLS]``, length − 2 tokens of the
    stream of all documents joined by ``[SEP]``, and ``[SEP]``; seq_idx is 0 throughout.

    ``dropped_tokens`` are in no row: those of the last, incomplete row, and in "documents" those given up to fill rows
    exactly. Raises ValueError for a length under 16 and for too little text to fill one row.
    """

    def __init__(self, shards: Shards, length: int, packing: Packing = "documents") -> None:
        if length < MIN_LENGTH:
            raise ValueError(f"rows of {length} tokens are too short: take at least {MIN_LENGTH}")
        if packing not in get_args(Packing):
            raise ValueError(f"packing={packing!r} is unknown: it is one of {', '.join(get_args(Packing))}")
        self.shards, self.length, self.packing = shards, length, packing
        if packing == "documents":
            self._starts, self._lengths = _pack(shards.document_starts, shards.document_lengths, length)
            ends = np.cumsum(self._lengths + 2, dtype=np.int64)  # the pieces tile the rows without a gap
            n_rows = int(ends[-1]) // length if len(ends) else 0
            self._first_piece = np.searchsorted(ends, np.arange(n_rows + 1) * length, side="right")
            kept = int(self._lengths[: self._first_piece[-1]].sum())
        else:
            self._ends = np.cumsum(shards.document_lengths + 1)  # each document and the [SEP] behind it
            room, stream = length - 2, int(self._ends[-1]) - 1
            n_rows = stream // room
            separators = int(np.searchsorted(self._ends, n_rows * room, side="right"))
            kept = n_rows * room - separators
        self._n_rows = n_rows
        self.dropped_tokens = shards.n_tokens - kept
        if n_rows == 0:
            raise ValueError(
                f"{shards.n_tokens} tokens in {shards.n_documents} documents do not fill one row of {length}: "
                "take more text, shorter rows or packing='full-sentences'"
            )
        if self.dropped_tokens > max(length, 0.05 * shards.n_tokens):
            logger.warning(
                "rows of %d leave out %.1f%% of the tokens, because many documents are very short; "
                "packing='full-sentences' keeps them",
                length,
                100 * self.dropped_tokens / shards.n_tokens,
            )

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self._n_rows:
            raise IndexError(f"row {index} of {self._n_rows}")
        return self._packed_row(index) if self.packing == "documents" else self._stream_row(index)

    def _packed_row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.empty(self.length, np.int64)
        seq_idx = np.empty(self.length, np.int32)
        position = 0
        first, last = self._first_piece[index : index + 2].tolist()
        pieces = zip(self._starts[first:last].tolist(), self._lengths[first:last].tolist(), strict=True)
        for sequence, (start, length) in enumerate(pieces):
            end = position + length + 2
            ids[position] = self.shards.cls_token_id
            ids[position + 1 : end - 1] = self.shards.tokens(start, start + length)
            ids[end - 1] = self.shards.sep_token_id
            seq_idx[position:end] = sequence
            position = end
        return ids, seq_idx

    def _stream_row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        room = self.length - 2
        ids = np.full(self.length, self.shards.sep_token_id, np.int64)
        ids[0] = self.shards.cls_token_id
        position, stop = index * room, (index + 1) * room  # in the stream of documents and separators
        document = int(np.searchsorted(self._ends, position, side="right"))
        while position < stop:
            end = int(self._ends[document])  # its [SEP] stands at end − 1
            n = min(end - 1, stop) - position
            behind = int(self.shards.document_starts[document] + self.shards.document_lengths[document])
            start = behind - (end - 1 - position)
            column = 1 + position - index * room
            ids[column : column + n] = self.shards.tokens(start, start + n)
            position, document = end, document + 1
        return ids, np.zeros(self.length, np.int32)


def _pack(starts: np.ndarray, lengths: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Plan the pieces that tile rows of ``row`` tokens: their first tokens (int64) and lengths (int32).

    A document of n tokens becomes a piece that fills the open row, full rows, and a piece that opens the next row.
    """
    # CHOICE: where a piece would leave room for fewer than MIN_PIECE tokens, it gives up its last few, so that one of
    # MIN_PIECE fits; where it is too short for that, it is left out, and the next document takes its room. Rows stay
    # free of pads at the price of a few tokens.
    runs = array("q")  # flat (first token, tokens of a piece, number of pieces)
    free = row
    for start, left in zip(starts.data, lengths.data, strict=True):
        if left + 2 > free and free < row:
            runs.extend((start, free - 2, 1))
            start, left, free = start + free - 2, left - (free - 2), row
        if full_rows := left // (row - 2) if free == row else 0:
            runs.extend((start, row - 2, full_rows))
            start, left = start + full_rows * (row - 2), left - full_rows * (row - 2)
        if left == 0:
            continue
        rest = free - left - 2
        if 0 < rest < MIN_PIECE:
            left -= MIN_PIECE - rest
            rest = MIN_PIECE
        if left > 0:
            runs.extend((start, left, 1))
            free = rest or row
    first, size, count = np.asarray(runs, np.int64).reshape(-1, 3).T
    within_run = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(first, count) + within_run * np.repeat(size, count), np.repeat(size, count).astype(np.int32)
