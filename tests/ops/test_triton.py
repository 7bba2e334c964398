"""The Triton kernels: in Triton's interpreter on few tokens, compiled for a GPU that need not be there, and on one.

In the interpreter a row of a few tokens is still several tiles and stretches. The tests marked `gpu` run the whole grid
of the compiled CPU kernels' tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_checks import (
    assert_within_twice_the_error_of_the_reference,
    make_inputs,
    outputs_and_gradients,
    tiny_steps_over_a_long_sequence,
    to_device,
)

from mabert.ops import depthwise_conv, selective_scan, use_backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compiled here: the tests marked gpu run the kernels"
)

CU = torch.tensor([0, 3, 3, 12, 13, 21], dtype=torch.int32)  # an empty and a one-token sequence among them
PER_TOKEN = ("x", "delta", "B", "C", "z")


def random_mask(batch, length, share, seed=1):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


LAYOUTS = {
    "empty": {"length": 0},
    "one step": {"length": 1},
    "several stretches": {"length": 21},
    "mask": {"length": 21, "mask": random_mask(2, 21, 0.6)},
    "all-pad row": {"length": 9, "mask": torch.tensor([[True] * 9, [False] * 9])},
    "packed": {"length": 21, "cu_seqlens": CU},
    "packed and masked": {"length": 21, "cu_seqlens": CU, "mask": random_mask(1, 21, 0.7)},
    "a sequence that starts within the middle one of three stretches": {
        "length": 44,
        "cu_seqlens": torch.tensor([0, 20, 44], dtype=torch.int32),
    },
    "sequences that begin and end with stretches": {
        "length": 32,
        "cu_seqlens": torch.tensor([0, 16, 16, 32], dtype=torch.int32),
    },
}


def inputs_for(layout, **options):
    boundaries = layout.get("cu_seqlens")
    sequences = None if boundaries is None else len(boundaries) - 1
    return make_inputs(1 if sequences else 2, layout["length"], sequences=sequences, **options)


def check_scan(inputs, **options):
    actual = outputs_and_gradients(inputs, backend="triton", **options)
    assert_within_twice_the_error_of_the_reference(inputs, actual, **options)


@INTERPRETED
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_in_every_layout(layout, reverse):
    options = dict(LAYOUTS[layout])
    blocks = 2 if layout == "packed" else 1
    inputs = inputs_for(options, inner=8 * blocks - 3, state=2, dtype=torch.float32)
    del options["length"]
    check_scan(inputs, reverse=reverse, **options)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_in_half_precision(dtype):
    check_scan(inputs_for(LAYOUTS["packed"], inner=3, state=3, dtype=dtype), cu_seqlens=CU)


@INTERPRETED
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "absent", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias", "initial_state")]
)
def test_scan_without_optional_inputs(absent, softplus):
    inputs = inputs_for(LAYOUTS["packed"], inner=3, state=1, dtype=torch.float32) | dict.fromkeys(absent)
    if not softplus:
        inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    check_scan(inputs, cu_seqlens=CU, delta_softplus=softplus)


@INTERPRETED
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_scan_with_large_and_tiny_steps(scale):
    inputs = make_inputs(1, 21, 3, 2, dtype=torch.float32)
    for name in ("delta", "delta_bias"):
        inputs[name] = (inputs[name].detach().abs() * scale).requires_grad_()
    check_scan(inputs, delta_softplus=False)


def poisoned(inputs, mask):
    """The same with NaN wherever the mask is False."""
    return inputs | {
        name: inputs[name].detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
        for name in PER_TOKEN
    }


@INTERPRETED
def test_neither_pads_nor_what_lies_between_rows_is_read():
    mask = random_mask(2, 9, 0.6)
    inputs = make_inputs(2, 9, 3, 2, dtype=torch.float32)
    clean = outputs_and_gradients(inputs, mask=mask, backend="triton")
    wide = {
        name: torch.nn.functional.pad(t.detach(), (3, 5), value=float("nan"))[..., 3:-5].requires_grad_()
        if name in PER_TOKEN
        else t
        for name, t in poisoned(inputs, mask).items()
    }
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        actual = outputs_and_gradients(wide, mask=mask, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in clean.items():
        assert torch.equal(actual[name], tensor), name
    assert (actual["y"][~mask] == 0).all()
    assert (actual["x"][~mask] == 0).all()


@INTERPRETED
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, in numpy
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_infinite_or_undefined_crosses_to_another_sequence(reverse):
    inputs = make_inputs(1, 21, 3, 2, sequences=5, dtype=torch.float32) | {"initial_state": None}
    clean = selective_scan(**inputs, cu_seqlens=CU, reverse=reverse, backend="triton")
    values = inputs["x"].detach().clone()
    values[0, 5], values[0, 12] = float("inf"), float("nan")  # in the third and the fourth sequence
    inputs["x"] = values.requires_grad_()
    y = selective_scan(**inputs, cu_seqlens=CU, reverse=reverse, backend="triton")
    (gradient,) = torch.autograd.grad(y[0, [0, 1, 2, *range(13, 21)]].sum(), inputs["x"])
    for others in (slice(0, 3), slice(13, 21)):
        assert torch.equal(y[0, others], clean[0, others])
        assert gradient[0, others].isfinite().all()


@INTERPRETED
def test_a_state_that_lies_otherwise_in_memory_and_no_rows_at_all():
    inputs = make_inputs(2, 5, 3, 2, dtype=torch.float32)
    inputs["initial_state"] = inputs["initial_state"].detach().mT.contiguous().mT.requires_grad_()
    check_scan(inputs)
    nothing = make_inputs(0, 5, 3, 2, dtype=torch.float32)
    y, final = selective_scan(**nothing, return_final_state=True, backend="triton")
    assert y.shape == (0, 5, 3)
    assert final.shape == (0, 3, 2)


@INTERPRETED
@pytest.mark.parametrize("layout", ["dense", "mask", "packed", "packed and masked"])
@pytest.mark.parametrize(
    ("mode", "reverse", "width", "activation"),
    [
        ("centered", False, 4, "silu"),
        ("causal", True, 4, None),
        ("causal", False, 3, "silu"),
        ("centered", True, 1, "silu"),
    ],
)
def test_convolution(layout, mode, reverse, width, activation):
    check_convolution(layout, mode, reverse, width, activation, torch.float32, "cpu", inner=9)


def check_convolution(layout, mode, reverse, width, activation, dtype, device, inner):
    packed = "packed" in layout
    g = torch.Generator().manual_seed(0)
    shapes = ((1 if packed else 2, 21, inner), (inner, width), (inner,))
    inputs = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    dy = torch.randn(shapes[0], generator=g).to(dtype)
    options = {"mode": mode, "reverse": reverse, "activation": activation}
    if packed:
        options["cu_seqlens"] = CU
    if "mask" in layout:
        mask = options["mask"] = random_mask(shapes[0][0], 21, 0.7)
        inputs[0].masked_fill_(~mask.unsqueeze(-1), float("nan"))
        dy.masked_fill_(~mask.unsqueeze(-1), float("nan"))
    results = {}
    for backend, place in (("reference", "cpu"), ("triton", device)):
        exact = torch.float64 if backend == "reference" else dtype
        here = [t.to(device=place, dtype=exact).requires_grad_() for t in inputs]
        y = depthwise_conv(*here, **to_device(options, place), backend=backend)
        results[backend] = [y, *torch.autograd.grad(y, here, dy.to(y))]
    for name, expected, actual in zip(("y", "x", "weight", "bias"), *results.values(), strict=True):
        assert actual.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
        assert (actual.cpu().double() - expected).abs().max() <= bound, name


@INTERPRETED
def test_opcheck_and_compile_of_both():
    from mabert.ops.depthwise_conv import _conv
    from mabert.ops.selective_scan import _scan, kept_rows

    inputs = make_inputs(1, 5, 2, 1, dtype=torch.float32)
    x, delta, A, B, C, D, z, delta_bias, initial_state = inputs.values()
    kept = kept_rows("triton", 1, 5, None)
    torch.library.opcheck(
        _scan, (x, delta, A, B, C, D, z, delta_bias, None, None, initial_state, True, False, kept, "triton")
    )
    weight = torch.randn(2, 4, requires_grad=True)
    torch.library.opcheck(_conv, (x, weight, None, None, None, 1, True, "triton"))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x):
        y = depthwise_conv(x, weight, activation="silu")
        return selective_scan(y, delta, A, B, C)

    with use_backend("triton"):
        actual = both(x)
    expected = selective_scan(depthwise_conv(x, weight, activation="silu"), delta, A, B, C)
    torch.testing.assert_close(actual, expected)


@INTERPRETED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 6, 3).double()}, "B must be torch.float32 on cpu, not torch.float64"),
        ({"A": torch.zeros(4, 3).bfloat16()}, "A must be float32 on cpu, not torch.bfloat16"),
        ({"x": torch.zeros(2, 4, 6).mT}, "last dimension of x must be contiguous"),
    ],
)
def test_nothing_is_cast_silently(change, message):
    inputs = {"x": torch.zeros(2, 6, 4), "delta": torch.zeros(2, 6, 4), "A": torch.zeros(4, 3)}
    inputs |= {"B": torch.zeros(2, 6, 3), "C": torch.zeros(2, 6, 3)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs | change), backend="triton")


@INTERPRETED
def test_more_rows_than_a_grid_has_programs_for_are_refused():
    x, A = torch.zeros(65536, 1, 1), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="at most 65535 rows, not 65536"):
        selective_scan(x, x, A, x, x, backend="triton")
    with pytest.raises(ValueError, match="at most 65535 rows, not 65536"):
        depthwise_conv(x, torch.zeros(1, 4), backend="triton")


def test_every_kernel_compiles_for_a_gpu_and_keeps_a_channel_in_one_thread():
    """The interpreter is more patient than the compiler, and says nothing about registers and shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_code", "--state", "16", "3", "--json"],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    kernels = json.loads(process.stdout)
    assert {k["kernel"] for k in kernels} >= {"_read_out", "_gradients", "_leave", "_leave_backwards"}
    for kernel in kernels:
        # neither the recurrence nor the readout crosses threads: nothing is exchanged but the flags of a tile, and in
        # the backward the sums over channels, 16 times for B and for C at each of two steps
        if kernel["kernel"] != "_in_scan_order":
            assert kernel["shuffles"] <= (72 if kernel["kernel"] == "_gradients" else 8), kernel
            assert kernel["shared_bytes"] == 0, kernel


GPU = torch.device("cuda")
# Of 2^x, relative: 1.4 units in the last place of float32. NVIDIA gives 2 for exp2f, which is the same instruction.
HARDWARE_ERROR = 2**-22.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        {"length": 1},
        {"length": 33},
        {"length": 700},
        {"length": 300, "mask": random_mask(2, 300, 0.6)},
        {"length": 700, "cu_seqlens": torch.tensor([0, 3, 3, 128, 129, 384, 700], dtype=torch.int32)},
    ],
    ids=["one", "odd", "several stretches", "mask", "packed"],
)
def test_gpu_scan(layout, reverse, dtype):
    inputs = inputs_for(layout, inner=50, state=16, dtype=dtype)
    options = {name: value for name, value in layout.items() if name != "length"} | {"reverse": reverse}
    actual = outputs_and_gradients(to_device(inputs, GPU), backend="triton", **to_device(options, GPU))
    assert_within_twice_the_error_of_the_reference(inputs, actual, exponential_error=HARDWARE_ERROR, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [("initial_state",), ("D", "z", "delta_bias", "initial_state")])
@pytest.mark.parametrize("boundaries", [None, [0, 3, 3, 128, 129, 384, 700]])
def test_gpu_scan_without_optional_inputs(boundaries, absent):
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    inputs = inputs_for({"length": 700, "cu_seqlens": cu_seqlens}, inner=50, state=16, dtype=torch.float32)
    inputs |= dict.fromkeys(absent)
    options = {"cu_seqlens": cu_seqlens}
    actual = outputs_and_gradients(to_device(inputs, GPU), backend="triton", **to_device(options, GPU))
    assert_within_twice_the_error_of_the_reference(inputs, actual, exponential_error=HARDWARE_ERROR, **options)


@pytest.mark.gpu
def test_gpu_a_million_packed_tokens():
    ends = torch.arange(0, 2**20 + 1, 512, dtype=torch.int32, device=GPU)
    torch.manual_seed(0)
    rows = [torch.randn(1, 2**20, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3)]
    narrow = [torch.randn(1, 2**20, 16, device=GPU, dtype=torch.bfloat16) for _ in range(2)]
    A = -torch.rand(64, 16, device=GPU)
    weight = torch.randn(64, 4, device=GPU)
    last = slice(2**20 - 512, None)

    def layer(x, delta, z, B, C, cu_seqlens):
        x = depthwise_conv(x, weight, activation="silu", cu_seqlens=cu_seqlens)
        return selective_scan(x, delta, A, B, C, z=z, cu_seqlens=cu_seqlens)

    y = layer(*rows, *narrow, ends)
    alone = layer(*(t[:, last] for t in (*rows, *narrow)), None)
    torch.testing.assert_close(y[:, last], alone, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [1, 3, 8, 16, 64])
@pytest.mark.parametrize(("inner", "step_scale"), [(1, 1.0), (17, 1.0), (130, 1.0), (130, 30.0)])
def test_gpu_scan_sizes_and_large_steps(inner, step_scale, state):
    inputs = make_inputs(2, 200, inner, state, dtype=torch.float32, step_scale=step_scale)
    actual = outputs_and_gradients(to_device(inputs, GPU), backend="triton")
    assert_within_twice_the_error_of_the_reference(inputs, actual, exponential_error=HARDWARE_ERROR)


@pytest.mark.gpu
def test_gpu_tiny_steps_over_a_long_sequence_in_every_gradient():
    inputs, expected = tiny_steps_over_a_long_sequence()
    actual = outputs_and_gradients(to_device(inputs, GPU), backend="triton", delta_softplus=False)
    for name, truth in expected.items():
        error = (actual[name].cpu().double() - truth).norm() / truth.norm()
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.gpu
def test_gpu_results_are_the_same_bits_every_time():
    inputs = to_device(make_inputs(3, 500, 200, 16, dtype=torch.bfloat16), GPU)
    first, second = (outputs_and_gradients(inputs, backend="triton") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_pads_are_never_read(packed):
    mask = random_mask(1 if packed else 2, 300, 0.6)
    boundaries = torch.tensor([0, 100, 101, 300], dtype=torch.int32) if packed else None
    inputs = make_inputs(len(mask), 300, 40, 16, sequences=3 if packed else None, dtype=torch.float32)
    options = to_device({"mask": mask, "cu_seqlens": boundaries}, GPU)
    clean, dirty = (
        outputs_and_gradients(to_device(some, GPU), backend="triton", **options)
        for some in (inputs, poisoned(inputs, mask))
    )
    for name, tensor in clean.items():
        assert torch.equal(dirty[name], tensor), name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "mask", "packed", "packed and masked"])
@pytest.mark.parametrize(
    ("mode", "reverse", "width", "activation", "dtype"),
    [
        ("centered", False, 4, "silu", torch.float32),
        ("centered", True, 4, None, torch.float32),
        ("causal", False, 4, "silu", torch.bfloat16),
        ("causal", True, 3, "silu", torch.float32),
        ("centered", False, 1, "silu", torch.float32),
        ("centered", False, 7, None, torch.bfloat16),
    ],
)
def test_gpu_convolution(layout, mode, reverse, width, activation, dtype):
    check_convolution(layout, mode, reverse, width, activation, dtype, GPU, inner=70)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_gpu_model_equals_the_cpu(execution):
    model, ids, mask = model_and_batch(execution)
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).last_hidden_state
        actual = model.to(GPU)(ids.to(GPU), attention_mask=mask.to(GPU)).last_hidden_state
    torch.testing.assert_close(actual.cpu()[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_half_precision_is_as_close_to_float32_packed_as_padded():
    """Packed, attention is torch's variable-length one."""
    outputs, gradients = {}, {}
    for name, execution, bf16 in (("exact", "padded", False), ("padded", "padded", True), ("packed", "packed", True)):
        model, ids, mask = model_and_batch(execution)
        model = model.to(GPU).train()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            y = model(ids.to(GPU), attention_mask=mask.to(GPU)).last_hidden_state[mask.to(GPU)].float()
        y.square().mean().backward()
        outputs[name] = y.detach()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for values in (outputs, gradients):
        errors = {name: (values[name] - values["exact"]).norm() for name in ("padded", "packed")}
        assert errors["packed"] <= 2 * errors["padded"]


def model_and_batch(execution):
    """A tiny model without dropout, and three sequences with pads."""
    from mabert import MaBertConfig, MaBertModel

    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = MaBertModel(MaBertConfig.tiny(execution=execution, **none)).eval()
    return model, torch.randint(5, 1000, (3, 40)), torch.arange(40) < torch.tensor([40, 17, 1])[:, None]
