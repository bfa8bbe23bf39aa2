"""How well a memory finds and answers: `python -m benchmarks.quality` (docs/quality.md)."""
