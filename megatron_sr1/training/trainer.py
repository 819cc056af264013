"""The optimizer steps of one rollout batch: rewards -> advantages -> packed rows -> steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sr1.config import NO_REPLAY, Config, Replay
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import agreed
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import Preset, check_old, check_replay
from megatron_sr1.training.bad_steps import bad_samples, finite, not_finite
from megatron_sr1.training.batches import Batcher, StreamRows, optimizer_shares
from megatron_sr1.training.contrast_scores import ContrastScorer, contrast_rewards, contrast_weights, of_siblings
from megatron_sr1.training.contrast_terms import ContrastTerms, with_means
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.logprob_gap import check_logprob_gap, max_logprob_gap
from megatron_sr1.training.losses import PolicyLoss, gaps_by_kind, logprob_gaps
from megatron_sr1.training.payload import Payload, Place, share_responses
from megatron_sr1.training.response_kl import response_kl
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.training.token_writer import TokenWriter
from megatron_sr1.types import DrawnPrompts, LogProbs, OldLogprobs, Scoring

NUM_COMPARED = 8  # groups whose log-probs are compared before a first step
Scored = tuple[list[LogProbs], ContrastScores | None]  # by micro-batch, and of contrasts


class NoTrainer:
    """Takes the place of a `Trainer` where the policy stays as it is."""

    def update(self, rollouts: StepRollouts) -> list[StepResult]:
        """No step."""
        return []


class Trainer:
    """Trains a policy on scored rollouts."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        preset: Preset,
        processor: Processor,
        replay: Replay = NO_REPLAY,
        tokens: TokenWriter | None = None,
    ) -> None:
        """
        Args:
            replay: see `replay_of`.
            tokens: takes what is measured of each token.

        Raises:
            ConfigError: see `Batcher`.
        """
        self._config = config
        self._policy = policy
        self._preset = preset
        self._scoring = Scoring(config.rollout.temperature, processor.media_ids)
        self._max_logprob_gap = max_logprob_gap(config, policy.platform.on_cpu)
        self._contrasts = ContrastScorer(policy, preset, self._scoring)
        self._replay = replay
        self._batcher = Batcher(config, processor, policy.replicas, policy.platform.device, replay)
        self._tokens = tokens or TokenWriter.nothing()
        ranks, self._replica = policy.platform.ranks, policy.replicas.rank
        self._payload = Payload(ranks, ranks.gather([self._replica]), replay)

    def update(self, rollouts: StepRollouts) -> list[StepResult]:
        """One optimizer step per `train.batch_size` prompts. With several, old log-probs are taken before the first, or
        are the generator's; where a KL is in the reward, old and reference log-probs are taken, before the advantages.
        Where the policy's own choice of experts is replayed, it is made before any of these.

        Raises:
            ValueError: trainer and generator are too far apart, see `check_logprob_gap`; see `_whose`.
            RewardError: so many groups were skipped that a replica has none; before the first step.
            OSError: what is measured of tokens cannot be written.
        """
        self._policy.return_to_device()
        self._tokens.begin(rollouts.step)
        ledger, places = rollouts.trained
        shares = list(self._shares(places))
        rows = [self._rows(ledger.of(share), rollouts) for share in shares]
        preset, objective, whose = self._preset.at(rollouts.step), self._config.objective, self._whose(ledger)
        needs_old = whose == "generator" or (whose == "trainer" and len(shares) > 1)
        mine, old = self._before(rows, preset, whose, needs_old=needs_old)
        reference: list[Scored] = []
        if preset.kl_in_reward or preset.rewards_contrast:
            reference = list(map(self._reference, rows))
        kl = earned = None  # [S, B, M]
        if preset.kl_in_reward:
            held = [scores for scores, _ in reference]
            kl = torch.cat([self._kl(*each) for each in zip(shares, rows, old, held, strict=True)], 1)
        if preset.rewards_contrast:
            by = [_joined(*each) for each in zip(mine, (theirs for _, theirs in reference), strict=True)]
            earned = torch.cat([self._earned(*each) for each in zip(shares, rows, by, strict=True)], 1)
        advantages, bad = self._advantages(ledger, preset, kl, earned)
        results = []
        for number, share in enumerate(shares):
            row = rows[number]
            held, theirs = reference[number] if reference else self._reference(row)
            weights = None
            if preset.weighs_contrast:
                weights = contrast_weights(row, _joined(mine[number], theirs), preset.streams, self._policy.replicas)
            batch = self._batcher.streams(row, advantages[:, self._rollouts(share)], preset, weights)
            terms = None
            if preset.contrasts:  # the scores are not held here: what they keep for whole distributions is large
                terms = ContrastTerms(batch, self._scores(row, mine[number], theirs, is_first=number == 0), preset)
            before = old[number] if needs_old else None  # of the only step the policy's present ones
            same = number == 0 or whose == "trainer"
            compared = held if theirs is not None else None
            how = {"measures_gap": same, "keeps_tokens": self._tokens.writes}
            loss = PolicyLoss(batch, before, compared, preset, objective, **how, contrast=terms)
            trained = batch.micro_batches if terms is None else [*terms.own_batches, *terms.micro_batches]
            result = with_means(self._policy.train_step(trained, loss, self._scoring))
            self._tokens.take(row, ledger.of(share), loss.measured)
            result = self._with_culprits(result, row, ledger.of(share), rollouts.prompts.keys)
            result = replace(result, culprits=(*result.culprits, *_named(bad, ledger, rollouts.prompts.keys)))
            result = self._with_schedules(self._with_agreement(result, row), rollouts.step)
            results.append(self._with_penalties(result, preset, None if kl is None else kl[:, self._rollouts(share)]))
            if same and not result.skipped:
                self._check_gap(result, rollouts.step)
        self._tokens.write(rollouts.step)
        return results

    def compare(self, rollouts: StepRollouts) -> dict[str, float] | None:
        """How far trainer and generator are apart: `logprob_gap` and `mismatch/*` as `update` measures them, on the
        first groups alone and before anything is trained. None: every replica must have a sample, and there are too
        few. Collective.

        The trainer's state may be away; of the device it takes what a forward pass does.
        """
        ledger, _ = rollouts.trained
        replicas = self._policy.replicas.num_ranks
        enough = max(NUM_COMPARED, -(-replicas // ledger.num_samples))
        part = ledger.of(slice(0, enough))
        if part.num_groups * part.num_samples < replicas:
            return None
        rows = self._rows(part, rollouts)
        scores = self._policy.logprobs(rows.micro_batches, self._scoring)
        names = ["logprob_gap", *(f"mismatch/{kind}" for kind in rows.num_of_kind)]
        totals = torch.zeros(1, len(names), dtype=torch.float64)
        for index, (score, tokens) in enumerate(zip(scores, rows.tokens, strict=True)):
            gap = logprob_gaps(score.logprobs, tokens)
            found = {"logprob_gap": gap.sum() / rows.num_compared, **gaps_by_kind(rows, index, gap)}
            totals += torch.stack([found[name] for name in names]).double().cpu()
        return dict(zip(names, self._policy.replicas.gather_rows(totals).sum(0).tolist(), strict=True))

    @property
    def most_gap(self) -> float:
        """Of `logprob_gap`: nats a token, see `max_logprob_gap`."""
        return self._max_logprob_gap

    def _before(
        self, rows: Sequence[StreamRows], preset: Preset, whose: OldLogprobs, *, needs_old: bool
    ) -> tuple[Sequence[ContrastScores | None], list[list[LogProbs]]]:
        """Of each optimizer step, before any: contrasts of the policy, None where they are not needed by then; and old
        log-probs, [] where they are not."""
        drawn = [self._contrasts.present(row, own=True) for row in rows] if preset.compares_before else []
        old: list[list[LogProbs]] = []
        if needs_old or preset.kl_in_reward:
            old = [scores for scores, _ in drawn] if drawn and whose == "trainer" else list(map(self._drawn, rows))
        if not drawn and not (old and whose == "trainer"):
            self._choose(rows)
        return [scores for _, scores in drawn] or [None] * len(rows), old

    def _check_gap(self, result: StepResult, step: int) -> None:
        """See `check_logprob_gap`; what is measured of tokens is there to look at where it raises."""
        try:
            check_logprob_gap(result.metrics, self._max_logprob_gap)
        except ValueError:
            self._tokens.write(step)
            raise

    def _advantages(
        self, ledger: StepLedger, preset: Preset, kl: Tensor | None, earned: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """[S, B, M]; and the samples [B] whose rewards, KL or contrast are not finite. Those enter the advantages of
        others, so none is a number then, and all optimizer steps are skipped."""
        spoilt = ledger.bad_rewards.flatten().nonzero().squeeze(1).tolist()
        bad = sorted({*spoilt, *bad_samples(kl, earned)})
        advantages = step_advantages(ledger, preset, self._config.objective, finite(kl), finite(earned))
        return torch.full_like(advantages, torch.nan) if bad else advantages, bad

    def _whose(self, ledger: StepLedger) -> OldLogprobs:
        """The old log-probs. Raises ConfigError where saved rollouts do not go with them, see `check_old`."""
        if ledger.distorted.any():
            check_old(self._config.objective.old)
            check_replay(self._replay.who)
        return self._config.objective.old

    def _with_culprits(
        self, result: StepResult, rows: StreamRows, ledger: StepLedger, keys: Sequence[str]
    ) -> StepResult:
        """Of an optimizer step that was skipped, the samples whose log-probs are not finite. Collective."""
        if not result.skipped:
            return result
        numbers, samples = ledger.number.tolist(), ledger.num_samples
        found = self._policy.logprobs(rows.micro_batches, self._scoring)
        culprits = not_finite(
            found,
            [tokens.place for tokens in rows.tokens],
            self._preset.most_samples,
            self._policy.platform.ranks,
            lambda index: (keys[int(numbers[index // samples])], index % samples),
        )
        return replace(result, culprits=culprits)

    def _scores(
        self, rows: StreamRows, drawn: ContrastScores | None, reference: ContrastScores | None, *, is_first: bool
    ) -> ContrastScores:
        """All contrasts', the policy's by the weights that an optimizer step begins with.

        Args:
            drawn: by the weights that drew the responses, where that is known; good enough for what is not trained.
        """
        if self._preset.full_contrasts:  # of one optimizer step alone: what is kept is large
            drawn = self._contrasts.present(rows, own=True, keeps_hidden=True)[1]
        elif drawn is None or (self._preset.trained_contrasts and not is_first):
            drawn = self._contrasts.present(rows, own=False)[1]
        return _joined(drawn, reference)

    def _rows(self, ledger: StepLedger, rollouts: StepRollouts) -> StreamRows:
        """This replica's share of the groups of an optimizer step. Collective."""
        replicas, once = self._policy.replicas.num_ranks, self._batcher.share_prefix
        shares = share_responses(ledger, slots_of(self._preset), replicas, share_prefix=once)
        tracks, share = self._payload.fetch(ledger, shares, rollouts.tracks), shares[self._replica]
        texts = self._texts(ledger, share, rollouts.prompts)
        return self._batcher.rows(ledger, share, tracks, rollouts.prompts, self._preset, rollouts.step, texts)

    def _texts(
        self, ledger: StepLedger, share: Sequence[Place], prompts: DrawnPrompts
    ) -> dict[int, Mapping[str, str]] | None:
        """By group of the share, the texts that stand for its images; None where no contrast has one. Collective."""
        if all(contrast.context != "metadata" for contrast in self._preset.contrasts):
            return None
        numbers, groups = ledger.number.tolist(), {place.group for place in share}
        return agreed(
            self._policy.platform.ranks,
            lambda: {group: self._preset.told_of(prompts.read(numbers[group])) for group in sorted(groups)},
        )

    def _choose(self, rows: Sequence[StreamRows]) -> None:
        """Has the policy choose the experts that all later passes follow, where one of these is by other weights."""
        if self._replay.who == "trainer" and (len(rows) > 1 or self._preset.needs_reference):
            for row in rows:
                self._policy.logprobs(row.micro_batches, self._scoring)

    def _with_agreement(self, result: StepResult, rows: StreamRows) -> StepResult:
        """`router/agreement`: of the experts that predict scored tokens, the share that the routers would have chosen
        themselves. Collective."""
        if self._replay.who == "none":
            return result
        routings = [batch.routing for batch in rows.micro_batches if batch.routing is not None]
        counts = [count for routing in routings for count in routing.agreed.values()]
        agreed = sum(self._policy.platform.ranks.gather([int(torch.stack(counts).sum()) if counts else 0]))
        chosen = rows.num_tokens * self._replay.layers * self._replay.chosen
        return replace(result, metrics={**result.metrics, "router/agreement": agreed / chosen})

    def _drawn(self, rows: StreamRows) -> list[LogProbs]:
        """Per micro-batch, of the weights that drew the responses: the policy's, before it is trained, or those that
        the generator had."""
        if self._config.objective.old == "trainer":
            return self._policy.logprobs(rows.micro_batches, self._scoring)
        return [LogProbs(tokens.generator_logprobs, None) for tokens in rows.tokens]

    def _reference(self, rows: StreamRows) -> Scored:
        """Nothing where no stream is held to it, and no contrast is scored by it."""
        return self._contrasts.reference(rows) if self._preset.needs_reference else ([], None)

    def _kl(self, share: slice, rows: StreamRows, old: list[LogProbs], reference: list[LogProbs]) -> Tensor:
        """[S, b, M] of the b rollouts of an optimizer step."""
        rollouts, most = self._rollouts(share), self._preset.most_samples
        number = (rollouts.stop - rollouts.start) * most
        kl = response_kl(rows, old, reference, self._preset.streams, number, self._policy.replicas)
        return kl.view(len(kl), -1, most)

    def _earned(self, share: slice, rows: StreamRows, scores: ContrastScores) -> Tensor:
        """[S, b, M] of the b rollouts of an optimizer step, see `contrast_rewards`."""
        rollouts, most = self._rollouts(share), self._preset.most_samples
        number = (rollouts.stop - rollouts.start) * most
        earned = contrast_rewards(rows, scores, self._preset.streams, number, self._policy.replicas)
        groups = earned.view(len(earned), -1, self._config.rollout.samples_per_prompt * most)
        return of_siblings(groups).view(len(earned), -1, most)

    def _with_schedules(self, result: StepResult, step: int) -> StepResult:
        """`schedule/<s>/<key>`: the coefficients of the step."""
        streams = self._preset.streams
        now = {f"schedule/{stream.name}/{one.key}": one.at(step) for stream in streams for one in stream.schedules}
        return replace(result, metrics={**result.metrics, **now})

    def _with_penalties(self, result: StepResult, preset: Preset, kl: Tensor | None) -> StepResult:
        """`loss/<s>/kl_in_reward`: what was taken off the reward of a response, mean over the step.

        Args:
            preset: with the coefficients of the step.
            kl: [S, b, M] nats; None: nothing was.
        """
        if kl is None:
            return result
        means = [
            row[:, : preset.num_samples(stream.trajectory)].mean().item()
            for row, stream in zip(kl, preset.streams, strict=True)
        ]
        pairs = zip(preset.streams, means, strict=True)
        taken = {
            f"loss/{stream.name}/kl_in_reward": stream.kl_coef * mean
            for stream, mean in pairs
            if stream.kl_in == "reward"
        }
        return replace(result, metrics={**result.metrics, **taken})

    def _rollouts(self, share: slice) -> slice:
        """Of the groups, which are whole."""
        return slice(self._num_samples(share.start), self._num_samples(share.stop))

    def _num_samples(self, num_groups: int) -> int:
        return num_groups * self._config.rollout.samples_per_prompt

    def _shares(self, places: Sequence[int]) -> Iterator[slice]:
        """See `optimizer_shares`; each has so many samples that every replica trains one."""
        size = self._config.train.batch_size
        for share in optimizer_shares(places, self._config):
            num_graded = share.stop - share.start
            if self._num_samples(num_graded) < self._policy.replicas.num_ranks:
                raise RewardError(
                    f"only {num_graded} of {size} prompts of an optimizer step are graded, which have fewer samples "
                    f"than the policy has replicas, {self._policy.replicas.num_ranks}. See above for why."
                )
            yield share


def _named(samples: Sequence[int], ledger: StepLedger, keys: Sequence[str]) -> list[tuple[str, int]]:
    """Key and number of samples [B] of the ledger."""
    numbers, each = ledger.number.tolist(), ledger.num_samples
    return [(keys[int(numbers[place // each])], place % each) for place in samples]


def _joined(scores: ContrastScores | None, others: ContrastScores | None) -> ContrastScores:
    none = ContrastScores({}, {}, {})
    return (scores or none).joined(others or none)
