"""The random stream of a request, a function of what is asked and of nothing else.

Neither the order of scheduling, nor the number of engines, nor whether the second pass is streamed can change a token.
"""

from __future__ import annotations

import hashlib

from megatron_sr1.types import PassName


def request_seed(seed: int, step: int, key: str, sample_index: int, pass_name: PassName) -> int:
    """A non-negative 63-bit seed, the same on every machine and in every process."""
    identity = f"{seed}\n{step}\n{sample_index}\n{pass_name}\n{key}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little") >> 1
