"""A trainer's steps with contrasts, and the loss of the second in plain torch: all logits at once, transformers', with
formulas written out response by response; no part of ours but the rollouts and the encoded images."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.types import EncodedImage, TokenSequence
from tests.batch_cases import GOOD, their_rewards, two_groups
from tests.trainer_cases import log_softmax

SHARES = {"papo": 0.6, "vppo": 0.5}  # of the methods' files
LOW, TOP, GAMMA, ETA = 0.9, 0.4, 0.01, -0.03
_STEP = (
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.temperature=0.9", "seed=7"),
    *("train.batch_size=2", "train.micro_batch_tokens=256", "objective.kl_coef=0"),
    *("objective.max_logprob_gap=1000", "optimizer.clip_grad=1000000"),  # the rollouts are nobody's; whole gradients
)
VPPO, PAPO, PGPO, CAPPO, VES = (
    (*_STEP, f"objective.preset={name}") for name in ("vppo", "papo", "pgpo", "cappo", "ves_rft")
)
THRESHOLD, TOGETHER = 0.005, 1.0  # a new model depends on little; more than the file has, so that it is seen
_WEIGHTED = f"contrast: blind, token_weighting: top, token_share: {TOP}, sequence_weight_low: {LOW}"
BLIND = (
    *_STEP,
    "objective.preset=see_think",
    "objective.contrast=[{name: blind, context: no_image}]",
    f"objective.streams=[{{name: answer, {_WEIGHTED}}}]",
)

EARNED = (
    *_STEP,
    "objective.preset=see_think",
    "objective.contrast=[{name: blind, context: no_image}]",
    "objective.streams=[{name: answer, contrast: blind, contrast_reward: 20, advantage: centred}]",
)


_WHOLE = "contrast_coef: 1, contrast_divergence: full, contrast_entropy_coef: 0, entropy_coef: 0"
WHOLE = (*PAPO, f"objective.streams=[{{name: answer, {_WHOLE}}}]")
# centred: of two responses the z-score has but a sign
SURER = 10.0
VES_RFT = (*VES, f"objective.streams=[{{name: answer, contrast_entropy_reward: {SURER}, advantage: centred}}]")


def blind(sequence: TokenSequence, key: str, processor: Processor) -> TokenSequence:
    """Without its image."""
    kept = [token for token in sequence.prompt_ids if token not in processor.media_ids]
    return TokenSequence(kept, sequence.response_ids)


def masked(sequence: TokenSequence, key: str, processor: Processor, share: float = SHARES["papo"]) -> TokenSequence:
    """With patches of its only image black; the draws are those of seed 7 and step 0."""
    (image,) = sequence.images
    digest = hashlib.blake2b(f"7/0/masked/{key}/0".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    patches = image.patches().clone()
    for patch, drawn in enumerate(torch.rand(len(patches), generator=generator).tolist()):
        if drawn < share:
            patches[patch] = 0
    return replace(sequence, images=(_Shown(image, patches),))  # type: ignore[arg-type]


def half_masked(sequence: TokenSequence, key: str, processor: Processor) -> TokenSequence:
    return masked(sequence, key, processor, SHARES["vppo"])


class _Shown:
    """An image with other patches."""

    def __init__(self, image: EncodedImage, patches: Tensor) -> None:
        self.grid_thw, self.pixel_values = image.grid_thw, image.normalisation.applied(patches)


def responses(processor: Processor) -> list[tuple[TokenSequence, str]]:
    """The first passes, with the keys of their prompts."""
    found = []
    for group in two_groups(processor):
        images = tuple(processor.encode_image(image) for image in group.prompt.images)
        for pair in group.pairs:
            found.append((TokenSequence(pair.first.prompt_ids, pair.first.response_ids, images), group.prompt.key))
    return found


def advantages() -> list[float]:
    """Of the four first passes: acc + 0.1 fmt within the groups."""
    rewards = their_rewards()
    scores = (rewards["acc"] + 0.1 * rewards["fmt"]).view(2, 2)
    spread = scores.std(1, keepdim=True) + 1e-6
    return ((scores - scores.mean(1, keepdim=True)) / spread).flatten().tolist()


def _chosen(model: torch.nn.Module, sequence: TokenSequence, processor: Processor) -> tuple[Tensor, Tensor]:
    log_p = log_softmax(model, sequence, processor)
    ids = torch.tensor(list(sequence.response_ids))[:, None]
    return log_p.gather(1, ids)[:, 0], -(log_p.exp() * log_p).sum(-1)


def vppo_loss(
    model: torch.nn.Module, processor: Processor, context: Any = half_masked, eta: float = -0.06
) -> tuple[Tensor, dict[str, float]]:
    """A token mean of -A w m ratio - eta H, with the tokens m that depend most and the responses' weights w; and the
    mean gap."""
    terms, gaps, count, entropies = [], 0.0, 0, torch.zeros(())
    for sequence, key in responses(processor):
        own, entropy = _chosen(model, sequence, processor)
        entropies = entropies + entropy.sum()
        with torch.no_grad():
            under, _ = _chosen(model, context(sequence, key, processor), processor)
        gap = [float(a) - float(b) for a, b in zip(own.detach(), under, strict=True)]
        depends = [math.exp(-one) + one - 1.0 for one in gap]
        ranked = sorted(range(len(gap)), key=lambda place: -depends[place])[: math.ceil(TOP * len(gap))]
        terms.append((own, depends, set(ranked)))
        gaps, count = gaps + sum(gap), count + len(gap)
    means = [sum(depends) / len(depends) for _, depends, _ in terms]
    spread = [(mean - min(means)) / (max(means) - min(means)) for mean in means]
    factors = [LOW + (1.0 - LOW) * one / (sum(spread) / len(spread)) for one in spread]
    loss = -eta * entropies
    for (own, _, kept), factor, advantage in zip(terms, factors, advantages(), strict=True):
        for place in kept:
            loss = loss - advantage * factor * (own[place] - own[place].detach()).exp()
    name = "blind" if context is blind else "masked"
    return loss / count, {f"dependency/{name}/response": gaps / count}


def papo_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """Token means: -A ratio - gamma k3(own, masked) - eta (H(own) + H(masked)), gradients through both."""
    loss, count, sums = torch.zeros(()), 0, {"far": 0.0, "gap": 0.0, "entropy": 0.0}
    for (sequence, key), advantage in zip(responses(processor), advantages(), strict=True):
        own, entropy = _chosen(model, sequence, processor)
        under, entropy_under = _chosen(model, masked(sequence, key, processor), processor)
        far = (under - own).exp() - (under - own) - 1.0
        policy_term = -advantage * (own - own.detach()).exp().sum()
        bonus = ETA * (entropy.sum() + entropy_under.sum())
        loss = loss + policy_term - GAMMA * far.sum() - bonus
        count += len(own)
        for name, value in (("far", far), ("gap", own - under), ("entropy", entropy_under)):
            sums[name] += float(value.detach().sum())
    return loss / count, {
        "loss/answer/contrast": sums["far"] / count,
        "loss/answer/contrast_entropy": sums["entropy"] / count,
        "dependency/masked/response": sums["gap"] / count,
    }


def whole_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """Token means: -A ratio - KL(own || masked) of whole distributions by torch, gradients through both."""
    loss, count, distance = torch.zeros(()), 0, 0.0
    for (sequence, key), advantage in zip(responses(processor), advantages(), strict=True):
        own = log_softmax(model, sequence, processor)
        under = log_softmax(model, masked(sequence, key, processor), processor)
        far = torch.nn.functional.kl_div(under, own, reduction="none", log_target=True).sum()
        chosen = own.gather(1, torch.tensor(list(sequence.response_ids))[:, None])[:, 0]
        loss = loss - advantage * (chosen - chosen.detach()).exp().sum() - far
        count, distance = count + len(chosen), distance + float(far.detach())
    return loss / count, {"loss/answer/contrast": distance / count}


def pgpo_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """A token mean of -A w ratio, where a token weighs n g / sum g with g = 1 + D from the threshold on."""
    loss, count, gaps = torch.zeros(()), 0, 0.0
    for (sequence, key), advantage in zip(responses(processor), advantages(), strict=True):
        own, _ = _chosen(model, sequence, processor)
        with torch.no_grad():
            under, _ = _chosen(model, blind(sequence, key, processor), processor)
        gap = [float(a) - float(b) for a, b in zip(own.detach(), under, strict=True)]
        depends = [math.exp(-one) + one - 1.0 for one in gap]
        gates = [1.0 + depend if depend >= THRESHOLD else 1.0 for depend in depends]
        assert 1 < sum(gate > 1 for gate in gates) < len(gates)
        for place, gate in enumerate(gates):
            weight = len(gates) * gate / sum(gates)
            loss = loss - advantage * weight * (own[place] - own[place].detach()).exp()
        gaps, count = gaps + sum(gap), count + len(gap)
    return loss / count, {"dependency/blind/response": gaps / count}


def told(sequence: TokenSequence, processor: Processor) -> tuple[TokenSequence, int] | None:
    """With the block that it describes with in the place of its image, and how many ids that has."""
    block = processor.text_ids(GOOD[: GOOD.index("</description>") + len("</description>")])
    if tuple(sequence.response_ids[: len(block)]) != tuple(block):
        return None
    at = next(place for place, token in enumerate(sequence.prompt_ids) if token in processor.media_ids)
    before, behind = (
        [token for token in part if token not in processor.media_ids]
        for part in (sequence.prompt_ids[:at], sequence.prompt_ids[at:])
    )
    return TokenSequence([*before, *block, *behind], sequence.response_ids), len(block)


def cappo_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """Half of two token means, each over its own tokens, and k3 on the reasoning, gradients through both; the
    nearer the two contexts are, the more a response's reasoning weighs."""
    found, means = [], []
    for sequence, _ in responses(processor):
        own, _ = _chosen(model, sequence, processor)
        other = told(sequence, processor)
        if other is None:
            found.append((own, 0, torch.zeros(len(own))))
            continue
        under, _ = _chosen(model, other[0], processor)
        far = (under - own).exp() - (under - own) - 1.0
        far[: other[1]] = 0.0
        found.append((own, other[1], far))
        means.append(float(far[other[1] :].detach().clamp(max=10.0).mean()))
    near = [(max(means) - mean) / (max(means) - min(means)) for mean in means]
    factors = [LOW + (1.0 - LOW) * one * len(near) / sum(near) for one in near]
    reasons = sum(len(own) - start for own, start, _ in found)
    describes = sum(start for _, start, _ in found)
    loss, distance = torch.zeros(()), 0.0
    for index, (own, start, far) in enumerate(found):
        ratio = (own - own.detach()).exp()
        factor = factors[index] if start else 1.0  # the three that describe come first
        loss = loss - 0.5 * advantages()[index] * factor * ratio[start:].sum() / reasons
        loss = loss - 0.5 * advantages()[index] * ratio[:start].sum() / describes
        loss = loss + TOGETHER * far.sum() / reasons
        distance += float(far.detach().sum())
    return loss, {"loss/answer/contrast": distance / reasons}


def earned_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """A token mean of -A ratio, where a response earns 20 times its mean gap on top, centred within its group."""
    rewards = their_rewards()
    owns, earned = [], (rewards["acc"] + 0.1 * rewards["fmt"]).tolist()
    for index, (sequence, key) in enumerate(responses(processor)):
        own, _ = _chosen(model, sequence, processor)
        with torch.no_grad():
            under, _ = _chosen(model, blind(sequence, key, processor), processor)
        earned[index] += 20 * float((own.detach() - under).mean())
        owns.append(own)
    loss = torch.zeros(())
    for index, own in enumerate(owns):
        mean = (earned[index] + earned[index ^ 1]) / 2
        loss = loss - (earned[index] - mean) * (own - own.detach()).exp().sum()
    return loss / sum(map(len, owns)), {}


def entropy_loss(model: torch.nn.Module, processor: Processor) -> tuple[Tensor, dict[str, float]]:
    """A token mean of -A ratio, where a response earns SURER times its mean entropy without the image minus with it on
    top, centred within its group."""
    rewards = their_rewards()
    owns, earned, surer = [], (rewards["acc"] + 0.1 * rewards["fmt"]).tolist(), torch.zeros(())
    for index, (sequence, key) in enumerate(responses(processor)):
        own, entropy = _chosen(model, sequence, processor)
        with torch.no_grad():
            _, other = _chosen(model, blind(sequence, key, processor), processor)
        earned[index] += SURER * float((other - entropy.detach()).double().mean())
        surer = surer + (other - entropy.detach()).sum()
        owns.append(own)
    loss = torch.zeros(())
    for index, own in enumerate(owns):
        mean = (earned[index] + earned[index ^ 1]) / 2
        loss = loss - (earned[index] - mean) * (own - own.detach()).exp().sum()
    count = sum(map(len, owns))
    return loss / count, {"dependency/blind/entropy_gap": float(surer) / count}


CASES: dict[str, tuple[tuple[str, ...], Any]] = {
    "vppo": (VPPO, vppo_loss),
    "papo": (PAPO, papo_loss),
    "whole": (WHOLE, whole_loss),
    "pgpo": ((*PGPO, f"objective.streams=[{{name: answer, token_threshold: {THRESHOLD}}}]"), pgpo_loss),
    "cappo": ((*CAPPO, f"objective.streams=[{{name: answer, contrast_coef: -{TOGETHER}}}]"), cappo_loss),
    "earned": (EARNED, earned_loss),
    "ves_rft": (VES_RFT, entropy_loss),
    "blind": (BLIND, partial(vppo_loss, context=blind, eta=0.0)),
}
