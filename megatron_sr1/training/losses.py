"""The loss of each micro-batch of one optimizer step: `types.LossFn`s over the batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_sr1.config import ObjectiveConfig
from megatron_sr1.kernels import fused_stream_loss, is_fused
from megatron_sr1.objective import Mismatch, OwnLoss, importance_weights, sft_loss, stream_loss, token_kinds
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import SftBatch, StreamBatch, StreamRows
from megatron_sr1.training.contrast_terms import ContrastTerms
from megatron_sr1.training.token_files import DEPENDENCY, ENTROPY, GAP
from megatron_sr1.training.token_writer import Measured
from megatron_sr1.training.tokens import ResponseTokens
from megatron_sr1.types import LogProbs, LossInputs


class SftLoss:
    """Of demonstrations."""

    def __init__(self, batch: SftBatch) -> None:
        self._batch = batch

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return sft_loss(logprobs.logprobs, self._batch.token_weights[index])


class PolicyLoss:
    """Of rollouts (Vision-SR1, eq. 7-9), with how far trainer and generator are apart."""

    def __init__(
        self,
        batch: StreamBatch,
        old: list[LogProbs] | None,
        reference: list[LogProbs] | None,
        preset: Preset,
        objective: ObjectiveConfig,
        *,
        measures_gap: bool = True,
        contrast: ContrastTerms | None = None,
        keeps_tokens: bool = False,
    ) -> None:
        """
        Args:
            old: per micro-batch, of the weights that drew the rollouts, by whom objective.old says; None: the policy's
                present ones stand for them.
            reference: per micro-batch; None only where no stream has a KL term.
            measures_gap: the trainer's log-probs of the weights that drew the rollouts are known, so how far it is from
                the generator can be told.
            contrast: what contrasts add; its micro-batches come behind those of the batch.
            keeps_tokens: `measured` is wanted.
        """
        self.measured: dict[int, Measured] = {}  # by micro-batch of the batch, when it is scored; {}: by another rank
        self._keeps_tokens = keeps_tokens
        self._contrast = contrast
        self._names: list[str] = []  # of the metrics, which every micro-batch reports
        self._batch, self._old, self._reference, self._preset = batch, old, reference, preset
        self._is_trainers, self._measures_gap = objective.old == "trainer", measures_gap
        fits = all(is_fused(stream) for stream in preset.streams)
        ours = fused_stream_loss if fits else stream_loss
        self._loss = OwnLoss(objective.loss) if objective.loss else ours
        bounds = (objective.mismatch_low, objective.mismatch_high)
        self._mismatch = Mismatch(objective.mismatch, objective.mismatch_level, *bounds)

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self._contrast is None:
            return self._of_batch(index, logprobs)
        number = index - len(self._batch.micro_batches)
        if number >= 0:
            loss, metrics = self._contrast.other(number, logprobs)
            return loss, {**dict.fromkeys(self._names, loss.new_zeros(())), **metrics}
        loss, metrics = self._of_batch(index, logprobs)
        more, theirs = self._contrast.own(index, logprobs)
        metrics = {**metrics, **theirs}
        self._names = list(metrics)
        return loss + more, metrics

    def _of_batch(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]:
        micro_batch, tokens, trainer = self._batch.micro_batches[index], self._batch.tokens[index], logprobs.logprobs
        old = None if self._old is None else self._old[index].logprobs
        # the trainer's, of the weights that drew the tokens; where objective.old spares their pass, its present ones
        drawing = old if old is not None and self._is_trainers else trainer
        weights, bounded = importance_weights(
            drawing, tokens.generator_logprobs, micro_batch.row_sequence, self._mismatch
        )
        # what was drawn from a noisy image has a gap that is no error of the engine, and is learned from in full
        compared = tokens.compared
        weights, bounded = weights.masked_fill(~compared, 1.0), bounded & compared
        entropy = logprobs.entropy
        if entropy is not None and not self._preset.has_entropy_bonus:
            entropy = entropy.detach()  # the head gives it no gradient then
        loss, metrics = self._loss(
            LossInputs(
                trainer_logprobs=trainer,
                old_logprobs=old,
                ref_logprobs=None if self._reference is None else self._reference[index].logprobs,
                advantages=self._batch.advantages[index] * weights,
                token_weights=tokens.token_weights,
                streams=self._preset.streams,
                row_sequence=micro_batch.row_sequence,
                generator_logprobs=tokens.generator_logprobs,
                entropy=entropy,
            )
        )
        if self._keeps_tokens:
            self.measured[index] = self._measured(index, logprobs, drawing)
        means = {} if logprobs.entropy is None else {"entropy": logprobs.entropy.sum() / self._batch.num_tokens}
        gap = logprob_gaps(drawing.detach(), tokens)
        to_engine = {"logprob_gap": gap} if self._measures_gap else {}
        if self._mismatch.kind != "none":
            to_engine |= {"mismatch/weight": weights * compared, "mismatch/bounded": bounded}
        means |= {name: value.sum() / self._batch.num_compared for name, value in to_engine.items()}
        return loss, {**metrics, **means, **(gaps_by_kind(self._batch, index, gap) if self._measures_gap else {})}

    def _measured(self, index: int, logprobs: LogProbs, drawing: Tensor) -> Measured:
        """`drawing`: [R], the trainer's of the weights that drew the tokens, where the gap is measured."""
        tokens = self._batch.tokens[index]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if self._measures_gap:
            found[GAP] = (drawing.detach() - tokens.generator_logprobs, tokens.compared)
        if logprobs.entropy is not None:
            found[ENTROPY] = (logprobs.entropy.detach(), torch.ones_like(tokens.compared))
        gaps = {} if self._contrast is None else self._contrast.gaps(index, logprobs)
        return found | {DEPENDENCY + name: pair for name, pair in gaps.items()}


def logprob_gaps(trainer: Tensor, tokens: ResponseTokens) -> Tensor:
    """[R]: |log-prob gap| of each token to the generator; 0 where it was drawn from another image than is trained on.

    Args:
        trainer: [R], of the weights that drew the tokens.
    """
    return (trainer - tokens.generator_logprobs).abs().masked_fill(~tokens.compared, 0.0)


def gaps_by_kind(rows: StreamRows, index: int, gap: Tensor) -> dict[str, Tensor]:
    """What a micro-batch adds to the mean gap of each kind of token that occurs, by the name of its metric."""
    kinds = token_kinds(rows.tokens[index].image_distance, rows.micro_batches[index].row_offset)
    return {f"mismatch/{name}": (gap * kinds[name]).sum() / count for name, count in rows.num_of_kind.items()}
