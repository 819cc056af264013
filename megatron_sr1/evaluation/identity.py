"""What the numbers of an evaluation depend on. An evaluation is continued only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sr1.ranks import ALONE, Ranks

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # weights, configuration, tokenizer, processor
_THREADS = 4

Identity = Mapping[str, str | int | float]  # what it is, by the name that an error message calls it


def digest_of(identity: Identity) -> str:
    """16 hex digits, which every record carries."""
    text = json.dumps(dict(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digests(hf_dir: Path, ranks: Ranks = ALONE) -> list[tuple[str, str]]:
    """(name, sha256 in hex) of this rank's share of a model directory's files; all ranks together read each once."""
    paths = sorted(path for pattern in _MODEL_FILES for path in hf_dir.glob(pattern))[ranks.rank :: ranks.num_ranks]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(zip((path.name for path in paths), pool.map(_file_digest, paths), strict=True))


def model_digest(digests: Iterable[tuple[str, str]]) -> str:
    """sha256, in hex, over the names and contents of a model directory's files, in any order."""
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in sorted(digests)).encode()).hexdigest()


def check_identity(path: Path, identity: Identity) -> None:
    """Compares with the identity that was kept, or keeps this one where there is none.

    Raises:
        ValueError: they differ; the message names each key with both values.
    """
    if not path.exists():
        keep_identity(path, identity)
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in {**kept, **identity} if kept.get(name) != identity.get(name)]
    if names:
        changes = "; ".join(f"{name} was {kept.get(name)!r} and is {identity.get(name)!r}" for name in names)
        raise ValueError(
            f"{path} belongs to another evaluation: {changes}. Go on as before, choose another run_dir, or start over "
            "with --restart."
        )


def check_same_data(path: Path, fingerprint: str, run_dir: str) -> None:
    """Whether the evaluation that was kept at `path` was of the data that a run is continued with; nothing is compared
    where there is none.

    Raises:
        ValueError: it was of others, so what comes after could not be compared with it.
    """
    if not path.exists():
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))["the data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it: evaluations are then not compared.") from error
    if then != fingerprint:
        raise ValueError(
            f"run_dir={run_dir!r} holds another run: data.heldout had other samples when it was evaluated before. Set "
            "it back, or choose another run_dir."
        )


def keep_identity(path: Path, identity: Identity) -> None:
    """Writes it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(dict(identity), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
