"""Rewards -> advantages: how much better a response is than those beside it, which answer its prompt or are its batch.

    z_score        A_i = (r_i - mean) / (std + eps)          Vision-SR1, arXiv 2508.19652, eq. 6; GRPO, 2402.03300
    centred        A_i = r_i - mean                          Dr.GRPO, arXiv 2503.20783: no std, no bias to easy prompts
    leave_one_out  A_i = r_i - mean of the others            RLOO, arXiv 2402.14740; = n / (n - 1) (r_i - mean)
    batch_std      A_i = (r_i - mean) / (std_B + eps)        REINFORCE++ with baseline, arXiv 2501.03262: std_B is that
                                                             of the centred rewards of the whole batch
    reward_std     A_i = (r_i - mean) / (std_R + eps)        Lite PPO, arXiv 2508.08221: std_R is that of the rewards
                                                             of the whole batch as they are

`std` is the sample standard deviation (divisor n - 1), as in the public GRPO implementations. The paper writes the
statistics over the rollout batch; GRPO takes them over the K responses to one prompt: scope "batch" and "group".

Shape legend: B rollouts (first passes) of the step, G groups, both over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from megatron_sr1.types import AdvantageKind, AdvantageScope, RewardStream


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    eps: float,
    scope: AdvantageScope,
    kind: AdvantageKind = "z_score",
) -> Tensor:
    """Advantages of one reward.

    A set of equal rewards (a group of one among them) gives exactly 0. The statistics are computed in float64.

    Args:
        rewards: [B] floating point.
        group_ids: [B] integers; equal where two rollouts answer one prompt. They need not be sorted or contiguous.
        eps: added to the standard deviation, in units of the reward.
        scope: "group" or "batch"; "batch_std" and "reward_std" are of groups.
        kind: see above.

    Returns:
        [B], dtype of `rewards`, without gradient.

    Raises:
        ValueError: shapes disagree, a dtype, the scope or the kind is wrong, eps is not positive, or a reward is not
            finite.
    """
    _check(rewards, group_ids, eps, scope, kind)
    values = rewards.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("rewards: not all are finite; a reward that cannot be computed is an error, not a number.")
    if scope == "batch":
        group_ids = torch.zeros_like(group_ids)
    ids, member = torch.unique(group_ids, return_inverse=True)  # [G], [B]

    def group_sum(terms: Tensor) -> Tensor:  # [B] -> [G]
        return torch.zeros(ids.numel(), dtype=torch.float64, device=terms.device).index_add(0, member, terms)

    count = group_sum(torch.ones_like(values))  # [G]
    centred = values - (group_sum(values) / count)[member]  # [B]
    # A mean of equal numbers may differ from them in the last bit, and eps is small: such a group is set to 0.
    highest = torch.full_like(count, -torch.inf).scatter_reduce(0, member, values, "amax")
    lowest = torch.full_like(count, torch.inf).scatter_reduce(0, member, values, "amin")
    centred = torch.where((highest > lowest)[member], centred, 0.0)
    if kind == "centred":
        scores = centred
    elif kind == "leave_one_out":
        scores = centred * (count / (count - 1).clamp(min=1))[member]
    elif kind == "batch_std":
        scores = centred / ((centred.square().sum() / max(1, centred.numel() - 1)).sqrt() + eps)
    elif kind == "reward_std":
        scores = centred / (_std(values) + eps)
    else:
        std = (group_sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()  # [G]
        scores = centred / (std[member] + eps)
    return scores.to(rewards.dtype)


def _std(values: Tensor) -> Tensor:
    return (values - values.mean()).square().sum().div(max(1, values.numel() - 1)).sqrt()


def stream_advantages(
    stream: RewardStream,
    component_rewards: Mapping[str, Tensor],
    group_ids: Tensor,
    eps: float,
    kl: Tensor | None = None,
    earned: Tensor | None = None,
) -> Tensor:
    """Advantages of one stream from its reward components, by its own kind z and scope.

        normalize "sum":            A = z(sum_c w_c r_c)
        normalize "per_component":  A = sum_c w_c z(r_c)             GDPO, arXiv 2601.05242
        kl_in "reward":             A = z(sum_c w_c r_c - beta KL)   InstructGPT, arXiv 2203.02155, eq. 2
        a contrast in the reward:   A = z(sum_c w_c r_c + e)

    GDPO ends with one more z-score of the summed advantages over the batch. Each z(r_c) already has mean 0 in every
    group, so that step is one common factor for the whole batch; it is left out, as the weights then keep their
    meaning and a stream of one component equals plain GRPO.

    Args:
        stream: names the components and their weights, kind and scope.
        component_rewards: component -> [B] floating point; 0 in the second-pass components where there is no
            second pass. Components of other streams may be present.
        group_ids: [B] integers.
        eps: added to each standard deviation.
        kl: [B] nats, of the weights that drew the responses to the reference, summed over each response's tokens in the
            stream; needed where the stream's KL is in the reward.
        earned: [B], e: what each response earns by the stream's contrast; needed where it earns by one.

    Returns:
        [B], dtype of the first component.

    Raises:
        ValueError: a component, the KL or what a contrast is worth is missing, or see `group_advantages`.
    """
    _check_components(stream, component_rewards, group_ids)
    in_reward = stream.kl_in == "reward"
    if in_reward:
        _check_kl(stream, kl, group_ids)
    dtype = component_rewards[stream.rewards[0][0]].dtype
    weighted = [(weight, component_rewards[name].to(torch.float64)) for name, weight in stream.rewards]
    how = (stream.scope, stream.advantage)
    if stream.normalize == "per_component":
        terms = [weight * group_advantages(reward, group_ids, eps, *how) for weight, reward in weighted]
        return torch.stack(terms).sum(dim=0).to(dtype)
    total = torch.stack([weight * reward for weight, reward in weighted]).sum(dim=0)
    if in_reward and kl is not None:
        total = total - stream.kl_coef * kl.to(torch.float64)
    if stream.earns_by_contrast:
        total = total + _checked_earned(stream, earned, group_ids).to(torch.float64)
    return group_advantages(total, group_ids, eps, *how).to(dtype)


def _check_components(stream: RewardStream, component_rewards: Mapping[str, Tensor], group_ids: Tensor) -> None:
    missing = [name for name, _ in stream.rewards if name not in component_rewards]
    if missing:
        raise ValueError(
            f"component_rewards: stream {stream.name!r} needs {missing}, got {sorted(component_rewards)}; "
            "compute these rewards too."
        )
    for name, _ in stream.rewards:
        reward = component_rewards[name]
        if reward.shape != group_ids.shape or not reward.is_floating_point():
            raise ValueError(
                f"component_rewards[{name!r}]: need floating point {tuple(group_ids.shape)}, got {reward.dtype} "
                f"{tuple(reward.shape)}."
            )


def _checked_earned(stream: RewardStream, earned: Tensor | None, group_ids: Tensor) -> Tensor:
    if earned is None or earned.shape != group_ids.shape or not bool(torch.isfinite(earned).all()):
        raise ValueError(
            f"earned: stream {stream.name!r} earns by its contrast, so it needs a finite number for each of "
            f"{len(group_ids)} rollouts, got {earned}."
        )
    return earned


def _check_kl(stream: RewardStream, kl: Tensor | None, group_ids: Tensor) -> None:
    if kl is None or kl.shape != group_ids.shape or not bool(torch.isfinite(kl).all()):
        raise ValueError(
            f"kl: stream {stream.name!r} has kl_in='reward', so it needs a finite number for each of "
            f"{len(group_ids)} rollouts, got {kl}."
        )
    if stream.normalize == "per_component":
        raise ValueError(f"stream {stream.name!r}: kl_in='reward' needs one sum of rewards, normalize='sum'.")


def _check(rewards: Tensor, group_ids: Tensor, eps: float, scope: AdvantageScope, kind: AdvantageKind) -> None:
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards: need floating point [num_rollouts], got {rewards.dtype} {tuple(rewards.shape)}.")
    if group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise ValueError(
            f"group_ids: need one integer per reward, {tuple(rewards.shape)}, got {group_ids.dtype} "
            f"{tuple(group_ids.shape)}."
        )
    if eps <= 0:
        raise ValueError(f"eps={eps!r}: must be greater than 0.")
    if scope not in get_args(AdvantageScope):
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(get_args(AdvantageScope))}.")
    if kind not in get_args(AdvantageKind) or (kind in ("batch_std", "reward_std") and scope == "batch"):
        raise ValueError(
            f"kind={kind!r}, scope={scope!r}: kinds are {', '.join(get_args(AdvantageKind))}, and batch_std and "
            'reward_std divide what is centred by groups: with scope "batch" they are z_score.'
        )
