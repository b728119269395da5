"""f-DPO: f′ against autograd of f, the optimum it leads to, and extreme log-ratios."""

import math

import pytest
import torch

from tests.objectives.fixtures import A_REF, A_REWARDS, A_RHO, a_gradient, assert_golden, f64
from trl_ext.objectives.f_divergence import divergence_score
from trl_ext.objectives.pairs import labelled, sigmoid_loss

BETA = 0.4
LOG_RATIOS = f64(-3.0, -0.5, 0.0, 1e-3, 0.8, 4.0)

GENERATORS = {  # D_f(π‖ref) = E_ref[f(u)], f(1) = 0
    "reverse_kl": lambda u, _: u * u.log() - u + 1,
    "forward_kl": lambda u, _: u - 1 - u.log(),
    "js": lambda u, _: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}
INVERSES = {  # u from f′(u), and where f′ ends
    "reverse_kl": (lambda x, _: x.exp(), math.inf),
    "forward_kl": (lambda x, _: 1 / (1 - x), 1.0),
    "js": (lambda x, _: x.exp() / (2 - x.exp()), math.log(2)),
    "alpha": (lambda x, a: (1 - a * x) ** (-1 / a), 2.0),
}
# f′(u_w) − f′(u_l) and the loss, fixture A, pair (1, 3), β = 0.4
PAIRS = [
    ("reverse_kl", 0.5, 0.60000000, 0.58032997),
    ("forward_kl", 0.5, 0.25420085, 0.64359882),
    ("js", 0.5, 0.17744696, 0.65828741),
    ("alpha", 0.3, 0.46227097, 0.60496080),
    ("alpha", 0.5, 0.38908457, 0.61835495),
    ("alpha", 0.7, 0.32787641, 0.62972042),
]
OPTIMA = {
    "reverse_kl": f64(0.59483722, 0.00628577, 0.37928496, 0.01796253, 0.00162952),
    "forward_kl": f64(0.60962534, 0.02901191, 0.30610222, 0.02472184, 0.03053869),
    "js": f64(0.79192768, 0.00217051, 0.19856995, 0.00677735, 0.00055451),
    "alpha": f64(0.60761602, 0.01882224, 0.33629102, 0.02172887, 0.01554185),
}


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("divergence", GENERATORS)
def test_is_the_derivative_of_the_generator(divergence, alpha):
    u = LOG_RATIOS.exp().requires_grad_()
    (expected,) = torch.autograd.grad(GENERATORS[divergence](u, alpha).sum(), u)
    actual = divergence_score(LOG_RATIOS, divergence, alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert divergence_score(f64(0.0), divergence, alpha).item() == 0
    assert (actual.diff() > 0).all()


def test_the_ends_of_alpha_are_the_kls():
    for alpha, kl in ((1e-9, "reverse_kl"), (1 - 1e-9, "forward_kl")):
        actual = divergence_score(LOG_RATIOS, "alpha", alpha)
        torch.testing.assert_close(actual, divergence_score(LOG_RATIOS, kl), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7])
def test_the_coefficient_of_trl_is_1_minus_alpha(alpha):
    c = 1 - alpha
    expected = (torch.exp((c - 1) * LOG_RATIOS) - 1) / (c - 1)
    torch.testing.assert_close(divergence_score(LOG_RATIOS, "alpha", alpha), expected)


@pytest.mark.parametrize(("divergence", "alpha", "difference", "loss"), PAIRS)
def test_golden_values_of_one_pair(divergence, alpha, difference, loss):
    score = divergence_score(A_RHO, divergence, alpha)
    actual = (score[1] - score[3]).view(1, 1)
    assert_golden(actual, f64([difference]))
    assert_golden(sigmoid_loss(BETA * actual), f64([loss]))


def optimum(divergence):
    """π with β f′(π/ref) = r + c, by bisection of c."""
    inverse, end = INVERSES[divergence]
    low, high = -100.0, min(BETA * end, 100.0) - A_REWARDS.max().item()
    for _ in range(200):
        c = (low + high) / 2
        law = A_REF.exp() * inverse((A_REWARDS + c) / BETA, 0.5)
        low, high = (c, high) if law.sum() < 1 else (low, c)
    return law


@pytest.mark.parametrize("divergence", OPTIMA)
def test_the_population_loss_rests_where_score_equals_reward(divergence):
    law = optimum(divergence)
    assert_golden(law, OPTIMA[divergence])
    label = torch.sigmoid(A_REWARDS[:, None] - A_REWARDS[None, :])
    sampler = f64(0.1, 0.3, 0.2, 0.25, 0.15)

    def loss(logp):
        score = BETA * divergence_score(logp - A_REF, divergence)
        margin = score[:, None] - score[None, :]
        return sampler @ labelled(sigmoid_loss, margin, label) @ sampler

    assert a_gradient(loss, law.log()).abs().max() < 1e-10
    assert a_gradient(loss).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.98])
def test_extreme_ratios_overflow_nowhere(divergence, dtype, alpha):
    log_ratio = torch.tensor([-6e4, -300.0, 0.0, 300.0, 6e4], dtype=dtype).requires_grad_()
    score = divergence_score(log_ratio, divergence, alpha)
    assert score.isfinite().all() and (score.diff() >= 0).all()
    (gradient,) = torch.autograd.grad(score.sum(), log_ratio)
    assert gradient.isfinite().all() and (gradient >= 0).all()


def test_the_cut_is_where_the_docstring_says():
    for alpha in (0.1, 0.5):
        edge = -(80 + math.log(alpha)) / alpha
        log_ratio = f64(edge + 1, edge - 1).requires_grad_()
        score = divergence_score(log_ratio, "alpha", alpha)
        torch.testing.assert_close(score[1], -f64(80.0).exp()[0], rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(score.sum(), log_ratio)
        assert gradient[0] > 0 and gradient[1] == 0


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, math.nan])
def test_refuses_other_alphas(alpha):
    with pytest.raises(AssertionError):
        divergence_score(LOG_RATIOS, "alpha", alpha)


def test_refuses_other_names():
    with pytest.raises(AssertionError):
        divergence_score(LOG_RATIOS, "js_divergence")
