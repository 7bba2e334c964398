import pytest
import torch

from mabert.ops import depthwise_conv
from mabert.ops.native import kernels

IF_COMPILED = pytest.mark.skipif(kernels is None, reason="the CPU kernels were not compiled")
COMPARED = [
    ("torch", torch.float64),
    pytest.param("native", torch.float32, marks=IF_COMPILED),
    pytest.param("native", torch.bfloat16, marks=IF_COMPILED),
]
CU = torch.tensor([0, 2, 2, 9, 10, 20], dtype=torch.int32)


def make_inputs(batch, length, width, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, length, 37), (37, width), (37,))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("mode", ["centered", "causal"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["dense", "mask", "packed"])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize(("backend", "dtype"), COMPARED)
def test_backends_equal_the_reference(backend, dtype, mode, reverse, layout, width):
    inputs = make_inputs(1 if layout == "packed" else 2, 20, width, dtype)
    options = {"mode": mode, "reverse": reverse, "activation": "silu"}
    if layout == "mask":
        options["mask"] = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) > 0.3
    if layout == "packed":
        options["cu_seqlens"] = CU
    results = []
    for name in ("reference", backend):
        y = depthwise_conv(*inputs, **options, backend=name)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=8 * eps * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("mode", "reverse", "seen"),
    [("centered", False, [-1, 0, 1, 2]), ("causal", False, [-3, -2, -1, 0]),
     ("centered", True, [-2, -1, 0, 1]), ("causal", True, [0, 1, 2, 3])],
)  # fmt: skip
def test_which_neighbours_a_kernel_of_four_sees(mode, reverse, seen):
    x = torch.zeros(1, 11, 5, dtype=torch.float64, requires_grad=True)
    y = depthwise_conv(x, torch.ones(5, 4, dtype=torch.float64), mode=mode, reverse=reverse)
    (gradient,) = torch.autograd.grad(y[0, 5].sum(), x)
    assert (gradient[0, :, 0].nonzero().squeeze(1) - 5).tolist() == seen


def test_causal_mode_equals_torch_conv1d():
    x, weight, bias = make_inputs(2, 9, 4)
    expected = torch.nn.functional.conv1d(x.mT, weight.unsqueeze(1), bias, padding=3, groups=37)[..., :9].mT
    torch.testing.assert_close(depthwise_conv(x, weight, bias, mode="causal"), expected)


@pytest.mark.parametrize(("backend", "dtype"), COMPARED)
def test_masked_positions_are_never_read_and_come_out_zero(backend, dtype):
    x, weight, bias = make_inputs(2, 12, 4, dtype)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) > 0.3
    poisoned = x.detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    y = depthwise_conv(poisoned, weight, bias, mask=mask, activation="silu", backend=backend)
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert torch.isfinite(poisoned.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_bfloat16_is_summed_in_float32():
    x, weight, bias = make_inputs(2, 12, 4, torch.bfloat16)
    y = depthwise_conv(x, weight, bias)
    exact = depthwise_conv(x.float(), weight.float(), bias.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 4, 3), torch.zeros(2, 4)), {}, r"x \(B, L, E\) and weight \(E, W\)"),
        ((torch.zeros(1, 4, 3), torch.zeros(3, 4)), {"mode": "same"}, "mode='same'"),
        ((torch.zeros(1, 4, 3), torch.zeros(3, 4)), {"activation": "gelu"}, "activation='gelu'"),
        ((torch.zeros(2, 4, 3), torch.zeros(3, 4)), {"cu_seqlens": CU}, "x has 2 rows"),
    ],
)
def test_wrong_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(*arguments, **options)


@IF_COMPILED
def test_native_opcheck_and_equal_bits_for_any_number_of_threads():
    from mabert.ops.depthwise_conv import _conv

    x, weight, bias = make_inputs(3, 50, 4, torch.float32)
    torch.library.opcheck(_conv, (x, weight, bias, None, None, 1, True, "native"))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = depthwise_conv(x, weight, bias, activation="silu", backend="native")
        results.append([y, *torch.autograd.grad(y.sum(), (x, weight, bias))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@IF_COMPILED
@pytest.mark.parametrize("isa", kernels.isas() if kernels else [])
def test_every_instruction_set_computes_the_same(isa):
    best = kernels.isa()
    inputs = make_inputs(2, 30, 4, torch.float32)
    results = []
    for name in (best, isa):
        kernels.use_isa(name)
        y = depthwise_conv(*inputs, activation="silu", backend="native")
        results.append([y, *torch.autograd.grad((y * y).sum(), inputs)])
    kernels.use_isa(best)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@IF_COMPILED
def test_native_refuses_what_it_would_have_to_cast():
    with pytest.raises(ValueError, match="at most 16 taps"):
        depthwise_conv(torch.zeros(1, 4, 3), torch.zeros(3, 17), backend="native")
    with pytest.raises(ValueError, match="last dimension of x must be contiguous"):
        depthwise_conv(torch.zeros(1, 3, 4).mT, torch.zeros(3, 4), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(5)}, r"bias must have shape \(37,\), not \(5,\)"),
        ({"bias": torch.zeros(1)}, r"bias must have shape"),
        (
            {"mask": torch.ones(1, 1, dtype=torch.bool)},
            r"mask must be torch.bool of shape \(1, 20\), not torch.bool of \(1, 1\)",
        ),
        ({"mask": torch.ones(1, 20)}, r"mask must be torch.bool of shape \(1, 20\), not torch.float32"),
        ({"weight": torch.zeros(37, 0)}, "W at least 1"),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, r"must run from 0 to 20 .* not \[0, 7\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, r"must be \(S\+1,\) int32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("native", marks=IF_COMPILED)])
def test_what_does_not_fit_is_refused_before_anything_is_read(backend, change, message):
    arguments = {"x": torch.zeros(1, 20, 37), "weight": torch.zeros(37, 4), "bias": torch.zeros(37)} | change
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**arguments, backend=backend)


@IF_COMPILED
@pytest.mark.parametrize("change", [{"weight": torch.zeros(37, 4).double()}, {"bias": torch.zeros(37).int()}])
def test_native_casts_no_weight_silently(change):
    arguments = {"x": torch.zeros(1, 20, 37), "weight": torch.zeros(37, 4), "bias": torch.zeros(37)} | change
    with pytest.raises(ValueError, match=r"must be float32 or torch\.float32, not torch\.(float64|int32)"):
        depthwise_conv(**arguments, backend="native")
