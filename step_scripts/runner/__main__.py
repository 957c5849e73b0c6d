"""Runs one step by hand: `python -m step_scripts.runner request.json`."""

import sys

from step_scripts.runner.execution import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
