"""The encoding queue: stored documents become KV blocks in the background.

    pressure.py   how much waits, how fast it is worked off, when to refuse writes
    texts.py      what a batch is made of: rendered texts out of the tenant's store
    agenda.py     which of the memories placed on a worker are next, in two lines
    share.py      how much of the time the second line gets
    plan.py       which memory's documents are next
    batch.py      a batch and what is known of it
    looks.py      one look at a watermark for all who wait for it
    pipeline.py   batches on their way through a worker into the store
    queue.py      EncodingQueue: one pipeline per served model, and waiting for them

The queue itself is the catalog: a watermark per (memory, model). What is here
can be lost at any moment and is found again from there.
"""

from memsvc.encoding.queue import EncodingQueue

__all__ = ["EncodingQueue"]
