"""Activations of a pipeline stage at its fullest: rows in flight, recomputation, the head, the vision tower.

    1F1B         stage p of P holds min(rows, P - p) rows
    interleaved  min(rows * v, 2 (P - p - 1) + (v - 1) P + 1) rows of one of its v chunks each
    (Narayanan et al. 2021, arXiv 2104.04473; Megatron-Core's schedules)

Recomputation keeps a layer's input alone, [S, H], and one recomputed unit at a time is whole in backward. Frozen
language layers count like the others: they pass gradients on to whatever is trained before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sr1.config import Config, LayoutConfig, RecomputeConfig, replay_of
from megatron_sr1.estimate.layer import LayerShape, dropped_bytes, kept_tensors, layer_shape
from megatron_sr1.estimate.state import weight_bytes
from megatron_sr1.estimate.vision import vision_bytes
from megatron_sr1.kernels.linear_logprob.chunked import KEPT_ELEMENTS, TILE_ELEMENTS_ACCELERATOR
from megatron_sr1.platform.precision import shares_prefixes
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.parameter_counts import StageCount


@dataclass(frozen=True)
class StageActivations:
    """Bytes of one rank while it trains, at the fullest moment."""

    rows_in_flight: float  # rows' worth of the stage's layers
    layers: float  # of all rows in flight
    vision: float
    head: float
    working: float  # of the one unit whose backward runs

    @property
    def total(self) -> float:
        return self.layers + self.vision + self.head + self.working


def rows_in_flight(layout: LayoutConfig, stage: int, num_rows: int) -> float:
    """How many rows' activations a stage keeps at once; parts of a row where it has several chunks."""
    behind = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return min(num_rows, behind + 1)
    chunks = 2 * behind + (layout.virtual - 1) * layout.pipeline + 1
    return min(num_rows * layout.virtual, chunks) / layout.virtual


def stage_activations(
    model: Architecture, config: Config, count: StageCount, *, row_tokens: int, num_rows: int
) -> StageActivations:
    """The activations of a rank of the stage that was counted, in a step of `num_rows` packed rows.

    Args:
        row_tokens: of one packed row, all of its ranks together.
        num_rows: of one data-parallel replica in one optimizer step.
    """
    layout, element = config.layout, weight_bytes(config)
    flight = rows_in_flight(layout, count.stage, num_rows)
    first, last = count.stage == 0, count.stage == layout.pipeline - 1
    gathers = shares_prefixes(config, on_cpu=False)
    shapes = [
        layer_shape(
            model,
            layout,
            row_tokens,
            element=element,
            is_moe=is_moe,
            gathers=gathers and not is_linear,
            is_linear=is_linear,
        )
        for is_moe, is_linear in zip(_share(model.moe_layers, count), _share(model.linear_layers, count), strict=True)
    ]
    kept, working = _layers(shapes, config.recompute)
    layers = flight * kept
    if first:  # features that the first layers add ride along with their inputs
        inputs = len(model.deepstack_layers)
        layers += flight * inputs * (inputs + 1) / 2 * _input(shapes[0]) if shapes else 0.0
    vision = head = 0.0
    if first:
        tower = vision_bytes(model, config, count, row_tokens, element=element)
        vision = tower.kept * (flight if count.trained_tower or count.trained_mergers else num_rows)
        working = max(working, tower.working)
    if last:
        head, of_head = _head(model, layout, row_tokens, element)
        working = max(working, of_head)
    return StageActivations(flight, layers, vision, head, working)


def kept_experts(model: Architecture, config: Config, count: StageCount, tokens: float) -> float:
    """Bytes of the experts' ids that a rank of the stage keeps of so many tokens of its replica, from the pass that
    chooses them to the last that follows; 0 where the policy does not replay its own choice.

    Raises:
        ConfigError: see `read_hf_config`.
    """
    replay = replay_of(config)
    if replay.who != "trainer":
        return 0.0
    layout = config.layout
    ranks = layout.context * (layout.tensor if layout.sequence_parallel else 1)
    return tokens / ranks * sum(_share(model.moe_layers, count)) * replay.chosen * replay.id_bytes


def _share(layers: Sequence[bool], count: StageCount) -> list[bool]:
    """Of each of the model's layers, whether it is of a kind -> the same of the stage's. The share is what counts, not
    the order."""
    share = sum(layers) / len(layers)
    number = sum(count.layers)
    of_kind = round(share * number)
    return [True] * of_kind + [False] * (number - of_kind)


def _input(shape: LayerShape) -> float:
    return shape.norm_tokens * shape.hidden * shape.element


def _layers(shapes: list[LayerShape], recompute: RecomputeConfig) -> tuple[float, float]:
    """Bytes that the layers keep of one row, and those that appear while one unit's backward runs."""
    if not shapes:
        return 0.0, 0.0
    whole = [sum(kept_tensors(shape).values()) for shape in shapes]
    passing = max(_gradients(shape) for shape in shapes)
    if recompute.mode == "none":
        return sum(whole), passing
    if recompute.mode == "selective":
        dropped = [dropped_bytes(tuple(recompute.modules), shape) for shape in shapes]
        return sum(whole) - sum(dropped), max(dropped) + passing
    inputs = [_input(shape) for shape in shapes]
    if recompute.mode == "full":
        unit = min(recompute.layers, len(shapes))
        return sum(inputs[::unit]), unit * max(whole) + passing
    again = min(recompute.layers, len(shapes))
    return sum(inputs[:again]) + sum(whole[again:]), max(whole) + passing


def _gradients(shape: LayerShape) -> float:
    """Gradients on their way through the feed-forward part: of gate, up, product and the hidden state on both sides."""
    copies = shape.chosen_experts * shape.norm_tokens if shape.chosen_experts else shape.tokens
    return shape.element * (3 * copies * shape.ffn + 2 * shape.tokens * shape.hidden)


def _head(model: Architecture, layout: LayoutConfig, row_tokens: int, element: int) -> tuple[float, float]:
    """Kept and working bytes of the output head, every token scored.

    The logits are made in tiles: fp32, their gradient in fp32 and as an operand. The hidden states' gradient is fp32,
    the head's goes into the gradient buffer, and autograd is handed zeros of the head's size.
    """
    tokens = row_tokens / layout.context
    rows = tokens * model.hidden_size
    logits = min(KEPT_ELEMENTS, tokens * model.vocab_size / layout.tensor)  # that wait for backward
    kept = 2 * element * rows + 4 * logits  # and the final norm's input, and the scored rows
    tile = TILE_ELEMENTS_ACCELERATOR * (4 + 4 + element)
    return kept, 4 * rows + element * rows + tile + element * model.vocab_size / layout.tensor * model.hidden_size
