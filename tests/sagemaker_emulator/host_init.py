"""PID 1 of an emulated host: builds its file system, starts the container's command, reaps, forwards SIGTERM.

Run as a script inside fresh network, mount, UTS, IPC and PID namespaces. Reads a JSON specification (first argument)
and waits for a line on standard input, which says that eth0 is there. Uses the standard library only.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_RDONLY, _REMOUNT, _BIND, _REC = 1, 32, 4096, 16384
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target} ({kind}): {os.strerror(number)}")


def build_root(spec: dict[str, Any]) -> str:
    """The host's file system: this machine's, copy-on-write where possible, with private mounts over it."""
    root = "/"
    if spec["overlay"]:
        scratch, root = f"{spec['directory']}/scratch", f"{spec['directory']}/merged"
        mount("tmpfs", scratch, "tmpfs")
        _overlay("/", root, scratch, "root")
        for point in mount_points(spec["directory"]):
            mount(point, root + point, None, _BIND | _REC)
        for number, path in enumerate(spec["expose"]):
            Path(scratch, f"expose-{number}").mkdir()
            _overlay(path, f"{scratch}/expose-{number}", scratch, f"layer-{number}")
    mount("proc", root.rstrip("/") + "/proc", "proc")
    mount("tmpfs", root.rstrip("/") + "/dev/shm", "tmpfs")
    for number, path in enumerate(spec["expose"]):
        if spec["overlay"]:
            _bind(f"{spec['directory']}/scratch/expose-{number}", spec["tmp"] + path.removeprefix("/tmp"))
        else:
            _bind(path, spec["tmp"] + path.removeprefix("/tmp"))
    for source, target in spec["binds"]:
        inside = root.rstrip("/") + target
        if Path(source).is_dir():
            Path(inside).mkdir(parents=True, exist_ok=True)
        else:
            Path(inside).touch()
        mount(source, inside, None, _BIND | _REC)
    return root


def mount_points(hidden: str) -> list[str]:
    """Mount points below the root file system that a host is to see as they are."""
    points: list[str] = []
    with Path("/proc/self/mountinfo").open() as table:
        targets = [line.split()[4].encode().decode("unicode_escape") for line in table]
    for target in targets:
        covered = any(target == p or target.startswith(p + "/") for p in [*points, "/proc", "/tmp", hidden])
        if target != "/" and not covered and Path(target).exists():
            points.append(target)
    return points


def _overlay(lower: str, target: str, scratch: str, name: str) -> None:
    upper, work = f"{scratch}/{name}-upper", f"{scratch}/{name}-work"
    Path(upper).mkdir()
    Path(work).mkdir()
    # The option string has its own syntax for colons and commas in paths.
    layers = [re.sub(r"([\\:,])", r"\\\1", path) for path in (lower, upper, work)]
    mount("overlay", target, "overlay", 0, "lowerdir={},upperdir={},workdir={}".format(*layers))


def _bind(source: str, target: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    mount(source, target, None, _BIND | _REC)


def set_up_network(address: str) -> None:
    """Address of eth0, once the emulator has put it there."""
    if not sys.stdin.readline():
        raise OSError("the emulator went away before the network was ready")
    commands = f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n"
    subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True, stdout=subprocess.DEVNULL)


def run(command: list[str], environment: dict[str, str], directory: str) -> int:
    """Run the container's command to its end; returns its exit status as a shell would."""
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        _become(command, environment, directory, watched)
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            os.kill(child, signal.SIGTERM)
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _become(command: list[str], environment: dict[str, str], directory: str, watched: set[signal.Signals]) -> None:
    os.setsid()
    # Python ignores these; an ignored signal would be inherited through exec.
    for name in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(1, 2)
    try:
        os.chdir(directory)
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"exec {command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def main() -> int:
    """Build the host and run its command."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    try:
        socket.sethostname(spec["name"])
        root = build_root(spec)
        set_up_network(spec["address"])
        if root != "/":
            os.chroot(root)
    except (OSError, subprocess.SubprocessError) as error:
        Path(spec["error_file"]).write_text(str(error))
        return 125
    return run(spec["command"], spec["environment"], spec["cwd"])


if __name__ == "__main__":
    sys.exit(main())
