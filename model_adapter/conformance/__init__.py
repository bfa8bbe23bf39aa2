"""Does a worker keep the contract of model_adapter.v1? Asked over the wire, as memsvc would.

    harness.py    a connection, and memsvc's part as the writer of the store
    report.py     what a check found
    blocks.py     Encode: every document answered, blocks that fit, the same text the same block
    refusals.py   identities, limits and malformed requests, each with its typed error
    routing.py    Route: relevance, snapshots, deletions, tenants
    answers.py    Query: order of events, counts, limits, repeatability, cancellation
    suite.py      all checks in order

Run `python -m model_adapter.conformance ADDRESS --data-dir DIR`; docs/conformance.md says
what every check asks.
"""
