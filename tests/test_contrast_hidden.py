"""Whole distributions of two contexts: that each row finds the right ones, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import preset_from_config, preset_of
from megatron_sr1.training.batches import Batcher, StreamBatch
from megatron_sr1.training.contrast_terms import ContrastTerms
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.types import LogProbs, MicroBatch
from tests.step_cases import rows_of, trained

_TOLD = "objective.contrast=[{name: told, context: description}]"
_FULL = "contrast: told, contrast_coef: 0.1, contrast_divergence: full"


def _scored(batches: list[MicroBatch], sign: float, *, has_head: bool) -> list[LogProbs]:
    """With hidden states that tell each token's id and place in its response, and the context by their sign."""
    found = []
    for batch in batches:
        hidden = sign * torch.stack([batch.targets.float() + 1, batch.row_offset.float() + 1], 1)
        zeros = torch.zeros(len(batch.targets))
        found.append(LogProbs(zeros, zeros, hidden=hidden if has_head else None))
    return found


@pytest.mark.parametrize("has_head", [True, False])
def test_each_row_is_compared_with_the_same_tokens_in_the_other_context(tiny_model_dir: str, has_head: bool) -> None:
    """Only those that a stream compares: the reasoning of the responses that describe; a rank without a head, none."""
    stream = f"objective.streams=[{{name: answer, tokens: reasoning, {_FULL}}}]"
    config = load_config(None, ["objective.preset=see_think", _TOLD, stream, "train.micro_batch_tokens=256"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    assert preset.full_contrasts == preset.trained_contrasts == ("told",) and not preset.compares_before
    rows = rows_of(Batcher(config, processor, ALONE), trained(processor, preset), preset)
    weights = [tokens.segments[0] & ~tokens.segments[1] for tokens in rows.tokens]  # all but the description
    tokens = [replace(one, token_weights=w[None].float()) for one, w in zip(rows.tokens, weights, strict=True)]
    batch = StreamBatch(**{**vars(rows), "tokens": tokens}, advantages=[])
    told = rows.contrasts["told"]
    zeros = [torch.zeros(len(each.targets)) for each in told.micro_batches]
    under, there = told.onto_own(zeros, rows.micro_batches, rows.num_responses)
    own = _scored(rows.micro_batches, 1.0, has_head=has_head)
    other = [each.hidden for each in _scored(told.micro_batches, -1.0, has_head=has_head)]
    scores = ContrastScores({"told": own}, {"told": [LogProbs(x, x) for x in under]}, {"told": there}, {"told": other})
    terms = ContrastTerms(batch, scores, preset)
    for sign, found in ((-1.0, terms.own_batches), (1.0, terms.micro_batches)):
        number = 0
        for row in found:
            assert len(row.others) == int(has_head)
            for one in row.others:
                assert one.is_own is (sign > 0)
                expected = torch.stack([row.targets[one.rows] + 1, row.row_offset[one.rows] + 1], 1)
                assert torch.equal(one.hidden, sign * expected.float())
                number += len(one.rows)
        assert number == has_head * sum(int((w & t).sum()) for w, t in zip(weights, there, strict=True))
    kept = terms._scores.own["told"]
    assert kept is not None and all(each.hidden is None for each in kept), "what is large goes with the rows"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [_TOLD, "objective.streams=[{name: answer, contrast: told, contrast_divergence: full}]"],
            "and no contrast_coef",
        ),
        ([_TOLD, "objective.streams=[{name: answer, contrast_divergence: k2}]"], "divergence='k2'.*one of k3, full"),
        (
            [_TOLD.replace("}", ", weights: reference}"), f"objective.streams=[{{name: answer, {_FULL}}}]"],
            "its weights are the reference's",
        ),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        preset_from_config(load_config(None, words).objective)
