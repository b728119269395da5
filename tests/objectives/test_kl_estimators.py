"""Three unbiased estimators of a sequence KL, over every sequence: same mean, unlike noise."""

import pytest

from tests.objectives.fixtures import (
    C_KL,
    C_LOGITS,
    C_REF_LOGITS,
    assert_golden,
    c_laws,
    c_logps,
    c_token_logps,
    f64,
)
from trl_ext.objectives.kl import k3, vocab_kl

TOKENS, REF_TOKENS = c_token_logps(C_LOGITS), c_token_logps(C_REF_LOGITS)
ESTIMATES = {
    "exact_per_step": vocab_kl(c_laws(C_LOGITS), c_laws(C_REF_LOGITS)).sum(1),
    "k1": (TOKENS - REF_TOKENS).sum(1),
    "k3": k3(TOKENS, REF_TOKENS).sum(1),
    "k3_of_the_sequence": k3(TOKENS.sum(1), REF_TOKENS.sum(1)),
}


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("exact_per_step", 0.69506119),
        ("k1", 1.87481387),
        ("k3_of_the_sequence", 2.42590131),
        ("k3", 2.05179043),
    ],
)
def test_mean_and_standard_deviation(name, deviation):
    law, estimate = c_logps(C_LOGITS).exp(), ESTIMATES[name]
    mean = law @ estimate
    assert_golden(mean, C_KL)
    assert_golden((law @ (estimate - mean) ** 2).sqrt(), deviation)


def test_single_samples_of_the_exact_steps():
    assert_golden(ESTIMATES["exact_per_step"][[1, 6]], f64(2.86457343, 0.02881163))
