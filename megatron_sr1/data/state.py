"""Where a stream stands: enough to go on with exactly the next sample, at any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_sr1.data.quarantine import BadSample

MAX_NAMED = 5  # shards in one message


@dataclass(frozen=True)
class StreamState:
    """Goes into a checkpoint as JSON."""

    fingerprint: str  # `SampleStream.fingerprint`
    seed: int
    position: int  # all before it was handed out, or is bad
    in_flight: tuple[tuple[int, str], ...]  # position and key of what was handed out and is not finished
    shards: tuple[tuple[str, str], ...]  # name and fingerprint, to say which one changed
    bad: tuple[BadSample, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "position": self.position,
            "in_flight": [list(pair) for pair in self.in_flight],
            "shards": [list(pair) for pair in self.shards],
            "bad": [asdict(bad) for bad in self.bad],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> StreamState:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is none.
        """
        missing = [f.name for f in fields(cls) if f.name not in tree]
        if missing:
            raise ValueError(
                f"the checkpoint's state of the training stream lacks {', '.join(missing)}: another release wrote it. "
                "Choose another run_dir."
            )
        return cls(
            fingerprint=tree["fingerprint"],
            seed=tree["seed"],
            position=tree["position"],
            in_flight=tuple((position, key) for position, key in tree["in_flight"]),
            shards=tuple((name, fingerprint) for name, fingerprint in tree["shards"]),
            bad=tuple(BadSample(**bad) for bad in tree["bad"]),
        )

    def check(self, fingerprint: str, seed: int, shards: Sequence[tuple[str, str]]) -> None:
        """Whether a stream is the one that this state is of.

        Raises:
            ValueError: it has other data, another mixture or another seed; the message says which shard changed.
        """
        if seed != self.seed:
            raise ValueError(
                f"seed={seed}, but the run began with seed={self.seed}: the order of its samples hangs on it. Set it "
                "back, or choose another run_dir."
            )
        if fingerprint == self.fingerprint:
            return
        then, now = dict(self.shards), dict(shards)
        found = [
            *(f"{name} changed" for name in then if name in now and now[name] != then[name]),
            *(f"{name} is missing" for name in then if name not in now),
            *(f"{name} is new" for name in now if name not in then),
        ]
        if not found and tuple(shards) != self.shards:
            found = ["the shards are in another order"]
        found = found or ["the weights, data.shuffle_window or data.max_prompt_tokens changed"]
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise ValueError(
            f"the training data are not those that the run began with: {', '.join(found[:MAX_NAMED])}{more}. Continue "
            "with the same data (and indices beside the shards), or choose another run_dir."
        )
