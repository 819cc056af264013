"""What responses earn by a contrast: log-prob gaps and entropies, against sums over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.objective import stream_advantages
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import preset_from_config, preset_of
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.contrast_scores import contrast_rewards
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.types import LogProbs, RewardStream
from tests.step_cases import rows_of, trained

RHO, TAU = 0.5, -2.0


def test_entropies_and_gaps_are_what_a_response_earns(tiny_model_dir: str) -> None:
    """Of random scores, by loops over the tokens of each response; the one that describes nothing earns nothing."""
    contrast = "objective.contrast=[{name: told, context: description}]"
    stream = (
        f"objective.streams=[{{name: answer, contrast: told, contrast_reward: {RHO}, contrast_entropy_reward: {TAU}}}]"
    )
    config = load_config(None, ["objective.preset=see_think", contrast, stream, "train.micro_batch_tokens=256"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    assert preset.rewards_contrast and preset.compares_before
    rows = rows_of(Batcher(config, processor, ALONE), trained(processor, preset), preset)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[LogProbs]:
        sizes = [len(batch.targets) for batch in rows.micro_batches]
        return [LogProbs(*torch.randn(2, size, generator=generator, dtype=torch.float64)) for size in sizes]

    own, under = drawn(), drawn()
    zeros = [torch.zeros(len(batch.targets)) for batch in rows.contrasts["told"].micro_batches]
    _, there = rows.contrasts["told"].onto_own(zeros, rows.micro_batches, rows.num_responses)
    scores = ContrastScores({"told": own}, {"told": under}, {"told": there})
    found = contrast_rewards(rows, scores, preset.streams, 4, ALONE)
    sums, counts = [0.0] * 4, [0] * 4
    for index, tokens in enumerate(rows.tokens):
        for token, place in enumerate(tokens.place.tolist()):
            if there[index][token] and tokens.token_weights[0, token] != 0:
                gap = own[index].logprobs[token] - under[index].logprobs[token]
                mine, other = own[index].entropy, under[index].entropy
                assert mine is not None and other is not None
                sums[place] += float(RHO * gap + TAU * (other[token] - mine[token]))
                counts[place] += 1
    assert counts[3] == 0 and all(counts[:3])
    expected = [total / count for total, count in zip(sums[:3], counts[:3], strict=True)]
    assert found[0, :3].tolist() == pytest.approx(expected, rel=1e-12) and math.isnan(found[0, 3])
    same = ContrastScores({"told": own}, {"told": own}, {"told": there})
    assert contrast_rewards(rows, same, preset.streams, 4, ALONE)[0, :3].tolist() == [0, 0, 0], "nothing is taken away"


def test_an_advantage_has_what_a_contrast_is_worth() -> None:
    """Rewards 1 0, and 0.5 2 on top: 1.5 2, whose mean is 1.75."""
    stream = RewardStream("a", "first", "response", (("acc", 1.0),), advantage="centred", contrast_entropy_reward=0.1)
    rewards, groups = {"acc": torch.tensor([1.0, 0.0])}, torch.tensor([0, 0])
    found = stream_advantages(stream, rewards, groups, 1e-6, None, torch.tensor([0.5, 2.0]))
    assert found.tolist() == [-0.25, 0.25]
    for odd in (None, torch.tensor([0.5]), torch.tensor([0.5, math.nan]), torch.tensor([math.inf, 0.0])):
        with pytest.raises(
            ValueError, match="stream 'a' earns by its contrast, so it needs a finite number for each of 2"
        ):
            stream_advantages(stream, rewards, groups, 1e-6, None, odd)


_BLIND = "objective.contrast=[{name: blind, context: no_image}]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [_BLIND, "objective.streams=[{name: answer, contrast_entropy_reward: 1}]"],
            "contrast_entropy_reward, and names no",
        ),
        ([_BLIND, "objective.streams=[{name: answer, contrast_entropy_reward: .nan}]"], "entropy_reward=nan"),
        ([_BLIND, "objective.streams=[{name: answer, contrast_entropy_reward: 1001}]"], "entropy_reward=1001"),
        (
            [
                "objective.preset=gdpo",
                _BLIND,
                "objective.streams=[{name: answer, contrast: blind, contrast_entropy_reward: 1}]",
            ],
            "contrast_entropy_reward adds to one sum of rewards.*or leave contrast_entropy_reward out",
        ),
        (
            [_BLIND, "objective.streams=[{name: visual, contrast: blind, contrast_entropy_reward: 1}]"],
            "second pass sees none",
        ),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        preset_from_config(load_config(None, words).objective)
