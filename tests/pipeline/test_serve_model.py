"""The inference server as a real process, over real HTTP."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import polars as pl
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from housing_assets.schema import HOUSING_TABLE
from step_scripts.model import load_model
from step_scripts.serving.deployment import CSV, JSON, JSON_LINES, MAX_BODY_BYTES
from step_scripts.serving.feature_parser import FeatureParser
from step_scripts.serving.request_rows import RequestError
from step_scripts.serving.served_model import encode, response_media
from step_scripts.table.spec import ColumnSpec, TableSpec
from tests.ports import free_port
from tests.serving_models import house_rows, request, small_model
from tests.waiting import until

ROOT = Path(__file__).parents[2]
ROW = "1990,2000.5,3,2.5,0.5,2,1,0"
FEATURES = HOUSING_TABLE.features
ROW_OBJECT = dict(zip(FEATURES, json.loads(f"[{ROW}]"), strict=True))


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "step_scripts.serve_model", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_ping(port: int, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        with contextlib.suppress(OSError):
            return request(port, "/ping", method="GET")[0] == 200
        return False

    until(answers)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("model")).uri


@pytest.fixture(scope="module")
def port(model: str) -> Iterator[int]:
    number = free_port()
    process = start("--model-dir", model, "--endpoint-name", "housing", "--port", str(number))
    wait_for_ping(number, process)
    yield number
    process.terminate()
    log = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 0, log
    assert "Traceback" not in log


def answer(port: int, body: str | bytes, content_type: str = CSV, accept: str = "*/*") -> Any:
    data = body.encode() if isinstance(body, str) else body
    status, _, content = request(port, "/invocations", data, Content_Type=content_type, Accept=accept)
    assert status == 200, content
    return content


def refused(port: int, body: str | bytes, content_type: str = CSV, **headers: str) -> tuple[int, dict[str, Any]]:
    data = body.encode() if isinstance(body, str) else body
    status, got, content = request(port, "/invocations", data, Content_Type=content_type, **headers)
    assert got["content-type"] == JSON
    assert got["x-amzn-errortype"]
    return status, json.loads(content)


def test_ping(port: int) -> None:
    status, headers, body = request(port, "/ping", method="GET")
    assert status == 200
    said = json.loads(body)
    assert (said["status"], said["endpoint_name"]) == ("InService", "housing")
    assert headers["x-model-digest"] == said["model_digest"]


@pytest.mark.parametrize("rows", [1, 7, 300, 5000])
def test_all_formats_predict_as_the_artifact_does(port: int, model: str, rows: int) -> None:
    frame = house_rows(rows, seed=rows)
    expected = load_model(model).predict(frame).tolist()
    shuffled = frame.select(reversed(FEATURES)).with_columns(PRICE=pl.lit(1.5))
    objects = frame.to_dicts()
    bodies = {
        "CSV": (frame.write_csv(include_header=False), CSV),
        "CSV with header": (frame.write_csv(), f"{CSV}; charset=utf-8"),
        "CSV, other order and case": (shuffled.rename(str.lower).write_csv(), CSV),
        "CSV with CRLF": (frame.write_csv(line_terminator="\r\n"), CSV),
        "CSV with BOM": ("\ufeff" + frame.write_csv(), CSV),
        "quoted CSV": (frame.write_csv(quote_style="always"), CSV),
        "instances of objects": (json.dumps({"instances": objects}), JSON),
        "instances of lists": (json.dumps({"instances": [list(r) for r in frame.rows()]}), JSON),
        "list of objects": (json.dumps(objects), "application/json;charset=UTF-8"),
        "list of lists": (json.dumps([list(r) for r in frame.rows()]), JSON),
        "JSON lines of objects": (frame.write_ndjson(), JSON_LINES),
        "JSON lines of lists": ("\n\n".join(json.dumps(list(r)) for r in frame.rows()), "application/x-ndjson"),
    }
    for name, (body, content_type) in bodies.items():
        text = answer(port, body, content_type, accept=CSV).decode()
        assert [float(line) for line in text.splitlines()] == expected, name


@pytest.mark.parametrize("body", [json.dumps(ROW_OBJECT), f"[{ROW}]"])
def test_one_json_row_by_itself(port: int, body: str) -> None:
    assert json.loads(answer(port, body, JSON)) == {"predictions": [float(answer(port, ROW))]}


@pytest.mark.parametrize(
    ("content_type", "accept", "expected"),
    [
        (CSV, "", CSV),
        (CSV, "*/*", CSV),
        (JSON, "*/*", JSON),
        (JSON_LINES, "application/*", JSON_LINES),
        (CSV, JSON, JSON),
        (JSON, CSV, CSV),
        (CSV, "text/html, application/jsonlines;q=0.5, text/csv;q=0.1", JSON_LINES),
    ],
)
def test_the_client_chooses_the_format_of_the_answer(port: int, content_type: str, accept: str, expected: str) -> None:
    body = ROW if content_type == CSV else f"[{ROW}]"
    given_headers = {"Content_Type": content_type, **({"Accept": accept} if accept else {})}
    status, headers, content = request(port, "/invocations", body.encode(), **given_headers)
    assert (status, headers["content-type"]) == (200, expected)
    value = {CSV: float, JSON: lambda t: json.loads(t)["predictions"][0]}.get(
        expected, lambda t: json.loads(t)["prediction"]
    )(content.decode())
    assert value == float(answer(port, ROW))


WITH_HEADER = ",".join(FEATURES)
BAD_ROWS = [
    ("text instead of a number", ROW.replace("1990", "old"), "1, YEAR_BUILT: not a number; allowed: 1600 <= value"),
    ("empty field", ROW.replace("2.5", ""), "row 1, NUM_BATHROOMS: missing"),
    ("fraction", ROW.replace("1990", "1990.5"), "row 1, YEAR_BUILT: not a whole number"),
    ("below", ROW.replace("1990", "1599"), "row 1, YEAR_BUILT: out of range; allowed: 1600 <= value <= 2100"),
    ("on an open bound", ROW.replace("2000.5", "0"), "row 1, SQUARE_FEET: out of range; allowed: 0 < value"),
    ("not among the values", ROW[:-1] + "2", "row 1, DECK: out of range; allowed: one of 0, 1"),
    ("infinite", ROW.replace("2000.5", "inf"), "row 1, SQUARE_FEET: not finite"),
    ("too large for a float", ROW.replace("2000.5", "1e999"), "row 1, SQUARE_FEET: not finite"),
    ("NaN", ROW.replace("2000.5", "nan"), "row 1, SQUARE_FEET: not finite"),
    ("underscores", ROW.replace("1990", "1_990"), "row 1, YEAR_BUILT: not a number"),
    ("other digits", ROW.replace("1990", "١٩٩٠"), "row 1, YEAR_BUILT: not a number"),
    ("field too few", ROW[:-2], "row 1: 7 fields, expected 8; without a header a line is YEAR_BUILT,SQUARE_FEET"),
    ("field too many", f"{ROW},1", "row 1: 9 fields, expected 8"),
    ("second line", f"{ROW}\n{ROW[:-1]}5\n", "1 of 2 rows cannot be used; first: row 2, DECK: out of range"),
    ("blank line between", f"{ROW}\n\n{ROW}", "1 of 3 rows cannot be used; first: row 2: 0 fields, expected 8"),
    ("after a header", f"{WITH_HEADER}\n{ROW[:-1]}5", "1 of 1 row cannot be used; first: row 1, DECK"),
    ("header only", f"{WITH_HEADER}\n", "the request has no rows"),
    ("unknown column", f"{WITH_HEADER},POOL\n{ROW},1", "unknown columns: POOL; the features are YEAR_BUILT"),
    ("missing column", f"{WITH_HEADER[:-5]}\n{ROW[:-2]}", "missing columns: DECK; the features are YEAR_BUILT"),
    ("column twice", f"{WITH_HEADER},deck\n{ROW},1", "column DECK is given twice"),
    ("not UTF-8", b"\xff\xfe1,2", "the body is not UTF-8: invalid start byte at byte 0"),
    ("open quote", f'{ROW[:-1]}"0', "the body is not CSV: line 1: unexpected end of data"),
    ("NUL bytes", f"{ROW}\x00", "row 1, DECK: not a number"),
    ("nothing", "", "the body is empty"),
    ("white space", " \n", "the body is empty"),
]
BAD_JSON = [
    ("broken", '{"instances": [', "the body is not JSON: Expecting value"),
    ("number", "5", "the body is neither an object nor a list"),
    ("no rows", "[]", "the request has no rows"),
    ("no instances", '{"instances": []}', "the request has no rows"),
    ("instances no list", '{"instances": 1}', "instances is not a list"),
    ("beside instances", '{"instances": [], "parameters": {}}', "unknown members beside instances: parameters"),
    ("null", f"[{ROW}]".replace("1990", "null"), "row 1, YEAR_BUILT: missing"),
    ("text", f"[{ROW}]".replace("1990", '"1990"'), "row 1, YEAR_BUILT: not a number"),
    ("boolean for a number", f"[[{ROW}]]".replace("1990", "true"), "row 1, YEAR_BUILT: not a number"),
    ("list for a number", f"[[{ROW}]]".replace("1990", "[1]"), "row 1, YEAR_BUILT: not a number"),
    ("NaN", f"[[{ROW}]]".replace("2000.5", "NaN"), "row 1, SQUARE_FEET: not finite"),
    ("huge integer", f"[[{ROW}]]".replace("1990", "1" * 400), "row 1, YEAR_BUILT: not finite"),
    ("integer of too many digits", f"[[{ROW}]]".replace("1990", "1" * 5000), "the body is not JSON"),
    ("short row", "[[1990]]", "row 1: 1 value, expected 8: YEAR_BUILT, SQUARE_FEET"),
    ("row of another kind", f"[[{ROW}], 5]", "1 of 2 rows cannot be used; first: row 2: neither a list nor an object"),
    ("key missing", '[{"DECK": 1}]', "row 1: missing columns: YEAR_BUILT"),
    ("key unknown", json.dumps([{**ROW_OBJECT, "POOL": 1}]), "row 1: unknown columns: POOL"),
    ("key twice", json.dumps([{**ROW_OBJECT, "deck": 1}]), "row 1: column DECK is given twice"),
    ("name twice", json.dumps(ROW_OBJECT)[:-1] + ', "DECK": 0}', "row 1: column DECK is given twice"),
    ("instances twice", f'{{"instances": [[{ROW}]], "instances": [[{ROW}]]}}', "instances is given twice"),
    ("deep", "[" * 100_000, "the body is nested too deeply"),
]


@pytest.mark.parametrize(("body", "reason"), [c[1:] for c in BAD_ROWS], ids=[c[0] for c in BAD_ROWS])
def test_bad_csv_is_refused_with_the_reason(port: int, body: str | bytes, reason: str) -> None:
    status, said = refused(port, body)
    assert status == 400
    assert reason in said["error"]


@pytest.mark.parametrize(("body", "reason"), [c[1:] for c in BAD_JSON], ids=[c[0] for c in BAD_JSON])
def test_bad_json_is_refused_with_the_reason(port: int, body: str, reason: str) -> None:
    status, said = refused(port, body, JSON)
    assert status == 400
    assert reason in said["error"]


def test_a_broken_json_line_is_named(port: int) -> None:
    status, said = refused(port, f"[{ROW}]\n{{broken", JSON_LINES)
    assert status == 400
    assert said["error"].startswith("line 2 is not JSON")


def test_bad_rows_come_as_a_table_of_bounded_size(port: int) -> None:
    bad = ROW.replace("1990", "old")[:-1] + "7"
    status, said = refused(port, "\n".join([ROW, *[bad] * 200]))
    assert (status, said["problems"], len(said["rows"])) == (400, 400, 100)
    assert said["rows"][:2] == [
        {
            "row": 2,
            "column": "YEAR_BUILT",
            "value": "old",
            "reason": "not a number; allowed: 1600 <= value <= 2100",
        },
        {"row": 2, "column": "DECK", "value": "7", "reason": "out of range; allowed: one of 0, 1"},
    ]
    assert said["error"].startswith("200 of 201 rows cannot be used; first: row 2, YEAR_BUILT")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "reason"),
    [
        ("GET", "/", {}, 404, "there is no /"),
        ("POST", "/models", {}, 404, "there is no /models"),
        ("POST", "/endpoints/other/invocations", {}, 404, "Endpoint other not found; this server serves housing"),
        ("POST", "/endpoints/housing", {}, 404, "there is no /endpoints/housing"),
        ("POST", "/ping", {}, 405, "POST is not allowed on /ping"),
        ("GET", "/invocations", {}, 405, "GET is not allowed on /invocations"),
        ("PUT", "/endpoints/housing/invocations", {}, 405, "PUT is not allowed"),
        ("POST", "/invocations", {}, 415, "the request has no Content-Type; send text/csv"),
        ("POST", "/invocations", {"Content_Type": "text/html"}, 415, "content type 'text/html' is not supported"),
        ("POST", "/invocations", {"Content_Type": "text/csv; charset=latin-1"}, 415, "charset latin-1"),
        ("POST", "/invocations", {"Content_Type": CSV, "Accept": "image/png"}, 406, "'image/png' cannot be sent"),
        ("POST", "/invocations", {"Content_Type": CSV, "Accept": "text/csv;q=0"}, 406, "cannot be sent"),
    ],
)
def test_requests_that_no_row_can_mend(
    port: int, method: str, path: str, headers: dict[str, str], status: int, reason: str
) -> None:
    got, got_headers, body = request(port, path, ROW.encode(), method=method, **headers)
    said = json.loads(body)
    assert got == status
    assert reason in said["error"]
    assert said["message"] == said["error"]
    assert ("allow" in got_headers) == (status == 405)


def test_body_limit(port: int) -> None:
    line = (ROW + "\n").encode()
    fits = line * (MAX_BODY_BYTES // len(line))
    assert len(answer(port, fits).splitlines()) == len(fits) // len(line)
    too_large = fits + line
    assert refused(port, too_large)[0] == 413
    with httpx.Client() as client:
        pieces = (too_large[n : n + 65536] for n in range(0, len(too_large), 65536))
        response = client.post(f"http://127.0.0.1:{port}/invocations", content=pieces, headers={"content-type": CSV})
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert "larger than 6291456 bytes" in response.json()["error"]


def test_packed_bodies_are_unpacked_within_the_limit(port: int) -> None:
    line = (ROW + "\n").encode()
    fits = line * (MAX_BODY_BYTES // len(line))
    for body in (ROW.encode(), fits):
        status, _, content = request(
            port, "/invocations", gzip.compress(body), Content_Type=CSV, Content_Encoding="gzip", Accept=CSV
        )
        assert status == 200, content
        assert content == answer(port, body)
    for body, encoding, expected, reason in (
        (gzip.compress(fits + line), "gzip", 413, "larger than 6291456 bytes"),
        (gzip.compress(b"1" * (1 << 30)), "gzip", 413, "larger than 6291456 bytes"),
        (ROW.encode(), "gzip", 400, "the body is not gzip"),
        (gzip.compress(ROW.encode())[:-4], "gzip", 400, "its end is missing"),
        (gzip.compress(ROW.encode()) * 2, "gzip", 400, "something follows its end"),
        (gzip.compress(b""), "gzip", 400, "the body is empty"),
        (ROW.encode(), "br", 415, "content encoding 'br' is not supported"),
    ):
        status, said = refused(port, body, Content_Encoding=encoding)
        assert (status, reason in said["error"]) == (expected, True), said


def test_a_client_that_asks_first_is_refused_before_it_sends(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\n"
            b"Content-Length: 7000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_broken_http_and_vanished_clients_do_no_harm(port: int) -> None:
    for start_of_request in (
        b"\x00\x01nonsense\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nContent-Length: 50\r\n\r\n1,2",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(start_of_request)
    assert answer(port, ROW)


def test_ping_is_answered_while_large_requests_are_worked_on(port: int) -> None:
    line = json.dumps(ROW_OBJECT) + "\n"
    body = line * (MAX_BODY_BYTES // len(line))
    workers = [threading.Thread(target=answer, args=(port, body, JSON_LINES)) for _ in range(4)]
    for worker in workers:
        worker.start()
    slowest = 0.0
    while any(worker.is_alive() for worker in workers):
        begun = time.monotonic()
        assert request(port, "/ping", method="GET")[0] == 200
        slowest = max(slowest, time.monotonic() - begun)
    assert slowest < 2  # SageMaker's limit, not a measure of speed


@pytest.mark.parametrize(
    ("piece", "content_type"), [("1\n", CSV), (",", CSV), ('"1",2\n', CSV), ("[],", JSON), ("{}\n", JSON_LINES)]
)
def test_ping_is_answered_while_a_hostile_request_is_refused(port: int, piece: str, content_type: str) -> None:
    body = ("[" if content_type == JSON else "") + piece * (6_000_000 // len(piece))
    with ThreadPoolExecutor(1) as pool:
        refusal = pool.submit(request, port, "/invocations", body.encode(), Content_Type=content_type)
        pinged = False
        while not pinged or not refusal.done():
            begun = time.monotonic()
            assert request(port, "/ping", method="GET")[0] == 200
            assert time.monotonic() - begun < 2  # SageMaker's limit
            pinged = True
        assert refusal.result()[0] == 400


def test_boto3_works_unchanged(port: int) -> None:
    client = boto3.client(
        "sagemaker-runtime",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="eu-west-1",
        aws_access_key_id="dummy",
        aws_secret_access_key="dummy",
        config=Config(retries={"max_attempts": 1}),
    )
    response = client.invoke_endpoint(EndpointName="housing", ContentType=CSV, Body=ROW)
    assert response["Body"].read() == answer(port, ROW)
    assert response["ContentType"] == CSV
    response = client.invoke_endpoint(
        EndpointName="housing", ContentType=JSON, Accept=JSON, Body=json.dumps({"instances": [ROW_OBJECT]})
    )
    assert json.loads(response["Body"].read()) == {"predictions": [float(answer(port, ROW))]}
    with pytest.raises(ClientError, match=r"\(ValidationError\).*Endpoint other not found"):
        client.invoke_endpoint(EndpointName="other", ContentType=CSV, Body=ROW)
    with pytest.raises(client.exceptions.ModelError, match="YEAR_BUILT: not a number") as caught:
        client.invoke_endpoint(EndpointName="housing", ContentType=CSV, Body=ROW.replace("1990", "old"))
    answered = caught.value.response  # as SageMaker answers, see test_emulator_endpoints.py
    assert answered["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert answered["OriginalStatusCode"] == 400
    assert json.loads(answered["OriginalMessage"])["rows"][0]["column"] == "YEAR_BUILT"


def test_sigterm_finishes_the_requests_in_progress(model: str) -> None:
    number = free_port()
    process = start("--model-dir", model, "--port", str(number))
    wait_for_ping(number, process)
    with socket.create_connection(("127.0.0.1", number), timeout=30) as connection:
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {CSV}\r\nContent-Length: {len(ROW)}\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        answers = connection.makefile("rb")
        assert answers.readline().startswith(b"HTTP/1.1 100 "), "the request is in progress"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        connection.sendall(ROW.encode())
        answers.readline()  # the empty line after 100
        assert answers.readline().startswith(b"HTTP/1.1 200 ")
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model-dir", "/nowhere/model", "--port", "0"], "/nowhere/model is no model artifact"),
        (["--deployment", "/nowhere/deployment.json"], "/nowhere/deployment.json cannot be read"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], reason: str) -> None:
    process = start(*arguments)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1
    assert output.startswith("error: ")
    assert reason in output


def test_a_port_in_use_is_named(model: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        number = holder.getsockname()[1]
        process = start("--model-dir", model, "--port", str(number))
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1
    assert f"port {number} of 127.0.0.1 cannot be used (Address already in use)" in output


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    small_model(tmp_path)
    (tmp_path / "model.ubj").write_bytes(b"nothing")
    process = start("--model-dir", str(tmp_path), "--port", "0")
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1
    assert f"{tmp_path} is no model artifact: XGBoostError" in output


def test_as_sagemaker_starts_it(model: str) -> None:
    number = free_port()
    process = start("serve", "--model-dir", model, "--port", str(number))
    try:
        wait_for_ping(number, process)
        listening = [
            line for line in Path("/proc/net/tcp").read_text().splitlines() if f"00000000:{number:04X}" in line
        ]
        assert listening or sys.platform != "linux"
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0


NULLABLE = TableSpec(
    name="t",
    target="y",
    key_columns=("id",),
    columns=(
        ColumnSpec(name="id", dtype="string"),
        ColumnSpec(name="a", dtype="float64", nullable=True, gt=-5, lt=5),
        ColumnSpec(name="b", dtype="int64", ge=-3, le=3),
        ColumnSpec(name="c", dtype="bool"),
        ColumnSpec(name="y", dtype="float64"),
    ),
)
FIELD = st.one_of(
    st.sampled_from(
        ["", " ", "-5", "5", "4.9999999999999999", "true", "False", "nan", "-inf", "1e400", "x", '"1"', "1_0"]
    ),
    st.integers(-5, 5).map(str),
    st.floats(-6, 6).map(repr),
    st.floats(allow_nan=False).map(repr),
)


def outcome(parser: FeatureParser, body: bytes, media: str) -> Any:
    try:
        return parser.parse(body, media)
    except RequestError as error:
        return error.status, [(row["row"], row["column"], row["reason"]) for row in error.rows]


@given(st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_a_row_is_read_the_same_alone_and_among_many(rows: list[tuple[str, str, str]]) -> None:
    """The three ways in which CSV is read (one line, few lines, many lines) agree on every value and every refusal."""
    parser = FeatureParser(NULLABLE)
    lines = [",".join(row) for row in rows]
    padding = ["0,0,0"] * (4096 // 6 + 1)
    padding_after = "\n".join(["", *padding])
    singly = [outcome(parser, line.encode(), CSV) for line in lines]
    few = outcome(parser, "\n".join(lines).encode(), CSV)
    many = outcome(parser, ("\n".join(lines) + padding_after).encode(), CSV)
    if all(isinstance(one, np.ndarray) for one in singly):
        assert np.array_equal(np.vstack(singly), few, equal_nan=True)
        assert np.array_equal(few, many[: len(rows)], equal_nan=True)
    else:
        wrong = [(n, c, r) for n, one in enumerate(singly, 1) if isinstance(one, tuple) for _, c, r in one[1]]
        assert few == many == (400, wrong)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_predictions_survive_the_way_to_the_client(values: list[float]) -> None:
    predictions = np.array(values, np.float32)
    assert [float(line) for line in encode(predictions, CSV).split()] == values
    assert json.loads(encode(predictions, JSON))["predictions"] == values
    assert [json.loads(line)["prediction"] for line in encode(predictions, JSON_LINES).splitlines()] == values


def test_nulls_booleans_and_keys() -> None:
    parser = FeatureParser(NULLABLE)
    expected = np.array([[np.nan, 1, 1], [0.5, -3, 0]])
    assert np.array_equal(parser.parse(b"ID,C,B,A\nx,true,1,\ny,0,-3,0.5", CSV), expected, equal_nan=True)
    objects = [{"a": None, "b": 1, "c": True, "id": "x"}, {"a": 0.5, "b": -3, "c": 0, "y": 7}]
    assert np.array_equal(parser.parse(json.dumps(objects).encode(), JSON), expected, equal_nan=True)
    with pytest.raises(RequestError, match="c: not a boolean; allowed: 0 or 1"):
        parser.parse(b"0,0,0.5", CSV)


def test_names_that_differ_in_their_unicode_form_are_the_same() -> None:
    composed, decomposed = "Gr\u00f6\u00dfe", "GRO\u0308SSE"
    columns = [ColumnSpec(name=name, dtype="float64") for name in (composed, "y")]
    parser = FeatureParser(TableSpec(name="t", target="y", columns=tuple(columns)))
    for name in (composed, decomposed):
        assert parser.parse(f"{name}\n5".encode(), CSV).tolist() == [[5.0]]
        assert parser.parse(json.dumps({name: 5}).encode(), JSON).tolist() == [[5.0]]
    with pytest.raises(RequestError, match=f"row 1: column {composed} is given twice"):
        parser.parse(json.dumps({composed: 5, decomposed: 5}).encode(), JSON)


def test_names_that_only_their_unicode_form_tells_apart_are_taken_as_they_are() -> None:
    composed, decomposed = "\u00f6", "o\u0308"
    columns = [ColumnSpec(name=name, dtype="float64") for name in (composed, decomposed, "y")]
    parser = FeatureParser(TableSpec(name="t", target="y", columns=tuple(columns)))
    assert parser.parse(f"{decomposed},{composed}\n1,2".encode(), CSV).tolist() == [[2.0, 1.0]]


def test_an_absent_accept_header_leaves_the_choice() -> None:
    assert response_media("", JSON_LINES) == JSON_LINES
