"""The worker that holds one MSA model: encode, route, generate."""
