"""How much faster is the final fit on two hosts of one core each than on one host of one core?

`python -m benchmarks.two_hosts [--rows 4000000] [--rounds 100]`. A host is a Ray node with one CPU whose processes are
bound to a core of their own; both are on this machine, so that the network between them costs nothing. 60 % of the rows
are fitted, 20 % evaluated after every round. `boosting_seconds`: the rounds alone; `seconds`: all of the fit, with the
start of its workers, reading and binning. Needs two cores, and Linux.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.final_fit import PARAMETERS
from benchmarks.measuring import Side, compare, parser
from benchmarks.steps import read_inputs, write_splits


def on_hosts(folder: str, rounds: int, hosts: int) -> dict[str, Any]:
    """The platform's engine `ray_train` on so many hosts of one core each."""
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.training.boosting import read_splits
    from step_scripts.training.engines import FitRequest, fit

    _, train, validation = read_splits(read_inputs(folder), HOUSING_TABLE)
    with _hosts(hosts):
        for number in (1, rounds):  # the first for the caches
            start = time.perf_counter()
            fitted = fit(
                "ray_train",
                FitRequest(
                    train=train,
                    validation=validation,
                    parameters=PARAMETERS,
                    num_boost_round=number,
                    early_stopping_rounds=number,
                    num_workers=hosts,
                ),
            )
            seconds = time.perf_counter() - start
    return {
        "figures": {"boosting_seconds": fitted.history.seconds, "seconds": seconds},
        "result": {"rmse": fitted.validation_rmse, "workers": fitted.num_workers},
    }


@contextmanager
def _hosts(count: int) -> Iterator[None]:
    """A Ray cluster of so many nodes with one CPU, each bound to a core; the driver has the first host's.

    The nodes run what those of a job do (`step_scripts.cluster.node`).
    """
    import ray
    from ray.cluster_utils import Cluster

    from step_scripts.runner.ray_environment import environment_set, worker_environment

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise SystemExit(f"{count} hosts of one core need {count} cores; this process may use {len(cores)}")
    cluster = Cluster()
    try:
        for core in cores[:count]:
            os.sched_setaffinity(0, {core})  # what starts now inherits it
            with environment_set(worker_environment()):
                cluster.add_node(num_cpus=1, include_dashboard=False, include_log_monitor=False, no_monitor=True)
        os.sched_setaffinity(0, {cores[0]})
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=4_000_000)
    options.add_argument("--rounds", type=int, default=100, help="boosting rounds (default 100)")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        write_splits(Path(folder), chosen.rows)
        work = {"folder": folder, "rounds": chosen.rounds}
        compare(
            "two_hosts",
            Side("two hosts of one core", on_hosts, {**work, "hosts": 2}),
            Side("one host of one core", on_hosts, {**work, "hosts": 1}),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            agree={"rmse": 0.01},
            rows=chosen.rows,
            rounds=chosen.rounds,
        )


if __name__ == "__main__":
    main()
