import shutil
import sys

import pytest
import torch
from scan_checks import (
    assert_within_twice_the_error_of_the_reference,
    make_inputs,
    outputs_and_gradients,
    tiny_steps_over_a_long_sequence,
)

from mabert.ops import selective_scan
from mabert.ops.native import kernels, missing_because

NATIVE = pytest.param("native", marks=pytest.mark.skipif(kernels is None, reason="the CPU kernels were not compiled"))
COMPARED = ["torch", NATIVE]
LEFT_OUT = [(), ("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias")]


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


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_against_float64_in_every_layout(layout, reverse, dtype, backend):
    options = dict(LAYOUTS[layout], reverse=reverse)
    length, packed = options.pop("length"), "cu_seqlens" in options
    inputs = make_inputs(1 if packed else 2, length, 17, 16, sequences=len(CU) - 1 if packed else None, dtype=dtype)
    actual = outputs_and_gradients(inputs, backend=backend, **options)
    assert_within_twice_the_error_of_the_reference(inputs, actual, **options)


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("state", [1, 8, 16, 64])
@pytest.mark.parametrize(("inner", "step_scale"), [(1, 1.0), (17, 1.0), (64, 1.0), (130, 1.0), (17, 30.0), (130, 30.0)])
def test_error_against_float64_for_sizes_and_large_steps(inner, step_scale, state, backend):
    inputs = make_inputs(2, 40, inner, state, dtype=torch.float32, step_scale=step_scale)
    assert_within_twice_the_error_of_the_reference(inputs, outputs_and_gradients(inputs, backend=backend))


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_error_against_float64_without_optional_inputs(left_out, backend):
    inputs = make_inputs(2, 40, 17, 16, dtype=torch.float32) | dict.fromkeys(left_out)
    assert_within_twice_the_error_of_the_reference(inputs, outputs_and_gradients(inputs, backend=backend))


@pytest.mark.parametrize("backend", COMPARED)
def test_tiny_steps_over_a_long_sequence_accumulate_no_bias(backend):
    length = 4096
    inputs = make_inputs(1, length, 2, 2, dtype=torch.float32) | dict.fromkeys(
        ("D", "z", "delta_bias", "initial_state")
    )
    inputs["delta"] = torch.full((1, length, 2), 1e-3)
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    with torch.no_grad():
        truth = selective_scan(**exact, delta_softplus=False, backend="torch")
        reference = selective_scan(**inputs, delta_softplus=False, backend="reference")
        actual = selective_scan(**inputs, delta_softplus=False, backend=backend)
    assert (actual.double() - truth).abs().max() <= 2 * (reference.double() - truth).abs().max()


@pytest.mark.parametrize("backend", [*COMPARED, "reference"])
def test_masked_positions_are_never_read(backend):
    inputs = make_inputs(2, 20, 4, 3, dtype=torch.float32)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) > 0.4
    clean = outputs_and_gradients(inputs, mask=mask, backend=backend)
    poisoned = dict(inputs)
    for name in ("x", "delta", "B", "C", "z"):
        poisoned[name] = inputs[name].detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    actual = outputs_and_gradients(poisoned, mask=mask, backend=backend)
    for name, tensor in clean.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-7)
    assert (actual["y"][~mask] == 0).all()
    assert (actual["x"][~mask] == 0).all()


@pytest.mark.parametrize("backend", COMPARED)
def test_a_packed_sequence_equals_the_sequence_alone(backend):
    inputs = make_inputs(1, 75, 5, 3, sequences=5, dtype=torch.float32) | {"initial_state": None}
    y = selective_scan(**inputs, cu_seqlens=CU, backend=backend)
    alone = {
        name: t[:, 3:40] if name in ("x", "delta", "B", "C", "z") else t for name, t in inputs.items() if t is not None
    }
    torch.testing.assert_close(y[:, 3:40], selective_scan(**alone, backend=backend), rtol=1e-6, atol=1e-6)


def test_the_state_carries_a_sequence_over_a_cut():
    inputs = make_inputs(2, 70, 5, 3, dtype=torch.float32) | {"initial_state": None}
    whole, final = selective_scan(**inputs, return_final_state=True)

    def part(span, state):
        cut = {name: t[:, span] if name in ("x", "delta", "B", "C", "z") else t for name, t in inputs.items()}
        return selective_scan(**(cut | {"initial_state": state}), return_final_state=True)

    first, state = part(slice(0, 13), None)
    second, last = part(slice(13, 70), state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"cu_seqlens": CU}, {"mask": torch.ones(1, 75).bool()}])
def test_opcheck(options, backend):
    from mabert.ops.selective_scan import _scan, kept_rows

    sequences = 5 if "cu_seqlens" in options else None
    inputs = make_inputs(1, 75, 4, 3, dtype=torch.float32, sequences=sequences)
    x, delta, A, B, C, D, z, delta_bias, initial_state = inputs.values()
    arguments = (
        *(x, delta, A, B, C, D, z, delta_bias, options.get("mask"), options.get("cu_seqlens"), initial_state),
        *(
            True,
            options.get("reverse", False),
            kept_rows(backend, 1, 75, 5 if "cu_seqlens" in options else None),
            backend,
        ),
    )
    torch.library.opcheck(_scan, arguments)


@pytest.mark.parametrize("backend", COMPARED)
def test_autocast_does_not_reach_into_the_scan(backend):
    inputs = make_inputs(2, 20, 4, 3, dtype=torch.float32)
    expected = outputs_and_gradients(inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(inputs, backend=backend)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("backend", COMPARED)
def test_nothing_of_size_BLEN_is_kept_for_the_backward(backend):
    inputs = make_inputs(2, 256, 8, 16, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs, backend=backend)
    assert max(sizes) <= 2 * 256 * 8 * 16 / 32 + 2 * 256 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 6, 4)}, r"B must have shape \(2, 6, 3\), not \(2, 6, 4\)"),
        ({"delta": torch.zeros(2, 5, 4)}, r"delta must have shape"),
        ({"mask": torch.zeros(2, 6)}, r"mask must be torch.bool of shape \(2, 6\), not torch.float32"),
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


@pytest.mark.skipif(kernels is None, reason="the CPU kernels were not compiled")
class TestNativeKernel:
    @pytest.fixture(params=kernels.isas() if kernels else [])
    def isa(self, request):
        best = kernels.isa()
        kernels.use_isa(request.param)
        yield request.param
        kernels.use_isa(best)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["packed and masked", "several checkpoints"])
    def test_every_instruction_set_is_exact(self, isa, layout, dtype):
        options = dict(LAYOUTS[layout])
        length, packed = options.pop("length"), "cu_seqlens" in options
        inputs = make_inputs(1 if packed else 2, length, 70, 16, sequences=5 if packed else None, dtype=dtype)
        actual = outputs_and_gradients(inputs, backend="native", **options)
        assert_within_twice_the_error_of_the_reference(inputs, actual, **options)

    def test_threads_and_repetition_change_no_bit(self, isa):
        inputs = make_inputs(3, 100, 200, 16, dtype=torch.float32)
        before = torch.get_num_threads()
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(inputs, backend="native"))
        torch.set_num_threads(before)
        for other in results[1:]:
            for name, tensor in results[0].items():
                assert torch.equal(other[name], tensor), name

    def test_tiny_steps_over_a_long_sequence_in_every_gradient(self, isa):
        inputs, expected = tiny_steps_over_a_long_sequence()
        actual = outputs_and_gradients(inputs, backend="native", delta_softplus=False)
        for name, truth in expected.items():
            error = (actual[name].double() - truth).norm() / truth.norm()
            assert error < 5e-6, f"{name}: {error:.1e}"

    def test_a_backward_may_run_on_another_instruction_set_than_its_forward(self, isa):
        inputs = make_inputs(1, 75, 37, 16, dtype=torch.float32)
        expected = outputs_and_gradients(inputs, backend="native")
        y, state = selective_scan(**inputs, return_final_state=True, backend="native")
        kernels.use_isa(kernels.isas()[0])
        g = torch.Generator().manual_seed(99)
        weight_y, weight_state = (
            torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, state)
        )
        gradients = torch.autograd.grad([y, state], list(inputs.values()), [weight_y, weight_state])
        for name, gradient in zip(inputs, gradients, strict=True):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4, msg=name)

    def test_decays_beyond_the_largest_number_are_infinite(self, isa):
        assert (self.vector_function(3, torch.tensor([128.0, 300.0, 1e9])) == float("inf")).all()

    def vector_function(self, which, values):
        out = torch.empty_like(values)
        kernels.vector_function(which, values.data_ptr(), out.data_ptr(), values.numel())
        return out

    def test_decays_are_exact_at_zero_unbiased_near_it_and_accurate_elsewhere(self, isa):
        """2^t with t = Δ·A log2(e); |t| <= 0.144 is |ΔA| <= 0.1."""
        self.check_exponential(3, torch.exp2, near=0.144, lowest=-125.9, highest=126.9)
        edges = self.vector_function(3, torch.tensor([-1e9, -1e30, float("nan")]))
        assert (edges[:2] < 2e-38).all()
        assert edges[2].isnan()

    def test_exp_is_exact_at_zero_unbiased_near_it_and_accurate_elsewhere(self, isa):
        self.check_exponential(0, torch.exp, near=0.1, lowest=-86.9, highest=87.9)
        edges = self.vector_function(0, torch.tensor([-1e9, float("-inf"), float("nan")]))
        assert (edges[:2] < 2e-38).all()
        assert edges[2].isnan()

    def check_exponential(self, which, exponential, *, near, lowest, highest):
        assert (self.vector_function(which, torch.zeros(33)) == 1).all()
        small = torch.cat((torch.linspace(-near, near, 100_001), -torch.logspace(-8, -1, 50_001)))
        exact = exponential(small.double())
        ulp = torch.where(exact >= 1, 2.0**-23, 2.0**-24).double()
        error = (self.vector_function(which, small).double() - exact) / ulp
        assert error.abs().max() <= 1
        assert error.mean().abs() < 0.02
        far = torch.linspace(lowest, highest, 400_003)
        relative = self.vector_function(which, far).double() / exponential(far.double()) - 1
        assert relative.abs().max() < 2.5e-7

    def test_softplus_and_sigmoid(self, isa):
        values = torch.cat((torch.linspace(-60, 60, 100_001), torch.tensor([-80.0, 80.0, 0.0])))
        for which, function in ((1, torch.nn.functional.softplus), (2, torch.sigmoid)):
            exact = function(values.double())
            assert (self.vector_function(which, values).double() / exact - 1).abs().max() < 6e-7

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"B": torch.zeros(2, 6, 3).double()}, ValueError, "B must be torch.float32, not torch.float64"),
            ({"x": torch.zeros(2, 4, 6).mT}, ValueError, "last dimension of x must be contiguous"),
            ({"A": torch.zeros(3, 4).T}, ValueError, "A must be contiguous"),
            ({"mask": torch.zeros(2, 6)}, ValueError, "mask must be torch.bool"),
            ({"x": torch.zeros(2, 6, 4).double()}, RuntimeError, "not torch.float64"),
        ],
    )
    def test_nothing_is_cast_or_copied_silently(self, change, error, message):
        inputs = {"x": torch.zeros(2, 6, 4), "delta": torch.zeros(2, 6, 4), "A": torch.zeros(4, 3)}
        inputs |= {"B": torch.zeros(2, 6, 3), "C": torch.zeros(2, 6, 3)}
        with pytest.raises(error, match=message):
            selective_scan(**(inputs | change), backend="native")

    @pytest.mark.parametrize("bounds", [[0, 3], [1, 6], [0, 4, 2, 6]])
    def test_wrong_boundaries_are_refused(self, bounds):
        x, A, B = torch.zeros(1, 6, 4), torch.zeros(4, 3), torch.zeros(1, 6, 3)
        with pytest.raises(ValueError, match="from 0 to 6 without decreasing"):
            selective_scan(x, x, A, B, B, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="native")


@pytest.mark.skipif(kernels is None, reason="the CPU kernels were not compiled")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_training_step_needs_little_more_memory_than_its_inputs_and_outputs(peak_memory_of):
    length, inner = 4096, 512
    grown = peak_memory_of(
        f"""
        import torch
        from mabert.ops import selective_scan

        def scan(length):
            rows = [torch.randn(1, length, {inner}, requires_grad=True) for _ in range(3)]
            narrow = [torch.randn(1, length, 16, requires_grad=True) for _ in range(2)]
            A = -torch.rand({inner}, 16)
            x, delta, z = rows
            return lambda: selective_scan(x, delta, A, *narrow, z=z, backend="native").sum().backward()

        scan(1)()
        measured(scan({length}))
        """
    )
    assert grown < 1.5 * (4 * length * inner + 2 * length * 16) * 4


@pytest.mark.parametrize("boundaries", [[1, 20], [0, 19], [0, 12, 5, 20], []])
@pytest.mark.parametrize("backend", [*COMPARED, "reference"])
def test_boundaries_that_do_not_part_the_row_are_refused(backend, boundaries):
    inputs = make_inputs(1, 20, 4, 3, dtype=torch.float32) | {"initial_state": None}
    with pytest.raises(ValueError, match="cu_seqlens must"):
        selective_scan(**inputs, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32), backend=backend)


def test_where_there_is_a_compiler_the_kernels_were_compiled():
    """Or a mistake in them would leave a pure-Python package, and every test of theirs would be skipped."""
    compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    assert kernels is not None or not compilers, missing_because
