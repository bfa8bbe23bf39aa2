"""Revisions.

One row per write. What earlier writes added is read from the documents that are left of
them; deletions before this are not known.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "revisions",
        sa.Column("memory_uid", sa.String(length=32), nullable=False),
        sa.Column("revision", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("documents_added", sa.BigInteger(), nullable=False),
        sa.Column("documents_removed", sa.BigInteger(), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_uid"],
            ["memories.uid"],
            name=op.f("fk_revisions_memory_uid_memories"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_uid", "revision", name=op.f("pk_revisions")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_revisions_memory_uid_created_us_revision"),
        "revisions",
        ["memory_uid", "created_us", "revision"],
        unique=False,
    )
    op.execute(
        "INSERT INTO revisions (memory_uid, revision, created_us, documents_added, "
        "documents_removed, last_number) "
        "SELECT memory_uid, revision_added, MAX(created_us), COUNT(*), 0, MAX(number) "
        "FROM documents GROUP BY memory_uid, revision_added"
    )


def downgrade() -> None:
    op.drop_table("revisions")
