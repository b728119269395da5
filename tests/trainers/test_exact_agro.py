"""Through the trainer, AGRO has its definition's expected gradient, whoever wrote the groups."""

import pytest
import torch

from tests.exact import (
    COMPLETIONS,
    PROMPTS,
    Enumeration,
    Recorder,
    assert_same_gradient,
    gradient_of,
    group_settings,
    law_of,
    sequence_kl,
    sequence_logps,
    table,
    table_of,
)
from trl_ext import AGROConfig, AGROTrainer

POLICY, REFERENCE, OTHER = table(1), table(2), table(3)
BETA = 0.5
REWARDS = dict(zip(COMPLETIONS, [0.1, 1.0, 0.25, 0.5, -0.5, 0.75, 2.0], strict=True))
REWARD_C = torch.tensor(list(REWARDS.values())).double()
FOREIGN = law_of(OTHER)
OPTIMUM = (sequence_logps(REFERENCE) + REWARD_C / BETA).softmax(0)


def run(folder, *, policy=POLICY, rewards=REWARDS, laws=None, sampler=None, **options):
    options = group_settings(**{"beta": BETA, **options})
    case = Enumeration(
        AGROTrainer,
        lambda f: AGROConfig(f, **options),
        policy,
        REFERENCE if options["beta"] else None,
        PROMPTS[0],
        rewards.__getitem__,
        sampler,
        laws,
    )
    return case.expected_gradient(str(folder))


def returns(weights):
    return REWARD_C - BETA * (sequence_logps(weights) - sequence_logps(REFERENCE))


def half_variance(weights, law_C):
    """½ Var_law(R) / β; differentiated in R, and in the law where it depends on the weights."""
    R_C = returns(weights)
    return (law_C * (R_C - law_C @ R_C).square()).sum() / (2 * BETA)


@pytest.mark.parametrize("G", [2, 3])
def test_on_foreign_completions_it_is_the_variance(G, tmp_path):
    actual = run(tmp_path, laws=[FOREIGN] * G, num_generations=G)
    assert_same_gradient(actual, gradient_of(lambda w: half_variance(w, FOREIGN), POLICY))


@pytest.mark.parametrize("G", [2, 3])
def test_pairs_of_copg_have_the_same_gradient(G, tmp_path):
    actual = run(tmp_path, laws=[FOREIGN] * G, num_generations=G, loss_type="copg")
    assert_same_gradient(actual, gradient_of(lambda w: half_variance(w, FOREIGN), POLICY))


def test_an_unscorable_completion_leaves_copg_exact(tmp_path):
    """Pairs with an unscorable completion are left out: the variance among the others, times the
    probability that a group of three has two or more of them."""
    rewards = {**REWARDS, COMPLETIONS[1]: None}
    known = torch.tensor([float(rewards[c] is not None) for c in COMPLETIONS]).double()
    scorable = FOREIGN @ known
    law = FOREIGN * known / scorable
    share = scorable**3 + 3 * scorable**2 * (1 - scorable)
    gradient = gradient_of(lambda w: share * half_variance(w, law), POLICY)
    options = dict(laws=[FOREIGN] * 3, num_generations=3, loss_type="copg")
    assert_same_gradient(run(tmp_path, rewards=rewards, **options), gradient)


SIGNED = {c: r - 0.6 for c, r in REWARDS.items()}
TOPR = {"loss_type": "topr", "beta": 0.0, "rewards": SIGNED}


def tapered(writer):
    """−E_μ w r log π with w of the policy of now, held fixed."""
    mu_C, reward_C = law_of(writer), torch.tensor(list(SIGNED.values())).double()
    ratio_C = (law_of(POLICY) / mu_C).clamp(max=1)
    weight_C = mu_C * torch.where(reward_C < 0, ratio_C, 1.0) * reward_C
    return lambda weights: -weight_C @ sequence_logps(weights)


@pytest.mark.parametrize("writer", [POLICY, OTHER], ids=["fresh", "stale"])
def test_topr_fades_negatives_by_who_wrote_them(writer, tmp_path):
    stale = dict(sampler=OTHER, num_iterations=2) if writer is OTHER else {}
    actual = run(tmp_path, **TOPR, **stale)
    assert_same_gradient(actual, gradient_of(tapered(writer), POLICY))


def regularised_objective(weights):
    """βKL − E r, to be lowered."""
    return BETA * sequence_kl(weights, REFERENCE, PROMPTS[0]) - law_of(weights) @ REWARD_C


def test_on_fresh_samples_it_is_the_regularised_objective(tmp_path):
    assert_same_gradient(run(tmp_path), gradient_of(regularised_objective, POLICY))


def test_on_stale_samples_it_is_the_variance_under_the_old_law(tmp_path):
    """No ratio to the policy that sampled: with one, the law would be the policy's."""
    actual = run(tmp_path, sampler=OTHER, num_iterations=2)
    assert_same_gradient(actual, gradient_of(lambda w: half_variance(w, FOREIGN), POLICY))


def test_a_group_of_two_origins(tmp_path):
    """One completion from elsewhere, one of the policy: half the squared difference of returns."""
    own = law_of(POLICY)

    def objective(weights):
        R_C = returns(weights)
        square_CC = (R_C[:, None] - R_C[None, :]).square()
        return (FOREIGN[:, None] * own[None, :] * square_CC).sum() / (4 * BETA)

    actual = run(tmp_path, laws=[FOREIGN, own])
    assert_same_gradient(actual, gradient_of(objective, POLICY))


@pytest.mark.parametrize("G", [2, 3])
def test_full_differentiates_the_law_too(G, tmp_path):
    actual = run(tmp_path, mode="full", num_generations=G)
    assert_same_gradient(actual, gradient_of(lambda w: half_variance(w, law_of(w)), POLICY))


class Greatest(Recorder):
    """Keeps the greatest gradient of any group, where a mean might hide that they cancel."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        self.total = torch.maximum(self.total, model.lm_head.weight.grad.abs())


@pytest.mark.parametrize("loss", [{}, {"mode": "full"}, {"loss_type": "copg"}], ids=str)
def test_at_the_optimum_each_group_has_gradient_zero(loss, monkeypatch, tmp_path):
    """Every pair of completions is visited; away from the optimum it has a gradient."""
    monkeypatch.setattr("tests.exact.Recorder", Greatest)
    optimum, anyone = table_of(OPTIMUM), torch.full((len(COMPLETIONS),), 1e-9)
    assert (law_of(optimum) - OPTIMUM).abs().max() < 1e-12
    gradient = run(tmp_path / "optimum", policy=optimum, laws=[anyone] * 2, **loss)
    assert gradient.abs().max() < 1e-6
    gradient = run(tmp_path / "elsewhere", laws=[anyone] * 2, **loss)
    assert gradient.abs().max() > 0.1
