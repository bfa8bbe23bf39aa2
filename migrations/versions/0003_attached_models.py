"""Attached models.

Until now every memory was encoded under every known model and the server's default
answered. From here on a memory has the models attached to it, one of which answers.
What is encoded stays attached.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NAME = sa.String(length=256)


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column(
        "tenants",
        sa.Column("default_model_id", _NAME, nullable=False, server_default=sa.text("''")),
    )
    for column in (
        sa.Column("default_model_id", _NAME, nullable=False, server_default=sa.text("''")),
        sa.Column("next_model_id", _NAME, nullable=False, server_default=sa.text("''")),
        sa.Column("own_model", sa.Boolean(), nullable=False, server_default=sa.false()),
    ):
        op.add_column("memories", column)
    op.add_column(
        "encodings", sa.Column("complete", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.execute(
        "UPDATE memories SET default_model_id = "
        "COALESCE((SELECT model_id FROM models WHERE is_default), '')"
    )
    op.execute(
        "UPDATE encodings SET complete = "
        "(pending_documents = 0 OR model_id IN (SELECT model_id FROM models WHERE is_default))"
    )


def downgrade() -> None:
    op.drop_column("encodings", "complete")
    for column in ("own_model", "next_model_id", "default_model_id"):
        op.drop_column("memories", column)
    op.drop_column("tenants", "default_model_id")
