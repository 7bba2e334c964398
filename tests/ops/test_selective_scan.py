import pytest
import torch

from mabert.ops import selective_scan

FLOAT_INPUTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make_inputs(batch, length, inner, state, *, sequences=None, dtype=torch.float64, seed=0, step_scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "x": randn(batch, length, inner),
        "delta": randn(batch, length, inner) * step_scale,
        "A": -torch.rand(inner, state, generator=g, dtype=torch.float64) * 2,
        "B": randn(batch, length, state),
        "C": randn(batch, length, state),
        "D": randn(inner),
        "z": randn(batch, length, inner),
        "delta_bias": randn(inner),
        "initial_state": randn(batch if sequences is None else sequences, inner, state),
    }
    wide = torch.promote_types(dtype, torch.float32)
    keep_wide = ("A", "D", "delta_bias", "initial_state")
    return {name: t.to(wide if name in keep_wide else dtype).detach().requires_grad_() for name, t in inputs.items()}


def outputs_and_gradients(inputs, **options):
    """y, final state and the gradient of every input, through both outputs."""
    y, state = selective_scan(**inputs, return_final_state=True, **options)
    g = torch.Generator().manual_seed(99)
    weight_y = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    weight_state = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state.dtype)
    loss = (y * weight_y).sum().double() + (state * weight_state).sum().double()
    gradients = torch.autograd.grad(loss, [t for t in inputs.values() if t is not None], materialize_grads=True)
    names = [name for name, t in inputs.items() if t is not None]
    return {"y": y, "final_state": state} | dict(zip(names, gradients, strict=True))


CU = torch.tensor([0, 3, 3, 40, 41, 75], dtype=torch.int32)  # an empty and a one-token sequence among them
LAYOUTS = {
    "empty": {"length": 0},
    "one step": {"length": 1},
    "a chunk": {"length": 8},
    "odd": {"length": 33},
    "several checkpoints": {"length": 75},
    "mask": {"length": 41, "mask": torch.rand(2, 41, generator=torch.Generator().manual_seed(1)) > 0.4},
    "all-pad row": {"length": 9, "mask": torch.tensor([[True] * 9, [False] * 9])},
    "packed": {"length": 75, "cu_seqlens": CU},
    "packed and masked": {
        "length": 75,
        "cu_seqlens": CU,
        "mask": torch.rand(1, 75, generator=torch.Generator().manual_seed(2)) > 0.3,
    },
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_backend_equals_the_reference_in_every_output_and_gradient(layout, reverse):
    options = dict(LAYOUTS[layout], reverse=reverse)
    length, packed = options.pop("length"), "cu_seqlens" in options
    inputs = make_inputs(1 if packed else 2, length, 17, 3, sequences=len(CU) - 1 if packed else None)
    expected = outputs_and_gradients(inputs, backend="reference", **options)
    actual = outputs_and_gradients(inputs, backend="torch", **options)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("state", [1, 8, 16, 64])
@pytest.mark.parametrize(
    "left_out", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias")]
)
def test_optional_inputs_and_state_sizes(left_out, state):
    inputs = make_inputs(2, 11, 5, state) | dict.fromkeys(left_out)
    expected = outputs_and_gradients(inputs, backend="reference")
    actual = outputs_and_gradients(inputs, backend="torch")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-11)


def test_delta_without_softplus_is_used_as_it_is():
    inputs = make_inputs(1, 12, 4, 2) | {"delta": torch.rand(1, 12, 4, dtype=torch.float64).requires_grad_()}
    expected = outputs_and_gradients(inputs, backend="reference", delta_softplus=False)
    actual = outputs_and_gradients(inputs, backend="torch", delta_softplus=False)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-11)
    with_softplus = selective_scan(**inputs, backend="torch")
    assert not torch.allclose(actual["y"], with_softplus)


def test_the_reference_is_the_recurrence_written_out():
    x, delta, B, C = (torch.rand(1, 3, 1, dtype=torch.float64) for _ in range(4))
    A = torch.tensor([[-0.5]], dtype=torch.float64)
    h, expected = 0.0, []
    for t in range(3):
        d = delta[0, t, 0].item()
        h = (
            torch.exp(torch.tensor(d * -0.5, dtype=torch.float64)).item() * h
            + d * x[0, t, 0].item() * B[0, t, 0].item()
        )
        expected.append(h * C[0, t, 0].item())
    y = selective_scan(x, delta, A, B, C, delta_softplus=False, backend="reference")
    torch.testing.assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_gradcheck_of_the_reference():
    inputs = make_inputs(1, 5, 2, 2)
    mask = torch.tensor([[True, True, False, True, True]])

    def run(*tensors):
        return selective_scan(
            **dict(zip(inputs, tensors, strict=True)), mask=mask, return_final_state=True, backend="reference"
        )

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step_scale", [1.0, 30.0])
def test_error_against_float64_is_at_most_twice_that_of_the_reference_in_the_same_dtype(dtype, step_scale):
    low = make_inputs(2, 70, 17, 16, dtype=dtype, step_scale=step_scale)
    exact = {name: t.detach().double().requires_grad_() for name, t in low.items()}
    truth = outputs_and_gradients(exact, backend="reference")
    reference = outputs_and_gradients(low, backend="reference")
    actual = outputs_and_gradients(low, backend="torch")
    for name, tensor in truth.items():
        allowed = 2 * (reference[name].double() - tensor).abs().max()
        allowed += 4 * torch.finfo(actual[name].dtype).eps * tensor.abs().max()
        assert (actual[name].double() - tensor).abs().max() <= allowed, name
        assert actual[name].dtype == reference[name].dtype


def test_tiny_steps_over_a_long_sequence_accumulate_no_bias():
    length = 4096
    inputs = make_inputs(1, length, 2, 2, dtype=torch.float32) | dict.fromkeys(
        ("D", "z", "delta_bias", "initial_state")
    )
    inputs["delta"] = torch.full((1, length, 2), 1e-3)
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    with torch.no_grad():
        truth = selective_scan(**exact, delta_softplus=False, backend="torch")
        reference = selective_scan(**inputs, delta_softplus=False, backend="reference")
        actual = selective_scan(**inputs, delta_softplus=False, backend="torch")
    assert (actual.double() - truth).abs().max() <= 2 * (reference.double() - truth).abs().max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_masked_positions_are_never_read(backend):
    inputs = make_inputs(2, 20, 4, 3)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) > 0.4
    clean = outputs_and_gradients(inputs, mask=mask, backend=backend)
    poisoned = dict(inputs)
    for name in ("x", "delta", "B", "C", "z"):
        poisoned[name] = inputs[name].detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    actual = outputs_and_gradients(poisoned, mask=mask, backend=backend)
    for name, tensor in clean.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-13)
    assert (actual["y"][~mask] == 0).all()
    assert (actual["x"][~mask] == 0).all()


def test_a_packed_sequence_equals_the_sequence_alone():
    inputs = make_inputs(1, 75, 5, 3, sequences=5) | {"initial_state": None}
    y = selective_scan(**inputs, cu_seqlens=CU, backend="torch")
    alone = {
        name: t[:, 3:40] if name in ("x", "delta", "B", "C", "z") else t for name, t in inputs.items() if t is not None
    }
    torch.testing.assert_close(y[:, 3:40], selective_scan(**alone, backend="torch"), rtol=0, atol=1e-13)


def test_the_state_carries_a_sequence_over_a_cut():
    inputs = make_inputs(2, 30, 5, 3) | {"initial_state": None}
    whole, final = selective_scan(**inputs, return_final_state=True)

    def part(span, state):
        cut = {name: t[:, span] if name in ("x", "delta", "B", "C", "z") else t for name, t in inputs.items()}
        return selective_scan(**(cut | {"initial_state": state}), return_final_state=True)

    first, state = part(slice(0, 13), None)
    second, last = part(slice(13, 30), state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"cu_seqlens": CU}, {"mask": torch.ones(1, 75).bool()}])
def test_opcheck(options):
    from mabert.ops.selective_scan import _scan

    inputs = make_inputs(1, 75, 4, 3, dtype=torch.float32, sequences=5 if "cu_seqlens" in options else None)
    x, delta, A, B, C, D, z, delta_bias, initial_state = inputs.values()
    arguments = (
        *(x, delta, A, B, C, D, z, delta_bias, options.get("mask"), options.get("cu_seqlens"), initial_state),
        *(True, options.get("reverse", False), True),
    )
    torch.library.opcheck(_scan, arguments)


def test_autocast_does_not_reach_into_the_scan():
    inputs = make_inputs(2, 20, 4, 3, dtype=torch.float32)
    expected = outputs_and_gradients(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(inputs)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_nothing_of_size_BLEN_is_kept_for_the_backward():
    inputs = make_inputs(2, 256, 8, 16, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs)
    assert max(sizes) <= 2 * 256 * 8 * 16 / 32 + 2 * 256 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 6, 4)}, r"B must have shape \(2, 6, 3\), not \(2, 6, 4\)"),
        ({"delta": torch.zeros(2, 5, 4)}, r"delta must have shape"),
        ({"initial_state": torch.zeros(1, 4, 3)}, r"initial_state must have shape \(2, 4, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, r"x has 2 rows"),
        ({"backend": "cuda"}, r"Unknown backend 'cuda'"),
    ],
)
def test_wrong_input_is_named(change, message):
    inputs = {"x": torch.zeros(2, 6, 4), "delta": torch.zeros(2, 6, 4), "A": torch.zeros(4, 3)}
    inputs |= {"B": torch.zeros(2, 6, 3), "C": torch.zeros(2, 6, 3)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs | change))
