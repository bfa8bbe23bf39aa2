"""Memory Parallel: routing over one memory by several devices, against one.

    python -m benchmarks.parallel --ranks 2 --device cuda --json

Every rank is a process with a device of its own (NCCL), on a CPU all share it (gloo). From
routing queries to chosen documents on the host, all layers, as the engine does it. `speedup`
is the time of one rank that holds the whole memory over that of all ranks together; `same`:
on a memory of 20,000 chunks that every rank makes from one seed, all of them choose what one
would. Keys are random, in a 4B model's shape.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from torch import distributed

from benchmarks.machine import machine
from benchmarks.rates import Timing
from benchmarks.routing import HEAD_DIM, HEADS, KV_HEADS
from benchmarks.routing_cuda import ONE_LAYER, Shape, some_memory, some_offsets
from model_adapter.msa.kernel_pass import Asked, KernelPass
from model_adapter.msa.kernels import KeyStorage, ResidentKeys, Shard
from model_adapter.msa.kernels.score import fused_available
from model_adapter.msa.routing import Positions

_CHECKED_CHUNKS = 20_000


def routed(memory: ResidentKeys, query_THD: torch.Tensor, shape: Shape) -> dict[int, Positions]:
    """Choices of all layers, each for itself."""
    msa = replace(ONE_LAYER, routed_layers=tuple(range(shape.layers)))
    asked = [Asked(0, memory, range(len(query_THD)), shape.k)]
    one = KernelPass(asked, msa, together=False, fused=fused_available(query_THD.device))
    for layer in range(shape.layers):
        one.route(layer, query_THD, KV_HEADS)
    return one.asked[0].chosen


def part_of(memory: ResidentKeys, keys_LCE: torch.Tensor, rank: int, ranks: int) -> ResidentKeys:
    """A rank's part of a memory that every rank has."""
    where_N1 = np.append(memory.firsts_N, memory.ends_N[-1])
    shard = Shard.of(where_N1, rank, ranks)
    first, stop = shard.own
    chunks = slice(int(where_N1[first]), int(where_N1[stop]))
    own_n1 = where_N1[first : stop + 1] - where_N1[first]
    part = ResidentKeys.of(own_n1, keys_LCE[:, chunks], KeyStorage(group=128), keys_LCE.device)
    return replace(part, shard=shard)


def together(
    arguments: argparse.Namespace, query_THD: torch.Tensor, shape: Shape, timing: Timing
) -> float:
    """Seconds of all ranks, each with its part."""
    offsets_N1 = some_offsets(arguments.chunks, 0)
    shard = Shard.of(offsets_N1, arguments.rank, arguments.ranks)
    first, stop = shard.own
    own_n1 = offsets_N1[first : stop + 1] - offsets_N1[first]
    part = some_memory(
        int(own_n1[-1]),
        shape,
        KeyStorage(group=shape.group),
        timing.device,
        seed=arguments.rank,
        offsets_N1=own_n1,
    )
    mine = replace(part, shard=shard)

    def once() -> None:
        distributed.barrier()
        routed(mine, query_THD, shape)

    return timing.seconds(once)


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank; the first writes the figures."""
    rank, ranks = arguments.rank, arguments.ranks
    cuda = arguments.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        f"tcp://127.0.0.1:{arguments.port}",
        rank=rank,
        world_size=ranks,
    )
    shape, timing = Shape(layers=arguments.layers), Timing(device, arguments.repeats)
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.tokens, HEADS, HEAD_DIM)
    query_THD = torch.randn(size, generator=generator, device=device).bfloat16()
    storing = KeyStorage(group=shape.group)
    with torch.inference_mode():
        checked = min(_CHECKED_CHUNKS, arguments.chunks)
        small = some_memory(checked, shape, storing, device)
        keys_LCE = small.parts[0].keys.values_LCE
        alone = routed(small, query_THD, shape)
        ours = routed(part_of(small, keys_LCE, rank, ranks), query_THD, shape)
        same = all((alone[layer] == ours[layer]).all() for layer in alone)
        del small, keys_LCE
        all_s = together(arguments, query_THD, shape, timing)
        one_s = 0.0
        if cuda:
            torch.cuda.empty_cache()
        if rank == 0:
            whole = some_memory(arguments.chunks, shape, storing, device)
            one_s = timing.seconds(lambda: routed(whole, query_THD, shape))
        distributed.barrier()
    if rank == 0:
        found = {
            "machine": machine(),
            "ranks": ranks,
            "chunks": arguments.chunks,
            "same": bool(same),
            "one_rank_ms": round(one_s * 1000, 3),
            "all_ranks_ms": round(all_s * 1000, 3),
            "speedup": round(one_s / all_s, 2),
        }
        print(json.dumps(found))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--chunks", type=int, default=1_562_500)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="always so")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.parallel", *sys.argv[1:], f"--port={port}"]
    ranks = [subprocess.Popen([*command, f"--rank={rank}"]) for rank in range(arguments.ranks)]
    sys.exit(max(process.wait() for process in ranks))


if __name__ == "__main__":
    main()
