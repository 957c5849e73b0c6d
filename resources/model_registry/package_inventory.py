"""Which model package groups, model packages and files a registry has created, and their removal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import pages
from resources.aws.ownership import belongs_to, tags_of
from resources.inventory import NotOwned, OwnedItem, files_at, remove_tree
from resources.model_registry.base import RegistryDamaged
from resources.model_registry.model_packages import ModelPackages
from resources.model_registry.package_record import FACTS
from step_scripts.runner import storage
from step_scripts.runner.wording import counted

_MODEL = re.compile(r"[0-9a-f]{32}")  # folders of models, see `package_files`
_CODE = "code"


@dataclass(frozen=True)
class PackageInventory:
    """What was created for the registry at `root`. `delete` removes a version with its files."""

    packages: ModelPackages
    root: str
    delete: Callable[[str, int], None]

    def items(self) -> Iterator[OwnedItem]:
        """Versions, groups, files. Groups of others are left out, but not the versions that were put there."""
        from step_scripts.runner.s3_objects import list_folders

        root, client = self.root.rstrip("/"), self.packages.client
        folders = set(list_folders(root))
        listed = pages(client, "list_model_package_groups", "ModelPackageGroupSummaryList")
        for found in list(listed):
            name, arn = found["ModelPackageGroupName"], found["ModelPackageGroupArn"]
            ours = belongs_to(tags_of(client, arn), root)
            if ours or name in folders:
                yield from self._versions(name)
            if ours:
                created = found["CreationTime"]
                yield OwnedItem(kind="model_package_group", name=name, location=arn, created_at=created)
        for folder in sorted(folders):
            if folder == _CODE:
                yield from files_at(f"{root}/{folder}", "serving code")
            elif any(_MODEL.fullmatch(name) for name in list_folders(f"{root}/{folder}")):
                yield from files_at(f"{root}/{folder}", f"models of {folder}")

    def remove(self, item: OwnedItem) -> None:
        """Remove one of them. Raises `RegistryDamaged` for a group, or its files, while it has versions; `NotOwned`."""
        if item.kind == "model_package":
            self._remove_version(item)
        elif item.kind == "model_package_group":
            self._remove_group(item.name)
        elif item.location == storage.join(self.root, _CODE):
            remove_tree(item.location)
        elif item.location.startswith(self.root.rstrip("/") + "/"):
            self._remove_files(item.location)
        else:
            raise NotOwned(f"{item.location} is not below {self.root}")

    def _remove_version(self, item: OwnedItem) -> None:
        described = self.packages.describe(item.location)
        if described is None:
            return
        group = item.name.rpartition("/")[0]
        if not self._is_here(group, described):
            raise NotOwned(f"model package {item.name} was not registered by this deployment; it is left alone")
        self.delete(group, described["ModelPackageVersion"])

    def _remove_group(self, name: str) -> None:
        found = self.packages.group(name)
        if found is None:
            return
        if not belongs_to(tags_of(self.packages.client, found["ModelPackageGroupArn"]), self.root):
            raise NotOwned(f"group {name} was not created by this deployment; it is left alone")
        if left := self.packages.list(name):
            raise RegistryDamaged(f"group {name} has {counted(len(left), 'version')}: it cannot be removed before them")
        self.packages.delete_group(name)

    def _remove_files(self, uri: str) -> None:
        from step_scripts.runner.s3_objects import list_folders

        group = uri.removeprefix(self.root.rstrip("/") + "/")
        if any(self._versions(group)):
            raise RegistryDamaged(f"{uri} holds the files of registered versions: remove them first")
        for folder in list_folders(uri):
            if _MODEL.fullmatch(folder):
                remove_tree(storage.join(uri, folder))

    def _versions(self, group: str) -> Iterator[OwnedItem]:
        for summary in self.packages.list(group):
            described = self.packages.describe(summary["ModelPackageArn"])
            if described is not None and self._is_here(group, described):
                yield OwnedItem(
                    kind="model_package",
                    name=f"{group}/{described['ModelPackageVersion']}",
                    location=described["ModelPackageArn"],
                    created_at=described["CreationTime"],
                    run_id=described["CustomerMetadataProperties"].get("lineage:run_id"),
                    detail=described["ModelApprovalStatus"],
                )

    def _is_here(self, group: str, described: dict[str, Any]) -> bool:
        facts = described.get("CustomerMetadataProperties", {}).get(FACTS, "")
        return facts.startswith(storage.join(self.root, group) + "/")
