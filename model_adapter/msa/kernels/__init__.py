"""Routing over large memories: fused kernels for a GPU, and their twin for a CPU.

What is computed is `routing.score_documents` with the mean over heads and the maximum
over chunks: per document the largest product of a voting token and a chunk. Each routing
key is read once, and of what it is multiplied with only one number per document and
question is written.

  keys.py    routing keys of one layer as they lie on the device: floats, int8 or int4
  plan.py    which chunks every program takes, for questions over one memory or many
  resident.py  memories whose keys lie on the device, in parts; many as one batch
  fetch.py   content of chosen documents from host RAM
  sharding.py  one memory over several devices
  score.py   scores and choices; by kernels when triton and a GPU are there, else by the twin
  launches.py  shapes of the kernels, and cheap launches
  fused.py   the kernels that score and fetch (imports triton)
  fused_best.py  the kernel that chooses (imports triton)
  twin.py    the same results in plain torch

Shape suffixes are those of model.py; R rows: voting tokens of all questions, each padded to
the same number; B questions; S groups of consecutive dimensions that share a scale.
"""

from model_adapter.msa.kernels.keys import (
    KeyFormat,
    KeyStack,
    KeyStorage,
    RoutingKeys,
    quantise,
)
from model_adapter.msa.kernels.plan import Plan, Spans
from model_adapter.msa.kernels.resident import Batch, Part, ResidentKeys
from model_adapter.msa.kernels.rows import Rows
from model_adapter.msa.kernels.score import (
    Chosen,
    Kernels,
    best,
    best_keys,
    read_keys,
    score,
    two_stage,
)
from model_adapter.msa.kernels.sharding import Shard

__all__ = [
    "Batch",
    "Chosen",
    "Kernels",
    "KeyFormat",
    "KeyStack",
    "KeyStorage",
    "Part",
    "Plan",
    "ResidentKeys",
    "RoutingKeys",
    "Rows",
    "Shard",
    "Spans",
    "best",
    "best_keys",
    "quantise",
    "read_keys",
    "score",
    "two_stage",
]
