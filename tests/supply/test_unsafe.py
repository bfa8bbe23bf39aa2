"""No code of ours turns data into running code: no pickle, no eval, no shell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supply.unsafe import unsafe

ROOT = Path(__file__).parents[2]
OURS = ("memsvc", "storage", "model_adapter", "migrations", "docker", "scripts")
FOLDERS = (*OURS, "examples", "benchmarks", "tests")

#: (where, what): tests compare our archives with the library's, the allocator asks this very
#: process for a function of its C library, the one wheel that is opened has a pinned hash, and
#: a test reads the chart that it has just had drawn.
ALLOWED = {
    ("tests/", "tarfile.open"),
    ("tests/", "zipfile.ZipFile"),
    ("tests/benchmarks/test_scale.py", "xml.etree.ElementTree.fromstring"),
    ("model_adapter/allocator.py", "ctypes.CDLL"),
    ("model_adapter/checkpoints/default_model.py", "zipfile.ZipFile"),
}


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_all_of_our_code() -> None:
    files = list(sources())
    assert len(files) > 200
    found = [
        f"{file.relative_to(ROOT)}:{what}"
        for file in files
        for what in unsafe(file.read_text())
        if not _allowed(str(file.relative_to(ROOT)), what.partition(": ")[2])
    ]
    assert not found, "\n".join(found)


def test_what_is_allowed_is_there() -> None:
    """An exception that nothing needs any more is taken back."""
    for where, what in ALLOWED:
        files = [file for file in sources() if str(file.relative_to(ROOT)).startswith(where)]
        assert any(one.endswith(what) for file in files for one in unsafe(file.read_text())), where


def _allowed(file: str, what: str) -> bool:
    return any(file.startswith(folder) and what == name for folder, name in ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from pandas.io import pickle",
        "import marshal, json",
        "def f():\n    import shelve",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path, 'cpu')",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "make(trust_remote_code=True)",
        "import importlib\nimportlib.import_module(name)",
        "import tarfile\ntarfile.open(path)",
    ],
)
def test_it_is_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "import json\njson.loads(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "model.eval()",
        "self.load(path)",
        "from memsvc import pickled",
        "text = 'import pickle'",
    ],
)
def test_what_is_no_danger_is_left_alone(source: str) -> None:
    assert not unsafe(source)
