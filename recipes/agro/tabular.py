"""The claim by enumeration: which rules drive KL(π‖π*) to 0 on completions of another policy?

Every prompt has a few answers, each with a reward, and the policy is a table of their logits. The
data law μ, the reference and the rewards are drawn, and stay. π* ∝ ref · exp(r/β) is known, so that
the KL to it is a sum. A step follows the expected gradient, over every pair of answers with its
probability under μ, or the mean over a few sampled pairs.

| rule              | loss of a pair of answers                                              |
|-------------------|------------------------------------------------------------------------|
| `agro`            | AGRO: the return, KL in it, against the other's                        |
| `agro_centred`    | the same against the mean of both                                      |
| `policy_gradient` | the reward against the other's, and β KL in the loss (k2), no ratio    |
| `ratio`           | AGRO's times π/μ: the policy gradient corrected, exact in expectation  |
| `dpo`             | DPO, labels drawn by Bradley and Terry: P(i beats j) = σ(rᵢ − rⱼ)      |
| `dpo_better`      | DPO, the better answer is always the chosen one                        |

Source: the setting of arXiv:2503.19612, figure 1; the table's sizes and numbers are ours.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from trl_ext.objectives.agro import agro_loss, regularised_reward
from trl_ext.objectives.pairs import labelled, sigmoid_loss
from trl_ext.objectives.sequence_policy import (
    importance_weighted_loss,
    leave_one_out_advantage,
    reinforce_loss,
)

BETA = 0.25
PROMPTS, ANSWERS = 8, 6
RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
SAMPLED_PAIRS = 8  # per prompt and step
MODES = ("expected", "sampled")
Row = dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers: rewards, nats of policy, reference and writer, `(..., 2)`; `first` says
    whether the first is the chosen one, or with which probability, `(...)`."""

    rewards: Tensor
    logp: Tensor
    ref_logp: Tensor
    writer_logp: Tensor
    first: Tensor

    @property
    def returns(self) -> Tensor:
        return regularised_reward(self.rewards, self.logp, self.ref_logp, BETA)

    @property
    def margin(self) -> Tensor:
        rho = BETA * (self.logp - self.ref_logp)
        return rho[:, :1] - rho[:, 1:]


def agro_centred(pairs: Pairs) -> Tensor:
    R = pairs.returns
    return reinforce_loss(pairs.logp, R - R.mean(1, keepdim=True))


def policy_gradient(pairs: Pairs) -> Tensor:
    k2 = (pairs.logp - pairs.ref_logp).square() / 2
    return reinforce_loss(pairs.logp, leave_one_out_advantage(pairs.rewards)) + BETA * k2


def ratio(pairs: Pairs) -> Tensor:
    advantage = leave_one_out_advantage(pairs.returns)
    return importance_weighted_loss(pairs.logp, pairs.writer_logp, advantage)


def dpo(pairs: Pairs) -> Tensor:
    return labelled(sigmoid_loss, pairs.margin, pairs.first.unsqueeze(1))


def dpo_better(pairs: Pairs) -> Tensor:
    better = (pairs.rewards[:, :1] > pairs.rewards[:, 1:]).to(pairs.margin)
    decided = (pairs.rewards[:, :1] != pairs.rewards[:, 1:]).to(pairs.margin)
    return decided * labelled(sigmoid_loss, pairs.margin, better)


RULES: dict[str, Callable[[Pairs], Tensor]] = {
    "agro": lambda pairs: agro_loss(pairs.returns, pairs.logp),
    "agro_centred": agro_centred,
    "policy_gradient": policy_gradient,
    "ratio": ratio,
    "dpo": dpo,
    "dpo_better": dpo_better,
}


@dataclass(frozen=True)
class Problem:
    """Rewards in [0, 1], and nats of reference and writer, `(X, N)` each."""

    rewards: Tensor
    ref_logp: Tensor
    writer_logp: Tensor

    @property
    def optimum(self) -> Tensor:
        return (self.ref_logp + self.rewards / BETA).log_softmax(1)


def draw_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape, options = (PROMPTS, ANSWERS), {"generator": generator, "dtype": torch.float64}
    rewards = torch.rand(shape, **options)
    return Problem(rewards, *(torch.randn(shape, **options).log_softmax(1) for _ in range(2)))


def pairs_of(problem: Problem, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places of pairs `(X, S, 2)`, weights `(X, S)`, chances `(X, S)` that the first is chosen.

    Without a generator every pair with its probability, else some that the writer sampled and
    somebody labelled.
    """
    X, N = problem.rewards.shape
    if generator is None:
        index = torch.cartesian_prod(torch.arange(N), torch.arange(N)).expand(X, -1, -1)
        weight = taken(problem.writer_logp, index).sum(-1).exp()
    else:
        drawn = problem.writer_logp.exp().multinomial(2 * SAMPLED_PAIRS, True, generator=generator)
        index = drawn.view(X, SAMPLED_PAIRS, 2)
        weight = torch.full((X, SAMPLED_PAIRS), 1 / SAMPLED_PAIRS, dtype=torch.float64)
    reward = taken(problem.rewards, index)
    first = torch.sigmoid(reward[..., 0] - reward[..., 1])
    return index, weight, first if generator is None else first.bernoulli(generator=generator)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Values `(..., X, N)` at the places `(X, S, 2)`: `(..., X, S, 2)`."""
    shape = (*values.shape[:-1], *index.shape[-2:])
    return values.gather(-1, index.flatten(1).expand(*values.shape[:-1], -1)).view(shape)


def gradient(rule: str, problem: Problem, logits: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
    """Gradient `(K, X, N)` of the weighted loss of the pairs in the logits `(K, X, N)`."""
    index, weight, first = drawn
    leaf, K = logits.detach().requires_grad_(), len(logits)
    fixed = (problem.ref_logp, problem.writer_logp)
    known = [taken(values, index).expand(K, -1, -1, -1).reshape(-1, 2) for values in fixed]
    rewards = taken(problem.rewards, index).expand(K, -1, -1, -1).reshape(-1, 2)
    logp = taken(leaf.log_softmax(-1), index).reshape(-1, 2)
    pairs = Pairs(rewards, logp, *known, first.expand(K, -1, -1).reshape(-1))
    loss = RULES[rule](pairs).mean(-1).view(K, *weight.shape)
    (found,) = torch.autograd.grad((weight * loss).sum(), leaf)
    return found


def descend(rule: str, problem: Problem, mode: str, steps: int, seed: int) -> list[Row]:
    """KL(π‖π*) on the way from the reference, mean over prompts, at every rate at once."""
    generator = torch.Generator().manual_seed(seed) if mode == "sampled" else None
    logits = problem.ref_logp.expand(len(RATES), -1, -1)
    rates, drawn = torch.tensor(RATES, dtype=torch.float64), pairs_of(problem, generator)
    rows: list[Row] = []
    for step in range(steps + 1):
        if step in measured(steps):
            kl = kl_to(problem.optimum, logits).mean(1)
            rows += [
                {"rule": rule, "mode": mode, "rate": r, "step": step, "kl": value}
                for r, value in zip(RATES, kl.tolist(), strict=True)
            ]
        if generator is not None:
            drawn = pairs_of(problem, generator)
        logits = logits - rates[:, None, None] * gradient(rule, problem, logits, drawn)
    return rows


def measured(steps: int) -> set[int]:
    """Step 0 and steps a quarter of an octave apart."""
    return {0, steps} | {round(2 ** (i / 4)) for i in range(80) if 2 ** (i / 4) < steps}


def kl_to(optimum: Tensor, logits: Tensor) -> Tensor:
    """KL(π‖π*), `(K, X)`; a table that has left the numbers is infinitely far."""
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - optimum)).sum(-1)
    return kl.nan_to_num(nan=torch.inf)


def pull_at_optimum(rule: str, problem: Problem) -> float:
    """The largest gradient of any single pair at π*: what a sample can still do there."""
    index, weight, first = pairs_of(problem, None)
    optimum, largest = problem.optimum.unsqueeze(0), 0.0
    for s in range(index.size(1)):
        for label in (torch.zeros_like(first), torch.ones_like(first)):
            alone = index[:, s : s + 1], torch.ones_like(weight[:, :1]), label[:, :1]
            found = gradient(rule, problem, optimum, alone)
            largest = max(largest, found.norm(dim=-1).max().item())
    return largest


def study(folder: Path, seeds: Sequence[int], quick: bool) -> list[Row]:
    """Every rule on the problem of every seed; rows are kept in `folder/tabular.json`.

    Returns:
        One row per seed, rule, mode, rate and measured step; the rows of step 0 also have `pull`.
    """
    steps = 8 if quick else 1000
    jobs = [(seed, mode, rule) for seed in seeds for mode in MODES for rule in RULES]
    rows: list[Row] = []
    for seed, mode, rule in track(jobs, "tables", transient=True):
        problem = draw_problem(seed)
        found = descend(rule, problem, mode, steps, seed)
        pull = pull_at_optimum(rule, problem)
        rows += [{"seed": seed, **row} | ({} if row["step"] else {"pull": pull}) for row in found]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tabular.json").write_text(json.dumps(rows, indent=1))
    return rows
