"""A trainer's steps with a KL in one stream's reward and an entropy bonus in each, and the loss of the second in plain
torch: all logits at once, formulas written out response by response, no part of ours but the rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.processor import Processor
from megatron_sr1.streams import preset_from_config
from megatron_sr1.training.token_files import ResponseName, TokenMeasures, read_tokens
from megatron_sr1.training.token_writer import TokenWriter
from megatron_sr1.types import BANNED_LOGIT_BIAS, TokenSequence
from tests.batch_cases import their_rewards, two_groups
from tests.step_cases import trained

BETA, BETA_VISUAL, ETA, ETA_VISUAL, CONSTANT, TEMPERATURE = 0.5, 0.2, 0.05, -0.03, 40, 0.9
_ANSWER = f"kl_in: reward, kl_estimator: k1, kl_coef: {BETA}, entropy_coef: {ETA}, advantage: leave_one_out"
_VISUAL = f"kl_coef: {BETA_VISUAL}, entropy_coef: {ETA_VISUAL}, aggregation: sequence_mean"
OVERRIDES = (
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", f"rollout.temperature={TEMPERATURE}"),
    *("train.batch_size=2", "train.micro_batch_tokens=256"),
    *("objective.max_logprob_gap=1000", "optimizer.clip_grad=1000000"),  # the rollouts are nobody's; whole gradients
    f"objective.streams=[{{name: answer, {_ANSWER}, aggregation: constant, constant_tokens: {CONSTANT}}}, "
    f"{{name: visual, {_VISUAL}}}]",
)


@dataclass(frozen=True)
class Steps:
    """What two updates report, and the weights between them."""

    first: Any  # StepResult
    second: Any
    between: dict[str, Tensor]
    tokens: dict[ResponseName, TokenMeasures]  # of the second


def two_updates(policy: Any, config: Config, processor: Processor, folder: Path) -> Steps:
    """On the same rollouts; at the second the policy is no more its reference. Every rank holds them all.

    `folder`: of all ranks, where measures of tokens go.
    """
    from megatron_sr1.training.trainer import Trainer

    preset = preset_from_config(config.objective)
    trainer = Trainer(config, policy, preset, processor, tokens=TokenWriter.of(folder, policy, preset))
    (first,) = trainer.update(trained(processor, preset))
    between = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    (second,) = trainer.update(trained(processor, preset))
    torch.distributed.barrier()  # all parts are there
    tokens = read_tokens(folder, 0)
    torch.distributed.barrier()  # and stay until all have read them
    return Steps(first, second, between, tokens)


def check_tokens(found: Steps, expected: Steps, where: Any) -> None:
    """Of the same responses the same measures, to the rounding of 16 bits."""
    assert found.tokens.keys() == expected.tokens.keys() and found.tokens, where
    for name, theirs in expected.tokens.items():
        ours = found.tokens[name]
        assert ours.ids == theirs.ids and ours.values.keys() == theirs.values.keys() >= {"gap", "entropy"}, where
        for key, values in theirs.values.items():
            assert ours.values[key] == pytest.approx(values, rel=2e-3, abs=1e-4), (where, name, key)


def plain_loss(policy: torch.nn.Module, reference: torch.nn.Module, processor: Processor) -> tuple[Tensor, float]:
    """The loss of the second update by transformers' models, with its gradient; and what the KL takes off the reward of
    an answer, in the mean."""
    rewards = their_rewards()
    pairs = [(pair, group.prompt) for group in two_groups(processor) for pair in group.pairs]
    answers, visuals = [], []  # (log-probs, entropies, reference's log-probs) of each rollout
    for pair, prompt in pairs:
        images = tuple(processor.encode_image(image) for image in prompt.images)
        first = TokenSequence(pair.first.prompt_ids, pair.first.response_ids, images)
        answers.append(_scores(policy, reference, first, processor))
        if pair.second is not None:
            second = TokenSequence(pair.second.prompt_ids, pair.second.response_ids)
            visuals.append((len(answers) - 1, _scores(policy, reference, second, processor)))

    kl = [float((new.detach() - ref).sum()) for new, _, ref in answers]
    earned = [float(rewards["acc"][i] + 0.1 * rewards["fmt"][i]) - BETA * kl[i] for i in range(4)]
    loss = torch.zeros(())
    for i, (new, entropy, _) in enumerate(answers):
        advantage = earned[i] - earned[i ^ 1]  # of two samples, the other is the mean of the others
        policy_term = -advantage * (new - new.detach()).exp().sum()
        loss = loss + (0.5 * policy_term - ETA * entropy.sum()) / (4 * CONSTANT)

    seen = rewards["acc_vis"] + 0.1 * rewards["fmt_vis"]
    for i, (new, entropy, ref) in visuals:
        group = seen[[i, i ^ 1]]
        advantage = float((seen[i] - group.mean()) / (group.std() + 1e-6))
        policy_term = -advantage * (new - new.detach()).exp().mean()
        kl_term = ((ref - new).exp() - (ref - new) - 1).mean()
        loss = loss + (0.5 * policy_term + BETA_VISUAL * kl_term - ETA_VISUAL * entropy.mean()) / 4
    return loss, BETA * sum(kl) / 4


def _scores(
    policy: torch.nn.Module, reference: torch.nn.Module, sequence: TokenSequence, processor: Processor
) -> tuple[Tensor, Tensor, Tensor]:
    log_p = log_softmax(policy, sequence, processor)
    with torch.no_grad():
        held = log_softmax(reference, sequence, processor)
    chosen = torch.tensor(sequence.response_ids)[:, None]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, chosen)[:, 0], entropy, held.gather(1, chosen)[:, 0]


def log_softmax(model: torch.nn.Module, sequence: TokenSequence, processor: Processor) -> Tensor:
    """[n, V] of the response, at the temperature and without the banned ids."""
    prompt = torch.tensor(sequence.prompt_ids)
    ids = torch.cat([prompt, torch.tensor(sequence.response_ids)])[None]
    vision = {}
    if sequence.images:
        marks = torch.zeros_like(ids)
        marks[0, : len(prompt)] = (prompt == processor.image_token_id).long()
        vision = {
            "pixel_values": torch.cat([image.pixel_values for image in sequence.images]),
            "image_grid_thw": torch.tensor([image.grid_thw for image in sequence.images]),
            "mm_token_type_ids": marks.int(),
        }
    logits = model(input_ids=ids, **vision).logits[0, len(prompt) - 1 : -1]
    bias = torch.zeros(logits.shape[-1]).index_fill(0, torch.tensor(processor.media_ids), BANNED_LOGIT_BIAS)
    return ((logits + bias) / TEMPERATURE).log_softmax(-1)
