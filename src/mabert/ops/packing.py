"""SequenceLayout: where the sequences of a batch lie, and the way between padded and packed tensors.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, H features.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Where each sequence of a (B, L) batch begins and ends, and which positions are real. Built by `build`.

    Attributes:
        batch_size: B.
        length: L.
        packed: whether tokens travel as (T, ...) or as (B, L, ...).
        mask_BL: bool, True at real tokens; None when every position is real.
        token_indices_T: int64, the flat position in (B·L) of each real token, sequence after sequence; None when every
            position is real.
        cu_seqlens: (S+1,) int32, boundaries of the sequences among the real tokens; a row without real tokens is an
            empty sequence.
        max_length: real tokens of the longest sequence; while compiling, L.
        positions: int64, index of each token among its own sequence's real tokens; (T,) when packed, else (B, L), with
            0 at pads.
        grid_indices_T: int64, the flat position of each real token in an (S, max_length) grid, one row a sequence;
            None when the tokens fill the grid in order.
        past_S: int64, tokens of each sequence that came before, in an earlier batch; None for none.
        recurrence, reach: what scans and convolutions, and what attention goes by: this layout itself, unless
            `confined` parted one of them more finely.
    """

    batch_size: int
    length: int
    packed: bool
    mask_BL: Tensor | None
    token_indices_T: Tensor | None
    cu_seqlens: Tensor
    max_length: int
    positions: Tensor
    grid_indices_T: Tensor | None
    past_S: Tensor | None = None
    _recurrence: "SequenceLayout | None" = None
    _reach: "SequenceLayout | None" = None
    _splits: dict[int, "Split"] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        batch_size: int,
        length: int,
        device: torch.device | str,
        *,
        packed: bool,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> "SequenceLayout":
        """Read the layout from whatever describes it.

        Args:
            attention_mask: (B, L), non-zero at real tokens, in any layout.
            seq_idx: (B, L) integers, the sequence each token belongs to within its row; negative at pads.
            cu_seq_lens: (S+1,) integers, boundaries of the sequences in one row (B = 1).

        Raises:
            ValueError: a shape is wrong, the inputs disagree, or a sequence does not lie in one piece.
        """
        if not packed and (seq_idx is not None or cu_seq_lens is not None):
            raise ValueError(
                "Several sequences in a row (seq_idx, cu_seq_lens_q) need execution='packed'; with execution='padded' "
                "each row is one sequence."
            )
        for name, tensor in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
            if tensor is not None and tensor.shape != (batch_size, length):
                raise ValueError(f"{name} must have shape {(batch_size, length)}, not {tuple(tensor.shape)}.")
        mask_BL = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
        if cu_seq_lens is not None:
            from_boundaries_BL = _seq_idx_from_boundaries(cu_seq_lens, batch_size, length, mask_BL, device)
            if seq_idx is not None and not _same_sequences(seq_idx.to(device), from_boundaries_BL):
                raise ValueError("seq_idx and cu_seq_lens_q part the row into different sequences. Give one of them.")
            seq_idx = from_boundaries_BL
        if seq_idx is not None:
            seq_idx = seq_idx.to(device)
            real_BL = seq_idx >= 0
            if mask_BL is None:
                mask_BL = real_BL
            elif not bool(real_BL.all()) and not torch.equal(real_BL, mask_BL):
                raise ValueError("attention_mask and the negative entries of seq_idx mark different positions as pads.")
        if mask_BL is not None and not torch.compiler.is_compiling() and bool(mask_BL.all()):
            mask_BL = None

        if mask_BL is None and seq_idx is None:
            cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length
            positions = torch.arange(length, device=device).expand(batch_size, length)
            positions = positions.reshape(-1) if packed else positions
            return cls(batch_size, length, packed, None, None, cu_seqlens, length, positions, None)

        token_indices_T = None if mask_BL is None else mask_BL.reshape(-1).nonzero().squeeze(1)
        if cu_seq_lens is not None:
            cu_seqlens = cu_seq_lens.to(device=device, dtype=torch.int32)
        elif seq_idx is not None:
            cu_seqlens = _boundaries_from_seq_idx(seq_idx, token_indices_T)
        else:
            assert mask_BL is not None
            cu_seqlens = torch.nn.functional.pad(mask_BL.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        lengths_S = cu_seqlens.diff().long()
        if torch.compiler.is_compiling():
            torch._check(lengths_S.numel() > 0)
            max_length = length  # a bound that does not depend on the data
        else:
            max_length = int(lengths_S.max()) if lengths_S.numel() else 0
        total = batch_size * length if token_indices_T is None else token_indices_T.numel()
        ids_T = torch.arange(lengths_S.numel(), device=device).repeat_interleave(lengths_S, output_size=total)
        offsets_T = torch.arange(total, device=device) - cu_seqlens[ids_T].long()
        if packed:
            positions = offsets_T
        else:
            assert mask_BL is not None
            positions = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
        return cls(
            batch_size,
            length,
            packed,
            mask_BL,
            token_indices_T,
            cu_seqlens,
            max_length,
            positions,
            ids_T * max_length + offsets_T,
        )

    @classmethod
    def of_lengths(cls, lengths_S: Tensor) -> "SequenceLayout":
        """Packed sequences of these lengths and nothing else, in one row."""
        cu_seqlens = torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)
        total, longest = int(cu_seqlens[-1]), int(lengths_S.max()) if len(lengths_S) else 0
        ids_T = torch.arange(len(lengths_S), device=lengths_S.device).repeat_interleave(lengths_S, output_size=total)
        offsets_T = torch.arange(total, device=lengths_S.device) - cu_seqlens[ids_T].long()
        grid = None if total == longest * len(lengths_S) else ids_T * longest + offsets_T
        return cls(1, total, True, None, None, cu_seqlens, longest, offsets_T, grid)

    def _of_length(self, length: int) -> "SequenceLayout":
        """As many packed sequences, each of this length."""
        device = self.cu_seqlens.device
        cu_seqlens = torch.arange(self.num_sequences + 1, dtype=torch.int32, device=device) * length
        positions = torch.arange(length, device=device).repeat(self.num_sequences)
        total = self.num_sequences * length
        return SequenceLayout(1, total, True, None, None, cu_seqlens, length, positions, None)

    def at_positions(self, position_ids: Tensor, *, told_apart: bool) -> "SequenceLayout":
        """The same with other positions than each token's index in its sequence.

        Args:
            position_ids: (B, L) integers, or one row for all.
            told_apart: whether the inputs said which sequences a row holds. Otherwise positions that begin anew within
                a row are refused: elsewhere they mean another sequence.

        Raises:
            ValueError: their shape is another one, or they begin anew.
        """
        shape = (self.batch_size, self.length)
        if tuple(position_ids.shape) not in (shape, (1, self.length), (self.length,)):
            raise ValueError(
                f"position_ids must have shape {shape}, one for each token, not {tuple(position_ids.shape)}."
            )
        positions_BL = position_ids.to(self.cu_seqlens.device).expand(shape)
        positions_T = self.unpad(positions_BL)
        if not told_apart and not torch.compiler.is_compiling() and self.max_length > 1:
            ids_T = self.sequence_ids_T
            if bool(((positions_T[1:] < positions_T[:-1]) & (ids_T[1:] == ids_T[:-1])).any()):
                raise ValueError(
                    "position_ids begin anew within a row, as those of several sequences do, which seq_idx or "
                    "cu_seq_lens_q would have to tell apart: give one of them, as DataCollatorWithFlattening("
                    "return_seq_idx=True) does."
                )
        return replace(self, positions=positions_T if self.packed else positions_BL)

    @property
    def num_sequences(self) -> int:
        """S, empty sequences included."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        """T, the number of real tokens."""
        return self.batch_size * self.length if self.token_indices_T is None else self.token_indices_T.numel()

    @property
    def lengths_S(self) -> Tensor:
        """Real tokens of each sequence, int64."""
        return self.cu_seqlens.diff().long()

    @property
    def sequence_ids_T(self) -> Tensor:
        """The sequence of each real token, int64."""
        if self.grid_indices_T is not None:
            return self.grid_indices_T // self.max_length
        ids_S = torch.arange(self.num_sequences, device=self.cu_seqlens.device)
        return ids_S.repeat_interleave(self.max_length)

    @property
    def indices_T(self) -> Tensor:
        """Index of each real token among its own sequence's, those that came before included, int64."""
        ids_T = self.sequence_ids_T
        offsets_T = torch.arange(len(ids_T), device=ids_T.device) - self.cu_seqlens[ids_T].long()
        return offsets_T if self.past_S is None else offsets_T + self.past_S[ids_T]

    @property
    def ends_S(self) -> Tensor:
        """Tokens of each sequence up to the end of this batch, int64."""
        return self.lengths_S if self.past_S is None else self.past_S + self.lengths_S

    def split(self, point: int) -> "Split":
        """Part each sequence at its token of index `point` (which is in the second part). For packed layouts."""
        if point not in self._splits:
            self._splits[point] = self._split(point)
        return self._splits[point]

    def _split(self, point: int) -> "Split":
        if self.grid_indices_T is None and self.past_S is None:  # all are as long: nothing has to be asked of a device
            length = min(point, self.max_length)
            before = self._of_length(length)
            after = replace(self._of_length(self.max_length - length), past_S=before.lengths_S)
            return Split(self.num_sequences, before, after, None, None)
        lengths_S = self.lengths_S
        past_S = 0 if self.past_S is None else self.past_S
        before_S = (point - past_S - torch.zeros_like(lengths_S)).clamp(min=0).minimum(lengths_S)
        before, after = SequenceLayout.of_lengths(before_S), SequenceLayout.of_lengths(lengths_S - before_S)
        before = replace(before, past_S=self.past_S)
        after = replace(after, past_S=past_S + before_S)
        if self.grid_indices_T is None and before.grid_indices_T is None:  # every sequence at the same place
            return Split(self.num_sequences, before, after, None, None)
        is_before_T = self.indices_T < point
        tokens_before, tokens_after = (mask_T.nonzero().squeeze(1) for mask_T in (is_before_T, ~is_before_T))
        return Split(self.num_sequences, before, after, tokens_before, tokens_after)

    @property
    def recurrence(self) -> "SequenceLayout":
        """The layout by which states and convolutions begin anew."""
        return self._recurrence or self

    @property
    def reach(self) -> "SequenceLayout":
        """The layout within whose sequences tokens attend to one another."""
        return self._reach or self

    def confined(self, segments_BL: Tensor, *, recurrence: bool = False, attention: bool = False) -> "SequenceLayout":
        """The same tokens, whose scans, or whose attention, end at the boundaries of segments.

        Positions stay as they are. For packed layouts without a past.

        Args:
            segments_BL: (B, L) integers, the segment of each token; it begins anew where the number changes.

        Raises:
            ValueError: the shape is another, or there is a past.
        """
        if segments_BL.shape != (self.batch_size, self.length):
            raise ValueError(
                f"segments must have shape {(self.batch_size, self.length)}, not {tuple(segments_BL.shape)}."
            )
        if self.past_S is not None:
            raise ValueError("segments need the whole sequences at once: leave the cache out.")
        segments_T, ids_T = self.unpad(segments_BL.to(self.cu_seqlens.device)), self.sequence_ids_T
        begins_T = torch.ones_like(ids_T, dtype=torch.bool)
        begins_T[1:] = (segments_T[1:] != segments_T[:-1]) | (ids_T[1:] != ids_T[:-1])
        ends = torch.nn.functional.pad(begins_T.nonzero().squeeze(1), (0, 1), value=len(ids_T))
        finer = replace(SequenceLayout.of_lengths(ends.diff()), positions=self.positions)
        return replace(self, _recurrence=finer if recurrence else None, _reach=finer if attention else None)

    def has_interior_pads(self) -> bool:
        """Whether some pad lies between two real tokens of one row."""
        if self.mask_BL is None:
            return False
        starts_BL = self.mask_BL & ~torch.nn.functional.pad(self.mask_BL, (1, -1))
        return bool((starts_BL.sum(1) > 1).any())

    def unpad(self, x_BLH: Tensor) -> Tensor:
        """Real tokens of (B, L, ...), sequence after sequence: (T, ...)."""
        x_flat = x_BLH.reshape(self.batch_size * self.length, *x_BLH.shape[2:])
        return x_flat if self.token_indices_T is None else x_flat.index_select(0, self.token_indices_T)

    def repad(self, x_TH: Tensor) -> Tensor:
        """The inverse of `unpad`, zero at pads: (B, L, ...)."""
        if self.token_indices_T is not None:
            x_flat = x_TH.new_zeros(self.batch_size * self.length, *x_TH.shape[1:])
            x_TH = x_flat.index_copy(0, self.token_indices_T, x_TH)
        return x_TH.reshape(self.batch_size, self.length, *x_TH.shape[1:])

    def to_grid(self, x_TH: Tensor) -> Tensor:
        """Real tokens (T, ...) as one row a sequence, zero behind its end: (S, max_length, ...)."""
        if self.grid_indices_T is not None:
            x_flat = x_TH.new_zeros(self.num_sequences * self.max_length, *x_TH.shape[1:])
            x_TH = x_flat.index_copy(0, self.grid_indices_T, x_TH)
        return x_TH.reshape(self.num_sequences, self.max_length, *x_TH.shape[1:])

    def from_grid(self, x_grid: Tensor) -> Tensor:
        """The inverse of `to_grid`: (T, ...)."""
        x_flat = x_grid.reshape(self.num_sequences * self.max_length, *x_grid.shape[2:])
        return x_flat if self.grid_indices_T is None else x_flat.index_select(0, self.grid_indices_T)

    def grid_mask(self) -> Tensor | None:
        """(S, max_length) bool, True where the grid holds a token; None when it is full."""
        if self.grid_indices_T is None:
            return None
        return torch.arange(self.max_length, device=self.cu_seqlens.device) < self.lengths_S[:, None]


@dataclass(frozen=True)
class Split:
    """The sequences of a packed layout in two parts, each of which holds all of them, some perhaps empty.

    Attributes:
        before, after: the layouts of the two parts.
        tokens_before, tokens_after: indices among the T tokens; None when all are parted at the same place.
    """

    num_sequences: int
    before: SequenceLayout
    after: SequenceLayout
    tokens_before: Tensor | None
    tokens_after: Tensor | None

    def take(self, x_T: Tensor) -> tuple[Tensor, Tensor]:
        """(T, ...) as the tokens before and those after."""
        if self.tokens_before is not None and self.tokens_after is not None:
            return x_T.index_select(0, self.tokens_before), x_T.index_select(0, self.tokens_after)
        x_SL = x_T.unflatten(0, (self.num_sequences, -1)) if len(x_T) else x_T[None]
        before, after = x_SL.split((self.before.max_length, self.after.max_length), dim=1)
        return before.flatten(0, 1), after.flatten(0, 1)

    def join(self, before_T: Tensor, after_T: Tensor) -> Tensor:
        """The inverse of `take`."""
        if not len(before_T):
            return after_T
        if not len(after_T):
            return before_T
        both_T = torch.cat((before_T, after_T))
        if self.tokens_before is not None and self.tokens_after is not None:
            places_T = torch.cat((self.tokens_before, self.tokens_after))
            return torch.empty_like(both_T).index_copy(0, places_T, both_T)
        parts = (part.unflatten(0, (self.num_sequences, -1)) for part in (before_T, after_T))
        return torch.cat(tuple(parts), dim=1).flatten(0, 1)


def _seq_idx_from_boundaries(
    cu_seq_lens: Tensor, batch_size: int, length: int, mask_BL: Tensor | None, device: torch.device | str
) -> Tensor:
    if batch_size != 1:
        raise ValueError(f"cu_seq_lens_q describes one row of packed sequences, but the batch has {batch_size} rows.")
    if cu_seq_lens.dim() != 1 or cu_seq_lens.numel() < 2 or torch.is_floating_point(cu_seq_lens):
        raise ValueError(
            f"cu_seq_lens_q must be (S+1,) integers starting at 0, not {cu_seq_lens.dtype} of shape "
            f"{tuple(cu_seq_lens.shape)}."
        )
    cu = cu_seq_lens.to(device=device, dtype=torch.long)
    if int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
        raise ValueError("cu_seq_lens_q must start at 0 and never decrease.")
    total = int(cu[-1])
    real = length if mask_BL is None else int(mask_BL.sum())
    if total != real or (mask_BL is not None and not bool(mask_BL[0, :total].all())):
        raise ValueError(
            f"cu_seq_lens_q ends at {total}, but the row has {real} real tokens of {length}; they must be the first "
            f"{total}. Mark pads behind the last sequence by attention_mask."
        )
    seq_idx_L = torch.full((length,), -1, device=device)
    ids_S = torch.arange(cu.numel() - 1, device=device)
    seq_idx_L[:total] = ids_S.repeat_interleave(cu.diff(), output_size=total)
    return seq_idx_L[None]


def _same_sequences(first_BL: Tensor, second_BL: Tensor) -> bool:
    """Whether two labellings of one row part it at the same places and agree on the pads."""
    same_pads = torch.equal(first_BL < 0, second_BL < 0)
    return same_pads and torch.equal(first_BL.diff(dim=1) != 0, second_BL.diff(dim=1) != 0)


def _boundaries_from_seq_idx(seq_idx_BL: Tensor, token_indices_T: Tensor | None) -> Tensor:
    length = seq_idx_BL.shape[1]
    flat = seq_idx_BL.reshape(-1).long()
    indices_T = torch.arange(flat.numel(), device=flat.device) if token_indices_T is None else token_indices_T
    ids_T, rows_T = flat[indices_T], indices_T // max(length, 1)
    none = ids_T.new_full((1,), -1)
    starts = ((ids_T.diff(prepend=none) != 0) | (rows_T.diff(prepend=none) != 0)).nonzero().squeeze(1)
    runs = torch.stack((rows_T[starts], ids_T[starts]), dim=1)
    if not torch.compiler.is_compiling() and len(runs.unique(dim=0)) != len(runs):
        raise ValueError("seq_idx interleaves sequences: the tokens of one sequence must lie in one piece of its row.")
    total = torch.tensor([indices_T.numel()], device=flat.device)
    return torch.cat((starts, total)).to(torch.int32)
