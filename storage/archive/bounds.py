"""Which numbers and times an archive may hold: those that a memory can go on from."""

from __future__ import annotations

#: Highest revision and document number: what every reader of JSON keeps exactly. Records hold
#: 2**63 - 1, so whoever writes on has numbers left for good.
MAX_COUNT = 2**53 - 1
#: UTC microseconds of the years 0001 to 9999: what calendars and protobuf's Timestamp hold.
MIN_TIME_US, MAX_TIME_US = -62_135_596_800_000_000, 253_402_300_799_999_999
