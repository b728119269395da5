"""Estimators against all subsets, and whether the error bars tell the truth."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.evals import generation_metrics, pass_hat_k
from trl_ext.evals.metrics import per_prompt_estimates

NAN = math.nan


def brute_force(success: list[float], k: int, value) -> float:
    """Mean of `value` over all subsets of size k of the scorable completions."""
    scorable = [i for i, s in enumerate(success) if not math.isnan(s)]
    subsets = list(itertools.combinations(scorable, k))
    return sum(map(value, subsets)) / len(subsets) if subsets else NAN


def vote(success: list[float], labels: list[int], subset: tuple[int, ...]) -> float:
    """Mean success of the tied most common answers; no answer is one more answer, and wrong."""
    count = Counter(labels[i] for i in subset)
    winners = [a for a, n in count.items() if n == max(count.values())]
    value = {labels[i]: 0.0 if labels[i] == -1 else success[i] for i in subset}
    return sum(value[a] for a in winners) / len(winners)


@st.composite
def scored_groups(draw):
    """Labels of one to three prompts, which of them are right, and which cannot be scored."""
    G, rows = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    labels = draw(st.lists(st.lists(st.integers(-1, 3), min_size=G, max_size=G), min_size=rows))
    right = draw(st.sets(st.integers(0, 3)))
    lost = draw(st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, G - 1))))
    rewards = [
        [NAN if (p, i) in lost else float(a in right) for i, a in enumerate(row)]
        for p, row in enumerate(labels)
    ]
    return rewards, labels


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scored_groups())
def test_every_estimate_is_the_mean_over_all_subsets(groups):
    rewards, labels = groups
    G = len(rewards[0])
    estimates = per_prompt_estimates(
        torch.tensor(rewards), torch.tensor(labels), tuple(range(1, G + 1))
    )
    for k in range(1, G + 1):
        for p, (success, answers) in enumerate(zip(rewards, labels, strict=True)):
            expected = {
                f"pass@{k}": brute_force(success, k, lambda s, r=success: max(r[i] for i in s)),
                f"pass^{k}": brute_force(success, k, lambda s, r=success: min(r[i] for i in s)),
                f"maj@{k}": brute_force(success, k, lambda s, r=success, a=answers: vote(r, a, s)),
            }
            for name, value in expected.items():
                assert estimates[name][p].item() == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_unscorable_completions_leave_no_trace():
    holes = torch.tensor([[1.0, NAN, 0.0, 0.0, NAN], [NAN, 0.0, 1.0, NAN, 1.0]])
    dense = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert generation_metrics(holes, ks=[1, 2, 3]) == generation_metrics(dense, ks=[1, 2, 3])


def test_prompt_with_too_few_scorable_completions_is_left_out_of_that_k_only():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, NAN, NAN, NAN]])
    numbers = generation_metrics(rewards, ks=[1, 2])
    assert numbers["pass@1"] == pytest.approx((0.75 + 1) / 2)
    assert numbers["pass^2"] == pytest.approx(0.5)  # C(3,2)/C(4,2), of the first prompt alone
    assert math.isnan(numbers["pass^2_se"])
    assert math.isnan(generation_metrics(torch.full((2, 2), NAN))["pass@1"])


def test_at_one_sample_all_three_are_the_success_rate():
    torch.manual_seed(0)
    rewards, labels = torch.rand(7, 5).round().double(), torch.arange(5).repeat(7, 1)
    numbers = generation_metrics(rewards, labels, ks=[1])
    for name in ("pass@1", "pass^1", "maj@1", "mean_reward"):
        assert numbers[name] == pytest.approx(rewards.mean().item(), abs=1e-12)


def test_standard_error_by_hand():
    numbers = generation_metrics(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), ks=[1])
    # per prompt 1, 1/2, 0: deviation 1/2, over three prompts 1/2 / √3
    assert numbers["pass@1_se"] == pytest.approx(0.5 / math.sqrt(3))


def test_interval_covers_the_truth_as_often_as_it_says():
    """Prompts of different difficulty: pᵢ ~ Beta(1, 2), so E[p] = 1/3, E[1−(1−p)⁴] = 2/3."""
    generator, P, G, repeats = torch.Generator().manual_seed(0), 100, 8, 1000
    uniform = torch.rand(repeats, P, 1, generator=generator)
    p = 1 - (1 - uniform).sqrt()  # inverse of Beta(1, 2)'s distribution function
    rewards = (torch.rand(repeats, P, G, generator=generator) < p).double()
    names = ("pass@1", "pass@4")
    estimates = per_prompt_estimates(rewards.view(-1, G), None, (1, 4))
    for name, truth in zip(names, (1 / 3, 2 / 3), strict=True):
        values = estimates[name].view(repeats, P)
        mean, error = values.mean(1), values.std(1) / math.sqrt(P)
        coverage = ((mean - truth).abs() < 1.96 * error).double().mean().item()
        assert coverage == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / repeats))
        # The public numbers use the same interval, not one over P·G completions.
        first = generation_metrics(rewards[0], ks=[1, 4])
        assert first[f"{name}_se"] == pytest.approx(error[0].item())


def test_threshold_forgives_rounding_and_nothing_else():
    rewards = torch.tensor([[0.7 + 0.2 + 0.1, 0.999, 1.0, 2.0]], dtype=torch.float64)
    assert rewards[0, 0] < 1
    assert generation_metrics(rewards, ks=[1])["pass@1"] == 0.75
    assert generation_metrics(rewards, ks=[1], success_threshold=1.5)["pass@1"] == 0.25


def test_default_ks_are_the_powers_of_two():
    names = generation_metrics(torch.ones(2, 12))
    assert {n for n in names if n.startswith("pass@") and not n.endswith("_se")} == {
        "pass@1",
        "pass@2",
        "pass@4",
        "pass@8",
    }


@pytest.mark.parametrize("ks", [[], [0], [1, 5]])
def test_impossible_ks_are_refused(ks):
    with pytest.raises(ValueError, match="num_generations"):
        generation_metrics(torch.ones(2, 4), ks=ks)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="labels_PG"):
        generation_metrics(torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.long))


def test_all_of_k_is_exactly_zero_below_k_correct():
    success = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert pass_hat_k(success, 3).item() == 0.0
