"""memory_* and stage1_hidden_* files: pooled caches and hidden states of documents."""

from __future__ import annotations

import re

import torch

from model_adapter.msa.encode import TokenisedDocument, encode_batch, from_bits
from model_adapter.msa.forward import Segment, new_row, run
from model_adapter.parity.comparison import Comparison, Kind
from model_adapter.parity.reference_text import document_ids
from model_adapter.parity.source import GoldenError, Setup, Source


def compare_memory(source: Source, stem: str) -> Comparison:
    """Pooled keys, values and routing keys, the template prefix, and who owns a chunk."""
    comparison = Comparison(source.tolerance(stem))
    golden = source.tensors(f"{stem}.safetensors")
    layers = {int(m[1]) for name in golden if (m := re.fullmatch(r"layer(\d+)\.\w+", name))}
    setup = source.setup(stem, layers=layers)
    for name, tensor in sorted(golden.items()):
        comparison.tensor(Kind.MEMORY, name, pooled(setup, name), tensor)
    return comparison


def pooled(setup: Setup, name: str) -> torch.Tensor:
    """Our value of a memory file's tensor: [K, C, D], a prefix [K, 3, D], or owners [C]."""
    if name == "chunk_local_doc_id":
        counts = [block.routing_key_LCE.shape[1] for block in setup.blocks]
        owners = torch.tensor([block.number + 1 for block in setup.blocks])
        return torch.repeat_interleave(owners, torch.tensor(counts))
    if found := re.fullmatch(r"template\.layer(\d+)\.([kv])", name):
        return setup.prefix.read(int(found[1]))[found[2] == "v"]
    if found := re.fullmatch(r"layer(\d+)\.(k|v|rk)", name):
        layer = setup.config.msa.routed_layers.index(int(found[1]))
        parts = []
        for block in setup.blocks:
            key = block.routing_key_LCE if block.key_LCE is None else block.key_LCE
            bits = {"k": key, "v": block.value_LCE, "rk": block.routing_key_LCE}[found[2]]
            parts.append(from_bits(bits[layer]))
        shape = (-1, setup.config.num_kv_heads, setup.config.head_dim)
        return torch.cat(parts).view(shape).transpose(0, 1)
    raise GoldenError(f"{name}: not a tensor of a memory file")


def compare_hidden(source: Source, stem: str) -> Comparison:
    """Hidden states after each layer and routing keys before pooling."""
    comparison = Comparison(source.tolerance(stem))
    golden = source.tensors(f"{stem}.safetensors")
    setup = source.setup(stem)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(golden.items()):
        sequence, _, what = name.partition(".")
        if sequence not in states:
            states[sequence] = _states(setup, sequence)
        if what not in states[sequence]:
            raise GoldenError(f"{name}: not a tensor of a hidden-state file")
        comparison.tensor(Kind.HIDDEN, name, states[sequence][what], tensor)
    return comparison


def _states(setup: Setup, sequence: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if sequence == "template":
        ids = list(setup.head)
    elif re.fullmatch(r"doc\d+", sequence) and int(sequence[3:]) < len(setup.texts):
        number = int(sequence[3:])
        ids = document_ids(setup.tokenizer, number, setup.texts[number])
    else:
        raise GoldenError(f"{sequence}: neither template nor a document")
    encode_batch(setup.decoder, [TokenisedDocument(0, ids)], found.__setitem__)
    if sequence == "template":  # also by the way questions take
        through_rows: dict[str, torch.Tensor] = {}
        run(setup.decoder, [Segment(new_row(setup.decoder), ids)], probe=through_rows.__setitem__)
        found.update({name: value for name, value in through_rows.items() if name in found})
    return found
