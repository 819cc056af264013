"""Does a chat template end? It is a program out of a model folder, and may loop for ever or fill the memory.

jinja's sandbox bounds neither: `range` stops at 100,000, loops inside each other do not. A process of its own can be
given limits by the system, which nothing that the template computes gets around. It renders as transformers does, with
the same input, and says only whether it ended: the text itself is transformers'. This file is that process's program.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2  # templates take milliseconds
MEMORY_BYTES = 1 << 30
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_WALL_SECONDS = 60.0  # where other processes have the processor
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag, around what it tracks


def check_it_ends(template: str, variables: Mapping[str, Any], where: str) -> None:
    """Call it before a template is rendered with other variables than before.

    Args:
        variables: what the template is rendered with; JSON.
        where: the template's origin, for the message.

    Raises:
        ValueError: it does not end within CPU_SECONDS, or takes more than MEMORY_BYTES.
    """
    if not _ends(json.dumps({"template": template, "variables": variables})):
        raise ValueError(
            f"the chat template of {where} did not end within {CPU_SECONDS} s and {MEMORY_BYTES >> 20} MiB. Use the "
            "chat template of a Qwen-VL model."
        )


@lru_cache(maxsize=64)
def _ends(given: str) -> bool:
    """Asked once of each: a process has several processors of one model."""
    command = [sys.executable, "-P", __file__]  # -P: the files beside this one are no modules of the program
    try:
        done = subprocess.run(command, input=given, text=True, capture_output=True, timeout=_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _render(given: str) -> None:
    """Ends; an error in the template is told by whoever renders it for its text."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    task = json.loads(given)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    with suppress(*TEMPLATE_ERRORS):
        environment.from_string(_GENERATION.sub("", task["template"])).render(**task["variables"])


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))  # also where the parent is gone
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _render(sys.stdin.read())
