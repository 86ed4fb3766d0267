"""`make chromium`: installs Debian's Chromium for the browser tests where it is missing and that needs nobody's password.

Prints nothing where Chromium is already there. Never fails: the tests themselves are skipped without it, or fail in CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from browser.chromium import find_chromium

__all__ = ["install"]

# Waits for another apt-get instead of failing beside it; recommended packages are printers, sound and the like.
APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120")
COMMANDS: tuple[tuple[str, ...], ...] = (
    (*APT, "update"),
    (*APT, "-y", "--no-install-recommends", "install", "chromium", "fonts-liberation"),
)


def install() -> str:
    """What is to be said about it; empty where Chromium was there."""
    if find_chromium() is not None:
        return ""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return (
            "the browser tests need Chromium and are skipped without it; on Debian, as root: apt-get install chromium"
        )
    print("make: installing chromium with apt-get, for the browser tests", flush=True)
    for command in COMMANDS:
        trouble = _run(command)
        if trouble:
            return f"chromium could not be installed, so the browser tests are skipped ({' '.join(command)}: {trouble})"
    return "" if find_chromium() else "apt-get installed no chromium that is found, so the browser tests are skipped"


def _run(command: Sequence[str]) -> str:
    """The last line of what a failed command said: apt-get prints thousands of lines, and they are of no use after success."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        check=False,
    )
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


if __name__ == "__main__":
    said = install()
    if said:
        print(f"make: {said}", file=sys.stderr)
