"""How fast does the endpoint answer, and how fast MLflow's scoring server with the same model?

`python -m benchmarks.endpoint [--seconds 5] [--connections 8]`. Small requests have one row; large ones 10,000 rows.
Both servers get the same bodies (CSV with a header) and are one process each; client and server share the cores.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.measuring import Side, compare, parser

_LARGE_ROWS = 10_000
_LARGE_REQUESTS = 5
_SECONDS_TO_START = 180.0


def platform(folder: str, connections: int, seconds: float) -> dict[str, Any]:
    """The platform's server."""
    command = ["-m", "step_scripts.serve_model", "--model-dir", f"{folder}/model", "--port"]
    with running(lambda port: [*command, str(port)]) as port:
        return _measured(folder, port, connections, seconds)


def mlflow(folder: str, connections: int, seconds: float) -> dict[str, Any]:
    """MLflow's scoring server."""
    command = ["-m", "mlflow", "models", "serve", "-m", f"{folder}/mlflow", "--env-manager", "local", "--port"]
    with running(lambda port: [*command, str(port)]) as port:
        return _measured(folder, port, connections, seconds)


@contextmanager
def running(command: Any) -> Iterator[int]:
    """A server started with `command(port)`; its port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # MLflow's server looks for uvicorn on the path.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, *command(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server does not answer: {command(port)}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _measured(folder: str, port: int, connections: int, seconds: float) -> dict[str, Any]:
    small, large = (Path(folder, name).read_bytes() for name in ("small.csv", "large.csv"))
    asyncio.run(_load(port, small, connections, 1.0))
    started = time.perf_counter()
    latencies = sorted(asyncio.run(_load(port, small, connections, seconds)))
    elapsed = time.perf_counter() - started
    answer, times = _post(port, large), []
    for _ in range(_LARGE_REQUESTS):
        before = time.perf_counter()
        answer = _post(port, large)
        times.append(time.perf_counter() - before)
    figures = {
        "requests_per_second": len(latencies) / elapsed,
        "p50_seconds": latencies[len(latencies) // 2],
        "p99_seconds": latencies[int(len(latencies) * 0.99)],
        "large_request_seconds": sorted(times)[len(times) // 2],
    }
    predictions = _numbers(answer)
    return {"figures": figures, "result": {"predictions": len(predictions), "sum": round(sum(predictions))}}


async def _load(port: int, body: bytes, connections: int, seconds: float) -> list[float]:
    """Latencies of requests that follow one another on each connection, for so many seconds."""
    request = _request(body)
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (before := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise RuntimeError(head.decode())
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            latencies.append(time.perf_counter() - before)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return latencies


def _request(body: bytes) -> bytes:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _post(port: int, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/invocations", body, {"Content-Type": "text/csv"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer[:500].decode())
        return answer
    finally:
        connection.close()


def _numbers(answer: bytes) -> list[float]:
    import json

    text = answer.decode()
    return json.loads(text)["predictions"] if text.startswith("{") else [float(line) for line in text.split()]


def write_models(folder: Path, with_mlflow: bool) -> None:
    """The same booster as an artifact of the platform and of MLflow, and the bodies of both requests."""
    import xgboost as xgb

    from housing_assets.sample_data import generate_sales
    from housing_assets.schema import HOUSING_TABLE
    from step_scripts.model import save_model

    sales = generate_sales(np.random.default_rng(1), 50_000)
    features = list(HOUSING_TABLE.features)
    data = xgb.DMatrix(sales.select(pl.col(features).cast(pl.Float64)).to_numpy(), sales["PRICE"].to_numpy())
    data.feature_names = features
    booster = xgb.train({"max_depth": 6, "eta": 0.1}, data, 300)
    unscaled = {"mean": dict.fromkeys(features, 0.0), "scale": dict.fromkeys(features, 1.0), "rows": sales.height}
    save_model(
        str(folder / "model"),
        booster=booster,
        scaler=unscaled,
        table=HOUSING_TABLE,
        statistics={},
        parameters={},
        metrics={},
        versions={},
    )
    rows = generate_sales(np.random.default_rng(2), _LARGE_ROWS).select(features)
    rows.head(1).write_csv(folder / "small.csv")
    rows.write_csv(folder / "large.csv")
    if with_mlflow:
        from mlflow.xgboost import save_model as save_for_mlflow

        save_for_mlflow(booster, str(folder / "mlflow"), pip_requirements=["xgboost"])


def main(arguments: list[str] | None = None) -> None:
    """Compare both servers in turn."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=5.0, help="length of the load of each pair (default 5)")
    options.add_argument("--connections", type=int, default=8, help="requests at a time (default 8)")
    chosen = options.parse_args(arguments)
    if not all(importlib.util.find_spec(name) for name in ("mlflow", "flask")):  # `mlflow-skinny` lacks the server
        print("endpoint: MLflow's scoring server is not installed (pip install mlflow); nothing is compared")
        return
    with tempfile.TemporaryDirectory(prefix="housing-bench-") as name:
        write_models(Path(name), with_mlflow=True)
        work = {"folder": name, "connections": chosen.connections, "seconds": chosen.seconds}
        compare(
            "endpoint",
            Side("serve_model", platform, work),
            Side("mlflow models serve", mlflow, work),
            pairs=chosen.pairs,
            warm_ups=chosen.warm_ups,
            agree={"predictions": 0, "sum": 1e-5},
            connections=chosen.connections,
            seconds=chosen.seconds,
        )


if __name__ == "__main__":
    main()
