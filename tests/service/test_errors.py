from __future__ import annotations

import inspect
import re
from pathlib import Path

from google.rpc import error_details_pb2

from memsvc import errors
from memsvc.api_error import CODES, ApiError
from memsvc.v1.errors_pb2 import ErrorReason
from storage.catalog import EncodingRow, EncodingState

PROTO = Path(__file__).parents[2] / "protos" / "memsvc" / "v1" / "errors.proto"


def test_codes_are_those_the_proto_promises() -> None:
    promised = {
        reason: code
        for code, reason in re.findall(
            r"^  // ([A-Z_]+): .*\n(?:  //.*\n)*  ([A-Z_]+) = \d+;", PROTO.read_text(), re.MULTILINE
        )
    }
    declared = {ErrorReason.Name(reason): code.name for reason, code in CODES.items()}
    assert declared == promised
    assert set(declared) == set(ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_status_carries_error_info() -> None:
    status = errors.text_too_long("turns[3].text", limit=4, actual=9).to_status()
    (packed,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert packed.Unpack(info)
    assert (info.domain, info.reason) == ("memsvc", "TEXT_TOO_LONG")
    assert dict(info.metadata) == {"field": "turns[3].text", "limit": "4", "actual": "9"}
    assert status.code == 3


def test_retry_info_stands_beside_it_when_a_retry_may_help() -> None:
    status = errors.encoding_backlog_full(2.5).to_status()
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMicroseconds() == 2_500_000


def test_every_constructor_makes_a_reason_with_a_code() -> None:
    row = EncodingRow("x", "x", "x", EncodingState.ENCODING, 0, 0, 0, 0, 0, 0, 0, "")
    samples = {"str": "x", "int": 1, "float": 1.0, "float | None": 1.0, "EncodingRow": row}
    made = set()
    for function in vars(errors).values():
        if not inspect.isfunction(function) or function.__name__.startswith("_"):
            continue
        arguments = {
            name: samples[parameter.annotation]
            for name, parameter in inspect.signature(function).parameters.items()
        }
        error = function(**arguments)
        assert isinstance(error, ApiError)
        assert error.code in CODES.values()
        made.add(error.reason)
    assert len(made) > 25
