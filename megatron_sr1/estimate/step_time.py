"""How long a GRPO step takes, term by term: engines are simulated, the rest is counted.

    rollout    of the slowest engine: its requests in its slots, step by step of decoding, and what prompts take
    exchange   lines of the ledger, the plan made of it, and the responses that a rank receives
    train      operations / rate * (1 + bubble) * imbalance, what tensor-parallel ranks send each other, and the
               gradients of each optimizer step
    sync       the new weights into the engines
    save       a checkpoint, shared by the steps between two: the copy of each rank's share, and what writing it takes
               longer than these steps
    images     what decoding and resizing images takes longer than the step before lasts

A decoding step of b requests reads the weights and what they have cached:

    (weights + b * tokens * cached bytes) / bandwidth + layers * (reductions + launches)

Responses are drawn log-normal with the mean that the plan of memory supposes (`config.typical_tokens`), and cut at the
limit. GIVEN has what is taken as given and where it is from; none of it is a measurement of the cluster at hand.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sr1.config import kv_token_bytes, typical_tokens
from megatron_sr1.config.rollout import TYPICAL
from megatron_sr1.estimate.arithmetic import FLOPS_PER_SECOND, PATCHES, num_contrast_passes
from megatron_sr1.estimate.engine import engine_parameters
from megatron_sr1.estimate.flops import image_flops, sequence_flops
from megatron_sr1.estimate.plan import RunPlan
from megatron_sr1.estimate.state import copied_bytes
from megatron_sr1.packing.bins import MAX_IMBALANCE
from megatron_sr1.streams import preset_of


@dataclass(frozen=True)
class Given:
    """What a step's time is reckoned with."""

    memory: float = 2.5e12  # bytes a second of a GPU's memory: three quarters of an H100's 3.35 TB/s
    reduction: float = 50e-6  # seconds of an all-reduce of a decoding step within a node, two a layer
    launches: float = 0.35e-3  # seconds that a layer's kernels take to launch one by one, without CUDA graphs
    flops: float = FLOPS_PER_SECOND  # a second and GPU, of training and of prompts
    nvlink: float = 400e9  # bytes a second of a GPU to those of its node: of an H100's 450
    network: float = 50e9  # bytes a second of a GPU's own link between nodes: 400 Gbit/s
    sync: tuple[float, float] = (2.0, 20e9)  # seconds at the least, and bytes a second of whole weights
    disk: float = 2e9  # bytes a second that a node writes
    host: float = 3e9  # bytes a second of a GPU to memory of the host that is not pinned
    line: float = 4e-3  # seconds to write a group's line of the ledger (benchmarks.scale)
    plan: float = 0.1  # seconds to plan a step of 512 prompts (benchmarks.scale)
    image: float = 85e-3  # seconds of a thread to decode and resize a megapixel
    sigma: float = 0.55  # of the logarithm of a response's length


GIVEN = Given()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term."""

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def step_time(plan: RunPlan, given: Given = GIVEN) -> StepTime | None:
    """Of a run of `grpo`; None of other commands."""
    if plan.engine is None or not plan.stages:
        return None
    config = plan.config
    terms = {
        "rollout": rollout_seconds(plan, given),
        "exchange": _exchange(plan, given),
        "train": _train(plan, given),
        "sync": _sync(plan, given),
    }
    terms["save"] = _save(plan, given, config.train.save_every * sum(terms.values())) / config.train.save_every
    images = _image_seconds(plan, given)
    return StepTime({**terms, "images": max(0.0, images - sum(terms.values()))})


# ---------------------------------------------------------------- rollouts
def rollout_seconds(
    plan: RunPlan, given: Given = GIVEN, *, slots: int | None = None, graphs: bool | None = None
) -> float:
    """Of the slowest engine, with prompts and passes.

    Args:
        slots: requests at a time, instead of the engine's own.
        graphs: whether decoding steps are replayed, instead of what the configuration says.
    """
    config, model, engine = plan.config, plan.model, plan.engine
    assert engine is not None, "a run without engines has no rollouts"
    rollout, ranks = config.rollout, config.rollout.engine_tensor
    engines, draw = config.nproc // ranks, random.Random(0)
    cached, tokens = kv_token_bytes(model, ranks), sum(typical_tokens(rollout)) / 2
    replayed = rollout.cuda_graphs if graphs is None else graphs
    layer = (2 * given.reduction if ranks > 1 else 0.0) + (0.0 if replayed else given.launches)

    def seconds(running: int) -> float:
        return (engine.weights + running * tokens * cached) / given.memory + model.num_layers * layer

    mean = TYPICAL * rollout.max_response_tokens
    median = mean / math.exp(given.sigma**2 / 2)

    def length() -> int:
        return max(1, min(rollout.max_response_tokens, round(median * draw.lognormvariate(0.0, given.sigma))))

    later = [one for one in preset_of(config).passes.later if one.reader != "endpoint"]
    passes = sum(one.samples for one in later)
    slowest, prefill = 0.0, _prompt_flops(plan, passes) / (given.flops * ranks)  # of a prompt
    for number in range(engines):
        prompts = len(range(number, rollout.prompts_per_step, engines))
        pairs = [[length() for _ in range(1 + passes)] for _ in range(prompts * rollout.samples_per_prompt)]
        decoding = simulated(pairs, slots or engine.requests, seconds)
        slowest = max(slowest, decoding + prompts * prefill)
    return slowest


def simulated(requests: Sequence[Sequence[int]], slots: int, seconds: Callable[[int], float]) -> float:
    """Time of an engine that decodes `slots` responses at a time.

    Args:
        requests: tokens of the first pass of each sample, then of its later ones, which wait for that to end.
        seconds: of a decoding step, by the number of responses in it.
    """
    firsts, later = deque(range(len(requests))), deque[tuple[int, int]]()
    running: list[tuple[int, int, bool]] = []  # (step it ends at, sample, whether it is a first pass); a heap
    time, step = 0.0, 0
    while firsts or later or running:
        while (firsts or later) and len(running) < slots:  # first passes go before later ones
            if firsts:
                sample = firsts.popleft()
                heapq.heappush(running, (step + requests[sample][0], sample, True))
            else:
                sample, tokens = later.popleft()
                heapq.heappush(running, (step + tokens, sample, False))
        end, sample, is_first = heapq.heappop(running)
        time += (end - step) * seconds(len(running) + 1)
        step = end
        if is_first:
            later += [(sample, tokens) for tokens in requests[sample][1:]]
    return time


def _prompt_flops(plan: RunPlan, passes: int) -> float:
    """Of one prompt's own, which siblings share, and of those of its later passes."""
    rollout = plan.config.rollout
    first, second = typical_tokens(rollout)
    response = TYPICAL * rollout.max_response_tokens
    own = sequence_flops(plan.model, first - response, 0) + image_flops(plan.model, _grid(plan))
    seen = 1 if preset_of(plan.config).distorted is None else 2  # siblings with noisy images share another prompt
    read = sequence_flops(plan.model, second - response, 0)
    return seen * own.total + passes * rollout.samples_per_prompt * read.total


def _grid(plan: RunPlan) -> tuple[int, int, int]:
    """Of the image that a first pass is supposed to have."""
    rollout = plan.config.rollout
    visual = typical_tokens(rollout)[0] - TYPICAL * rollout.max_response_tokens
    side = PATCHES * max(1, round(math.sqrt(max(0.0, visual))))
    return 1, side, side


# ---------------------------------------------------------------- the other terms
def _exchange(plan: RunPlan, given: Given) -> float:
    config, rollout = plan.config, plan.config.rollout
    engines = config.nproc // rollout.engine_tensor
    first, second = typical_tokens(rollout)
    response = TYPICAL * rollout.max_response_tokens
    samples = rollout.samples_per_prompt
    words = (first - response) + samples * (second - response) + 2 * samples * 3 * response
    received = 4 * words * rollout.prompts_per_step / config.data_ranks
    lines = math.ceil(rollout.prompts_per_step / engines) * given.line
    return lines + given.plan * rollout.prompts_per_step / 512 + received / given.network


def _train(plan: RunPlan, given: Given) -> float:
    config, layout = plan.config, plan.config.layout
    bubble = (layout.pipeline - 1) / (layout.virtual * plan.num_rows)
    computing = sum(plan.flops.values()) / (config.nproc * given.flops) * (1 + bubble) * MAX_IMBALANCE
    updates = config.rollout.prompts_per_step // config.train.batch_size
    computing += updates * _between_tensor_ranks(plan) / given.nvlink
    share = 1 - 1 / config.data_ranks  # of the fp32 gradients that come from others, and of the bf16 weights
    moved = max(stage.state.gradients * 1.5 for stage in plan.stages) * share
    return computing + updates * moved / given.network


def _between_tensor_ranks(plan: RunPlan) -> float:
    """Bytes that a rank sends for the rows of an optimizer step: a layer gathers its input and scatters its output
    twice in each pass (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2)."""
    layout, model = plan.config.layout, plan.model
    again = plan.config.recompute.mode == "full"  # of what is recomputed the layers may not be a part
    counts = {"forward and backward": 2, "recomputed": int(again), "old log-probs": 1, "reference": 1}
    counts |= {"choice of experts": 1, "contrasts": num_contrast_passes(preset_of(plan.config))}
    passes = sum(counts[name] for name in plan.flops)
    tokens = plan.num_rows * plan.row_tokens / layout.context
    layers = model.num_layers / layout.pipeline
    return passes * layers * 4 * tokens * model.hidden_size * 2 * (1 - 1 / layout.tensor)


def _save(plan: RunPlan, given: Given, hidden: float) -> float:
    """A checkpoint: weights, their fp32 copies and both moments. `hidden`: seconds of the steps until the next one."""
    train = plan.config.train
    copying = max(copied_bytes(stage.count, plan.config)[0] for stage in plan.stages) / given.host
    whole = 14 * _parameters(plan)
    if train.save_hf:
        copying += _sync(plan, given)
        whole += 2 * _parameters(plan)
    writing = whole / (plan.nodes * given.disk)
    return copying + (max(0.0, writing - hidden) if train.async_save else writing)


def _sync(plan: RunPlan, given: Given) -> float:
    """Streaming all weights, in bf16."""
    return given.sync[0] + 2 * _parameters(plan) / given.sync[1]


def _parameters(plan: RunPlan) -> int:
    """Of the whole model."""
    return engine_parameters(plan.config.model.hf_dir, plan.model, 1)


def _image_seconds(plan: RunPlan, given: Given) -> float:
    """Of a rank's threads for the images of its share, of engine and replica."""
    config, vision = plan.config, plan.model.hf.vision_config
    _, height, width = _grid(plan)
    pixels = height * width * vision.patch_size**2
    answered = config.rollout.prompts_per_step * config.rollout.engine_tensor / config.nproc
    trained = config.rollout.prompts_per_step / (config.data_ranks * config.layout.tensor * config.layout.context)
    return (answered + trained) * pixels / 1e6 * given.image / config.data.workers
