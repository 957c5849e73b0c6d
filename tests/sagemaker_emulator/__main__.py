"""Start the emulator alone: `python -m tests.sagemaker_emulator --port 5112`."""

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from tests.sagemaker_emulator.emulator import SageMakerEmulator
from tests.sagemaker_emulator.settings import Image


def main() -> int:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.sagemaker_emulator", description=__doc__)
    parser.add_argument("--port", type=int, default=5112, help="0 takes a free one")
    parser.add_argument("--isolation", choices=["auto", "namespaces", "loopback"], default="auto")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATTERN=PYTHON",
        help="interpreter that an image URI stands for; may be given several times, the first match wins",
    )
    parser.add_argument("--expose", action="append", default=[], type=Path, help="directory below /tmp that jobs see")
    parser.add_argument("--stop-grace", type=float, default=120.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    options = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, format="%(levelname)s %(message)s")
    if not options.verbose:
        logging.getLogger("botocore").setLevel(logging.WARNING)
    images = {pattern: Image(python=python) for pattern, _, python in (text.rpartition("=") for text in options.image)}
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    emulator = SageMakerEmulator(
        port=options.port,
        isolation=options.isolation,
        images=images,
        expose=options.expose,
        stop_grace=options.stop_grace,
    )
    with emulator:
        for name, value in emulator.environment().items():
            print(f"export {name}={value}")
        print(f"# SageMaker emulator with hosts as {emulator.host_kind}; Ctrl-C ends it", flush=True)
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
