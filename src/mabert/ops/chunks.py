"""Sequences cut into chunks of a few steps, so that chunks with the same index can be advanced together.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, R rows (chunks of all sequences), Q steps in one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ChunkSchedule:
    """Where each real token goes. Rows are ordered by the chunk's index, then by length, the longest sequence first:
    the sequences that are still running are a prefix of those before.

    Attributes:
        size: Q.
        rows: R.
        rank_S: the sequence at each rank.
        running: how many sequences reach each chunk index.
        offsets: the first row of each chunk index.
        spans: (S, L) where the tokens are so many sequences of one length, in order; then nothing has to be indexed.
        token_T, place_T: `token_T[i]` of the input stands at place `place_T[i]` of the R·Q; empty with `spans`.
    """

    size: int
    rows: int
    rank_S: Tensor
    running: list[int]
    offsets: list[int]
    spans: tuple[int, int] | None
    token_T: Tensor
    place_T: Tensor

    @classmethod
    def build(
        cls,
        size: int,
        batch_size: int,
        length: int,
        device: torch.device,
        *,
        mask_BL: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
    ) -> "ChunkSchedule":
        """Of (B, L) tokens: rows without pads, rows with a mask, or one row of packed sequences."""
        spans_S = torch.full((batch_size,), length, device=device) if cu_seqlens is None else cu_seqlens.diff().long()
        sequences = spans_S.numel()
        longest = int(spans_S.max()) if sequences else 0
        if mask_BL is None and not reverse and longest and longest == int(spans_S.min()):
            chunks = -(-longest // size)
            ranks = torch.arange(sequences, device=device)
            running, offsets = [sequences] * chunks, [sequences * chunk for chunk in range(chunks)]
            none = ranks[:0]
            return cls(size, sequences * chunks, ranks, running, offsets, (sequences, longest), none, none)

        starts_S = torch.arange(batch_size, device=device) * length if cu_seqlens is None else cu_seqlens[:-1].long()
        sequence_T = torch.arange(sequences, device=device).repeat_interleave(spans_S, output_size=batch_size * length)
        token_T = torch.arange(batch_size * length, device=device)
        lengths_S = spans_S
        if mask_BL is not None:
            token_T = mask_BL.reshape(-1).nonzero().squeeze(1)
            sequence_T = sequence_T[token_T]
            lengths_S = torch.bincount(sequence_T, minlength=sequences)
            starts_S = F.pad(lengths_S.cumsum(0), (1, 0))[:-1]
        step_T = torch.arange(token_T.numel(), device=device) - starts_S[sequence_T]
        if reverse:
            step_T = lengths_S[sequence_T] - 1 - step_T

        rank_S = lengths_S.argsort(descending=True, stable=True)
        rank_of_S = torch.empty_like(rank_S)
        rank_of_S[rank_S] = torch.arange(sequences, device=device)
        chunks_S = -(-lengths_S // size)
        running_K = (chunks_S[:, None] > torch.arange(int(chunks_S.max()) if sequences else 0, device=device)).sum(0)
        offset_K = F.pad(running_K.cumsum(0), (1, 0))
        place_T = (offset_K[step_T // size] + rank_of_S[sequence_T]) * size + step_T % size
        return cls(size, int(offset_K[-1]), rank_S, running_K.tolist(), offset_K[:-1].tolist(), None, token_T, place_T)

    def gather(self, x_BL: Tensor) -> Tensor:
        """(B, L, ...) -> (R, Q, ...), zero at places without a token."""
        features = x_BL.shape[2:]
        if self.spans is not None:
            sequences, length = self.spans
            x = x_BL.reshape(sequences, length, -1)
            x = F.pad(x, (0, 0, 0, -length % self.size))
            return x.reshape(sequences, -1, self.size, *features).transpose(0, 1).reshape(-1, self.size, *features)
        x_T = x_BL.reshape(-1, *features).index_select(0, self.token_T)
        x_P = x_T.new_zeros(self.rows * self.size, *features).index_copy(0, self.place_T, x_T)
        return x_P.view(self.rows, self.size, *features)

    def scatter(self, x_RQ: Tensor, like_BL: Tensor) -> Tensor:
        """The inverse of `gather`: in the first two dimensions and the dtype of `like_BL`, zero at masked tokens."""
        features = x_RQ.shape[2:]
        if self.spans is not None:
            sequences, length = self.spans
            x = x_RQ.reshape(-1, sequences, self.size, *features).transpose(0, 1)
            x = x.reshape(sequences, -1, *features)[:, :length]
            return x.reshape(*like_BL.shape[:2], *features).to(like_BL.dtype).contiguous()
        x_T = x_RQ.reshape(-1, *features).index_select(0, self.place_T).to(like_BL.dtype)
        out = x_T.new_zeros(like_BL.shape[:2].numel(), *features)
        return out.index_copy(0, self.token_T, x_T).view(*like_BL.shape[:2], *features)

    def is_real(self) -> Tensor:
        """(R, Q) bool, True at places with a token."""
        if self.spans is not None:
            sequences, length = self.spans
            device = self.rank_S.device
            return self.gather(torch.ones(sequences, length, 1, dtype=torch.bool, device=device)).squeeze(-1)
        real = torch.zeros(self.rows * self.size, dtype=torch.bool, device=self.place_T.device)
        real[self.place_T] = True
        return real.view(self.rows, self.size)
