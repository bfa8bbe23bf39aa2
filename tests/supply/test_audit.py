"""The audit never takes "not found" for "not vulnerable"."""

from __future__ import annotations

import json

import pytest

from tests.supply.audit import CLEAN, NOT_AUDITED, VULNERABLE, judge

SOUND = {"name": "lmdb", "version": "3.0.0", "vulns": []}
SKIPPED = {"name": "xxhash", "skip_reason": "Dependency not found on PyPI"}
BAD = {
    "name": "jinja2",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1"], "aliases": [], "description": ""}],
}


def report(*found: object) -> str:
    return json.dumps({"dependencies": found, "fixes": []})


@pytest.mark.parametrize(
    ("output", "expected", "status"),
    [
        (report(SOUND, SOUND), 2, CLEAN),
        (report(SOUND, BAD), 2, VULNERABLE),
        (report(SKIPPED, BAD), 2, VULNERABLE),
        (report(SOUND, SKIPPED), 2, NOT_AUDITED),
        (report(SOUND), 2, NOT_AUDITED),
        (report(), 2, NOT_AUDITED),
        ("", 2, NOT_AUDITED),
        ("{}", 2, NOT_AUDITED),
        ("[]", 2, NOT_AUDITED),
    ],
)
def test_judging(output: str, expected: int, status: int) -> None:
    verdict = judge(output, expected)
    assert verdict.status == status
    assert verdict.lines


def test_a_finding_names_package_and_fix() -> None:
    assert judge(report(BAD), 1).lines == ("jinja2 2.0: PYSEC-1 (fixed in 3.1)",)
