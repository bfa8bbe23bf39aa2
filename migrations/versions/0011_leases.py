"""Leases: which server process leads which tenant.

Revision 0011, after 0010. The rows belong to running processes: a downgrade drops them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "servers",
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_servers")),
    )
    op.create_table(
        "leases",
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("server_uid", sa.String(length=32), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_uid"],
            ["tenants.uid"],
            name=op.f("fk_leases_tenant_uid_tenants"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_uid", name=op.f("pk_leases")),
    )
    op.create_index(op.f("ix_leases_server_uid"), "leases", ["server_uid"], unique=False)


def downgrade() -> None:
    op.drop_table("leases")
    op.drop_table("servers")
