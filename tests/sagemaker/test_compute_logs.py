"""The output of a team's runs on S3, by the block of `deploy/dagster.postgres.yaml` that is to be uncommented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
import yaml

if TYPE_CHECKING:
    from tests.sagemaker_emulator.testing import Aws

FILE = Path(__file__).parents[2] / "deploy" / "dagster.postgres.yaml"


def uncommented() -> dict[str, Any]:
    """The part of the file about the output of runs."""
    text = FILE.read_text()
    block = text[text.index("#compute_logs:") :].split("\nconcurrency:")[0]
    return yaml.safe_load("\n".join(line.removeprefix("#") for line in block.splitlines()))


def test_output_of_runs_is_kept_on_s3(
    aws: Aws, aws_environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_LOG_BUCKET", aws.bucket)

    @dg.op
    def speak() -> None:
        print("words of the op")

    @dg.job
    def speaking() -> None:
        speak()

    with dg.instance_for_test(temp_dir=str(tmp_path), overrides=uncommented()) as instance:
        assert speaking.execute_in_process(instance=instance).success
    [key] = [key for key in aws.keys("dagster-logs/storage/") if key.endswith(".out")]
    assert b"words of the op" in aws.get(key)
