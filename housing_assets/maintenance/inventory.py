"""One inventory of what the deployment has made, and one way to remove what is in it.

Each resource lists what it owns. Teardown, prune, sweep and `make clean-data` choose among it: they look, say what they
found, remove one thing after the other, and say what is left and why.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import dagster as dg

from resources.inventory import KINDS, OwnedItem, expected_errors

# In an order in which nothing is used any more when it is removed.
RESOURCES = ("endpoint_host", "model_registry", "compute", "feature_store", "evidence", "io_manager", "source_location")


@dataclass(frozen=True)
class Removable:
    """Something that may be removed, and how. `place` tells it from all others. `item`: if a resource owns it."""

    kind: str
    name: str
    place: str
    detail: str
    remove: Callable[[], object]
    bytes: int = 0
    item: OwnedItem | None = None


@dataclass
class CleanUp:
    """What was removed (in a dry run: would be), what is left with the reason, by its place, and other problems."""

    log: Any
    dry_run: bool = False
    gone: list[Removable] = field(default_factory=list)
    left: dict[str, tuple[Removable, str]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Goes on after what may be expected to fail. The reason is among the problems."""
        try:
            yield
        except expected_errors() as error:
            self.problems[what] = f"{type(error).__name__}: {error}"

    def look(self, resources: Any, names: Sequence[str], kinds: Sequence[str] = KINDS) -> list[Removable]:
        """What these resources own of these kinds, in the order of removal.

        One that cannot be asked does not hide the others.
        """
        found: list[Removable] = []
        for name in names:
            owner = getattr(resources, name)
            with self.noted(name):
                found += [
                    Removable(i.kind, i.name, i.location, i.detail, partial(owner.remove, i), item=i)
                    for i in owner.inventory()
                    if i.kind in kinds
                ]
        return sorted(found, key=lambda one: [*KINDS].index(one.kind))

    def remove(self, found: Sequence[Removable]) -> None:
        """Remove one after the other, whatever happens to one of them; in a dry run, only say so."""
        for one in found:
            what = f"{one.kind} {one.name}" + (f" ({one.place})" if one.place != one.name else "")
            try:
                if not self.dry_run:
                    one.remove()
            except expected_errors() as error:
                self.left[one.place] = one, f"{type(error).__name__}: {error}"
                self.log.error(f"{one.kind} {one.name} could not be removed: {self.left[one.place][1]}")
            else:
                self.gone.append(one)
                self.log.info(f"{'would remove' if self.dry_run else 'removed'} {what}: {one.detail}")

    def remove_owned(self, resources: Any, kinds: Sequence[str] = KINDS) -> dict[str, str]:
        """Remove what the deployment owns of these kinds.

        Returns what was kept because people's own files are in it (location → reason).
        """
        found = self.look(resources, RESOURCES, kinds)
        places = {one.place: resources.source_location.place_within(one.place) for one in found}
        kept = {place: f"{own}, where your own files are, is in it" for place, own in places.items() if own}
        self.remove([one for one in found if one.place not in kept])
        return kept

    def reasons(self) -> list[str]:
        """What is left and why; nothing if all went well."""
        left = [f"{one.kind} {one.name}: {why}" for one, why in self.left.values()]
        return left + [f"{name}: {reason}" for name, reason in self.problems.items()]

    def finish(self, context: dg.OpExecutionContext, incomplete: str, metadata: dict[str, Any]) -> None:
        """End the op. Raises `dagster.Failure`, which begins with the words `incomplete`, if something is left."""
        metadata["could_not_be_listed"] = dg.MetadataValue.json(self.problems)
        if reasons := self.reasons():
            raise dg.Failure(
                f"{incomplete}: {'; '.join(reasons)}. Remove the reason, then run {context.job_name} again",
                metadata=metadata,
                allow_retries=False,
            )
        context.add_output_metadata(metadata)
