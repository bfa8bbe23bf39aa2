"""What is durable: records, KV blocks, LMDB, the catalog, archives. No torch, no gRPC."""
