"""Alembic's entry: runs migrations on the connection that storage.catalog.schema hands over.

`alembic -c migrations/alembic.ini -x url=URL ...` works too, for making revisions;
its transaction and locks are the same.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from storage.catalog.database import database_url
from storage.catalog.errors import SchemaError
from storage.catalog.schema import run_locked
from storage.catalog.tables import metadata


def run_on(connection: Connection) -> None:
    """Runs what was asked for inside the connection's transaction."""
    sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # SQLite alters little in place: a batch copies the table.
        render_as_batch=sqlite,
        # Alembic assumes that SQLite's DDL commits by itself; under our BEGIN it does not.
        transactional_ddl=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run() -> None:
    """Online on a given connection or URL, or offline as a script of SQL."""
    given = context.config.attributes.get("connection")
    if isinstance(given, Connection):
        run_on(given)
        return
    url = context.get_x_argument(as_dictionary=True).get("url")
    if not isinstance(url, str):
        raise SchemaError("no database: give -x url=URL")
    if context.is_offline_mode():
        dialect = database_url(url).get_backend_name()
        context.configure(dialect_name=dialect, target_metadata=metadata, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    run_locked(url, run_on)


run()
