"""Every RPC with every reference of somebody else's, beside one that never was.

A case is (RPC, field, attack, caller, variation): two calls that differ only in whether
what the field names exists elsewhere. All that a caller can see of them must be equal.
A variation sets one other field to a value that some check refuses, so that the order of
checks tells nothing either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from google.protobuf.message import Message

from memsvc.v1 import memory_service_pb2 as pb
from tests.isolation.fields import NAMELESS, Kind, Leaf, leaves
from tests.isolation.requests import BASES, Own
from tests.isolation.world import CANARY, METHODS, Outcome, World, export, make_memory
from tests.support.served import Caller

NEVER, NO_KEY, NO_TENANT = "memories/never-was", "0" * 16, "tenants/never-was"
NO_RECEIPT = f"{'0' * 16}-{'0' * 8}"

#: Kinds whose attack must end with one of these, unless a variation is refused first.
DENIED = {"NOT_FOUND", "PERMISSION_DENIED"}
_EXPECTED: dict[Kind, set[str]] = {
    Kind.MEMORY: DENIED,
    Kind.DOCUMENT: DENIED,
    Kind.TENANT: DENIED,
    Kind.API_KEY: DENIED,
    Kind.QUOTAS: DENIED,
    Kind.RECEIPT: DENIED,
    Kind.PAGE_TOKEN: {"INVALID_ARGUMENT"},
    Kind.ETAG: {"ABORTED"},
    Kind.REQUEST_ID: {"OK"},
    Kind.MEMORY_ID: {"OK"},
    Kind.TENANT_ID: DENIED,
    Kind.ARCHIVE: {"OK"},
    Kind.UID: {"OK"},
}
#: A document of another memory than the parent is refused without looking.
_EXPECTED_OF = {("DeleteDocuments", "names"): {"INVALID_ARGUMENT"}}
#: Calls that succeed change what they are about: each gets things of its own.
_CHANGING = {Kind.REQUEST_ID, Kind.MEMORY_ID, Kind.ARCHIVE, Kind.UID, Kind.ETAG}
_OF_OTHERS = (
    Kind.MEMORY,
    Kind.DOCUMENT,
    Kind.TENANT,
    Kind.API_KEY,
    Kind.QUOTAS,
    Kind.RECEIPT,
    Kind.PAGE_TOKEN,
)


@dataclass(frozen=True)
class Attack:
    """Two values of one field: of something that is somebody else's, and of nothing."""

    name: str
    theirs: object
    nobodys: object


@dataclass
class Report:
    """cases by (RPC, field, kind); calls made; what went wrong."""

    cases: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    attacks: set[tuple[str, str, str]] = field(default_factory=set)
    calls: int = 0
    failures: list[str] = field(default_factory=list)


def uncovered() -> list[str]:
    """RPCs without a sound request, and fields that nobody has classified."""
    missing = [f"{name}: no request in BASES" for name in METHODS if name not in BASES]
    for name, method in METHODS.items():
        missing += [
            f"{name}.{leaf.name}: no kind in fields.py"
            for leaf in leaves(method.input_type)
            if leaf.kind is None
        ]
    return missing


class Matrix:
    """Runs the cases of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.report = Report()
        self._archives: tuple[bytes, bytes] | None = None

    async def run(self, method: str) -> None:
        """All cases of one RPC."""
        fields = list(leaves(METHODS[method].input_type))
        world = self._world
        for leaf in fields:
            assert leaf.kind is not None
            if leaf.kind in NAMELESS:
                continue
            for attack in await self._attacks(method, leaf):
                main = world.attacker.admin
                await self._case(method, leaf, attack, "admin", main, None)
                for other in fields:
                    if other.name != leaf.name:
                        await self._case(method, leaf, attack, "admin", main, other)
                for name, caller in self._others(leaf.kind):
                    await self._case(method, leaf, attack, name, caller, None)

    def _others(self, kind: Kind) -> Iterator[tuple[str, Caller | None]]:
        if kind not in _OF_OTHERS:
            return
        for name, caller in self._world.attacker.callers.items():
            if name != "neighbour" or kind in {Kind.MEMORY, Kind.DOCUMENT}:
                yield name, caller
        yield "nobody", None

    async def _case(
        self,
        method: str,
        leaf: Leaf,
        attack: Attack,
        who: str,
        caller: Caller | None,
        other: Leaf | None,
    ) -> None:
        for hostile in other.hostile_values() if other else [None]:
            outcomes: list[Outcome] = []
            for value in (attack.theirs, attack.nobodys):
                own = await self._own(leaf.kind)
                stream = BASES[method](own)
                if not leaf.set(stream, value):
                    return
                _follow(method, leaf, stream, value)
                if other is not None and not other.set(stream, hostile):
                    return
                hide = {str(attack.theirs): "<named>", str(attack.nobodys): "<named>"}
                outcomes.append(await self._world.call(method, stream, caller, hide))
                await self._tidy(leaf.kind, value, outcomes[-1])
            variation = f"{other.name}={hostile!r}" if other else ""
            at = f"{method}.{leaf.name} [{attack.name}] as {who} {variation}"
            self._judge(method, leaf, who, at, outcomes, varied=other is not None)
            self.report.attacks.add((method, leaf.name, attack.name))

    def _judge(
        self, method: str, leaf: Leaf, who: str, at: str, outcomes: list[Outcome], *, varied: bool
    ) -> None:
        assert leaf.kind is not None
        report, (theirs, nobodys) = self.report, outcomes
        report.cases[method, leaf.name, leaf.kind] += 1
        report.calls += 2
        if theirs != nobodys:
            report.failures.append(f"{at}\n  theirs:  {theirs}\n  nobodys: {nobodys}")
        if leaf.kind is not Kind.ARCHIVE and CANARY in str(theirs):
            report.failures.append(f"{at}: shows what is the victim's: {theirs}")
        expected = self._expected(method, leaf, who)
        if not varied and theirs.code not in expected:
            report.failures.append(f"{at}: {theirs.code}, expected {sorted(expected)}")

    def _expected(self, method: str, leaf: Leaf, who: str) -> set[str]:
        assert leaf.kind is not None
        if who in {"revoked", "nobody"}:
            return {"UNAUTHENTICATED"}
        expected = _EXPECTED_OF.get((method, leaf.name), _EXPECTED[leaf.kind])
        # A lesser key may be refused for its scope first; an ignored field changes nothing.
        if who != "admin" or METHODS[method].name in {"CreateTenant", "DeleteTenant"}:
            expected = expected | DENIED
        if leaf.is_ignored_on_input or _names_what_is_made(method, leaf):
            expected = expected | {"OK"}
        return expected

    async def _own(self, kind: Kind | None) -> Own:
        world = self._world
        return await world.fresh(world.attacker) if kind in _CHANGING else world.attacker.own

    async def _tidy(self, kind: Kind | None, value: object, outcome: Outcome) -> None:
        """A name that was taken is free for the next call."""
        if kind is Kind.MEMORY_ID and outcome.code == "OK":
            await self._world.attacker.admin(
                self._world.served.memories.DeleteMemory,
                pb.DeleteMemoryRequest(name=f"memories/{value}"),
            )

    async def _attacks(self, method: str, leaf: Leaf) -> list[Attack]:
        world, kind = self._world, leaf.kind
        victim, own = world.victim, world.attacker.own
        if kind is Kind.PAGE_TOKEN:
            token = await self._token(method, leaf)
            altered = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
            return [Attack("token", token, altered)]
        if kind is Kind.REQUEST_ID:
            return [await self._used_request_id(method, leaf)]
        if kind is Kind.ARCHIVE:
            return [Attack("archive", *await self._two_archives())]
        if kind is Kind.ETAG or kind is Kind.UID:
            request = pb.GetMemoryRequest(name=victim.own.memory)
            found = await victim.admin(world.served.memories.GetMemory, request)
            if kind is Kind.UID:
                return [Attack("uid", found.uid, "0" * 32)]
            return [Attack("etag", found.etag, "0" * 16 + "-1")]
        key, tenant = victim.own.key.rpartition("/")[2], victim.tenant
        plain: dict[Kind | None, list[Attack]] = {
            Kind.MEMORY: [
                Attack("memory", victim.own.memory, NEVER),
                Attack("deleted memory", world.gone, NEVER),
            ],
            Kind.DOCUMENT: [
                Attack("document", f"{victim.own.memory}/documents/1", f"{NEVER}/documents/1"),
                Attack("deleted document", f"{world.gone}/documents/1", f"{NEVER}/documents/1"),
            ],
            Kind.TENANT: [Attack("tenant", tenant, NO_TENANT)],
            Kind.QUOTAS: [Attack("quotas", f"{tenant}/quotas", f"{NO_TENANT}/quotas")],
            Kind.API_KEY: [
                Attack("key", victim.own.key, f"{tenant}/apiKeys/{NO_KEY}"),
                Attack("tenant of a key", victim.own.key, f"{NO_TENANT}/apiKeys/{key}"),
                Attack(
                    "key under the own tenant",
                    f"{own.tenant}/apiKeys/{key}",
                    f"{own.tenant}/apiKeys/{NO_KEY}",
                ),
            ],
            Kind.RECEIPT: [
                Attack("receipt", victim.own.receipt, f"{tenant}/deletionReceipts/{NO_RECEIPT}"),
                Attack(
                    "receipt under the own tenant",
                    f"{own.tenant}/deletionReceipts/{victim.own.receipt.rpartition('/')[2]}",
                    f"{own.tenant}/deletionReceipts/{NO_RECEIPT}",
                ),
            ],
            Kind.MEMORY_ID: [Attack("memory id", "victim-memory", "never-was")],
            Kind.TENANT_ID: [Attack("tenant id", "victim", "never-was")],
        }
        return plain[kind]

    async def _token(self, method: str, leaf: Leaf) -> str:
        """A page token that was issued to the victim, or where it gets none, the operator."""
        served = self._world.served
        service = served.admin if "Admin" in METHODS[method].containing_service.name else None
        stub = getattr(service or served.memories, method)
        for holder in (self._world.victim.admin, served.as_operator):
            (request,) = BASES[method](self._world.victim.own)
            reply = await holder(stub, request)
            if reply.next_page_token:
                token: str = reply.next_page_token
                return token
        raise AssertionError(f"{method}.{leaf.name}: the world has no second page")

    async def _used_request_id(self, method: str, leaf: Leaf) -> Attack:
        """One with which the victim made the same call."""
        world, used = self._world, f"used-for-{method}"
        stream = BASES[method](await world.fresh(world.victim))
        leaf.set(stream, used)
        outcome = await world.call(method, stream, world.victim.admin, {})
        assert outcome.code == "OK", f"{method}: {outcome}"
        return Attack("request id", used, f"free-for-{method}")

    async def _two_archives(self) -> tuple[bytes, bytes]:
        """Of a memory that the victim has, and of one like it that it has no longer."""
        if self._archives is None:
            served, holder = self._world.served, self._world.victim.admin
            made: list[bytes] = []
            for name in ("kept-memory", "lost-memory"):
                memory = await make_memory(served, holder, name, CANARY)
                made.append(await export(served, holder, memory))
            await holder(
                served.memories.DeleteMemory, pb.DeleteMemoryRequest(name="memories/lost-memory")
            )
            self._archives = (made[0], made[1])
        return self._archives


def _names_what_is_made(method: str, leaf: Leaf) -> bool:
    """Name or etag in a resource that is to be made: its maker ignores them."""
    return method.startswith("Create") and leaf.name.endswith((".name", ".etag"))


#: What must go with a field for the request to be sound.
_FOLLOWERS: dict[tuple[str, str], Callable[[list[Message], object], None]] = {
    ("DeleteDocuments", "parent"): lambda stream, value: _names_below(stream[0], value),
}


def _follow(method: str, leaf: Leaf, stream: list[Message], value: object) -> None:
    follow = _FOLLOWERS.get((method, leaf.name))
    if follow is not None:
        follow(stream, value)


def _names_below(message: Message, parent: object) -> None:
    assert isinstance(message, pb.DeleteDocumentsRequest)
    message.names[:] = [f"{parent}/documents/1"]
