"""Fixtures of the shared model tests."""

import pytest

from tests.models.variants import BOTH, VARIANTS, tiny


@pytest.fixture(params=VARIANTS)
def model(request):
    """Each variant in turn."""
    return tiny(request.param)


@pytest.fixture(params=BOTH)
def main_model(request):
    """One variant of either attention, for what does not depend on the variant."""
    return tiny(request.param)
