"""Baselines: what a sample's credit is compared with. None depends on the sample itself, so that
none changes the expected gradient."""

from torch import Tensor


def leave_one_out(values_PG: Tensor) -> Tensor:
    """Mean of the other values of each group.

    LOOᵢ(v) = 1/(G−1) Σ_{j≠i} vⱼ

    Args:
        values_PG: `(P, G)`, any unit, finite; G ≥ 2.

    Returns:
        `(P, G)`, differentiable in `values_PG`. Equal values give *exactly* that value, so that
        vᵢ − LOOᵢ(v) is 0 in a group without signal.
    """
    assert values_PG.dim() == 2 and values_PG.size(1) > 1, values_PG.shape
    # 0.3 + 0.3 + 0.3 is not 3 · 0.3 in floating point; a sum of zeros is exact.
    floor_P1 = values_PG.detach().amin(1, keepdim=True)
    above_PG = values_PG - floor_P1
    return floor_P1 + (above_PG.sum(1, keepdim=True) - above_PG) / (values_PG.size(1) - 1)
