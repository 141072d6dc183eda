"""Writes requirements.lock: the version and sha256 of every file that pip would install here, and no host.

    python .ci/lock.py requirements.lock          (make lock)
    pip install --require-hashes -r requirements.lock && pip install --no-deps --editable .

pip itself resolves, with whatever index it is configured for; nothing is installed. The files, and so the
sums, are those of this Python and platform, which the first line names: another one makes its own lock.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

PROJECT = "sjd2-lightning"


def locked(report: dict[str, list[dict]]) -> list[str]:
    """A line for each package of pip's report, but the project itself."""
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name.lower().replace("_", "-") == PROJECT:
            continue
        sums = item["download_info"]["archive_info"]["hashes"]
        lines.append(f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{sums['sha256']}")
    return sorted(lines)


def main() -> None:
    """Resolves and writes."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", ".[dev]"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    head = (
        f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}; made by .ci/lock.py"
    )
    Path(sys.argv[1]).write_text("\n".join([head, *locked(json.loads(found))]) + "\n")


if __name__ == "__main__":
    main()
