"""The scan of Mamba-2 in chunked products, against the loop over time."""

import pytest
import torch
from torch.nn import functional as F

from mabert.ops import selective_scan, ssd
from mabert.ops.ssd import chunk_steps, ssd_reference

PACKED = {
    "one row": ((1, 130), None),
    "rows": ((2, 70), None),
    "one step": ((3, 1), None),
    "a whole chunk": ((1, 64), None),
    "packed": ((1, 203), [0, 5, 5, 70, 200, 203]),
    "packed evenly": ((1, 128), [0, 64, 128]),
    "packed, empty at the ends": ((1, 66), [0, 0, 66, 66]),
}


def inputs(shape, cu, dtype, heads=4, groups=2, width=5, state=3):
    torch.manual_seed(0)
    sequences = shape[0] if cu is None else len(cu) - 1
    tensors = {
        "x": torch.randn(*shape, heads, width),
        "delta": F.softplus(torch.randn(*shape, heads)),
        "A": -torch.rand(heads) * 2 - 0.1,
        "B": torch.randn(*shape, groups, state),
        "C": torch.randn(*shape, groups, state),
        "initial_state": torch.randn(sequences, heads, width, state),
    }
    boundaries = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    return {name: t.to(dtype) for name, t in tensors.items()}, boundaries


def outputs_and_gradients(function, tensors, boundaries, **kwargs):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    positional = [leaves[name] for name in ("x", "delta", "A", "B", "C")]
    y, state = function(*positional, initial_state=leaves["initial_state"], cu_seqlens=boundaries, **kwargs)
    torch.manual_seed(1)
    loss = (y * torch.randn(y.shape).to(y)).sum() + (state * torch.randn(state.shape).to(state)).sum()
    return {"y": y.detach(), "state": state.detach()} | dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    )


@pytest.mark.parametrize(("groups", "width", "state"), [(1, 5, 3), (2, 5, 3), (4, 5, 3), (2, 32, 128)])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_every_gradient(case, dtype, groups, width, state):
    """Within twice the error of the loop in the same dtype, both against the loop in float64."""
    shape, cu = PACKED[case]
    tensors, boundaries = inputs(shape, cu, dtype, groups=groups, width=width, state=state)
    ours = outputs_and_gradients(ssd, tensors, boundaries, return_final_state=True)
    exact = outputs_and_gradients(ssd_reference, {n: t.double() for n, t in tensors.items()}, boundaries)
    loop = outputs_and_gradients(ssd_reference, tensors, boundaries)
    for name, expected in exact.items():
        largest = expected.abs().max()
        if name == "A":  # a sum over all steps that nearly cancels: measured by what is added up
            largest = 2 * (tensors["delta"].double() * exact["delta"]).abs().sum()
        if dtype == torch.float64:  # the loop is the yardstick itself
            allowed = 1e-12 * max(float(largest), 1)
        else:
            allowed = 2 * (loop[name].double() - expected).abs().max() + 4 * torch.finfo(dtype).eps * largest
        assert float((ours[name].double() - expected).abs().max()) <= allowed, name
        assert ours[name].dtype == loop[name].dtype, name


@pytest.mark.parametrize(
    ("width", "state", "steps"), [(5, 3, 16), (16, 4, 16), (32, 32, 32), (64, 64, 64), (64, 128, 64)]
)
def test_the_chunks_grow_with_the_state(width, state, steps):
    assert chunk_steps(width * state) == steps


def test_gradients_are_those_of_differences():
    tensors, boundaries = inputs((1, 9), [0, 4, 9], torch.float64, heads=2, width=2, state=2)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(x, delta, A, B, C, state):
        return ssd(x, delta, A, B, C, initial_state=state, cu_seqlens=boundaries, return_final_state=True)

    assert torch.autograd.gradcheck(run, leaves)


def test_it_is_mamba_1s_scan_with_one_decay_a_head():
    tensors, _ = inputs((2, 50), None, torch.float64, groups=1)
    x, delta, A, B, C = (tensors[name] for name in ("x", "delta", "A", "B", "C"))
    wide = delta.repeat_interleave(5, dim=2)
    expected = selective_scan(
        x.flatten(2), wide, A.repeat_interleave(5)[:, None].expand(-1, 3), B[:, :, 0], C[:, :, 0], delta_softplus=False
    )
    torch.testing.assert_close(ssd(x, delta, A, B, C).flatten(2), expected)


def test_a_run_goes_on_from_its_final_state():
    tensors, _ = inputs((2, 90), None, torch.float64)
    start = tensors.pop("initial_state")
    whole, last = ssd(**tensors, initial_state=start, return_final_state=True)
    parts, state = [], start
    for begin, end in ((0, 1), (1, 66), (66, 90)):
        part = {name: t if name == "A" else t[:, begin:end] for name, t in tensors.items()}
        y, state = ssd(**part, initial_state=state, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_packed_neighbours_change_nothing():
    tensors, boundaries = inputs((1, 203), PACKED["packed"][1], torch.float32)
    y = ssd(**tensors, cu_seqlens=boundaries)
    for start, end, row in ((5, 70, 2), (70, 200, 3)):
        tensors["x"][:, :start] = torch.nan
        tensors["x"][:, end:] = torch.nan
        alone = {name: t[:, start:end] for name, t in tensors.items() if name not in ("A", "initial_state")}
        expected = ssd(**alone, A=tensors["A"], initial_state=tensors["initial_state"][row : row + 1])
        poisoned = ssd(**tensors, cu_seqlens=boundaries)[:, start:end]
        torch.testing.assert_close(poisoned, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[:, start:end], expected, rtol=1e-5, atol=1e-5)
        tensors, _ = inputs((1, 203), PACKED["packed"][1], torch.float32)


def test_strong_decay_over_a_long_sequence_stays_finite():
    tensors, _ = inputs((1, 300), None, torch.float32)
    tensors["A"] = torch.full((4,), -500.0)
    result = outputs_and_gradients(ssd, tensors, None, return_final_state=True)
    assert all(t.isfinite().all() for t in result.values())


def test_autocast_does_not_reach_into_the_scan():
    tensors, _ = inputs((1, 70), None, torch.float32)
    expected = ssd(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd(**tensors), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 6)}, r"takes x \(B, L, K, P\)"),
        ({"delta": torch.zeros(1, 4, 3)}, r"delta must have shape \(1, 4, 4\)"),
        ({"A": torch.zeros(4, 3)}, r"A must have shape \(4,\)"),
        ({"B": torch.zeros(1, 4, 3, 3)}, "4 heads cannot be divided among 3 groups"),
        ({"C": torch.zeros(1, 4, 2, 5)}, "C must have shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "from 0 to 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    tensors, _ = inputs((1, 4), None, torch.float32)
    with pytest.raises(ValueError, match=message):
        ssd(**tensors | change)


def test_boundaries_need_one_row():
    tensors, _ = inputs((2, 4), None, torch.float32)
    with pytest.raises(ValueError, match="x has 2 rows"):
        ssd(**tensors, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
