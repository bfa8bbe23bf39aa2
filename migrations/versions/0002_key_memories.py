"""API keys for some memories only.

Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("api_keys", sa.Column("memories", sa.Text()))


def downgrade() -> None:
    # Without its list a key would reach every memory: such keys end.
    op.execute("DELETE FROM api_keys WHERE memories IS NOT NULL")
    with op.batch_alter_table("api_keys") as batch:
        batch.drop_column("memories")
