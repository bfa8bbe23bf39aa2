"""Runs pip-audit over a lock file and says plainly when it could not look everything up.

    scripts/audit

pip-audit alone ends with success when it found a package nowhere, which behind a
mirror of the registry is every one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 2
SERVICES = ("osv", "pypi")
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Verdict:
    """status: the exit status. lines: for people."""

    status: int
    lines: tuple[str, ...]


def judge(output: str, expected: int) -> Verdict:
    """What pip-audit's JSON says of a lock file of `expected` packages."""
    try:
        found = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Verdict(NOT_AUDITED, ("pip-audit gave no report",))
    vulnerable = [
        f"{one['name']} {one['version']}: {vulnerability['id']}"
        f" (fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'})"
        for one in found
        for vulnerability in one.get("vulns", ())
    ]
    if vulnerable:
        return Verdict(VULNERABLE, tuple(vulnerable))
    audited = sum("skip_reason" not in one for one in found)
    if audited < expected:
        return Verdict(NOT_AUDITED, (f"{expected - audited} of {expected} packages not looked up",))
    return Verdict(CLEAN, (f"{audited} packages, no known vulnerability",))


def audit(lock: Path) -> Verdict:
    """Asks one service after the other until one knows every package."""
    expected = sum("==" in line for line in lock.read_text().splitlines())
    problems: list[str] = []
    for service in SERVICES:
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
        command += ["--format", "json", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        try:
            done = subprocess.run(
                [*command, "--requirement", str(lock)],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            problems.append(f"{service}: no answer within {_TIMEOUT_S} seconds")
            continue
        verdict = judge(done.stdout, expected)
        if verdict.status != NOT_AUDITED:
            return verdict
        problems += [f"{service}: {line}" for line in verdict.lines]
    return Verdict(NOT_AUDITED, tuple(problems))


def main() -> None:
    """One line per finding; the exit status says how it went."""
    verdict = audit(Path(sys.argv[1]))
    heading = {CLEAN: "AUDITED", VULNERABLE: "VULNERABLE", NOT_AUDITED: "NOT AUDITED"}
    for line in verdict.lines:
        sys.stdout.write(f"{heading[verdict.status]}: {line}\n")
    sys.exit(verdict.status)


if __name__ == "__main__":
    main()
