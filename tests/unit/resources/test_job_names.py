"""Names and tags of SageMaker jobs; the code package's name."""

from __future__ import annotations

import io
import re
import tarfile
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.aws.code_package import archive, code_package
from resources.aws.ownership import owned, sanitised
from resources.sagemaker.jobs import (
    PROCESSING,
    TRAINING,
    Job,
    attempts_of,
    digest_of,
    job_name,
    request_digest,
)

VALID = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
TEXT = st.text(max_size=80)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, max_size=3), st.none() | TEXT, TEXT, TEXT)
def test_names_are_valid_for_any_input(
    prefix: str, assets: list[str], partition: str | None, digest: str, run: str
) -> None:
    name = job_name(prefix, assets, digest_of([assets, partition, digest]), run)
    for attempt in [*islice(attempts_of(name), 12), f"{name}-9999"]:
        assert VALID.fullmatch(attempt), attempt
        assert len(attempt) <= 63


@settings(deadline=None)
@given(TEXT, TEXT)
def test_different_work_has_different_names_and_equal_work_equal_ones(one: str, other: str) -> None:
    def name(asset: str = "a", partition: str | None = None, digest: str = "d", run: str = "r") -> str:
        return job_name("p", [asset], digest_of([[asset], partition, digest]), run)

    assert name(one) == name(one)
    for field in ("asset", "partition", "digest", "run"):
        assert (name(**{field: one}) == name(**{field: other})) == (one == other)


def test_runs_of_the_same_work_share_the_first_part() -> None:
    work = digest_of([["model/tuned"], "2026-01", "d"])
    one, other = (job_name("housing", ["model/tuned"], work, run) for run in ("run 1", "run 2"))
    assert one.rpartition("-")[0] == other.rpartition("-")[0]
    assert one != other
    assert one.startswith("housing-model-tuned-")
    assert list(islice(attempts_of(one), 3)) == [one, f"{one}-2", f"{one}-3"]
    assert len(f"{job_name('tune', [], work, 'run 1')}-9999") <= 32, "the limit of tuning jobs"


def test_the_request_digest_ignores_name_and_tags_alone() -> None:
    request = {"TrainingJobName": "a", "Tags": [], "RoleArn": "r", "Environment": {"A": "1"}}
    assert request_digest(request) == request_digest({**request, "TrainingJobName": "b", "Tags": [{"Key": "k"}]})
    assert request_digest(request) != request_digest({**request, "Environment": {"A": "2"}})


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=200), st.text(max_size=400), max_size=80))
def test_tags_of_any_text_fit_the_rules(tags: dict[str, str]) -> None:
    found = owned({"first": "kept"}, tags)
    assert [tag["Key"] for tag in found[:2]] == ["housing-assets:created-by", "first"]
    assert found[1]["Value"] == "kept"
    assert len(found) <= 50
    assert len({tag["Key"] for tag in found}) == len(found)
    for tag in found:
        assert 1 <= len(tag["Key"]) <= 128
        assert len(tag["Value"]) <= 256
        assert not tag["Key"].lower().startswith("aws:")
        assert re.fullmatch(r"[\w\s.:/=+\-@]*", tag["Key"] + tag["Value"])


def test_characters_that_tags_may_hold_are_kept() -> None:
    assert sanitised("Größe 東京 a_b.c:d/e=f+g-h@i;j{k}", 99) == "Größe 東京 a_b.c:d/e=f+g-h@i_j_k_"


@pytest.mark.parametrize(
    ("arn", "host"),
    [
        ("arn:aws:sagemaker:eu-central-1:1:training-job/j", "https://eu-central-1.console.aws.amazon.com/"),
        ("arn:aws-cn:sagemaker:cn-north-1:1:training-job/j", "https://cn-north-1.console.amazonaws.cn/"),
    ],
)
def test_links_lead_to_the_console_of_the_partition(arn: str, host: str) -> None:
    training, processing = (Job(kind, "j", arn, "InProgress", {}).links() for kind in (TRAINING, PROCESSING))
    assert training["console"].startswith(host)
    assert training["console"].endswith("#/jobs/j")
    assert processing["console"].endswith("#/processing-jobs/j")
    assert "$252Faws$252Fsagemaker$252FProcessingJobs$3FlogStreamNameFilter$3Dj$252F" in processing["logs"]


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}/[a-z]{1,8}\.py", fullmatch=True), st.binary(max_size=50)))
def test_an_archive_depends_on_its_files_alone(files: dict[str, bytes]) -> None:
    packed = archive(files)
    assert packed == archive(dict(reversed(files.items())))
    with tarfile.open(fileobj=io.BytesIO(packed)) as opened:
        assert opened.getnames() == sorted(files)
        for name, content in files.items():
            member = opened.extractfile(name)
            assert member is not None
            assert member.read() == content


def test_the_code_package_holds_packages_modules_pins_and_start_script() -> None:
    package = code_package(["step_scripts", "housing_assets"], ["tests.probe_step"])
    assert package == code_package(["step_scripts", "housing_assets"], ["tests.probe_step"])
    assert package != code_package(["step_scripts"])
    with tarfile.open(fileobj=io.BytesIO(package["source.tar.gz"])) as opened:
        names = set(opened.getnames())
    assert {"step_scripts/cluster/__main__.py", "housing_assets/schema.py", "tests/probe_step.py"} <= names
    assert not [name for name in names if "__pycache__" in name]
    pins = package["requirements.txt"].decode().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==[0-9][\w.+]*", pin) for pin in pins)
    assert package["bootstrap.sh"].startswith(b"#!/bin/bash")
    with pytest.raises(FileNotFoundError, match="no_such_step"):
        code_package([], ["step_scripts.no_such_step"])
