"""When assets follow their inputs by themselves, and when they are stale."""

from collections.abc import Mapping
from datetime import timedelta

import dagster as dg

from housing_assets.settings import Settings

_SETTINGS = Settings.load()
_CHECKED = dg.AutomationCondition.all_deps_blocking_checks_passed()
_FOLLOWS = dg.AutomationCondition.eager() & _CHECKED
_CONDITIONS: Mapping[str, dg.AutomationCondition] = {
    # Days without files have no partition of the feature group: they are not something to wait for.
    **dict.fromkeys(
        ("train_split", "validation_split", "test_split"),
        dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing()) & _CHECKED,
    ),
    # New data alone does not retrain: the schedule does, or a check that found the data shifted.
    "tuned_model": (
        dg.AutomationCondition.any_deps_match(
            dg.AutomationCondition.any_checks_match(dg.AutomationCondition.check_failed())
        )
        .newly_true()
        .since_last_handled()
        & _CHECKED
        & ~dg.AutomationCondition.any_deps_in_progress()
        & ~dg.AutomationCondition.in_progress()
    ).with_label("an input's check has failed"),
    "evaluation_report": _FOLLOWS,
    "registered_model": _FOLLOWS,
}


def automated(spec: dg.AssetSpec) -> dg.AssetSpec:
    """`spec` with its automation condition and its freshness policy, if it has any."""
    condition = _CONDITIONS.get(spec.key.to_user_string())
    if condition is not None:
        spec = spec.replace_attributes(automation_condition=condition)
    if spec.key.to_user_string() in ("registered_model", "endpoint"):
        stale = timedelta(days=_SETTINGS.freshness_days)
        spec = spec.replace_attributes(freshness_policy=dg.FreshnessPolicy.time_window(stale, warn_window=stale * 0.9))
    return spec
