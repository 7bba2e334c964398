"""Every initial value of the package, in one table."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mabert.layers.causal_conv import CausalConv
from mabert.layers.mamba import SelectiveSSM
from mabert.layers.mamba1 import Mamba1Mixer
from mabert.layers.mamba2 import Mamba2Mixer
from mabert.layers.norm import RMSNorm
from mabert.layers.parallel import ScaledFusion
from mabert.layers.transmamba import TransMambaMixer


def _normal(parameter: Tensor, config: Any) -> None:
    init.normal_(parameter, mean=0.0, std=config.initializer_range)


def _zeros(parameter: Tensor, config: Any) -> None:
    init.zeros_(parameter)


def _ones(parameter: Tensor, config: Any) -> None:
    init.ones_(parameter)


def _uniform_by_kernel(parameter: Tensor, config: Any) -> None:
    bound = config.conv_kernel**-0.5
    init.uniform_(parameter, -bound, bound)


def _uniform_by_rank(parameter: Tensor, config: Any) -> None:
    bound = int(config.time_step_rank) ** -0.5
    init.uniform_(parameter, -bound, bound)


def _log_one_to_state_size(parameter: Tensor, config: Any) -> None:
    rates_N = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=parameter.device)
    init.copy_(parameter, rates_N.log().expand_as(parameter))


def _inverse_softplus_of_step(parameter: Tensor, config: Any) -> None:
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    steps_E = torch.rand(parameter.shape, device=parameter.device) * (high - low) + low
    steps_E = steps_E.exp().clamp(min=config.time_step_floor)
    init.copy_(parameter, steps_E + torch.log(-torch.expm1(-steps_E)))


def _log_of_decay_range(parameter: Tensor, config: Any) -> None:
    low, high = config.decay_range
    rates_K = torch.rand(parameter.shape, device=parameter.device) * (high - low) + low
    init.copy_(parameter, rates_K.log())


# Owner, parameter, initial value. A module's own rows come after those of the modules inside it and win over them.
INITIAL_VALUES: tuple[tuple[type[nn.Module], str, Callable[[Tensor, Any], None]], ...] = (
    # CHOICE: matrices and embeddings from N(0, initializer_range), biases zero, norms one and zero, as in BERT
    (nn.Linear, "weight", _normal),
    (nn.Linear, "bias", _zeros),
    (nn.Embedding, "weight", _normal),
    (nn.LayerNorm, "weight", _ones),
    (nn.LayerNorm, "bias", _zeros),
    # CHOICE: the initial values of Mamba-1 for what the recurrence is made of
    (SelectiveSSM, "conv1d.weight", _uniform_by_kernel),
    (SelectiveSSM, "conv1d.bias", _uniform_by_kernel),
    (SelectiveSSM, "dt_proj.weight", _uniform_by_rank),
    (SelectiveSSM, "dt_proj.bias", _inverse_softplus_of_step),
    (SelectiveSSM, "A_log", _log_one_to_state_size),
    (SelectiveSSM, "D", _ones),
    # CHOICE: the initial values of Mamba-2 for what its recurrence is made of, TransMamba's as well
    (RMSNorm, "weight", _ones),
    (CausalConv, "conv1d.weight", _uniform_by_kernel),
    (CausalConv, "conv1d.bias", _uniform_by_kernel),
    (Mamba2Mixer, "dt_bias", _inverse_softplus_of_step),
    (Mamba2Mixer, "A_log", _log_of_decay_range),
    (Mamba2Mixer, "D", _ones),
    (TransMambaMixer, "dt_bias", _inverse_softplus_of_step),
    (TransMambaMixer, "A_log", _log_of_decay_range),
    (Mamba1Mixer, "dt_proj.weight", _uniform_by_rank),
    (Mamba1Mixer, "dt_proj.bias", _inverse_softplus_of_step),
    (Mamba1Mixer, "A_log", _log_one_to_state_size),
    (Mamba1Mixer, "D", _ones),
    # CHOICE: both branches weigh as much in the beginning
    (ScaledFusion, "attention_scale", _ones),
    (ScaledFusion, "ssm_scale", _ones),
)


def init_module(module: nn.Module, config: Any) -> None:
    """Give the module's parameters their initial values; those loaded from a checkpoint are left alone."""
    for owner, path, fill in INITIAL_VALUES:
        if isinstance(module, owner):
            *parents, name = path.split(".")
            parameter = getattr(module.get_submodule(".".join(parents)), name)
            if parameter is not None:
                fill(parameter, config)
