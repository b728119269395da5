"""Each `kl_gradient` has the gradient that it claims, through the real trainer."""

import pytest
import torch
import trl
from trl.trainer import grpo_trainer

from tests.exact import (
    COMPLETIONS,
    PROMPTS,
    Enumeration,
    T,
    assert_same_gradient,
    cosine,
    gradient_of,
    probability,
    sequence_kl,
    settings,
    table,
    tabular,
    token_logps,
)
from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.objectives import kl
from trl_ext.trainers import grpo

POLICY, REFERENCE, OTHER = table(1), table(2), table(3)
BETA = 0.5
EXACT = ("sequence", "sequence_total", "sequence_vocab")
GRADIENTS = (*EXACT, "token", "forward_token")


def run(folder, config=GRPOConfig, trainer=GRPOTrainer, sampler=None, prompt=PROMPTS[0], **options):
    """Expected gradient of the KL term: no reward, so nothing else is left."""
    options = settings(beta=BETA, **options)
    case = Enumeration(
        trainer, lambda f: config(f, **options), POLICY, REFERENCE, prompt, sampler=sampler
    )
    scale = T if options["loss_type"] == "dr_grpo" else 1
    return case.expected_gradient(str(folder)) * scale / BETA


def sequence_gradient(prompt=PROMPTS[0]):
    return gradient_of(lambda w: sequence_kl(w, REFERENCE, prompt), POLICY)


def prefix_fixed(direction):
    """Σₜ of the next-token KL's gradient at prefixes that do not move."""

    def objective(weights):
        total = 0.0
        for completion in COMPLETIONS:
            law = probability(POLICY, PROMPTS[0], [completion])
            previous = torch.tensor([PROMPTS[0], *completion[:-1]])
            logp, ref = (w.log_softmax(0)[:, previous] for w in (weights, REFERENCE))
            first, second = (logp, ref) if direction == "reverse" else (ref, logp)
            total = total + law * (first.exp() * (first - second)).sum()
        return total

    return gradient_of(objective, POLICY)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "luspo"])
@pytest.mark.parametrize("kl_gradient", EXACT)
def test_exact_forms_are_the_sequence_kl(kl_gradient, loss_type, tmp_path):
    for prompt in PROMPTS:
        actual = run(tmp_path, kl_gradient=kl_gradient, loss_type=loss_type, prompt=prompt)
        assert_same_gradient(actual, sequence_gradient(prompt))


@pytest.mark.parametrize("kl_gradient", EXACT)
def test_exact_forms_stay_exact_with_a_baseline(kl_gradient, tmp_path):
    actual = run(tmp_path, kl_gradient=kl_gradient, kl_baseline="leave_one_out", num_generations=3)
    assert_same_gradient(actual, sequence_gradient())


@pytest.mark.parametrize("kl_baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("kl_gradient", EXACT)
def test_exact_forms_stay_exact_off_policy(kl_gradient, kl_baseline, tmp_path):
    """Sampled from one policy, differentiated at another: the second of two iterations."""
    options = dict(kl_gradient=kl_gradient, kl_baseline=kl_baseline, num_iterations=2)
    assert_same_gradient(run(tmp_path, sampler=OTHER, **options), sequence_gradient())


@pytest.mark.parametrize("kl_gradient", EXACT)
def test_exact_forms_stay_exact_where_a_server_samples_another_policy(kl_gradient, tmp_path):
    """vLLM's precision makes it one; TRL corrects the policy term for it and leaves the KL."""
    actual = run(tmp_path, sampler=OTHER, kl_gradient=kl_gradient)
    assert_same_gradient(actual, sequence_gradient())


def test_token_is_the_prefix_fixed_part_of_the_reverse_kl(tmp_path):
    actual = run(tmp_path, kl_gradient="token")
    assert_same_gradient(actual, prefix_fixed("reverse"))
    assert cosine(actual, sequence_gradient()) < 0.999


def test_forward_token_is_the_prefix_fixed_forward_kl(tmp_path):
    actual = run(tmp_path, kl_gradient="forward_token")
    assert_same_gradient(actual, prefix_fixed("forward"))
    assert cosine(actual, sequence_gradient()) < 0.99


@pytest.mark.parametrize(("corrected", "name"), [(True, "token"), (False, "forward_token")])
def test_trl_computes_the_partial_forms(corrected, name, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", lambda *_, **__: tabular(REFERENCE))
    theirs = run(
        tmp_path, config=trl.GRPOConfig, trainer=trl.GRPOTrainer, use_bias_correction_kl=corrected
    )
    torch.testing.assert_close(theirs, run(tmp_path, kl_gradient=name), rtol=1e-12, atol=1e-15)


def test_the_harness_knows_the_probabilities():
    for prompt in PROMPTS:
        total = sum(probability(POLICY, prompt, [c]) for c in COMPLETIONS)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert len({len(token_logps(POLICY, prompt, c)) for c in COMPLETIONS}) == 2


def test_mutation_k1_differentiated(tmp_path, monkeypatch):
    """As a loss the log-ratio has gradient 0 in expectation: the harness must not be satisfied."""
    monkeypatch.setattr(
        grpo, "sequence_kl_loss", lambda logp, old, ref, mask: (logp - ref.detach()) * mask
    )
    assert run(tmp_path, kl_gradient="sequence").norm() < 1e-6 * sequence_gradient().norm()


def test_mutation_prefix_ratio_detached(tmp_path, monkeypatch):
    """ "Because it is 1 on policy": its gradient is not."""
    ratio = kl.prefix_ratio
    monkeypatch.setattr(kl, "prefix_ratio", lambda *args: ratio(*args).detach())
    assert run(tmp_path, kl_gradient="sequence").norm() == 0
