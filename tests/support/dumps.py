"""Small dumps in the formats of other services. Their content is made up."""

from __future__ import annotations

import json
from typing import Any


def _node(name: str, parent: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": name, "parent": parent, "children": [], "message": message}


def _said(role: str, *parts: object, at: float | None = 1_710_000_000.5) -> dict[str, Any]:
    return {
        "id": "m",
        "author": {"role": role, "name": None, "metadata": {}},
        "create_time": at,
        "content": {"content_type": "text", "parts": list(parts)},
        "metadata": {},
        "recipient": "all",
    }


CHATGPT: Any = [
    {
        "title": "Boilers",
        "create_time": 1_710_000_000.0,
        "conversation_id": "c-1",
        "current_node": "answer-2",
        "mapping": {
            "root": _node("root", None, None),
            "system": _node("system", "root", _said("system", "")),
            "ask": _node("ask", "system", _said("user", "Who repairs boilers?", {"asset": "x"})),
            "answer-1": _node("answer-1", "ask", _said("assistant", "An answer that was dropped.")),
            "answer-2": _node(
                "answer-2", "ask", _said("assistant", "Olga does.", at=1_710_000_060)
            ),
        },
    },
    {"title": "Empty", "id": "c-2", "current_node": None, "mapping": {}},
]

CLAUDE: Any = [
    {
        "uuid": "u-1",
        "name": "Herons",
        "created_at": "2025-03-01T10:00:00.000000Z",
        "account": {"uuid": "a"},
        "chat_messages": [
            {
                "uuid": "m-1",
                "text": "Where do herons nest?",
                "content": [{"type": "text", "text": "Where do herons nest?"}],
                "sender": "human",
                "created_at": "2025-03-01T10:00:01.000000Z",
                "attachments": [{"file_name": "n.txt", "extracted_content": "Notes on herons."}],
                "files": [],
            },
            {
                "uuid": "m-2",
                "text": "In trees.",
                "content": [
                    {"type": "tool_use", "name": "search", "input": {}},
                    {"type": "text", "text": "In trees,"},
                    {"type": "text", "text": "near water."},
                ],
                "sender": "assistant",
                "created_at": "2025-03-01T10:00:05Z",
                "attachments": [],
            },
        ],
    }
]

LETTA: Any = {
    "agents": [
        {
            "id": "agent-0",
            "name": "gardener",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "instructions"}]},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "The roses are by the wall."}],
                    "created_at": "2025-05-01T08:00:00+00:00",
                },
                {"role": "assistant", "content": "Noted.", "created_at": "2025-05-01T08:00:02"},
                {"role": "tool", "content": [{"type": "text", "text": "OK"}]},
            ],
        }
    ],
    "blocks": [
        {"id": "block-0", "label": "human", "value": "Grows roses."},
        {"id": "block-1", "label": "empty", "value": ""},
    ],
    "tools": [],
}

LETTA_OLD: Any = {
    "name": "older",
    "agent_type": "memgpt_agent",
    "core_memory": [{"label": "persona", "value": "I keep notes.", "limit": 2000}],
    "messages": [{"role": "user", "text": "Hello there", "created_at": "2024-05-01T08:00:00"}],
}

MEM0: Any = {
    "results": [
        {
            "id": "m-1",
            "memory": "Likes tea without sugar",
            "user_id": "ann",
            "categories": ["food", "habits"],
            "created_at": "2025-01-02T03:04:05.000-08:00",
            "updated_at": None,
        },
        {"id": "m-2", "memory": "Lives in Graz", "user_id": "ann", "created_at": None},
    ]
}

DUMPS: dict[str, Any] = {"chatgpt": CHATGPT, "claude": CLAUDE, "letta": LETTA, "mem0": MEM0}


def encoded(dump: object) -> bytes:
    """As a file holds it."""
    return json.dumps(dump).encode()
