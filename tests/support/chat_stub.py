"""A stand-in for somebody else's chat endpoint: it quotes the sources that it is given."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "sk-of-somebody-else"


@dataclass
class ChatStub:
    """requests: bodies as they came. reply: what to send instead of a quotation.

    status: other than 200 to refuse.
    """

    base_url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    reply: bytes = b""
    status: int = 200

    def respond(self, body: dict[str, Any]) -> bytes:
        self.requests.append(body)
        if self.reply:
            return self.reply
        sources = re.findall(r"^\[(\d+)\] (.*)$", body["messages"][-1]["content"], re.MULTILINE)
        text = "".join(f"It says: {text} [{number}]\n" for number, text in sources[:1])
        message = {"role": "assistant", "content": f"{text}Nothing else, not [999]."}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


@contextmanager
def chat_stub() -> Iterator[ChatStub]:
    """A running endpoint on a port of its own."""
    stub = ChatStub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.headers["Authorization"] == f"Bearer {API_KEY}"
            right = self.path == "/v1/chat/completions"
            status = stub.status if known and right else 401 if right else 404
            data = stub.respond(body) if status == 200 else b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()
