"""Version of a step's code: a digest of its module and of every module of this package that it imports."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
_IMPORT = re.compile(r"^\s*(?:from|import)\s+step_scripts\.(\w+)", re.MULTILINE)


@cache
def step_version(step: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 over the sources that step `step` is made of.

    Raises `FileNotFoundError` if there is no module of that name.
    """
    pending, sources = [step], dict[str, bytes]()
    while pending:
        module = pending.pop()
        if module in sources:
            continue
        sources[module] = (_PACKAGE / f"{module}.py").read_bytes()
        pending += _IMPORT.findall(sources[module].decode())
    digest = hashlib.sha256()
    for module in sorted(sources):
        digest.update(module.encode() + b"\0" + sources[module] + b"\0")
    return digest.hexdigest()[:12]
