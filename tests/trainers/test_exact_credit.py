"""Through the trainer, each k-sample estimator has its objective's gradient, scale included."""

import itertools
from collections import Counter

import pytest
import trl

import trl_ext.trainers.pass_at_k as pass_at_k_module
from tests.exact import (
    COMPLETIONS,
    EOS,
    PROMPTS,
    TOKENIZER,
    Enumeration,
    T,
    assert_same_gradient,
    cosine,
    expectation,
    gradient_of,
    probability,
    settings,
    table,
    token_logps,
)
from trl_ext import MajorityVoteConfig, MajorityVoteTrainer, PassAtKConfig, PassAtKTrainer

POLICY = table(1)
CONTINUOUS = dict(zip(COMPLETIONS, [0.0, 1.0, 0.25, 0.5, 0.0, 0.75, 1.0], strict=True))
SHORT_WINS = {**CONTINUOUS, (EOS,): 0.75}
BINARY = {completion: float(reward > 0.5) for completion, reward in CONTINUOUS.items()}


def run(folder, config, trainer, rewards, prompt, **options):
    options = settings(**options)
    case = Enumeration(
        trainer, lambda f: config(f, **options), POLICY, prompt=prompt, reward=rewards.__getitem__
    )
    scale = T if options["loss_type"] == "dr_grpo" else 1
    return -case.expected_gradient(str(folder)) * scale


def pass_at_k(k, rewards, prompt):
    def best(*completions):
        return max(rewards[c] for c in completions)

    return gradient_of(lambda w: expectation(w, prompt, k, best), POLICY)


CASES = [
    # estimator, k, G, the k whose objective it differentiates
    ("loo", 1, 2, 1),
    ("loo", 2, 3, 2),
    ("loo", 3, 3, 3),
    ("centred", 2, 3, 1),
    ("centred", 3, 3, 2),
    ("s", 2, 3, 2),
    ("sloo", 2, 3, 2),
    ("sloo_minus_one", 2, 3, 2),
    ("sloo_minus_one", 3, 4, 3),
]


@pytest.mark.parametrize(("estimator", "k", "G", "objective"), CASES)
def test_estimators_are_exact_with_one_scale_for_all_prompts(estimator, k, G, objective, tmp_path):
    for prompt, loss_type in zip(PROMPTS, ("dr_grpo", "luspo"), strict=True):
        options = dict(k=k, estimator=estimator, num_generations=G, loss_type=loss_type)
        actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, CONTINUOUS, prompt, **options)
        assert_same_gradient(actual, pass_at_k(objective, CONTINUOUS, prompt))


def test_analytic_has_the_direction_of_each_prompt_but_reweighs_prompts(tmp_path):
    """With rewards of 0 and 1 every symmetric credit points along ∇pass@k: σ changes the length."""
    options, lengths = dict(k=2, estimator="analytic", num_generations=4), []
    for prompt in PROMPTS:
        actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, BINARY, prompt, **options)
        expected = pass_at_k(2, BINARY, prompt)
        assert cosine(actual, expected) >= 1 - 1e-9
        lengths.append(float(actual.norm() / expected.norm()))
    assert abs(lengths[0] / lengths[1] - 1) > 0.01


def test_several_rewards_are_summed_before_they_are_credited(tmp_path):
    """Two functions with weights: the objective is that of the weighted sum."""
    options = dict(k=2, num_generations=3, reward_weights=[2.0])
    actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, CONTINUOUS, PROMPTS[0], **options)
    assert_same_gradient(actual, 2 * pass_at_k(2, CONTINUOUS, PROMPTS[0]))


def last_letter(text):
    return text[-1] if text else None


VALUE = {"a": 1.0, "b": 0.25, None: 0.0}
ANSWER = {c: last_letter(TOKENIZER.decode(c, skip_special_tokens=True)) for c in COMPLETIONS}


def vote_gradient(k, unparsable):
    def vote(*completions):
        answers = [ANSWER[c] for c in completions if unparsable == "null" or c != (EOS,)]
        counts = Counter(answers)
        winners = [a for a, n in counts.items() if n == max(counts.values())]
        return sum(VALUE[a] for a in winners) / max(len(winners), 1)

    return gradient_of(lambda w: expectation(w, PROMPTS[0], k, vote), POLICY)


def run_vote(folder, **options):
    rewards = {c: VALUE[a] for c, a in ANSWER.items()}
    options |= dict(answer_extractor=last_letter)
    return run(folder, MajorityVoteConfig, MajorityVoteTrainer, rewards, PROMPTS[0], **options)


@pytest.mark.parametrize(("k", "G"), [(2, 3), (3, 3), (3, 4)])
@pytest.mark.parametrize("unparsable", ["null", "exclude"])
def test_majority_vote_is_exact(k, G, unparsable, tmp_path):
    actual = run_vote(tmp_path, k=k, num_generations=G, unparsable=unparsable)
    assert_same_gradient(actual, vote_gradient(k, unparsable))


def test_trl_centres_with_the_own_sample_and_scales_by_the_deviation(tmp_path):
    """The host beside: (G−1)/G of ∇E r without scaling, another direction with it."""
    expected = pass_at_k(1, CONTINUOUS, PROMPTS[0])
    options = dict(num_generations=3)
    plain = run(tmp_path, trl.GRPOConfig, trl.GRPOTrainer, CONTINUOUS, PROMPTS[0], **options)
    assert_same_gradient(plain, 2 / 3 * expected)
    options |= dict(scale_rewards="group", loss_type="grpo")
    default = run(tmp_path, trl.GRPOConfig, trl.GRPOTrainer, CONTINUOUS, PROMPTS[0], **options)
    assert cosine(default, expected) < 0.999


def test_unscorable_completions_are_as_if_never_drawn(tmp_path):
    """Pairs with an unscorable completion are too few for a baseline; the others keep theirs."""
    dropped = COMPLETIONS[-1]
    rewards = {**CONTINUOUS, dropped: None}
    options = dict(k=1, num_generations=2)
    actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, rewards, PROMPTS[0], **options)

    def surrogate(weights):
        pairs = itertools.permutations([c for c in COMPLETIONS if c != dropped], 2)
        return sum(
            probability(POLICY, PROMPTS[0], pair)
            * (CONTINUOUS[pair[0]] - CONTINUOUS[pair[1]])
            * token_logps(weights, PROMPTS[0], pair[0]).sum()
            for pair in pairs
        )

    assert_same_gradient(actual, gradient_of(surrogate, POLICY))


def test_mutation_own_sample_in_the_baseline(tmp_path, monkeypatch):
    def centred_on_itself(rewards_PG, k):
        return rewards_PG - rewards_PG.mean(1, keepdim=True)

    monkeypatch.setitem(pass_at_k_module.ESTIMATORS, "loo", centred_on_itself)
    actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, CONTINUOUS, PROMPTS[0], k=1)
    expected = pass_at_k(1, CONTINUOUS, PROMPTS[0])
    assert_same_gradient(actual, expected / 2)
    with pytest.raises(AssertionError):
        assert_same_gradient(actual, expected)


def test_mutation_length_normaliser(tmp_path):
    """`grpo` divides each row by its own length: no sequence objective has this gradient."""
    options = dict(k=2, num_generations=3, loss_type="grpo")
    assert len({len(c) for c, reward in SHORT_WINS.items() if reward}) == 2
    with pytest.warns(UserWarning, match="reweighs completions"):
        actual = run(tmp_path, PassAtKConfig, PassAtKTrainer, SHORT_WINS, PROMPTS[0], **options)
    assert cosine(actual, pass_at_k(2, SHORT_WINS, PROMPTS[0])) < 0.999
