"""SageMaker's feature groups: created, awaited, extended, deleted, with bounded waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from resources.aws.calls import already_exists, error_code, error_message, is_missing
from resources.aws.waiting import wait_until
from step_scripts.runner.contract import StepError

_ADDED_AT_ONCE = 100  # UpdateFeatureGroup's limit
_UPDATE_ATTEMPTS = 10  # other runs may add the same features
_LONGEST_POLL = 15.0  # seconds


@dataclass(frozen=True)
class FeatureGroups:
    """Calls of SageMaker's control API. `wait_seconds`: for a group to be created, changed or deleted."""

    client: Any
    wait_seconds: float = 900.0
    poll_seconds: float = 2.0

    def describe(self, name: str) -> dict[str, Any] | None:
        """The group's description with all its features; None if there is no such group."""
        from botocore.exceptions import ClientError

        described: dict[str, Any] | None = None
        token: dict[str, Any] = {}
        while True:
            try:
                page = self.client.describe_feature_group(FeatureGroupName=name, **token)
            except ClientError as error:
                if is_missing(error):
                    return None
                raise _refused("describing", name, error) from error
            if described is None:
                described = dict(page)
            else:
                described["FeatureDefinitions"] = [*described["FeatureDefinitions"], *page["FeatureDefinitions"]]
            if not page.get("NextToken"):
                return described
            token = {"NextToken": page["NextToken"]}

    def create(self, request: Mapping[str, Any]) -> None:
        """Create a group. Nothing happens if there is one of this name: another run may have been first."""
        from botocore.exceptions import ClientError

        try:
            self.client.create_feature_group(**request)
        except ClientError as error:
            if not already_exists(error):
                raise _refused("creating", request["FeatureGroupName"], error) from error

    def ready(self, name: str) -> dict[str, Any] | None:
        """The description of a group that can take records; waits for it. None if there is none, or not any more.

        Raises `StepError` with SageMaker's reason if the group could not be created, changed or deleted, or its offline
        store is blocked, and if it takes too long.
        """
        return self._awaited(name, _is_ready, "be ready")

    def add_features(
        self, name: str, missing: Callable[[Mapping[str, Any]], list[dict[str, str]]]
    ) -> dict[str, Any] | None:
        """Add the features that `missing` finds absent from a description; the description that lacks none."""
        from botocore.exceptions import ClientError

        refusal = "the added features do not appear"
        for _ in range(_UPDATE_ATTEMPTS):
            described = self.ready(name)
            if described is None or not (additions := missing(described)):
                return described
            try:
                self.client.update_feature_group(FeatureGroupName=name, FeatureAdditions=additions[:_ADDED_AT_ONCE])
            except ClientError as error:
                if "Validation" not in error_code(error) and not already_exists(error):
                    raise _refused("changing", name, error) from error
                refusal = error_message(error)  # another run may be changing the group: look again
                time.sleep(random.uniform(self.poll_seconds / 2, self.poll_seconds))
                continue
            update = (self.ready(name) or {}).get("LastUpdateStatus", {})
            if update.get("Status") == "Failed":
                raise StepError(f"adding features to group {name} failed: {update.get('FailureReason')}")
        raise StepError(f"feature group {name} could not be given new features: {refusal}")

    def delete(self, name: str, first: Callable[[Mapping[str, Any]], None]) -> None:
        """Delete a group and wait until it is gone. Nothing happens if there is none.

        `first` is called with the description of a group that is there, and of which nothing is being made any more.
        """
        from botocore.exceptions import ClientError

        described = self._awaited(name, lambda d: d["FeatureGroupStatus"] != "Creating", "be ready for its deletion")
        if described is None:
            return
        first(described)
        if described["FeatureGroupStatus"] != "Deleting":
            try:
                self.client.delete_feature_group(FeatureGroupName=name)
            except ClientError as error:
                if not is_missing(error):
                    raise _refused("deleting", name, error) from error
        self.gone(name)

    def gone(self, name: str) -> None:
        """Wait until a group that is being deleted is gone. Raises `StepError` if that fails or takes too long."""

        def failed(described: Mapping[str, Any]) -> bool:
            if described["FeatureGroupStatus"] == "DeleteFailed":
                raise StepError(
                    f"feature group {name} could not be deleted: {described.get('FailureReason', 'no reason given')}. "
                    "Remove what stands in the way, then delete it again"
                )
            return False

        self._awaited(name, failed, "be deleted")

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


def _refused(doing: str, name: str, error: Exception) -> StepError:
    return StepError(f"{doing} feature group {name} was refused: {error_code(error)}: {error_message(error)}")
