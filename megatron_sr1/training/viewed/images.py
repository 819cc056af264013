"""The images of saved rollouts, which have none: out of the shards that the run's configuration names, by key."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_sr1.config import DataConfig
from megatron_sr1.data import Quarantine, ShardDataset, files_of, open_dataset
from megatron_sr1.report.viewer.images import NoImages as NoImages
from megatron_sr1.report.viewer.images import image_stem, put_images
from megatron_sr1.types import Prompt

_ANY = 1 << 62  # bad samples: a run has passed over them, too


class DataImages:
    """Implements `report.viewer.images.ImageStore`. Where the data cannot be opened, or are not those that the run has
    noted, that is the reason."""

    def __init__(self, run: Path, data: DataConfig, name: Literal["train", "heldout"]) -> None:
        self._run = run
        self._name: Literal["train", "heldout"] = name
        self._data = replace(data, train_weights=[])  # of a mixture too, all samples by their keys

    def put(self, key: str, problem: str, folder: Path) -> tuple[tuple[str, ...], str]:
        """See `ImageStore`. A sample that asks something else under this key is another one: its images are not
        shown."""
        opened, where = self._opened, f"data.{self._name}"
        if isinstance(opened, str):
            return (), opened
        dataset, digests, order, repeated = opened
        if key in repeated:
            return (), f"{where} has more than one sample {key!r}, and nothing tells which one this is"
        first, end = (np.searchsorted(digests, _digest(key), side=side) for side in ("left", "right"))
        place = next((int(one) for one in order[first:end] if dataset.place(int(one))[1] == key), None)
        if place is None:
            return (), f"{where} has no sample {key!r}: it is not the data that the run was made with"
        try:
            sample = dataset.read(place)
        except (ValueError, OSError) as error:
            return (), str(error)
        prompt = sample if isinstance(sample, Prompt) else sample.prompt
        if prompt.problem != problem:
            return (), f"{where} asks something else under {key!r}: it was changed since the run"
        return put_images(image_stem(self._name, dataset.fingerprint, key), prompt.images, folder), ""

    @cached_property
    def _opened(self) -> tuple[ShardDataset, np.ndarray, np.ndarray, frozenset[str]] | str:
        """The data, digests of its keys, ascending, the number of each one's sample, and keys that several have."""
        where, bad = f"data.{self._name}", Quarantine(_ANY)
        try:
            if any("://" in file for file in files_of(self._data, self._name).values()):
                return f"{where} is behind URLs, which a report does not fetch"
            dataset = open_dataset(self._data, self._name, bad)
            if not self._is_the_runs(dataset):
                return f"{where} is not what it was when the run was made: its shards have other contents"
        except (ValueError, OSError) as error:
            return f"the images of {where} cannot be read: {error}"
        digests = np.fromiter((_digest(dataset.place(n)[1]) for n in range(len(dataset))), np.uint32, len(dataset))
        order = np.argsort(digests, kind="stable")  # 12 bytes a sample, however long its key
        return dataset, digests[order], order, frozenset(each.key for each in bad.bad)

    def _is_the_runs(self, dataset: ShardDataset) -> bool:
        """By what the newest checkpoint, or the evaluations, have noted of the data; where nothing was, they may be."""
        if self._name == "heldout":
            kept = [_read(path).get("the data") for path in self._run.glob("eval/identity/*.json")]
            noted = [value for value in kept if value]
            return not noted or dataset.fingerprint in noted
        saved = sorted(self._run.glob("checkpoints/step_*/progress.json"))
        stream = _read(saved[-1]).get("stream") if saved else None  # null: it took no sample
        shards = stream.get("shards") or [] if isinstance(stream, dict) else []
        return not shards or {tuple(pair) for pair in shards} == set(dataset.shard_fingerprints)


def _digest(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", errors="surrogatepass"))


def _read(path: Path) -> dict:
    """Raises ValueError where it is damaged."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no object. Repair or remove it.")
    return tree
