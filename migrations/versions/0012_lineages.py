"""Lineages: a fork shows rows of documents of the memories it comes from.

Revision 0012, after 0011. Forks from before have rows of their own, and keep them. A downgrade
gives every fork such rows, and drops those of memories that are gone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _limit_waits()
    op.create_table(
        "lineages",
        sa.Column("memory_uid", sa.String(length=32), nullable=False),
        sa.Column("first_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("owner_uid", sa.String(length=32), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_uid"],
            ["memories.uid"],
            name=op.f("fk_lineages_memory_uid_memories"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["owner_uid"], ["memories.uid"], name=op.f("fk_lineages_owner_uid_memories")
        ),
        sa.PrimaryKeyConstraint("memory_uid", "first_number", name=op.f("pk_lineages")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_lineages_owner_uid"), "lineages", ["owner_uid"], unique=False)
    op.add_column("memories", sa.Column("purged_us", sa.BigInteger()))


def downgrade() -> None:
    _limit_waits()
    op.execute(
        "INSERT INTO documents "
        "(memory_uid, number, revision_added, revision_removed, created_us, text_bytes) "
        "SELECT l.memory_uid, d.number, d.revision_added, NULL, d.created_us, d.text_bytes "
        "FROM lineages l JOIN documents d ON d.memory_uid = l.owner_uid "
        "AND d.number BETWEEN l.first_number AND l.last_number "
        "WHERE NOT EXISTS (SELECT 1 FROM documents own "
        "WHERE own.memory_uid = l.memory_uid AND own.number = d.number)"
    )
    op.execute("DELETE FROM documents WHERE revision_removed = 0")
    op.drop_table("lineages")
    op.execute(
        "DELETE FROM documents WHERE memory_uid IN "
        "(SELECT uid FROM memories WHERE purged_us IS NOT NULL)"
    )
    op.execute("DELETE FROM memories WHERE purged_us IS NOT NULL")
    op.drop_column("memories", "purged_us")


def _limit_waits() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
