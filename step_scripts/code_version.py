"""Version of a step's code: a digest of its module and of every module of this package that it imports."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
# `from step_scripts.a import x`, `import step_scripts.a`, `from step_scripts import a, b`
_IMPORT = re.compile(
    r"^\s*(?:(?:from|import)\s+step_scripts\.(?P<module>\w+)|from\s+step_scripts\s+import\s+(?P<modules>[\w, ]+))",
    re.MULTILINE,
)


@cache
def step_version(step: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 over the sources that step `step` is made of.

    A dotted name is a module elsewhere: then its own source counts, and those of this package that it imports.
    Raises `FileNotFoundError` if there is no module of that name.
    """
    pending, sources = [step], dict[str, bytes]()
    while pending:
        module = pending.pop()
        if module in sources:
            continue
        sources[module], imported = _read(module)
        pending += imported
    digest = hashlib.sha256()
    for module in sorted(sources):
        digest.update(module.encode() + b"\0" + sources[module] + b"\0")
    return digest.hexdigest()[:12]


@cache
def _read(module: str) -> tuple[bytes, tuple[str, ...]]:
    """The source of a module, and the modules of this package that it imports. Steps share most of theirs."""
    source = _source(module).read_bytes()
    found = (match["module"] or match["modules"] for match in _IMPORT.finditer(source.decode()))
    return source, tuple(name.split()[0] for names in found for name in names.split(",") if name.strip())


def _source(module: str) -> Path:
    if "." not in module:
        return _PACKAGE / f"{module}.py"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"there is no module {module}")
    return Path(spec.origin)
