"""The compose file and the image: well formed, without secrets, and naming what exists.

There is no engine here to run them. `docker compose config` checks the file
against its schema where a compose command is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
import yaml  # type: ignore[import-untyped]  # ships no types
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from memsvc.cli.main import build
from memsvc.config import load_config
from model_adapter.main import parser

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
OWN = ("init", "migrate", "memsvc", "worker", "worker-gpu")


def substituted(value: str, given: dict[str, str]) -> str:
    """What compose makes of ${NAME:-default} and ${NAME:?message}."""
    return VARIABLE.sub(lambda match: given.get(match[1]) or match[3], value)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def serves(address: str) -> bool:
    probe = [sys.executable, str(ROOT / "docker" / "health.py"), address]
    return subprocess.run(probe, check=False).returncode == 0


def compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is not None:
            asked = subprocess.run([*command, "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return command
    return None


@pytest.mark.parametrize(
    ("password", "profile", "accepted"),
    [("secret", "cpu", True), ("secret", "gpu", True), ("", "cpu", False)],
)
def test_the_compose_command_accepts_it(
    password: str, profile: str, accepted: bool, tmp_path: Path
) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("no compose command is installed")
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    (tmp_path / ".env").write_text(f"POSTGRES_PASSWORD={password}\nCOMPOSE_PROFILES={profile}\n")
    done = subprocess.run(
        [*command, "config", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is accepted, done.stderr


def test_commands_exist_with_these_options(services: dict[str, Any]) -> None:
    root = typer.main.get_command(build())
    for name in OWN:
        subcommand, *arguments = (substituted(word, {}) for word in services[name]["command"])
        with root.make_context("memsvc", [subcommand, *arguments]) as context:
            found = root.resolve_command(context, [subcommand, *arguments])[1]  # type: ignore[attr-defined]  # a group
        assert found is not None
        # Unknown options and wrong values raise.
        with found.make_context(subcommand, list(arguments)) as context:
            # What is left to a worker is the worker's own to know.
            if context.args:
                assert subcommand == "worker"
                parser().parse_args(["--data-dir=x", "--listen=x", "--model=x", *context.args])


def test_settings_exist(services: dict[str, Any]) -> None:
    for name in OWN:
        environment = {
            variable: substituted(value, {"POSTGRES_PASSWORD": "secret"})
            for variable, value in services[name]["environment"].items()
        }
        config = load_config(environ=environment)
        assert len(environment) == 1 or config.catalog_url == (
            "postgresql://memsvc:secret@postgres/memsvc"
        )
        assert config.data == Path("/data")


def test_no_secret_stands_in_the_files() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for line in text.splitlines():
        if "PASSWORD" in line and not line.lstrip().startswith("#"):
            assert "${POSTGRES_PASSWORD:?" in line
    example = (ROOT / "docker" / "env.example").read_text()
    settings = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert "POSTGRES_PASSWORD=" in settings
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert {line.partition("=")[0] for line in settings} == {
        match[1] for match in VARIABLE.finditer(text)
    } | {"COMPOSE_PROFILES"}


def test_references_are_defined(compose: dict[str, Any], services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert set(service.get("networks", [])) <= set(compose["networks"]), name
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"], name
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert other in services
            assert condition != "service_healthy" or "healthcheck" in services[other]
            assert condition != "service_completed_successfully" or (
                services[other].get("restart") == "no"
            )


def test_only_the_server_is_published_and_on_loopback_only(
    compose: dict[str, Any], services: dict[str, Any]
) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["memsvc"]
    assert all(port.startswith("127.0.0.1:") for port in published["memsvc"])
    assert compose["networks"]["inside"] == {"internal": True}
    assert services["postgres"]["networks"] == ["inside"]


def test_the_worker_shares_data_and_process_ids_but_not_the_catalog(
    services: dict[str, Any],
) -> None:
    server = services["memsvc"]
    address = server["command"][server["command"].index("--worker-address") + 1]
    for worker in (services["worker"], services["worker-gpu"]):
        assert worker["volumes"] == server["volumes"]
        assert worker["pid"] == "service:memsvc"
        assert "MEMSVC_DATABASE_URL" not in worker["environment"]
        assert worker["networks"]["inside"]["aliases"] == ["worker"]
        listens = worker["command"][worker["command"].index("--listen") + 1]
        assert address == f"worker:{listens.rpartition(':')[2]}"


def test_one_worker_runs_at_a_time(services: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert (profiles["worker"], profiles["worker-gpu"]) == (["cpu"], ["gpu"])
    assert "COMPOSE_PROFILES=cpu" in (ROOT / "docker" / "env.example").read_text().splitlines()
    assert profiles["memsvc"] == profiles["migrate"] == []


def test_the_gpu_is_asked_for_and_used(services: dict[str, Any]) -> None:
    gpu, cpu = services["worker-gpu"], services["worker"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["command"] == [*cpu["command"], "--device", "cuda"]
    # Another image of the same Dockerfile, with another torch.
    assert gpu["image"] != cpu["image"]
    assert "ARG TORCH_INDEX" in DOCKERFILE
    assert set(gpu["build"]["args"]) == {"TORCH_INDEX"}


def test_the_image_is_built_from_what_is_here() -> None:
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    torch = re.search(r"torch==[\d.]+", DOCKERFILE)
    assert torch is not None
    assert torch[0] in locked
    assert DOCKERFILE.index(torch[0]) < DOCKERFILE.index("--constraint requirements.lock")
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert source in allowed, source


def test_the_image_runs_as_nobody_special() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    users = re.findall(r"^USER (\S+)$", final, re.MULTILINE)
    assert users == ["memsvc"]
    assert "--uid 10001" in final
    assert final.index("USER memsvc") < final.index("ENTRYPOINT")


def test_the_health_check_tells_serving_from_not() -> None:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            assert serves(address)
            servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert not serves(address)
        finally:
            server.stop(None).wait()
        assert not serves(address)
