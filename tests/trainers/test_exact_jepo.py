"""Through the trainer, JEPO has the expected gradient of its bound.

The thought is the first token: three of them, each with another probability of the answer.
"""

import itertools
import math

import pytest
import torch

from tests.exact import (
    COMPLETIONS,
    EOS,
    PROMPTS,
    SPOKEN,
    A,
    B,
    Enumeration,
    assert_same_gradient,
    gradient_of,
    group_settings,
    law_of,
    table,
    token_logps,
)
from trl_ext import JEPOConfig, JEPOTrainer

POLICY, REFERENCE, OLDER = table(1), table(2), 0.9 * table(1) + 0.1 * table(5).clamp(min=-10)
PROMPT = PROMPTS[0]
EXACT = {
    "marker": "b",  # where the trainer looks for one at all
    "beta": 0.0,
    "format_penalty": 0.0,
    "advantage_clip": math.inf,
    "advantage_scale": "none",
    "answer_prefix": "",
}


class FirstToken(JEPOTrainer):
    """The marker of every completion is its first token."""

    def _thought_length(self, token_ids):
        return 1


def run(folder, trainer=FirstToken, reward=None, sampler=None, **options):
    options = group_settings(**{**EXACT, **options})
    case = Enumeration(
        trainer,
        lambda f: JEPOConfig(f, **options),
        POLICY,
        REFERENCE if options["beta"] else None,
        PROMPT,
        reward,
        sampler,
        facts={"answer": "b"},
    )
    return case.expected_gradient(str(folder))


def thoughts(weights):
    """`(C,)`: log π(c|x) of each thought."""
    return torch.stack([token_logps(weights, PROMPT, (c,)).sum() for c in SPOKEN])


def answers(weights):
    """`(C,)`: log π(a*|x, c) of the answer behind each thought, end of sequence included."""
    return torch.stack([token_logps(weights, c, (B, EOS)).sum() for c in SPOKEN])


def bound(weights, n):
    """L_n by enumeration of n thoughts."""
    logp_C, told_C = thoughts(weights), answers(weights)
    total = 0.0
    for index in itertools.product(range(len(SPOKEN)), repeat=n):
        i = list(index)
        total = total + logp_C[i].sum().exp() * (told_C[i].logsumexp(0) - math.log(n))
    return total


def kl_of_thoughts(weights):
    logp_C = thoughts(weights)
    return (logp_C.exp() * (logp_C - thoughts(REFERENCE))).sum()


@pytest.mark.parametrize("n", [2, 3])
def test_multi_is_the_tighter_bound(n, tmp_path):
    actual = run(tmp_path, bound="multi", num_generations=n)
    assert_same_gradient(actual, gradient_of(lambda w: -bound(w, n), POLICY))


@pytest.mark.parametrize("n", [2, 3])
def test_single_is_the_bound_of_one(n, tmp_path):
    actual = run(tmp_path, bound="single", num_generations=n)
    assert_same_gradient(actual, gradient_of(lambda w: -bound(w, 1), POLICY))


def test_the_bounds_are_ordered():
    values = [float(bound(POLICY, n)) for n in (1, 2, 3)]
    exact = float((thoughts(POLICY) + answers(POLICY)).logsumexp(0))
    assert values == sorted(values) and values[-1] < exact


def negative_likelihood(weights):
    """−π(a*|x), the thoughts summed out."""
    return -(thoughts(weights) + answers(weights)).logsumexp(0).exp()


@pytest.mark.parametrize("n", [2, 3])
def test_verifree_is_the_likelihood_of_the_answer(n, tmp_path):
    actual = run(tmp_path, bound="verifree", num_generations=n)
    assert_same_gradient(actual, gradient_of(negative_likelihood, POLICY))


def test_latro_has_the_kl_in_its_reward(tmp_path):
    actual = run(tmp_path, bound="latro", num_generations=2, beta=0.3)
    expected = gradient_of(lambda w: -bound(w, 1) + 0.3 * kl_of_thoughts(w), POLICY)
    assert_same_gradient(actual, expected)


@pytest.mark.parametrize("kl_gradient", ["sequence", "sequence_total"])
def test_the_kl_is_that_of_the_thought(kl_gradient, tmp_path):
    options = {"bound": "multi", "num_generations": 2, "kl_gradient": kl_gradient}
    actual = run(tmp_path, beta=0.3, **options)
    expected = gradient_of(lambda w: -bound(w, 2) + 0.3 * kl_of_thoughts(w), POLICY)
    assert_same_gradient(actual, expected)


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_supervised_term_has_its_weight(coef, tmp_path):
    """The score of the thoughts is the rest of the gradient."""

    def objective(weights):
        logp_C = thoughts(weights)
        score = (logp_C.exp() * answers(weights).detach()).sum()
        supervised = (logp_C.detach().exp() * answers(weights)).sum()
        return -score - coef * supervised

    actual = run(tmp_path, bound="single", num_generations=2, supervised_coef=coef)
    assert_same_gradient(actual, gradient_of(objective, POLICY))


def test_without_a_thought_it_is_supervised_training(tmp_path):

    def objective(weights):
        return -token_logps(weights, PROMPT, (B, EOS)).sum()

    for bound_name in ("single", "multi"):
        options = {"bound": bound_name, "num_generations": 2, "marker": ""}
        actual = run(tmp_path / bound_name, JEPOTrainer, **options)
        assert_same_gradient(actual, gradient_of(objective, POLICY))


def test_on_older_samples_the_score_is_reweighted(tmp_path):
    """Inside the clip: E over the older law of w A ∇log π + ∇log p."""
    old_C = thoughts(OLDER).detach()

    def objective(weights):
        logp_C, told_C = thoughts(weights), answers(weights)
        centred = (told_C[:, None] - told_C[None, :]).detach()
        pair = old_C.exp()[:, None] * old_C.exp()[None, :]
        score = (pair * centred * (logp_C - old_C).exp()[:, None]).sum()
        return -score - (old_C.exp() * told_C).sum()

    options = {"bound": "single", "num_generations": 2, "num_iterations": 2, "epsilon": 0.99}
    actual = run(tmp_path, sampler=OLDER, **options)
    assert_same_gradient(actual, gradient_of(objective, POLICY))


def test_where_a_reward_is_earned_it_is_policy_gradient(tmp_path):
    """Two completions per prompt, and the reward of one only: each kind of group has its share."""
    solving = (B, EOS)

    def reward(completion):
        return float(completion == solving)

    law_C = torch.stack([token_logps(POLICY, PROMPT, c).sum() for c in COMPLETIONS]).exp()

    def objective(weights):
        total = 0.0
        logp_C = torch.stack([token_logps(weights, PROMPT, c).sum() for c in COMPLETIONS])
        for i, j in itertools.product(range(len(COMPLETIONS)), repeat=2):
            pair, mass = (COMPLETIONS[i], COMPLETIONS[j]), law_C[i] * law_C[j]
            if solving in pair:
                difference = reward(pair[0]) - reward(pair[1])
                total = total + mass * difference * (logp_C[i] - logp_C[j]) / 2
                continue
            logp = torch.stack([token_logps(weights, PROMPT, c[:1]).sum() for c in pair])
            told = torch.stack([token_logps(weights, c[0], (B, EOS)).sum() for c in pair])
            score = ((told - told.flip(0)).detach() * logp).sum() / 2
            total = total + mass * (score + told.mean())
        return -total

    options = {"bound": "single", "num_generations": 2, "combine_with_reward": True}
    actual = run(tmp_path, reward=reward, **options)
    assert_same_gradient(actual, gradient_of(objective, POLICY))


@pytest.mark.parametrize("silent", [EOS, A], ids=["one token", "several tokens"])
@pytest.mark.parametrize(("penalty", "beta"), [(0.0, 0.0), (2.0, 0.0), (2.0, 0.3)])
def test_a_completion_without_marker_is_masked_from_the_bound(silent, penalty, beta, tmp_path):
    """It keeps all of its tokens, for the format's reward and the KL."""

    class Silent(JEPOTrainer):
        def _thought_length(self, token_ids):
            return None if token_ids[0] == silent else 1

    marked = [c[0] != silent for c in COMPLETIONS]
    spoken = [c[:1] if ok else c for c, ok in zip(COMPLETIONS, marked, strict=True)]
    mass_CC = law_of(POLICY)[:, None] * law_of(POLICY)[None, :]

    def logps(weights):
        return torch.stack([token_logps(weights, PROMPT, c).sum() for c in spoken])

    def objective(weights):
        now_C, total = logps(weights), 0.0
        told_C = torch.stack([token_logps(weights, c[0], (B, EOS)).sum() for c in COMPLETIONS])
        for i, j in itertools.product(range(len(COMPLETIONS)), repeat=2):
            apart = penalty * (float(marked[i]) - float(marked[j]))
            value = told_C[i] if marked[i] else told_C[j] if marked[j] else 0.0
            if marked[i] and marked[j]:
                apart = (told_C[i] - told_C[j]).detach()
                value = (told_C[i] + told_C[j]) / 2
            value = value + apart * (now_C[i] - now_C[j]) / 2
            total = total + mass_CC[i, j] * value
        kl = law_of(weights) @ (now_C - logps(REFERENCE))
        return -total + beta * kl

    options = {"bound": "single", "num_generations": 2, "format_penalty": penalty, "beta": beta}
    actual = run(tmp_path, Silent, **options)
    assert_same_gradient(actual, gradient_of(objective, POLICY))


@pytest.mark.parametrize(("scale", "clip"), [("group", 0.5), ("group", math.inf), ("none", 0.3)])
def test_advantages_are_normalised_and_clipped(scale, clip, tmp_path):
    """Of two thoughts both advantages have the size √½ once divided by their deviation."""
    logp_C, told_C = thoughts(POLICY).detach(), answers(POLICY).detach()

    def objective(weights):
        now_C, total = thoughts(weights), 0.0
        for i, j in itertools.product(range(len(SPOKEN)), repeat=2):
            apart = told_C[i] - told_C[j]
            if scale == "group":
                apart = apart / (apart.abs() * math.sqrt(2) + 1e-4)
            score = apart.clamp(-clip, clip) * (now_C[i] - now_C[j]) / 2
            total = total + (logp_C[i] + logp_C[j]).exp() * score
        return -total

    options = {"bound": "single", "num_generations": 2, "supervised_coef": 0.0}
    actual = run(tmp_path, advantage_scale=scale, advantage_clip=clip, **options)
    assert_same_gradient(actual, gradient_of(objective, POLICY))
