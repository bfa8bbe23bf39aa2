"""Training of adapters: routers and low-rank deltas (paper section 3.3; docs/training.md)."""
