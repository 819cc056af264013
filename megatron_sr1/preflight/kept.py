"""`<run_dir>/preflight.json`: what was found before the first step, and of which configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.config import Config, rule_of, values_by_key
from megatron_sr1.preflight.rows import Row, failed, to_json


def keep_rows(path: Path, config: Config, rows: Sequence[Row], *, whole: bool) -> None:
    """Writes the file, from the beginning.

    Args:
        whole: whether all was checked that the configuration asks for; else what was known before of its responses
            stays known.
    """
    passed = not failed(rows) and (whole or has_passed(path, config))
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"configuration": _digest(config), "passed": passed, **json.loads(to_json(rows))}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def has_passed(path: Path, config: Config) -> bool:
    """Whether the last preflight was one of this configuration, and passed."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or half of one: it is checked again
        return False
    return isinstance(kept, dict) and kept.get("passed") is True and kept.get("configuration") == _digest(config)


def _digest(config: Config) -> str:
    """Of every key that changes a number of the run."""
    values = {key: value for key, value in values_by_key(config).items() if rule_of(key) != "free"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
