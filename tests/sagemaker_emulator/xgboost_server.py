"""A stand-in for the server of AWS's XGBoost image, whose own package is in no registry.

Does what that one does with a script of the user's: fetches the archive at SAGEMAKER_SUBMIT_DIRECTORY, unpacks it to
/opt/ml/code, lets pip install it with its requirements.txt, imports the module that SAGEMAKER_PROGRAM names, calls its
`model_fn` once and its `transform_fn` for each request, behind gunicorn and Flask. It runs in the image's environment
and imports nothing of this project. Arguments: a folder of wheels in place of the package index, then `serve`.
"""

import importlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

BASE = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
_UTF8 = ("text/csv", "application/json")


def fetch(uri: str, folder: Path) -> None:
    """Unpack the archive at an s3:// URI."""
    import boto3

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sourcedir.tar.gz"
    s3: Any = boto3.client("s3", region_name=os.environ["SAGEMAKER_REGION"])
    s3.download_file(bucket, key, str(file))
    with tarfile.open(file) as opened:
        opened.extractall(folder, filter="data")
    file.unlink()


def install(folder: Path, wheels: str) -> None:
    """What the image's server does before it imports the module; ends the container if pip does."""
    command = [sys.executable, "-m", "pip", "install", ".", "-r", "requirements.txt"]
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}
    if status := subprocess.run(command, cwd=folder, env=os.environ | index, check=False).returncode:
        sys.exit(f"the archive could not be installed: pip ended with {status}")


def application(module: Any) -> Any:
    """The WSGI application over the user's functions."""
    import flask

    model = module.model_fn(str(BASE / "model"))
    app = flask.Flask("worker")

    def invocations() -> Any:
        request = flask.request
        kind = request.content_type or "application/json"
        accept = request.headers.get("Accept") or "application/json"
        result = module.transform_fn(model, request.get_data(as_text=kind in _UTF8), kind, accept)
        return app.response_class(result[0], mimetype=result[1]) if isinstance(result, tuple) else result

    app.add_url_rule("/ping", "ping", lambda: ("", 200))
    app.add_url_rule("/invocations", "invocations", invocations, methods=["POST"])
    return app


def main() -> None:
    """Serve."""
    wheels, command = sys.argv[1:]
    if command != "serve":
        sys.exit(f"this stand-in for AWS's server knows `serve` only, not `{command}`")
    print("stand-in for the server of AWS's XGBoost image", flush=True)
    fetch(os.environ["SAGEMAKER_SUBMIT_DIRECTORY"], BASE / "code")
    install(BASE / "code", wheels)
    importlib.invalidate_caches()
    module = importlib.import_module(os.environ["SAGEMAKER_PROGRAM"].removesuffix(".py"))

    from gunicorn.app.base import BaseApplication

    class Server(BaseApplication):
        """One worker: AWS's server has one a CPU."""

        def load_config(self) -> None:
            """What the command line would say."""
            self.cfg.set("bind", f"0.0.0.0:{os.environ.get('SAGEMAKER_BIND_TO_PORT', '8080')}")
            self.cfg.set("workers", 1)
            self.cfg.set("control_socket_disable", True)  # it would lie in the home directory

        def load(self) -> Any:
            """In the worker, as the image does it."""
            return application(module)

    Server().run()


if __name__ == "__main__":
    main()
