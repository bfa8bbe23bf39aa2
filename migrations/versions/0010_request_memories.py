"""Which memory an answered request wrote to.

What was recorded before has none, and is compared by its payload alone.
Revision 0010, after 0009.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column(
        "requests",
        sa.Column("memory_uid", sa.String(length=32), server_default=sa.text("''"), nullable=False),
    )


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_column("requests", "memory_uid")
