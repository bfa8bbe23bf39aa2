"""Memory sparse attention (arXiv 2603.23516) in plain torch."""
