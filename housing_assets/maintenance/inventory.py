"""One inventory of what the deployment has made, and one way to remove what is in it.

Each resource lists what it owns. Teardown, prune, sweep and `make clean-data` choose among it: they look, say what they
found, remove one thing after the other, and say what is left and why.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from resources.inventory import KINDS, OwnedItem, expected_errors

# In an order in which nothing is used any more when it is removed.
RESOURCES = ("endpoint_host", "model_registry", "compute", "feature_store", "evidence", "io_manager", "source_location")


@dataclass(frozen=True)
class Removable:
    """Something that may be removed, and how. `place` tells it from all others."""

    kind: str
    name: str
    place: str
    detail: str
    remove: Callable[[], object]
    bytes: int = 0


@dataclass
class CleanUp:
    """What was removed or, in a dry run, would be; and what was not, with the reason, by its place."""

    log: Any
    dry_run: bool = False
    gone: list[Removable] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Goes on after what may be expected to fail. The reason is among the problems."""
        try:
            yield
        except expected_errors() as error:
            self.problems[what] = f"{type(error).__name__}: {error}"

    def look(self, resources: Any, names: Sequence[str], kinds: Sequence[str] = KINDS) -> list[tuple[OwnedItem, Any]]:
        """What these resources own of these kinds, in the order of removal, each with its resource.

        One that cannot be asked does not hide the others.
        """
        found: list[tuple[OwnedItem, Any]] = []
        for name in names:
            owner = getattr(resources, name)
            with self.noted(name):
                found += [(item, owner) for item in owner.inventory() if item.kind in kinds]
        return sorted(found, key=lambda pair: KINDS.index(pair[0].kind))

    def remove(self, found: Sequence[Removable]) -> None:
        """Remove one after the other, whatever happens to one of them; in a dry run, only say so."""
        for one in found:
            what = f"{one.kind} {one.name}" + (f" ({one.place})" if one.place != one.name else "")
            self.log.info(f"{'would remove' if self.dry_run else 'removing'} {what}: {one.detail}")
            try:
                if not self.dry_run:
                    one.remove()
            except expected_errors() as error:
                self.failed[one.place] = f"{type(error).__name__}: {error}"
                self.log.error(f"{one.kind} {one.name} could not be removed: {self.failed[one.place]}")
            else:
                self.gone.append(one)

    def reasons(self) -> str:
        """Why it is incomplete; empty if it is not."""
        return "; ".join(f"{name}: {reason}" for name, reason in {**self.failed, **self.problems}.items())


def removable(item: OwnedItem, owner: Any) -> Removable:
    """What a resource owns, removed by it."""
    return Removable(item.kind, item.name, item.location, item.detail, partial(owner.remove, item))


def remove_owned(resources: Any, kinds: Sequence[str], clean_up: CleanUp) -> tuple[list[OwnedItem], dict[str, str]]:
    """Remove what the deployment owns of these kinds.

    Returns all that was found, and what was kept because people's own files are in it (location → reason).
    """
    found = clean_up.look(resources, RESOURCES, kinds)
    places = {item.location: resources.source_location.place_within(item.location) for item, _ in found}
    kept = {location: f"{place}, where your own files are, is in it" for location, place in places.items() if place}
    clean_up.remove([removable(item, owner) for item, owner in found if item.location not in kept])
    return [item for item, _ in found], kept
