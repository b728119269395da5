"""KL gradients in float64 against golden values and autograd of the definition."""

import itertools

import pytest
import torch

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.kl import (
    k3,
    kl_baseline_loss,
    kl_to_go,
    prefix_ratio,
    sequence_kl_loss,
    sequence_total_kl_loss,
    sequence_vocab_kl_loss,
    vocab_kl,
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# Two tokens of three; logits of the first, then of the second given the first.
POLICY = (f64([0.3, -0.2, 0.5]), f64([[0.1, 0.4, -0.3], [-0.5, 0.2, 0.6], [0.7, -0.1, 0]]))
REFERENCE = (f64([-0.4, 0.6, 0.1]), f64([[0.5, -0.6, 0.2], [0.3, 0.3, -0.8], [-0.2, 0.9, 0.4]]))
SAMPLER = (f64([0, 0.3, -0.3]), f64([[0.2, 0, 0.1], [-0.1, 0.5, 0], [0, 0.3, -0.6]]))
FIRST, SECOND = f64(list(itertools.product(range(3), repeat=2))).long().T
MASK = torch.ones(9, 2)

FULL = f64(
    [
        *(0.13259, -0.20756, 0.07497),
        *(-0.070664, 0.12588, -0.055216),
        *(-0.04749, -0.045394, 0.092883),
        *(0.171012, -0.112648, -0.058364),
    ]
)
PREFIX_FIXED = torch.cat([f64([0.159583, -0.224926, 0.065343]), FULL[3:]])


def logps(logits):
    """`(9, 2)`: both tokens of each of the nine sequences."""
    first, second = (x.log_softmax(-1) for x in logits)
    return torch.stack([first[FIRST], second[FIRST, SECOND]], dim=1)


def laws(logits):
    """`(9, 2, 3)`: both next-token logits of each sequence."""
    first, second = logits
    return torch.stack([first.expand(9, 3), second[FIRST]], dim=1)


def probabilities(logits):
    return logps(logits).sum(1).exp().detach()


def gradient(loss_of, sampler=POLICY):
    """Expected gradient of a `(9, 2)` loss over sequences drawn from the sampler."""
    leaves = [x.clone().requires_grad_() for x in POLICY]
    loss = (probabilities(sampler) * loss_of(leaves).sum(1)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


def definition(logits):
    law, log_ratio = logps(logits).sum(1).exp(), (logps(logits) - logps(REFERENCE)).sum(1)
    return (law * log_ratio).sum()


def exact_gradient():
    leaves = [x.clone().requires_grad_() for x in POLICY]
    return torch.cat([g.flatten() for g in torch.autograd.grad(definition(leaves), leaves)])


FORMS = {
    "sequence": lambda x, old: sequence_kl_loss(logps(x), old, logps(REFERENCE), MASK),
    "sequence_total": lambda x, old: sequence_total_kl_loss(logps(x), old, logps(REFERENCE), MASK),
    "sequence_vocab": lambda x, old: sequence_vocab_kl_loss(
        vocab_kl(laws(x), laws(REFERENCE)), logps(x), old, MASK
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampler", [POLICY, SAMPLER], ids=["on-policy", "off-policy"])
def test_sequence_forms_are_exact(form, sampler):
    actual = gradient(lambda x: FORMS[form](x, logps(sampler)), sampler)
    torch.testing.assert_close(actual, exact_gradient(), rtol=0, atol=1e-15)
    torch.testing.assert_close(actual, FULL, rtol=0, atol=1e-6)


def test_token_ratio_gives_the_prefix_fixed_part_only():
    def loss(x):
        ratio = torch.exp(logps(x) - logps(POLICY).detach())
        return ratio * k3(logps(x), logps(REFERENCE))

    torch.testing.assert_close(gradient(loss), PREFIX_FIXED, rtol=0, atol=1e-6)


def test_k3_is_unbiased_for_the_value_and_its_gradient_is_the_other_direction():
    policy, reference = POLICY[0].clone().requires_grad_(), REFERENCE[0]
    logp, ref = policy.log_softmax(0), reference.log_softmax(0)
    law = logp.exp().detach()
    estimate = k3(logp.unsqueeze(0), ref.unsqueeze(0))[0]
    torch.testing.assert_close((law * estimate).sum(), (logp.exp() * (logp - ref)).sum())
    (actual,) = torch.autograd.grad((law * estimate).sum(), policy)
    torch.testing.assert_close(actual, f64([0.167291, -0.292002, 0.124711]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("G", [2, 3])
def test_leave_one_out_keeps_the_gradient_and_the_group_mean_shrinks_it(G):
    """Joint outcomes of a group: 81 and 729."""
    weights, log_ratio = probabilities(POLICY), (logps(POLICY) - logps(REFERENCE)).detach()
    to_go, total = kl_to_go(log_ratio), {"loo": 0.0, "mean": 0.0}
    leaves = [x.clone().requires_grad_() for x in POLICY]
    for group in itertools.product(range(9), repeat=G):
        logp, index = logps(leaves)[list(group)], list(group)
        values = to_go[index].T.contiguous()  # (T, G)
        baselines = {"loo": leave_one_out(values).T, "mean": values.mean(1).expand(G, 2)}
        for name, baseline in baselines.items():
            args = (logp, logp.detach(), torch.ones(G, 2))
            loss = sequence_kl_loss(*args[:2], logps(REFERENCE)[index], args[2])
            loss = (loss + kl_baseline_loss(baseline, *args)).sum(1).mean()
            total[name] = total[name] + weights[index].prod() * loss
    for name, expected in (("loo", FULL), ("mean", (G - 1) / G * FULL)):
        grads = torch.autograd.grad(total[name], leaves, retain_graph=True)
        actual = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_finite_differences_agree():
    step, expected = 1e-6, exact_gradient()
    flat = torch.cat([x.flatten() for x in POLICY])
    for i in range(flat.numel()):
        moved = []
        for sign in (step, -step):
            theta = flat.clone()
            theta[i] += sign
            moved.append(definition((theta[:3], theta[3:].view(3, 3))))
        assert abs((moved[0] - moved[1]) / (2 * step) - expected[i]) < 1e-8


def test_stop_gradients_stop():
    logp, old, ref = (logps(x).requires_grad_() for x in (POLICY, SAMPLER, REFERENCE))
    for form in (sequence_kl_loss, sequence_total_kl_loss):
        form(logp, old, ref, MASK).sum().backward()
    sequence_vocab_kl_loss(
        vocab_kl(laws(POLICY), laws(REFERENCE)), logp, old, MASK
    ).sum().backward()
    kl_baseline_loss(old, logp, old, MASK).sum().backward()
    assert logp.grad is not None and old.grad is None and ref.grad is None


def test_masked_tokens_neither_count_nor_move_the_ratio():
    logp, old, ref = logps(POLICY), logps(SAMPLER), logps(REFERENCE)
    mask = f64([[1, 0]]).expand(9, 2)
    noisy = logp + f64([[0, 5.0]])
    for form in (sequence_kl_loss, sequence_total_kl_loss):
        assert torch.equal(form(logp, old, ref, mask), form(noisy, old, ref, mask))
    assert torch.equal(prefix_ratio(noisy, old, mask)[:, 1], prefix_ratio(logp, old, mask)[:, 0])


def test_policy_equal_to_reference_gives_exactly_nothing():
    leaves = [x.clone().requires_grad_() for x in POLICY]
    logp = logps(leaves)
    loss = sequence_kl_loss(logp, logp.detach(), logp.detach(), MASK)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), leaves))


def test_kl_to_go():
    values = f64([[1.0, 2.0, 4.0]])
    assert kl_to_go(values).tolist() == [[7.0, 6.0, 4.0]]
    assert kl_to_go(values, include_own=False).tolist() == [[6.0, 4.0, 0.0]]
