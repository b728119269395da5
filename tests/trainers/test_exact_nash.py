"""Through the trainer, each algorithm for preference games has its definition's expected gradient.

What answers and what it is asked against are held fixed, as the papers hold them. Matrices `(C, C)`
hold P(row ≻ column), or a row per winner and a column per loser.
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
    TOKENIZER,
    A,
    B,
    Enumeration,
    assert_same_gradient,
    cosine,
    differences,
    gradient_of,
    group_settings,
    law_of,
    only,
    sequence_kl,
    sequence_logps,
    table,
    table_of,
)
from trl_ext import NashConfig, NashTrainer, OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.trainers import nash

POLICY, REFERENCE, OTHER, TARGET, HALF_STEP = (table(seed) for seed in (1, 2, 3, 4, 5))
BETA, ETA = 0.5, 0.8
C = len(COMPLETIONS)
TEXTS = [TOKENIZER.decode(completion, skip_special_tokens=True) for completion in COMPLETIONS]


def preferences():
    """`(C, C)`, intransitive and with one tie; rounded, since answers travel in float32."""
    noise = torch.randn(C, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    preference_CC = (torch.sigmoid(noise - noise.T) * 2**20).round() / 2**20
    preference_CC[1, 4] = preference_CC[4, 1] = 0.5
    return preference_CC


PREFERENCE = preferences()
INDIFFERENT = torch.full((C, C), 0.5, dtype=torch.float64)


def judge_of(preference_CC):
    def judge(prompts, first, second):
        places = zip(map(TEXTS.index, first), map(TEXTS.index, second), strict=True)
        answers = [preference_CC[i, j].item() for i, j in places]
        return [None if math.isnan(answer) else answer for answer in answers]

    return judge


def run(
    folder,
    algorithm,
    preference=PREFERENCE,
    policy=POLICY,
    reference=REFERENCE,
    sampler=None,
    trainer=NashTrainer,
    laws=None,
    **options,
):
    """Expected gradient; given a sampler, in the second iteration on its completions."""
    options |= dict(algorithm=algorithm, judge=judge_of(preference))
    options |= {} if sampler is None else dict(num_iterations=2)
    options = group_settings(**options)
    game = Enumeration(
        trainer,
        lambda f: NashConfig(f, **options),
        policy,
        reference if options.get("beta") else None,
        reward=None,
        sampler=sampler,
        laws=laws,
    )
    return game.expected_gradient(str(folder))


def log_ratio(weights, anchor):
    return sequence_logps(weights) - sequence_logps(anchor)


def game_gradient(opponent_C, beta=BETA):
    """−∇(E P(y ≻ opponent) − 1/2 − β KL(π‖ref)), the opponent held fixed."""

    def objective(weights):
        wins = law_of(weights) @ (PREFERENCE @ opponent_C - 0.5)
        return beta * sequence_kl(weights, REFERENCE, PROMPTS[0]) - wins

    return gradient_of(objective, POLICY)


def mixture(policy, c=0.25):
    """Nash-MD's opponent as a table: normalised token by token."""
    return (1 - c) * policy.log_softmax(0) + c * REFERENCE.log_softmax(0)


@pytest.mark.parametrize("G", [2, 3])
def test_spo_is_the_self_play_gradient(G, tmp_path):
    actual = run(tmp_path, "spo", beta=BETA, num_generations=G)
    assert_same_gradient(actual, game_gradient(law_of(POLICY)))


def test_spo_without_a_reference(tmp_path):
    expected = game_gradient(law_of(POLICY), beta=0.0)
    assert_same_gradient(run(tmp_path, "spo", beta=0.0), expected)


def test_spo_off_policy_plays_against_the_samples(tmp_path):
    """Exact at the current policy, its KL included; the opponent is the policy that sampled."""
    actual = run(tmp_path, "spo", beta=BETA, sampler=OTHER)
    assert_same_gradient(actual, game_gradient(law_of(OTHER)))


def test_nash_md_plays_against_the_mixture(tmp_path):
    opponent_C = law_of(mixture(POLICY))
    options = dict(beta=BETA, mixture_coefficient=0.25, laws=[law_of(POLICY), opponent_C])
    assert_same_gradient(run(tmp_path, "nash_md", **options), game_gradient(opponent_C))


def test_nash_md_off_policy_plays_against_the_mixture_that_answered(tmp_path):
    opponent_C = law_of(mixture(OTHER))
    options = dict(beta=BETA, mixture_coefficient=0.25, laws=[law_of(OTHER), opponent_C])
    actual = run(tmp_path, "nash_md", sampler=OTHER, **options)
    assert_same_gradient(actual, game_gradient(opponent_C))


def test_each_of_the_first_half_meets_all_of_the_second(tmp_path):
    """Four completions, two of which are always the same."""
    opponent_C, own, others = law_of(mixture(POLICY)), (A, B), (B, EOS)
    laws = [law_of(POLICY), only(own), opponent_C, only(others)]
    actual = run(tmp_path, "nash_md", beta=BETA, num_generations=4, laws=laws)
    met_C = (opponent_C + only(others)) / 2
    advantage_C = PREFERENCE @ met_C - 0.5 - BETA * log_ratio(POLICY, REFERENCE)
    weight_C = (law_of(POLICY) + only(own)) / 2 * advantage_C
    assert_same_gradient(actual, gradient_of(lambda w: -weight_C @ sequence_logps(w), POLICY))


class TokenByToken(NashTrainer):
    """TRL's former Nash-MD: each token's log-ratio multiplies that token's score only."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._scored_last = scored[0]
        return scored

    def group_loss(self, group):
        ref_logp = group.stored["ref_logp"]
        logp = self._scored_last.view_as(ref_logp)
        loss = BETA * (logp - ref_logp).detach() * logp * group.stored["completion_mask"]
        return loss.sum(2).mean(1), {}


# Two tables whose KL lies in the second token: there the two forms are far apart.
NEARER, PULL = table(2), table(3)


def regulariser(folder, trainer=NashTrainer):
    """Against a judge that sees no difference nothing else is left."""
    options = dict(policy=NEARER, reference=PULL, laws=[law_of(NEARER), law_of(PULL)])
    return run(folder, "nash_md", INDIFFERENT, trainer=trainer, beta=BETA, **options)


def kl_gradient():
    return BETA * gradient_of(lambda w: sequence_kl(w, PULL, PROMPTS[0]), NEARER)


def test_the_regulariser_is_the_sequence_kl(tmp_path):
    assert_same_gradient(regulariser(tmp_path), kl_gradient())


def test_the_form_that_trl_dropped_is_not_the_gradient_of_the_kl(tmp_path):
    actual, expected = regulariser(tmp_path, TokenByToken), kl_gradient()
    assert (actual - expected).norm() > 0.6 * expected.norm()
    assert cosine(actual, expected) < 0.8


class Anchored(NashTrainer):
    """A step that began elsewhere."""

    def take_snapshot(self, name):
        super().take_snapshot(name)
        if name == "target":
            self.snapshots[name].lm_head.weight.data.copy_(TARGET)


def mirror_prox(folder, sampler=None):
    laws = [law_of(POLICY if sampler is None else sampler), law_of(HALF_STEP)]
    options = dict(beta=BETA, eta=ETA, proximal_steps=2, laws=laws)
    return run(folder, "nash_mp", sampler=sampler, trainer=Anchored, **options)


def mirror_prox_gradient():
    pull = gradient_of(lambda w: sequence_kl(w, TARGET, PROMPTS[0]), POLICY)
    return game_gradient(law_of(HALF_STEP)) + BETA / ETA * pull


@pytest.mark.parametrize("sampler", [None, OTHER], ids=["on_policy", "off_policy"])
def test_nash_mp_has_a_second_pull_to_where_the_step_began(sampler, tmp_path):
    assert_same_gradient(mirror_prox(tmp_path, sampler), mirror_prox_gradient())


def test_unjudged_completions_have_no_gradient(tmp_path):
    unknown, preference_CC = COMPLETIONS.index((B, EOS)), PREFERENCE.clone()
    preference_CC[unknown], preference_CC[:, unknown] = math.nan, math.nan
    law_C = law_of(POLICY)
    advantage_CC = preference_CC - 0.5 - BETA * log_ratio(POLICY, REFERENCE)[:, None]
    weight_C = law_C * (advantage_CC.nan_to_num() @ law_C)
    actual = run(tmp_path, "spo", preference_CC, beta=BETA)
    assert_same_gradient(actual, gradient_of(lambda w: -weight_C @ sequence_logps(w), POLICY))


TAU = 0.3


def inpo_loss(old):
    """Loss (7) of the paper, a regression on win rates; π_t is what sampled."""
    law_C = law_of(old)
    win_C = PREFERENCE @ law_C

    def objective(weights):
        share = TAU / ETA
        anchor_C = share * sequence_logps(REFERENCE) + (1 - share) * sequence_logps(old)
        h_CC = differences(sequence_logps(weights) - anchor_C)
        return (law_C[:, None] * law_C[None, :] * (h_CC - differences(win_C) / ETA) ** 2).sum()

    return objective


@pytest.mark.parametrize("sampler", [None, OTHER], ids=["on_policy", "off_policy"])
def test_inpo_is_the_regression_on_win_rates(sampler, tmp_path):
    actual = run(tmp_path, "inpo", beta=TAU, eta=ETA, sampler=sampler)
    objective = inpo_loss(POLICY if sampler is None else sampler)
    assert_same_gradient(actual, gradient_of(objective, POLICY))


def test_inpo_rests_at_its_iterate(tmp_path):
    """π_{t+1} ∝ exp(P(y ≻ π_t)/η) ref^(τ/η) π_t^(1−τ/η)."""
    share, win_C = TAU / ETA, PREFERENCE @ law_of(OTHER)
    tilt_C = share * sequence_logps(REFERENCE) + (1 - share) * sequence_logps(OTHER)
    iterate = table_of((win_C / ETA + tilt_C).softmax(0))
    actual = run(tmp_path, "inpo", beta=TAU, eta=ETA, sampler=OTHER, policy=iterate)
    assert actual.norm() < 1e-6 * gradient_of(inpo_loss(OTHER), POLICY).norm()


def nash_policy():
    """π* ∝ ref exp(P(y ≻ π*)/β)."""
    policy_C = law_of(REFERENCE)
    for _ in range(1000):
        best_C = (PREFERENCE @ policy_C / BETA + sequence_logps(REFERENCE)).softmax(0)
        policy_C = (policy_C * best_C).sqrt()
        policy_C = policy_C / policy_C.sum()
    return policy_C


def online_ipo(folder, policy=POLICY):
    labels = dict(judge=judge_of(PREFERENCE), soft_labels=True)
    options = group_settings(beta=BETA, loss_type="ipo", **labels)
    pairs = Enumeration(
        OnlineDPOTrainer, lambda f: OnlineDPOConfig(f, **options), policy, REFERENCE, reward=None
    )
    return pairs.expected_gradient(str(folder))


def test_online_ipo_is_self_play(tmp_path):
    """Trainer against trainer: ∇IPO = (4/β) ∇SPO as losses."""
    actual, self_play = online_ipo(tmp_path), run(tmp_path, "spo", beta=BETA)
    assert_same_gradient(actual, 4 / BETA * self_play)
    assert_same_gradient(actual, 4 / BETA * game_gradient(law_of(POLICY)))


def test_self_play_rests_at_the_nash_policy(tmp_path):
    nash_C = nash_policy()
    scale, found = game_gradient(law_of(POLICY)).norm(), table_of(nash_C)
    assert run(tmp_path, "spo", beta=BETA, policy=found).norm() < 1e-6 * scale
    assert online_ipo(tmp_path, found).norm() < 1e-6 * 4 / BETA * scale


def groups(G):
    """Positions of G completions, and the probability that the sampler gives them."""
    law_C = law_of(OTHER)
    for group in itertools.product(range(C), repeat=G):
        yield torch.tensor(group), law_C[list(group)].prod()


def win_rates(group, preference_CC):
    others_GG = preference_CC[group][:, group].fill_diagonal_(0)
    return others_GG.sum(1) / (len(group) - 1)


def dno_gradient(G, policy=POLICY, preference=PREFERENCE):
    """Cross-entropy between differences of the group's own win rates and of log π/π_t."""

    def objective(weights):
        total, pairs_GG = 0.0, 1 - torch.eye(G)
        for group, mass in groups(G):
            margin_GG = ETA * differences(log_ratio(weights, OTHER)[group])
            label_GG = torch.sigmoid(differences(win_rates(group, preference)))
            entropy_GG = label_GG * logsigmoid(margin_GG) + (1 - label_GG) * logsigmoid(-margin_GG)
            total = total - mass * (entropy_GG * pairs_GG).sum() / pairs_GG.sum()
        return total

    return gradient_of(objective, policy)


@pytest.mark.parametrize("G", [2, 3])
def test_dno_is_the_cross_entropy_of_the_groups_win_rates(G, tmp_path):
    actual = run(tmp_path, "dno", eta=ETA, sampler=OTHER, num_generations=G)
    assert_same_gradient(actual, dno_gradient(G))


@pytest.mark.parametrize("G", [2, 3])
def test_dno_rests_where_the_groups_win_rates_say(G, tmp_path):
    """With P(y ≻ y′) = 1/2 + s(y) − s(y′) a group's win rates differ by G/(G−1) times as much as
    those against the policy: two completions are each among the other's opponents."""
    score_C = torch.tensor([0.0, 8.0, 4.0, 2.0, 12.0, 6.0, 16.0]).double() / 64
    preference_CC = 0.5 + differences(score_C)
    tilt_C = G / (G - 1) * score_C / ETA
    rest = table_of((sequence_logps(OTHER) + tilt_C).softmax(0))
    options = dict(policy=rest, sampler=OTHER, num_generations=G)
    actual = run(tmp_path, "dno", preference_CC, eta=ETA, **options)
    away = dno_gradient(G, preference=preference_CC).norm()
    assert away > 1e-3 and actual.norm() < 1e-6 * away


def dno_prct_gradient(G):
    """Of the best and the worst by win rate."""
    law_CC = torch.zeros(C, C, dtype=torch.float64)
    for group, mass in groups(G):
        win_G = win_rates(group, PREFERENCE)
        best, worst = group[win_G.argmax()], group[win_G.argmin()]
        law_CC[best, worst] += mass * (win_G.max() > win_G.min())

    def objective(weights):
        return -(law_CC * logsigmoid(ETA * differences(log_ratio(weights, OTHER)))).sum()

    return gradient_of(objective, POLICY)


@pytest.mark.parametrize("G", [2, 3])
def test_dno_prct_contrasts_the_best_with_the_worst(G, tmp_path):
    actual = run(tmp_path, "dno_prct", eta=ETA, sampler=OTHER, num_generations=G)
    assert_same_gradient(actual, dno_prct_gradient(G))


def assert_caught(actual, expected):
    with pytest.raises(AssertionError):
        assert_same_gradient(actual, expected)


def test_mutation_importance_ratio_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(
        nash, "importance_weighted_loss", lambda logp_PM, _, advantage_PM: -advantage_PM * logp_PM
    )
    actual = run(tmp_path, "spo", beta=BETA, sampler=OTHER)
    assert_caught(actual, game_gradient(law_of(OTHER)))


def test_mutation_own_sample_among_the_opponents(tmp_path, monkeypatch):
    monkeypatch.setattr(nash, "win_rates", lambda preferences_PGG: preferences_PGG.nanmean(2))
    actual = run(tmp_path, "spo", beta=BETA)
    assert_caught(actual, game_gradient(law_of(POLICY)))


def hard(pairs):
    return dataclasses.replace(pairs, label_PN=torch.ones_like(pairs.label_PN))


@pytest.mark.parametrize("wrong", [lambda pairs: pairs, hard], ids=["ties_left_out", "hard_labels"])
def test_mutation_of_the_labels(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(nash, "soft", lambda pairs, _: wrong(pairs))
    actual = run(tmp_path, "inpo", beta=TAU, eta=ETA, sampler=OTHER)
    assert_caught(actual, gradient_of(inpo_loss(OTHER), POLICY))


def test_mutation_reference_of_the_iterate_only(tmp_path, monkeypatch):
    monkeypatch.setattr(nash, "mixed_reference", lambda ref_logp, old_logp, tau, eta: old_logp)
    actual = run(tmp_path, "inpo", beta=TAU, eta=ETA, sampler=OTHER)
    assert_caught(actual, gradient_of(inpo_loss(OTHER), POLICY))
