"""The installed package is whole: it migrates a catalog from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from storage.catalog.schema import head_revision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked; built from a copy, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("memsvc", "storage", "model_adapter", "migrations"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    wheels = folder / "wheels"
    subprocess.run(
        [*build, "--wheel-dir", str(wheels), str(folder / "source")],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(wheels.glob("memsvc-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_every_migration_and_its_template_are_in_it(installed: Path) -> None:
    for pattern in ("migrations/*.py", "migrations/*.mako", "migrations/versions/*.py"):
        expected = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert expected
        assert {path.relative_to(installed) for path in installed.glob(pattern)} == expected


def test_it_migrates_without_the_source_tree(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import storage; assert storage.__file__.startswith(sys.argv[1]), storage.__file__;"
        "from storage.catalog import current_revision, migrate;"
        "migrate(sys.argv[2]); print(current_revision(sys.argv[2]))"
    )
    url = f"sqlite:///{tmp_path}/catalog.db"
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == head_revision()
