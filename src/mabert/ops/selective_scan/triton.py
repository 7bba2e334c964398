"""The selective scan on a GPU in Triton; docs/kernels.md says why it is built like this.

A program owns a block of channels of a stretch of one row and walks it in tiles of a few steps. A thread holds all
steps of its channels in a tile, so that neither the recurrence nor the readout crosses threads; the N states are taken
one after the other and rest in memory between tiles. Where rows are too few to fill the device, each is cut into
stretches: one kernel finds what a stretch makes of a zero state and how much of an entering one it lets through, a
second one carries states from stretch to stretch, the third one does the work. Nothing of size B·L·E·N is ever stored.

Time runs in scan order: step p is token p, or token L-1-p when the scan is reversed. A row of packed sequences starts
anew where a token's sequence is not that of the step before.

Shape suffixes: B batch, L length, S sequences, E inner, N state, K stretches of a row, T steps of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mabert.ops.gpu import INTERPRETED, check_input, on_device_of_first, rows, sequence_of
from mabert.ops.native import like
from mabert.ops.selective_scan.kept import TRITON_KEPT_EVERY as TILE
from mabert.ops.triton_math import LOG2_E, channels, sigmoid

LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        block: channels of a program.
        warps: of a program.
        programs: rows are cut into stretches while there are fewer.
        shortest: steps of a stretch at least.
    """

    block: int
    warps: int
    programs: int
    shortest: int

    def stretch(self, batch: int, length: int, inner: int) -> int:
        """Steps of a stretch, a multiple of TILE; all of a row where there are programs enough."""
        per_row = max(1, self.programs // max(1, batch * triton.cdiv(inner, self.block)))
        return triton.cdiv(max(self.shortest, triton.cdiv(length, per_row)), TILE) * TILE


# Chosen by what the compiler makes of it, not measured yet. In the interpreter: more than one of everything.
CUT = Cut(block=8, warps=1, programs=2**20, shortest=16) if INTERPRETED else Cut(32, 1, 2048, 128)


@on_device_of_first
def forward(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fallback.forward`; the kept states lie as (rows, N, E), the final ones as (S, N, E) and are transposed."""
    scan = _Scan(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse)
    y = like(x)
    if scan.initial is None:
        final = x.new_zeros(scan.sequences, scan.state, scan.inner, dtype=torch.float32)
    else:
        final = scan.initial.clone()  # a sequence without tokens ends where it begins
    kept = x.new_empty(kept_rows, *A.shape, dtype=torch.float32)
    if x.numel():
        entering = scan.carried(_leave, (), scan.initial, backwards=False)
        states = kept if kept_rows else scan.per_stretch()
        scan.launch(_read_out, (entering, states, y, final), KEEP=kept_rows > 0)
    return y, final.mT, kept


@on_device_of_first
def backward(
    dy, dfinal, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept
) -> list[Tensor]:
    """See `fallback.backward`. Sums over channels, rows and stretches are partial sums added in a fixed order."""
    scan = _Scan(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse)
    dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.mT.contiguous()
    dx, ddelta = like(x), like(delta)
    nothing = [x.new_empty(0) for _ in range(4)]
    dz = like(x) if z is not None else nothing[0]
    dinitial = None
    if scan.initial is not None:
        dinitial = torch.zeros_like(scan.initial) if dfinal is None else dfinal.clone()
    blocks = triton.cdiv(scan.inner, CUT.block)
    dB_part, dC_part = (scan.new_empty(blocks, *scan.B.shape) for _ in range(2))
    dA_part = scan.per_stretch().zero_()
    dD_part, dbias_part = (scan.new_empty(scan.batch, scan.stretches, scan.inner) for _ in range(2))
    if x.numel():
        entering = scan.carried(_leave_backwards, (dy, dfinal), dfinal, backwards=True)
        outputs = (dx, ddelta, dz, dB_part, dC_part, dA_part, dD_part, dbias_part, dinitial)
        scan.launch(_gradients, (dy, dfinal, entering, kept, scan.per_stretch(), *outputs))
    return [
        dx,
        ddelta,
        dA_part.sum((0, 1)).T.contiguous(),
        scan.per_token(dB_part.sum(0), B),
        scan.per_token(dC_part.sum(0), C),
        dD_part.sum((0, 1)) if D is not None else nothing[2],
        dz,
        dbias_part.sum((0, 1)) if delta_bias is not None else nothing[3],
        nothing[1] if dinitial is None else dinitial.mT.contiguous(),
    ]


class _Scan:
    """One call's inputs as the kernels take them, and how its rows are cut."""

    def __init__(self, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, softplus, reverse):
        check_input(x)
        for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state)):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.device != x.device):
                raise ValueError(
                    f"triton kernel: {name} must be float32 on {x.device}, not {tensor.dtype} on {tensor.device}."
                )
        self.batch, self.length, self.inner = x.shape
        self.state = A.shape[1]
        self.reverse, self.cu_seqlens, self.device = reverse, cu_seqlens, x.device
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.initial = None if initial_state is None else initial_state.mT.contiguous()
        self.stretch = CUT.stretch(*x.shape)
        self.stretches = triton.cdiv(self.length, self.stretch)
        self.tiles = triton.cdiv(self.length, TILE)
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.B, self.C = (self.new_empty(self.batch, self.tiles, self.state, TILE) for _ in range(2))
        if x.numel():
            _by_tile[(self.tiles, self.batch)](
                *rows("B", B, x), *rows("C", C, x), mask, self.B, self.C, self.length,
                N=self.state, PADDED_N=triton.next_power_of_2(self.state), T=TILE, REVERSE=reverse, num_warps=1,
            )  # fmt: skip
        self.inputs = (
            *rows("x", x, x),
            *rows("delta", delta, x),
            *((None, 0, 0) if z is None else rows("z", z, x)),
            (A.T * LOG2_E.value).contiguous(),
            self.B,
            self.C,
            D if D is None else D.contiguous(),
            delta_bias if delta_bias is None else delta_bias.contiguous(),
            mask,
            None if cu_seqlens is None else sequence_of(cu_seqlens, self.length),
            self.initial,
            self.length,
            self.inner,
            self.stretch,
        )
        self.constants = {
            "N": self.state,
            "T": TILE,
            "BLOCK": CUT.block,
            "SOFTPLUS": softplus,
            "REVERSE": reverse,
            "num_warps": CUT.warps,
        }

    def new_empty(self, *shape: int) -> Tensor:
        """Uninitialised floats."""
        return torch.empty(*shape, device=self.device)

    def per_stretch(self) -> Tensor:
        """Uninitialised (B, K, N, E) floats."""
        return self.new_empty(self.batch, self.stretches, self.state, self.inner)

    def per_token(self, by_tile: Tensor, like: Tensor) -> Tensor:
        """The way of `_by_tile` back: (B, L/T, N, T) to (B, L, N)."""
        tokens = by_tile.transpose(2, 3).reshape(self.batch, self.tiles * TILE, self.state)[:, : self.length]
        return (tokens.flip(1) if self.reverse else tokens).to(like.dtype).contiguous()

    def launch(self, kernel, arguments: tuple, **constants: object) -> None:
        """Run a kernel for every block of channels of every stretch."""
        grid = (triton.cdiv(self.inner, CUT.block), self.stretches, self.batch)
        kernel[grid](*self.inputs, *arguments, **self.constants, **constants)

    def carried(self, kernel, arguments: tuple, outside: Tensor | None, *, backwards: bool) -> Tensor | None:
        """What enters every stretch: (B, K, N, E), None when there is one only. `outside` enters a row."""
        if self.stretches == 1:
            return None
        local, through = self.per_stretch(), self.per_stretch()
        packed = self.cu_seqlens is not None
        self.launch(kernel, (*arguments, self._nearest_starts(backwards) if packed else None, local, through))
        _carry_over[(triton.cdiv(self.state * self.inner, 128), self.batch)](
            local, through, None if packed else outside, self.stretches, self.state * self.inner,
            BACKWARDS=backwards, BLOCK=128,
        )  # fmt: skip
        return local

    def _nearest_starts(self, backwards: bool) -> Tensor:
        """Where the sequence starts that is under way at the end of each stretch; backwards, the first one that starts
        at its beginning or later. (K,) int32, in scan order.
        """
        assert self.cu_seqlens is not None
        starts = self.length - self.cu_seqlens.flip(0) if self.reverse else self.cu_seqlens
        borders = torch.arange(self.stretches, device=self.device, dtype=torch.int32) * self.stretch
        if backwards:
            return starts[torch.searchsorted(starts, borders)]
        ends = (borders + self.stretch).clamp(max=self.length)
        return starts[torch.searchsorted(starts, ends, right=True) - 1]


@triton.jit
def _bits_of_row(tile, t: tl.constexpr, T: tl.constexpr):
    """One row of a (T, E) tile as (1, E) integers. A thread holds all T and t is known: this takes no instruction."""
    bits = tl.where(tl.arange(0, T)[:, None] == t, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.int32)


@triton.jit
def _row(tile, t: tl.constexpr, T: tl.constexpr):
    return _bits_of_row(tile, t, T).to(tl.float32, bitcast=True)


@triton.jit
def _unless_start(value, goes_on, t: tl.constexpr, T: tl.constexpr):
    """The value, or zero where a sequence starts at step t: a product would let the NaN of another sequence through."""
    if goes_on is not None:
        value = (value.to(tl.int32, bitcast=True) & _bits_of_row(goes_on, t, T)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _states(decay, added, state, goes_on, T: tl.constexpr):
    """The recurrence over a tile: states before and after each step (T, E), and after the last one (1, E)."""
    step = tl.arange(0, T)[:, None]
    before = tl.zeros_like(decay)
    after = tl.zeros_like(decay)
    for t in tl.static_range(T):
        state = _unless_start(state, goes_on, t, T)
        before = tl.where(step == t, state, before)
        state = _row(decay, t, T) * state + _row(added, t, T)
        after = tl.where(step == t, state, after)
    return before, after, state


@triton.jit
def _state_gradients(decay, direct, carry, goes_on, T: tl.constexpr):
    """The recurrence backwards: gradients of the states after each step (T, E), and of that before the first (1, E)."""
    step = tl.arange(0, T)[:, None]
    gradient = tl.zeros_like(decay)
    for i in tl.static_range(T):
        carry += _row(direct, T - 1 - i, T)
        gradient = tl.where(step == T - 1 - i, carry, gradient)
        carry = _unless_start(_row(decay, T - 1 - i, T) * carry, goes_on, T - 1 - i, T)
    return gradient, carry


@triton.jit
def _fold(tile, bit: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """(T, E) to (T/2, E): channels with the given bit take the rows of the second half, the others those of the first;
    each adds what its neighbour across that bit has of the same rows.
    """
    first, second = tl.split(tl.permute(tl.reshape(tile, [2, T // 2, BLOCK]), [1, 2, 0]))
    channel = tl.arange(0, BLOCK)[None, :] + tl.zeros([T // 2, BLOCK], tl.int32)
    upper = (channel & bit) != 0
    return tl.where(upper, second, first) + tl.gather(tl.where(upper, first, second), channel ^ bit, 1)


@triton.jit
def _sum_over_channels(tile, T: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the rows of a (T, E) tile, one in each of the first T channels (1, E), in the order of `_row_in_channel`.

    Half of the rows go to a neighbour at every step: T exchanges between threads instead of five a row.
    """
    for i in tl.static_range(10):
        if (T >> i) > 1:
            tile = _fold(tile, 1 << i, T >> i, BLOCK)
    for i in tl.static_range(10):
        if (T << i) < BLOCK:
            channel = tl.arange(0, BLOCK)[None, :]
            tile += tl.gather(tile, channel ^ (T << i), 1)
    return tile


@triton.jit
def _row_in_channel(T: tl.constexpr, BLOCK: tl.constexpr):
    """Which row's sum a channel holds (1, E): the low bits of its number, the lowest one counting most."""
    channel = tl.arange(0, BLOCK)[None, :]
    row = tl.zeros_like(channel)
    for i in tl.static_range(10):
        if (T >> i) > 1:
            row += ((channel >> i) & 1) * (T >> (i + 1))
    return row


@triton.jit
def _steps(tile, row, length, mask, T: tl.constexpr, REVERSE: tl.constexpr):
    """A tile's first token, the way of each step's token from there, and which exist and are real (T, 1)."""
    t = tl.arange(0, T)[:, None]
    inside = tile + t < length
    first = tl.zeros([], tl.int64) + (length - 1 - tile if REVERSE else tile)
    away = -t if REVERSE else t
    real = inside
    if mask is not None:
        real = inside & (tl.load(mask + row * length + first + away, mask=inside, other=0) != 0)
    return first, away, inside, real


@triton.jit
def _borders(tile, length, sequence_of, T: tl.constexpr, REVERSE: tl.constexpr):
    """The sequence of each step of a tile of a packed row, and whether it starts or ends there (T, 1)."""
    step = tile + tl.arange(0, T)[:, None]
    token = length - 1 - step if REVERSE else step
    back = 1 if REVERSE else -1
    inside = step < length
    sequence = tl.load(sequence_of + token, mask=inside, other=-1)
    start = inside & (sequence != tl.load(sequence_of + token + back, mask=inside & (step > 0), other=-1))
    end = inside & (sequence != tl.load(sequence_of + token - back, mask=step < length - 1, other=-1))
    return sequence.to(tl.int64), start, end


@triton.jit
def _any(flags):
    return tl.max(tl.max(flags.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def _summary_of_borders(tile, length, sequence_of, T: tl.constexpr, REVERSE: tl.constexpr):
    """All bits where a step goes on with a sequence, none where one starts (T, 1); whether some start, some end."""
    sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
    return tl.where(start, 0, -1), _any(start), _any(end)


@triton.jit
def _tile(pointer, row_stride, time_stride, row, first, away, e, mask):
    """A tile of a (B, L, E) tensor in float32, zero where the mask says."""
    base = pointer + row * row_stride + first * time_stride
    return tl.load(base + away * time_stride + e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(v):
    """log(1 + e^v), relative error small however small the result: log(1 + u) through 2 atanh(u / (2 + u))."""
    u = tl.exp2(-tl.abs(v) * LOG2_E)
    s = u / (2.0 + u)
    w = s * s
    q = ((w * 0.140059962 + 0.140009016) * w + 0.200107634) * w + 0.333332077
    return tl.maximum(v, 0.0) + 2.0 * (s * (w * q) + s)


@triton.jit
def _before_softplus(delta, delta_row, delta_time, bias, row, first, away, e, mask):
    raw = _tile(delta, delta_row, delta_time, row, first, away, e, mask)
    if bias is not None:
        raw += tl.load(bias + e, mask=mask, other=0.0)
    return raw


@triton.jit
def _step_size(delta, delta_row, delta_time, bias, row, first, away, e, mask, SOFTPLUS: tl.constexpr):
    """Δ (T, E), zero where the mask says: exp(0·A) = 1 and 0·x = 0, the identity step."""
    step_size = _before_softplus(delta, delta_row, delta_time, bias, row, first, away, e, mask)
    if SOFTPLUS:
        step_size = _softplus(step_size)
    return tl.where(mask, step_size, 0.0)


@triton.jit
def _at_state(tiles, row, tile, n, length, N: tl.constexpr, T: tl.constexpr):
    """Where the values of state n in a tile begin in what `_by_tile` wrote."""
    return tiles + ((row * tl.cdiv(length, T) + tile // T) * N + n) * T


@triton.jit
def _of_state(tiles, row, tile, n, length, N: tl.constexpr, T: tl.constexpr):
    """The values of state n in a tile (T, 1), from what `_by_tile` wrote."""
    return tl.load(_at_state(tiles, row, tile, n, length, N, T) + tl.arange(0, T)[:, None])


@triton.jit(do_not_specialize=["length"])
def _by_tile(
    B, B_row, B_time, C, C_row, C_time, mask, B_out, C_out, length,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """B and C in float32 and scan order as (B, L/T, N, T), zero at pads: a thread then reads a state's values of a tile
    from one address.
    """
    tile = tl.program_id(0) * T
    row = tl.program_id(1).to(tl.int64)
    first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
    n = tl.arange(0, PADDED_N)[None, :]
    to = _at_state(0, row, tile, n, length, N, T) + tl.arange(0, T)[:, None]
    some = n < N
    tl.store(B_out + to, _tile(B, B_row, B_time, row, first, away, n, real & some), mask=some)
    tl.store(C_out + to, _tile(C, C_row, C_time, row, first, away, n, real & some), mask=some)


@triton.jit
def _from_outside(states, sequence, e, n, inner, mask, N: tl.constexpr):
    """State n of sequences, from (S, N, E)."""
    return tl.load(states + (sequence * N + n) * inner + e, mask=mask, other=0.0)


@triton.jit
def _clear(states, inner, some, N: tl.constexpr, BLOCK: tl.constexpr):
    """Zero in every state of a program's channels."""
    for n in range(N):
        tl.store(states + n * inner, tl.zeros([1, BLOCK], tl.float32), mask=some)


@triton.jit
def _store_let_through(through, total, alive, A, e, inner, some, N: tl.constexpr):
    """How much of each state passes steps that sum up to `total`; nothing where a sequence starts among them."""
    for n in range(N):
        a = tl.load(A + n * inner + e, mask=some, other=0.0)
        tl.store(through + n * inner, tl.where(alive, tl.exp2(total * a), 0.0), mask=some)


@triton.jit(do_not_specialize=["length", "steps"])
def _leave(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps,
    nearest, local, through,
    N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a stretch makes of a zero state, and how much of an entering state it lets through."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    out = (row * tl.num_programs(1) + stretch) * N * inner + e
    begin = stretch * steps
    from_tile = begin
    alive = True
    if sequence_of is not None:
        started = tl.load(nearest + stretch)
        alive = started < begin
        from_tile = tl.maximum(begin, started // T * T)
    _clear(local + out, inner, some, N, BLOCK)
    total = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(from_tile, tl.minimum(begin + steps, length), T):
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        drive = step_size * _tile(x, x_row, x_time, row, first, away, e, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        goes_on = None
        if sequence_of is not None:
            goes_on, some_start, some_end = _summary_of_borders(tile, length, sequence_of, T, REVERSE)
        for n in range(N):
            a = tl.load(A + n * inner + e, mask=some, other=0.0)
            kept = tl.exp2(step_size * a)
            added = drive * _of_state(B, row, tile, n, length, N, T)
            if sequence_of is not None:
                if initial is not None:
                    if some_start:
                        sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                        added += kept * _from_outside(initial, sequence, e, n, inner, start & some, N)
            state = tl.load(local + out + n * inner, mask=some, other=0.0)
            before, after, state = _states(kept, added, state, goes_on, T)
            tl.store(local + out + n * inner, state, mask=some)
    _store_let_through(through + out, total, alive, A, e, inner, some, N)


@triton.jit(do_not_specialize=["stretches"])
def _carry_over(local, through, outside, stretches, width, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """Puts what enters each stretch in the place of what leaves it by itself."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    some = column < width
    carry = tl.zeros([BLOCK], tl.float32)
    if outside is not None:
        carry = tl.load(outside + row * width + column, mask=some, other=0.0)
    base = row * stretches * width + column
    for i in range(stretches):
        at = base + (stretches - 1 - i if BACKWARDS else i) * width
        leaving = tl.load(local + at, mask=some, other=0.0)
        factor = tl.load(through + at, mask=some, other=0.0)
        tl.store(local + at, carry, mask=some)
        carry = tl.where(factor == 0.0, 0.0, factor * carry) + leaving


@triton.jit(do_not_specialize=["length", "steps"])
def _read_out(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps,
    entering, states, y, final,
    N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Eq. 8 and the gate of Eq. 9 over a stretch; keeps the state before every tile, or the last one only."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    place = row * tl.num_programs(1) + stretch
    begin = stretch * steps
    stop = tl.minimum(begin + steps, length)
    if KEEP:
        slot = states + (row * tl.cdiv(length, T) + begin // T) * N * inner + e
        forth = N * inner
    else:
        slot = states + place * N * inner + e
        forth = 0
    for n in range(N):
        state = tl.zeros([1, BLOCK], tl.float32)
        if entering is not None:
            state = tl.load(entering + (place * N + n) * inner + e, mask=some, other=0.0)
        elif initial is not None:
            if sequence_of is None:
                state = _from_outside(initial, row, e, n, inner, some, N)
        tl.store(slot + n * inner, state, mask=some)
    for tile in range(begin, stop, T):
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        drive = step_size * _tile(x, x_row, x_time, row, first, away, e, real & some)
        goes_on = None
        if sequence_of is not None:
            goes_on, some_start, some_end = _summary_of_borders(tile, length, sequence_of, T, REVERSE)
        out = tl.zeros([T, BLOCK], tl.float32)
        for n in range(N):
            a = tl.load(A + n * inner + e, mask=some, other=0.0)
            kept = tl.exp2(step_size * a)
            added = drive * _of_state(B, row, tile, n, length, N, T)
            if sequence_of is not None:
                if initial is not None:
                    if some_start:
                        sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                        added += kept * _from_outside(initial, sequence, e, n, inner, start & some, N)
            state = tl.load(slot + n * inner, mask=some, other=0.0)
            before, after, state = _states(kept, added, state, goes_on, T)
            out += after * _of_state(C, row, tile, n, length, N, T)
            tl.store(slot + forth + n * inner, state, mask=some & (tile + T < stop))
            if sequence_of is None:
                if tile + T >= length:
                    tl.store(final + (row * N + n) * inner + e, state, mask=some)
            else:
                if some_end:
                    sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                    tl.store(final + (sequence * N + n) * inner + e, after, mask=end & some)
        if D is not None:
            out += tl.load(D + e, mask=some, other=0.0) * _tile(x, x_row, x_time, row, first, away, e, real & some)
        if z is not None:
            gate = _tile(z, z_row, z_time, row, first, away, e, real & some)
            out *= gate * sigmoid(gate)
        at = y + (row * length + first) * inner + away * inner + e
        tl.store(at, tl.where(real, out, 0.0).to(y.dtype.element_ty), mask=inside & some)
        slot += forth


@triton.jit
def _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, mask):
    """The gradient before the gate (T, E)."""
    gradient = _tile(dy + row * length * inner, 0, inner, row, first, away, e, mask)
    if z is not None:
        gate = _tile(z, z_row, z_time, row, first, away, e, mask)
        gradient *= gate * sigmoid(gate)
    return gradient


@triton.jit
def _direct_gradient(
    ungated, C_tile, dfinal, some_end, tile, sequence_of, e, n, length, inner, some,
    N: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of state n after each step through what is read from it there (T, E)."""
    direct = ungated * C_tile
    if sequence_of is not None:
        if dfinal is not None:
            if some_end:
                sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                direct += _from_outside(dfinal, sequence, e, n, inner, end & some, N)
    return direct


@triton.jit(do_not_specialize=["length", "steps"])
def _leave_backwards(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps,
    dy, dfinal, nearest, local, through,
    N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The same as `_leave` for gradients of the state, which enter a stretch at its end."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    out = (row * tl.num_programs(1) + stretch) * N * inner + e
    begin = stretch * steps
    stop = tl.minimum(begin + steps, length)
    alive = True
    if sequence_of is not None:
        started = tl.load(nearest + stretch)
        alive = started >= stop
        stop = tl.minimum(stop, started)
    _clear(local + out, inner, some, N, BLOCK)
    total = tl.zeros([1, BLOCK], tl.float32)
    tiles = tl.cdiv(stop - begin, T)
    for i in range(tiles):
        tile = begin + (tiles - 1 - i) * T
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        ungated = _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        some_end = False
        goes_on = None
        if sequence_of is not None:
            goes_on, some_start, some_end = _summary_of_borders(tile, length, sequence_of, T, REVERSE)
        for n in range(N):
            a = tl.load(A + n * inner + e, mask=some, other=0.0)
            kept = tl.exp2(step_size * a)
            C_tile = _of_state(C, row, tile, n, length, N, T)
            direct = _direct_gradient(
                ungated, C_tile, dfinal, some_end, tile, sequence_of, e, n, length, inner, some, N, T, REVERSE
            )
            carry = tl.load(local + out + n * inner, mask=some, other=0.0)
            gradient, carry = _state_gradients(kept, direct, carry, goes_on, T)
            tl.store(local + out + n * inner, carry, mask=some)
    _store_let_through(through + out, total, alive, A, e, inner, some, N)


@triton.jit(do_not_specialize=["length", "steps"])
def _gradients(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps,
    dy, dfinal, entering, states, carries,
    dx, ddelta, dz, dB, dC, dA, dD, dbias, dinitial,
    N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Every gradient over a stretch, from its last tile to its first; states are computed again from the kept ones.

    What the end of a tile needs again is loaded again: held in registers meanwhile, it would push out the states.
    """
    block = tl.program_id(0)
    e = channels(block, BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    place = row * tl.num_programs(1) + stretch
    begin = stretch * steps
    carried = place * N * inner + e
    summed = (block * tl.num_programs(2) + row).to(tl.int64)
    for n in range(N):
        carry = tl.zeros([1, BLOCK], tl.float32)
        if entering is not None:
            carry = tl.load(entering + carried + n * inner, mask=some, other=0.0)
        elif dfinal is not None:
            if sequence_of is None:
                carry = _from_outside(dfinal, row, e, n, inner, some, N)
        tl.store(carries + carried + n * inner, carry, mask=some)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=some, other=0.0)
    skip_gradient = tl.zeros([1, BLOCK], tl.float32)
    bias_gradient = tl.zeros([1, BLOCK], tl.float32)
    tiles = tl.cdiv(tl.minimum(begin + steps, length) - begin, T)
    for i in range(tiles):
        tile = begin + (tiles - 1 - i) * T
        slot = states + (row * tl.cdiv(length, T) + tile // T) * N * inner + e
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        here = real & some
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, here, SOFTPLUS)
        drive = step_size * _tile(x, x_row, x_time, row, first, away, e, here)
        ungated = _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, here)
        some_end = False
        goes_on = None
        if sequence_of is not None:
            goes_on, some_start, some_end = _summary_of_borders(tile, length, sequence_of, T, REVERSE)
        out = tl.zeros([T, BLOCK], tl.float32)
        drive_gradient = tl.zeros([T, BLOCK], tl.float32)
        exponent_gradient = tl.zeros([T, BLOCK], tl.float32)
        for n in range(N):
            a = tl.load(A + n * inner + e, mask=some, other=0.0)
            B_tile = _of_state(B, row, tile, n, length, N, T)
            C_tile = _of_state(C, row, tile, n, length, N, T)
            kept = tl.exp2(step_size * a)
            added = drive * B_tile
            from_initial = tl.zeros([T, BLOCK], tl.float32)
            if sequence_of is not None:
                if initial is not None:
                    if some_start:
                        sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                        from_initial = kept * _from_outside(initial, sequence, e, n, inner, start & some, N)
                        added += from_initial
            state = tl.load(slot + n * inner, mask=some, other=0.0)
            before, after, state = _states(kept, added, state, goes_on, T)
            direct = _direct_gradient(
                ungated, C_tile, dfinal, some_end, tile, sequence_of, e, n, length, inner, some, N, T, REVERSE
            )
            carry = tl.load(carries + carried + n * inner, mask=some, other=0.0)
            gradient, carry = _state_gradients(kept, direct, carry, goes_on, T)
            tl.store(carries + carried + n * inner, carry, mask=some)
            exponent = gradient * (kept * before + from_initial)
            if initial is not None:
                if sequence_of is None:
                    if tile == 0:
                        tl.store(dinitial + (row * N + n) * inner + e, carry, mask=some)
                else:
                    if some_start:
                        sequence, start, end = _borders(tile, length, sequence_of, T, REVERSE)
                        at = dinitial + (sequence * N + n) * inner + e
                        tl.store(at, tl.exp2(step_size * a) * gradient, mask=start & some)
            out += after * C_tile
            drive_gradient += gradient * B_tile
            exponent_gradient += exponent * a
            at = dA + carried + n * inner
            total = tl.sum(exponent * step_size, axis=0, keep_dims=True)
            tl.store(at, tl.load(at, mask=some, other=0.0) + total, mask=some)
            at = _at_state(0, summed, tile, n, length, N, T) + _row_in_channel(T, BLOCK)
            once = tl.arange(0, BLOCK)[None, :] < T
            tl.store(dB + at, _sum_over_channels(gradient * drive, T, BLOCK), mask=once)
            tl.store(dC + at, _sum_over_channels(ungated * after, T, BLOCK), mask=once)
        values = _tile(x, x_row, x_time, row, first, away, e, here)
        step_gradient = exponent_gradient * LN_2 + drive_gradient * values
        if SOFTPLUS:
            raw = _before_softplus(delta, delta_row, delta_time, bias, row, first, away, e, here)
            step_gradient *= sigmoid(raw)
        step_gradient = tl.where(here, step_gradient, 0.0)
        bias_gradient += tl.sum(step_gradient, axis=0, keep_dims=True)
        at = (row * length + first) * inner + away * inner + e
        tl.store(ddelta + at, step_gradient.to(ddelta.dtype.element_ty), mask=inside & some)
        if z is not None:
            gate = _tile(z, z_row, z_time, row, first, away, e, here)
            given = _tile(dy + row * length * inner, 0, inner, row, first, away, e, here)
            s = sigmoid(gate)
            gate_gradient = given * (s + gate * s * (1.0 - s)) * (out + skip * values)
            tl.store(dz + at, gate_gradient.to(dz.dtype.element_ty), mask=inside & some)
        skip_gradient += tl.sum(ungated * values, axis=0, keep_dims=True)
        values_gradient = drive_gradient * step_size + ungated * skip
        tl.store(dx + at, values_gradient.to(dx.dtype.element_ty), mask=inside & some)
    tl.store(dD + place * inner + e, skip_gradient, mask=some)
    tl.store(dbias + place * inner + e, bias_gradient, mask=some)
