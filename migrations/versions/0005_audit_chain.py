"""The audit trail as a chain that nothing changes.

Revision 0005, after 0004. Entries from before have no place in a chain and keep none.

The triggers refuse UPDATE, DELETE and TRUNCATE to every client. A later migration that
copies the table (SQLite's batches do) must make them again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_INDEX = "ix_audit_tenant_uid_sequence"


def upgrade() -> None:
    if _postgres():
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("audit", sa.Column("sequence", sa.BigInteger()))
    outcome = sa.Column("outcome", sa.Text(), server_default=sa.text("''"), nullable=False)
    op.add_column("audit", outcome)
    op.add_column("audit", sa.Column("digest", sa.LargeBinary()))
    op.create_index(_INDEX, "audit", ["tenant_uid", "sequence"], unique=True)
    for statement in _POSTGRES_GUARD if _postgres() else _SQLITE_GUARD:
        op.execute(statement)


def downgrade() -> None:
    if _postgres():
        op.execute("SET LOCAL lock_timeout = '5s'")
        op.execute("DROP TRIGGER audit_append_only ON audit")
        op.execute("DROP TRIGGER audit_no_truncate ON audit")
        op.execute("DROP FUNCTION audit_append_only()")
    else:
        op.execute("DROP TRIGGER audit_no_update")
        op.execute("DROP TRIGGER audit_no_delete")
    op.drop_index(_INDEX, "audit")
    with op.batch_alter_table("audit") as batch:
        for column in ("digest", "outcome", "sequence"):
            batch.drop_column(column)


def _postgres() -> bool:
    return op.get_context().dialect.name == "postgresql"


_SQLITE_GUARD = tuple(
    f"CREATE TRIGGER audit_no_{verb} BEFORE {verb.upper()} ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END"
    for verb in ("update", "delete")
)

_POSTGRES_GUARD = (
    """
    CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the audit trail is only added to'; END $$
    """,
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit "
    "FOR EACH ROW EXECUTE FUNCTION audit_append_only()",
    "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit "
    "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()",
)
