"""`FedIT`: the mean of the factors."""

import numpy as np

from strategies.fedit import FedIT
from tests.toys.adapters import adapter, random_tensors, update


def test_fedit_is_the_mean_of_the_factors() -> None:
    parent, one, two = adapter(), random_tensors(1), random_tensors(2)
    result = FedIT().aggregate(parent, [update("a", parent, one), update("b", parent, two)])
    for name, mean in result.tensors.items():
        assert np.allclose(mean, (one[name] + two[name]) / 2, atol=1e-6)
    assert result.certificate == {}
