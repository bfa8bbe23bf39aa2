"""Which memory one was forked from, and at which of its revisions.

Revision 0009, after 0008.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("memories", sa.Column("forked_from", sa.String(length=32)))
    op.add_column("memories", sa.Column("forked_revision", sa.BigInteger()))


def downgrade() -> None:
    # A fork then is a memory like any other, whose revisions do not begin with 1.
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_column("memories", "forked_revision")
    op.drop_column("memories", "forked_from")
