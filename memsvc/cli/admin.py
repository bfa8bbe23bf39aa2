"""`memsvc admin ...`: tenants, API keys, usage, quotas, audit, receipts. Needs an ADMIN key."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from memsvc.cli.output import moment, size
from memsvc.cli.session import Session, command
from memsvc.client import Scope
from memsvc.client.quotas import QUOTA_NAMES

admin_group = typer.Typer(
    help="Tenants, API keys, usage, quotas, audit trail, receipts.", no_args_is_help=True
)
tenant_group = typer.Typer(help="Tenants.", no_args_is_help=True)
key_group = typer.Typer(help="API keys of a tenant.", no_args_is_help=True)
admin_group.add_typer(tenant_group, name="tenant")
admin_group.add_typer(key_group, name="key")

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="Id or name of the tenant.")]
TenantOption = Annotated[str, typer.Option("--tenant", help="Id or name of the tenant.")]


@command(tenant_group, "create")
def create_tenant(
    session: Session,
    tenant: TenantArgument,
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
) -> None:
    """Makes a tenant."""
    with session.client() as client:
        made = client.admin.create_tenant(tenant, display_name=display_name)
    session.output.result(made, f"Created {made.name}.")


@command(tenant_group, "update")
def update_tenant(
    session: Session,
    tenant: TenantArgument,
    *,
    display_name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    default_model: Annotated[
        str | None, typer.Option(help="Model of its memories; empty: the server's.")
    ] = None,
) -> None:
    """Changes a tenant's name or default model."""
    with session.client() as client:
        row = client.admin.update_tenant(
            tenant, display_name=display_name, default_model=default_model
        )
    session.output.result(row, f"Updated {row.name}.")


@command(tenant_group, "list")
def list_tenants(session: Session) -> None:
    """Lists tenants, newest first."""
    with session.client() as client:
        tenants = list(client.admin.iterate_tenants())
    session.output.rows(
        tenants,
        ("Tenant", "Name", "Created"),
        ((t.name.removeprefix("tenants/"), t.display_name, moment(t.create_time)) for t in tenants),
        empty="There are no tenants.",
    )


@command(tenant_group, "delete")
def delete_tenant(session: Session, tenant: TenantArgument) -> None:
    """Deletes a tenant with everything in it. There is no way back."""
    with session.client() as client:
        client.admin.delete_tenant(tenant)
    session.output.result({"deleted": tenant}, f"Deleted {tenant}.")


@command(admin_group, "workers")
def list_workers(session: Session) -> None:
    """Lists the workers that the server knows; operator's key only."""
    with session.client() as client:
        workers = client.admin.list_workers()
    session.output.rows(
        workers,
        ("Worker", "State", "Model", "Device", "Resident", "Running", "Waiting", "Identity"),
        (
            (
                worker.address,
                str(worker.state),
                worker.model.removeprefix("models/"),
                f"{worker.device} {worker.compute_dtype}".strip(),
                str(worker.resident_memories),
                str(worker.running_queries),
                str(worker.waiting_queries),
                worker.identity[:16],
            )
            for worker in workers
        ),
        empty="No worker is known.",
    )


@command(key_group, "create")
def create_key(
    session: Session,
    scope: Annotated[Scope, typer.Argument(help="What the key may do.")],
    *,
    tenant: TenantOption = "default",
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    expires: Annotated[datetime | None, typer.Option(help="When it ends; else never.")] = None,
    memories: Annotated[
        list[str] | None, typer.Option("--memory", help="A memory it reaches; else all.")
    ] = None,
) -> None:
    """Makes a key and prints its secret, which cannot be shown again."""
    with session.client() as client:
        made = client.admin.create_api_key(
            tenant, scope, display_name=display_name, expire_time=expires, memories=memories or ()
        )
    session.output.note(f"{made.api_key.name}; the secret is shown this once:")
    session.output.result(made, made.secret)


@command(key_group, "list")
def list_keys(session: Session, tenant: TenantOption = "default") -> None:
    """Lists a tenant's keys, revoked ones included."""
    with session.client() as client:
        keys = list(client.admin.iterate_api_keys(tenant))
    session.output.rows(
        keys,
        ("Key", "Name", "Scope", "Memories", "Created", "Expires", "Revoked"),
        (
            (
                key.name,
                key.display_name,
                "operator" if key.operator else str(key.scope),
                " ".join(name.removeprefix("memories/") for name in key.memories),
                moment(key.create_time),
                moment(key.expire_time),
                moment(key.revoke_time),
            )
            for key in keys
        ),
        empty="There are no keys.",
    )


@command(key_group, "revoke")
def revoke_key(
    session: Session,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Whole name of the key.")],
) -> None:
    """Revokes a key at once."""
    with session.client() as client:
        revoked = client.admin.revoke_api_key(key)
    session.output.result(revoked, f"Revoked {revoked.name}.")


@command(key_group, "rotate")
def rotate_key(
    session: Session,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Whole name of the key.")],
    grace_hours: Annotated[
        float, typer.Option(min=0, max=720, help="How long the old key still works.")
    ] = 24,
    expires: Annotated[
        datetime | None, typer.Option(help="When the new one ends; else as the old one lived.")
    ] = None,
) -> None:
    """Makes a key of the same rights and prints its secret; the old one ends after a grace time."""
    with session.client() as client:
        made = client.admin.rotate_api_key(
            key, grace=timedelta(hours=grace_hours), expire_time=expires
        )
    session.output.note(
        f"{made.api_key.name}; the old key ends {moment(made.previous.revoke_time)}; "
        "the secret is shown this once:"
    )
    session.output.result(made, made.secret)


@command(admin_group, "usage")
def usage(session: Session, tenant: TenantOption = "default") -> None:
    """Shows what a tenant holds and has used."""
    with session.client() as client:
        used = client.admin.usage(tenant)
    session.output.fields(
        used,
        [
            ("tenant", used.name),
            ("memories", str(used.memories)),
            ("documents", f"{used.documents} ({size(used.text_bytes)} of text)"),
            ("blocks", size(used.block_bytes)),
            ("queries", str(used.queries)),
            ("question tokens", str(used.question_tokens)),
            ("answer tokens", str(used.answer_tokens)),
            ("encoded tokens", str(used.encoded_tokens)),
        ],
    )


@command(admin_group, "quotas")
def quotas(
    session: Session,
    tenant: TenantOption = "default",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="name=value; 0 takes the tenant's own limit away. Operator only."
        ),
    ] = None,
) -> None:
    """Shows what a tenant may use, and changes it."""
    limits = dict(map(_limit, change or ()))
    with session.client() as client:
        found = client.admin.set_quotas(tenant, limits) if limits else client.admin.quotas(tenant)
    session.output.fields(
        found,
        [
            (name, f"{limit or 'none'}{' (its own)' if name in found.own else ''}")
            for name, limit in found.effective.items()
        ],
    )


def _limit(change: str) -> tuple[str, int]:
    name, _, value = change.partition("=")
    if name not in QUOTA_NAMES or not value.isascii() or not value.isdecimal():
        raise typer.BadParameter(
            f"name=value with one of {', '.join(QUOTA_NAMES)}", param_hint="--set"
        )
    return name, int(value)


@command(admin_group, "audit")
def audit(
    session: Session,
    tenant: TenantOption = "default",
    limit: Annotated[int, typer.Option(min=1, help="Most entries to show.")] = 50,
) -> None:
    """Shows who did what, newest first: administrative and destructive acts."""
    with session.client() as client:
        events = list(islice(client.admin.iterate_audit_events(tenant), limit))
    session.output.rows(
        events,
        ("Entry", "Time", "Who", "What", "Of", "Outcome"),
        (
            (str(e.sequence), moment(e.time), e.actor, e.action, e.resource, e.outcome)
            for e in events
        ),
        empty="There are no entries.",
    )


@command(admin_group, "receipts")
def receipts(
    session: Session,
    tenant: TenantOption = "default",
    limit: Annotated[int, typer.Option(min=1, help="Most receipts to show.")] = 50,
    save: Annotated[
        Path | None, typer.Option(help="Folder to write them to, one file each.")
    ] = None,
) -> None:
    """Shows what was destroyed, newest first: signed receipts of deletions.

    What is saved can be verified without the server (`memsvc verify-receipt`), and lets a
    restore of an older backup delete again what was deleted since.
    """
    with session.client() as client:
        found = list(islice(client.admin.iterate_deletion_receipts(tenant), limit))
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        for one in found:
            (save / f"{one.name.rpartition('/')[2]}.json").write_bytes(one.receipt)
    session.output.rows(
        found,
        ("Receipt", "Time", "Memory", "Documents", "Texts", "Blocks", "Workers"),
        (
            (
                one.name.rpartition("/")[2],
                moment(one.issue_time),
                one.memory_uid,
                one.documents or "all",
                str(one.texts),
                str(one.blocks),
                f"{one.workers_wiped} of {one.workers_wiped + one.workers_owed}",
            )
            for one in found
        ),
        empty="There are no receipts.",
    )
