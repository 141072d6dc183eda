"""Captions: one reading for every source, for prompts and for training.

A caption is text in strict UTF-8. White space, line breaks included, is one blank; nothing else is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sjd2_lightning.run.files import text_of

CAPTION_FIELDS = ("caption", "text", "prompt", "txt")
NO_CAPTION = "no caption"


def plain_caption(value: Any) -> str:
    """A caption from what a source holds of it.

    Args:
        value: text, its bytes, or a list of which the first that is not empty counts.

    Raises:
        ValueError: there is no visible text in it, or it is not UTF-8.
    """
    if isinstance(value, list | tuple):
        value = next((entry for entry in value if isinstance(entry, str | bytes) and entry.strip()), None)
    if isinstance(value, bytes):
        value = text_of(value)
    if not isinstance(value, str):
        raise ValueError(NO_CAPTION)
    text = " ".join(value.removeprefix("\ufeff").split())
    if any(0xD800 <= ord(char) < 0xE000 for char in text):  # bytes of another encoding, or half a character
        raise ValueError("not UTF-8; save it as UTF-8")
    if not any(char.isprintable() and char != " " for char in text):
        raise ValueError(NO_CAPTION)
    return text


def caption_in(fields: Mapping[str, Any], names: Sequence[str] = CAPTION_FIELDS) -> str:
    """The first caption among some fields; ValueError if there is none, or it is not UTF-8."""
    for name in names:
        try:
            return plain_caption(fields.get(name))
        except ValueError as error:
            if str(error) != NO_CAPTION:
                raise
    raise ValueError(NO_CAPTION)


def caption_of_json(content: bytes) -> str:
    """The caption in the JSON object of a sample; ValueError if there is none, or it cannot be read."""
    fields = json_of(content)
    return caption_in(fields if isinstance(fields, dict) else {})


def json_of(content: bytes) -> Any:
    """What a JSON file holds; ValueError if it is no JSON in UTF-8."""
    try:
        return json.loads(text_of(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    except RecursionError:
        raise ValueError("no JSON that can be read (nested too deeply)") from None
