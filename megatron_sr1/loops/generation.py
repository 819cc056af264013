"""Colocated generation engines: every `rollout.engine_tensor` ranks are one."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_sr1.config import (
    Config,
    kv_request_bytes,
    kv_token_bytes,
    pixel_limits,
    read_hf_config,
    replay_of,
    running_requests,
)
from megatron_sr1.data import Check, LeftOut, SampleFeed
from megatron_sr1.loops.run import Run
from megatron_sr1.platform import TeamCounter, TeamRanks
from megatron_sr1.policy.read import open_tensors, read_architecture
from megatron_sr1.rollout import Engine, EngineLimits, Planner, TwoPassGenerator, canary_complaints, deal_prompts
from megatron_sr1.streams import Preset, check_siblings
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.types import NamedTensors, Passes, Prompt, Sampling, SftSample
from megatron_sr1.weights import check_values, published_weights, turned_experts

if TYPE_CHECKING:
    from PIL.Image import Image

_CANARY_SIDE = 56  # pixels: a few visual tokens for every family


def _refuse(complaint: str) -> None:
    raise RuntimeError(complaint)


def build_generator(
    run: Run, weights: Callable[[], NamedTensors] | None = None, complain: Callable[[str], None] = _refuse
) -> TwoPassGenerator:
    """Engines on all ranks, each with all weights and a share of the prompts. Collective.

    Args:
        weights: streams the policy's present weights, collectively. The engines start with them, and whether updates
            reach the vision tower's images is tried (`canary_complaints`); later they refill engines that had to be
            restarted. None: the engines have those of `model.hf_dir`, and are filled with them likewise where vLLM
            cannot read that folder itself.
        complain: takes what that finds.

    Raises:
        ValueError: without `weights`: the tensors of `model.hf_dir` are not those of the model, see `open_tensors`, or
            hold values that are not finite.
        RuntimeError: the engine does not hold the weights it was sent; by default, it does not look through them.
    """
    rollout = run.config.rollout
    own, reference, filled = run.config.model.hf_dir, run.config.objective.reference_dir, weights
    model = read_hf_config(own)
    if weights is None:  # else the policy has looked
        tensors = open_tensors(read_architecture(own))
        check_values(tensors, run.platform.ranks)
        if turned_experts(tensors, model):  # vLLM cannot read the folder itself
            filled = functools.partial(_weights_of, own)
    element = 4 if run.platform.on_cpu else 2  # bytes of a cached value
    cached, each = (size(model, rollout.engine_tensor, element=element) for size in (kv_token_bytes, kv_request_bytes))
    limits = EngineLimits(
        max_model_tokens=rollout.max_model_tokens,
        max_running_requests=running_requests(rollout, cached, each),
        kv_cache_gib=rollout.kv_cache_gib,
        max_images=rollout.max_images,
        seed=run.config.seed,
        tensor_parallel=rollout.engine_tensor,
        cuda_graphs=rollout.cuda_graphs,
        pixels=pixel_limits(run.config.model),
        notes_experts=weights is not None and replay_of(run.config).who == "generator",
        more=rollout.engine,
    )
    with run.stage("engines"):
        later = filled is not None
        engine = Engine(own, limits, checksum_every=rollout.checksum_every, sleeps=rollout.sleep, filled_later=later)
    if filled is not None:
        _fill(run, engine, filled, complain)
    engines = engine_ranks(run)
    hands_on = run.platform.ranks.rank % rollout.engine_tensor == 0
    start = None
    if weights is not None or reference:
        # from a folder, since what the policy keeps of them has left the device while engines generate
        start = functools.partial(_weights_of, reference or own)
        filled = filled or functools.partial(_weights_of, own)
    who = {"engines": engines, "hands_on": hands_on, "counter": _counter(run), "slots": limits.max_running_requests}
    who["patience"] = run.platform.wait_for_all
    return TwoPassGenerator(engine, run.planner, **who, weights=filled, start_weights=start)


def _fill(run: Run, engine: Engine, weights: Callable[[], NamedTensors], complain: Callable[[str], None]) -> None:
    with run.stage("canary"):
        engine.update_weights(weights(), 0)
        for complaint in canary_complaints(engine, run.processor, _canary_image(), weights):
            complain(complaint)


def _counter(run: Run) -> TeamCounter | None:
    """None where each engine answers the prompts that it was dealt."""
    config, pulls = run.config, run.config.rollout.pull
    if pulls is None:
        pulls = not run.platform.on_cpu and not config.precision.deterministic
    return TeamCounter(run.platform.ranks, config.rollout.engine_tensor) if pulls else None


def engine_ranks(run: Run) -> TeamRanks:
    """The engines, and the one that this rank is of."""
    return TeamRanks(run.platform.ranks, run.config.rollout.engine_tensor)


def _weights_of(hf_dir: str) -> NamedTensors:
    architecture = read_architecture(hf_dir)
    return published_weights(open_tensors(architecture), architecture)


def training_sampling(config: Config, preset: Preset) -> Sampling:
    """How the responses that are trained on are drawn. Raises ConfigError as `check_siblings`."""
    check_siblings(preset.distorted, config)
    rollout = config.rollout
    return Sampling(
        num_samples=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        max_response_tokens=rollout.max_response_tokens,
        seed=config.seed,
        template=preset.passes.template,
        later=preset.passes.later,
        second_template=preset.second_template,
        plain_template=preset.plain_template,
        distorted=preset.distorted,
        notes_experts=config.objective.router_replay == "generator",
    )


def prompt_check(planner: Planner, passes: Callable[[Prompt], Passes], *, leaves_out: bool = False) -> Check:
    """What a prompt must be beyond readable: short enough for the engines, in each of its passes.

    The function raises ValueError with the sample's key, its length and the limits.

    Args:
        leaves_out: a prompt that is too long is no fault of the data: it is passed over, and counted.
    """

    def check(sample: Prompt | SftSample) -> None:
        prompt = sample.prompt if isinstance(sample, SftSample) else sample
        refused = planner.refusals(prompt, passes(prompt))
        if refused:
            raise (LeftOut if leaves_out else ValueError)("\n".join(refused))

    return check


def training_feed(run: Run, preset: Preset, sampling: Sampling) -> SampleFeed:
    """The prompts of `data.train`, each of which every pass and every contrast can be made of, dealt to the engines.
    Raises as `Run.feed` and `Planner.check`."""
    run.planner.check(preset.passes)
    fits = prompt_check(run.planner, preset.passes.of, leaves_out=True)
    feed = run.feed("train", contrast_check(preset, fits))
    feed.divide(engine_ranks(run), functools.partial(deal_prompts, run.processor, sampling))
    return feed


def live_rollouts(
    run: Run, generator: TwoPassGenerator, sampling: Sampling, recorder: Recorder, *, refreshed: bool
) -> LiveRollouts:
    """A step's rollouts from the engines, kept in the run folder. `refreshed`: see `LiveRollouts`."""
    config = run.config
    return LiveRollouts(
        *(generator, sampling, recorder, config.rewards, run.platform.ranks, run.folder / "rollouts"),
        refreshed=refreshed,
        objective=config.objective,
        rounds=config.rollout.dynamic_sampling,
    )


def contrast_check(preset: Preset, check: Check) -> Check:
    """And has what the contrasts read of it."""

    def both(sample: Prompt | SftSample) -> None:
        preset.told_of(sample.prompt if isinstance(sample, SftSample) else sample)
        check(sample)

    return both


def _canary_image() -> Image:
    """Noise, the same on every rank: no part of it looks like another."""
    from PIL import Image

    pixels = random.Random(0).randbytes(3 * _CANARY_SIDE**2)
    return Image.frombytes("RGB", (_CANARY_SIDE, _CANARY_SIDE), pixels)
