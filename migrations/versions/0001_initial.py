"""Initial.

Revision 0001, the first: tenants, memories, documents, encodings.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_tenant_uid_id"), "audit", ["tenant_uid", "id"], unique=False)

    op.create_table(
        "models",
        sa.Column("model_id", sa.String(length=256), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("identity", sa.String(length=128), nullable=False),
        sa.Column("layout", sa.Text(), nullable=False),
        sa.Column("max_document_tokens", sa.Integer(), nullable=False),
        sa.Column("max_question_tokens", sa.Integer(), nullable=False),
        sa.Column("max_answer_tokens", sa.Integer(), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("last_seen_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_models")),
    )
    op.create_table(
        "tenants",
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=256), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_tenants")),
        sa.UniqueConstraint("tenant_id", name=op.f("uq_tenants_tenant_id")),
    )
    op.create_index(
        op.f("ix_tenants_created_us_uid"), "tenants", ["created_us", "uid"], unique=False
    )

    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=256), nullable=False),
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("operator", sa.Boolean(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=True),
        sa.Column("revoked_us", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "scope IN ('read', 'read_write', 'admin')", name=op.f("ck_api_keys_scope")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_uid"],
            ["tenants.uid"],
            name=op.f("fk_api_keys_tenant_uid_tenants"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
    )
    op.create_index(
        op.f("ix_api_keys_tenant_uid_created_us_key_id"),
        "api_keys",
        ["tenant_uid", "created_us", "key_id"],
        unique=False,
    )

    op.create_table(
        "memories",
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("memory_id", sa.String(length=256), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("packing_mode", sa.String(length=16), nullable=False),
        sa.Column("window_turns", sa.Integer(), nullable=False),
        sa.Column("max_document_bytes", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.Column("deletion_epoch", sa.BigInteger(), nullable=False),
        sa.Column("document_count", sa.BigInteger(), nullable=False),
        sa.Column("text_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "packing_mode IN ('turn', 'window', 'session')", name=op.f("ck_memories_packing_mode")
        ),
        sa.CheckConstraint(
            "state IN ('active', 'importing', 'deleting')", name=op.f("ck_memories_state")
        ),
        sa.CheckConstraint(
            "document_count >= 0 AND text_bytes >= 0", name=op.f("ck_memories_counters")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_uid"], ["tenants.uid"], name=op.f("fk_memories_tenant_uid_tenants")
        ),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_memories")),
    )
    op.create_index(
        "ix_memories_state_not_active",
        "memories",
        ["state"],
        unique=False,
        sqlite_where=sa.text("state != 'active'"),
        postgresql_where=sa.text("state != 'active'"),
    )
    op.create_index(
        op.f("ix_memories_tenant_uid_created_us_uid"),
        "memories",
        ["tenant_uid", "created_us", "uid"],
        unique=False,
    )
    op.create_index(
        "uq_memories_tenant_uid_memory_id",
        "memories",
        ["tenant_uid", "memory_id"],
        unique=True,
        sqlite_where=sa.text("state != 'deleting'"),
        postgresql_where=sa.text("state != 'deleting'"),
    )

    op.create_table(
        "requests",
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("request_id", sa.String(length=256), nullable=False),
        sa.Column("method", sa.String(length=128), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("reply", sa.LargeBinary(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_uid"],
            ["tenants.uid"],
            name=op.f("fk_requests_tenant_uid_tenants"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_uid", "request_id", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_created_us"), "requests", ["created_us"], unique=False)

    op.create_table(
        "usage",
        sa.Column("tenant_uid", sa.String(length=32), nullable=False),
        sa.Column("queries", sa.BigInteger(), nullable=False),
        sa.Column("question_tokens", sa.BigInteger(), nullable=False),
        sa.Column("answer_tokens", sa.BigInteger(), nullable=False),
        sa.Column("encoded_tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_uid"],
            ["tenants.uid"],
            name=op.f("fk_usage_tenant_uid_tenants"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_uid", name=op.f("pk_usage")),
    )
    op.create_table(
        "documents",
        sa.Column("memory_uid", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("revision_added", sa.BigInteger(), nullable=False),
        sa.Column("revision_removed", sa.BigInteger(), nullable=True),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("text_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_uid"],
            ["memories.uid"],
            name=op.f("fk_documents_memory_uid_memories"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_uid", "number", name=op.f("pk_documents")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_documents_removed",
        "documents",
        ["memory_uid", "number"],
        unique=False,
        sqlite_where=sa.text("revision_removed IS NOT NULL"),
        postgresql_where=sa.text("revision_removed IS NOT NULL"),
    )

    op.create_table(
        "encodings",
        sa.Column("memory_uid", sa.String(length=32), nullable=False),
        sa.Column("model_id", sa.String(length=256), nullable=False),
        sa.Column("identity", sa.String(length=128), nullable=False),
        sa.Column("encoded_number", sa.BigInteger(), nullable=False),
        sa.Column("pending_documents", sa.BigInteger(), nullable=False),
        sa.Column("pending_bytes", sa.BigInteger(), nullable=False),
        sa.Column("waiting_since_us", sa.BigInteger(), nullable=True),
        sa.Column("quarantined_documents", sa.BigInteger(), nullable=False),
        sa.Column("quarantined_bytes", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "pending_documents >= 0 AND pending_bytes >= 0", name=op.f("ck_encodings_pending")
        ),
        sa.CheckConstraint("quarantined_documents >= 0", name=op.f("ck_encodings_quarantined")),
        sa.CheckConstraint("tokens >= 0 AND bytes >= 0", name=op.f("ck_encodings_sizes")),
        sa.ForeignKeyConstraint(
            ["memory_uid"],
            ["memories.uid"],
            name=op.f("fk_encodings_memory_uid_memories"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_uid", "model_id", name=op.f("pk_encodings")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_encodings_waiting",
        "encodings",
        ["model_id", "waiting_since_us"],
        unique=False,
        sqlite_where=sa.text("pending_documents > 0"),
        postgresql_where=sa.text("pending_documents > 0"),
    )

    op.create_table(
        "quarantined_documents",
        sa.Column("memory_uid", sa.String(length=32), nullable=False),
        sa.Column("model_id", sa.String(length=256), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("text_bytes", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_uid", "model_id"],
            ["encodings.memory_uid", "encodings.model_id"],
            name=op.f("fk_quarantined_documents_memory_uid_model_id_encodings"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "memory_uid", "model_id", "number", name=op.f("pk_quarantined_documents")
        ),
    )


def downgrade() -> None:
    # Indices go with their tables.
    op.drop_table("quarantined_documents")
    op.drop_table("encodings")
    op.drop_table("documents")
    op.drop_table("usage")
    op.drop_table("requests")
    op.drop_table("memories")
    op.drop_table("api_keys")
    op.drop_table("tenants")
    op.drop_table("models")
    op.drop_table("audit")
