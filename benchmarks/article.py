"""How long does the whole graph take, compared with the design of the AWS article, run on this machine?

`python -m benchmarks.article [--rows 10000] [--trials 4]`. The article ("Orchestrate Ray-based machine learning
workflows using Amazon SageMaker") has one process a step, each with a Ray of its own: actors put record after record
into the feature store by HTTP; Ray Data shuffles, splits and scales, with CSV files between the steps; every trial of
the search is a training process with xgboost_ray; another process evaluates. Here the feature store is a small HTTP
server on this machine. The article's waits (5 s for the offline store, 10 s for Ray) are left out.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.measuring import Side, compare, parser, stopwatch
from benchmarks.steps import TARGET
from benchmarks.whole_graph import whole_run
from housing_assets.sample_data import write_sample

_ROUNDS, _EARLY_STOPPING_ROUNDS = 100, 10


class _FeatureStore(BaseHTTPRequestHandler):
    """Appends the body of every POST, one record as CSV, to `path`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    path_of_records: Path
    lock = threading.Lock()

    def do_POST(self) -> None:  # the base class's name
        """Keep one record."""
        record = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock, self.path_of_records.open("ab") as file:
            file.write(record + b"\n")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def article(source: str, trials: int) -> dict[str, Any]:
    """All steps, one process after the other."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder, stopwatch(figures):
        records = Path(folder, "records.csv")
        records.write_text(Path(source).read_text().partition("\n")[0] + "\n")
        handler = type("Handler", (_FeatureStore,), {"path_of_records": records})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _process("ingest", source, str(server.server_port))
        server.shutdown()
        _process("prepare", folder)
        drawn = random.Random(42)
        scores: list[tuple[float, str]] = []
        for number in range(trials):
            parameters = {
                "max_depth": drawn.randint(1, 8),
                "eta": drawn.uniform(0.2, 1.0),
                "min_child_weight": drawn.uniform(0, 120),
                "subsample": drawn.uniform(0.2, 1.0),
            }
            model = f"{folder}/model-{number}.json"
            scores.append((float(_process("train", folder, json.dumps(parameters), model)), model))
        rmse = float(_process("evaluate", folder, min(scores)[1]))
    return {"figures": figures, "result": {"rmse": rmse}}


def _process(step: str, *arguments: str) -> str:
    """Run a step in a process of its own; the last line that it printed."""
    command = [sys.executable, "-m", "benchmarks.article", "--step", step, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().rpartition("\n")[2]


def ingest(source: str, port: str) -> None:
    """Ray actors put one record after the other."""
    import pandas as pd
    import ray

    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    frame = pd.read_csv(source).dropna()
    numeric = frame.apply(pd.to_numeric, errors="coerce").dropna()

    @ray.remote
    class Writer:
        def put(self, rows: list[str]) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", int(port))
            for row in rows:
                connection.request("POST", "/", row)
                connection.getresponse().read()
            return len(rows)

    rows = numeric.to_csv(index=False, header=False).splitlines()
    actors = int(ray.cluster_resources()["CPU"])
    writers: list[Any] = [Writer.remote() for _ in range(actors)]
    ray.get([writer.put.remote(rows[i::actors]) for i, writer in enumerate(writers)])


def prepare(folder: str) -> None:
    """Global shuffle, split, scale, CSV out."""
    import ray
    from ray.data.preprocessors import StandardScaler

    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    rows = ray.data.read_csv(f"{folder}/records.csv").random_shuffle(seed=1).materialize()
    train, validation, test = rows.split_proportionately([0.6, 0.2])
    scaler = StandardScaler([name for name in train.columns() or [] if name != TARGET]).fit(train)  # pyright: ignore[reportCallIssue]  # its decorator hides them
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        scaler.transform(part).repartition(2).write_csv(f"{folder}/{name}")


def train(folder: str, parameters: str, model: str) -> None:
    """One trial: xgboost_ray on all cores; prints the best validation RMSE."""
    import os

    import ray
    from xgboost_ray import RayDMatrix, RayFileType

    from step_scripts.training.engine_xgboost_ray import adapted_main

    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    files = {name: sorted(map(str, Path(folder, name).iterdir())) for name in ("train", "validation")}
    matrices = {name: RayDMatrix(paths, label=TARGET, filetype=RayFileType.CSV) for name, paths in files.items()}
    history: dict[str, Any] = {}
    main_module = adapted_main()
    booster = main_module.train(
        json.loads(parameters) | {"objective": "reg:squarederror", "eval_metric": "rmse", "tree_method": "hist"},
        matrices["train"],
        _ROUNDS,
        evals=[(matrices["validation"], "validation")],
        evals_result=history,
        early_stopping_rounds=_EARLY_STOPPING_ROUNDS,
        verbose_eval=False,
        ray_params=main_module.RayParams(num_actors=os.cpu_count() or 1, cpus_per_actor=1),
    )
    booster.save_model(model)
    print(min(history["validation"]["rmse"]))


def evaluate(folder: str, model: str) -> None:
    """RMSE on the test split, as CSV."""
    import numpy as np
    import pandas as pd
    import xgboost as xgb

    frame = pd.concat([pd.read_csv(path) for path in sorted(Path(folder, "test").iterdir())])
    predicted = xgb.Booster(model_file=model).predict(xgb.DMatrix(frame.drop(columns=[TARGET])))
    rmse = float(np.sqrt(np.mean((predicted - frame[TARGET].to_numpy()) ** 2)))
    Path(folder, "evaluation.json").write_text(json.dumps({"regression_metrics": {"rmse": {"value": rmse}}}))
    print(rmse)


_STEPS: dict[str, Callable[..., None]] = {"ingest": ingest, "prepare": prepare, "train": train, "evaluate": evaluate}


def main(arguments: list[str] | None = None) -> None:
    """Compare both in turn."""
    options = parser(__doc__, rows=10_000)
    options.add_argument("--trials", type=int, default=4, help="trials (default 4)")
    options.add_argument("--step", nargs="+", help="one step of the article's design, and its arguments")
    chosen = options.parse_args(arguments)
    if chosen.step:
        _STEPS[chosen.step[0]](*chosen.step[1:])
        return
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as folder:
        source = str(write_sample(Path(folder, "sales.csv"), rows=chosen.rows))
        work = {"source": source, "trials": chosen.trials}
        compare(
            "whole_graph_against_article",
            Side("whole graph, preset article", whole_run, work | {"preset": "article"}),
            Side("the article's design", article, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            # Other random numbers in few trials, and one of them with rejected rows: only the magnitude can agree.
            agree={"rmse": 0.6},
            rows=chosen.rows,
            trials=chosen.trials,
        )


if __name__ == "__main__":
    main()
