"""The commands that the documentation tells people to run, and somebody who follows it in a shell of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.waiting import until

ROOT = Path(__file__).parents[1]
_SHELLS = ("bash", "sh", "console", "")
_COMMAND = re.compile(r"([A-Z_]+=\S+ +)*(export|make|pip|curl|docker|aws|cp|mkdir|(\.venv/bin/)?(python|dagster\S*))\s")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# The first line of a file that a page shows: its name, and perhaps the command that it is for.
_FILE = re.compile(r"\s*# (\S+\.ya?ml)(?:: (.*))?\n")


def pages() -> list[Path]:
    """All pages for people who use the platform; how to measure it is a matter of its own."""
    others = [ROOT / path for path in ("deploy/README.md", "tests/sagemaker_emulator/README.md")]
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *others]


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks, in order, as single lines without comments."""
    found = []
    for language, block in _FENCE.findall(page.read_text()):
        if language in _SHELLS:
            lines = [re.sub(r"(^|\s+)#(\s.*|$)", "", line) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
            found += [" ".join(line.split()) for line in lines if language or _COMMAND.match(line.strip() + " ")]
        elif (file := _FILE.match(block)) and file[2]:
            found.append(file[2])
    return [command for command in found if command]


def mentions(page: Path) -> list[str]:
    """The commands in a page's running text, as `make run` is one."""
    text = _FENCE.sub("", page.read_text())
    spans = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    return [span for span in spans if _COMMAND.match(span + " ") and len(span.split()) > 1]


def programs(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return [block for language, block in _FENCE.findall(page.read_text()) if language == "python"]


def files(page: Path) -> dict[str, str]:
    """Files that the page asks people to write, by name."""
    shown = [(_FILE.match(block), block) for _, block in _FENCE.findall(page.read_text())]
    return {name[1]: block for name, block in shown if name}


def copy_of_the_project(folder: Path) -> Path:
    """A fresh clone, where `make install` has been run: `.venv` is the environment that runs the tests."""
    patterns = shutil.ignore_patterns(
        *(".git", ".venv", ".dagster", "__pycache__", ".*_cache", "*.egg-info", "screenshots", "mlflow.db")
    )

    def ignored(place: str, names: list[str]) -> set[str]:
        # `data` is what runs have written; a package of that name is code.
        return patterns(place, names) | ({"data"} if Path(place) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignored)
    venv = folder / ".venv"
    venv.mkdir()
    for name in ("bin", "lib"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    own = Path(sys.prefix) / "pyvenv.cfg"
    outside = f"home = {Path(sys.executable).parent}\ninclude-system-site-packages = true\n"
    (venv / "pyvenv.cfg").write_text(own.read_text() if own.exists() else outside)
    for name in (".installed", ".installed-dev"):
        (venv / name).touch()
    return folder


@dataclass
class Reader:
    """Types commands into one shell after the other, a page each, in one copy of the project."""

    project: Path
    environment: dict[str, str]
    # What a reader puts in the place of an example: text of the page, text of the reader's own.
    own_values: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    # Commands that go on until somebody ends them: words of the command, an address or a line that says it works.
    servers: dict[str, str | re.Pattern[str]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _exported: dict[str, str] = field(default_factory=dict)

    def new_shell(self) -> None:
        """Forget what was exported."""
        self._exported = {}

    def open(self, page: Path) -> None:
        """Begin a page in a new shell, and write the files that it shows."""
        self.new_shell()
        for name, text in files(page).items():
            (self.project / name).write_text(self.as_own(text))

    def type(self, command: str, timeout: float = 300) -> str:
        """Run a command as it stands. Returns what it printed. Raises `AssertionError` if it fails."""
        start = time.monotonic()
        line = self.as_own(command)
        if command.startswith("export "):
            self._export(line)
            output = ""
        elif server := next((s for s in self.servers if s in command), None):
            output = self._serve(line, self.servers[server])
        else:
            done = self._run(line, timeout)
            output = done.stdout
            assert done.returncode == 0, f"{command}\nended with {done.returncode}:\n{output}"
        self.outputs[command] = output
        self.seconds[command] = time.monotonic() - start
        return output

    def as_own(self, text: str) -> str:
        """A text of a page with the reader's own values in it."""
        for example, own in self.own_values.items():
            if example in text:
                text = text.replace(example, own if isinstance(own, str) else own())
        return text

    @property
    def _env(self) -> dict[str, str]:
        return os.environ | self.environment | self._exported | {"PYTHONPATH": str(self.project)}

    def _run(self, line: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=self.project, env=self._env, text=True, check=False, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _export(self, line: str) -> None:
        names = [word.partition("=")[0] for word in shlex.split(line)[1:]]
        script = f"{line}\n{shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
        done = self._run(script, 60)
        assert done.returncode == 0, f"{line}\n{done.stdout}"
        values = json.loads(done.stdout)
        self._exported |= {name: values[name] for name in names}

    def _serve(self, line: str, sign: str | re.Pattern[str]) -> str:
        """Start a server, wait for its sign of life, press Ctrl-C."""
        log = self.project / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.project, env=self._env, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            family = until(lambda: _alive(process, sign, log))
            os.killpg(process.pid, signal.SIGINT)
            _, left = psutil.wait_procs(family, 60)
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(60)
        assert not left, f"{line}\nwas still there a minute after Ctrl-C:\n{log.read_text()}"
        return log.read_text()


def _alive(process: subprocess.Popen[bytes], sign: str | re.Pattern[str], log: Path) -> list[psutil.Process] | None:
    assert process.poll() is None, f"ended by itself:\n{log.read_text()}"
    if isinstance(sign, re.Pattern):
        if not sign.search(log.read_text()):
            return None
    else:
        try:
            with urllib.request.urlopen(sign, timeout=5):
                pass
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]
