"""Comparison with golden vectors of the published implementation (tests/golden/README.md)."""
