"""Tenants that are being deleted are marked, so that a restart finishes it.

Revision 0006, after 0005.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("tenants", sa.Column("deleting_us", sa.BigInteger()))


def downgrade() -> None:
    # A tenant that is marked then counts as any other again: deleting it is to be repeated.
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    with op.batch_alter_table("tenants") as batch:
        batch.drop_column("deleting_us")
