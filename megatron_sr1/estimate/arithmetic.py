"""The floating-point operations that training takes in a step, by what they are for, and how long a GPU is at them.

Lengths are those that the plan of memory supposes (`config.typical_tokens`): of a first pass whatever is no response is
taken to be one square image. Of what time there is beside the arithmetic (pipeline bubbles, communication, images on
the host) nothing is said here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_sr1.config import Command, Config, replay_of, row_tokens, typical_tokens
from megatron_sr1.config.rollout import TYPICAL
from megatron_sr1.estimate.flops import Flops, image_flops, sequence_flops
from megatron_sr1.platform.precision import shares_prefixes
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.streams import Preset, preset_of

# model operations, measured on one H200 in bf16 with plain layers (benchmarks/results/2026-11-27-nvidia-h200.md: 12
# layers of width 2048, rows of 8192 tokens); 380 to 400 are published for H100s with Transformer Engine's
FLOPS_PER_SECOND = 370e12
PATCHES = 2  # of a visual token, along each side


def training_flops(command: Command, config: Config, model: Architecture) -> Mapping[str, float]:
    """Of a step, all optimizer steps and all GPUs, by part: {"forward and backward": 3.1e15, ...}. Parts that a step
    does not have are left out; without training there are none.

    Backward takes twice a forward pass (Narayanan et al. 2021, arXiv 2104.04473), and what is recomputed another one.
    What model.freeze spares is not taken off.
    """
    if command == "evaluate":
        return {}
    forward = _forward(command, config, model)
    parts = {"forward and backward": 3 * forward.total}
    if config.recompute.mode == "full":
        parts["recomputed"] = forward.language
    if config.recompute.vision:
        parts["recomputed"] = parts.get("recomputed", 0.0) + forward.vision
    if command == "grpo":
        preset, several = preset_of(config), config.rollout.prompts_per_step > config.train.batch_size
        own = config.objective.old == "trainer" and (several or preset.kl_in_reward)
        if own or preset.compares_before:
            parts["old log-probs"] = forward.total
        elif replay_of(config).who == "trainer" and (several or preset.needs_reference):
            parts["choice of experts"] = forward.total
        if preset.needs_reference:
            parts["reference"] = forward.total
        if preset.contrasts:
            parts["contrasts"] = _contrasts(config, model, preset)
    return parts


def num_contrast_passes(preset: Preset) -> int:
    """Passes through the layers that first passes take for contrasts: one to score, two more to train; one in their
    own context where whole distributions are compared."""
    return len(preset.contrasts) + 2 * len(preset.trained_contrasts) + int(bool(preset.full_contrasts))


def _contrasts(config: Config, model: Architecture, preset: Preset) -> float:
    """Of the first passes under each contrast: scored, and with their gradient where a stream trains them; scored in
    their own context, too, where whole distributions are compared, whose KL itself is not counted. Without an image
    they are taken to be as long as a second pass."""
    seen, read, image = _passes(config, model)
    rollout, total = config.rollout, 0.0
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    own = seen.times(samples) + image.times(rollout.prompts_per_step)
    if preset.full_contrasts:
        total += own.total
    for contrast in preset.contrasts:
        one = own if contrast.context in ("masked", "noise") else read.times(samples)
        total += (4 if contrast.name in preset.trained_contrasts else 1) * one.total
    return total


def prompts_of_group(config: Config) -> int:
    """How often the prompt of a group's first passes is in the rows of a step: for each sample, or, where they share
    it, in each part of a family that no row holds, and on each replica where there are more of these than groups."""
    rollout = config.rollout
    if not shares_prefixes(config, on_cpu=False):
        return rollout.samples_per_prompt
    first, _ = typical_tokens(rollout)
    response = TYPICAL * rollout.max_response_tokens
    room = row_tokens(config) - max(0.0, first - response)
    parts = math.ceil(rollout.samples_per_prompt * response / room) if room > 0 else rollout.samples_per_prompt
    replicas = math.ceil(config.data_ranks / config.train.batch_size)
    return min(rollout.samples_per_prompt, max(1, parts, replicas))


def _passes(config: Config, model: Architecture) -> tuple[Flops, Flops, Flops]:
    """Of a first pass and of a second, each once, and of an image."""
    rollout = config.rollout
    first, second = typical_tokens(rollout)
    response = TYPICAL * rollout.max_response_tokens
    seen, read = sequence_flops(model, first, response), sequence_flops(model, second, response)
    side = 2 * max(1, round(math.sqrt(max(0.0, first - response)) * PATCHES / 2))
    return seen, read, image_flops(model, (1, side, side))


def _forward(command: Command, config: Config, model: Architecture) -> Flops:
    seen, read, image = _passes(config, model)
    rollout = config.rollout
    if command == "sft":  # half of the demonstrations see an image
        return (seen + read + image).times(config.train.batch_size / 2)
    first, _ = typical_tokens(rollout)
    prompt = sequence_flops(model, max(0.0, first - TYPICAL * rollout.max_response_tokens), 0)
    seen = seen + prompt.times(prompts_of_group(config) / rollout.samples_per_prompt - 1)
    preset = preset_of(config)
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    trained = sum(later.samples for later in preset.passes.later if preset.trains(later.name))
    # siblings share their image's pass through the tower
    return seen.times(samples) + read.times(samples * trained) + image.times(rollout.prompts_per_step)
