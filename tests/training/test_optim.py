import pytest
import torch
from torch import nn

from mabert.training.optim import Schedule, adamw, parameter_groups, plan_schedule


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(4, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 4, groups=8)
        self.dt_proj = nn.Linear(2, 8)
        self.A_log = nn.Parameter(torch.zeros(8, 3))
        self.D = nn.Parameter(torch.ones(8))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.root_mean_square = nn.RMSNorm(4)
        self.mixer = Mixer()
        self.decoder = nn.Linear(4, 10)
        self.decoder.weight = self.embeddings.weight
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_each_trainable_parameter_is_in_exactly_one_group():
    model = Model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert {names[p] for p in decayed["params"]} == {
        "embeddings.weight",
        "mixer.in_proj.weight",
        "mixer.conv.weight",
        "mixer.dt_proj.weight",
    }
    assert {names[p] for p in exempt["params"]} == {
        "norm.weight",
        "norm.bias",
        "root_mean_square.weight",
        "mixer.conv.bias",
        "mixer.dt_proj.bias",
        "mixer.A_log",
        "mixer.D",
        "decoder.bias",
    }
    assert len(decayed["params"]) + len(exempt["params"]) == len(names) - 1  # all but the frozen one, none twice


def test_the_optimizer_decays_weights_and_leaves_biases():
    model = Model()
    nn.init.ones_(model.decoder.bias)
    optimizer = adamw(model, learning_rate=0.5, weight_decay=0.1)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6
    before = model.embeddings.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.embeddings.weight.detach(), before * (1 - 0.5 * 0.1))
    assert torch.equal(model.decoder.bias, torch.ones(10))
    assert torch.equal(model.mixer.D, torch.ones(8))


def test_the_papers_schedule():
    assert plan_schedule(1_000_000) == Schedule(
        steps=1_000_000, decay_steps=1_000_000, warmup_steps=24_000, stage_ends=(900_000, 1_000_000)
    )


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
def test_a_budget_of_its_own_is_a_small_full_run(budget):
    schedule = plan_schedule(10_000, budget=budget)
    steps = int(10_000 * budget)
    assert schedule == Schedule(steps, steps, round(0.024 * steps), (round(0.9 * steps), steps))


@pytest.mark.parametrize(("budget", "stage_steps"), [(0.1, (1000, 0)), (0.5, (5000, 0)), (0.95, (9000, 500))])
def test_a_truncated_budget_keeps_the_full_runs_schedule(budget, stage_steps):
    schedule = plan_schedule(10_000, budget=budget, budget_mode="truncate")
    assert schedule.decay_steps == 10_000
    assert schedule.warmup_steps == 240
    assert schedule.stage_steps == stage_steps
    assert schedule.steps == sum(stage_steps)


def test_stages_change_at_their_first_step():
    schedule = plan_schedule(10, stage_fractions=(0.5, 0.3, 0.2))
    assert [schedule.stage_at(step) for step in range(10)] == [0] * 5 + [1] * 3 + [2] * 2


def test_a_stage_without_steps_is_passed_over():
    schedule = plan_schedule(10, stage_fractions=(0.01, 0.99))
    assert schedule.stage_steps == (0, 10)
    assert schedule.stage_at(0) == 1


def test_an_unknown_budget_mode_is_refused():
    with pytest.raises(ValueError, match="budget_mode='cut' is not one of 'own', 'truncate'"):
        plan_schedule(10, budget_mode="cut")
