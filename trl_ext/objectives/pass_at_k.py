"""k-sample objectives: the expected best of k samples, credited by leaving one out.

The paper draws exactly k samples per prompt. Here k ≤ n = G, and its estimator is averaged over all
subsets of size k, in closed form. Dropped: the naive estimator f(y) Σᵢ ∇log π(yᵢ), whose variance
grows with k.

Source: arXiv:2503.19595.
"""

import math

from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.pkpo import pkpo_credit, weigh_gaps


def pass_at_k_credit(rewards_PG: Tensor, k: int) -> Tensor:
    """Credit of a sample for raising the best reward of the k samples it stands among.

    Aᵢ = G/C(G,k) Σ_{I∋i} [max_I − max_{I∖i}]                I: the subsets of size k
    The group mean of Aᵢ ∇log π(yᵢ) estimates ∇E[max of k rewards] without bias.

    For k = 1, where I∖i is empty, Aᵢ = rᵢ − LOOᵢ(r), which estimates ∇E[r].

    Args:
        rewards_PG: `(P, G)`, finite; G ≥ 2.
        k: samples of which the best counts, in [1, G].

    Returns:
        `(P, G)`, in the rewards' unit, ≥ 0 for k ≥ 2, without gradient; the factor G is included.

    Equal rewards give exactly 0. For k = G all credit is 0 but the single best sample's, which is G
    times its lead. Source: arXiv:2503.19595, Lemma 1; averaged over subsets it is s^(loo-1) of
    arXiv:2505.15201.
    """
    if k == 1:
        return (rewards_PG - leave_one_out(rewards_PG)).detach()
    return pkpo_credit(rewards_PG, k, baseline="loo_minus_one")


def centred_pass_at_k_credit(rewards_PG: Tensor, k: int) -> Tensor:
    """Leave-one-out credit centred in each subset: exact for the objective of k − 1 samples.

    Aᵢ = G/C(G,k) Σ_{I∋i} [Aᵢ(I) − 1/k Σ_{j∈I} Aⱼ(I)],   Aⱼ(I) = max_I − max_{I∖j}
       = Σ_{2≤m≤i} (rₘ − rₘ₋₁) (k−1) C(m−1,k−1)/C(G−1,k−1)
         − Σ_{m>i} (rₘ − rₘ₋₁) (G−m+1) C(m−2,k−2)/C(G−1,k−1),   r₁ ≤ … ≤ r_G
    The group mean of Aᵢ ∇log π(yᵢ) estimates ∇E[max of k−1 rewards] without bias.

    Args:
        rewards_PG: `(P, G)`, finite.
        k: subset size, in [2, G].

    Returns:
        `(P, G)`, in the rewards' unit, without gradient; the factor G is included. It sums to 0.

    Equal rewards give exactly 0; k = 2 gives rᵢ − LOOᵢ(r). Source: arXiv:2503.19595, which
    describes the centring in words; the closed form is ours.
    """
    assert rewards_PG.dim() == 2, rewards_PG.shape
    G = rewards_PG.size(1)
    assert 2 <= k <= G, f"k={k} is outside [2, {G}]"
    subsets, ranks = math.comb(G - 1, k - 1), range(2, G + 1)
    reached = [(k - 1) * math.comb(m - 1, k - 1) / subsets for m in ranks]
    missed = [-(G - m + 1) * math.comb(m - 2, k - 2) / subsets for m in ranks]
    return weigh_gaps(rewards_PG, reached, missed).to(rewards_PG)
