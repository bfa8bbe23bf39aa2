"""Generated from protos/model_adapter/v1 by scripts/protos."""
