"""AdamW under Megatron-Core's distributed optimizer, and what its checkpoints need where torch's AdamW is used."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sr1.config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, model: DistributedDataParallel, num_steps: int, distributed: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer and its schedule over `num_steps` optimizer steps. Biases and norms get no weight decay."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            params_dtype=torch.float32,
            use_distributed_optimizer=distributed,
        ),
        [model],
        use_gloo_process_groups=False,
    )
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


def torch_adam_states(optimizer: MegatronOptimizer) -> list[tuple[torch.optim.Optimizer, torch.Tensor, dict]]:
    """(torch optimizer, parameter shard, its state) of every shard this rank owns."""
    chained = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    return [
        (inner.optimizer, parameter, inner.optimizer.state[parameter])
        for inner in chained
        for group in inner.optimizer.param_groups
        for parameter in group["params"]
    ]
