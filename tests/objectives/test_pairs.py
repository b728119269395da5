"""Pair losses in float64: identities, expectations over all pairs, golden values."""

import math
from functools import partial

import pytest
import torch

from tests.objectives.fixtures import (
    A_LOGITS,
    A_NASH,
    A_POLICY,
    A_PREFERENCES,
    A_REF,
    A_RHO,
    B_LOGITS,
    B_REF_LOGITS,
    a_gradient,
    assert_golden,
    b_token_logps,
    f64,
    kl,
)
from trl_ext.objectives.pairs import (
    best_of_k_sft_loss,
    exploration_bonus,
    hinge_loss,
    ipo_loss,
    labelled,
    robust_loss,
    rpo_loss,
    sigmoid_loss,
)

BETA = 0.4
MARGINS = f64([-3.0, -0.4, 0.0], [0.7, 1.5, 40.0])


def delta_13(logp):
    """Δ of the pair that response 1 won against response 3, `(1, 1)`."""
    rho = logp - A_REF
    return (rho[1] - rho[3]).view(1, 1)


def all_deltas(logp):
    """Δ of every ordered pair, `(5, 5)`."""
    rho = logp - A_REF
    return rho[:, None] - rho[None, :]


def slope(loss, x=MARGINS):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def test_sigmoid_is_the_bradley_terry_likelihood_of_the_label():
    torch.testing.assert_close(sigmoid_loss(MARGINS), torch.log1p(torch.exp(-MARGINS)))
    torch.testing.assert_close(slope(sigmoid_loss), -torch.sigmoid(-MARGINS))
    assert sigmoid_loss(f64([0.0])).item() == math.log(2)
    assert sigmoid_loss(f64([-2000.0, 2000.0])).tolist() == [[2000.0, 0.0]]


def test_hinge_leaves_wide_margins_alone():
    assert hinge_loss(MARGINS).tolist() == [[4.0, 1.4, 1.0], [pytest.approx(0.3), 0.0, 0.0]]
    assert slope(hinge_loss).tolist() == [[-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("beta", [0.05, 0.4, 2.0])
def test_the_forms_of_ipo_differ_by_beta_squared(beta):
    plain, normalised = partial(ipo_loss, beta=beta), partial(ipo_loss, beta=beta, normalised=True)
    torch.testing.assert_close(normalised(MARGINS), beta**2 * plain(MARGINS))
    torch.testing.assert_close(slope(normalised), beta**2 * slope(plain))
    assert ipo_loss(f64([1 / (2 * beta)]), beta).item() == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.49])
def test_robust_is_unbiased_for_clean_labels(share):
    robust = partial(robust_loss, label_smoothing=share)
    expected = (1 - share) * robust(MARGINS) + share * robust(-MARGINS)
    torch.testing.assert_close(expected, sigmoid_loss(MARGINS))


def test_robust_is_the_formula_of_trl():
    clean, flipped = -0.9 * MARGINS.sigmoid().log(), -0.1 * (-MARGINS).sigmoid().log()
    torch.testing.assert_close(robust_loss(MARGINS, 0.1), (clean - flipped) / 0.8)
    assert torch.equal(robust_loss(MARGINS, 0.0), sigmoid_loss(MARGINS))


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.7, math.nan])
def test_robust_refuses_labels_without_information(share):
    with pytest.raises(AssertionError):
        robust_loss(MARGINS, share)


@pytest.mark.parametrize("loss", [sigmoid_loss, hinge_loss, partial(ipo_loss, beta=BETA)])
def test_a_label_is_an_expectation(loss):
    label = f64([1.0, 0.0, 0.5], [0.3, 0.8, 0.6])
    value = labelled(loss, MARGINS, label)
    torch.testing.assert_close(value, labelled(loss, -MARGINS, 1 - label))  # the pair swapped
    torch.testing.assert_close(labelled(loss, MARGINS, torch.ones(2, 3).double()), loss(MARGINS))
    torch.testing.assert_close(value[0, 1], loss(-MARGINS)[0, 1])
    expected = label * slope(loss) - (1 - label) * slope(loss, -MARGINS)
    torch.testing.assert_close(slope(lambda m: labelled(loss, m, label)), expected)


def test_a_label_is_held_fixed():
    label, margin = f64([0.3]).requires_grad_(), f64([0.5]).requires_grad_()
    labelled(sigmoid_loss, margin, label).sum().backward()
    assert label.grad is None and margin.grad is not None


def test_without_its_extra_term_rpo_is_dpo():
    logp = -torch.rand(2, 3, dtype=torch.float64)
    assert torch.equal(rpo_loss(MARGINS, logp, BETA, eta=0.0), sigmoid_loss(MARGINS))


def test_the_likelihood_of_rpo_is_that_of_the_chosen():
    def loss(logp):
        return rpo_loss(BETA * delta_13(logp), logp[1].view(1, 1), BETA, eta=0.3).sum()

    assert_golden(loss(A_POLICY), 0.69223967)
    actual = a_gradient(loss)
    expected = f64(0.02591730, -0.24889013, 0.01053719, 0.18898469, 0.02345095)
    assert_golden(actual, expected)
    # −σ(−m) β (e_w − e_l) − ηβ (e_w − π)
    e = torch.eye(5, dtype=torch.float64)
    dpo = -torch.sigmoid(-BETA * delta_13(A_POLICY)).item() * BETA * (e[1] - e[3])
    torch.testing.assert_close(actual, dpo - 0.3 * BETA * (e[1] - A_POLICY.exp()))


def test_the_bonus_of_xpo_raises_the_forward_kl():
    def bonus(logp):
        return (A_REF.exp() * exploration_bonus(logp, alpha=1.0)).sum()

    assert_golden(bonus(A_POLICY), -1.84902096)
    gradient = a_gradient(bonus)
    torch.testing.assert_close(gradient, A_REF.exp() - A_POLICY.exp())
    torch.testing.assert_close(gradient, -a_gradient(lambda logp: kl(A_REF, logp)))
    expected = f64(0.05483157, -0.27185435, 0.27774415, -0.04682559, -0.01389578)
    assert_golden(gradient, expected)


@pytest.mark.parametrize(("sample", "expected"), [(3, 0.55800416), (1, 0.57100416)])
def test_xpo_weighs_the_reference_sample_whichever_side_won(sample, expected):
    pair = sigmoid_loss(BETA * delta_13(A_POLICY))
    assert_golden(pair + exploration_bonus(A_POLICY[sample], alpha=0.01), f64([expected]))


def test_golden_values_of_one_pair():
    delta = delta_13(A_POLICY)
    by_lengths = (A_RHO[1] / 4 - A_RHO[3] / 2).view(1, 1)  # TRL's offline form
    for actual, expected in (
        (sigmoid_loss(BETA * delta), 0.58032997),
        (hinge_loss(BETA * delta), 0.76),
        (ipo_loss(delta, BETA), 0.4225),
        (ipo_loss(delta, BETA, normalised=True), 0.0676),
        (ipo_loss(by_lengths, BETA), 1.54614317),
    ):
        assert_golden(actual, f64([expected]))
    gradient = a_gradient(lambda logp: sigmoid_loss(BETA * delta_13(logp)).sum())
    assert_golden(gradient, f64(0, -0.17611454, 0, 0.17611454, 0))


def test_golden_values_of_a_pair_of_completions():
    logits = B_LOGITS.clone().requires_grad_()
    rho = (b_token_logps(logits) - b_token_logps(B_REF_LOGITS)).sum(1)
    loss = sigmoid_loss(BETA * (rho[0] - rho[1]).view(1, 1))
    assert_golden(loss, f64([0.29578804]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert_golden(gradient.norm(), 0.23240241)


def test_best_of_k_is_the_likelihood_of_the_best():
    gradient = a_gradient(lambda logp: best_of_k_sft_loss(logp[2].view(1, 1)).sum())
    expected = f64(0.21597754, 0.39353673, -0.91219009, 0.10725127, 0.19542456)
    assert_golden(gradient, expected)


def expected_ipo(logp, sampler, beta, preferences=A_PREFERENCES, ref=A_REF):
    """IPO over both labels and every ordered pair of the sampler's completions."""
    rho = logp - ref
    delta = rho[:, None] - rho[None, :]
    loss = labelled(partial(ipo_loss, beta=beta), delta, preferences)
    return sampler @ loss @ sampler


def self_play(logp, beta):
    """E_π[(P(y ≻ π) − 1/2 − βρ(y)) ∇log π(y)] in the logits, as a surrogate's gradient."""
    law = logp.exp().detach()
    bracket = A_PREFERENCES @ law - 0.5 - beta * (logp - A_REF).detach()
    return (law * bracket * logp).sum()


def test_online_ipo_is_self_play():
    def loss(logp):
        return expected_ipo(logp, logp.exp().detach(), BETA)

    assert_golden(loss(A_POLICY), 2.76211822)
    gradient = a_gradient(loss)
    expected = f64(-0.55728095, 1.38732872, -0.53240371, -0.04087463, -0.25676943)
    assert_golden(gradient, expected)
    played = a_gradient(lambda logp: self_play(logp, BETA))
    expected = f64(0.05572810, -0.13873287, 0.05324037, 0.00408746, 0.02567694)
    assert_golden(played, expected)
    torch.testing.assert_close(gradient, -4 / BETA * played)


@pytest.mark.parametrize("beta", A_NASH)
def test_online_ipo_rests_at_the_nash_policy(beta):
    gradient = a_gradient(
        lambda logp: expected_ipo(logp, logp.exp().detach(), beta), A_NASH[beta].log()
    )
    assert gradient.abs().max() < 1e-6
    assert a_gradient(lambda logp: expected_ipo(logp, logp.exp().detach(), beta)).norm() > 0.1


def two_responses():
    return f64(0.3, 0.7).log(), f64([0.5, 0.8], [0.2, 0.5])


def three_responses():
    return f64(0.2, 0.3, 0.5).log(), f64([0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5])


@pytest.mark.parametrize(
    ("game", "sampler", "optimum"),
    [
        (two_responses, (0.5, 0.5), (0.47569471, 0.52430529)),
        (two_responses, (0.9, 0.1), (0.47569471, 0.52430529)),
        (two_responses, None, (0.47569471, 0.52430529)),
        (three_responses, (1 / 3, 1 / 3, 1 / 3), (0.22487060, 0.33730590, 0.43782350)),
        (three_responses, (0.8, 0.1, 0.1), (0.19310016, 0.17134415, 0.63555570)),
        (three_responses, None, (0.22503832, 0.38415597, 0.39080570)),
    ],
)
def test_the_optimum_of_ipo_depends_on_who_samples(game, sampler, optimum):
    ref, preferences = game()
    optimum = f64(*optimum)
    law = optimum if sampler is None else f64(*sampler)
    closed_form = (ref + preferences @ law / 0.4).softmax(0)
    torch.testing.assert_close(closed_form, optimum, rtol=0, atol=2e-8)

    def loss(logp):
        return expected_ipo(logp, law, 0.4, preferences, ref)

    assert a_gradient(loss, optimum.log()).abs().max() < 2e-7
    assert a_gradient(loss, ref).abs().max() > 1e-2


RECORDED = [(1, 3), (0, 2), (2, 4), (4, 0), (3, 1), (2, 1)]


def descend(pairs):
    logits = A_REF.clone()
    for winner, loser in pairs:

        def loss(logp, winner=winner, loser=loser):
            return ipo_loss(all_deltas(logp)[winner, loser].view(1, 1), BETA).sum()

        logits = logits - 0.05 * a_gradient(loss, logits)
    return logits


def test_pairs_trained_on_in_another_order_give_another_policy():
    in_order, reverse = descend(RECORDED), descend(RECORDED[::-1])
    expected = f64(-1.33259110, -2.25259110, -0.87259110, -2.78134110, -1.69259110)
    assert_golden(in_order, expected)
    expected = f64(-1.26884110, -2.18384110, -0.91884110, -2.85384110, -1.70634110)
    assert_golden(reverse, expected)
    assert_golden((in_order - reverse).abs().max(), 0.0725)


def test_dpo_moves_the_two_logits_only():
    gradient = a_gradient(lambda logp: sigmoid_loss(BETA * delta_13(logp)).sum())
    moved = (A_LOGITS - gradient).softmax(0)
    expected = f64(0.20404759, 0.44339801, 0.08295956, 0.08496494, 0.18462990)
    assert_golden(moved, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda flat, pair: sigmoid_loss(flat),
        lambda flat, pair: hinge_loss(flat),
        lambda flat, pair: ipo_loss(flat, BETA),
        lambda flat, pair: ipo_loss(pair, 0.0),
        lambda flat, pair: labelled(sigmoid_loss, pair, flat),
        lambda flat, pair: rpo_loss(pair, flat, BETA, 0.1),
        lambda flat, pair: exploration_bonus(pair, -0.1),
        lambda flat, pair: best_of_k_sft_loss(flat),
    ],
)
def test_refuses_what_it_cannot_mean(call):
    with pytest.raises(AssertionError):
        call(torch.zeros(3), torch.zeros(3, 1))
