"""XGBoost with its native interface only. Steps import XGBoost from here, before anything else imports it.

`import xgboost` imports scikit-learn wherever it is installed, as the base of a second interface that no step uses.
Every driver, worker and server would pay for it: 3.0 s instead of 0.6 s of import (2 cores, xgboost 3.2.0).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_SCIKIT_LEARN = "sklearn"


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let `package` seem not to be installed, unless it has been imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # documented: then its import fails
    try:
        yield
    finally:
        del sys.modules[package]


with _hidden(_SCIKIT_LEARN):
    import xgboost as xgb
    from xgboost.callback import TrainingCallback

__all__ = ["TrainingCallback", "xgb"]
