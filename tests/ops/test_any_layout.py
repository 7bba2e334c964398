"""Both operations on whatever layout, shape and options hypothesis finds, against the float64 reference.

Pads and uninitialised memory hold NaN, so that whatever is read without having been written, or is not to be read at
all, shows.
"""

import contextlib
import ctypes
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mabert.ops import depthwise_conv, selective_scan
from mabert.ops.native import kernels

NATIVE = pytest.param("native", marks=pytest.mark.skipif(kernels is None, reason="the CPU kernels were not compiled"))


M_PERTURB = -6  # of glibc's mallopt: fill what is allocated


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_poisoned():
    """torch's with NaN, the kernels' own scratch, where glibc hands it out, with 3.4e38."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    torch.use_deterministic_algorithms(True)
    if mallopt:
        mallopt(M_PERTURB, 0x80)
    yield
    torch.use_deterministic_algorithms(False)
    if mallopt:
        mallopt(M_PERTURB, 0)


@st.composite
def layouts(draw):
    """(batch, length, mask or None, boundaries or None): masks with holes, empty and one-token sequences included."""
    packed = draw(st.booleans())
    if packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 70]), min_size=1, max_size=5))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        batch, length = 1, sum(lengths)
    else:
        cu_seqlens = None
        batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 7, 32, 33, 75]))
    mask = None
    if draw(st.booleans()):
        density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
        seed = draw(st.integers(0, 2**16))
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < density
    return batch, length, mask, cu_seqlens


def sequences_of(batch, length, mask, cu_seqlens):
    """Row and real positions of each sequence."""
    if cu_seqlens is None:
        spans = [(row, range(length)) for row in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        spans = [(0, range(a, b)) for a, b in itertools.pairwise(ends)]
    return [
        (row, torch.tensor([t for t in span if mask is None or mask[row, t]], dtype=torch.long)) for row, span in spans
    ]


# Of the largest value; a result in bfloat16 is rounded by 2e-3 of itself.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def instruction_set(backend, number):
    """One of the processor's, for the compiled kernels."""
    if backend != "native":
        yield
        return
    best, isas = kernels.isa(), kernels.isas()
    kernels.use_isa(isas[number % len(isas)])
    try:
        yield
    finally:
        kernels.use_isa(best)


def rounded(t, dtype):
    """In float64, with values that `dtype` has."""
    return t.to(dtype).double()


def assert_close(actual, expected, name, dtype):
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach(),
        rtol=0,
        atol=TOLERANCE[dtype] * scale + 1e-6,
        msg=lambda message: f"{name}: {message}",
    )


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
@settings(deadline=None, max_examples=60)
@given(
    layout=layouts(),
    inner=st.sampled_from([1, 5, 16, 17, 40, 130, 144]),
    state=st.sampled_from([1, 3, 8, 16, 17]),
    reverse=st.booleans(),
    softplus=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    isa=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_scan_is_that_of_each_sequence_alone(
    backend, layout, inner, state, reverse, softplus, absent, strided, dtype, isa, seed
):
    batch, length, mask, cu_seqlens = layout
    sequences = sequences_of(*layout)
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    exact = {
        "x": randn(batch, length, inner),
        "delta": randn(batch, length, inner) if softplus else randn(batch, length, inner).abs(),
        "A": -randn(inner, state).abs(),
        "B": randn(batch, length, state),
        "C": randn(batch, length, state),
        "D": randn(inner),
        "z": randn(batch, length, inner),
        "delta_bias": randn(inner) if softplus else randn(inner).abs(),
        "initial_state": randn(len(sequences), inner, state),
    }
    per_token = ("x", "delta", "B", "C", "z")
    weight_y, weight_state = rounded(randn(batch, length, inner), dtype), randn(len(sequences), inner, state)
    exact = {name: rounded(t, dtype) if name in per_token else t for name, t in exact.items()}
    exact = {name: None if name in absent else t.requires_grad_() for name, t in exact.items()}
    present = [name for name, t in exact.items() if t is not None]

    wanted_y = torch.zeros(batch, length, inner, dtype=torch.float64)
    states = []
    for number, (row, real) in enumerate(sequences):
        alone = {n: t[row, real][None] if n in per_token and t is not None else t for n, t in exact.items()}
        if alone["initial_state"] is not None:
            alone["initial_state"] = alone["initial_state"][number : number + 1]
        y, final = selective_scan(
            **alone, delta_softplus=softplus, reverse=reverse, return_final_state=True, backend="reference"
        )
        wanted_y = wanted_y.index_put((torch.tensor(row), real), y[0])
        states.append(final)
    wanted_state = torch.cat(states)
    loss = (wanted_y * weight_y).sum() + (wanted_state * weight_state).sum()
    wanted = torch.autograd.grad(loss, [exact[name] for name in present], materialize_grads=True)

    pads = None if mask is None else ~mask.unsqueeze(-1)
    inputs = {}
    for name in present:
        t = exact[name].detach().to(dtype if name in per_token else torch.float32)
        if name in per_token and pads is not None:
            t = t.masked_fill(pads, float("nan"))
        if name in per_token and strided:
            t = torch.nn.functional.pad(t, (3, 5), value=float("nan"))[..., 3:-5]
        inputs[name] = t.requires_grad_()
    dy = weight_y.to(dtype)
    if pads is not None:
        dy = dy.masked_fill(pads, float("nan"))
    with instruction_set(backend, isa):
        y, final = selective_scan(
            **inputs,
            mask=mask,
            cu_seqlens=cu_seqlens,
            delta_softplus=softplus,
            reverse=reverse,
            return_final_state=True,
            backend=backend,
        )
        gradients = torch.autograd.grad(
            [y, final], list(inputs.values()), [dy, weight_state.float()], materialize_grads=True
        )
    assert_close(y, wanted_y, "y", dtype)
    assert_close(final, wanted_state, "final state", torch.float32)
    for name, actual, expected in zip(present, gradients, wanted, strict=True):
        assert_close(actual, expected, f"gradient of {name}", dtype if name in per_token else torch.float32)


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
@settings(deadline=None, max_examples=60)
@given(
    layout=layouts(),
    inner=st.sampled_from([1, 5, 16, 17, 40, 130, 144]),
    width=st.sampled_from([1, 2, 3, 4, 7]),
    mode=st.sampled_from(["centered", "causal"]),
    activation=st.sampled_from(["silu", None]),
    reverse=st.booleans(),
    bias=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    isa=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_convolution_is_the_reference(
    backend, layout, inner, width, mode, activation, reverse, bias, strided, dtype, isa, seed
):
    batch, length, mask, cu_seqlens = layout
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, inner), (inner, width), (inner,)]
    exact = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes[: 2 + bias]]
    exact = [rounded(t, dtype).requires_grad_() for t in exact]
    dy = rounded(torch.randn(batch, length, inner, generator=g, dtype=torch.float64), dtype)
    options = {"mode": mode, "activation": activation, "mask": mask, "cu_seqlens": cu_seqlens, "reverse": reverse}
    wanted = depthwise_conv(*exact, **options, backend="reference")
    wanted_gradients = torch.autograd.grad(wanted, exact, dy, materialize_grads=True)

    inputs = [t.detach().to(dtype) for t in exact]
    dy = dy.to(dtype)
    if mask is not None:
        inputs[0] = inputs[0].masked_fill(~mask.unsqueeze(-1), float("nan"))
        dy = dy.masked_fill(~mask.unsqueeze(-1), float("nan"))
    if strided:
        inputs[0] = torch.nn.functional.pad(inputs[0], (3, 5), value=float("nan"))[..., 3:-5]
    inputs = [t.requires_grad_() for t in inputs]
    with instruction_set(backend, isa):
        y = depthwise_conv(*inputs, **options, backend=backend)
        gradients = torch.autograd.grad(y, inputs, dy, materialize_grads=True)
    assert_close(y, wanted, "y", dtype)
    for name, actual, expected in zip(("x", "weight", "bias"), gradients, wanted_gradients, strict=False):
        assert_close(actual, expected, f"gradient of {name}", dtype)
