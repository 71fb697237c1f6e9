"""How sure a mean is."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_RESAMPLES: Final = 10_000


def mean_with_interval(values: Sequence[float] | NDArray[Any]) -> tuple[float, float, float]:
    """The mean of values, and the ends of its 95 % confidence interval: percentiles of the means of resamples."""
    numbers = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(1), (2.5, 97.5))
    return float(numbers.mean()), float(low), float(high)
