"""The experts that an engine chose, from the bytes of a rollout to tensors, and to 32-bit words and back.

Shape legend: n tokens, M layers with experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sr1.config import Replay
from megatron_sr1.types import Rollout

_WORD = 4  # bytes


def experts_of(rollout: Rollout, replay: Replay) -> tuple[Tensor | None, Tensor | None]:
    """Of its prompt [p, M, k], None where a sibling has them, and of its response [n - 1, M, k]; nothing where the
    generator's choice is not replayed.

    Raises:
        ValueError: it has none, those of another model, or ids of experts that there are not.
    """
    if replay.who != "generator":
        return None, None
    num_prompt, num_response = len(rollout.prompt_ids), max(len(rollout.response_ids) - 1, 0)
    num_ids, rest = divmod(len(rollout.experts), replay.token_bytes)
    if not rollout.experts and num_response:
        raise ValueError(
            f"{rollout.rollout_id}: nobody noted which experts its tokens were sent to, and "
            "objective.router_replay=generator replays them. Set objective.router_replay=trainer, or draw the step "
            "again with an engine that notes them."
        )
    if rest or num_ids not in (num_response, num_prompt + num_response):
        raise ValueError(
            f"{rollout.rollout_id}: {len(rollout.experts)} bytes of experts for {num_prompt} prompt and "
            f"{num_response + 1} response ids of a model with {replay.layers} layers of experts, {replay.chosen} a "
            "token. Give the model.hf_dir of the run that drew it."
        )
    ids = _ids(_bytes(rollout.experts), replay)
    if len(ids) and int(ids.max()) >= replay.experts:
        raise ValueError(
            f"{rollout.rollout_id}: its tokens were sent to expert {int(ids.max())}, but the model has "
            f"{replay.experts}. Give the model.hf_dir of the run that drew it."
        )
    prompt = ids[: num_ids - num_response] if num_ids > num_response else None
    return prompt, ids[num_ids - num_response :]


def num_words(num_tokens: int, replay: Replay) -> int:
    """That the experts of so many tokens take; 0 where the generator's choice is not replayed."""
    return -(-num_tokens * replay.token_bytes // _WORD) if replay.who == "generator" else 0


def as_words(experts: Tensor | None) -> Tensor:
    """[n, M, k] -> [words] int32."""
    if experts is None:
        return torch.zeros(0, dtype=torch.int32)
    flat = experts.contiguous().flatten().view(torch.uint8)
    return torch.cat([flat, flat.new_zeros(-len(flat) % _WORD)]).view(torch.int32)


def of_words(words: Tensor, num_tokens: int, replay: Replay) -> Tensor | None:
    """The inverse of `as_words`."""
    if replay.who != "generator":
        return None
    return _ids(words.view(torch.uint8)[: num_tokens * replay.token_bytes], replay)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _ids(flat: Tensor, replay: Replay) -> Tensor:
    kind = torch.uint8 if replay.id_bytes == 1 else torch.int16
    return flat.view(kind).view(-1, replay.layers, replay.chosen)
