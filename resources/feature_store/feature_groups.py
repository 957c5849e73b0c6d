"""SageMaker's feature groups and the Glue tables that it makes for them: created, awaited, extended, deleted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import already_exists, error_code, error_message, if_found
from resources.waiting import wait_until
from step_scripts.runner.contract import StepError

_ADDED_AT_ONCE = 100  # UpdateFeatureGroup's limit
_ATTEMPTS = 10  # other runs may create the same group, add the same features, delete it
_LONGEST_POLL = 15.0  # seconds


@dataclass(frozen=True)
class FeatureGroups:
    """Calls of SageMaker's control API and of Glue. `wait_seconds`: for a group to be created, changed or deleted."""

    client: Any
    glue: Any
    wait_seconds: float = 900.0
    poll_seconds: float = 2.0

    def describe(self, name: str) -> dict[str, Any] | None:
        """The group's description with all its features; None if there is no such group."""
        with _refusals(f"describing feature group {name}"):
            described = if_found(self.client.describe_feature_group, FeatureGroupName=name)
            while described is not None and (token := described.pop("NextToken", None)):
                page = self.client.describe_feature_group(FeatureGroupName=name, NextToken=token)
                definitions = [*described["FeatureDefinitions"], *page["FeatureDefinitions"]]
                described = {**page, "FeatureDefinitions": definitions}
            return described

    def ensured(
        self, request: Mapping[str, Any], missing: Callable[[Mapping[str, Any]], list[dict[str, str]]]
    ) -> dict[str, Any]:
        """The description of a group that can take records, and has all features that `missing` finds absent from it.

        It is created if it is not there, waited for, and given the features. Raises `StepError` with SageMaker's reason
        if the group could not be created, changed or deleted, or its offline store is blocked, or it takes too long.
        """
        name, refusal = request["FeatureGroupName"], "it is deleted by others as soon as it is there"
        for _ in range(_ATTEMPTS):
            described = self.describe(name)
            if described is not None and described["FeatureGroupStatus"] == "Deleting":
                self.gone(name)
                described = None
            if described is None:
                with _refusals(f"creating feature group {name}", but=already_exists):
                    self.client.create_feature_group(**request)
            if (described := self._awaited(name, _is_ready, "be ready")) is None:
                continue
            if not (additions := missing(described)):
                return described
            try:
                with _refusals(f"changing feature group {name}"):
                    self.client.update_feature_group(FeatureGroupName=name, FeatureAdditions=additions[:_ADDED_AT_ONCE])
            except StepError as error:
                cause = error.__cause__ or error
                if "Validation" not in error_code(cause) and not already_exists(cause):
                    raise
                refusal = error_message(cause)  # another run may be changing the group: look again
                time.sleep(random.uniform(self.poll_seconds / 2, self.poll_seconds))
                continue
            refusal = "the added features do not appear"
            update = (self._awaited(name, _is_ready, "be ready") or {}).get("LastUpdateStatus", {})
            if update.get("Status") == "Failed":
                raise StepError(f"adding features to group {name} failed: {update.get('FailureReason')}")
        raise StepError(f"feature group {name} could not be made ready: {refusal}")

    def delete(self, name: str) -> None:
        """Delete a group and its table, and wait until it is gone. Nothing happens if there is none."""
        described = self._awaited(name, lambda d: d["FeatureGroupStatus"] != "Creating", "be ready for its deletion")
        if described is None:
            return
        self._drop_table(described)  # first: only the group says which it is
        if described["FeatureGroupStatus"] != "Deleting":
            with _refusals(f"deleting feature group {name}"):
                if_found(self.client.delete_feature_group, FeatureGroupName=name)
        self.gone(name)

    def gone(self, name: str) -> None:
        """Wait until a group that is being deleted is gone. Raises `StepError` if that fails or takes too long."""
        described = self._awaited(name, lambda d: d["FeatureGroupStatus"] == "DeleteFailed", "be deleted")
        if described is not None:
            raise StepError(
                f"feature group {name} could not be deleted: {described.get('FailureReason', 'no reason given')}. "
                "Remove what stands in the way, then delete it again"
            )

    def _awaited(self, name: str, condition: Callable[[Mapping[str, Any]], bool], what: str) -> dict[str, Any] | None:
        """The description once `condition` holds, or None as soon as the group is not there."""
        described: dict[str, Any] | None = None

        def settled() -> bool:
            nonlocal described
            described = self.describe(name)
            return described is None or condition(described)

        try:
            wait_until(
                settled,
                timeout=self.wait_seconds,
                interval=self.poll_seconds,
                longest_interval=_LONGEST_POLL,
                what=f"what feature group {name} was waited for",
            )
        except TimeoutError:
            raise StepError(
                f"feature group {name} has taken more than {self.wait_seconds:.0f} s to {what}; its status is "
                f"{(described or {}).get('FeatureGroupStatus')}. Look at it in the SageMaker console, then try again"
            ) from None
        return described

    def table(self, described: Mapping[str, Any]) -> str:
        """`database.table` of a feature group, once the table is there and names its metadata, if it is in Iceberg.

        Raises `StepError` if the group has no such table, if it takes too long, and for what Glue refuses.
        """
        group, place = described["FeatureGroupName"], table_of(described)
        if place is None:
            raise StepError(
                f"feature group {group} names no table in AWS Glue, although its offline store is in Iceberg format: "
                "look at it in the SageMaker console, or delete the group and try again"
            )

        def appeared() -> bool:
            table = self._find_table(group, place)
            parameters = (table or {}).get("Parameters", {})
            is_other = table is not None and parameters.get("table_type", "").upper() != "ICEBERG"
            return is_other or bool(parameters.get("metadata_location"))

        try:
            wait_until(appeared, timeout=self.wait_seconds, interval=self.poll_seconds, what=f"the creation of {place}")
        except TimeoutError:
            raise StepError(
                f"feature group {group} is there, its Iceberg table {place} has not been in AWS Glue for "
                f"{self.wait_seconds:.0f} s. If somebody has dropped it, delete the group, which removes its "
                "records for good, or use another group name"
            ) from None
        return place

    def _drop_table(self, described: Mapping[str, Any]) -> None:
        """Remove the table from Glue, where SageMaker leaves it, unless it is not there or not the group's."""
        group, place = described["FeatureGroupName"], table_of(described)
        table = self._find_table(group, place) if place else None
        if place is None or table is None:
            return
        if table.get("StorageDescriptor", {}).get("Location", "").startswith(f"{place_of(described)}/"):
            database, name = place.split(".", 1)
            with _refusals(f"dropping {place} in AWS Glue, the table of feature group {group},"):
                if_found(self.glue.delete_table, DatabaseName=database, Name=name)

    def _find_table(self, group: str, place: str) -> dict[str, Any] | None:
        database, name = place.split(".", 1)
        with _refusals(f"reading {place} in AWS Glue, the table of feature group {group},"):
            found = if_found(self.glue.get_table, DatabaseName=database, Name=name)
        return found["Table"] if found else None


def _is_ready(described: Mapping[str, Any]) -> bool:
    name, status = described["FeatureGroupName"], described["FeatureGroupStatus"]
    reason = described.get("FailureReason", "no reason given")
    if status in ("CreateFailed", "DeleteFailed"):
        raise StepError(
            f"feature group {name} is {status}: {reason}. Put right what the reason names (often the role's rights on "
            "the bucket or key), delete the group, and try again"
        )
    if status != "Created":
        return False
    offline = described.get("OfflineStoreStatus", {})
    if offline.get("Status") == "Blocked":
        raise StepError(f"the offline store of feature group {name} is blocked: {offline.get('BlockedReason')}")
    update = described.get("LastUpdateStatus", {})
    return update.get("Status") != "InProgress"


def place_of(described: Mapping[str, Any]) -> str:
    """The s3:// prefix that a group's offline store was given; empty if it has none."""
    return described.get("OfflineStoreConfig", {}).get("S3StorageConfig", {}).get("S3Uri", "").rstrip("/")


def table_of(described: Mapping[str, Any]) -> str | None:
    """`database.table` of an offline store in Iceberg format, in lower case as Glue keeps them; None of another."""
    offline = described.get("OfflineStoreConfig", {})
    config = offline.get("DataCatalogConfig")
    if offline.get("TableFormat") != "Iceberg" or not config:
        return None
    return f"{config['Database']}.{config['TableName']}".lower()


@contextmanager
def _refusals(doing: str, but: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
    """Raise AWS's errors as `StepError` that says what was being done; those for which `but` holds are ignored."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if not but(error):
            raise StepError(f"{doing} was refused: {error_code(error)}: {error_message(error)}") from error
