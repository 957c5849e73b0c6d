"""What other users of the machine, and of its network, can reach: nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from step_scripts.runner import storage
from step_scripts.runner.local_files import file_lock, open_private, private_folder
from step_scripts.runner.ray_session import RaySession
from step_scripts.serving.deployment import AnsweredRequest, CaptureSettings, RequestCapture

CLIENT = """
import os, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
try:
    print(len(client.get_all_node_info(timeout=20)))
except Exception as error:
    print(type(error).__name__, error)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def usual_umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_new_folders_are_private_and_others_keep_their_mode(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    private_folder(shared / "a" / "b")
    private_folder(shared)
    assert [mode(p) for p in (shared, shared / "a", shared / "a" / "b")] == [0o755, 0o700, 0o700]
    with open_private(shared / "token", "xb") as file:
        file.write(b"x")
    with open_private(shared / "log", "ab") as file:
        file.write(b"x")
    assert (mode(shared / "token"), mode(shared / "log")) == (0o600, 0o600)
    with pytest.raises(FileExistsError):
        open_private(shared / "token", "xb")
    with pytest.raises(FileExistsError, match="is no folder"):
        private_folder(shared / "token")


def test_a_root_that_is_made_here_is_private(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "root" / "references" / "a.json"), b"{}")
    with storage.open_output(str(tmp_path / "other" / "artifacts" / "a")) as stream:
        stream.write(b"x")
    with file_lock(tmp_path / "third" / "endpoints" / ".lock", 1, "test"):
        pass
    assert {mode(folder) for name in ("root", "other", "third") for folder in (tmp_path / name).glob("**/")} == {0o700}


def test_captured_requests_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    folder.mkdir(mode=0o755)  # as an earlier version made it
    capture = RequestCapture(folder, CaptureSettings())
    capture.add(AnsweredRequest(datetime.now(UTC), "text/csv", b"1", "text/csv", b"2"))
    capture.close()
    assert mode(folder) == 0o700
    files = list(folder.rglob("*.jsonl"))
    assert [mode(file) for file in files] == [0o600]


def test_ray_is_for_this_user_and_for_who_has_the_token(ray_session: RaySession) -> None:
    import ray

    assert ray_session.folder is not None
    folder = ray_session.folder.path
    assert (mode(folder), mode(folder / "ray_token")) == (0o700, 0o600)
    sessions = [Path(place) for place in (folder / "r").glob("session_2*")]
    assert sessions  # whatever Ray opens to all lies below a folder that it has not made
    address = ray.get_runtime_context().gcs_address
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_AUTH")}

    def ask(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, address],
            env=environment | more, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return (done.stdout + done.stderr).strip()

    assert ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "ray_token")).splitlines()[0] == "1"
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        answer = ask(**stranger)
        assert not answer.startswith("1")
        assert "unauthenticated" in answer.lower(), answer
