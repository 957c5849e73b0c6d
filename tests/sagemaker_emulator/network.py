"""A bridge with one address per emulated host."""

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterator

from tests.sagemaker_emulator.leftovers import LINK_PREFIX, State

_SUBNETS = "10.118"
_instances = itertools.count()
_veths = itertools.count()
_VETHS = 36**3  # what fits into a link name; long before they are used up, the first are gone


class NetworkError(RuntimeError):
    """The machine refused a network link or address."""


def ip_batch(*commands: str) -> None:
    """Run several `ip` commands in one process."""
    done = subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(commands) + "\n", text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise NetworkError(f"ip: {done.stderr.strip() or done.returncode} in: {'; '.join(commands)}")


class Bridge:
    """A /24 of this machine only: .254 is the emulator, the others are hosts."""

    def __init__(self, state: State) -> None:
        self.name = f"{LINK_PREFIX}{os.getpid():x}n{next(_instances) % 36}"[:15]
        self._lock = threading.Lock()
        self._used: set[int] = set()
        self._next = 1
        with _machine_lock():
            self.subnet = _free_subnet()
            state.add_link(self.name)
            ip_batch(
                f"link add {self.name} address {_fixed_mac()} type bridge",
                f"addr add {self.subnet}.254/24 dev {self.name}",
                f"link set {self.name} up",
            )
        self.address = f"{self.subnet}.254"

    def allocate(self) -> str:
        """A free address; least recently used first, so that stale connections cannot meet a new host."""
        with self._lock:
            for offset in range(253):
                number = (self._next - 1 + offset) % 253 + 1
                if number not in self._used:
                    self._used.add(number)
                    self._next = number + 1
                    return f"{self.subnet}.{number}"
        raise NetworkError("all 253 addresses of the emulator are in use")

    def release(self, address: str) -> None:
        """Give an address back."""
        with self._lock:
            self._used.discard(int(address.rsplit(".", 1)[1]))

    def attach(self, pid: int) -> None:
        """Give the network namespace of `pid` an eth0 on this bridge; it dies with the namespace."""
        veth = f"{LINK_PREFIX}{os.getpid():x}v{_base36(next(_veths) % _VETHS)}"
        ip_batch(
            f"link add {veth} type veth peer name eth0 netns {pid}",
            f"link set {veth} master {self.name} up",
        )

    def remove(self) -> None:
        """Delete the bridge."""
        with contextlib.suppress(NetworkError):
            ip_batch(f"link del {self.name}")


@contextlib.contextmanager
def _machine_lock() -> Iterator[None]:
    # The directory itself is locked: a lock file would be left behind.
    directory = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _free_subnet() -> str:
    shown = subprocess.run(["ip", "-o", "-4", "addr"], text=True, capture_output=True, check=True).stdout
    taken = set(re.findall(rf"inet {re.escape(_SUBNETS)}\.(\d+)\.", shown))
    for number in range(256):
        if str(number) not in taken:
            return f"{_SUBNETS}.{number}"
    raise NetworkError(f"no free subnet in {_SUBNETS}.0.0/16")


def _fixed_mac() -> str:
    """A local MAC address. Left alone, a bridge takes over one of its ports', and changes it as hosts come and go."""
    return "02:" + secrets.token_bytes(5).hex(":")


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while number or not text:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
    return text
