"""Starts the emulator's processes, all from one thread."""

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Launcher:
    """A process gets its parent-death signal when the *thread* that forked it ends, so one lasting thread forks all."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emulator-launcher")

    def launch(
        self,
        command: list[str],
        env: dict[str, str],
        cwd: str | None = None,
        new_session: bool = False,
        errors: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process; standard error goes to standard output or to a file."""

        def start() -> subprocess.Popen[bytes]:
            with contextlib.ExitStack() as stack:
                stderr = stack.enter_context(errors.open("wb")) if errors else subprocess.STDOUT
                return subprocess.Popen(
                    command,
                    env=env,
                    cwd=cwd,
                    start_new_session=new_session,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                )

        return self._thread.submit(start).result()

    def close(self) -> None:
        """End the thread, and with it what was bound to it."""
        self._thread.shutdown(wait=True)
