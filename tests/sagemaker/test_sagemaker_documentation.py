"""The commands of `docs/sagemaker.md`, run as they stand there, on the emulated SageMaker and with its two roles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from housing_assets.sample_data import write_sample
from tests.aws_account import deploy, remove_roles
from tests.documented import ROOT, Reader, commands, copy_of_the_project
from tests.pipeline.test_documented_commands import NOT_RUN
from tests.ports import free_port
from tests.sagemaker_emulator.testing import Aws

if TYPE_CHECKING:
    from tests.sagemaker_emulator import SageMakerEmulator

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "sagemaker.md"
BUCKET = "my-bucket"


@pytest.fixture
def reader(emulator: SageMakerEmulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("documentation")
    aws = Aws(emulator.endpoint_url, emulator)
    account = deploy(emulator, BUCKET, "eu-central-1")
    aws.s3.upload_file(str(write_sample(folder / "sales.csv", rows=400)), BUCKET, "sales/2026.csv")
    sections = folder / "sagemaker.yaml"
    sections.write_text("compute: {poll_seconds: 0.3, job: {environment: {HOUSING_NODE_CPUS: '1'}}}\n")
    yield Reader(
        copy_of_the_project(folder / "housing-assets"),
        {
            **emulator.environment(account.dagster_role),
            "HOUSING_SAGEMAKER_CONFIG": str(sections),
            "PYTHONWARNINGS": "ignore",
        },
        own_values={"--port 5112": f"--port {free_port()}"},
        servers={"tests.sagemaker_emulator": re.compile("Ctrl-C ends it")},
    )
    for key in aws.s3.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        aws.s3.delete_object(Bucket=BUCKET, Key=key["Key"])
    aws.s3.delete_bucket(Bucket=BUCKET)
    remove_roles(emulator, account)


def test_the_commands_of_the_page_work(reader: Reader, aws: Aws) -> None:
    reader.open(PAGE)
    for command in commands(PAGE):
        if command not in NOT_RUN:
            reader.type(command)
    stored = [o["Key"] for o in aws.s3.list_objects_v2(Bucket=BUCKET, Prefix="housing/references")["Contents"]]
    assert [key.rpartition("/")[0] for key in stored] == ["housing/references/raw_csv"]
    [ingested] = [output for command, output in reader.outputs.items() if "--select" in command]
    assert re.search(r"processing job housing-raw-csv-\S+ completed", ingested)
    [printed] = [output for command, output in reader.outputs.items() if "sagemaker_emulator" in command]
    assert "export AWS_ENDPOINT_URL=http" in printed
