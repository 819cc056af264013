"""What the loss is told of every response token: of a response, then of the row it was packed into.

S  reward streams    E  measured segments    n  response tokens of one sequence    R  scored tokens of one packed row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sr1.packing import scatter_rows
from megatron_sr1.types import MicroBatch, RewardStream


@dataclass(frozen=True)
class ResponseTokens:
    """Per-token inputs of the loss, of one response (n tokens) or of one packed row (n = R)."""

    token_weights: Tensor  # [S, n]: 0 outside a stream, 1 / its global denominator inside
    generator_logprobs: Tensor  # [n]
    image_distance: Tensor  # [n]: tokens since the prompt's last visual token, -1 without images
    place: Tensor  # [n] int64: of the response among the B * M of the optimizer step: b * M + its number in its pass
    segments: Tensor  # [E, n] bool: which of `Preset.measured` has the token
    compared: Tensor  # [n] bool: the engine saw what the trainer sees, so their log-probs are of one context

    def moved(self, device: torch.device) -> ResponseTokens:
        """The same on `device`."""
        return ResponseTokens(
            self.token_weights.to(device),
            self.generator_logprobs.to(device),
            self.image_distance.to(device),
            self.place.to(device),
            self.segments.to(device),
            self.compared.to(device),
        )

    def matters(self, streams: Sequence[RewardStream], advantages: Tensor) -> Tensor:
        """[n] bool: tokens the loss depends on, which a stream credits with one of the advantages [S, n], holds to the
        reference in the loss, drives from a contrast, or gives a bonus for their entropy. Others, such as those of a
        group with equal rewards where there is none of these, cost no backward in the head."""
        always = [
            stream.kl_loss_coef > 0 or stream.entropy_coef != 0 or stream.contrast_coef != 0 for stream in streams
        ]
        held = torch.tensor(always, device=self.token_weights.device)[:, None]
        return ((self.token_weights != 0) & (held | (advantages != 0))).any(0)


def into_rows(responses: Sequence[ResponseTokens], rows: Sequence[MicroBatch]) -> list[ResponseTokens]:
    """One for each row, of the responses in the order that was packed.

    Raises:
        ValueError: see `packing.scatter_rows`.
    """
    columns = (
        scatter_rows([response.token_weights for response in responses], rows),
        scatter_rows([response.generator_logprobs for response in responses], rows),
        scatter_rows([response.image_distance for response in responses], rows),
        scatter_rows([response.place for response in responses], rows),
        scatter_rows([response.segments for response in responses], rows),
        scatter_rows([response.compared for response in responses], rows),
    )
    return [ResponseTokens(*row) for row in zip(*columns, strict=True)]
