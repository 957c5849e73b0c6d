"""What is fitted: features and target as arrays. Imports no more than NumPy, since every trial's process needs it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Matrix(NamedTuple):
    """Scaled features, float32, shape (rows, features), nulls as NaN; and the target, float32, shape (rows,)."""

    features: np.ndarray
    target: np.ndarray
