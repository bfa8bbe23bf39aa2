"""Alembic migrations of the catalog. Run them through storage.catalog.migrate."""
