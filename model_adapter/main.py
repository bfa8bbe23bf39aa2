"""Command line of a worker: python -m model_adapter."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from model_adapter import logs
from model_adapter.allocator import keep_few_kernels, keep_freed_memory
from model_adapter.engine import Engine
from model_adapter.engines import UnusableModelError, choose_device, load_engine
from model_adapter.lexical import NoFullTextSearchError, check_available
from model_adapter.pager import Budgets
from model_adapter.placement import routing_budget
from model_adapter.registration import Registration, registered
from model_adapter.tls import TlsFiles
from model_adapter.worker import ListenError, WorkerConfig, serving
from storage.paths import DataFolder

log = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_DEFAULT_BUDGET = "1G"

#: Exit status when the model or the address is at fault: starting again won't help.
EXIT_UNUSABLE = 2
#: Exit status of a fault inside: starting again may help.
EXIT_FAULT = 1


def parse_bytes(text: str) -> int:
    """A count of bytes: digits, then K, M or G (powers of 1024), optionally with iB or B."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a number of bytes: {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _budget_or_auto(text: str) -> int | None:
    return None if text == "auto" else parse_bytes(text)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m model_adapter", description=__doc__)
    made.add_argument(
        "--listen", required=True, help="unix:PATH, or host:port (port 0: a free one)"
    )
    made.add_argument("--data-dir", required=True, type=Path, help="the data folder, read only")
    made.add_argument("--model", required=True, help="default, fake[:key=value,...], or a path")
    made.add_argument(
        "--adapter", default="auto", help="an adapter file, none, or auto: the model's own"
    )
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    made.add_argument("--threads", type=int, default=0, help="of torch; 0: one per core")
    made.add_argument(
        "--routing-keys",
        default="auto",
        choices=("auto", "float", "int8", "int4", "two-stage"),
        help="how routing keys lie on the device",
    )
    made.add_argument(
        "--routing-budget", type=_budget_or_auto, default="auto", help="on the device"
    )
    made.add_argument(
        "--exact-budget", type=parse_bytes, default="16G", help="of two-stage keys in host RAM"
    )
    made.add_argument("--content-budget", type=parse_bytes, default=_DEFAULT_BUDGET)
    made.add_argument("--lexical-budget", type=parse_bytes, default="256M")
    made.add_argument("--attribute-budget", type=parse_bytes, default="64M")
    made.add_argument("--drain-grace", type=float, default=10.0, help="seconds for queries to end")
    made.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    made.add_argument(
        "--exit-with-parent", action="store_true", help="drain when standard input ends"
    )
    made.add_argument("--tls-certificate", type=Path, help="PEM file, for host:port")
    made.add_argument("--tls-private-key", type=Path, help="PEM file of --tls-certificate")
    made.add_argument("--tls-client-roots", type=Path, help="PEM roots of memsvc's certificate")
    made.add_argument("--register", default="", metavar="ADDRESS", help="of a memsvc to work for")
    made.add_argument("--register-key", type=Path, help="file with the operator's API key")
    made.add_argument("--register-roots", type=Path, help="PEM roots of memsvc's TLS; else none")
    made.add_argument("--advertise", default="", help="where memsvc finds this worker")
    return made


def _tls(options: argparse.Namespace) -> TlsFiles | None:
    """Raises ValueError when some of the three files are named and not all."""
    given = (options.tls_certificate, options.tls_private_key, options.tls_client_roots)
    if not any(given):
        return None
    if not all(given):
        raise ValueError("--tls-certificate, --tls-private-key, --tls-client-roots go together")
    return TlsFiles(*given)


def _registration(options: argparse.Namespace, tls: TlsFiles | None) -> Registration | None:
    """Where to register, but for the worker's own address. Raises OSError, ValueError."""
    if not options.register:
        return None
    if options.register_key is None:
        raise ValueError("--register needs --register-key")
    roots = options.register_roots.read_bytes() if options.register_roots else None
    key = options.register_key.read_text().strip()
    return Registration(options.register, options.advertise, key, roots, tls)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a worker until SIGTERM, SIGINT or its parent's end; returns the exit status."""
    options = parser().parse_args(arguments)
    logs.configure(options.log_level)
    keep_freed_memory()
    keep_few_kernels()
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    try:
        tls = _tls(options)
        registration = _registration(options, tls)
    except (OSError, ValueError) as error:
        log.error("the worker can't start: %s", error)
        return EXIT_UNUSABLE
    config = WorkerConfig(
        listen=options.listen,
        data=DataFolder(options.data_dir),
        budgets=Budgets(
            0,
            options.content_budget,
            lexical_bytes=options.lexical_budget,
            attribute_bytes=options.attribute_budget,
        ),
        drain_grace_s=options.drain_grace,
        tls=tls,
    )
    try:
        check_available()
        device = choose_device(options.device)
        engine = _load_apart(options, config.data, device)
        budget, why = routing_budget(
            engine.description, device, options.routing_budget, options.exact_budget
        )
        config = replace(config, budgets=replace(config.budgets, routing_bytes=budget))
        log.info("%s; %s", engine.description.placement, why)
        sound = asyncio.run(_serve(engine, device, config, options.exit_with_parent, registration))
    except (UnusableModelError, ListenError, NoFullTextSearchError) as error:
        log.error("the worker can't start: %s", error)
        return EXIT_UNUSABLE
    return 0 if sound else EXIT_FAULT


def _load_apart(options: argparse.Namespace, data: DataFolder, device: torch.device) -> Engine:
    """Loads in a thread that ends with it, and with it the OpenMP threads it had started.

    Those would outnumber the cores together with the engine's; see tensors.copy_into.
    """

    def load() -> Engine:
        own = (options.model, data, device, options.dtype, options.adapter)
        return load_engine(*own, routing_keys=options.routing_keys)

    with ThreadPoolExecutor(1) as loading:
        return loading.submit(load).result()


async def _serve(
    engine: Engine,
    device: torch.device,
    config: WorkerConfig,
    exit_with_parent: bool,
    registration: Registration | None,
) -> bool:
    """Until asked to end (True), or until the worker can't go on (False)."""
    loop, over, faults = asyncio.get_running_loop(), asyncio.Event(), list[str]()

    def end() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(over.set)

    def fault() -> None:
        faults.append("scheduler")
        end()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    if exit_with_parent:
        threading.Thread(target=_watch_stdin, args=(end,), daemon=True).start()
    async with serving(engine, device, config, fault) as address:
        log.info("serving %s on %s", engine.description.model_id, address)
        sys.stdout.write(json.dumps({"ready": True, "address": address}) + "\n")
        sys.stdout.flush()
        async with _known(registration, address):
            await over.wait()
        log.info("draining")
    log.info("drained")
    return not faults


def _known(registration: Registration | None, address: str) -> AbstractAsyncContextManager[None]:
    """Registered with memsvc inside, where that is asked for."""
    if registration is None:
        return nullcontext()
    return registered(replace(registration, address=registration.address or address))


def _watch_stdin(end: Callable[[], None]) -> None:
    """The parent holds the other end of the pipe; it closes however the parent ends."""
    # Unbuffered: a thread inside a buffered reader would stand in the way of exit.
    while os.read(0, 4096):
        pass
    end()
