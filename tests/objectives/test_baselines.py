import pytest
import torch

from tests.objectives.enumeration import table
from trl_ext.objectives.baselines import leave_one_out


def test_is_the_mean_of_the_others():
    # (2+6)/2, (1+6)/2, (1+2)/2; the second group is independent of the first
    expected = table([4.0, 3.5, 1.5], [-0.5, 0.0, -0.5])
    torch.testing.assert_close(leave_one_out(table([1, 2, 6], [0, -1, 0])), expected)


def test_centring_scales_the_mean_centred_values_by_G_over_G_minus_1():
    values = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = values - values.mean(1, keepdim=True)
    torch.testing.assert_close(values - leave_one_out(values), centred * 7 / 6)


def test_does_not_depend_on_the_sample_itself():
    values = table([0.3, -1.2, 2.0, 0.7])
    jacobian = torch.autograd.functional.jacobian(leave_one_out, values)[0, :, 0]
    torch.testing.assert_close(jacobian, (torch.ones(4, 4).double() - torch.eye(4)) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.3, 1 / 3, 1.0, -7.7])
@pytest.mark.parametrize("G", [2, 3, 7, 64])
def test_equal_values_are_their_own_baseline_exactly(value, G, dtype):
    values = torch.full((2, G), value, dtype=dtype)
    assert torch.equal(leave_one_out(values), values)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (2, 2, 2)])
def test_refuses_other_shapes(shape):
    with pytest.raises(AssertionError):
        leave_one_out(torch.zeros(shape))
