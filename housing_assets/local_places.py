"""What `make` prepares on this machine, and removes again.

    python -m housing_assets.local_places prepare   before `make run` and `make ui`
    python -m housing_assets.local_places clean     make clean-data

Folders are recognised by a marker that is written when they are made. Of a folder without it, only what the inventory
of the deployment lists is ever removed, and nothing of Dagster's.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

MARKER = ".housing-assets"
_MARKED = b"Made by housing-assets. `make clean-data` removes what the project has written here.\n"
# What Dagster writes into DAGSTER_HOME.
_DAGSTER = ("history", "storage", "schedules", "logs", ".telemetry", ".nux", ".logs_queue", "dagster.yaml")
_TEMPLATE = Path(__file__).parents[1] / "deploy" / "dagster.yaml"


def prepare(home: Path, root: Path | None, template: Path = _TEMPLATE) -> list[str]:
    """Make DAGSTER_HOME, with the project's `dagster.yaml`, and the root, where they are not there yet.

    What is there stays as it is. Returns what people should know.
    """
    if root is not None:
        _make(root)
    made, file = _make(home), home / template.name
    if made or (home / MARKER).exists():
        if not file.exists():
            shutil.copyfile(template, file)
    elif not file.exists():
        return [f"{home} is used as it is: it was not made by this project, and has no {template.name}"]
    if file.read_bytes() == template.read_bytes():
        return []
    return [f"{file} is kept; it differs from the project's {template}"]


def clean(home: Path, environment: Mapping[str, str]) -> list[str]:
    """Remove what the deployment has made below its root, of all environments, and Dagster's history.

    Returns what should have gone and has not, with the reason. Raises `ValueError` for a deployment that keeps nothing
    on this machine.
    """
    from housing_assets.settings import Settings
    from resources.inventory import remove_empty

    if environment.get("HOUSING_DEPLOYMENT", "local") != "local":
        raise ValueError("clean-data removes what is on this machine; for what is on AWS, launch the job teardown")
    base = {name: value for name, value in environment.items() if name != "HOUSING_ENVIRONMENT"}
    root = Path(Settings.load(base).own_root)
    left = []
    environments = _folders(root / "environments")
    for name in ["", *(folder.name for folder in environments)]:
        left += _clean_root({**base, "HOUSING_ENVIRONMENT": name})
    remove_empty(*map(str, [*environments, root / "environments"]))
    left += _clean_home(home)
    _remove_if_ours(root)
    return left


def _clean_root(environment: Mapping[str, str]) -> list[str]:
    """Everything that the inventories of one environment list. Returns what could not be removed."""
    import housing_assets.definitions  # noqa: F401  # all assets
    from housing_assets.deployments import load_resources
    from housing_assets.maintenance.inventory import CleanUp
    from housing_assets.settings import Settings
    from resources.inventory import remove_empty
    from step_scripts.runner.wording import counted

    root = Path(Settings.load(environment).own_root)
    if not root.is_dir():
        return []
    clean_up = CleanUp(logging.getLogger(__name__))
    kept = clean_up.remove_owned(SimpleNamespace(**load_resources(environment)))
    found = len(clean_up.gone) + len(clean_up.left) + len(kept)
    print(f"removed {len(clean_up.gone)} of {counted(found, 'thing')} below {root}")
    for lock in (root / "endpoints").glob(".*.lock"):  # of endpoints that are gone; nobody deploys now
        lock.unlink()
    remove_empty(*map(str, _folders(root)))
    return [*clean_up.reasons(), *(f"{place}: kept, because {why}" for place, why in kept.items())]


def _clean_home(home: Path) -> list[str]:
    if not home.is_dir():
        return []
    if not (home / MARKER).exists():
        return [
            f"{home} (DAGSTER_HOME) was not made by this project, so Dagster's history in it stays. If nothing else "
            f"uses it: touch '{home / MARKER}', and repeat"
        ]
    for name in _DAGSTER:
        path = home / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    print(f"removed Dagster's history in {home}")
    _remove_if_ours(home)
    return []


def _make(folder: Path) -> bool:
    """Make the folder, or take one that is empty; with the marker. False if something is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return False
    (folder / MARKER).write_bytes(_MARKED)
    return True


def _remove_if_ours(folder: Path) -> None:
    """Remove a folder with the marker, if nothing else is in it."""
    others = sorted(path.name for path in folder.iterdir() if path.name != MARKER) if folder.is_dir() else []
    if others:
        names = ", ".join([*others[:10], *(["…"] if len(others) > 10 else [])])
        print(f"{folder} stays, because the project has not made all that is in it: {names}")
    elif (folder / MARKER).exists():
        (folder / MARKER).unlink()
        folder.rmdir()


def _folders(parent: Path) -> Sequence[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """`prepare` or `clean`. Returns the exit status: 1 if something stays that should have gone."""
    environment = os.environ if environment is None else environment
    home = Path(environment["DAGSTER_HOME"])
    if list(arguments) == ["prepare"]:
        place = environment.get("HOUSING_ROOT", "")
        for note in prepare(home, Path(place) if place and "://" not in place else None):
            print(note, file=sys.stderr)
        return 0
    if list(arguments) != ["clean"]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        left = clean(home, environment)
    except ValueError as error:
        print(f"nothing was removed: {error}", file=sys.stderr)
        return 1
    for line in left:
        print(f"not removed: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
