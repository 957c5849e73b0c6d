"""The whole graph on the emulated SageMaker: `make rehearse`, or `python -m tests.rehearse --hosts 3`.

`--image own`: jobs and endpoints run an image of the project's own, made from the shipped Dockerfile. `--image aws`:
no image is configured; they run what stands for AWS's XGBoost image, which holds neither the project nor most packages.

Starts the emulator, deploys the roles and the bucket of the CloudFormation template, materializes every asset as
SageMaker jobs over several emulated hosts with no more permissions than these roles have, shows which nodes did the
work, asks the endpoint for a prediction, ends the emulator, and looks whether anything is left behind.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from tests.aws_account import TEMPLATE, Account, administrator, deploy
from tests.aws_image import PATTERN, aws_image
from tests.sagemaker.pipes_jobs import SMALL_HOSTS
from tests.sagemaker_emulator import Image, SageMakerEmulator
from tests.sagemaker_emulator.leftovers import LINK_PREFIX, OWNER_VARIABLE, PREFIX
from tests.sagemaker_emulator.testing import ROLE

ROOT = Path(__file__).parents[1]
PLATFORM_IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/housing:1"
# The shipped Dockerfile's entry point, with this environment's interpreter.
PLATFORM_IMAGES = {
    "*/housing:*": Image(entrypoint=("/bin/bash", str(ROOT / "step_scripts" / "bootstrap.sh")), startup_timeout=120)
}
SHOWN = (
    " - Started ",
    " - Attached to ",
    "completed",
    "STEP_FAILURE",
    "ASSET_CHECK_EVALUATION",
    "best of",
    "Endpoint ",
)


def platform_environment(
    folder: Path,
    emulator: SageMakerEmulator,
    bucket: str,
    hosts: int,
    account: Account | None = None,
    wheels_uri: str | None = None,
) -> dict[str, str]:
    """Variables with which the platform runs on the emulator, with small jobs on `hosts` hosts each.

    With `account`, what the CloudFormation template has made, it has the permissions of the documented policies. The
    image is the project's own, or none is configured and jobs install from `wheels_uri`.
    """
    sections = {
        "compute": {
            "poll_seconds": 0.3,
            "job": {"environment": SMALL_HOSTS, "max_run_seconds": 1800},
            "wheels_uri": wheels_uri,
        },
        "feature_store": {"poll_seconds": 0.2},
        "endpoint_host": {"poll_seconds": 0.2},
    }
    file = folder / "sagemaker.yaml"
    file.write_text(yaml.safe_dump(sections))
    return emulator.environment(account.dagster_role if account else None) | {
        "HOUSING_DEPLOYMENT": "sagemaker",
        "HOUSING_ROOT": f"s3://{bucket}/housing",
        "HOUSING_ROLE_ARN": account.jobs_role if account else ROLE,
        "HOUSING_IMAGE": "" if wheels_uri else PLATFORM_IMAGE,
        "HOUSING_INSTANCE_COUNT": str(hosts),
        "HOUSING_PRICE_PER_HOUR": "0.23",
        "HOUSING_SAGEMAKER_CONFIG": str(file),
    }


def traces(owner: int) -> list[str]:
    """Processes, network links, mounts and folders of the emulator that runs or ran in process `owner`."""
    found = [f"network link {p.name}" for p in Path("/sys/class/net").glob(f"{LINK_PREFIX}{owner:x}[nv]*")]
    marker = f"{OWNER_VARIABLE}={PREFIX}{owner}-".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != owner and marker in (entry / "environ").read_bytes():
                found.append(
                    f"process {entry.name}: {(entry / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}"
                )
        except OSError:
            continue
    mounts = Path("/proc/mounts")
    if mounts.exists():
        found += [f"mount {line}" for line in mounts.read_text().splitlines() if f"{PREFIX}{owner}-" in line]
    found += [f"folder {p}" for p in Path(tempfile.gettempdir()).glob(f"{PREFIX}{owner}-*")]
    if Path("/opt/ml").exists():
        found += [f"file {p}" for p in Path("/opt/ml").rglob("*")]
    return found


@contextmanager
def dagster_home(folder: Path) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance in `folder`."""
    folder.mkdir(parents=True)
    (folder / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        yield instance


def materialize(environment: dict[str, str], log: Path) -> int:
    """Materialize everything; what matters is printed, all of it goes to `log`. Returns the exit status."""
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", "*"]
    command += ["-m", "housing_assets.definitions"]
    start = time.monotonic()
    with log.open("w") as file, subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if any(words in line for words in SHOWN):
                print(f"{time.monotonic() - start:6.1f} s  {line.rstrip().rpartition(' - ')[2]}", flush=True)
    return process.returncode


def job_table(instance: dg.DagsterInstance) -> list[str]:
    """A line an asset: its job, and the Ray nodes that did the work."""
    lines = []
    for name in ("raw_csv", "feature_group", "train_split", "tuned_model", "evaluation_report"):
        record = instance.fetch_materializations(dg.AssetKey(name), limit=1).records[0]
        assert record.asset_materialization is not None
        facts: dict[str, Any] = {key: value.value for key, value in record.asset_materialization.metadata.items()}
        nodes = ", ".join(facts.get("ray_nodes") or [])
        cost = facts.get("estimated_cost")
        lines.append(
            f"  {name:18} {facts.get('sagemaker_job', '-'):58} {facts.get('instance_count', 0)} hosts: {nodes}"
            + (f"   {facts.get('billable_seconds', 0)} s, {cost:.4f}" if cost is not None else "")
        )
    return lines


def ask_endpoint(emulator: SageMakerEmulator, row: str) -> str:
    """A prediction, through boto3 as applications do it."""
    client = administrator(emulator, "sagemaker-runtime")
    answer = client.invoke_endpoint(
        EndpointName="housing", Body=row.encode(), ContentType="text/csv", Accept="text/csv"
    )
    return answer["Body"].read().decode().strip()


def main() -> int:
    """Rehearse. Returns 0 if everything succeeded and nothing is left."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearse", description=__doc__)
    parser.add_argument("--hosts", type=int, default=2, help="hosts a job")
    parser.add_argument("--rows", type=int, default=2000, help="rows of generated data")
    parser.add_argument("--image", choices=("own", "aws"), default="own", help="image of jobs and endpoint")
    parser.add_argument("--image-python", default=sys.executable, help="Python of AWS's image, which has 3.12")
    parser.add_argument("--source", type=Path, help="CSV file to use instead of generated data")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="housing-rehearsal-") as temporary:
        folder = Path(temporary)
        status = _rehearse(folder, options)
    left = traces(os.getpid())
    print("left behind: " + ("; ".join(left) if left else "nothing"))
    return status or int(bool(left))


def _rehearse(folder: Path, options: argparse.Namespace) -> int:
    images, wheels, source = PLATFORM_IMAGES, None, options.source
    if options.image == "aws":
        image, wheels = aws_image(options.image_python)
        images = {PATTERN: image}
    with SageMakerEmulator(
        images=images, stop_grace=10, serve_stop_grace=5, sync_interval=0.5, endpoint_wait_scale=0.01
    ) as emulator, dagster_home(folder / "dagster") as instance:  # fmt: skip
        print(f"emulator at {emulator.endpoint_url}, hosts as {emulator.host_kind}", flush=True)
        account, s3 = deploy(emulator, "rehearsal"), administrator(emulator, "s3")
        print(f"stack of {TEMPLATE.relative_to(ROOT)} deployed; the run has the permissions of its roles", flush=True)
        wheels_uri = "s3://rehearsal/housing/wheels/" if wheels else None
        for wheel in wheels.iterdir() if wheels else ():
            s3.upload_file(str(wheel), "rehearsal", f"housing/wheels/{wheel.name}")
        environment = platform_environment(folder, emulator, "rehearsal", options.hosts, account, wheels_uri)
        environment |= {"DAGSTER_HOME": str(folder / "dagster"), "HOUSING_SAMPLE_ROWS": str(options.rows)}
        if source:
            s3.upload_file(str(source), "rehearsal", f"sales/{source.name}")
            environment["HOUSING_RAW_CSV"] = f"s3://rehearsal/sales/{source.name}"
        log = folder / "run.log"
        if status := materialize(environment, log):
            print(*log.read_text().splitlines()[-60:], sep="\n")
            return status
        print(
            "\njobs, and the nodes that did the work (seconds billed, estimated cost):", *job_table(instance), sep="\n"
        )
        evaluation = instance.get_latest_materialization_event(dg.AssetKey("evaluation_report"))
        assert evaluation is not None
        assert evaluation.asset_materialization is not None
        print(f"\ntest RMSE {evaluation.asset_materialization.metadata['rmse'].value:,.1f}")
        print(f"endpoint housing answers {ask_endpoint(emulator, '1995,2500,3,2.0,0.5,2,1,0')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
