import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mabert.data.rows import MIN_PIECE, Rows
from mabert.data.shards import build_shards

CLS, SEP = 2, 3
FIRST = 10  # the stream's tokens are 10, 11, 12, …, so that a row shows where it comes from


def stream(lengths):
    """Shards whose documents have these lengths."""
    lengths = np.array(lengths, np.int64)
    return SimpleNamespace(
        document_starts=np.cumsum(lengths) - lengths,
        document_lengths=lengths,
        n_documents=len(lengths),
        n_tokens=int(lengths.sum()),
        tokens=lambda start, stop: np.arange(start + FIRST, stop + FIRST),
        cls_token_id=CLS,
        sep_token_id=SEP,
    )


def documents_of(lengths):
    ends = np.cumsum(lengths)
    return [list(range(end - length + FIRST, end + FIRST)) for end, length in zip(ends, lengths, strict=True)]


def packed_by_hand(documents, row_length):
    """The rows as lists of pieces, piece after piece, as the rule says it in words."""
    rows, row, free = [], [], row_length
    for rest in documents:
        while rest:
            piece, rest = rest[: free - 2], rest[free - 2 :]
            room = free - len(piece) - 2
            if 0 < room < MIN_PIECE:
                piece = piece[: max(0, len(piece) - (MIN_PIECE - room))]
            if piece:
                row.append(piece)
                free -= len(piece) + 2
            if free == 0:
                rows.append(row)
                row, free = [], row_length
    return rows


def pieces(ids, seq_idx):
    """Part a row at its seq_idx, and check the frame of every piece."""
    parted = [ids[seq_idx == i].tolist() for i in range(seq_idx.max() + 1)]
    assert [token for piece in parted for token in piece] == ids.tolist()
    assert all(piece[0] == CLS and piece[-1] == SEP for piece in parted)
    return [piece[1:-1] for piece in parted]


lengths_strategy = st.lists(st.integers(1, 90) | st.integers(1, 12), min_size=1, max_size=40)


@settings(deadline=None, max_examples=300)
@given(lengths=lengths_strategy, row_length=st.integers(16, 40))
def test_documents_are_packed_as_the_rule_says(lengths, row_length):
    expected = packed_by_hand(documents_of(lengths), row_length)
    if not expected:
        with pytest.raises(ValueError, match="do not fill one row"):
            Rows(stream(lengths), row_length)
        return
    rows = Rows(stream(lengths), row_length)
    found = [pieces(*rows[i]) for i in range(len(rows))]
    assert found == expected
    assert rows.dropped_tokens == sum(lengths) - sum(len(piece) for row in expected for piece in row)
    for ids, seq_idx in (rows[0], rows[len(rows) - 1]):
        assert (ids.shape, seq_idx.shape) == ((row_length,), (row_length,))
        assert (ids.dtype, seq_idx.dtype) == (np.int64, np.int32)


@settings(deadline=None, max_examples=100)
@given(lengths=lengths_strategy, row_length=st.integers(16, 40))
def test_full_sentences_are_one_stream(lengths, row_length):
    joined = [token for document in documents_of(lengths) for token in [*document, SEP]][:-1]
    count = len(joined) // (row_length - 2)
    if count == 0:
        with pytest.raises(ValueError, match="do not fill one row"):
            Rows(stream(lengths), row_length, "full-sentences")
        return
    rows = Rows(stream(lengths), row_length, "full-sentences")
    assert len(rows) == count
    for i, (ids, seq_idx) in enumerate(rows[i] for i in range(count)):
        assert ids.tolist() == [CLS, *joined[i * (row_length - 2) : (i + 1) * (row_length - 2)], SEP]
        assert not seq_idx.any()
    kept = sum(token >= FIRST for token in joined[: count * (row_length - 2)])
    assert rows.dropped_tokens == sum(lengths) - kept


def test_a_document_ends_where_a_piece_of_eight_still_fits():
    rows = Rows(stream([16, 6, 30]), 20)
    # 16 tokens and the frame leave 2 of 20: the document gives up 6, and the next one's 6 tokens fill the room
    assert pieces(*rows[0]) == [list(range(10, 20)), list(range(26, 32))]
    assert pieces(*rows[1]) == [list(range(32, 50))]
    assert len(rows) == 2
    assert rows.dropped_tokens == 6 + 12


def test_a_document_too_short_to_give_anything_up_makes_room_for_the_next():
    rows = Rows(stream([8, 7, 20]), 20)
    # 10 of 20 are left; 7 tokens would leave 1, and are too few to give up 7
    assert pieces(*rows[0]) == [list(range(10, 18)), list(range(25, 33))]


def test_parts_of_the_shards_are_cut_into_rows_of_their_own_documents(shards):
    for part in shards.split(0.5, seed=1):
        spans = zip(part.document_starts.tolist(), part.document_lengths.tolist(), strict=True)
        own = [shards.tokens(start, start + length).tolist() for start, length in spans]
        rows = Rows(part, 64)
        assert [pieces(*rows[i]) for i in range(len(rows))] == packed_by_hand(own, 64)
        rows = Rows(part, 64, "full-sentences")
        joined = [token for document in own for token in [*document, SEP]]
        assert [token for i in range(len(rows)) for token in rows[i][0][1:-1]] == joined[: len(rows) * 62]


def test_rows_over_several_files_equal_rows_over_one(shards, corpus_file, tokenizer, tmp_path):
    one = build_shards(corpus_file, tokenizer, tmp_path / "one")
    for packing in ("documents", "full-sentences"):
        a, b = Rows(shards, 48, packing), Rows(one, 48, packing)
        assert len(a) == len(b)
        assert all((a[i][0] == b[i][0]).all() and (a[i][1] == b[i][1]).all() for i in range(len(a)))


def test_a_pickled_copy_gives_the_same_rows(shards):
    rows = Rows(shards, 32)
    copy = pickle.loads(pickle.dumps(rows))
    assert (copy[7][0] == rows[7][0]).all()
    assert len(copy) == len(rows)


def test_many_tiny_documents_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "mabert"):
        Rows(stream([30] * 100), 128)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "mabert"):
        rows = Rows(stream([9, 2, 9, 2, 9, 2] * 20), 16)
    assert rows.dropped_tokens > 0.05 * 660
    assert "leave out" in caplog.text
    assert "packing='full-sentences' keeps them" in caplog.text


def test_bad_choices_are_refused(shards):
    with pytest.raises(ValueError, match="rows of 15 tokens are too short: take at least 16"):
        Rows(shards, 15)
    with pytest.raises(ValueError, match="packing='sentences' is unknown: it is one of documents, full-sentences"):
        Rows(shards, 64, "sentences")
    with pytest.raises(ValueError, match=r"20 tokens in 2 documents do not fill one row of 64: take more text"):
        Rows(stream([10, 10]), 64)
    with pytest.raises(IndexError, match="row 5 of 5"):
        Rows(stream([14] * 5), 16)[5]
