"""Conversations as LLaVA and ms-swift write them, where they are one question and its answer.

{"conversations": [{"from": "human", "value": "<image>\\nWhich?"}, {"from": "gpt", "value": "A"}], "image": "x.png"}
{"messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "A"}], "images": [...]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TURN_COLUMNS = ("conversations", "messages")
_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def split_turns(column: str, turns: object) -> dict[str, str]:
    """{"problem": ...}, and "answer" where the second turn gives it.

    Raises:
        ValueError: it is no conversation, or one of other turns than a question and its answer.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{column}={str(turns)[:80]!r} must be a list of turns, {{role, content}} or {{from, value}}")
    spoken = [speaker_and_text(column, turn) for turn in turns]
    speakers = [speaker for speaker, _ in spoken]
    if speakers not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"its {column} are the turns {', '.join(speakers) or 'of nobody'}; a sample is one question (user) and one "
            "answer (assistant). Cut the conversation into samples with the columns problem and answer, and put what a "
            "system turn says into the question"
        )
    return dict(zip(("problem", "answer"), (text for _, text in spoken), strict=False))


def speaker_and_text(column: str, turn: Mapping[str, Any]) -> tuple[str, str]:
    """user, assistant, system or whoever else it is, and what is said, an image as a mark.

    Raises:
        ValueError: it lacks one of both, or says it otherwise.
    """
    speaker, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(speaker, str) or not isinstance(text, str | list):
        raise ValueError(
            f"a turn of its {column} has {', '.join(turn)}; needed are role and content, or from and value"
        )
    return _SPEAKERS.get(speaker, speaker), text if isinstance(text, str) else "".join(map(_part, text))


def _part(part: object) -> str:
    """{"type": "text", "text": ...} or {"type": "image"}, whose image stands in the column of images."""
    match part:
        case {"type": "text", "text": str() as text}:
            return text
        case {"type": "image", **others} if not any(others.values()):
            return "<image>"
    raise ValueError(f"a part of a turn is {str(part)[:80]!r}; it must be text, or an image from the column images")
