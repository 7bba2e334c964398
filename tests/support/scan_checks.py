"""Inputs of the scan with every kind of value in them, and the rule by which a backend counts as right."""

import contextlib

import torch

from mabert.ops import selective_scan


def make_inputs(batch, length, inner, state, *, sequences=None, dtype=torch.float64, seed=0, step_scale=1.0):
    """Every input of the scan, random and with gradients; what the kernels hold in float32 is not cast below it."""
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


def to_device(values, device):
    """A dictionary's tensors, and their gradients, on another device."""
    return {
        name: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        for name, t in values.items()
    }


def outputs_and_gradients(inputs, **options):
    """y, final state and the gradient of every input, through both outputs."""
    y, state = selective_scan(**inputs, return_final_state=True, **options)
    g = torch.Generator().manual_seed(99)
    weight_y, weight_state = (
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype).to(t.device) for t in (y, state)
    )
    loss = (y * weight_y).sum().double() + (state * weight_state).sum().double()
    gradients = torch.autograd.grad(loss, [t for t in inputs.values() if t is not None], materialize_grads=True)
    names = [name for name, t in inputs.items() if t is not None]
    return {"y": y, "final_state": state} | dict(zip(names, gradients, strict=True))


def tiny_steps_over_a_long_sequence():
    """Inputs in float32 with steps near 1e-3, and what is to come out without softplus, from float64."""
    length = 4096
    inputs = make_inputs(1, length, 17, 16, dtype=torch.float32)
    # of various sizes: one decay rounded in the same way at every step is wrong in any arithmetic of this precision
    steps = torch.rand(1, length, 17, generator=torch.Generator().manual_seed(5)) + 0.5
    inputs["delta"] = (1e-3 * steps).requires_grad_()
    inputs["delta_bias"] = torch.zeros(17, requires_grad=True)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    return inputs, outputs_and_gradients(exact, backend="torch", delta_softplus=False)


@contextlib.contextmanager
def decays_off_by(relative):
    """Every decay that the reference computes is too large or too small by so much, as a coin falls."""
    exponential, g = torch.exp, torch.Generator().manual_seed(3)

    def wrong(v):
        coins = torch.randint(0, 2, v.shape, generator=g, dtype=torch.int8).to(v.dtype)
        return exponential(v) * (1 + relative * (2 * coins - 1))

    torch.exp = wrong
    try:
        yield
    finally:
        torch.exp = exponential


def assert_within_twice_the_error_of_the_reference(inputs, actual, *, exponential_error=0.0, **options):
    """The 2x rule: no more than twice the error of the same-dtype reference against float64, and a few roundings.

    Where hardware computes exponentials with an error of its own, what that alone does in float64 is added.
    """
    inputs, options = to_device(inputs, "cpu"), to_device(options, "cpu")
    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}
    truth = outputs_and_gradients(exact, backend="reference", **options)
    reference = outputs_and_gradients(inputs, backend="reference", **options)
    with decays_off_by(exponential_error):
        off = outputs_and_gradients(exact, backend="reference", **options) if exponential_error else truth
    for name, tensor in truth.items():
        if tensor.numel() == 0:
            continue
        allowed = 2 * ((reference[name].double() - tensor).abs().max() + (off[name] - tensor).abs().max())
        allowed += 4 * torch.finfo(actual[name].dtype).eps * tensor.abs().max()
        error = (actual[name].cpu().double() - tensor).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert actual[name].dtype == reference[name].dtype
