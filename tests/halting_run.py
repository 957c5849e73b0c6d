"""A run that halts itself (SIGSTOP) each time it has stored what one of some assets returned.

`python -m tests.halting_run tuned_model,evaluation_report asset materialize …`: what follows is for `dagster`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dagster._cli import main

from resources.references.io_manager import ReferenceIOManager

if __name__ == "__main__":
    _, assets, *arguments = sys.argv
    store = ReferenceIOManager.handle_output

    def store_and_halt(self: Any, context: Any, obj: object) -> None:
        store(self, context, obj)
        if context.asset_key.to_user_string() in assets.split(","):
            os.kill(os.getpid(), signal.SIGSTOP)

    ReferenceIOManager.handle_output = store_and_halt  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["dagster", *arguments]
    main()
