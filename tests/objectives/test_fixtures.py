"""The fixtures are those of the golden values."""

import torch

from tests.objectives.fixtures import (
    A_NASH,
    A_OLD,
    A_POLICY,
    A_PREFERENCES,
    A_REF,
    A_RHO,
    B_LOGITS,
    B_REF_LOGITS,
    C_KL,
    C_KL_GRADIENT,
    C_LOGITS,
    C_REF_LOGITS,
    assert_golden,
    b_token_logps,
    c_gradient,
    c_logps,
    f64,
    kl,
)


def test_one_categorical_policy():
    rho = f64(-0.22623978, 1.17376022, -1.42623978, 0.57376022, 0.07376022)
    assert_golden(A_RHO, rho)
    wins = f64(0.52202411, 0.47146844, 0.39031074, 0.62210793, 0.51538740)
    assert_golden(A_PREFERENCES @ A_POLICY.exp(), wins)
    wins_old = f64(0.54980467, 0.48047072, 0.44650033, 0.54950078, 0.45102398)
    assert_golden(A_PREFERENCES @ A_OLD.exp(), wins_old)
    assert_golden(kl(A_POLICY, A_REF), 0.36376813)
    torch.testing.assert_close(A_PREFERENCES + A_PREFERENCES.T, torch.ones(5, 5).double())


def test_the_nash_policy_answers_itself():
    for beta, policy in A_NASH.items():
        answer = (A_REF + A_PREFERENCES @ policy / beta).softmax(0)
        torch.testing.assert_close(answer, policy, rtol=0, atol=2e-8)


def test_one_pair_of_completions():
    expected = f64([0.14875231, -0.82121687, 1.18429970], [-0.83300274, -0.15794808, -1.16365246])
    actual = b_token_logps(B_LOGITS) - b_token_logps(B_REF_LOGITS)
    assert_golden(actual, expected)


def test_nine_sequences():
    logp, ref = c_logps(C_LOGITS), c_logps(C_REF_LOGITS)
    assert_golden(logp.exp().sum(), 1.0)
    assert_golden(logp[[1, 6]], f64(-3.69503884, -7.00147676))
    assert_golden((logp - ref)[[1, 6]], f64(-0.43191406, 0.35957550))
    assert_golden(kl(logp, ref), C_KL)
    gradient = c_gradient(lambda logits: kl(c_logps(logits), ref))
    assert_golden(gradient, C_KL_GRADIENT)
