"""AdamW under Megatron-Core's distributed optimizer, and what its checkpoints need where torch's AdamW is used."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sr1.config import OptimizerConfig, PrecisionConfig
from megatron_sr1.platform.precision import compute_dtype

# what a group of parameters is, whatever its learning rate
_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")


def build_optimizer(
    config: OptimizerConfig,
    precision: PrecisionConfig,
    model: list[DistributedDataParallel],
    num_steps: int,
    distributed: bool,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer and its schedule over `num_steps` optimizer steps. Biases and norms get no weight decay.

    It keeps fp32 weights beside those of a bf16 or fp8 model.
    """
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=compute_dtype(precision),
        bf16=compute_dtype(precision) == torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    overrides = get_standard_config_overrides(settings)
    if config.vision_lr is not None:
        scale = config.vision_lr / config.lr
        overrides[ParamKey(name="*vision.*")] = {"max_lr": config.vision_lr, "min_lr": config.min_lr * scale}
    optimizer = get_megatron_optimizer(settings, model, config_overrides=overrides, use_gloo_process_groups=False)
    prepare_adam_state(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(num_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """That of the language model in the next step; of the vision tower, where that alone is trained at its own."""
    groups = optimizer.param_groups  # the same on every rank, some without parameters of it
    return next((group["lr"] for group in groups if group["default_config"]), groups[0]["lr"])


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of all gradients as they were summed, over all ranks and before they are clipped. The optimizer's `step`
    may follow: it clips by the same norm. Collective."""
    if optimizer.prepare_grads():
        return math.inf
    return float(optimizer.get_grad_norm())


def prepare_adam_state(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter shard its AdamW state now, each with a step counter of its own.

    Megatron's distributed optimizer expects the state to exist before the first save or load, and loading leaves one
    counter shared by all shards, which torch's AdamW then advances once per shard. Call it after building and after
    loading; states that exist keep their values.
    """
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner, torch.optim.AdamW):
            continue  # a fused AdamW has no such troubles
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).clone()


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """torch's, or Transformer Engine's, inside Megatron's; ranks without parameters of a kind have none for it."""
    return [part.optimizer for part in optimizer_parts(optimizer) if part.optimizer is not None]


def num_stepped(optimizer: MegatronOptimizer) -> list[int]:
    """Parameters, or parts of them, that this rank steps: of each kind that any rank steps, in one order."""
    groups = [[] if part.optimizer is None else part.optimizer.param_groups for part in optimizer_parts(optimizer)]
    return [sum(len(group["params"]) for group in of_kind) for of_kind in groups]


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Takes the moments of a loaded `sharded_state_dict`, not its settings: those are the configuration's.

    Where torch's AdamW is inside, its counters are set aside while Megatron copies the moments, because it would look
    for a saved tensor for each of them.
    """
    settings = [_settings(group) for group in optimizer.param_groups]
    parts = optimizer_parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, part_state in zip(parts, states, strict=True):
        _give_own_settings(part, part_state)
        if not (isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)):
            part.load_state_dict(part_state)
            continue
        moments = part_state.pop("param_state")
        part.load_state_dict(part_state)
        counters = {parameter: values.pop("step") for parameter, values in part.optimizer.state.items()}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, counter in counters.items():
            part.optimizer.state[parameter]["step"] = counter
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    prepare_adam_state(optimizer)


def _give_own_settings(part: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Has the saved groups of parameters say what the groups here say. From 0.19 on Megatron-Core finds one by the
    other through learning rates and weight decay, too, which a configuration may change from one start to the next."""
    state = state if "param_groups" in state else state["optimizer"]
    saved = state["param_groups"]
    if isinstance(part, DistributedOptimizer):  # saves them without parameters; all groups have taken the same steps
        steps = [{"step": group["step"]} for group in saved if group.get("step") is not None]
        state["param_groups"] = [_settings(group) | (steps[0] if steps else {}) for group in part.param_groups]
        return
    for group in saved:
        same = [own for own in part.param_groups if all(own.get(key) == group.get(key) for key in _KIND)]
        if len(same) == 1:
            group.update(_settings(same[0]))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those of dense weights and of experts; itself where it is one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
