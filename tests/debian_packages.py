"""Programs of Debian packages for the tests, unpacked in the virtual environment, without root."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_SECONDS = 120.0


def unpacked(name: str, packages: Sequence[str]) -> Path | None:
    """Return the folder with the files of packages, which is made at the first call. Return None if
    they cannot be downloaded."""
    folder = Path(sys.prefix) / name
    if not (folder / "usr").exists() and not _download(folder, packages):
        return None
    return folder


def _download(folder: Path, packages: Sequence[str]) -> bool:
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        try:
            for command in (
                ["apt-get", "download", *packages],
                ["sh", "-c", 'for package in *.deb; do dpkg-deb -x "$package" . || exit 1; done'],
                ["sh", "-c", "rm *.deb"],
            ):
                subprocess.run(
                    command, cwd=unfinished, check=True, capture_output=True, timeout=_SECONDS
                )
        except (OSError, subprocess.SubprocessError):
            return False
        shutil.copytree(unfinished, folder, symlinks=True)
    return True
