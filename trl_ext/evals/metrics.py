"""From a table of rewards to the numbers that a report quotes, each with its standard error.

The prompt is the sampling unit: completions of one prompt share its difficulty, so that P·G
completions are not P·G independent observations. Every number is a mean over prompts of an
estimate per prompt, and its standard error is that of this mean.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from trl_ext.objectives.jepo import bound_estimate
from trl_ext.objectives.majority import Unparsable, majority_at_k
from trl_ext.objectives.pkpo import max_at_k
from trl_ext.objectives.scorable import scorable_groups

# A sum of weighted rewards that should be 1.0 may end at 0.9999999 in floating point.
THRESHOLD_SLACK = 1e-6


def generation_metrics(
    rewards_PG: Tensor,
    labels_PG: Tensor | None = None,
    ks: Iterable[int] | None = None,
    *,
    success_threshold: float = 1.0,
    unparsable: Unparsable = "null",
) -> dict[str, float]:
    """pass@k, maj@k, pass^k and mean reward of sampled completions, with standard errors.

    Args:
        rewards_PG: `(P, G)`, G completions of each of P prompts; NaN where unscorable.
        labels_PG: `(P, G)` integers, equal where the answers are equal, -1 where none was found.
            Without it there is no maj@k.
        ks: values of k, each in [1, G]; `None` means the powers of two up to G.
        success_threshold: least reward of a correct completion.
        unparsable: what completions without an answer do in a vote, see `majority_at_k`.

    Returns:
        `{"pass@1": ..., "pass@1_se": ..., ...}`. NaN where no prompt has enough scorable
        completions, and for the standard error of a single prompt.

    Raises:
        ValueError: a k outside [1, G], or shapes that do not fit.
    """
    ks = checked_ks(ks, rewards_PG.size(1))
    return summarise(
        per_prompt_estimates(
            rewards_PG,
            labels_PG,
            ks,
            success_threshold=success_threshold,
            unparsable=unparsable,
        )
    )


def per_prompt_estimates(
    rewards_PG: Tensor,
    labels_PG: Tensor | None,
    ks: tuple[int, ...],
    *,
    success_threshold: float = 1.0,
    unparsable: Unparsable = "null",
) -> dict[str, Tensor]:
    """The unbiased estimates behind `generation_metrics`, one `(P,)` tensor per number.

    Each value is NaN for a prompt with fewer scorable completions than it needs. Two policies
    evaluated on the same prompts are compared by the difference of these tensors.
    """
    if labels_PG is not None and labels_PG.shape != rewards_PG.shape:
        raise ValueError(
            f"labels_PG has shape {tuple(labels_PG.shape)} and rewards_PG {tuple(rewards_PG.shape)}"
            ": each completion needs one label. Give both the shape (P, G)."
        )
    rewards_PG = rewards_PG.double()
    success_PG = successes(rewards_PG, success_threshold)
    estimates = {}
    for k in ks:
        estimates[f"pass@{k}"] = over_scorable(partial(max_at_k, k=k), success_PG, least=k)
        estimates[f"pass^{k}"] = over_scorable(partial(pass_hat_k, k=k), success_PG, least=k)
        if labels_PG is not None:
            majority = partial(majority_at_k, k=k, unparsable=unparsable)
            estimates[f"maj@{k}"] = over_scorable(majority, success_PG, labels_PG, least=k)
    estimates["mean_reward"] = rewards_PG.nanmean(1)
    return estimates


def nll_bounds(answer_logp_PG: Tensor, ks: tuple[int, ...]) -> dict[str, Tensor]:
    """Upper bounds −Lₖ on the answer's negative log-likelihood, as `nll_L1`, `nll_L2`, ...

    −log π(a*|x) ≤ −Lₖ = −E log (1/k) Σⱼ π(a*|x, cⱼ),   falling in k

    Args:
        answer_logp_PG: `(P, G)`, log π(a*|x, c) of G thoughts, nats; NaN where a thought has no
            marker. It is left out: the bounds are those of the policy given that it comes to one.
        ks: numbers of thoughts, each in [1, G].

    Returns:
        One `(P,)` per k, nats, unbiased; NaN for a prompt with fewer than k thoughts with a marker.

    Source: arXiv:2503.19618.
    """
    return {
        f"nll_L{k}": -over_scorable(partial(bound_estimate, n=k), answer_logp_PG.double(), least=k)
        for k in ks
    }


def pass_hat_k(success_PG: Tensor, k: int) -> Tensor:
    """Unbiased probability that all of k samples are correct, written pass^k.

    pass^k = C(c, k) / C(n, k),   c correct among n = G

    Args:
        success_PG: `(P, G)`, 0 or 1.
        k: samples that must all be correct, in [1, G].

    Returns:
        `(P,)` in [0, 1]; exactly 0 where c < k.

    Source: τ-bench, arXiv:2406.12045, section 3.
    """
    assert success_PG.dim() == 2 and 1 <= k <= success_PG.size(1), (success_PG.shape, k)
    n, correct = success_PG.size(1), success_PG.sum(1).long().tolist()
    values = [math.comb(c, k) / math.comb(n, k) for c in correct]
    return torch.tensor(values, dtype=success_PG.dtype, device=success_PG.device)


def successes(rewards_PG: Tensor, threshold: float) -> Tensor:
    """1 where the reward reaches the threshold, 0 below it, NaN where there is no reward."""
    reached_PG = (rewards_PG >= threshold - THRESHOLD_SLACK).to(rewards_PG.dtype)
    return reached_PG.masked_fill(rewards_PG.isnan(), math.nan)


def over_scorable(
    estimate: Callable[..., Tensor], values_PG: Tensor, *labels_PG: Tensor, least: int
) -> Tensor:
    """Estimate per prompt from its scorable completions, as if the others were never drawn.

    Args:
        estimate: `(P', n)` values and labels to `(P',)`.
        values_PG: `(P, G)`, NaN where unscorable.
        labels_PG: further `(P, G)` tensors handed to `estimate`.
        least: completions that `estimate` needs.

    Returns:
        `(P,)`; NaN where fewer than `least` are scorable.
    """
    result_P = values_PG.new_full((values_PG.size(0),), math.nan)
    for kept_PG, groups in scorable_groups(values_PG, *labels_PG, min_samples=least):
        result_P[kept_PG.any(1)] = estimate(*groups).to(result_P.dtype)
    return result_P


def summarise(estimates: dict[str, Tensor]) -> dict[str, float]:
    """Mean over prompts and its standard error, sd / √P, where P counts prompts with a value."""
    summary = {}
    for name, values_P in estimates.items():
        known_P = values_P[~values_P.isnan()].double()
        summary[name] = known_P.mean().item() if known_P.numel() else math.nan
        summary[f"{name}_se"] = standard_error(known_P)
    return summary


def standard_error(values_P: Tensor) -> float:
    """Standard error of a mean, sd / √P; NaN for a single value."""
    P = values_P.numel()
    return (values_P.double().std() / math.sqrt(P)).item() if P > 1 else math.nan


def won(lead: Tensor) -> Tensor:
    """1 where the lead is positive, 1/2 at a lead of 0, 0 below, NaN where it is unknown."""
    return (lead.sign() / 2 + 0.5).masked_fill(lead.isnan(), math.nan)


def checked_ks(ks: Iterable[int] | None, num_generations: int) -> tuple[int, ...]:
    """Sorted values of k, each in [1, num_generations]; `None` means the powers of two."""
    if ks is None:
        return tuple(2**i for i in range(num_generations.bit_length()))
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1 or ks[-1] > num_generations:
        raise ValueError(
            f"ks={ks} must name at least one k, each between 1 and num_generations="
            f"{num_generations}: more samples than were drawn say nothing without bias. "
            f"Raise num_generations to {max(ks, default=1)} or remove the larger values of k."
        )
    return ks
