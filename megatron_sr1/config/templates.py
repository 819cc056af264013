"""`templates`: what is written of each template, checked key by key. What they mean together `prompts` checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_sr1.config.rules import known_key, require

_TEXTS = ("prompt", "text_only", "system", "describes", "opens", "extends")
_LISTS = ("tags", "may_be_blank")
KEYS = ("extends", "prompt", "text_only", "system", "tags", "may_be_blank", "answer", "describes", "opens")
_NULLABLE = ("text_only", "system", "describes", "opens")
_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
_EXAMPLE = 'Write templates: {mine: {extends: see_think, prompt: "{problem} ..."}}.'
_ANSWERS = "boxed, last_line, {tag: NAME} or {json: KEY}"


def check_templates(templates: Mapping[Any, Any]) -> None:
    """
    Raises:
        ConfigError: a name that is no word, a template that is no mapping, an unknown key, or a value that is not
            allowed.
    """
    for name, template in templates.items():
        is_name = isinstance(name, str) and _NAME.fullmatch(name) is not None
        require(is_name, "templates", name, "names of letters, digits and _, a letter first", _EXAMPLE)
        where = f"templates.{name}"
        require(isinstance(template, Mapping) and len(template) > 0, where, template, "keys with values", _EXAMPLE)
        for key, value in template.items():
            _check(f"{where}.{key}", str(key), value)


def _check(where: str, key: str, value: Any) -> None:
    known_key(where, key, KEYS, "template")
    if value is None and key in _NULLABLE:
        return
    if key in _LISTS:
        is_list = isinstance(value, list | tuple) and all(isinstance(tag, str) for tag in value)
        require(is_list, where, value, "a list of tags", "Write [description, think].")
    elif key == "answer":
        _check_answer(where, value)
    else:
        is_text = isinstance(value, str) and (value.strip() != "" or key == "opens")
        require(is_text, where, value, "a text", "Write it in quotes if need be.")


def _check_answer(where: str, value: Any) -> None:
    is_one = isinstance(value, str) and value in ("boxed", "last_line")
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, name),) = value.items()
        is_one = kind in ("tag", "json") and isinstance(name, str) and name.strip() != ""
    require(is_one, where, value, _ANSWERS, "Set it to one of them.")
