"""What TRL and verl compute, written out on padded matrices as they lay responses out: [B, L] tokens and their mask,
[B, L, V] logits. Read of TRL 1.10 (`GRPOTrainer._compute_loss`, `RLOOTrainer`) and verl 0.10 (`core_algos.py`,
`workers/utils/losses.py`); docs/algorithms.md says what differs and which of our keys means what."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TRL_EPS, VERL_EPS = 1e-4, 1e-6


# ---------------------------------------------------------------- advantages of rewards [B], `size` to a group
def trl_grpo(rewards: Tensor, size: int, scale: str) -> Tensor:
    """GRPO with `scale_rewards` group, batch (Lite PPO) or none (Dr.GRPO). torch.std is of n - 1."""
    grouped = rewards.view(-1, size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (grouped.std(1, keepdim=True) + TRL_EPS)
    elif scale == "batch":
        centred = centred / (rewards.std() + TRL_EPS)
    return centred.flatten()


def trl_gdpo(rewards: Tensor, weights: Tensor, size: int) -> Tensor:
    """`normalize_then_sum` of rewards [B, C]: each by its group, the weighted sum by the batch."""
    grouped = rewards.view(-1, size, rewards.shape[1])
    scores = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + TRL_EPS)
    total = (scores.flatten(0, 1) * weights).sum(1)
    return (total - total.mean()) / (total.std() + TRL_EPS)


def trl_rloo(rewards: Tensor, size: int, beta: float = 0.0, kl: Tensor | None = None) -> Tensor:
    """RLOO, with the summed log ratio of old policy and reference [B] off the reward."""
    rewards = rewards if kl is None else rewards - beta * kl
    grouped = rewards.view(-1, size)
    baselines = (grouped.sum(1, keepdim=True) - grouped) / (size - 1)
    return (grouped - baselines).flatten()


def verl_grpo(token_rewards: Tensor, size: int, by_std: bool) -> Tensor:
    """Of rewards [B, L] at their tokens, as verl keeps them: the outcome at the last, minus beta KL at each."""
    grouped = token_rewards.sum(1).view(-1, size)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + VERL_EPS) if by_std else centred).flatten()


def verl_rloo(token_rewards: Tensor, size: int) -> Tensor:
    grouped = token_rewards.sum(1).view(-1, size)
    share = size / (size - 1)
    return (grouped * share - grouped.mean(1, keepdim=True) * share).flatten()


def verl_whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Over all tokens of the batch, [B, L]; the variance is of n - 1, and eps beneath the root."""
    number = mask.sum()
    mean = (values * mask).sum() / (number + 1e-8)
    var = ((values - mean).square() * mask).sum() / (number + 1e-8) * number / (number - 1)
    return (values - mean) * (var + 1e-8).rsqrt() * mask


def verl_reinforce_plus_plus_baseline(token_rewards: Tensor, mask: Tensor, size: int) -> Tensor:
    """[B, L]."""
    grouped = token_rewards.sum(1).view(-1, size)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    return verl_whitened(centred[:, None] * mask, mask)


def verl_reinforce_plus_plus(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, L], gamma 1: what is still to come of a response's rewards, whitened."""
    to_come = token_rewards.flip(1).cumsum(1).flip(1) * mask
    return verl_whitened(to_come, mask)


# ---------------------------------------------------------------- surrogates of tokens: [B, L] each, advantages [B, 1]
def trl_ppo(new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    """Two-sided GRPO: `delta` bounds the ratio itself from above."""
    ratio = (new - old).exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    ratio = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(ratio * advantages, bounded * advantages)


def verl_ppo(new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float) -> Tensor:
    """Dual clip; `clip_ratio_c` is 3 by default, so it is always there."""
    ratio = (new - old).exp()
    value = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return torch.where(advantages < 0, torch.min(-advantages * dual, value), value)


def trl_gspo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """[B, 1]: a number for a response, whose ratio is the geometric mean of its tokens'."""
    mean = ((new - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = mean.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def verl_gspo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """[B, L]: the same ratio, with the gradient of each token's own log-prob (GSPO-token)."""
    mean = ((new - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (mean.detach() + new - new.detach()).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def trl_cispo(new: Tensor, old: Tensor, advantages: Tensor, most: float) -> Tensor:
    """`epsilon_high` is the bound itself, and there is none below."""
    return -(new - old).exp().clamp(max=most).detach() * advantages * new


def verl_cispo(new: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -(new - old).exp().clamp(1 - low, 1 + high).detach() * advantages * new


def sapo(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Of both, with their default temperatures."""
    tau = torch.where(advantages > 0, 1.0, 1.05)
    return -torch.sigmoid(tau * ((new - old).exp() - 1)) * 4 / tau * advantages


def kl_terms(new: Tensor, ref: Tensor) -> dict[str, Tensor]:
    """verl's `kl_penalty` inside its bounds (k3: 20 nats, then 10); k3 is TRL's."""
    gap = ref - new
    return {"k1": new - ref, "k2": 0.5 * (new - ref).square(), "k3": gap.exp() - gap - 1}


def entropies(logits: Tensor) -> Tensor:
    """verl's way: log of the sum of exponentials, less the mean logit."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


# ---------------------------------------------------------------- aggregations of [B, L] to a number
def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def aggregations(constant: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By our name: TRL's `loss_type` and verl's `loss_agg_mode` are in docs/algorithms.md."""
    return {
        "token_mean": lambda values, mask: (values * mask).sum() / mask.sum(),
        "sequence_mean": _sequence_mean,
        "sequence_sum": lambda values, mask: (values * mask).sum(1).mean(),
        "constant": lambda values, mask: (values * mask).sum() / (len(mask) * constant),
    }
