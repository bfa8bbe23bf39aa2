"""The wire stands still: generated code matches its protos, and v1 never breaks a client."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "tests/golden/protos/v1.binpb"
CONFIG = '{"version": "v2", "breaking": {"use": ["FILE"]}}'


def buf_breaking(image: Path) -> subprocess.CompletedProcess[str]:
    buf = Path(sys.executable).parent / "buf"
    return subprocess.run(
        [buf, "breaking", image, "--against", BASELINE, "--config", CONFIG, "--exclude-imports"],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.binpb"
    subprocess.run([ROOT / "scripts/protos", "--image", path], check=True)
    return path


def generated(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for package in ("memsvc/v1", "model_adapter/v1")
        for path in (root / package).iterdir()
        if re.search(r"_pb2(_grpc)?\.pyi?$", path.name)
    }


def test_generated_code_matches_its_protos(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/protos", tmp_path], check=True)
    assert generated(tmp_path) == generated(ROOT)


def test_v1_breaks_no_client(image: Path) -> None:
    result = buf_breaking(image)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_removed_field_counts_as_breaking(image: Path) -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    (service,) = (f for f in files.file if f.name == "memsvc/v1/memory_service.proto")
    (query,) = (m for m in service.message_type if m.name == "QueryRequest")
    del query.field[1]
    image.write_bytes(files.SerializeToString())
    result = buf_breaking(image)
    assert result.returncode != 0
    assert "QueryRequest" in result.stdout


def test_everything_on_the_wire_is_explained(tmp_path: Path) -> None:
    image = tmp_path / "image.binpb"
    subprocess.run([ROOT / "scripts/protos", "--image", image, "--include_source_info"], check=True)
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    ours = [file for file in files.file if file.package in ("memsvc.v1", "model_adapter.v1")]
    assert [name for file in ours for name in unexplained(file)] == []


def unexplained(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Fields, enum values and RPCs without a comment. Paths as in SourceCodeInfo.Location."""
    explained = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments}
    return [name for path, name in declarations(file) if path not in explained]


def declarations(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    for i, message in enumerate(file.message_type):
        yield from in_message(message, (4, i), message.name)
    for i, enum in enumerate(file.enum_type):
        yield from in_enum(enum, (5, i), enum.name)
    for i, service in enumerate(file.service):
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), f"{service.name}.{method.name}"


def in_message(
    message: descriptor_pb2.DescriptorProto, at: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    if message.options.map_entry:
        return
    for i, field in enumerate(message.field):
        yield (*at, 2, i), f"{name}.{field.name}"
    for i, nested in enumerate(message.nested_type):
        yield from in_message(nested, (*at, 3, i), f"{name}.{nested.name}")
    for i, enum in enumerate(message.enum_type):
        yield from in_enum(enum, (*at, 4, i), f"{name}.{enum.name}")


def in_enum(
    enum: descriptor_pb2.EnumDescriptorProto, at: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    for i, value in enumerate(enum.value):
        yield (*at, 2, i), f"{name}.{value.name}"
