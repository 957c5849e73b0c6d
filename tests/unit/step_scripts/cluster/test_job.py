"""Hosts of a job: who they are, who is the head, which address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_scripts.cluster.job import (
    ADDRESSES_VARIABLE,
    ClusterError,
    JobHosts,
    ml_root,
    natural_order,
    own_address,
    read_hosts,
    resolve,
)


def _write(root: Path, place: str, **config: Any) -> None:
    path = root / place / "resourceconfig.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("place", "kind", "file"),
    [("input/config", "training", "output/failure"), ("config", "processing", "output/message")],
)
def test_both_locations(tmp_path: Path, place: str, kind: str, file: str) -> None:
    _write(tmp_path, place, current_host="algo-1", hosts=["algo-1"], network_interface_name="eth0")
    hosts = read_hosts(tmp_path)
    assert hosts.kind == kind
    assert hosts.is_head
    assert hosts.names == ("algo-1",)
    assert hosts.failure_file == tmp_path / file


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), data=st.data())
def test_every_host_finds_the_same_head_and_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, data: st.DataObject
) -> None:
    names = [f"algo-{number}" for number in range(1, count + 1)]
    seen = set()
    for current in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        root = tmp_path_factory.mktemp("ml")
        # As text, as SageMaker sorts them, or in any order.
        order = data.draw(st.one_of(st.just(sorted(names)), st.permutations(names)))
        _write(root, "input/config", current_host=current, hosts=order)
        hosts = read_hosts(root)
        assert hosts.current == current
        assert hosts.is_head == (current == "algo-1")
        seen.add((hosts.head, hosts.names))
    assert seen == {("algo-1", tuple(names))}


def test_more_than_ten_hosts_are_not_in_order_of_text() -> None:
    assert sorted(["algo-10", "algo-2", "algo-1"], key=natural_order) == ["algo-1", "algo-2", "algo-10"]


_GROUPS = [
    {"instance_group_name": "workers", "instance_type": "ml.c5.xlarge", "hosts": ["algo-1", "algo-10", "algo-2"]},
    {"instance_group_name": "big", "instance_type": "ml.m5.24xlarge", "hosts": ["algo-11", "algo-3"]},
]


@pytest.mark.parametrize(("group", "head"), [(None, "algo-3"), ("big", "algo-3"), ("workers", "algo-1")])
@pytest.mark.parametrize("order", [_GROUPS, _GROUPS[::-1]])
def test_head_is_in_the_first_or_the_configured_group(
    tmp_path: Path, group: str | None, head: str, order: list[dict[str, Any]]
) -> None:
    names = ["algo-1", "algo-10", "algo-11", "algo-2", "algo-3"]
    _write(
        tmp_path,
        "input/config",
        current_host="algo-2",
        current_group_name="workers",
        hosts=names,
        instance_groups=order,
    )
    hosts = read_hosts(tmp_path, group)
    assert hosts.head == head
    assert set(hosts.names) == set(names)


@pytest.mark.parametrize(
    ("config", "group", "message"),
    [
        ({"current_host": "algo-3", "hosts": ["algo-1"]}, None, "algo-3 is not among the hosts algo-1"),
        ({"hosts": ["algo-1"]}, None, "KeyError: 'current_host'"),
        ({"current_host": "algo-1", "hosts": ["algo-1"]}, "big", "there is no instance group big; there are none"),
        (
            {
                "current_host": "algo-1",
                "hosts": ["algo-1"],
                "instance_groups": [{"instance_group_name": "a", "hosts": []}],
            },
            None,
            "the instance group a has none of the hosts",
        ),
    ],
)
def test_bad_description(tmp_path: Path, config: dict[str, Any], group: str | None, message: str) -> None:
    _write(tmp_path, "config", **config)
    with pytest.raises(ClusterError, match=message):
        read_hosts(tmp_path, group)


def test_no_description_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"neither .*/input/config/.* nor .*/config/resourceconfig.json"):
        read_hosts(tmp_path)


def test_root_and_addresses_from_the_environment() -> None:
    assert ml_root({}) == Path("/opt/ml")
    assert ml_root({"SAGEMAKER_BASE_DIR": "/elsewhere"}) == Path("/elsewhere")
    assert resolve("algo-2", {ADDRESSES_VARIABLE: "algo-1=127.0.0.2,algo-2=127.0.0.3"}) == "127.0.0.3"
    assert resolve("no-such-host.invalid", {}) is None


def _hosts(*names: str, interface: str | None = None) -> JobHosts:
    return JobHosts("training", Path("/opt/ml"), names[0], names, names[0], interface)


def test_own_address_is_one_that_others_can_use() -> None:
    assert own_address(_hosts("algo-1", "algo-2"), lambda _: "10.0.0.7") == "10.0.0.7"
    # Not yet known, or of no use to others: no address rather than a wrong one.
    assert own_address(_hosts("algo-1", "algo-2"), lambda _: None) is None
    assert own_address(_hosts("algo-1", "algo-2", interface="no-such"), lambda _: "127.0.1.1") is None
    assert own_address(_hosts("algo-1"), lambda _: None) == "127.0.0.1"
