"""What a training rank holds from its first step to its last: weights, gradients, optimizer state, reference.

    weights    n * w           w = 2 bytes in bf16 and fp8, 4 in fp32
    fp8 copies q * 2           each fp8 weight, cast once a step: as it is and transposed (Transformer Engine)
    gradients  m * 4           Megatron's fp32 buffer, of trained parameters only; it stays allocated between steps
    optimizer  m / d * 12      fp32 weights and AdamW's two moments; 8 where the weights are fp32 themselves
    reference  m * w           the starting weights, beside the others (policy.py); not shared by data parallelism

    checkpoint b / d * 4 + min(b, m / d + l) * 4, where d > 1: of one kind of state and one bucket at a time, what a
               rank sends to the owners of its parameters, and what it receives of its own
    its copy   m / d * 12 + n / d * w on the host until it is written; of d ranks one may have l * 12 more

n parameters of a rank, m of them trained, q in fp8 products, l in the largest; d ranks that share optimizer state. A
bucket's b elements end with the parameter that fills it; stages after the first, and chunks after a stage's first, have
one bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_sr1.config import Config
from megatron_sr1.policy.parameter_counts import StageCount

GRADIENT_BYTES = 4
_WRITTEN = 12  # bytes a parameter: fp32 weights and two moments
_BUCKET, _BUCKET_PER_REPLICA = 40_000_000, 1_000_000  # elements, as Megatron has them


@dataclass(frozen=True)
class TrainerState:
    """Bytes of one rank."""

    weights: int
    fp8_copies: int
    gradients: int
    optimizer: int
    reference: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def weight_bytes(config: Config) -> int:
    """Bytes of one weight, and of one activation, outside of fp8 products."""
    return 4 if config.precision.dtype == "fp32" else 2


def dense_shards(config: Config) -> int:
    """Ranks that share the optimizer state of a parameter that all data- and context-parallel replicas have."""
    return config.data_ranks * config.layout.context if config.layout.distributed_optimizer else 1


def expert_shards(config: Config) -> int:
    """The same for a parameter of routed experts, of which expert-parallel ranks hold different ones."""
    layout = config.layout
    if layout.expert == 1 or not layout.distributed_optimizer:
        return dense_shards(config)
    return config.nproc // (layout.pipeline * layout.expert)


def trainer_state(count: StageCount, config: Config, *, keep_reference: bool) -> TrainerState:
    """The state of a rank of the stage that was counted."""
    width = weight_bytes(config)
    per_trained = 8 if width == 4 else 12
    dense = count.trained - count.trained_experts
    shared = -(-dense // dense_shards(config)) + -(-count.trained_experts // expert_shards(config))
    return TrainerState(
        weights=count.total * width,
        fp8_copies=_fp8_weights(count, config) * 2,
        gradients=count.trained * GRADIENT_BYTES,
        optimizer=shared * per_trained,
        reference=count.trained * width if keep_reference else 0,
    )


def gathered_bytes(count: StageCount, config: Config) -> int:
    """What writing a checkpoint takes beside the state, on the device."""
    return max(
        int(GRADIENT_BYTES * (bucket / shards + min(bucket, part / shards + count.largest))) if shards > 1 else 0
        for part, shards in _shares(count, config)
        for bucket in [_largest_bucket(part, shards, count, config)]
    )


def copied_bytes(count: StageCount, config: Config) -> tuple[float, float]:
    """What a rank of the stage holds on the host while a checkpoint is written, and what one of those that share its
    optimizer state may hold beyond that."""
    replicas = config.data_ranks * config.layout.context  # they share the writing, whatever they hold
    state = sum(
        part / (shards if config.layout.distributed_optimizer else replicas) for part, shards in _shares(count, config)
    )
    weights = count.total * weight_bytes(config) / replicas
    return weights + state * _WRITTEN, count.largest * _WRITTEN if replicas > 1 else 0


def _shares(count: StageCount, config: Config) -> tuple[tuple[int, int], ...]:
    """Trained parameters of each kind, a buffer each, and the ranks that share their optimizer state."""
    experts = count.trained_experts
    dense = count.trained - experts
    return (dense, dense_shards(config)), (experts, expert_shards(config))


def _largest_bucket(part: int, shards: int, count: StageCount, config: Config) -> int:
    """Elements, of the `part` of a rank's parameters that is one buffer."""
    filled = (config.layout.gradient_bucket or max(_BUCKET, _BUCKET_PER_REPLICA * shards)) + count.largest
    chunk = -(-part // config.layout.virtual)
    if count.stage > 0:
        return chunk
    return min(part, filled if config.layout.virtual == 1 else max(filled, chunk))


def _fp8_weights(count: StageCount, config: Config) -> int:
    """Those of matrix products in layers that are not kept in bf16."""
    precision, layout = config.precision, config.layout
    layers = sum(count.layers)
    if precision.dtype != "fp8" or layers == 0:
        return 0
    bf16 = precision.bf16_first_layers * (count.stage == 0)
    bf16 += precision.bf16_last_layers * (count.stage == layout.pipeline - 1)
    return count.linear * max(layers - bf16, 0) // layers
