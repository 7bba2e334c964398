"""The selective scan on a GPU in Triton; docs/kernels.md says why it is built like this.

A program owns a block of channels of a stretch of one row and walks it step by step. A thread holds all N states of its
channel in registers, so that neither the recurrence nor the readout crosses threads, and the states of a step do not
wait for each other. Where rows are too few to fill the device, each is cut into stretches: one kernel finds what a
stretch makes of a zero state and how much of an entering one it lets through, a second one carries states from stretch
to stretch, the third one does the work. Nothing of size B·L·E·N is ever stored.

Time runs in scan order: step p is token p, or token L-1-p when the scan is reversed. A row of packed sequences starts
anew where a token's sequence is not that of the step before.

Shapes: B batch, L length, S sequences, E inner, N state (in kernels, up to the next power of two), K stretches of a
row, T steps of a tile, which are loaded at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mabert.ops.gpu import INTERPRETED, check_input, on_device_of_first, rows, sequence_of
from mabert.ops.native import like
from mabert.ops.selective_scan.kept import TRITON_KEPT_EVERY as KEPT
from mabert.ops.triton_math import LOG2_E, channels, sigmoid

LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        channels: of a warp, one a thread.
        steps: of a tile of the forward.
        steps_back: of a tile of the backward, which holds the states of all its steps in registers.
        kept_every: steps between two states that the forward keeps; the others divide it.
        programs: rows are cut into stretches while there are fewer.
        shortest: steps of a stretch at least.
        registers: of a thread at most; with fewer, more threads run at once, and some values go to memory.
        registers_back: the same in the backward.
        ahead: steps by which memory is asked for before it is needed, a multiple of a tile's; 0 to wait for it.
            `_gradients` asks for the next steps between kept states, however many are said here.
    """

    channels: int
    steps: int
    steps_back: int
    kept_every: int
    programs: int
    shortest: int
    registers: int
    registers_back: int
    ahead: int

    def block(self, state: int) -> int:
        """Channels of a program: sums over them go to N threads."""
        return max(self.channels, triton.next_power_of_2(state))

    def stretch(self, batch: int, length: int, blocks: int) -> int:
        """Steps of a stretch, a multiple of those between kept states; all of a row where there are programs enough."""
        per_row = max(1, self.programs // max(1, batch * blocks))
        return triton.cdiv(max(self.shortest, triton.cdiv(length, per_row)), self.kept_every) * self.kept_every


# In the interpreter: more than one of everything.
CUT = (
    Cut(8, steps=2, steps_back=2, kept_every=KEPT, programs=2**20, shortest=16, registers=0, registers_back=0, ahead=0)
    if INTERPRETED
    else Cut(
        32,
        steps=4,
        steps_back=2,
        kept_every=KEPT,
        programs=2048,
        shortest=256,
        registers=128,
        registers_back=168,
        ahead=16,
    )
)


@on_device_of_first
def forward(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fallback.forward`; the kept states lie as (rows, N, E), the final ones as (S, N, E) and are transposed."""
    scan = _Scan(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse)
    y = like(x)
    if scan.initial is None:
        new = x.new_zeros if cu_seqlens is not None or not x.numel() else x.new_empty  # every row's last step writes it
        final = new(scan.sequences, scan.state, scan.inner, dtype=torch.float32)
    else:
        final = scan.initial.clone()  # a sequence without tokens ends where it begins
    kept = x.new_empty(kept_rows, *A.shape, dtype=torch.float32)
    if x.numel():
        entering = scan.carried(_leave, (), scan.initial, backwards=False)
        scan.launch(
            _read_out,
            (entering, kept if kept_rows else None, y, final),
            T=CUT.steps,
            KEPT_EVERY=CUT.kept_every,
            AHEAD=CUT.ahead,
            maxnreg=CUT.registers,
        )
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
    dB_part, dC_part = (scan.new_empty(scan.blocks, *scan.B.shape) for _ in range(2))
    dA_part = scan.per_stretch()
    dD_part, dbias_part = (scan.new_empty(scan.batch, scan.stretches, scan.inner) for _ in range(2))
    if x.numel():
        entering = scan.carried(_leave_backwards, (dy, dfinal), dfinal, backwards=True)
        outputs = (dx, ddelta, dz, dB_part, dC_part, dA_part, dD_part, dbias_part, dinitial)
        between = scan.new_empty(CUT.kept_every // CUT.steps_back, *dA_part.shape)
        scan.launch(
            _gradients,
            (dy, dfinal, entering, kept, between, *outputs),
            T=CUT.steps_back,
            KEPT_EVERY=CUT.kept_every,
            AHEAD=CUT.ahead,
            maxnreg=CUT.registers_back,
        )
    return [
        dx,
        ddelta,
        dA_part.sum((0, 1)).T.contiguous() if x.numel() else torch.zeros_like(A),
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
        padded_state, block = triton.next_power_of_2(self.state), CUT.block(self.state)
        self.blocks = triton.cdiv(self.inner, block)
        self.stretch = CUT.stretch(self.batch, self.length, self.blocks)
        self.stretches = triton.cdiv(self.length, self.stretch)
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        steps = triton.cdiv(self.length, CUT.kept_every) * CUT.kept_every
        self.B, self.C = self.new_empty(2, self.batch, steps, padded_state)
        if x.numel():
            _in_scan_order[(steps // CUT.kept_every, self.batch)](
                *rows("B", B, x), *rows("C", C, x), mask, self.B, self.C, self.length, steps,
                N=self.state, PADDED_N=padded_state, T=CUT.kept_every, REVERSE=reverse, num_warps=1,
            )  # fmt: skip
        self.inputs = (
            *rows("x", x, x),
            *rows("delta", delta, x),
            *((None, 0, 0) if z is None else rows("z", z, x)),
            torch.mul(A.T, LOG2_E.value, out=self.new_empty(self.state, self.inner)),
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
            steps,
        )
        self.constants = {
            "N": self.state,
            "PADDED_N": padded_state,
            "BLOCK": block,
            "SOFTPLUS": softplus,
            "REVERSE": reverse,
            "num_warps": max(1, block // 32),
        }

    def new_empty(self, *shape: int) -> Tensor:
        """Uninitialised floats."""
        return torch.empty(*shape, device=self.device)

    def per_stretch(self) -> Tensor:
        """Uninitialised (B, K, N, E) floats."""
        return self.new_empty(self.batch, self.stretches, self.state, self.inner)

    def per_token(self, in_scan_order: Tensor, like: Tensor) -> Tensor:
        """The way of `_in_scan_order` back: to (B, L, N)."""
        tokens = in_scan_order[:, : self.length, : self.state]
        return (tokens.flip(1) if self.reverse else tokens).to(like.dtype).contiguous()

    def launch(self, kernel, arguments: tuple, **constants: object) -> None:
        """Run a kernel for every block of channels of every stretch."""
        grid = (self.blocks, self.stretches, self.batch)
        kernel[grid](*self.inputs, *arguments, **self.constants, **constants)

    def carried(self, kernel, arguments: tuple, outside: Tensor | None, *, backwards: bool) -> Tensor | None:
        """What enters every stretch: (B, K, N, E), None when there is one only. `outside` enters a row."""
        if self.stretches == 1:
            return None
        local, through = self.per_stretch(), self.per_stretch()
        packed = self.cu_seqlens is not None
        nearest = self._nearest_starts(backwards) if packed else None
        self.launch(kernel, (*arguments, nearest, local, through), T=CUT.steps, AHEAD=CUT.ahead, maxnreg=CUT.registers)
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
def _states_of(e, inner, N: tl.constexpr, PADDED_N: tl.constexpr):
    """Which channels there are (1, E), where their states lie in an (N, E) tensor, and which there are (N, E)."""
    n = tl.arange(0, PADDED_N)[:, None]
    some = e < inner
    return some, n * inner + e, some & (n < N)


@triton.jit
def _states_of_step(states, t: tl.constexpr, T: tl.constexpr):
    """(N, E) of (T, N, E); no instruction either."""
    bits = tl.where(tl.arange(0, T)[:, None, None] == t, states.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _unless_start(states, goes_on, t: tl.constexpr, T: tl.constexpr):
    """The states, or zero where a sequence starts at step t: a product would let another sequence's NaN through."""
    if goes_on is not None:
        states = (states.to(tl.int32, bitcast=True) & _bits_of_row(goes_on, t, T)).to(tl.float32, bitcast=True)
    return states


@triton.jit
def _found(
    states, goes_on, some_start, initial, place, real_state, sequence_of, tile, length, inner,
    t: tl.constexpr, T: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states that step t finds: those left behind, and where a sequence starts the ones it was given."""
    states = _unless_start(states, goes_on, t, T)
    if sequence_of is not None:
        if initial is not None:
            if some_start:
                sequence, starts = _parted(tile + t, tile + t - 1, length, sequence_of, REVERSE)
                at = initial + sequence * N * inner + place
                states += tl.load(at, mask=real_state & starts, other=0.0)
    return states


@triton.jit
def _after_step(
    states, step_size, drive, a, B_tile, goes_on, some_start, initial, place, real_state, sequence_of, tile, length,
    inner, t: tl.constexpr, T: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states after step t of a tile (N, E), from those after the one before: Eq. 7."""
    states = _found(
        states, goes_on, some_start, initial, place, real_state, sequence_of, tile, length, inner, t, T, N, REVERSE
    )
    return _decay(step_size, a, t, T) * states + _row(drive, t, T) * _of_step(B_tile, t, PADDED_N)


@triton.jit
def _advanced(
    states, step_size, drive, a, B_tile, goes_on, some_start, initial, place, real_state, sequence_of, tile, length,
    inner, T: tl.constexpr, N: tl.constexpr, PADDED_N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states after all steps of a tile (N, E)."""
    for t in tl.static_range(T):
        states = _after_step(
            states, step_size, drive, a, B_tile, goes_on, some_start, initial, place, real_state, sequence_of, tile,
            length, inner, t, T, N, PADDED_N, REVERSE,
        )  # fmt: skip
    return states


@triton.jit
def _decay(step_size, a, t: tl.constexpr, T: tl.constexpr):
    """exp(Δ A) at step t (N, E), from A log₂e."""
    return tl.exp2(_row(step_size, t, T) * a)


@triton.jit
def _fold(tile, bit: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """(N, E) to (N/2, E): channels with the given bit take the rows of the second half, the others those of the first;
    each adds what its neighbour across that bit has of the same rows.
    """
    first, second = tl.split(tl.permute(tl.reshape(tile, [2, N // 2, BLOCK]), [1, 2, 0]))
    channel = tl.arange(0, BLOCK)[None, :] + tl.zeros([N // 2, BLOCK], tl.int32)
    upper = (channel & bit) != 0
    return tl.where(upper, second, first) + tl.gather(tl.where(upper, first, second), channel ^ bit, 1)


@triton.jit
def _sum_over_channels(tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the rows of an (N, E) tile, one in each of the first N channels (1, E), as `_row_in_channel` says.

    Half of the rows go to a neighbour at every step: N exchanges between threads instead of five a row.
    """
    for i in tl.static_range(10):
        if (N >> i) > 1:
            tile = _fold(tile, 1 << i, N >> i, BLOCK)
    for i in tl.static_range(10):
        if (N << i) < BLOCK:
            channel = tl.arange(0, BLOCK)[None, :]
            tile += tl.gather(tile, channel ^ (N << i), 1)
    return tile


@triton.jit
def _row_in_channel(N: tl.constexpr, BLOCK: tl.constexpr):
    """Which row's sum a channel holds (1, E): the low bits of its number, the lowest one counting most."""
    channel = tl.arange(0, BLOCK)[None, :]
    row = tl.zeros_like(channel)
    for i in tl.static_range(10):
        if (N >> i) > 1:
            row += ((channel >> i) & 1) * (N >> (i + 1))
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
def _sequence_at(step, length, sequence_of, REVERSE: tl.constexpr):
    """The sequence of one step or of several; -1 before the row and after it."""
    token = length - 1 - step if REVERSE else step
    return tl.load(sequence_of + token, mask=(step >= 0) & (step < length), other=-1)


@triton.jit
def _parted(step, beside, length, sequence_of, REVERSE: tl.constexpr):
    """The sequence of a step, and whether the step beside it belongs to another one or to none."""
    here = _sequence_at(step, length, sequence_of, REVERSE)
    return here.to(tl.int64), (here >= 0) & (here != _sequence_at(beside, length, sequence_of, REVERSE))


@triton.jit
def _any(flags):
    return tl.max(tl.max(flags.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def _borders(tile, length, sequence_of, T: tl.constexpr, REVERSE: tl.constexpr):
    """All bits where a step goes on with a sequence, none where one starts (T, 1); whether some start, some end."""
    step = tile + tl.arange(0, T)[:, None]
    here, start = _parted(step, step - 1, length, sequence_of, REVERSE)
    here, end = _parted(step, step + 1, length, sequence_of, REVERSE)
    return tl.where(start, 0, -1), _any(start), _any(end)


@triton.jit
def _tile(pointer, row_stride, time_stride, row, first, away, e, mask):
    """A tile of a (B, L, E) tensor in float32, zero where the mask says."""
    base = pointer + row * row_stride + first * time_stride
    return tl.load(base + away * time_stride + e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _ask_for(pointer, row_stride, time_stride, row, tile, length, e, some, T: tl.constexpr, REVERSE: tl.constexpr):
    """Let the cache fetch a tile of a (B, L, E) tensor, as far as there is one, and do not wait for it."""
    first, away, inside, real = _steps(tile, row, length, None, T, REVERSE)
    there = inside & some & (tile >= 0)
    at = tl.where(there, pointer + row * row_stride + first * time_stride + away * time_stride + e, pointer)
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


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
def _of_step(tile, t, PADDED_N: tl.constexpr):
    """B or C at a step of a tile (N, 1), from where the tile begins in what `_in_scan_order` wrote."""
    return tl.load(tile + t * PADDED_N + tl.arange(0, PADDED_N)[:, None])


@triton.jit(do_not_specialize=["length", "padded_length"])
def _in_scan_order(
    B, B_row, B_time, C, C_row, C_time, mask, B_out, C_out, length, padded_length,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """B and C in float32 and scan order, zero at pads and beyond the end, N filled up with zeros to a power of two."""
    tile = tl.program_id(0) * T
    row = tl.program_id(1).to(tl.int64)
    first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
    n = tl.arange(0, PADDED_N)[None, :]
    to = (row * padded_length + tile + tl.arange(0, T)[:, None]) * PADDED_N + n
    tl.store(B_out + to, _tile(B, B_row, B_time, row, first, away, n, real & (n < N)))
    tl.store(C_out + to, _tile(C, C_row, C_time, row, first, away, n, real & (n < N)))


@triton.jit
def _store_let_through(through, total, alive, a, mask):
    """How much of each state passes steps that sum up to `total`; nothing where a sequence starts among them."""
    tl.store(through, tl.where(alive, tl.exp2(total * a), 0.0), mask=mask)


@triton.jit(do_not_specialize=["length", "steps", "padded_length"])
def _leave(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps, padded_length,
    nearest, local, through,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What a stretch makes of a zero state, and how much of an entering state it lets through."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some, place, real_state = _states_of(e, inner, N, PADDED_N)
    a = tl.load(A + place, mask=real_state, other=0.0)
    begin = stretch * steps
    from_tile = begin
    alive = True
    if sequence_of is not None:
        started = tl.load(nearest + stretch)
        alive = started < begin
        from_tile = tl.maximum(begin, started // T * T)
    total = tl.zeros([1, BLOCK], tl.float32)
    states = tl.zeros([PADDED_N, BLOCK], tl.float32)
    for tile in range(from_tile, tl.minimum(begin + steps, length), T):
        if AHEAD:
            _ask_for(x, x_row, x_time, row, tile + AHEAD, length, e, some, T, REVERSE)
            _ask_for(delta, delta_row, delta_time, row, tile + AHEAD, length, e, some, T, REVERSE)
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        drive = step_size * _tile(x, x_row, x_time, row, first, away, e, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        goes_on = None
        some_start = False
        if sequence_of is not None:
            goes_on, some_start, some_end = _borders(tile, length, sequence_of, T, REVERSE)
        states = _advanced(
            states, step_size, drive, a, B + (row * padded_length + tile) * PADDED_N, goes_on, some_start,
            initial, place, real_state, sequence_of, tile, length, inner, T, N, PADDED_N, REVERSE,
        )  # fmt: skip
    out = (row * tl.num_programs(1) + stretch) * N * inner + place
    tl.store(local + out, states, mask=real_state)
    _store_let_through(through + out, total, alive, a, real_state)


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


@triton.jit(do_not_specialize=["length", "steps", "padded_length"])
def _read_out(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps, padded_length,
    entering, kept, y, final,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, KEPT_EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Eq. 8 and the gate of Eq. 9 over a stretch; keeps a state every few steps where there is room for them."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some, place, real_state = _states_of(e, inner, N, PADDED_N)
    a = tl.load(A + place, mask=real_state, other=0.0)
    begin = stretch * steps
    stop = tl.minimum(begin + steps, length)
    states = tl.zeros([PADDED_N, BLOCK], tl.float32)
    if entering is not None:
        entered = entering + (row * tl.num_programs(1) + stretch) * N * inner
        states = tl.load(entered + place, mask=real_state, other=0.0)
    elif initial is not None:
        if sequence_of is None:
            states = tl.load(initial + row * N * inner + place, mask=real_state, other=0.0)
    for tile in range(begin, stop, T):
        if AHEAD:
            _ask_for(x, x_row, x_time, row, tile + AHEAD, length, e, some, T, REVERSE)
            _ask_for(delta, delta_row, delta_time, row, tile + AHEAD, length, e, some, T, REVERSE)
            if z is not None:
                _ask_for(z, z_row, z_time, row, tile + AHEAD, length, e, some, T, REVERSE)
        if kept is not None:
            if tile % KEPT_EVERY == 0:
                slot = kept + (row * (padded_length // KEPT_EVERY) + tile // KEPT_EVERY) * N * inner
                tl.store(slot + place, states, mask=real_state)
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        values = _tile(x, x_row, x_time, row, first, away, e, real & some)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        drive = step_size * values
        B_tile = B + (row * padded_length + tile) * PADDED_N
        C_tile = C + (row * padded_length + tile) * PADDED_N
        goes_on = None
        some_start = False
        if sequence_of is not None:
            goes_on, some_start, some_end = _borders(tile, length, sequence_of, T, REVERSE)
        out = tl.zeros([T, BLOCK], tl.float32)
        if D is not None:
            out = tl.load(D + e, mask=some, other=0.0) * values
        for t in tl.static_range(T):
            states = _after_step(
                states, step_size, drive, a, B_tile, goes_on, some_start, initial, place, real_state, sequence_of,
                tile, length, inner, t, T, N, PADDED_N, REVERSE,
            )  # fmt: skip
            read = tl.sum(states * _of_step(C_tile, t, PADDED_N), axis=0, keep_dims=True)
            out = tl.where(tl.arange(0, T)[:, None] == t, out + read, out)
            if sequence_of is not None:
                if some_end:
                    sequence, ends = _parted(tile + t, tile + t + 1, length, sequence_of, REVERSE)
                    tl.store(final + sequence * N * inner + place, states, mask=real_state & ends)
        if z is not None:
            gate = _tile(z, z_row, z_time, row, first, away, e, real & some)
            out *= gate * sigmoid(gate)
        at = y + (row * length + first) * inner + away * inner + e
        tl.store(at, tl.where(real, out, 0.0).to(y.dtype.element_ty), mask=inside & some)
    if sequence_of is None:
        if stop == length:
            tl.store(final + row * N * inner + place, states, mask=real_state)


@triton.jit
def _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, mask):
    """The gradient before the gate (T, E)."""
    gradient = _tile(dy + row * length * inner, 0, inner, row, first, away, e, mask)
    if z is not None:
        gate = _tile(z, z_row, z_time, row, first, away, e, mask)
        gradient *= gate * sigmoid(gate)
    return gradient


@triton.jit
def _gradient_after(
    carry, ungated, C_step, dfinal, some_end, place, real_state, sequence_of, tile, length, inner,
    t: tl.constexpr, T: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of the states after step t (N, E): through later steps, through what is read, through the result."""
    carry += _row(ungated, t, T) * C_step
    if sequence_of is not None:
        if dfinal is not None:
            if some_end:
                sequence, ends = _parted(tile + t, tile + t + 1, length, sequence_of, REVERSE)
                at = dfinal + sequence * N * inner + place
                carry += tl.load(at, mask=real_state & ends, other=0.0)
    return carry


@triton.jit(do_not_specialize=["length", "steps", "padded_length"])
def _leave_backwards(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps, padded_length,
    dy, dfinal, nearest, local, through,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The same as `_leave` for gradients of the state, which enter a stretch at its end."""
    e = channels(tl.program_id(0), BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some, place, real_state = _states_of(e, inner, N, PADDED_N)
    a = tl.load(A + place, mask=real_state, other=0.0)
    begin = stretch * steps
    stop = tl.minimum(begin + steps, length)
    alive = True
    if sequence_of is not None:
        started = tl.load(nearest + stretch)
        alive = started >= stop
        stop = tl.minimum(stop, started)
    total = tl.zeros([1, BLOCK], tl.float32)
    carry = tl.zeros([PADDED_N, BLOCK], tl.float32)
    tiles = tl.cdiv(stop - begin, T)
    for i in range(tiles):
        tile = begin + (tiles - 1 - i) * T
        if AHEAD:
            _ask_for(delta, delta_row, delta_time, row, tile - AHEAD, length, e, some, T, REVERSE)
            _ask_for(dy, length * inner, inner, row, tile - AHEAD, length, e, some, T, REVERSE)
            if z is not None:
                _ask_for(z, z_row, z_time, row, tile - AHEAD, length, e, some, T, REVERSE)
        first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
        step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
        ungated = _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, real & some)
        total += tl.sum(step_size, axis=0, keep_dims=True)
        C_tile = C + (row * padded_length + tile) * PADDED_N
        some_end = False
        goes_on = None
        if sequence_of is not None:
            goes_on, some_start, some_end = _borders(tile, length, sequence_of, T, REVERSE)
        for t in tl.static_range(T - 1, -1, -1):
            carry = _gradient_after(
                carry, ungated, _of_step(C_tile, t, PADDED_N), dfinal, some_end, place, real_state, sequence_of, tile,
                length, inner, t, T, N, REVERSE,
            )  # fmt: skip
            carry = _unless_start(_decay(step_size, a, t, T) * carry, goes_on, t, T)
    out = (row * tl.num_programs(1) + stretch) * N * inner + place
    tl.store(local + out, carry, mask=real_state)
    _store_let_through(through + out, total, alive, a, real_state)


@triton.jit(do_not_specialize=["length", "steps", "padded_length"])
def _gradients(
    x, x_row, x_time, delta, delta_row, delta_time, z, z_row, z_time,
    A, B, C, D, bias, mask, sequence_of, initial, length, inner, steps, padded_length,
    dy, dfinal, entering, kept, between,
    dx, ddelta, dz, dB, dC, dA, dD, dbias, dinitial,
    N: tl.constexpr, PADDED_N: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, KEPT_EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Every gradient over a stretch, from its last step to its first.

    From a kept state those before the next few tiles are computed again and put into `between`; from these, each tile
    computes its own, which stay in registers. What the end of a tile needs again is loaded again.
    """
    block = tl.program_id(0)
    e = channels(block, BLOCK)
    stretch, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    some, place, real_state = _states_of(e, inner, N, PADDED_N)
    a = tl.load(A + place, mask=real_state, other=0.0)
    begin = stretch * steps
    program = row * tl.num_programs(1) + stretch
    programs = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    summed = (block * tl.num_programs(2) + row) * padded_length
    carry = tl.zeros([PADDED_N, BLOCK], tl.float32)
    if entering is not None:
        carry = tl.load(entering + program * N * inner + place, mask=real_state, other=0.0)
    elif dfinal is not None:
        if sequence_of is None:
            carry = tl.load(dfinal + row * N * inner + place, mask=real_state, other=0.0)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=some, other=0.0)
    skip_gradient = tl.zeros([1, BLOCK], tl.float32)
    bias_gradient = tl.zeros([1, BLOCK], tl.float32)
    a_sum = dA + program * N * inner + place
    tl.store(a_sum, tl.zeros([PADDED_N, BLOCK], tl.float32), mask=real_state)
    step, sums = tl.arange(0, T)[:, None], _row_in_channel(PADDED_N, BLOCK)
    once = tl.arange(0, BLOCK)[None, :] < PADDED_N
    pieces = tl.cdiv(tl.minimum(begin + steps, length) - begin, KEPT_EVERY)
    for i in range(pieces):
        piece = begin + (pieces - 1 - i) * KEPT_EVERY
        slot = kept + (row * (padded_length // KEPT_EVERY) + piece // KEPT_EVERY) * N * inner
        states = tl.load(slot + place, mask=real_state, other=0.0)
        tl.store(between + program * N * inner + place, states, mask=real_state)
        a_gradient = tl.zeros([PADDED_N, BLOCK], tl.float32)  # few at a time: a long sum loses digits
        for k in range(1, KEPT_EVERY // T):
            tile = piece + (k - 1) * T
            if AHEAD:
                _ask_for(dy, length * inner, inner, row, tile, length, e, some, T, REVERSE)
                if z is not None:
                    _ask_for(z, z_row, z_time, row, tile, length, e, some, T, REVERSE)
            first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
            step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, real & some, SOFTPLUS)
            drive = step_size * _tile(x, x_row, x_time, row, first, away, e, real & some)
            goes_on = None
            some_start = False
            if sequence_of is not None:
                goes_on, some_start, some_end = _borders(tile, length, sequence_of, T, REVERSE)
            states = _advanced(
                states, step_size, drive, a, B + (row * padded_length + tile) * PADDED_N, goes_on, some_start,
                initial, place, real_state, sequence_of, tile, length, inner, T, N, PADDED_N, REVERSE,
            )  # fmt: skip
            tl.store(between + (k * programs + program) * N * inner + place, states, mask=real_state)
        for j in range(KEPT_EVERY // T):
            k = KEPT_EVERY // T - 1 - j
            tile = piece + k * T
            if AHEAD:
                _ask_for(x, x_row, x_time, row, tile - KEPT_EVERY, length, e, some, T, REVERSE)
                _ask_for(delta, delta_row, delta_time, row, tile - KEPT_EVERY, length, e, some, T, REVERSE)
            first, away, inside, real = _steps(tile, row, length, mask, T, REVERSE)
            here = real & some
            step_size = _step_size(delta, delta_row, delta_time, bias, row, first, away, e, here, SOFTPLUS)
            drive = step_size * _tile(x, x_row, x_time, row, first, away, e, here)
            ungated = _ungated_gradient(dy, z, z_row, z_time, row, first, away, e, length, inner, here)
            B_tile = B + (row * padded_length + tile) * PADDED_N
            C_tile = C + (row * padded_length + tile) * PADDED_N
            goes_on = None
            some_start = False
            some_end = False
            if sequence_of is not None:
                goes_on, some_start, some_end = _borders(tile, length, sequence_of, T, REVERSE)
            entered = tl.load(between + (k * programs + program) * N * inner + place, mask=real_state, other=0.0)
            states = entered
            after = tl.zeros([T, PADDED_N, BLOCK], tl.float32)
            for t in tl.static_range(T):
                states = _after_step(
                    states, step_size, drive, a, B_tile, goes_on, some_start, initial, place, real_state, sequence_of,
                    tile, length, inner, t, T, N, PADDED_N, REVERSE,
                )  # fmt: skip
                after = tl.where(tl.arange(0, T)[:, None, None] == t, states[None, :, :], after)
            out = tl.zeros([T, BLOCK], tl.float32)
            drive_gradient = tl.zeros([T, BLOCK], tl.float32)
            exponent_gradient = tl.zeros([T, BLOCK], tl.float32)
            for t in tl.static_range(T - 1, -1, -1):
                B_step, C_step = _of_step(B_tile, t, PADDED_N), _of_step(C_tile, t, PADDED_N)
                left = _states_of_step(after, t, T)
                to = (summed + tile + t) * PADDED_N + sums
                read = _row(ungated, t, T) * left
                tl.store(dC + to, _sum_over_channels(read, PADDED_N, BLOCK), mask=once)
                out = tl.where(step == t, tl.sum(left * C_step, axis=0, keep_dims=True), out)
                carry = _gradient_after(
                    carry, ungated, C_step, dfinal, some_end, place, real_state, sequence_of, tile, length, inner,
                    t, T, N, REVERSE,
                )  # fmt: skip
                driven = carry * _row(drive, t, T)
                tl.store(dB + to, _sum_over_channels(driven, PADDED_N, BLOCK), mask=once)
                through_drive = tl.sum(carry * B_step, axis=0, keep_dims=True)
                drive_gradient = tl.where(step == t, through_drive, drive_gradient)
                carry = _decay(step_size, a, t, T) * carry
                before = entered
                if t > 0:
                    before = _states_of_step(after, t - 1, T)
                before = _found(
                    before, goes_on, some_start, initial, place, real_state, sequence_of, tile, length, inner,
                    t, T, N, REVERSE,
                )  # fmt: skip
                exponent = carry * before
                through_exponent = tl.sum(exponent * a, axis=0, keep_dims=True)
                exponent_gradient = tl.where(step == t, through_exponent, exponent_gradient)
                a_gradient += exponent * _row(step_size, t, T)
                if sequence_of is not None:
                    if initial is not None:
                        if some_start:
                            sequence, starts = _parted(tile + t, tile + t - 1, length, sequence_of, REVERSE)
                            given_here = dinitial + sequence * N * inner
                            tl.store(given_here + place, carry, mask=real_state & starts)
                carry = _unless_start(carry, goes_on, t, T)
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
        tl.store(a_sum, tl.load(a_sum, mask=real_state, other=0.0) + a_gradient, mask=real_state)
    if initial is not None:
        if sequence_of is None:
            if begin == 0:
                tl.store(dinitial + row * N * inner + place, carry, mask=real_state)
    tl.store(dD + program * inner + e, skip_gradient, mask=some)
    tl.store(dbias + program * inner + e, bias_gradient, mask=some)
