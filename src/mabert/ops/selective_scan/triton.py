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

from mabert.ops.gpu import DTYPES, INTERPRETED, rows, sequence_of
from mabert.ops.native import like
from mabert.ops.selective_scan.kept import TRITON_KEPT_EVERY as TILE

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        block: channels of a program.
        warps: of a program.
        programs: rows are cut into stretches until there are so many.
        shortest: steps of a stretch at least.
    """

    block: int
    warps: int
    programs: int
    shortest: int

    def stretch(self, batch: int, length: int, inner: int) -> int:
        """Steps of a stretch, a multiple of TILE; all of a row where there are programs enough."""
        per_row = max(1, self.programs // (batch * triton.cdiv(inner, self.block)))
        return triton.cdiv(max(self.shortest, triton.cdiv(length, per_row)), TILE) * TILE


# Chosen by what the compiler makes of it, not measured yet. In the interpreter: more than one of everything.
CUT = Cut(block=8, warps=1, programs=2**20, shortest=16) if INTERPRETED else Cut(32, 1, 2048, 128)


def forward(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fallback.forward`; the kept states lie as (rows, N, E)."""
    scan = _Scan(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse)
    y = like(x)
    final = x.new_zeros(scan.sequences, *A.shape, dtype=torch.float32)
    if initial_state is not None:
        final.copy_(initial_state)  # an empty sequence ends where it begins
    kept = x.new_empty(kept_rows, *A.shape, dtype=torch.float32)
    if x.numel():
        entering = scan.carried(_leave, (), backwards=False)
        states = kept if kept_rows else scan.per_stretch()
        scan.launch(_read_out, scan.stretches, (entering, states, y, final), KEEP=kept_rows > 0)
    return y, final, kept


def backward(
    dy, dfinal, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept
) -> list[Tensor]:
    """See `fallback.backward`. Sums over channels, rows and stretches are partial sums added in a fixed order."""
    scan = _Scan(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse)
    batch, length, inner = x.shape
    state = A.shape[1]
    dy, dfinal = dy.contiguous(), dfinal.contiguous()
    dx, ddelta = like(x), like(delta)
    nothing = [x.new_empty(0) for _ in range(4)]
    dz = like(x) if z is not None else nothing[0]
    dinitial = dfinal.clone() if initial_state is not None else nothing[1]
    blocks = triton.cdiv(inner, CUT.block)
    partial = {"dtype": torch.float32, "device": x.device}
    dB_part, dC_part = (torch.zeros(blocks, batch, state, length, **partial) for _ in range(2))
    dA_part = scan.per_stretch().zero_()
    dD_part, dbias_part = (torch.zeros(batch, scan.stretches, inner, **partial) for _ in range(2))
    if x.numel():
        gradients = (dy, dfinal)
        leaving = scan.carried(_leave_backwards, gradients, backwards=True)
        carry = scan.per_stretch()
        outputs = (dx, ddelta, dz, dB_part, dC_part, dA_part, dD_part, dbias_part, dinitial)
        scan.launch(_gradients, scan.stretches, (*gradients, leaving, kept, carry, *outputs))
    dB, dC = (part.sum(0).transpose(1, 2).to(x.dtype, memory_format=torch.contiguous_format) for part in (dB_part, dC_part))
    return [
        dx,
        ddelta,
        dA_part.sum((0, 1)).T.contiguous(),
        dB,
        dC,
        dD_part.sum((0, 1)) if D is not None else nothing[2],
        dz,
        dbias_part.sum((0, 1)) if delta_bias is not None else nothing[3],
        dinitial,
    ]


class _Scan:
    """One call's inputs as the kernels take them, and how its rows are cut."""

    def __init__(self, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, softplus, reverse):
        if x.dtype not in DTYPES:
            raise ValueError(f"triton kernel: x must be float32, bfloat16 or float16, not {x.dtype}.")
        for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state)):
            if tensor is not None and tensor.dtype != torch.float32:
                raise ValueError(f"triton kernel: {name} must be float32, not {tensor.dtype}.")
        self.batch, self.length, self.inner = x.shape
        self.state = A.shape[1]
        self.reverse = reverse
        self.cu_seqlens = cu_seqlens
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.stretch = CUT.stretch(*x.shape)
        self.stretches = triton.cdiv(self.length, self.stretch)
        self.device = x.device
        no_rows = (None, 0, 0)
        self.inputs = (
            *(
                part
                for name, t in (("x", x), ("delta", delta), ("B", B), ("C", C), ("z", z))
                for part in (no_rows if t is None else rows(name, t, x))
            ),
            (A.T * LOG2_E).contiguous(),
            D if D is None else D.contiguous(),
            delta_bias if delta_bias is None else delta_bias.contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            None if cu_seqlens is None else sequence_of(cu_seqlens, self.length),
            initial_state if initial_state is None else initial_state.contiguous(),
            self.length,
            self.inner,
        )
        self.constants = {
            "STRETCH": self.stretch,
            "N": self.state,
            "T": TILE,
            "BLOCK": CUT.block,
            "SOFTPLUS": softplus,
            "REVERSE": reverse,
            "num_warps": CUT.warps,
        }

    def per_stretch(self) -> Tensor:
        """Uninitialised (B, K, N, E) floats."""
        return torch.empty(self.batch, self.stretches, self.state, self.inner, device=self.device)

    def launch(self, kernel, stretches: int, arguments: tuple, **constants: object) -> None:
        """Run a kernel for every block of channels of the first stretches of every row."""
        grid = (triton.cdiv(self.inner, CUT.block), stretches, self.batch)
        kernel[grid](*self.inputs, *arguments, **self.constants, **constants)

    def carried(self, kernel, arguments: tuple, *, backwards: bool) -> Tensor | None:
        """What comes into every stretch from the one before (or after): (B, K, N, E), None when there is one only."""
        if self.stretches == 1:
            return None
        local, through = self.per_stretch(), self.per_stretch()
        nearest = None if self.cu_seqlens is None else self._nearest_starts(backwards)
        self.launch(kernel, self.stretches, (*arguments, nearest, local, through))
        width = self.state * self.inner
        _carry_over[(triton.cdiv(width, 256), self.batch)](
            local, through, self.stretches, width, BACKWARDS=backwards, BLOCK=256
        )
        return local

    def _nearest_starts(self, backwards: bool) -> Tensor:
        """Where the sequence starts that is under way at the end of each stretch; backwards, the first that starts
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
def _row(tile, t: tl.constexpr, T: tl.constexpr):
    """One row of a (T, E) tile as (1, E). All T lie in one thread and t is known: this takes no instruction."""
    bits = tl.where(tl.arange(0, T)[:, None] == t, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _states(decay, added, state, T: tl.constexpr):
    """The recurrence over a tile: states before and after each step (T, E), and after the last one (1, E)."""
    steps = tl.arange(0, T)[:, None]
    before = tl.zeros_like(decay)
    after = tl.zeros_like(decay)
    for t in tl.static_range(T):
        before = tl.where(steps == t, state, before)
        state = _row(decay, t, T) * state + _row(added, t, T)
        after = tl.where(steps == t, state, after)
    return before, after, state


@triton.jit
def _state_gradients(decay, direct, carry, T: tl.constexpr):
    """The recurrence backwards: gradients of the states after each step (T, E), and of that before the first (1, E)."""
    steps = tl.arange(0, T)[:, None]
    gradient = tl.zeros_like(decay)
    for i in tl.static_range(T):
        carry += _row(direct, T - 1 - i, T)
        gradient = tl.where(steps == T - 1 - i, carry, gradient)
        carry = _row(decay, T - 1 - i, T) * carry
    return gradient, carry


@triton.jit
def _place(first, row, length, mask, sequence_of, T: tl.constexpr, REVERSE: tl.constexpr):
    """Of the steps of a tile (T, 1): token, whether it exists, is real, starts or ends a sequence, and which one."""
    step = first + tl.arange(0, T)[:, None]
    inside = step < length
    if REVERSE:
        token = length - 1 - step
    else:
        token = step
    real = inside
    if mask is not None:
        real = inside & (tl.load(mask + row * length + token, mask=inside, other=0) != 0)
    if sequence_of is None:
        sequence = tl.zeros_like(step) + row.to(tl.int32)
        start = step == 0
        end = step == length - 1
    else:
        back = 1 if REVERSE else -1
        sequence = tl.load(sequence_of + token, mask=inside, other=-1)
        start = inside & (sequence != tl.load(sequence_of + token + back, mask=inside & (step > 0), other=-1))
        end = inside & (sequence != tl.load(sequence_of + token - back, mask=step < length - 1, other=-1))
    return token.to(tl.int64), inside, real, sequence.to(tl.int64), start, end


@triton.jit
def _rows(pointer, row_stride, time_stride, row, token, column, mask):
    """Float32 values of a tile, zero where the mask says."""
    return tl.load(pointer + row * row_stride + token * time_stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(v):
    """log(1 + e^v), relative error small however small the result: log(1 + u) through 2 atanh(u / (2 + u))."""
    u = tl.exp(-tl.abs(v))
    s = u / (2.0 + u)
    w = s * s
    q = ((w * 0.140059962 + 0.140009016) * w + 0.200107634) * w + 0.333332077
    return tl.maximum(v, 0.0) + 2.0 * (s * (w * q) + s)


@triton.jit
def _delta(delta, delta_row, delta_time, bias, row, token, e, real, mask, SOFTPLUS: tl.constexpr):
    """Δ before and after softplus, (T, E); zero after it where a token is not real."""
    raw = _rows(delta, delta_row, delta_time, row, token, e, mask)
    if bias is not None:
        raw += tl.load(bias + e, mask=mask, other=0.0)
    if SOFTPLUS:
        return raw, tl.where(real, _softplus(raw), 0.0)
    return raw, tl.where(real, raw, 0.0)


@triton.jit
def _recurrence(step_size, drive, A, B, B_row, B_time, initial, row, token, sequence, start, real, e, some, n, inner, N: tl.constexpr):
    """Of state n: how much of it a step keeps, with zero at starts and without, and what the step adds (T, E)."""
    a = tl.load(A + n * inner + e, mask=some, other=0.0)
    kept = tl.exp2(step_size * a)
    added = drive * _rows(B, B_row, B_time, row, token, n, real)
    if initial is not None:
        at = initial + (sequence * inner + e) * N + n
        added += kept * tl.load(at, mask=start & some, other=0.0)
    return a, kept, tl.where(start, 0.0, kept), added


@triton.jit
def _leave(
    x, x_row, x_time, delta, delta_row, delta_time, B, B_row, B_time, C, C_row, C_time, z, z_row, z_time,
    A, D, bias, mask, sequence_of, initial, length, inner,
    nearest, local, through,
    STRETCH: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a stretch alone makes of a zero state, and how much of an entering state it lets through."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    out = ((row * tl.num_programs(1) + stretch) * N) * inner + e
    begin = stretch * STRETCH
    alive = begin > 0
    first = begin
    if nearest is not None:
        started = tl.load(nearest + stretch)
        alive = started < begin
        first = tl.maximum(begin, started // T * T)
    for n in range(N):
        tl.store(local + out + n * inner, tl.zeros([1, BLOCK], tl.float32), mask=some)
    total = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(first, tl.minimum(begin + STRETCH, length), T):
        token, _, real, sequence, start, _ = _place(tile, row, length, mask, sequence_of, T, REVERSE)
        _, step_size = _delta(delta, delta_row, delta_time, bias, row, token, e, real, real & some, SOFTPLUS)
        drive = step_size * _rows(x, x_row, x_time, row, token, e, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        for n in range(N):
            _, _, kept, added = _recurrence(
                step_size, drive, A, B, B_row, B_time, initial, row, token, sequence, start, real, e, some, n, inner, N
            )  # fmt: skip
            state = tl.load(local + out + n * inner, mask=some, other=0.0)
            _, _, state = _states(kept, added, state, T)
            tl.store(local + out + n * inner, state, mask=some)
    for n in range(N):
        a = tl.load(A + n * inner + e, mask=some, other=0.0)
        tl.store(through + out + n * inner, tl.where(alive, tl.exp2(total * a), 0.0), mask=some)


@triton.jit
def _carry_over(local, through, stretches, width, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """Puts in the place of what leaves each stretch by itself what enters it."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = column < width
    base = tl.program_id(1).to(tl.int64) * stretches * width + column
    carry = tl.zeros([BLOCK], tl.float32)
    for i in range(stretches):
        at = base + (stretches - 1 - i if BACKWARDS else i) * width
        leaving = tl.load(local + at, mask=some, other=0.0)
        factor = tl.load(through + at, mask=some, other=0.0)
        tl.store(local + at, carry, mask=some)
        carry = factor * carry + leaving


@triton.jit
def _read_out(
    x, x_row, x_time, delta, delta_row, delta_time, B, B_row, B_time, C, C_row, C_time, z, z_row, z_time,
    A, D, bias, mask, sequence_of, initial, length, inner,
    entering, states, y, final,
    STRETCH: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Eq. 8 and the gate of Eq. 9 over a stretch; keeps the state before every tile, or only the last one."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    place = row * tl.num_programs(1) + stretch
    begin = stretch * STRETCH
    end_of_stretch = tl.minimum(begin + STRETCH, length)
    if KEEP:
        slot = states + ((row * tl.cdiv(length, T) + begin // T) * N) * inner + e
        forth = N * inner
    else:
        slot = states + place * N * inner + e
        forth = 0
    for n in range(N):
        state = tl.zeros([1, BLOCK], tl.float32)
        if entering is not None:
            state = tl.load(entering + (place * N + n) * inner + e, mask=some, other=0.0)
        tl.store(slot + n * inner, state, mask=some)
    if D is not None:
        skip = tl.load(D + e, mask=some, other=0.0)
    for tile in range(begin, end_of_stretch, T):
        token, inside, real, sequence, start, end = _place(tile, row, length, mask, sequence_of, T, REVERSE)
        some_end = tl.max(tl.max(end.to(tl.int32), axis=0), axis=0)
        _, step_size = _delta(delta, delta_row, delta_time, bias, row, token, e, real, real & some, SOFTPLUS)
        values = _rows(x, x_row, x_time, row, token, e, real & some)
        drive = step_size * values
        out = tl.zeros([T, BLOCK], tl.float32)
        if D is not None:
            out += skip * values
        for n in range(N):
            _, _, kept, added = _recurrence(
                step_size, drive, A, B, B_row, B_time, initial, row, token, sequence, start, real, e, some, n, inner, N
            )  # fmt: skip
            state = tl.load(slot + n * inner, mask=some, other=0.0)
            _, after, state = _states(kept, added, state, T)
            out += after * _rows(C, C_row, C_time, row, token, n, real)
            tl.store(slot + forth + n * inner, state, mask=some & (tile + T < end_of_stretch))
            if some_end > 0:
                tl.store(final + (sequence * inner + e) * N + n, after, mask=end & some)
        if z is not None:
            gate = _rows(z, z_row, z_time, row, token, e, real & some)
            out *= gate * tl.sigmoid(gate)
        at = y + (row * length + token) * inner + e
        tl.store(at, tl.where(real, out, 0.0).to(y.dtype.element_ty), mask=inside & some)
        slot += forth


@triton.jit
def _gated(dy, z, z_row, z_time, row, token, e, length, inner, mask):
    """The gradient before the gate, and that of the gate over the ungated output (T, E)."""
    given = _rows(dy, length * inner, inner, row, token, e, mask)
    if z is None:
        return given, given
    gate = _rows(z, z_row, z_time, row, token, e, mask)
    s = tl.sigmoid(gate)
    return given * gate * s, given * (s + gate * s * (1.0 - s))


@triton.jit
def _direct(ungated, C, C_row, C_time, dfinal, row, token, sequence, real, end, some_end, e, some, n, inner, N: tl.constexpr):
    """The gradient of state n after each step through what is read from it there (T, E)."""
    direct = ungated * _rows(C, C_row, C_time, row, token, n, real)
    if some_end > 0:
        direct += tl.load(dfinal + (sequence * inner + e) * N + n, mask=end & some, other=0.0)
    return direct


@triton.jit
def _leave_backwards(
    x, x_row, x_time, delta, delta_row, delta_time, B, B_row, B_time, C, C_row, C_time, z, z_row, z_time,
    A, D, bias, mask, sequence_of, initial, length, inner,
    dy, dfinal, nearest, local, through,
    STRETCH: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The same as `_leave` for gradients of the state, which enter a stretch at its end."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    out = ((row * tl.num_programs(1) + stretch) * N) * inner + e
    begin = stretch * STRETCH
    stop = tl.minimum(begin + STRETCH, length)
    alive = begin > 0
    if nearest is not None:
        started = tl.load(nearest + stretch)
        alive = started >= stop
        stop = tl.minimum(stop, started)
    for n in range(N):
        tl.store(local + out + n * inner, tl.zeros([1, BLOCK], tl.float32), mask=some)
    total = tl.zeros([1, BLOCK], tl.float32)
    tiles = tl.cdiv(stop - begin, T)
    for i in range(tiles):
        tile = begin + (tiles - 1 - i) * T
        token, _, real, sequence, start, end = _place(tile, row, length, mask, sequence_of, T, REVERSE)
        some_end = tl.max(tl.max(end.to(tl.int32), axis=0), axis=0)
        _, step_size = _delta(delta, delta_row, delta_time, bias, row, token, e, real, real & some, SOFTPLUS)
        ungated, _ = _gated(dy, z, z_row, z_time, row, token, e, length, inner, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        for n in range(N):
            a = tl.load(A + n * inner + e, mask=some, other=0.0)
            kept = tl.where(start, 0.0, tl.exp2(step_size * a))
            direct = _direct(
                ungated, C, C_row, C_time, dfinal, row, token, sequence, real, end, some_end, e, some, n, inner, N
            )
            carry = tl.load(local + out + n * inner, mask=some, other=0.0)
            _, carry = _state_gradients(kept, direct, carry, T)
            tl.store(local + out + n * inner, carry, mask=some)
    for n in range(N):
        a = tl.load(A + n * inner + e, mask=some, other=0.0)
        tl.store(through + out + n * inner, tl.where(alive, tl.exp2(total * a), 0.0), mask=some)


@triton.jit
def _gradients(
    x, x_row, x_time, delta, delta_row, delta_time, B, B_row, B_time, C, C_row, C_time, z, z_row, z_time,
    A, D, bias, mask, sequence_of, initial, length, inner,
    dy, dfinal, entering, states, carries,
    dx, ddelta, dz, dB, dC, dA, dD, dbias, dinitial,
    STRETCH: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Every gradient over a stretch, from its last tile to its first; states are computed again from the kept ones."""
    block = tl.program_id(0)
    e = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some = e < inner
    place = row * tl.num_programs(1) + stretch
    begin = stretch * STRETCH
    carried = place * N * inner + e
    summed = ((block * tl.num_programs(2) + row) * N) * length
    for n in range(N):
        carry = tl.zeros([1, BLOCK], tl.float32)
        if entering is not None:
            carry = tl.load(entering + carried + n * inner, mask=some, other=0.0)
        tl.store(carries + carried + n * inner, carry, mask=some)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=some, other=0.0)
    skip_gradient = tl.zeros([1, BLOCK], tl.float32)
    bias_gradient = tl.zeros([1, BLOCK], tl.float32)
    tiles = tl.cdiv(tl.minimum(begin + STRETCH, length) - begin, T)
    for i in range(tiles):
        tile = begin + (tiles - 1 - i) * T
        slot = states + ((row * tl.cdiv(length, T) + tile // T) * N) * inner + e
        token, inside, real, sequence, start, end = _place(tile, row, length, mask, sequence_of, T, REVERSE)
        some_end = tl.max(tl.max(end.to(tl.int32), axis=0), axis=0)
        raw, step_size = _delta(delta, delta_row, delta_time, bias, row, token, e, real, real & some, SOFTPLUS)
        values = _rows(x, x_row, x_time, row, token, e, real & some)
        drive = step_size * values
        ungated, gate_slope = _gated(dy, z, z_row, z_time, row, token, e, length, inner, real & some)
        out = skip * values
        drive_gradient = tl.zeros([T, BLOCK], tl.float32)
        exponent_gradient = tl.zeros([T, BLOCK], tl.float32)
        for n in range(N):
            a, true_kept, kept, added = _recurrence(
                step_size, drive, A, B, B_row, B_time, initial, row, token, sequence, start, real, e, some, n, inner, N
            )  # fmt: skip
            before, after, _ = _states(kept, added, tl.load(slot + n * inner, mask=some, other=0.0), T)
            before = tl.where(start, 0.0, before)
            if initial is not None:
                at = (sequence * inner + e) * N + n
                before += tl.load(initial + at, mask=start & some, other=0.0)
            out += after * _rows(C, C_row, C_time, row, token, n, real)
            direct = _direct(
                ungated, C, C_row, C_time, dfinal, row, token, sequence, real, end, some_end, e, some, n, inner, N
            )
            carry = tl.load(carries + carried + n * inner, mask=some, other=0.0)
            gradient, carry = _state_gradients(kept, direct, carry, T)
            tl.store(carries + carried + n * inner, carry, mask=some)
            if initial is not None:
                tl.store(dinitial + at, true_kept * gradient, mask=start & some)
            drive_gradient += gradient * _rows(B, B_row, B_time, row, token, n, real)
            exponent = gradient * true_kept * before
            exponent_gradient += exponent * a
            summed_A = dA + carried + n * inner
            total = tl.sum(exponent * step_size, axis=0, keep_dims=True)
            tl.store(summed_A, tl.load(summed_A, mask=some, other=0.0) + total, mask=some)
            times = summed + n * length + token
            tl.store(dB + times, tl.sum(gradient * drive, axis=1, keep_dims=True), mask=inside)
            tl.store(dC + times, tl.sum(ungated * after, axis=1, keep_dims=True), mask=inside)
        step_gradient = exponent_gradient * LN_2 + drive_gradient * values
        if SOFTPLUS:
            step_gradient *= tl.sigmoid(raw)
        step_gradient = tl.where(real, step_gradient, 0.0)
        skip_gradient += tl.sum(ungated * values, axis=0, keep_dims=True)
        bias_gradient += tl.sum(step_gradient, axis=0, keep_dims=True)
        at = (row * length + token) * inner + e
        here = inside & some
        tl.store(dx + at, (drive_gradient * step_size + ungated * skip).to(dx.dtype.element_ty), mask=here)
        tl.store(ddelta + at, step_gradient.to(ddelta.dtype.element_ty), mask=here)
        if z is not None:
            tl.store(dz + at, (gate_slope * out).to(dz.dtype.element_ty), mask=here)
    tl.store(dD + place * inner + e, skip_gradient, mask=some)
    tl.store(dbias + place * inner + e, bias_gradient, mask=some)
