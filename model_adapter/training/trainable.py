"""What is trained: low-rank deltas and routers of a decoder that otherwise stays as it is.

The deltas are merged into the weights of the decoder at every step, so what is trained is
the merged model that will be served, and a step costs what full fine-tuning costs.

Shape suffixes: L delta layers, R routed layers, X rows and M columns of a matrix, r rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from model_adapter.checkpoints.adapter_header import PARTS, AdapterLayout
from model_adapter.checkpoints.routing import with_value_routers
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.model import Decoder
from model_adapter.training.settings import Settings

#: Starts the learned temperature of the combined score.
FIRST_SCALE = 33.0


def layout_of(settings: Settings, model: LoadedModel) -> AdapterLayout:
    """The layout that the settings ask for on this base."""
    config = model.config
    layers = tuple(range(settings.first_delta_layer, config.num_layers)) if settings.rank else ()
    return AdapterLayout(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        routed_layers=settings.routed_layers,
        pool_tokens=settings.pool_tokens,
        query_reduce=settings.query_reduce,
        layer_choice=settings.layer_choice,
        top_k=settings.top_k,
        delta_layers=layers,
        delta_parts=PARTS if layers else (),
        rank=settings.rank,
    )


def prepare_model(model: LoadedModel, layout: AdapterLayout) -> LoadedModel:
    """The base with routers in the layout's layers, made of its value projections."""
    weights = {name: t for name, t in model.weights.items() if ".router_" not in name}
    config = model.config.with_msa(
        routed_layers=layout.routed_layers, pool_tokens=layout.pool_tokens, top_k=layout.top_k
    )
    config = with_value_routers(config, weights).with_msa(
        query_reduce=layout.query_reduce, layer_choice=layout.layer_choice
    )
    return replace(model, config=config, weights=weights)


class Trainable:
    """fp32 masters by name: PART.a [L, r, M], PART.b [L, X, r], router_q and router_k
    [R, X, M], scale [] (the logarithm of the combined score's inverse temperature)."""

    def __init__(
        self, decoder: Decoder, layout: AdapterLayout, seed: int, *, value_routers: bool
    ) -> None:
        self.layout = layout
        self.masters: dict[str, torch.nn.Parameter] = {}
        self._decoder = decoder
        self._plain = list(decoder.layers)
        self._base: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for part in layout.delta_parts:
            base_LXM = torch.stack([self._matrix(part, index) for index in layout.delta_layers])
            layers, rows, columns = base_LXM.shape
            self._base[part] = base_LXM
            a_LrM = torch.randn(layers, layout.rank, columns, generator=generator) * columns**-0.5
            self._add(f"{part}.a", a_LrM)
            self._add(f"{part}.b", torch.zeros(layers, rows, layout.rank))
        for name, first in (("router_q", True), ("router_k", False)):
            rows_RXM = torch.stack([self._router(index, first) for index in layout.routed_layers])
            if not value_routers:
                width = rows_RXM.shape[-1]
                rows_RXM = torch.randn(rows_RXM.shape, generator=generator) * width**-0.5
            self._add(name, rows_RXM)
        self._add("scale", torch.tensor(FIRST_SCALE).log())

    def _add(self, name: str, value: torch.Tensor) -> None:
        placed = value.float().to(self._decoder.device).clone()
        self.masters[name] = torch.nn.Parameter(placed)

    def _router(self, index: int, query: bool) -> torch.Tensor:
        layer = self._plain[index]
        before, after = layer.router_rows
        return layer.fused[:before] if query else layer.fused[-after:]

    def _matrix(self, part: str, index: int) -> torch.Tensor:
        layer = self._plain[index]
        before, after = layer.router_rows
        if part == "qkv":
            return layer.fused[before : layer.fused.shape[0] - after]
        return {"out": layer.out, "gate_up": layer.gate_up, "down": layer.down}[part]

    @property
    def scale(self) -> torch.Tensor:
        """The combined score's inverse temperature."""
        return self.masters["scale"].exp()

    def install(self) -> None:
        """Merges the masters, as they are now, into the decoder; differentiable."""
        dtype = self._decoder.dtype
        merged = {
            part: torch.baddbmm(
                base_LXM,
                self.masters[f"{part}.b"].to(dtype),
                self.masters[f"{part}.a"].to(dtype),
            ).unbind(0)
            for part, base_LXM in self._base.items()
        }
        routers = {
            name: self.masters[name].to(dtype).unbind(0) for name in ("router_q", "router_k")
        }
        layout = self.layout
        for index, plain in enumerate(self._plain):
            matrices = {part: self._matrix(part, index) for part in PARTS}
            if index in layout.delta_layers:
                place = layout.delta_layers.index(index)
                matrices |= {part: merged[part][place] for part in layout.delta_parts}
            fused = matrices["qkv"]
            if index in layout.routed_layers:
                place = layout.routed_layers.index(index)
                fused = torch.cat((routers["router_q"][place], fused, routers["router_k"][place]))
            self._decoder.layers[index] = replace(
                plain,
                fused=fused,
                out=matrices["out"],
                gate_up=matrices["gate_up"],
                down=matrices["down"],
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors, under their names in the file."""
        return adapter_tensors({name: t.detach() for name, t in self.masters.items()}, self.layout)


def adapter_tensors(
    masters: dict[str, torch.Tensor], layout: AdapterLayout
) -> dict[str, torch.Tensor]:
    """Masters by layer, under their names in an adapter file."""
    found: dict[str, torch.Tensor] = {}
    for place, index in enumerate(layout.delta_layers):
        for part in layout.delta_parts:
            for side in ("a", "b"):
                found[f"layers.{index}.{part}.{side}"] = masters[f"{part}.{side}"][place]
    for place, index in enumerate(layout.routed_layers):
        for name in ("router_q", "router_k"):
            found[f"layers.{index}.{name}"] = masters[name][place]
    return found
