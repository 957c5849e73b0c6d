"""Parts of the cluster program that need no cluster: limits, the failure file, waits, processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from step_scripts.cluster.job import (
    LONGEST_FAILURE,
    ClusterError,
    ClusterLimits,
    failure_from,
    failure_of,
    failure_text,
    pauses,
    write_failure,
)
from step_scripts.runner.contract import StepError
from step_scripts.runner.processes import interrupt, on_interruption
from tests import ROOT

_json = st.dictionaries(st.text(max_size=20), st.one_of(st.integers(), st.text(max_size=200)), max_size=10)


@settings(deadline=None)
@given(message=st.text(min_size=1, max_size=1500), details=_json)
@example(message='"' * 1200, details={})
@example(message="\x00" * 1200, details={"a": 1})
def test_fault_of_the_input_survives_the_failure_file(message: str, details: dict[str, int | str]) -> None:
    text = failure_text(failure_of(StepError(message, details=dict(details))))
    assert len(text) <= LONGEST_FAILURE
    # As the platform quotes it.
    found = failure_from(f"AlgorithmError: {text}, exit code: 1"[:1024])
    assert found is not None
    assert found["kind"] == "input"
    assert found["message"] == message or (
        found["message"].endswith("…") and message.startswith(found["message"][:-1]) and len(found["message"]) > 100
    )
    assert found["details"] in (details, {})


def test_details_that_fit_are_kept() -> None:
    failure = {"kind": "input", "message": "file x.csv is bad", "details": {"rows": [1, 2]}}
    assert failure_from(failure_text(failure)) == failure


def test_reason_of_a_crash_comes_first(tmp_path: Path) -> None:
    try:
        raise ValueError("something")
    except ValueError as error:
        failure = failure_of(error)
    failure["traceback"] = "first line\n" * 200 + failure["traceback"]
    write_failure(tmp_path / "output" / "failure", failure)
    text = (tmp_path / "output" / "failure").read_text()
    assert text.startswith("ValueError: something\n")
    assert text.endswith("ValueError: something")
    assert len(text) <= LONGEST_FAILURE
    assert failure_from(text) is None
    assert failure_text(failure_of(ClusterError("algo-2 is gone"))) == "algo-2 is gone"


@pytest.mark.parametrize("text", ["", "no JSON", '{"step_error": 3}', '{"step_error": {"kind": "input"', "{}"])
def test_other_reasons_are_no_faults_of_the_input(text: str) -> None:
    assert failure_from(text) is None


def test_limits_from_the_environment() -> None:
    limits = ClusterLimits.from_environment(
        {"HOUSING_CLUSTER_JOIN_SECONDS": "9.5", "HOUSING_CLUSTER_HEAD_GROUP": "big"}
    )
    assert limits == ClusterLimits(join_seconds=9.5)
    assert ClusterLimits.from_environment({}) == ClusterLimits()
    with pytest.raises(ValidationError, match="join_seconds"):
        ClusterLimits.from_environment({"HOUSING_CLUSTER_JOIN_SECONDS": "soon"})


@pytest.mark.parametrize(
    ("former", "name"),
    [("FAREWELL_SECONDS", "SHUTDOWN_ACK_TIMEOUT"), ("SILENT_SECONDS", "HEAD_UNRESPONSIVE_TIMEOUT")],
)
def test_a_limit_under_its_former_name_is_refused_with_the_new_one(former: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"HOUSING_CLUSTER_{former} is now HOUSING_CLUSTER_{name}"):
        ClusterLimits.from_environment({f"HOUSING_CLUSTER_{former}": "1"})
    assert ClusterLimits.from_environment({f"HOUSING_CLUSTER_{name}": "1"}) != ClusterLimits()


def test_default_limits_after_sigterm_fit_into_the_platforms_two_minutes() -> None:
    limits = ClusterLimits()
    assert limits.checkpoint_seconds + limits.shutdown_ack_timeout + 2 * limits.stop_seconds <= 90


def test_pauses_grow_to_their_limit() -> None:
    found = [pause for pause, _ in zip(pauses(1.0), range(20), strict=False)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.1)
    assert found[-1] == 1.0


def test_work_is_saved_even_if_another_part_fails_to() -> None:
    saved: list[str] = []

    def fail() -> None:
        raise OSError("full")

    with on_interruption(lambda: saved.append("outer")), on_interruption(fail):
        errors = interrupt()
    assert saved == ["outer"]
    assert [str(error) for error in errors] == ["full"]
    assert interrupt() == []
    assert saved == ["outer"]


_SUPERVISOR = """
    import os, signal, sys
    from pathlib import Path
    import psutil
    from step_scripts.runner.processes import Children, StopSignal

    signal.alarm(90)  # ends a test that hangs
    stop = StopSignal()
    children = Children(stop)
    # A process that leaves an orphan in a session of its own, which ignores SIGTERM, and one that ends by itself.
    ready = Path(sys.argv[1])
    stubborn = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); "
    stubborn += "time.sleep(80)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
    started = [
        children.start([sys.executable, "-c", script], os.environ) for script in (parent, "import sys; sys.exit(3)")
    ]
    while not ready.exists() or any(process.poll() is None for process in started):
        stop.wait(0.1)
        children.reap()
    assert [process.returncode for process in started] == [0, 3]
    [orphan] = psutil.Process().children()
    children.end_all(0.5)
    assert not psutil.pid_exists(orphan.pid)
    print("ended", flush=True)
    while not stop.stop_requested:
        stop.wait(60)
    print("noticed", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux only")
def test_orphans_are_ended_and_sigterm_is_noticed_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SUPERVISOR), str(tmp_path / "ready")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as supervisor:
        assert supervisor.stdout is not None
        try:
            assert supervisor.stdout.readline() == "ended\n"
            supervisor.terminate()
            assert supervisor.stdout.readline() == "noticed\n"
            assert supervisor.wait(20) == 0
        finally:
            supervisor.kill()


_ASKS_ONE_THAT_IS_SILENT = """
import os, socket, time
from step_scripts.cluster.node import ClusterStatusClient, HeadUnavailable
with socket.create_server(("127.0.0.1", 0)) as silent:
    start = time.monotonic()
    try:
        ClusterStatusClient(*silent.getsockname()).outcome()
    except HeadUnavailable:
        print(time.monotonic() - start, *(name for name in os.environ if "gcs" in name))
"""


def test_a_head_that_accepts_connections_and_says_nothing_is_waited_for_seconds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ASKS_ONE_THAT_IS_SILENT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, *left = done.stdout.split()
    assert float(seconds) < 20, "Ray itself takes 40"
    assert left == [], "Ray's own processes keep Ray's limits"
