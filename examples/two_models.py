"""Moves a memory from one model to another while it answers, and asks both.

Needs MEMSVC_ADDRESS and MEMSVC_API_KEY of a server with two models, for instance the default
one at two pooling sizes:

    memsvc worker --model default --listen unix:/tmp/one.sock &
    memsvc worker --model default:pool_tokens=16 --listen unix:/tmp/two.sock &
    memsvc serve --worker-address unix:/tmp/one.sock,unix:/tmp/two.sock &
    python -m examples.two_models

The same texts have other blocks under each: another pooling size is another model.
"""

from __future__ import annotations

import sys

from memsvc.client import Client, FailedPreconditionError, Turn

TOLD = (
    "I moved from Graz to Lisbon in March.",
    "My sister Olga repaired the boiler with a valve from Denmark.",
    "We named the cat Mittens because of her white paws.",
)
QUESTION = "Where did I move to?"


def main() -> int:
    with Client.from_environment() as client:
        models = list(client.models.iterate())
        old = next((m.name for m in models if m.default_model), "")
        new = next((m.name for m in models if not m.default_model), "")
        if not (old and new):
            print("This server has seen fewer than two models.")
            return 1
        memory = client.memories.create()
        handle = client.memory(memory.name)
        handle.append([Turn("user", text, speaker="Anna") for text in TOLD])
        print(f"{old}: {handle.ask(QUESTION).text}")
        client.models.attach(memory.name, new, make_default=True)
        for progress in handle.watch():
            for encoding in progress.encodings:
                print(f"  {encoding.model}: {encoding.encoded_documents} documents encoded")
            if progress.default_model == new:
                break
        for model in (old, new):
            answer = handle.ask(QUESTION, model=model)
            print(f"{model}: {answer.text}")
        client.models.detach(memory.name, old)
        try:
            handle.ask(QUESTION, model=old)
        except FailedPreconditionError as error:
            print(f"{old} is gone from this memory: {error.reason}")
        client.memories.delete(memory.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
