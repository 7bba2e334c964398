from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mabert.ops import SequenceLayout


def build(batch, length, **inputs):
    return SequenceLayout.build(batch, length, "cpu", packed=True, **inputs)


@st.composite
def masks(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    return torch.tensor(rows)


@given(masks())
@settings(deadline=None, max_examples=60)
def test_layout_of_any_mask(mask):
    batch, length = mask.shape
    layout = build(batch, length, attention_mask=mask)
    x = torch.randn(batch, length, 2)
    packed = layout.unpad(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(layout.repad(packed), x * mask.unsqueeze(-1))
    lengths = mask.sum(1)
    assert torch.equal(layout.lengths_S, lengths)
    assert layout.max_length == int(lengths.max())
    assert layout.num_tokens == int(lengths.sum())
    assert torch.equal(layout.sequence_ids_T, mask.nonzero()[:, 0])
    assert layout.positions.tolist() == [t for n in lengths.tolist() for t in range(n)]
    grid = layout.to_grid(packed)
    assert grid.shape[:2] == (batch, layout.max_length)
    assert torch.equal(layout.from_grid(grid), packed)
    grid_mask = layout.grid_mask()
    assert grid_mask is None or torch.equal(grid_mask.sum(1), lengths)

    padded = SequenceLayout.build(batch, length, "cpu", packed=False, attention_mask=mask)
    assert torch.equal(padded.positions[mask], layout.positions)
    interior = any("01" in "".join(map(str, row)).strip("0") for row in mask.int().tolist())
    assert padded.has_interior_pads() == interior


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_layout_of_several_sequences_a_row(rows, pads_first):
    length = max(1, max(sum(row) for row in rows)) + 1
    seq_idx = torch.full((len(rows), length), -1)
    for b, row in enumerate(rows):
        ids = [i for i, n in enumerate(row) for _ in range(n)]
        start = length - len(ids) if pads_first else 0
        seq_idx[b, start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
    layout = build(len(rows), length, seq_idx=seq_idx)
    lengths = [n for row in rows for n in row]
    assert layout.lengths_S.tolist() == lengths
    assert layout.positions.tolist() == [t for n in lengths for t in range(n)]
    again = build(len(rows), length, seq_idx=seq_idx.clamp(min=0), attention_mask=(seq_idx >= 0).long())
    assert torch.equal(again.cu_seqlens, layout.cu_seqlens)


def test_boundaries_and_seq_idx_describe_the_same_row():
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    from_boundaries = build(1, 7, cu_seq_lens=cu)
    assert torch.equal(from_boundaries.cu_seqlens, cu)
    both = build(1, 7, cu_seq_lens=cu, seq_idx=torch.tensor([[4, 4, 4, 9, 9, 9, 9]]))
    assert torch.equal(both.cu_seqlens, cu)
    behind = build(1, 9, cu_seq_lens=cu, attention_mask=torch.tensor([[1] * 7 + [0] * 2]))
    assert behind.num_tokens == 7


def test_a_full_batch_is_neither_copied_nor_reordered():
    layout = build(2, 3, attention_mask=torch.ones(2, 3))
    x = torch.randn(2, 3, 4)
    assert layout.unpad(x).data_ptr() == x.data_ptr()
    assert layout.to_grid(layout.unpad(x)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \(1, 5\)"),
        ({"seq_idx": torch.tensor([[0, 1, 0, 1, 1]])}, "interleaves sequences"),
        ({"seq_idx": torch.tensor([[0, 0, 0, -1, -1]]), "attention_mask": torch.tensor([[1, 1, 0, 0, 0]])}, "as pads"),
        ({"cu_seq_lens": torch.tensor([0, 2, 4])}, "ends at 4, but the row has 5"),
        ({"cu_seq_lens": torch.tensor([1, 5])}, "start at 0"),
        ({"cu_seq_lens": torch.tensor([0, 4, 2, 5])}, "never decrease"),
        ({"cu_seq_lens": torch.tensor([0.0, 5.0])}, "integers"),
        ({"cu_seq_lens": torch.tensor([0, 2, 5]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}, "different sequences"),
        ({"cu_seq_lens": torch.tensor([0, 4]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "first 4"),
    ],
)
def test_inputs_that_are_wrong_or_disagree_raise(inputs, message):
    with pytest.raises(ValueError, match=message):
        build(1, 5, **inputs)


def test_boundaries_describe_one_row_only():
    with pytest.raises(ValueError, match="2 rows"):
        build(2, 5, cu_seq_lens=torch.tensor([0, 5]))


def test_several_sequences_a_row_need_packed_execution():
    with pytest.raises(ValueError, match="execution='packed'"):
        SequenceLayout.build(1, 5, "cpu", packed=False, seq_idx=torch.zeros(1, 5, dtype=torch.long))


@given(masks(), st.integers(0, 8), st.booleans())
@settings(deadline=None, max_examples=60)
def test_split_parts_each_sequence_at_its_own_token(mask, point, has_past):
    layout = build(*mask.shape, attention_mask=mask)
    past = torch.arange(layout.num_sequences) * 2 if has_past else None
    layout = replace(layout, past_S=past)
    rows = layout.sequence_ids_T
    before = 0 if past is None else past[rows]
    index = layout.positions + before
    assert torch.equal(layout.indices_T, index)
    assert torch.equal(layout.ends_S, layout.lengths_S + (0 if past is None else past))
    split = layout.split(point)
    assert layout.split(point) is split
    x = torch.randn(layout.num_tokens, 3)
    first, second = split.take(x)
    assert torch.equal(first, x[index < point])
    assert torch.equal(second, x[index >= point])
    assert torch.equal(split.join(first, second), x)
    for part, chosen in ((split.before, index < point), (split.after, index >= point)):
        assert torch.equal(part.lengths_S, torch.bincount(rows[chosen], minlength=layout.num_sequences))
        assert part.num_tokens == int(chosen.sum())
        assert torch.equal(part.sequence_ids_T, rows[chosen])
        assert torch.equal(part.indices_T, index[chosen])
        grid = part.to_grid(x[chosen])
        assert grid.shape[:2] == (layout.num_sequences, part.max_length)
        assert torch.equal(part.from_grid(grid), x[chosen])


def test_positions_may_do_as_they_like_at_pads_and_where_sequences_are_told_apart():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = torch.tensor([[9, 8, 0, 1], [3, 5, 5, 6]])
    for packed in (True, False):
        layout = SequenceLayout.build(2, 4, "cpu", packed=packed, attention_mask=mask)
        placed = layout.at_positions(positions, told_apart=False)
        assert placed.positions.tolist() == ([0, 1, 3, 5, 5, 6] if packed else positions.tolist())
    layout = SequenceLayout.build(1, 4, "cpu", packed=True, seq_idx=torch.tensor([[0, 0, 1, 1]]))
    assert layout.at_positions(torch.tensor([0, 1, 0, 1]), told_apart=True).positions.tolist() == [0, 1, 0, 1]
    assert layout.at_positions(torch.tensor([3, 2, 1, 0]), told_apart=True).positions.tolist() == [3, 2, 1, 0]


def test_positions_that_begin_anew_are_those_of_several_sequences():
    layout = SequenceLayout.build(1, 5, "cpu", packed=True)
    with pytest.raises(ValueError, match="begin anew within a row"):
        layout.at_positions(torch.tensor([[0, 1, 2, 0, 1]]), told_apart=False)
    with pytest.raises(ValueError, match=r"must have shape \(1, 5\).* not \(2, 5\)"):
        layout.at_positions(torch.zeros(2, 5).long(), told_apart=True)
