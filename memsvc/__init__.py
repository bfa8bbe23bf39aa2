"""Memory as a Service: the public API server, its client and its command line."""
