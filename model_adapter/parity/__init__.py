"""Comparison with golden vectors of the published implementation (docs/parity.md)."""
