"""${message}.

Revision ${up_revision}, after ${down_revision}.

Rules for a migration:
- One head: revision ids are counted up (0002, 0003, ...), and each names the one before.
- It runs on SQLite and PostgreSQL, up and down, with data in the tables; tests/catalog proves it.
- Short: all of an upgrade is one transaction with an exclusive lock on what it alters. Schema here;
  a change to many rows goes in batches of its own, after the release that can read both forms.
- It comes with tests/catalog/rows/${up_revision}.sql: rows that fill what it adds.
- PostgreSQL: whoever runs it has set lock_timeout and statement_timeout (storage/catalog/schema.py),
  so that it gives up instead of queueing every query behind it. Add a column nullable or with a constant
  default; add a constraint NOT VALID, then validate it in the next revision.
- SQLite: alter through `with op.batch_alter_table(...)`, which copies the table. Foreign keys are off
  meanwhile and checked at the end.
- Never import storage.catalog.tables here: it moves on, this file does not.
- A release's code works with its own revision only; dropping or renaming waits for the release after
  the last one that used the old name.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
