"""AWS's XGBoost image for the rehearsal: a virtual environment with what that image holds, and wheels for the rest.

Both are made once, by pip as it is configured on this machine, and kept in the user's cache. The image's own files are
not needed; CONTENT is what matters of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from resources.aws.code_package import requirements
from resources.model_registry.package_files import SERVING_PACKAGES
from step_scripts.runner.local_files import file_lock
from tests.sagemaker_emulator import Image

PATTERN = "*/sagemaker-xgboost:3.2-0*"
# What AWS states for version 3.2-0, without what neither jobs nor endpoints could come across. A package of this list
# may be used without being named in requirements; it has the version that stands here, unless they name another.
CONTENT = (
    "boto3==1.38.0",
    "Flask==3.1.3",
    "gunicorn==25.3.0",
    "numpy==2.1.0",
    "pandas==2.2.3",
    "protobuf==3.20.3",
    "psutil==7.0.0",
    "pyarrow==22.0.0",
    "PyYAML==6.0.1",
    "requests==2.33.0",
    "scikit-learn==1.8.0",
    "scipy==1.15.0",
    "setuptools>=83,<84",
    "xgboost==3.2.0",
)
# pip builds the endpoint's archive in an environment of its own, with these.
_BUILD = ("setuptools", "wheel")
_SERVER = Path(__file__).parent / "sagemaker_emulator" / "xgboost_server.py"
_LONGEST = 1800.0  # seconds; a gigabyte is fetched


def aws_image(python: str) -> tuple[Image, Path]:
    """The image, made with the interpreter `python`, and the folder of the wheels that jobs and endpoints install.

    Raises `subprocess.CalledProcessError`, after pip's own words, if something cannot be had.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "housing-assets", "aws-xgboost-image")
    environment = root / _digest(_version(python), *CONTENT)
    interpreter = environment / "bin" / "python3"
    pins = requirements() + requirements(SERVING_PACKAGES)
    wheels = root / f"wheels-{_digest(environment.name, pins, *_BUILD)}"
    with file_lock(root / "lock", _LONGEST, "the environment of AWS's image is made"):
        if not (environment / ".complete").exists():
            print(f"making the environment of AWS's image, once: {environment}", flush=True)
            _call(python, "-m", "venv", "--clear", str(environment))
            _call(str(interpreter), "-m", "pip", "install", "--quiet", *CONTENT)
            (environment / ".complete").touch()
        if not wheels.exists():
            print(f"fetching the wheels that the image lacks, once: {wheels}", flush=True)
            _fetch(interpreter, pins, wheels)
    image = Image(
        python=str(interpreter),
        # Jobs bring an entry point of their own. -P: the image does not see the modules beside the stand-in.
        entrypoint=("python3", "-P", str(_SERVER), str(wheels)),
        environment={"PIP_CONFIG_FILE": os.devnull},  # this machine's indices are none of the image's
        startup_timeout=300,
        installs=True,
    )
    return image, wheels


def _fetch(python: Path, pins: str, wheels: Path) -> None:
    with tempfile.TemporaryDirectory(dir=wheels.parent) as temporary:
        file, report, folder = (Path(temporary, name) for name in ("requirements.txt", "report.json", "wheels"))
        file.write_text(pins)
        # What the image holds already is left out.
        _call(str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report), "-r", str(file))
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        chosen = sorted(f"{item['name']}=={item['version']}" for item in found)
        _call(str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), *chosen)
        _call(str(python), "-m", "pip", "wheel", "--quiet", "-w", str(folder), *_BUILD)
        folder.rename(wheels)


def _version(python: str) -> str:
    code = "import sys, sysconfig; print(sys.version, sysconfig.get_platform(), sys.base_prefix)"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def _call(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
