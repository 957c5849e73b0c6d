"""The program that runs on every host of a SageMaker job: forms a Ray cluster of them and runs one step on it.

`python -m step_scripts.cluster`, with `HOUSING_JOB_URI` (an `s3://` prefix or a folder that all hosts see) and
`HOUSING_ATTEMPT` (name of the folder of the attempt's files). The job's folder holds

- `request.json`: the `StepRequest`;
- `pipes.json`: bootstrap of the Dagster Pipes session (without it, messages are printed);
- `ray_token`: a secret that the hosts share (a single host needs none).

The head (the first host in natural order; with instance groups, of the group `HOUSING_CLUSTER_HEAD_GROUP`, or of the
first group) starts Ray, waits until all hosts have joined, runs the step in a process of its own
(`step_scripts.runner.worker`), and publishes how it ended. The others join, and leave when they have read the outcome.

Every wait has a limit: see `step_scripts.cluster.job.ClusterLimits` for names and defaults. Other variables:
`HOUSING_NODE_CPUS` and `HOUSING_OBJECT_STORE_BYTES` (per host; the default is Ray's), `HOUSING_RAY_PORT` (6379),
`SAGEMAKER_BASE_DIR` (another root than `/opt/ml`).

Exit status: 0 on the head if the step succeeded, on the others if the head said so; 143 after SIGTERM; otherwise 1. A
host that fails writes the reason into SageMaker's failure file; hosts that were told of a failure repeat it, because
it is not defined whose file the platform shows. A lost host is survived if Ray can; the step's log has a warning, and
if the step fails afterwards, the reason starts with the host. After SIGTERM the step has `checkpoint_seconds` to save
its work.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from step_scripts.cluster import job
from step_scripts.runner.contract import StepError
from step_scripts.runner.processes import Children, StopSignal
from step_scripts.runner.ray_environment import SessionFolder, make_folder, require_token, worker_environment

_LONGEST_FOLDER = 24  # Ray puts sockets below its folder; a socket's path is limited to 107 bytes
_log = logging.getLogger("step_scripts.cluster")  # not `__main__`


def main() -> int:
    """Do this host's part of the job. Returns the exit status."""
    stop = StopSignal()
    started = time.monotonic()
    root = job.ml_root()
    hosts: job.JobHosts | None = None
    folder: SessionFolder | None = None
    children = Children(stop)
    limits = job.ClusterLimits()
    try:
        hosts = job.read_hosts(root, os.environ.get("HOUSING_CLUSTER_HEAD_GROUP"))
        _start_log(hosts, started)
        files = job.JobFiles(os.environ["HOUSING_JOB_URI"])
        limits = job.ClusterLimits.from_environment(os.environ)
        folder = make_folder("ray-", None if len(tempfile.gettempdir()) <= _LONGEST_FOLDER else "/tmp")
        _prepare_environment(hosts, files, folder.path)
        # Imported only now: Ray reads its environment when it is imported.
        from step_scripts.cluster.head import Head
        from step_scripts.cluster.node import Worker

        failure = (Head if hosts.is_head else Worker)(hosts, files, limits, stop, children, folder.path).run()
        if failure is not None:
            job.write_failure(hosts.failure_file, failure)
        status = job.SUCCEEDED if failure is None else job.FAILED
    except Exception as error:  # noqa: BLE001  # the process's boundary: becomes the job's failure
        if stop.stop_requested:
            _log.warning("stopped: %r", error)
            status = job.STOPPED
        else:
            status = _fail(hosts, root, error)
    finally:
        _log.info("ending Ray")
        children.end_all(limits.stop_seconds)
        if folder is not None:
            folder.remove()
    _log.info("ends with status %d", status)
    return status


def _start_log(hosts: job.JobHosts, started: float) -> None:
    """Log to standard output, each line with the host's name and the seconds since its start."""

    def stamp(record: logging.LogRecord) -> bool:
        record.host, record.seconds = hosts.current, time.monotonic() - started
        return True

    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(stamp)
    handler.setFormatter(logging.Formatter("[%(host)s %(seconds).1f s] %(message)s"))
    logger = logging.getLogger("step_scripts")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    role = "head" if hosts.is_head else f"joins {hosts.head}"
    _log.info("%s job, %d hosts, %s", hosts.kind, len(hosts.names), role)


def _prepare_environment(hosts: job.JobHosts, files: job.JobFiles, folder: Path) -> None:
    """Token as a file; settings of Ray that its processes inherit."""
    token = files.token()
    if token is None and len(hosts.names) > 1:
        raise StepError(f"there is no {files.uri}/ray_token: {len(hosts.names)} hosts need a secret that they share")
    require_token(folder, token)
    project = str(Path(__file__).resolve().parents[2])
    paths = [project, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        # SIGTERM ends Ray's processes at once: when it comes, the step has ended or saved its work.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "TMPDIR": str(folder),  # temporary files of the step are removed with it
        **worker_environment(),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }


def _fail(hosts: job.JobHosts | None, root: Path, error: Exception) -> int:
    failure = job.failure_of(error)
    name = hosts.current if hosts else "this host"
    _log.error("failed: %s", failure["message"], exc_info=error if "traceback" in failure else None)
    if failure["kind"] == "crash":
        failure["message"] = f"{name}: {failure['message']}"
    places = [hosts.failure_file] if hosts else [root / "output" / "failure", root / "output" / "message"]
    for place in places:
        job.write_failure(place, failure)
    return job.FAILED


if __name__ == "__main__":
    sys.exit(main())
