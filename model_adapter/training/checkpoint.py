"""Checkpoints of a run: masters and optimiser in safetensors, so that a run continues bit for
bit. Everything else about a step follows from the seed and the step's number."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model_adapter.checkpoints.adapter_header import TrainingSource
from model_adapter.training.errors import CheckpointMismatchError

KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """step: how many steps were made. tensors: masters by name, moments as NAME/exp_avg."""

    step: int
    fingerprint: str
    base_sha256: str
    sources: tuple[TrainingSource, ...]
    tensors: dict[str, torch.Tensor]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return max(found, default=None)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint in one step and drops old ones."""
    metadata = {
        "step": str(checkpoint.step),
        "fingerprint": checkpoint.fingerprint,
        "base_sha256": checkpoint.base_sha256,
        "sources": json.dumps([asdict(source) for source in checkpoint.sources]),
    }
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Raises CheckpointMismatchError for a damaged file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            metadata = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name).clone() for name in list(handle.keys())}
        sources = tuple(TrainingSource(**source) for source in json.loads(metadata["sources"]))
        return Checkpoint(
            step=int(metadata["step"]),
            fingerprint=metadata["fingerprint"],
            base_sha256=metadata["base_sha256"],
            sources=sources,
            tensors=tensors,
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointMismatchError(f"{path} is damaged: {error}") from error


def pack(
    masters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """Masters and the optimiser's moments by name."""
    tensors: dict[str, torch.Tensor] = {}
    for name, master in masters.items():
        tensors[name] = master
        for moment in _MOMENTS:
            # A master that no loss reached has no moments yet.
            held = optimiser.state[master].get(moment)
            tensors[f"{name}/{moment}"] = torch.zeros_like(master) if held is None else held
    return tensors


def unpack(
    checkpoint: Checkpoint,
    masters: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.AdamW,
) -> None:
    """Puts a checkpoint's values in place. Raises CheckpointMismatchError."""
    for name, master in masters.items():
        for key in (name, *(f"{name}/{moment}" for moment in _MOMENTS)):
            held = checkpoint.tensors.get(key)
            if held is None or held.shape != master.shape or held.dtype != master.dtype:
                raise CheckpointMismatchError(f"the checkpoint has no fitting {key}")
        with torch.no_grad():
            master.copy_(checkpoint.tensors[name])
        optimiser.state[master] = {
            "step": torch.tensor(float(checkpoint.step)),
            **{m: checkpoint.tensors[f"{name}/{m}"].to(master.device) for m in _MOMENTS},
        }


def masters_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The masters alone."""
    return {name: t for name, t in checkpoint.tensors.items() if "/" not in name}
