"""A model registry in plain files.

Layout: `<root>/<group>/versions/<number>/version.json` beside `artifact/`, which holds the model's files;
`<root>/<group>/last_version` holds the highest number ever given; `<root>/<group>/lock` is locked by writers. A version
is prepared in a folder whose name starts with a dot and renamed when it is complete, so readers need no lock. The root
can be moved.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded, remove_empty
from resources.model_registry.base import (
    NAME,
    ApprovalStatus,
    ModelRegistry,
    ModelVersion,
    ModelVersionNotFound,
    RegistryDamaged,
    check_name,
    read_model,
    verified,
)
from step_scripts.runner import storage
from step_scripts.runner.local_files import discard_folder, discarded_folders, file_lock, sync_files


class LocalModelRegistry(ModelRegistry):
    """Versions as folders below `root`. Any number of processes may use it at once."""

    root: str = Field(description="Folder of the registry.")
    lock_timeout_seconds: float = Field(default=30.0, gt=0, description="How long to wait for another writer.")

    def _register(self, new: ModelVersion) -> ModelVersion:
        group = new.group
        folder = self._group_folder(group)
        with self._locked(group, f"registering a model in group {group}"):
            self._remove_unfinished(folder)
            same = [existing for existing in self.list(group, damaged={}) if existing.identity == new.identity]
            number = same[0].version if same else self._next_number(group)
            if not same:
                self._commit(folder, new.model_copy(update={"version": number}))
        return self.get(group, number)

    def get(self, group: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`."""
        return verified(self._read(group, version))

    def set_status(self, group: str, version: int, status: ApprovalStatus, *, who: str, why: str) -> ModelVersion:
        """See `ModelRegistry.set_status`."""
        self._read(group, version)  # before a lock file is made for a group that does not exist
        with self._locked(group, f"changing the status of {group}/{version}"):
            changed = self._read(group, version).with_status(status, who=who, why=why, when=datetime.now(UTC))
            _write_record(self._version_folder(group, version), changed)
        return changed

    def delete(self, group: str, version: int) -> None:
        """See `ModelRegistry.delete`."""
        if version not in self._find(group):
            raise self._not_found(group, version)
        with self._locked(group, f"deleting {group}/{version}"):
            if version not in self._find(group):
                raise self._not_found(group, version)
            discard_folder(self._version_folder(group, version))

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ModelRegistry.inventory`."""
        root = Path(self.root).absolute()
        items = []
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            if not NAME.fullmatch(folder.name) or not (folder / "last_version").is_file():
                continue
            items += [self._item(folder.name, *found) for found in sorted(self._find(folder.name).items())]
            items += discarded_items(str(folder / "versions"), "model_package")
            items.append(OwnedItem(kind="model_package_group", name=folder.name, location=str(folder)))
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `ModelRegistry.remove`. Raises `RegistryDamaged` for a group that has versions."""
        place = Path(item.location)
        folder = place if item.kind == "model_package_group" else place.parent.parent
        if folder.parent != Path(self.root).absolute() or place not in (folder, folder / "versions" / place.name):
            raise NotOwned(f"{item.location} is not of this registry ({self.root})")
        group = folder.name
        if item.discarded:
            remove_discarded(str(folder / "versions"), item)
        elif item.kind == "model_package":
            with contextlib.suppress(ModelVersionNotFound):
                self.delete(group, int(place.name))
        elif folder.is_dir():
            with self._locked(group, f"removing group {group}"):
                if self._find(group) or discarded_folders(folder / "versions"):
                    raise RegistryDamaged(f"group {group} has versions: remove them first")
                self._remove_unfinished(folder)
                for name in ("last_version", "lock"):
                    (folder / name).unlink(missing_ok=True)
            remove_empty(str(folder / "versions"), str(folder))

    def _item(self, group: str, number: int, location: str) -> OwnedItem:
        item = OwnedItem(kind="model_package", name=f"{group}/{number}", location=location)
        try:
            version = self._read(group, number)
        except RegistryDamaged as error:
            return item.model_copy(update={"detail": str(error)})
        run_id = version.lineage.get("run_id")
        known = {"created_at": version.created_at, "run_id": run_id if isinstance(run_id, str) else None}
        return item.model_copy(update={**known, "detail": version.status})

    def _locked(self, group: str, what: str) -> contextlib.AbstractContextManager[None]:
        return file_lock(self._group_folder(group) / "lock", self.lock_timeout_seconds, what)

    def _group_folder(self, group: str) -> Path:
        check_name(group, "a model group")
        return Path(self.root).absolute() / group

    def _version_folder(self, group: str, version: int) -> Path:
        return self._group_folder(group) / "versions" / str(version)

    def _find(self, group: str, status: ApprovalStatus | None = None) -> Mapping[int, str]:
        folder = self._group_folder(group) / "versions"
        entries = folder.iterdir() if folder.is_dir() else []
        return {int(entry.name): str(entry) for entry in entries if entry.name.isdecimal()}

    def _read(self, group: str, version: int, location: str = "") -> ModelVersion:
        folder = self._version_folder(group, version)
        path = folder / "version.json"
        try:
            found = ModelVersion.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            if not folder.is_dir():
                raise self._not_found(group, version) from None
            raise RegistryDamaged(f"{path} is missing. Restore it, or delete version {version}.") from None
        except ValidationError as error:
            raise RegistryDamaged(
                f"{path} is not a complete record of a model version ({error.errors()[0]['msg']}). Restore it, or "
                f"delete version {version}."
            ) from error
        if (found.group, found.version) != (group, version):
            raise RegistryDamaged(f"{path} describes version {found.reference}, not {group}/{version}")
        return found.with_artifact_at(str(folder / "artifact"))

    def _next_number(self, group: str) -> int:
        counter = self._group_folder(group) / "last_version"
        try:
            last = int(counter.read_text())
        except FileNotFoundError:
            last = 0
        except ValueError as error:
            raise RegistryDamaged(
                f"{counter} does not hold a number. Write the highest version ever used into it."
            ) from error
        number = max([last, *self._find(group)]) + 1
        storage.write_bytes(str(counter), f"{number}\n".encode())
        return number

    def _commit(self, folder: Path, record: ModelVersion) -> None:
        contents = read_model(record.artifact)
        staging = folder / "versions" / f".staging-{uuid.uuid4().hex}"
        try:
            for path, content in contents.items():
                storage.write_bytes(str(staging / "artifact" / path), content)
            _write_record(staging, record)
            sync_files(staging, [str(Path("artifact", path)) for path in contents])
            staging.rename(folder / "versions" / str(record.version))
            sync_files(folder / "versions")
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _remove_unfinished(self, folder: Path) -> None:
        # Only the holder of the lock makes such folders: these were left by a process that died. One that cannot be
        # removed stays in nobody's way; what is left of a version is in the inventory.
        for entry in (folder / "versions").glob(".staging-*"):
            shutil.rmtree(entry, ignore_errors=True)


def _write_record(folder: Path, record: ModelVersion) -> None:
    # The location is left out: the registry may be moved.
    stored = record.with_artifact_at("artifact").model_dump_json(indent=2)
    storage.write_bytes(str(folder / "version.json"), stored.encode())
