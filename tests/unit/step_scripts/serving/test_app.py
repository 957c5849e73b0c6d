"""The application of the inference server, called in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from step_scripts.serving.app import InferenceApp
from step_scripts.serving.served_model import ServedModel, load_served_model
from tests.serving_models import house_rows, small_model


@dataclass(frozen=True)
class Recording(ServedModel):
    """Remembers how many rows each call was for; fails if one of them has a house of the year 1700."""

    calls: list[int] = field(default_factory=list)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """As it is."""
        self.calls.append(len(features))
        if (features[:, 0] == 1700).any():
            raise RuntimeError("no such house")
        return super().predict(features)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    artifact = small_model(tmp_path_factory.mktemp("model"))
    loaded = load_served_model(artifact, endpoint_name="housing", version="housing/1", deployment_id="d")
    return Recording(**{f.name: getattr(loaded, f.name) for f in fields(loaded)})


def answers(model: ServedModel, bodies: list[str], after: ServedModel | None = None) -> list[httpx.Response]:
    """The answers to requests that are made at once; `after` replaces the model when half of them have been made."""

    async def ask() -> list[httpx.Response]:
        app = InferenceApp()
        app.model = model
        transport: Any = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            async def one(number: int, body: str) -> httpx.Response:
                if number == len(bodies) // 2 and after is not None:
                    app.model = after
                return await client.post("/invocations", content=body, headers={"content-type": "text/csv"})

            return list(await asyncio.gather(*(one(number, body) for number, body in enumerate(bodies))))

    return asyncio.run(ask())


def bodies(count: int) -> list[str]:
    """Bodies of one to three rows."""
    rows = house_rows(3 * count, seed=5).write_csv(include_header=False).splitlines(keepends=True)
    return ["".join(rows[3 * n : 3 * n + 1 + n % 3]) for n in range(count)]


def test_requests_at_once_are_predicted_together_and_get_their_own_answers(model: Recording) -> None:
    asked = bodies(12)
    asked[4] = "a,b\n"
    alone = [model.answer(body.encode(), "text/csv", "").output_body if "a" not in body else b"" for body in asked]
    model.calls.clear()
    got = answers(model, asked)
    assert [response.status_code for response in got] == [400 if n == 4 else 200 for n in range(12)]
    assert [response.content for n, response in enumerate(got) if n != 4] == [a for n, a in enumerate(alone) if n != 4]
    assert sum(model.calls) == sum(body.count("\n") for n, body in enumerate(asked) if n != 4)
    assert len(model.calls) < 11


def test_each_request_is_answered_by_the_model_that_it_met(model: Recording, tmp_path: Path) -> None:
    other = load_served_model(
        small_model(tmp_path, factor=9.0), endpoint_name="housing", version="housing/2", deployment_id="e"
    )
    asked = bodies(8)
    got = answers(model, asked, after=other)
    expected = [(model if n < 4 else other).answer(b.encode(), "text/csv", "").output_body for n, b in enumerate(asked)]
    assert [response.content for response in got] == expected
    versions = [response.headers["x-amzn-invoked-production-variant"] for response in got]
    assert versions == ["housing/1"] * 4 + ["housing/2"] * 4


def test_a_prediction_that_fails_is_an_error_of_the_requests_in_its_call(model: Recording) -> None:
    got = answers(model, ["1700,2000.5,3,2.5,0.5,2,1,0", *bodies(2)])
    assert {response.status_code for response in got} <= {200, 500}
    assert got[0].status_code == 500
    assert "internal error" in got[0].text
    assert answers(model, bodies(1))[0].status_code == 200
