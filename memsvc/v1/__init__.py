"""Generated from protos/memsvc/v1 by scripts/protos."""
