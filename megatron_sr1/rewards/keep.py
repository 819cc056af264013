"""The code of a user's rewards in the run folder: what a run was trained on can be read there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_sr1.import_path import is_import_path, source_digest, source_of
from megatron_sr1.rewards.find import find_reward


def keep_code(folder: Path, names: Iterable[str]) -> list[str]:
    """Copies the file of each of a user's rewards, by its digest, so that every version that was used stays.

    Returns:
        The rewards that were of another version when this was last called on the folder.
    """
    index = folder / "index.json"
    kept = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    found = {}
    for name in names:
        function = find_reward(name).function
        source, digest = source_of(function), source_digest(function)
        if is_import_path(name) and source is not None and digest:
            found[name] = f"{Path(source).stem}_{digest}.py"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / found[name])
    if found:
        index.write_text(json.dumps({**kept, **found}, indent=1) + "\n", encoding="utf-8")
    return [name for name, file in found.items() if kept.get(name, file) != file]
