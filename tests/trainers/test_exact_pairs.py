"""Through the trainer, each loss of Online DPO has its definition's expected gradient.

Matrices `(C, C)` have a row per winner and a column per loser.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.exact import (
    COMPLETIONS,
    EOS,
    PROMPTS,
    A,
    B,
    Enumeration,
    assert_same_gradient,
    differences,
    gradient_of,
    group_settings,
    law_of,
    only,
    sequence_kl,
    sequence_logps,
    table,
)
from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.objectives.pair_rules import best_worst
from trl_ext.trainers import online_dpo

POLICY, REFERENCE, OTHER = table(1), table(2), table(3)
NEAR = POLICY + 0.1 * OTHER.clamp(min=-10)
BETA = 0.5
REWARDS = dict(zip(COMPLETIONS, [0.1, 1.0, 0.25, 0.5, -0.5, 0.75, 2.0], strict=True))
TIED = dict(zip(COMPLETIONS, [0.0, 1.0, 0.25, 0.5, 0.0, 0.5, 1.0], strict=True))
LENGTHS = torch.tensor([float(len(completion)) for completion in COMPLETIONS])


def case(rewards=REWARDS, sampler=None, prompt=PROMPTS[0], laws=None, columns=None, **options):
    options = group_settings(**{"beta": BETA, **options})
    return Enumeration(
        OnlineDPOTrainer,
        lambda f: OnlineDPOConfig(f, **options),
        POLICY,
        REFERENCE if options["beta"] else None,
        prompt,
        None if columns else rewards.__getitem__,
        sampler,
        laws,
        columns or {},
    )


def run(folder, *args, **options):
    return case(*args, **options).expected_gradient(str(folder))


def log_ratio(weights, prompt=PROMPTS[0], normalised=False):
    rho_C = sequence_logps(weights, prompt) - sequence_logps(REFERENCE, prompt)
    return rho_C / LENGTHS if normalised else rho_C


def winner_logp(weights, prompt=PROMPTS[0]):
    return sequence_logps(weights, prompt)[:, None].expand(-1, len(COMPLETIONS))


def values(rewards):
    return torch.tensor([math.nan if r is None else r for r in rewards.values()]).double()


def drawn_pairs(rewards):
    """`(C, C)`: probability that two samples are this winner and this loser; a tie is neither."""
    law_C = law_of(POLICY)
    return 2 * law_C[:, None] * law_C[None, :] * (differences(values(rewards)) > 0)


def gradient_of_pairs(weights_CC, loss):
    """Which pairs are drawn is held fixed."""
    return gradient_of(lambda w: (weights_CC * loss(w)).sum(), POLICY)


def of_delta(function):
    return lambda w: function(differences(log_ratio(w)))


def robust(epsilon):
    def loss(delta):
        kept, flipped = logsigmoid(BETA * delta), logsigmoid(-BETA * delta)
        return -((1 - epsilon) * kept - epsilon * flipped) / (1 - 2 * epsilon)

    return loss


def f_dpo(f):
    """f-DPO from f itself: its derivative is autograd's."""

    def loss(weights):
        u_C = log_ratio(weights).exp()
        (slope_C,) = torch.autograd.grad(f(u_C).sum(), u_C, create_graph=True)
        return -logsigmoid(BETA * differences(slope_C))

    return loss


def jensen_shannon(u):
    return u * u.log() - (u + 1) * ((u + 1) / 2).log()


def alpha_divergence(alpha):
    return lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def sigmoid(delta):
    return -logsigmoid(BETA * delta)


def hinge(delta):
    return (1 - BETA * delta).clamp(min=0)


def ipo(delta):
    return (delta - 1 / (2 * BETA)) ** 2


def ipo_normalised(delta):
    return (BETA * delta - 1 / 2) ** 2


LOSSES = {
    "sigmoid": ({}, of_delta(sigmoid)),
    "ipo": ({}, of_delta(ipo)),
    "ipo_normalised": ({}, of_delta(ipo_normalised)),
    "hinge": ({}, of_delta(hinge)),
    "robust": (dict(label_smoothing=0.2), of_delta(robust(0.2))),
    "rpo": (dict(rpo_eta=0.3), lambda w: of_delta(sigmoid)(w) - 0.3 * BETA * winner_logp(w)),
    "best_of_k_sft": ({}, lambda w: -winner_logp(w)),
}
DIVERGENCES = {
    "reverse_kl": ({}, f_dpo(lambda u: u * u.log())),
    "forward_kl": ({}, f_dpo(lambda u: -u.log())),
    "js": ({}, f_dpo(jensen_shannon)),
    "alpha": (dict(f_alpha=0.3), f_dpo(alpha_divergence(0.3))),
}


@pytest.mark.parametrize("rewards", [REWARDS, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_definitions(name, rewards, tmp_path):
    options, loss = LOSSES[name]
    actual = run(tmp_path, rewards, loss_type=name, **options)
    assert_same_gradient(actual, gradient_of_pairs(drawn_pairs(rewards), loss))


def test_the_hinge_has_pairs_on_either_side():
    margins = BETA * differences(log_ratio(POLICY))[drawn_pairs(REWARDS) > 0]
    assert (margins > 1).any() and (margins < 1).any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_their_definitions(name, tmp_path):
    options, loss = DIVERGENCES[name]
    actual = run(tmp_path, f_divergence=name, **options)
    assert_same_gradient(actual, gradient_of_pairs(drawn_pairs(REWARDS), loss))


@pytest.mark.parametrize("function", [sigmoid, ipo, hinge])
def test_length_normalised_is_the_mean_log_ratio(function, tmp_path):
    actual = run(tmp_path, loss_type=function.__name__, length_normalised=True)
    expected = gradient_of_pairs(
        drawn_pairs(REWARDS), lambda w: function(differences(log_ratio(w, normalised=True)))
    )
    assert_same_gradient(actual, expected)
    assert (actual - run(tmp_path, loss_type=function.__name__)).norm() > 0.1 * actual.norm()


def test_another_prompt_has_no_other_scale(tmp_path):
    prompt = PROMPTS[1]
    law_C = law_of(POLICY, prompt)
    drawn = 2 * law_C[:, None] * law_C[None, :] * (differences(values(REWARDS)) > 0)
    expected = gradient_of_pairs(drawn, lambda w: sigmoid(differences(log_ratio(w, prompt))))
    assert_same_gradient(run(tmp_path, prompt=prompt), expected)


def chosen_by(rule, rewards, laws):
    """`(C, C)`: expected weight of each winner and loser, group by group."""
    reward_C, weights_CC = values(rewards), torch.zeros(len(COMPLETIONS), len(COMPLETIONS)).double()
    for group in itertools.product(range(len(COMPLETIONS)), repeat=len(laws)):
        mass = math.prod(float(law[i]) for law, i in zip(laws, group, strict=True))
        pairs = rule(group, reward_C) if mass else []
        for winner, loser in pairs:
            weights_CC[winner, loser] += mass / len(pairs)
    return weights_CC


def of_best_and_worst(group, reward_C):
    scored = sorted((i for i in group if not reward_C[i].isnan()), key=lambda i: reward_C[i])
    return (
        [(scored[-1], scored[0])] if scored and reward_C[scored[-1]] > reward_C[scored[0]] else []
    )


def of_all(group, reward_C):
    ordered = itertools.permutations(group, 2)
    return [(i, j) for i, j in ordered if reward_C[i] > reward_C[j]]


@pytest.mark.parametrize("loss_type", ["sigmoid", "best_of_k_sft"])
@pytest.mark.parametrize(
    ("pair_rule", "rule"), [("best_worst", of_best_and_worst), ("all_pairs", of_all)]
)
def test_pair_rules_of_three(pair_rule, rule, loss_type, tmp_path):
    actual = run(tmp_path, pair_rule=pair_rule, loss_type=loss_type, num_generations=3)
    weights_CC = chosen_by(rule, REWARDS, [law_of(POLICY)] * 3)
    assert_same_gradient(actual, gradient_of_pairs(weights_CC, LOSSES[loss_type][1]))


def test_first_two_look_at_no_third(tmp_path):
    """The best, if it comes third, changes nothing."""
    law_C, best = law_of(POLICY), max(COMPLETIONS, key=REWARDS.__getitem__)
    options = dict(num_generations=3, laws=[law_C, law_C, only(best)])
    expected = gradient_of_pairs(drawn_pairs(REWARDS), LOSSES["sigmoid"][1])
    assert_same_gradient(run(tmp_path, pair_rule="first_two", **options), expected)
    others = run(tmp_path, pair_rule="best_worst", **options)
    assert (others - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("pair_rule", "rule"), [("best_worst", of_best_and_worst), ("all_pairs", of_all)]
)
def test_unscorable_completions_are_in_no_pair(pair_rule, rule, tmp_path):
    rewards, law_C = {**REWARDS, (B, EOS): None}, law_of(POLICY)
    laws = [law_C, law_C, only((A, B))]
    actual = run(tmp_path, rewards, pair_rule=pair_rule, num_generations=3, laws=laws)
    weights_CC = chosen_by(rule, rewards, laws)
    assert_same_gradient(actual, gradient_of_pairs(weights_CC, LOSSES["sigmoid"][1]))


@pytest.mark.parametrize(("rule", "ended"), [("subtract", None), ("replace", -1.0)])
def test_completions_without_end_are_worth_less(rule, ended, tmp_path):
    cut = [completion for completion in COMPLETIONS if completion[-1] != EOS]
    lowered = {c: ended if ended is not None else REWARDS[c] - 1.5 for c in cut}
    value = 1.5 if ended is None else ended
    actual = run(tmp_path, missing_eos=rule, missing_eos_value=value)
    expected = gradient_of_pairs(drawn_pairs({**REWARDS, **lowered}), LOSSES["sigmoid"][1])
    assert_same_gradient(actual, expected)


@pytest.mark.parametrize("function", [sigmoid, ipo, ipo_normalised, hinge])
def test_soft_labels_are_the_expectation_over_labels(function, tmp_path):
    """Σ P(y) P(y′) [P(y ≻ y′) ℓ(Δ) + P(y′ ≻ y) ℓ(−Δ)], undecided pairs included."""
    law_C, preference_CC = law_of(POLICY), torch.sigmoid(differences(values(TIED)))
    weights_CC = 2 * law_C[:, None] * law_C[None, :] * preference_CC
    options = dict(judge="bradley_terry", soft_labels=True, loss_type=function.__name__)
    actual = run(tmp_path, TIED, **options)
    assert_same_gradient(actual, gradient_of_pairs(weights_CC, of_delta(function)))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "rpo", "best_of_k_sft", "rloo"])
def test_without_a_winner_nothing_is_learned(loss_type, tmp_path):
    """A policy gradient still has its KL, unless β is 0."""
    beta = 0.0 if loss_type == "rloo" else BETA
    constant = dict.fromkeys(COMPLETIONS, 0.7)
    tied = case(constant, beta=beta, loss_type=loss_type, logging_steps=1)
    assert tied.expected_gradient(str(tmp_path)).abs().max() == 0
    if loss_type != "rloo":
        assert {log["frac_ties"] for log in tied.logs if "frac_ties" in log} == {1.0}


def test_the_loss_is_a_mean_over_prompts_with_ties_among_them(tmp_path, monkeypatch):
    """Beside a prompt that is always a tie, another weighs half, not all."""
    law_C, always = law_of(POLICY), only((A, B))
    batch = dict(laws=[law_C, law_C, always, always], per_device_train_batch_size=4)
    expected = gradient_of_pairs(drawn_pairs(REWARDS), LOSSES["sigmoid"][1]) / 2
    assert_same_gradient(run(tmp_path, **batch), expected)

    def over_untied_prompts(args, group):
        loss_P, metrics = pair_loss(args, group)
        untied = (group.stored["weight"] > 0).any(1).sum()
        return loss_P * len(loss_P) / untied.clamp(min=1), metrics

    pair_loss = online_dpo.pair_loss
    monkeypatch.setattr(online_dpo, "pair_loss", over_untied_prompts)
    assert_same_gradient(run(tmp_path, **batch), 2 * expected)


def policy_gradient(rewards=REWARDS):
    """−∇(E r − β KL(π‖ref)), both by enumeration."""
    return gradient_of(
        lambda w: BETA * sequence_kl(w, REFERENCE, PROMPTS[0]) - law_of(w) @ values(rewards), POLICY
    )


@pytest.mark.parametrize("G", [2, 3])
def test_rloo_is_the_policy_gradient_with_its_kl(G, tmp_path):
    actual = run(tmp_path, loss_type="rloo", num_generations=G)
    assert_same_gradient(actual, policy_gradient())


def test_proximal_rloo_on_policy_is_the_policy_gradient(tmp_path):
    assert_same_gradient(run(tmp_path, loss_type="proximal_rloo"), policy_gradient())


def ratios(sampler):
    return (sequence_logps(POLICY) - sequence_logps(sampler)).exp()


def test_proximal_rloo_is_exact_off_policy_where_nothing_is_clipped(tmp_path):
    """In the second of two iterations: the gradient at the current policy, its KL included."""
    options, epsilon = dict(sampler=NEAR, num_iterations=2), 0.9
    assert ((ratios(NEAR) - 1).abs() < epsilon).all()
    actual = run(tmp_path, loss_type="proximal_rloo", epsilon=epsilon, **options)
    assert_same_gradient(actual, policy_gradient())
    stale = run(tmp_path, loss_type="rloo", **options)
    assert (stale - policy_gradient()).norm() > 0.01 * policy_gradient().norm()


def test_proximal_rloo_clips_as_defined(tmp_path):
    epsilon, law_C = 0.2, law_of(OTHER)
    return_C = values(REWARDS) - BETA * log_ratio(POLICY)
    advantage_CC = differences(return_C)

    def objective(weights):
        ratio_C = (sequence_logps(weights) - sequence_logps(OTHER)).exp()[:, None]
        clipped_C = ratio_C.clamp(1 - epsilon, 1 + epsilon)
        gain_CC = torch.minimum(ratio_C * advantage_CC, clipped_C * advantage_CC)
        return -(law_C[:, None] * law_C[None, :] * gain_CC).sum()

    options = dict(epsilon=epsilon, sampler=OTHER, num_iterations=2)
    actual = run(tmp_path, loss_type="proximal_rloo", **options)
    assert ((ratios(OTHER) - 1).abs() > epsilon).any()
    assert_same_gradient(actual, gradient_of(objective, POLICY))


def test_unscorable_completions_have_no_policy_gradient(tmp_path):
    """Of two only pairs that are both scored have an advantage."""
    dropped = (B, EOS)
    kept_C = torch.tensor([float(c != dropped) for c in COMPLETIONS]).double()
    return_C, law_C = values(REWARDS) - BETA * log_ratio(POLICY), law_of(POLICY) * kept_C
    weights_CC = law_C[:, None] * law_C[None, :] * differences(return_C)
    actual = run(tmp_path, {**REWARDS, dropped: None}, loss_type="rloo")
    assert_same_gradient(actual, gradient_of_pairs(-weights_CC, winner_logp))


def xpo_gradient(alpha, rewards=REWARDS):
    """y ~ π, ỹ ~ ref; the bonus is the reference sample's, whichever won, if any."""
    drawn_CC = law_of(POLICY)[:, None] * law_of(REFERENCE)[None, :]
    lead_CC = differences(values(rewards)).sign()

    def objective(weights):
        pair_CC = -logsigmoid(BETA * lead_CC * differences(log_ratio(weights)))
        bonus_CC = alpha * sequence_logps(weights)[None, :]
        return (drawn_CC * (lead_CC.abs() * pair_CC + bonus_CC)).sum()

    return gradient_of(objective, POLICY)


@pytest.mark.parametrize("rewards", [REWARDS, TIED], ids=["distinct", "tied"])
def test_xpo_is_exact_with_samples_of_policy_and_reference(rewards, tmp_path):
    alpha, laws = 0.3, [law_of(POLICY), law_of(REFERENCE)]
    actual = run(tmp_path, rewards, loss_type="xpo", xpo_alpha=alpha, laws=laws)
    assert_same_gradient(actual, xpo_gradient(alpha, rewards))


@pytest.mark.parametrize("K", [4, 5])
def test_hybrid_is_dpo_on_the_dataset_and_the_exact_kl(K, tmp_path):
    """HyPO, the completions of the dataset tokenised, those of the sampler dictated."""
    assert_same_gradient(hybrid(tmp_path, K), hybrid_gradient(kl_coef=0.7))


def hybrid(folder, K=4):
    columns = {"chosen": "a", "rejected": ""}
    options = dict(pair_source="hybrid", kl_coef=0.7, num_generations=K)
    return run(folder, columns=columns, **options)


def hybrid_gradient(kl_coef):
    chosen, rejected = COMPLETIONS.index((A, EOS)), COMPLETIONS.index((EOS,))

    def objective(weights):
        rho_C = log_ratio(weights)
        kl = sequence_kl(weights, REFERENCE, PROMPTS[0])
        return sigmoid(rho_C[chosen] - rho_C[rejected]) + kl_coef * kl

    return gradient_of(objective, POLICY)


def assert_caught(actual, expected):
    with pytest.raises(AssertionError):
        assert_same_gradient(actual, expected)


def test_mutation_own_sample_in_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(
        online_dpo, "leave_one_out_advantage", lambda r: (r - r.mean(1, keepdim=True)).detach()
    )
    actual = run(tmp_path, loss_type="rloo")
    assert_same_gradient(actual, policy_gradient() / 2)
    assert_caught(actual, policy_gradient())


def test_mutation_tie_trained_on(tmp_path, monkeypatch):
    def every_pair(scores_PG, **options):
        pairs = best_worst(scores_PG, **options)
        return dataclasses.replace(pairs, weight_PN=torch.ones_like(pairs.weight_PN))

    monkeypatch.setitem(online_dpo.PAIR_RULES, "best_worst", every_pair)
    expected = gradient_of_pairs(drawn_pairs(TIED), LOSSES["best_of_k_sft"][1])
    assert_caught(run(tmp_path, TIED, loss_type="best_of_k_sft"), expected)


def test_mutation_kl_of_the_samples_not_held_fixed(tmp_path, monkeypatch):
    def undetached(logp_PM, ref_logp_PM):
        log_ratio_PM = logp_PM - ref_logp_PM
        others_PM = (log_ratio_PM.sum(1, keepdim=True) - log_ratio_PM) / (logp_PM.size(1) - 1)
        return ((log_ratio_PM - others_PM) * logp_PM).mean(1)

    monkeypatch.setattr(online_dpo, "leave_one_out_kl_loss", undetached)
    assert_caught(hybrid(tmp_path), hybrid_gradient(kl_coef=0.7))


def test_mutation_ipo_of_the_margin(tmp_path, monkeypatch):
    """βΔ in the place of Δ: another optimum, which is easily overlooked."""
    loss = online_dpo.ipo_loss
    monkeypatch.setattr(online_dpo, "ipo_loss", lambda d, beta, form: loss(beta * d, beta, form))
    expected = gradient_of_pairs(drawn_pairs(REWARDS), LOSSES["ipo"][1])
    assert_caught(run(tmp_path, loss_type="ipo"), expected)


def test_mutation_bonus_on_the_winner(tmp_path, monkeypatch):
    """XPO's bonus belongs to the reference's sample, whichever won."""
    loss = online_dpo._loss_of_pairs

    def with_bonus(args, delta, label, chosen_logp):
        return loss(args, delta, label, chosen_logp) + args.xpo_alpha * chosen_logp

    monkeypatch.setattr(online_dpo, "_loss_of_pairs", with_bonus)
    monkeypatch.setattr(online_dpo, "exploration_bonus", lambda logp, alpha: 0.0 * logp)
    laws = [law_of(POLICY), law_of(REFERENCE)]
    actual = run(tmp_path, loss_type="xpo", xpo_alpha=0.3, laws=laws)
    assert_caught(actual, xpo_gradient(0.3))
