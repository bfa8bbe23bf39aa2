"""Finds, in Python source, what can run code out of data: by syntax, so nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

#: Modules whose formats carry code, or that exist to call such modules.
MODULES = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "pickletools",
        "marshal",
        "shelve",
        "dbm",
        "copyreg",
        "cloudpickle",
        "dill",
        "joblib",
        "jsonpickle",
        "pandas.io.pickle",
        "code",
        "codeop",
        "imp",
        "runpy",
    }
)

#: Builtins that run source text.
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})

#: Functions that unpickle, import or start a shell, whatever their arguments.
FUNCTIONS = frozenset(
    {
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "torch.ops.load_library",
        "torch.classes.load_library",
        "torch.serialization.add_safe_globals",
        "numpy.fromregex",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.full_load_all",
        "yaml.unsafe_load",
        "yaml.unsafe_load_all",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "tempfile.mktemp",
        "importlib.import_module",
        "importlib.util.spec_from_file_location",
        "ctypes.CDLL",
        "ctypes.cdll.LoadLibrary",
        "builtins.eval",
        "builtins.exec",
        "builtins.compile",
        "tarfile.open",
        "zipfile.ZipFile",
        "shutil.unpack_archive",
        "xml.etree.ElementTree.parse",
        "xml.etree.ElementTree.fromstring",
        "xml.sax.parse",
    }
)

#: Functions that are safe with this keyword given as this constant, and only so.
ONLY_WITH: Mapping[str, tuple[str, object]] = {"torch.load": ("weights_only", True)}

#: Keywords that no call may have with this constant, or with a value not known here.
NEVER_WITH: Mapping[str, object] = {
    "allow_pickle": True,
    "trust_remote_code": True,
    "shell": True,
}


def unsafe(source: str) -> list[str]:
    """What is forbidden in this source, each as "line: what"."""
    tree = ast.parse(source)
    names = _imported(tree)
    return [
        f"{node.lineno}: {what}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
        for what in _found(node, names)
    ]


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "load": "torch.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _found(node: ast.Import | ast.ImportFrom | ast.Call, names: Mapping[str, str]) -> Iterator[str]:
    match node:
        case ast.Import():
            yield from (f"import {one.name}" for one in node.names if _banned(one.name))
        case ast.ImportFrom(module=str(module), level=0):
            whole = [f"{module}.{alias.name}" for alias in node.names]
            yield from (f"import {name}" for name in whole if _banned(name))
        case ast.Call():
            yield from _in_call(node, _name(node.func, names))


def _banned(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in MODULES)


def _name(function: ast.expr, names: Mapping[str, str]) -> str:
    """The dotted name that is called, imports resolved; empty for anything else."""
    if isinstance(function, ast.Name):
        return names.get(function.id, function.id)
    if isinstance(function, ast.Attribute):
        owner = _name(function.value, names)
        return f"{owner}.{function.attr}" if owner else ""
    return ""


def _in_call(call: ast.Call, name: str) -> Iterator[str]:
    if name in BUILTINS or name in FUNCTIONS:
        yield name
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ONLY_WITH:
        keyword, value = ONLY_WITH[name]
        if not _is(given.get(keyword), value):
            yield f"{name} without {keyword}={value}"
    for keyword, value in NEVER_WITH.items():
        if keyword in given and not _is(given[keyword], not value):
            yield f"{name or 'a call'} with {keyword}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
