"""Majority vote: the expected reward of the most common answer among k samples, and its gradient.

The paper draws exactly k samples per prompt. Here k ≤ G, averaged over all subsets of size k. These
are not enumerated: an average over subsets depends on an answer only through its number of voters,
so that generating functions over answers give it exactly, as sums of non-negative terms.

What the vote of a subset I is worth, f(I), has to be a symmetric function of its samples, or the
leave-one-out credit is biased: the answer that "came first" must not win a tie. Here

    f(I) = mean reward of the samples in I that voted for a most common answer,   f(∅) = 0.

If all voters of an answer have its reward, the usual case, this is the average reward of the tied
answers; if not, each answer is worth the mean reward of its voters in I. Dropped: sampling subsets.

Source: arXiv:2503.19595, majority voting; the average over subsets and its evaluation are ours.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.pkpo import chance_within

Unparsable = Literal["null", "exclude"]

# Generating functions count subsets in float64: 2^G has to stay finite.
MAX_GROUP = 1000


def majority_at_k(
    rewards_PG: Tensor, labels_PG: Tensor, k: int, unparsable: Unparsable = "null"
) -> Tensor:
    """Unbiased estimate of the expected reward of a majority vote among k samples (maj@k).

    1/C(G,k) Σ_I f(I)                                        I: the subsets of size k

    Args:
        rewards_PG: `(P, G)`, finite; the reward of a sample without an answer counts as 0.
        labels_PG: `(P, G)`, integers; equal labels are equal answers, −1 is no answer.
        k: samples that vote, in [1, G].
        unparsable: "null" lets all samples without an answer vote for one answer of reward 0;
            "exclude" bars them from voting, and a vote without voters is worth 0.

    Returns:
        `(P,)`, in the rewards' unit, without gradient. Equal rewards give exactly that reward if
        every subset has a voter; k = 1 gives the mean reward.
    """
    return _per_group(_group_value, rewards_PG, labels_PG, k, unparsable, least=1)


def majority_credit(
    rewards_PG: Tensor, labels_PG: Tensor, k: int, unparsable: Unparsable = "null"
) -> Tensor:
    """Credit of a sample for what its vote brings to the k samples it stands among.

    Aᵢ = G/C(G,k) Σ_{I∋i} [f(I) − f(I∖i)]                    I: the subsets of size k
    The group mean of Aᵢ ∇log π(yᵢ) estimates ∇E[f(y₁ … y_k)] without bias.

    Args:
        rewards_PG, labels_PG, unparsable: as in `majority_at_k`.
        k: samples that vote, in [2, G]; a vote of one would have no baseline.

    Returns:
        `(P, G)`, in the rewards' unit, without gradient; the factor G is included.

    Equal rewards give exactly 0, unless "exclude" leaves a sample the sole voter: then its reward
    is compared with 0. A sample that can turn no vote, or is excluded, gets exactly 0. If every
    sample votes, k = 2 has the mean reward as objective and Aᵢ = rᵢ − LOOᵢ(r).
    Source: arXiv:2503.19595, Lemma 1, averaged over subsets.
    """
    return _per_group(_group_credit, rewards_PG, labels_PG, k, unparsable, least=2)


def _per_group(
    function: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    rewards_PG: Tensor,
    labels_PG: Tensor,
    k: int,
    unparsable: Unparsable,
    least: int,
) -> Tensor:
    assert rewards_PG.dim() == 2 and rewards_PG.is_floating_point(), rewards_PG
    assert labels_PG.shape == rewards_PG.shape and not labels_PG.is_floating_point(), labels_PG
    assert least <= k <= rewards_PG.size(1) <= MAX_GROUP, f"k={k}, shape {rewards_PG.shape}"
    assert unparsable in get_args(Unparsable), unparsable
    # On the CPU: many small tables, and Apple's GPUs have no float64.
    labels, rewards = labels_PG.cpu(), rewards_PG.detach().to("cpu", torch.float64)
    rewards = rewards.masked_fill(labels == -1, 0.0)
    votes = labels != -1 if unparsable == "exclude" else torch.ones_like(labels, dtype=torch.bool)
    groups = [function(*group, k) for group in zip(rewards, labels, votes, strict=True)]
    return torch.stack(groups).to(rewards_PG)


def _group_value(rewards_G: Tensor, labels_G: Tensor, votes_G: Tensor, k: int) -> Tensor:
    """Σᵢ k/G · share of i's answer · rᵢ, over the N samples that vote."""
    if not votes_G.any():
        return rewards_G.new_zeros(())
    G, rewards_N = rewards_G.numel(), rewards_G[votes_G]
    answer_N, voters_C = _answers(labels_G[votes_G])
    blanks = G - rewards_N.numel()
    share_m, _ = _vote_weights(tuple(sorted(voters_C.tolist())), blanks, k)
    # The shares sum to 1 − P(no voter). Around the best reward, rounding never exceeds it.
    best, share_N = rewards_N.max(), share_m[voters_C][answer_N] * k / G
    return best * (1 - chance_within(blanks, G, k)) + share_N @ (rewards_N - best)


def _group_credit(rewards_G: Tensor, labels_G: Tensor, votes_G: Tensor, k: int) -> Tensor:
    """k · E_J[f(J ∪ i) − f(J)] for each i, over the subsets J of k − 1 other samples.

    With ā the mean reward of the *other* voters of i's answer a, and b̄ that of answer b, it is
    k · [Σ_b flip_ab (ā − b̄) + share_a (rᵢ − ā) + P(J has no voter) ā]: votes that i turns from b
    to a, what i changes in its own answer's mean, and votes in which i is alone.
    """
    credit_G, rewards_N = torch.zeros_like(rewards_G), rewards_G[votes_G]
    if not votes_G.any():
        return credit_G
    answer_N, voters_C = _answers(labels_G[votes_G])
    blanks = rewards_G.numel() - rewards_N.numel()
    share_m, flip_mm = _vote_weights(tuple(sorted(voters_C.tolist())), blanks, k)
    flip_CC = flip_mm[voters_C][:, voters_C].fill_diagonal_(0.0)
    others_N, mean_C = _answer_means(rewards_N, answer_N)
    turned_N = (flip_CC[answer_N] * (others_N[:, None] - mean_C)).sum(1)
    own_N = share_m[voters_C][answer_N] * (rewards_N - others_N)
    alone_N = chance_within(blanks, rewards_G.numel() - 1, k - 1) * others_N
    credit_G[votes_G] = k * (turned_N + own_N + alone_N)
    return credit_G


def _answers(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each sample's answer, `(N,)`, and number of voters of each answer, `(C,)`."""
    _, answer_N, voters_C = labels_N.unique(return_inverse=True, return_counts=True)
    return answer_N, voters_C


def _answer_means(rewards_N: Tensor, answer_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean reward of the other voters of a sample's answer (its own if alone), and of each answer.

    Both are exact where all voters of an answer have the same reward.
    """
    others_N, means = rewards_N.clone(), []
    for answer in range(int(answer_N.max()) + 1):
        of_answer_N = answer_N == answer
        rewards_1v = rewards_N[of_answer_N].unsqueeze(0)
        means.append(rewards_1v.min() + (rewards_1v - rewards_1v.min()).mean())
        if rewards_1v.size(1) > 1:
            others_N[of_answer_N] = leave_one_out(rewards_1v)[0]
    return others_N, torch.stack(means)


@functools.lru_cache(maxsize=1024)
def _vote_weights(voters: tuple[int, ...], blanks: int, k: int) -> tuple[Tensor, Tensor]:
    """How often a sample's answer wins, and from which answer its vote takes the win.

    i votes for an answer a with m voters; J are k − 1 random other samples. Let v be the votes of
    a in J ∪ i, and t the number of other answers with v votes:
    share[m] = E[1/(v (t+1)) if no other answer has more],
    flip[m, m'] = E[1/(t' (t'+1)) if i makes a join t' leaders, b among them]
                + E[1/(t'+1)      if i parts a from t' other leaders, b among them],
    b being one given other answer with m' voters.

    Args:
        voters: voters of each answer in the group, ascending.
        blanks: samples that do not vote.
        k: size of J ∪ i.

    Returns:
        `(M+1,)` and `(M+1, M+1)` for the largest answer's M voters, 0 at sizes that do not occur.
    """
    most = voters[-1]
    share_m = torch.zeros(most + 1, dtype=torch.float64)
    flip_mm = torch.zeros(most + 1, most + 1, dtype=torch.float64)
    for v in range(1, min(most, k) + 1):
        contenders = [m for m in voters if m >= v]
        bystanders = blanks + sum(m for m in voters if m < v)
        kinds = sorted(set(contenders))
        share_K, flip_KK = _count_at_level(v, contenders, bystanders, k)
        share_m[kinds] += share_K
        flip_mm[torch.tensor(kinds)[:, None], kinds] += flip_KK
    subsets = float(math.comb(sum(voters) + blanks - 1, k - 1))  # may exceed int64
    return share_m / subsets, flip_mm / subsets


def _count_at_level(
    v: int, contenders: list[int], bystanders: int, k: int
) -> tuple[Tensor, Tensor]:
    """The part of `_vote_weights` in which the leaders have v votes, in numbers of subsets.

    Entry (t, d) of a table counts the ways in which the other answers collect d votes, t of them
    with v votes and none with more: the coefficient of zᵗ xᵈ in
    (1+x)^bystanders Π_c [Σ_{u<v} C(n_c,u) xᵘ + C(n_c,v) xᵛ z].
    A forward pass over the answers multiplies the factors, a backward pass carries the weights of
    the final entries; where they meet at b, their product weighs the subsets in which b leads.

    Args:
        v: votes of the leaders, in [1, k].
        contenders: voters of each answer with at least v of them, ascending.
        bystanders: samples whose answer cannot reach v votes, or that do not vote.
        k: size of J ∪ i.

    Returns:
        `(S,)` and `(S, S)` over the different sizes of contenders.
    """
    sizes = sorted(set(contenders))
    factors = _factors(contenders, v, k)
    table_Std = torch.zeros(len(sizes), k // v, k, dtype=torch.float64)
    table_Std[:, 0] = _double([math.comb(bystanders, d) for d in range(k)])
    before = []
    for below_Sdd, lead_S11 in factors:
        before.append(table_Std)
        table_Std = table_Std @ below_Sdd
        table_Std[:, 1:, v:] += lead_S11 * before[-1][:, :-1, :-v]

    win_Std, later_Std = _final_weights(sizes, v, k)
    share_S = (table_Std * win_Std).sum((1, 2))
    flip_SS = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    for j in reversed(range(len(contenders))):
        below_Sdd, lead_S11 = factors[j]
        led_Std = lead_S11 * later_Std[:, 1:, v:]
        # Of several answers of one size, the last stands for b; the first may be a.
        if contenders[j + 1 : j + 2] != [contenders[j]]:
            meet_Std = before[j][:, :-1, :-v] * led_Std
            flip_SS[:, sizes.index(contenders[j])] = meet_Std.sum((1, 2))
        later_Std = later_Std @ below_Sdd.mT
        later_Std[:, :-1, :-v] += led_Std
    return share_S, flip_SS


def _factors(contenders: list[int], v: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """Each answer's factor: fewer than v votes as `(S, k, k)` shifts of d, v votes as `(S, 1, 1)`.

    Table s leaves out a itself, the first answer of size s: its factor there is 1.
    """
    sizes = sorted(set(contenders))
    to_from = torch.arange(k) - torch.arange(k).unsqueeze(1)
    factors = []
    for j, m in enumerate(contenders):
        ways = _double([math.comb(m, u) if u < v else 0 for u in range(k)])
        below_dd = ways[to_from.clamp(min=0)].triu()
        below_Sdd = below_dd.repeat(len(sizes), 1, 1)
        lead_S11 = torch.full((len(sizes), 1, 1), float(math.comb(m, v)), dtype=torch.float64)
        if contenders.index(m) == j:
            below_Sdd[sizes.index(m)], lead_S11[sizes.index(m)] = torch.eye(k), 0.0
        factors.append((below_Sdd, lead_S11))
    return factors


def _final_weights(sizes: list[int], v: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights of the final table entries in `share` and `flip`, with the ways of a to get there."""
    win_Std = torch.zeros(len(sizes), k // v, k, dtype=torch.float64)
    flip_Std, t = torch.zeros_like(win_Std), torch.arange(k // v, dtype=torch.float64)
    for s, m in enumerate(sizes):
        joins, parts = float(math.comb(m - 1, v - 1)), float(math.comb(m - 1, v))
        win_Std[s, :, k - v] = joins / (v * (t + 1))
        flip_Std[s, 1:, k - v] = joins / (t[1:] * (t[1:] + 1))
        if v < k:
            flip_Std[s, 1:, k - 1 - v] = parts / (t[1:] + 1)
    return win_Std, flip_Std


def _double(counts: list[int]) -> Tensor:
    return torch.tensor([float(count) for count in counts], dtype=torch.float64)
