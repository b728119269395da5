"""VinePPO: the advantage of a step of reasoning, from fresh rollouts instead of a critic.

The value of a prefix s is the mean reward of K rollouts that continue it; a step that leads from s
to s′ earns A = V(s′) − V(s). The estimate is unbiased from K = 1 on, as long as

  - V(s) comes from rollouts of its own: with the trajectory itself among them, the gradient shrinks
    to K/(K+1) of its size, as with a mean that contains its own sample;
  - a step begins where the tokens before it say so. Whoever looks at the next token before he
    decides lets the baseline depend on the action. The authors do where a completion ends right
    behind a step: any other token would begin a step there, the end of sequence does not.

Dropped: the authors' cap, behind which every V is the trajectory's own reward. All later steps then
have advantage 0, and teach nothing. Too many steps are merged here, which costs precision only.

Source: arXiv:2410.01679.
"""

import torch
from torch import Tensor

# As TRL's: a batch without signal stays one.
MIN_DEVIATION = 1e-4


def monte_carlo_values(rewards_NK: Tensor) -> Tensor:
    """V(s) = 1/K Σₖ r(s, yₖ),   yₖ ~ π(·|s).

    Args:
        rewards_NK: `(N, K)`, rewards of prefix and rollout together; NaN where unscorable.

    Returns:
        `(N,)`, in the rewards' unit: the mean over scorable rollouts, NaN without any.
    """
    assert rewards_NK.dim() == 2 and rewards_NK.size(1) > 0, rewards_NK.shape
    return rewards_NK.nanmean(1)


def step_advantages(values_BS: Tensor, rewards_B: Tensor, steps_B: Tensor) -> Tensor:
    """Advantage of each step: Aₕ = V(sₕ₊₁) − V(sₕ), of the last one r − V(sₕ).

    Args:
        values_BS: `(B, S)`, V of the prefix in front of each step; NaN where not estimated. What
            stands behind a row's last step is not read.
        rewards_B: `(B,)`, each trajectory's own reward, which no V contains; NaN where unscorable.
        steps_B: `(B,)`, integers, number of steps of each row, in [0, S].

    Returns:
        `(B, S)`, in the rewards' unit, without gradient, 0 behind the last step. A row sums to
        r − V(s₀). A step whose V is missing is one step with those before it, back to a V: each of
        them has the advantage of the whole. A row whose reward is missing gets 0, as do steps in
        front of the first V.

    Source: arXiv:2410.01679.
    """
    assert values_BS.dim() == 2 and values_BS.size(1) > 0, values_BS.shape
    assert values_BS.shape[:1] == rewards_B.shape == steps_B.shape, rewards_B.shape
    assert not steps_B.is_floating_point(), steps_B.dtype
    rewards_B1 = rewards_B.detach()[:, None].to(values_BS)
    is_step_BS = torch.arange(values_BS.size(1), device=values_BS.device) < steps_B[:, None]
    # Behind the last step the reward stands where the value of the next prefix would.
    values_BS = values_BS.detach().where(is_step_BS, rewards_B1)
    next_BS = _next_known(torch.cat([values_BS[:, 1:], rewards_B1], dim=1))
    advantage_BS = next_BS - _last_known(values_BS)
    return advantage_BS.masked_fill(advantage_BS.isnan() | rewards_B1.isnan(), 0.0)


def whitened(advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Advantages of mean 0 and deviation 1 over the batch's tokens, as in the authors' code.

    Args:
        advantage_BT: `(B, T)`.
        mask_BT: `(B, T)`, nonzero on tokens that count.

    Returns:
        `(B, T)`, without a unit; exactly 0 outside the mask, and everywhere if all are equal. It
        makes the estimate biased: mean and deviation contain each token's own advantage.
    """
    assert advantage_BT.dim() == 2 and advantage_BT.shape == mask_BT.shape, mask_BT.shape
    counted_BT = mask_BT != 0
    values = advantage_BT.detach()[counted_BT]
    if values.numel() < 2:
        return torch.zeros_like(advantage_BT)
    values = values - values[0]  # equal advantages then have mean exactly 0
    white_BT = torch.zeros_like(advantage_BT)
    white_BT[counted_BT] = (values - values.mean()) / (values.std() + MIN_DEVIATION)
    return white_BT


def _last_known(values: Tensor) -> Tensor:
    """Each entry, or where it is NaN the nearest before it."""
    index = torch.arange(values.size(1), device=values.device).expand_as(values)
    known = index.masked_fill(values.isnan(), 0).cummax(1).values
    return values.gather(1, known)


def _next_known(values: Tensor) -> Tensor:
    return _last_known(values.flip(1)).flip(1)
