"""Triton Inference Server from the Python package index, in an environment of its own.

The package `nvidia-pytriton` carries the real server with its Python backend, whose process needs numpy below 2; this
package needs not. So it lives in a virtual environment that only holds the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mxcompile.errors import EnvironmentProblem

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VARIABLE = "MXCOMPILE_TRITON_VENV"


@dataclass(frozen=True)
class TritonInstallation:
    """Where the parts of the server lie."""

    python: Path
    server: Path
    backend: Path
    stub: Path
    library_dir: str


def default_folder() -> Path:
    """The environment's folder: of the variable MXCOMPILE_TRITON_VENV, else in the user's cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mxcompile" / "triton-venv"


def find(folder: Path) -> TritonInstallation | None:
    """The server in the virtual environment `folder`; None when it is not there."""
    python = folder / "bin" / "python"
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    root = folder / "lib" / f"python{minor}" / "site-packages" / "pytriton" / "tritonserver"
    installation = TritonInstallation(
        python,
        root / "bin" / "tritonserver",
        root / "backends" / "python",
        root / "python_backend_stubs" / minor / "triton_python_backend_stub",
        "",
    )
    if not all(path.exists() for path in (python, installation.server, installation.backend, installation.stub)):
        return None
    # The stub must load the libpython that belongs to its standard library, not one that the system happens to have.
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return None
    return TritonInstallation(
        python, installation.server, installation.backend, installation.stub, found.stdout.strip()
    )


def install(folder: Path) -> TritonInstallation:
    """Make the environment. Raises EnvironmentProblem when that fails, and leaves nothing behind."""
    if (existing := find(folder)) is not None:
        return existing
    if folder.exists() and any(folder.iterdir()):
        raise EnvironmentProblem(
            f"{folder}: holds no Triton for Python {sys.version_info.major}.{sys.version_info.minor}; "
            "remove it or name another folder with --triton-venv"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise EnvironmentProblem(
            f"Triton could not be installed into {folder}: {lines[-1] if lines else error}"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    found = find(folder)
    if found is None:
        raise EnvironmentProblem(f"{folder}: nvidia-pytriton has no Triton for this Python and this machine")
    return found


def backend_directory(installation: TritonInstallation) -> Path:
    """A new folder as the server wants it; links, because a copied stub does not find its libraries."""
    folder = Path(tempfile.mkdtemp(prefix="mxcompile-triton-"))
    (folder / "python").mkdir()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (folder / "python" / name).symlink_to(installation.backend.resolve() / name)
    (folder / "python" / "triton_python_backend_stub").symlink_to(installation.stub.resolve())
    return folder
