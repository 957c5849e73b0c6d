"""Runs one side of a comparison in a process of its own: `python -m benchmarks.side <module>:<function> <arguments>`.

The arguments are a JSON object. The function returns `figures` (numbers to compare) and `result` (what both sides must
agree on), which are printed as the last line.
"""

from __future__ import annotations

import importlib
import json
import sys

MARK = "figures: "

if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    returned = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    sys.stdout.write(f"\n{MARK}{json.dumps(returned)}\n")
    sys.stdout.flush()
