"""XGBoost with its native interface only. Steps import XGBoost from here, before anything else imports it.

`import xgboost` imports scikit-learn wherever it is installed, as the base of a second interface that no step uses.
Every driver, worker and server would pay for it: 3.0 s instead of 0.6 s of import (2 cores, xgboost 3.2.0).
"""

from __future__ import annotations

import sys

# Unless it has been imported already, `import sklearn` fails for as long as None stands there, as is documented.
sys.modules.setdefault("sklearn", None)  # pyright: ignore[reportArgumentType]
try:
    import xgboost as xgb
    from xgboost.callback import TrainingCallback
finally:
    if sys.modules["sklearn"] is None:
        del sys.modules["sklearn"]

__all__ = ["TrainingCallback", "xgb"]
