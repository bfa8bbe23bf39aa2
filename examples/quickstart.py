"""Remember something, then ask for it. Needs MEMSVC_ADDRESS and MEMSVC_API_KEY."""

from memsvc.client import Client, Turn

with Client.from_environment() as client:
    client.memories.create("anna")
    anna = client.memory("anna")
    anna.append(
        [
            Turn("user", "I moved from Graz to Lisbon in March.", speaker="Anna"),
            Turn("assistant", "How do you like the harbour?"),
            Turn("user", "I love it, I run there every morning.", speaker="Anna"),
        ]
    )
    answer = anna.ask("Where does Anna live now?")
    print(answer.text)
    for citation in answer.citations:
        print(citation.document, citation.content)
