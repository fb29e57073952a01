"""Check the locked packages against today's security advisories (`make audit`).

pip-audit queries the advisory service. If the service is unavailable, this is reported as a failure
unless `--if-there` is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    command += ["--requirement", str(ROOT / "requirements.lock"), "--require-hashes"]
    done = subprocess.run(
        [*command, "--disable-pip"], capture_output=True, text=True, timeout=600, check=False
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["pip-audit is not installed"])[-1]
        print(f"NOT AUDITED: the advisory service is unavailable: {last}")
        return 0 if "--if-there" in sys.argv[1:] else 1
    skipped = [one["name"] for one in found if "vulns" not in one]
    if skipped or not found:
        of = f"{len(skipped)} of {len(found)} packages ({', '.join(skipped[:3])} …)"
        print(f"NOT AUDITED: the advisory service has no data for {of if found else 'any package'}")
        return 0 if "--if-there" in sys.argv[1:] else 1
    bad = [(one["name"], one["version"], v["id"]) for one in found for v in one.get("vulns", [])]
    for name, version, advisory in bad:
        print(f"{name} {version}: {advisory}")
    print(f"{len(found)} packages audited, {len(bad)} advisories")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
