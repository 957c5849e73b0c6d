"""Runs one step by hand: `python -m step_scripts.runner request.json`, where the file holds a `StepRequest`."""

import json
import sys
from pathlib import Path

from step_scripts.runner.contract import StepError, StepRequest
from step_scripts.runner.execution import PrintReporter, run_step
from step_scripts.runner.ray_session import RaySession, RaySettings


def main(arguments: list[str]) -> int:
    """Run the request in the file named by the only argument; print the manifest. Returns the exit status."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    request = StepRequest.model_validate_json(Path(arguments[0]).read_bytes())
    session = RaySession(RaySettings())
    try:
        result = run_step(request, PrintReporter(), session)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        session.stop()
    print(json.dumps(result.model_dump(mode="json"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
