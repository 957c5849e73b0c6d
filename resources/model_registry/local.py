"""A model registry in plain files.

Layout: `<root>/<group>/versions/<number>/version.json` beside `artifact/`, which holds the model's files;
`<root>/<group>/last_version` holds the highest number ever given; `<root>/<group>/lock` is locked by writers. A version
is prepared in a folder whose name starts with a dot and renamed when it is complete, so readers need no lock. The root
can be moved.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError

from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded, remove_empty
from resources.model_registry.base import (
    ApprovalStatus,
    GateEvidence,
    ModelRegistry,
    ModelVersion,
    ModelVersionNotFound,
    RegistryDamaged,
    StatusChange,
    require_gate,
)
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, DamagedArtifactError, check_files
from step_scripts.runner.local_files import file_lock
from step_scripts.serving.deployment import verify_file

_GROUP = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


class LocalModelRegistry(ModelRegistry):
    """Versions as folders below `root`. Any number of processes may use it at once."""

    root: str = Field(description="Folder of the registry.")
    lock_timeout_seconds: float = Field(default=30.0, gt=0, description="How long to wait for another writer.")

    def register(
        self,
        group: str,
        artifact: Artifact,
        *,
        metrics: dict[str, float],
        gate: GateEvidence,
        lineage: dict[str, JsonValue],
        status: ApprovalStatus = "PendingManualApproval",
    ) -> ModelVersion:
        """See `ModelRegistry.register`."""
        if status == "Approved":
            require_gate(f"the model of run {gate.run_id}", gate)
        if not artifact.files:
            raise ValueError(f"{artifact.uri} holds no files: nothing to register")
        folder = self._group_folder(group)
        with file_lock(folder / "lock", self.lock_timeout_seconds, f"registering a model in group {group}"):
            self._remove_unfinished(folder)
            for existing in self.list(group, damaged={}):
                if (existing.artifact.digest, existing.gate.evaluation_digest) == (
                    artifact.digest,
                    gate.evaluation_digest,
                ):
                    return self.get(group, existing.version)
            number = self._next_number(folder)
            now = datetime.now(UTC)
            why = f"registered; {gate.metric} {gate.value:g}, threshold {gate.threshold:g}"
            record = ModelVersion(
                group=group,
                version=number,
                artifact=artifact.model_copy(update={"uri": "artifact"}),
                status=status,
                status_history=(StatusChange(status=status, who=f"run {gate.run_id}", why=why, when=now),),
                metrics=metrics,
                gate=gate,
                lineage=lineage,
                created_at=now,
            )
            self._commit(folder, record, source_uri=artifact.uri)
        return self.get(group, number)

    def get(self, group: str, version: int) -> ModelVersion:
        """See `ModelRegistry.get`. Reads all files of the artifact and compares them with their record."""
        found = self._read(group, version)
        try:
            check_files(found.artifact, "all")
        except DamagedArtifactError as error:
            raise RegistryDamaged(
                f"model version {found.reference} is damaged: {error}. Restore the file, or delete the version."
            ) from error
        return found

    def list(
        self, group: str, status: ApprovalStatus | None = None, damaged: dict[str, str] | None = None
    ) -> Sequence[ModelVersion]:
        """See `ModelRegistry.list`. Does not read the artifacts."""
        versions = []
        for number in self._numbers(group):
            try:
                versions.append(self._read(group, number))
            except ModelVersionNotFound:  # deleted since the folder was read
                continue
            except RegistryDamaged as error:
                if damaged is None:
                    raise
                damaged[f"{group}/{number}"] = str(error)
        return [v for v in versions if status is None or v.status == status]

    def set_status(self, group: str, version: int, status: ApprovalStatus, *, who: str, why: str) -> ModelVersion:
        """See `ModelRegistry.set_status`."""
        folder = self._group_folder(group)
        self._read(group, version)  # before a lock file is made for a group that does not exist
        with file_lock(folder / "lock", self.lock_timeout_seconds, f"changing the status of {group}/{version}"):
            changed = self._read(group, version).with_status(status, who=who, why=why, when=datetime.now(UTC))
            _write_record(self._version_folder(group, version), changed)
        return changed

    def delete(self, group: str, version: int) -> None:
        """See `ModelRegistry.delete`."""
        if version not in self._numbers(group):
            raise self._not_found(group, version)
        folder = self._group_folder(group)
        with file_lock(folder / "lock", self.lock_timeout_seconds, f"deleting {group}/{version}"):
            if version not in self._numbers(group):
                raise self._not_found(group, version)
            storage.discard_folder(self._version_folder(group, version))

    def inventory(self) -> Sequence[OwnedItem]:
        """See `ModelRegistry.inventory`."""
        root = Path(self.root).absolute()
        folders = sorted(root.iterdir()) if root.is_dir() else []
        items = []
        for folder in folders:
            if not _GROUP.fullmatch(folder.name) or not (folder / "last_version").is_file():
                continue
            items += [self._item(folder.name, number) for number in self._numbers(folder.name)]
            items += discarded_items(str(folder / "versions"), "model_package")
            items.append(OwnedItem(kind="model_package_group", name=folder.name, location=str(folder)))
        return items

    def remove(self, item: OwnedItem) -> None:
        """See `ModelRegistry.remove`. Raises `RegistryDamaged` for a group that has versions."""
        if item.discarded:
            self._remove_discarded(item)
            return
        group, _, number = item.name.rpartition("/")
        folder = self._group_folder(item.name if item.kind == "model_package_group" else group)
        place = folder if item.kind == "model_package_group" else folder / "versions" / number
        if item.location != str(place):
            raise NotOwned(f"{item.location} is not of this registry ({self.root})")
        if item.kind == "model_package":
            with contextlib.suppress(ModelVersionNotFound):
                self.delete(group, int(number))
        elif folder.is_dir():
            with file_lock(folder / "lock", self.lock_timeout_seconds, f"removing group {item.name}"):
                if self._numbers(item.name) or storage.discarded_folders(folder / "versions"):
                    raise RegistryDamaged(f"group {item.name} has versions: remove them first")
                self._remove_unfinished(folder)
                for name in ("last_version", "lock"):
                    (folder / name).unlink(missing_ok=True)
            remove_empty(str(folder / "versions"), str(folder))

    def _remove_discarded(self, item: OwnedItem) -> None:
        versions = Path(item.location).parent
        if versions.name != "versions" or versions.parent.parent != Path(self.root).absolute():
            raise NotOwned(f"{item.location} is not of this registry ({self.root})")
        remove_discarded(str(versions), item)

    def _item(self, group: str, number: int) -> OwnedItem:
        location = str(self._version_folder(group, number))
        try:
            version = self._read(group, number)
        except RegistryDamaged as error:
            return OwnedItem(kind="model_package", name=f"{group}/{number}", location=location, detail=str(error))
        run_id = version.lineage.get("run_id")
        return OwnedItem(
            kind="model_package",
            name=version.reference,
            location=location,
            created_at=version.created_at,
            run_id=run_id if isinstance(run_id, str) else None,
            detail=version.status,
        )

    def _group_folder(self, group: str) -> Path:
        if not _GROUP.fullmatch(group):
            raise ValueError(f"{group!r} is no name of a model group: 1 to 63 letters, digits and inner hyphens")
        return Path(self.root).absolute() / group

    def _version_folder(self, group: str, version: int) -> Path:
        return self._group_folder(group) / "versions" / str(version)

    def _numbers(self, group: str) -> Sequence[int]:
        folder = self._group_folder(group) / "versions"
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())

    def _not_found(self, group: str, version: int) -> ModelVersionNotFound:
        numbers = self._numbers(group)
        existing = f"it has {', '.join(map(str, numbers))}" if numbers else "it has none"
        return ModelVersionNotFound(f"model group {group} has no version {version}; {existing} (in {self.root})")

    def _read(self, group: str, version: int) -> ModelVersion:
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
        return found.model_copy(
            update={"artifact": found.artifact.model_copy(update={"uri": str(folder / "artifact")})}
        )

    def _next_number(self, folder: Path) -> int:
        counter = folder / "last_version"
        try:
            last = int(counter.read_text())
        except FileNotFoundError:
            last = 0
        except ValueError as error:
            raise RegistryDamaged(
                f"{counter} does not hold a number. Write the highest version ever used into it."
            ) from error
        number = max([last, *self._numbers(folder.name)]) + 1
        storage.write_bytes(str(counter), f"{number}\n".encode())
        return number

    def _commit(self, folder: Path, record: ModelVersion, *, source_uri: str) -> None:
        staging = folder / "versions" / f".staging-{uuid.uuid4().hex}"
        try:
            for file in record.artifact.files:
                target = staging / "artifact" / file.path
                if not target.resolve().is_relative_to((staging / "artifact").resolve()):
                    raise ValueError(f"{source_uri}: {file.path} leads out of the artifact")
                storage.write_bytes(str(target), _read_source(storage.join(source_uri, file.path)))
                verify_file(str(target), file)
            _write_record(staging, record)
            storage.sync(str(staging), [str(Path("artifact", file.path)) for file in record.artifact.files])
            staging.rename(folder / "versions" / str(record.version))
            storage.sync(str(folder / "versions"), [])
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
    stored = record.model_copy(update={"artifact": record.artifact.model_copy(update={"uri": "artifact"})})
    storage.write_bytes(str(folder / "version.json"), stored.model_dump_json(indent=2).encode())


def _read_source(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri) if storage.is_remote(uri) else storage.local_path(uri).read_bytes()
    except FileNotFoundError as error:
        raise DamagedArtifactError(f"{uri} is missing: the model that was to be registered is incomplete") from error
