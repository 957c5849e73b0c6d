"""What a host of a SageMaker job runs: `python -m step_scripts.cluster`."""

import sys

from step_scripts.cluster.program import main

if __name__ == "__main__":
    sys.exit(main())
