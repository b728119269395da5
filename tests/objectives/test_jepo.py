"""Jensen's bounds in float64: every group of thoughts of a table of three, with three answers."""

import itertools
import math
from functools import partial

import pytest
import torch

from tests.objectives.fixtures import f64
from trl_ext.objectives.jepo import (
    _subsets,
    answer_logp,
    bound_estimate,
    format_advantage,
    latro,
    mean_probability_reward,
    multi_bound,
    normalised,
    single_bound,
    unsolved,
    verifree,
)
from trl_ext.objectives.pass_at_k import pass_at_k_credit
from trl_ext.objectives.sequence_policy import leave_one_out_advantage

# The logits of three thoughts, and behind each thought those of three answers; a* is the first.
PARAMETERS = f64(0.2, -0.4, 0.5, 1.0, 0.0, -0.5, -0.7, 0.3, 0.2, 0.1, 0.9, -0.2)
REF_THOUGHTS = f64(0.6, -0.1, -0.3).log_softmax(0)
NAN = math.nan


def laws(parameters):
    """log π(c), `(3,)`, and log π(a*|c), `(3,)`."""
    logits = parameters.view(4, 3)
    return logits[0].log_softmax(0), logits[1:].log_softmax(1)[:, 0]


THOUGHTS, ANSWER = laws(PARAMETERS)


def jacobian(function):
    return torch.autograd.functional.jacobian(function, PARAMETERS)


SCORE_C, SCORE_A = jacobian(lambda x: laws(x)[0]), jacobian(lambda x: laws(x)[1])


def golden(actual, *expected):
    torch.testing.assert_close(actual.reshape(-1), f64(*expected), rtol=0, atol=1e-6)


def all_groups(G):
    """Every group of G thoughts, `(3^G, G)`, and its probability."""
    groups = torch.tensor(list(itertools.product(range(3), repeat=G)))
    return groups, THOUGHTS[groups].sum(1).exp()


def bound(parameters, n):
    """L_n by enumeration."""
    thoughts, answer = laws(parameters)
    groups = torch.tensor(list(itertools.product(range(3), repeat=n)))
    value = answer[groups].logsumexp(1) - math.log(n)
    return thoughts[groups].sum(1).exp() @ value


def estimates(family, groups):
    """What one update does with each group: the mean over rows, `(groups, 12)`."""
    advantage, weight = family(ANSWER[groups])
    return (advantage[..., None] * SCORE_C[groups] + weight[..., None] * SCORE_A[groups]).mean(1)


def expected_gradient(family, G):
    groups, probability = all_groups(G)
    return probability @ estimates(family, groups)


def variance(family, G):
    groups, probability = all_groups(G)
    estimate = estimates(family, groups)
    return probability @ (estimate - probability @ estimate).square().sum(1)


def test_golden_bounds():
    """J1: the bounds rise to the likelihood, and the gap is a KL to the posterior."""
    for n, value in zip((1, 2, 3, 4), (-1.146609, -1.081910, -1.057508, -1.045014), strict=True):
        golden(bound(PARAMETERS, n), value)
    marginal = (THOUGHTS + ANSWER).logsumexp(0)
    golden(marginal, -1.008162)
    posterior = (THOUGHTS + ANSWER).log_softmax(0)
    gap = (THOUGHTS.exp() * (THOUGHTS - posterior)).sum()
    golden(gap, 0.138448)
    torch.testing.assert_close(gap, marginal - bound(PARAMETERS, 1))


def test_golden_gradients():
    """J2, by autograd: the expected values of everything below."""
    gradients = [jacobian(partial(bound, n=n)) for n in (1, 2, 3)]
    golden(
        gradients[0],
        *(0.235363, -0.127679, -0.107684, 0.128151, -0.079769, -0.048382),
        *(0.158685, -0.083307, -0.075379, 0.348274, -0.261296, -0.086978),
    )
    golden(
        gradients[1],
        *(0.251129, -0.119889, -0.131239, 0.167984, -0.104563, -0.063421),
        *(0.110253, -0.057881, -0.052373, 0.311295, -0.233552, -0.077743),
    )
    golden(
        gradients[2],
        *(0.253518, -0.115755, -0.137763, 0.185173, -0.115263, -0.06991),
        *(0.095156, -0.049955, -0.045201, 0.29016, -0.217695, -0.072464),
    )


@pytest.mark.parametrize("G", [2, 3, 4])
def test_the_multi_bound_is_exact(G):
    torch.testing.assert_close(
        expected_gradient(multi_bound, G), jacobian(partial(bound, n=G)), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("G", [2, 3, 4])
def test_the_single_bound_is_exact(G):
    torch.testing.assert_close(
        expected_gradient(single_bound, G), jacobian(partial(bound, n=1)), rtol=0, atol=1e-14
    )


def test_the_score_term_is_a_sum_over_the_group():
    """J2: with an extra 1/n the estimate is another vector, shorter than the gradient."""

    def averaged(logp):
        advantage, weight = multi_bound(logp)
        return advantage / logp.size(1), weight

    assert float(expected_gradient(multi_bound, 2).norm()) == pytest.approx(0.5600, abs=5e-5)
    assert float(expected_gradient(averaged, 2).norm()) == pytest.approx(0.4925, abs=5e-5)


@pytest.mark.parametrize("G", [3, 4])
def test_centring_the_advantages_belongs_to_one_sample_less(G):
    def centred(logp):
        advantage, weight = multi_bound(logp)
        return advantage - advantage.mean(1, keepdim=True), 0 * weight

    def score_part(logp):
        advantage, weight = multi_bound(logp)
        return advantage, 0 * weight

    torch.testing.assert_close(expected_gradient(centred, G), expected_gradient(score_part, G - 1))


def test_golden_variances():
    """J3: without the others as a baseline, the estimate is nearly all noise."""

    def without_baseline(logp):
        n = logp.size(1)
        value = logp.logsumexp(1, keepdim=True) - math.log(n)
        return n * value.expand(-1, n), multi_bound(logp)[1]

    exact = jacobian(partial(bound, n=3))
    torch.testing.assert_close(expected_gradient(without_baseline, 3), exact)
    assert float(variance(without_baseline, 3)) == pytest.approx(2.59, abs=5e-3)
    assert float(variance(multi_bound, 3)) == pytest.approx(0.22, abs=5e-3)


def test_one_sample_without_thought_is_sft():
    """J4"""
    advantage, weight = single_bound(f64([-3.0], [-700.0]))
    assert torch.equal(advantage, f64([0.0], [0.0]))
    assert torch.equal(weight, f64([1.0], [1.0]))


def test_verifree_is_rloo_on_exact_match_with_the_answer_summed_out():
    """J5: the gradient of π(a*|x), with a sixth of the variance."""

    def likelihood(parameters):
        return sum(laws(parameters)).logsumexp(0).exp()

    exact = jacobian(likelihood)
    torch.testing.assert_close(expected_gradient(verifree, 2), exact, rtol=0, atol=1e-14)
    assert float(variance(verifree, 2)) == pytest.approx(0.044, abs=5e-4)

    logits = PARAMETERS.view(4, 3)
    joint = (logits[0].log_softmax(0)[:, None] + logits[1:].log_softmax(1)).flatten()  # thought, a
    score = jacobian(
        lambda x: (
            x.view(4, 3)[0].log_softmax(0)[:, None] + x.view(4, 3)[1:].log_softmax(1)
        ).flatten()
    )
    pairs = torch.tensor(list(itertools.product(range(9), repeat=2)))
    probability = joint[pairs].sum(1).exp()
    match = (pairs % 3 == 0).double()
    estimate = (leave_one_out_advantage(match)[..., None] * score[pairs]).mean(1)
    torch.testing.assert_close(probability @ estimate, exact, rtol=0, atol=1e-14)
    noise = probability @ (estimate - exact).square().sum(1)
    assert float(noise) == pytest.approx(0.275, abs=5e-4)


def test_verifree_is_what_rloo_expects_of_each_group_of_thoughts():
    """Rao and Blackwell's: the mean over all answers that a group of thoughts can give."""
    logits, groups = PARAMETERS.view(4, 3), all_groups(2)[0]
    answer_logp = logits[1:].log_softmax(1)  # thought, answer
    answer_score = jacobian(lambda x: x.view(4, 3)[1:].log_softmax(1))
    expected = []
    for thoughts in groups:
        mean = torch.zeros(12, dtype=torch.float64)
        for given in itertools.product(range(3), repeat=2):
            a = torch.tensor(given)
            match = (a == 0).double()[None]
            score = SCORE_C[thoughts] + answer_score[thoughts, a]
            estimate = (leave_one_out_advantage(match)[0, :, None] * score).mean(0)
            mean += answer_logp[thoughts, a].sum().exp() * estimate
        expected.append(mean)
    torch.testing.assert_close(estimates(verifree, groups), torch.stack(expected))


def test_a_thought_is_credited_as_a_sample_of_a_k_sample_objective():
    """f of all minus f of the others: of pass@k where f is the best, of the bound where f is the
    log-mean-exp."""

    def of_all_minus_of_others(f, values):
        G = values.size(1)
        others = [[j for j in range(G) if j != i] for i in range(G)]
        return torch.stack([G * (f(values) - f(values[:, rest])) for rest in others], dim=1)

    values = random_logp(scale=1.0)
    log_mean_exp = lambda x: x.logsumexp(1) - math.log(x.size(1))  # noqa: E731
    expected = of_all_minus_of_others(log_mean_exp, values)
    torch.testing.assert_close(multi_bound(values)[0], expected)
    best = of_all_minus_of_others(lambda x: x.amax(1), values)
    torch.testing.assert_close(pass_at_k_credit(values, values.size(1)), best)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_latro_is_the_bound_minus_the_kl_of_the_thoughts(beta):
    def objective(parameters):
        thoughts, answer = laws(parameters)
        return thoughts.exp() @ (answer - beta * (thoughts - REF_THOUGHTS))

    groups, probability = all_groups(3)
    ratio = (THOUGHTS - REF_THOUGHTS)[groups]
    actual = probability @ estimates(lambda logp: latro(logp, ratio, beta), groups)
    torch.testing.assert_close(actual, jacobian(objective), rtol=0, atol=1e-14)
    if beta == 0:
        for ours, single in zip(
            latro(ANSWER[groups], ratio, 0.0), single_bound(ANSWER[groups]), strict=True
        ):
            assert torch.equal(ours, single)


def random_logp(P=5, G=6, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(P, G, dtype=torch.float64, generator=generator) - 20).to(dtype)


FAMILIES = pytest.mark.parametrize("family", [single_bound, multi_bound, verifree])


@FAMILIES
def test_a_permuted_group_has_permuted_credit_and_nothing_is_differentiated(family):
    logp = random_logp().requires_grad_()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for straight, permuted in zip(family(logp), family(logp[:, order]), strict=True):
        torch.testing.assert_close(straight[:, order], permuted)
        assert not straight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-0.3, -17.77, -901.3])
def test_equal_answers_teach_the_thoughts_exactly_nothing(value, dtype):
    for G in (2, 3, 7):
        logp = torch.full((2, G), value, dtype=dtype)
        for family in (single_bound, multi_bound, verifree):
            assert torch.equal(family(logp)[0], torch.zeros_like(logp))
        assert torch.equal(single_bound(logp)[1], torch.ones_like(logp))
        torch.testing.assert_close(multi_bound(logp)[1], torch.ones_like(logp))
        assert torch.equal(bound_estimate(logp, 2), logp[:, 0])


@FAMILIES
def test_a_thought_without_answer_was_never_drawn(family):
    logp = random_logp(1, 6)
    logp[0, [1, 4]] = NAN
    kept = [0, 2, 3, 5]
    for actual, expected in zip(family(logp), family(logp[:, kept]), strict=True):
        assert actual[0, 1] == actual[0, 4] == 0
        torch.testing.assert_close(actual[:, kept], expected * 6 / 4)


def test_latro_leaves_out_what_has_no_answer():
    logp, ratio = f64([-1.0, NAN, -3.0]), f64([0.5, 9.0, -0.1])
    advantage, weight = latro(logp, ratio, 2.0)
    torch.testing.assert_close(advantage, f64([0.8, 0.0, -0.8]) * 3 / 2)
    assert torch.equal(weight, f64([1.5, 0.0, 1.5]))


def test_a_lone_answer_is_supervised_and_none_teaches_nothing():
    logp = f64([NAN, -4.0, NAN], [NAN, NAN, NAN])
    for family in (single_bound, multi_bound):
        advantage, weight = family(logp)
        assert torch.equal(advantage, torch.zeros_like(logp))
        assert torch.equal(weight, f64([0.0, 3.0, 0.0], [0.0, 0.0, 0.0]))


def test_long_answers_do_not_underflow():
    """Thousands of nats apart, where p itself is 0 in any floating-point format."""
    for dtype in (torch.float32, torch.float64):
        advantage, weight = multi_bound(torch.tensor([[-9000.0, -5000.0, -5001.0]], dtype=dtype))
        p = math.exp(-1.0)
        expected = [
            3 * math.log(2 / 3),
            3 * (math.log((1 + p) / 3) - (-1 + math.log(1 / 2))),
            3 * (math.log((1 + p) / 3) - math.log(1 / 2)),
        ]
        torch.testing.assert_close(advantage, torch.tensor([expected], dtype=dtype))
        share = [0.0, 3 / (1 + p), 3 * p / (1 + p)]
        torch.testing.assert_close(weight, torch.tensor([share], dtype=dtype))


def test_a_thought_far_ahead_of_all_others_keeps_a_finite_advantage():
    for dtype in (torch.float32, torch.float64):
        logp = torch.tensor([[-9000.0, -5000.0, -7000.0]], dtype=dtype)
        advantage, _ = multi_bound(logp)
        expected = [3 * math.log(2 / 3), 3 * (2000 + math.log(2 / 3)), 3 * math.log(2 / 3)]
        torch.testing.assert_close(advantage, torch.tensor([expected], dtype=dtype))


def test_the_advantage_keeps_its_digits_far_from_zero():
    near = random_logp(scale=0.01) + 20
    far = (near - 4096).float()
    expected = multi_bound(far.double())[0]
    torch.testing.assert_close(multi_bound(far)[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_one_thought_has_no_multi_bound():
    for family in (multi_bound, verifree):
        with pytest.raises(AssertionError):
            family(f64([-1.0]))


def test_a_log_likelihood_is_a_sum_whatever_the_padding():
    """J6"""
    token_logp = f64([-1.0, -2.0, -0.5, NAN], [-3.0, -math.inf, 7.0, 0.0])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert answer_logp(token_logp, mask).tolist() == [-3.5, -3.0]
    junk = torch.full((2, 4), NAN, dtype=torch.float64)
    wider = torch.cat([junk, token_logp, junk], 1), torch.cat([0 * mask, mask, 0 * mask], 1)
    assert answer_logp(*wider).tolist() == [-3.5, -3.0]
    assert answer_logp(token_logp[:, :0], mask[:, :0]).tolist() == [0.0, 0.0]


def test_a_log_likelihood_is_summed_in_float32():
    half = torch.full((1, 1000), -1.003, dtype=torch.bfloat16)
    total = answer_logp(half, torch.ones(1, 1000))
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(1000 * float(half[0, 0]), rel=1e-5)


def test_a_log_likelihood_is_differentiable_past_the_padding():
    token_logp = f64([-1.0, NAN]).requires_grad_()
    answer_logp(token_logp, torch.tensor([[1, 0]])).sum().backward()
    assert torch.equal(token_logp.grad, f64([1.0, 0.0]))


# What the update does with the advantages


def test_a_format_penalty_is_centred_without_its_own_sample():
    scored = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4])
    expected = torch.zeros(3, 4)
    expected[0] = torch.tensor([10 / 3, -10.0, 10 / 3, 10 / 3])
    torch.testing.assert_close(format_advantage(scored, 10.0), expected)
    assert torch.equal(format_advantage(scored, 10.0)[1:], expected[1:])


def test_the_deviation_is_that_of_the_scored():
    advantage = f64([1.0, -3.0, 5.0, 100.0], [0.5, 0.1, 0.0, -100.0])
    scored = torch.tensor([[True, True, True, False], [True, True, False, False]])
    kept = [advantage[0, :3], advantage[1, :2]]
    by_group = normalised(advantage, scored, math.inf)
    by_batch = normalised(advantage, scored, math.inf, "batch")
    deviation = torch.cat(kept).std()
    for row, values in enumerate(kept):
        n = len(values)
        torch.testing.assert_close(by_group[row, :n], values / (values.std() + 1e-4))
        torch.testing.assert_close(by_batch[row, :n], values / (deviation + 1e-4))
        assert not by_group[row, n:].any() and not by_batch[row, n:].any()
    plain = normalised(advantage, scored, math.inf, "none")
    assert torch.equal(plain, advantage * scored)


def test_the_clip_is_symmetric_and_comes_last():
    advantage = f64([-3.0, 0.5, 3.0])
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(normalised(advantage, everything, 1.0, "none"), f64([-1.0, 0.5, 1.0]))
    ours = normalised(advantage, everything, 0.7)
    torch.testing.assert_close(ours, (advantage / (advantage.std() + 1e-4)).clamp(-0.7, 0.7))
    assert ours.abs().max() == 0.7


def test_a_bad_format_is_masked_from_the_bound_and_keeps_its_penalty():
    logp = f64([-1.0, NAN, -2.0, -4.0])
    scored = ~logp.isnan()
    bound = normalised(multi_bound(logp)[0], scored)
    penalty = normalised(format_advantage(scored, 10.0), torch.ones_like(scored))
    assert bound[0, 1] == 0 and penalty[0, 1] == -1
    assert (bound[0, [0, 2, 3]] != 0).all() and (penalty[0, [0, 2, 3]] > 0).all()


def test_rounding_is_not_normalised_into_a_signal():
    logp = torch.full((1, 4), -50.0)
    logp[0, 0] += 4e-6
    advantage = normalised(single_bound(logp)[0], torch.ones_like(logp, dtype=torch.bool))
    assert 0 < advantage.abs().max() < 0.05


def test_a_group_with_one_scored_sample_is_not_normalised_to_nan():
    scored = torch.tensor([[True, False], [False, False]])
    for scale in ("group", "batch"):
        assert torch.equal(
            normalised(f64([0.0, 3.0], [1.0, 2.0]), scored, 1.0, scale), f64([0.0, 0.0], [0.0, 0.0])
        )


def test_only_prompts_that_no_sample_solved_need_the_bound():
    rewards = f64([0.0, 1.0], [0.0, 0.0], [NAN, 0.0], [NAN, NAN], [-1.0, -0.5], [NAN, 0.1])
    assert unsolved(rewards).tolist() == [False, True, True, True, True, False]


def test_rlpr_averages_probabilities_of_tokens():
    p = f64([0.9, 0.5, 0.1, 0.7], [0.2, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    actual = mean_probability_reward(p.log().nan_to_num(), mask)
    torch.testing.assert_close(actual, f64(0.5, 0.3, NAN), equal_nan=True)
    debiased = mean_probability_reward(p.log(), mask, f64(0.2, 0.8, 0.0))
    torch.testing.assert_close(debiased, f64(0.3, 0.0, NAN), equal_nan=True)
    assert mean_probability_reward(p[:1].log(), mask[:1], f64(-0.9)).tolist() == [1.0]


# Bounds on held-out data


@pytest.mark.parametrize(("M", "n"), [(1, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4)])
def test_a_bound_is_estimated_without_bias(M, n):
    groups, probability = all_groups(M)
    actual = probability @ bound_estimate(ANSWER[groups], n)
    torch.testing.assert_close(actual, bound(PARAMETERS, n), rtol=0, atol=1e-14)


def test_all_subsets_vary_less_than_disjoint_ones():
    groups, probability = all_groups(4)
    exact = bound(PARAMETERS, 2)
    blocks = torch.stack([bound_estimate(ANSWER[groups[:, i : i + 2]], 2) for i in (0, 2)]).mean(0)
    torch.testing.assert_close(probability @ blocks, exact)
    ours = bound_estimate(ANSWER[groups], 2)
    noise, block_noise = (probability @ (x - exact).square() for x in (ours, blocks))
    assert noise < 0.999 * block_noise


def test_estimated_bounds_rise_in_n_for_every_sample_set():
    logp = random_logp(50, 7)
    bounds = torch.stack([bound_estimate(logp, n) for n in range(1, 8)])
    assert (bounds.diff(dim=0) > 0).all()
    torch.testing.assert_close(bounds[0], logp.mean(1))
    torch.testing.assert_close(bounds[-1], logp.logsumexp(1) - math.log(7))


@pytest.mark.parametrize(("M", "n"), [(5, 2), (6, 3)])
def test_every_subset_is_visited_once(M, n):
    logp = random_logp(10, M)
    subsets = [logp[:, subset] for subset in itertools.combinations(range(M), n)]
    expected = torch.stack([s.logsumexp(1) - math.log(n) for s in subsets]).mean(0)
    torch.testing.assert_close(bound_estimate(logp, n), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("M", "n"), [(12, 6), (12, 4), (13, 5)])
def test_of_too_many_subsets_some_are_visited_that_use_all_samples_alike(M, n):
    """Each sample moves the estimate as much as any other, and none of the bias is theirs."""
    logp = random_logp(20, M)
    every, some = bound_estimate(logp, n, math.comb(M, n)), bound_estimate(logp, n, 400)
    few = bound_estimate(logp, n, 1)
    assert not torch.equal(every, some)
    assert (some - every).abs().mean() < 0.1 * (few - every).abs().mean()
    same = torch.full((1, M), -3.0, dtype=torch.float64)
    assert bound_estimate(same, n, 400).tolist() == [-3.0]
    if M % n == 0:
        counts = torch.bincount(_subsets(M, n, 400).flatten(), minlength=M)
        assert (counts == counts[0]).all()


def test_groups_of_any_size_have_a_bound():
    """C(64, 32) subsets would take longer than the universe has."""
    logp = random_logp(2, 64)
    bounds = torch.stack([bound_estimate(logp, 2**i) for i in range(7)])
    assert (bounds.diff(dim=0) > 0).all()


def test_a_bound_needs_its_samples():
    for n in (0, 3):
        with pytest.raises(AssertionError, match=f"n={n}"):
            bound_estimate(f64([-1.0, -2.0]), n)
