"""Qwen-VL on Megatron-Core: a chunk of the layers, with the vision tower before the first and log-probs after the last.

T_local   tokens of the row on this context-parallel rank (T without context parallelism)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.kernels import linear_divergence, linear_logprob
from megatron_sr1.kernels.delta_rule import row_plan
from megatron_sr1.packing import attention_calls
from megatron_sr1.packing.context import context_index, row_order
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.frozen import Frozen
from megatron_sr1.policy.groups import ParallelGroups
from megatron_sr1.policy.layers.deepstack import PackedRow, with_deepstack
from megatron_sr1.policy.layers.rotary import MultimodalRotary
from megatron_sr1.policy.layers.routing import RankRouting
from megatron_sr1.policy.vision import SharedVision, new_tower
from megatron_sr1.types import BANNED_LOGIT_BIAS, MicroBatch, OtherContext, Scoring


class QwenVLModel(GPTModel):
    """One chunk of the policy. It returns hidden states [T_local, 1, H] (a part of them under sequence parallelism,
    followed by visual features that later layers add) or, after the last layer, [2 + O, R] of the micro-batch's scored
    tokens: log-probs, entropies, and the KL from each of its O other contexts; below them, where they are wanted, 1 for
    a target that no token is likelier than, [1, R], and the hidden states, [H, R]."""

    def __init__(
        self,
        architecture: Architecture,
        megatron_config: TransformerConfig,
        block: TransformerBlockSubmodules,
        groups: ParallelGroups,
        config: Config,
        frozen: Frozen,
        *,
        vp_stage: int | None,
        is_first: bool,
        is_last: bool,
    ) -> None:
        ranks = groups.tensor.size()
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=block,
            vocab_size=-(-architecture.vocab_size // ranks) * ranks,  # padded to equal shards
            max_sequence_length=config.model.max_position,
            pre_process=is_first,
            post_process=is_last,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="none",  # the angles come from mRoPE positions, below
            scatter_embedding_sequence_parallel=False,  # visual tokens are written into the whole row first
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.groups = groups
        self.needs_root = frozen.needs_root
        mixtures = [number for number, is_moe in enumerate(architecture.moe_layers, start=1) if is_moe]
        own = {layer.layer_number for layer in self.decoder.layers}
        self.expert_places = {number: place for place, number in enumerate(mixtures) if number in own}
        self.logits = config.precision.logits
        self.rotary = MultimodalRotary(
            architecture.rotary_dim,
            architecture.rope_theta,
            architecture.mrope_section,
            interleaved=architecture.family.interleaved_rotary,
        )
        if is_first:
            self.vision = new_tower(
                architecture.hf.vision_config, attn_implementation="sdpa", dtype=megatron_config.params_dtype
            )
            self.shared_vision = SharedVision(
                self.vision,
                group=groups.tensor_context,
                context_group=groups.context,
                trained=frozen.trains_vision,
                recompute=config.recompute.vision,
            )

    def start_images(self, batches: Sequence[MicroBatch]) -> None:
        """Has the patches made that this rank will encode when these micro-batches come, while earlier ones run."""
        if self.pre_process:
            self.shared_vision.start(batches)

    def forward(self, batch: MicroBatch, scoring: Scoring) -> Tensor:
        """See the class."""
        context = (self.groups.context.rank(), self.groups.context.size())
        local = context_index(batch.cu_seqlens, *context)
        has_prefixes = max(batch.parents) >= 0
        split = self.groups.tensor.size() if self.config.sequence_parallel else 1
        part = local.chunk(split)[self.groups.tensor.rank() if split > 1 else 0]
        linear = self.architecture.linear
        hidden = self.decoder(
            hidden_states=self._embed(batch, local) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self.rotary(batch.position_ids[:, local]),
            packed_seq_params=PackedRow(
                qkv_format="thd",
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_kv=batch.cu_seqlens,
                max_seqlen_q=batch.max_seqlen,
                max_seqlen_kv=batch.max_seqlen,
                num_local_tokens=len(part),
                calls=attention_calls(batch.cu_seqlens, batch.parents, *context) if has_prefixes else (),
                plan=None if linear is None else row_plan(batch.cu_seqlens, batch.parents, linear.taps),
                order=row_order(batch.cu_seqlens, context[1]) if has_prefixes and context[1] > 1 else None,
                routing=RankRouting.of(batch, part, self.expert_places),
            ),
        )
        return self._score(hidden, batch, local, scoring) if self.post_process else hidden

    def _embed(self, batch: MicroBatch, local: Tensor) -> Tensor:
        """Token embeddings with the visual tokens in their places, [T_local, 1, H]; behind them, as further rows, what
        the first layers add (DeepStack), where the row has images and the model such layers."""
        embedded = self.embedding(input_ids=batch.input_ids[local][None], position_ids=None)  # [T_local, 1, H]
        parts = [embedded]
        if batch.images:
            visual = self.shared_vision(batch)  # [1 + L, V, H]
            index = batch.visual_index[local]
            rows = torch.nonzero(index >= 0).squeeze(1)
            bases = [embedded, *(torch.zeros_like(embedded) for _ in visual[1:])]
            parts = [
                base.index_put((rows,), features[index[rows]][:, None])
                for base, features in zip(bases, visual, strict=True)
            ]
        if self.config.sequence_parallel:
            parts = [tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.groups.tensor) for x in parts]
        hidden = with_deepstack(parts[0], parts[1:])
        if self.needs_root and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return hidden

    def _score(self, hidden: Tensor, batch: MicroBatch, local: Tensor, scoring: Scoring) -> Tensor:
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.groups.tensor
            )
        place = torch.full_like(batch.input_ids, -1)  # [T] where this rank holds a token of the row
        place[local] = torch.arange(len(local), device=local.device)
        place = place[batch.loss_rows]  # [R]
        mine = torch.nonzero(place >= 0).squeeze(1)
        rows = hidden[:, 0][place[mine]]
        if not self.config.sequence_parallel:
            rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.groups.tensor)
        # Megatron gives its parameters a main_grad
        weight: Any = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        head: dict[str, Any] = {
            "temperature": scoring.temperature,
            "tp_group": self.groups.tensor if self.groups.tensor.size() > 1 else None,
            "vocab_start": self.groups.tensor.rank() * len(weight),
            "vocab_size": self.architecture.vocab_size,
            "logit_bias": self._ban(weight, scoring.banned_ids),
            "logits": self.logits,
            "accumulate_into": weight.main_grad if torch.is_grad_enabled() and weight.requires_grad else None,
        }
        wanted = _local_grad_rows(batch, mine)
        asked = {"entropy": True, "top": batch.marks_top}
        scores = linear_logprob(rows, weight, batch.targets[mine], grad_rows=wanted, **asked, **head)
        assert scores.entropy is not None, "it was asked for"
        entropy = scores.entropy if batch.entropy_grad else scores.entropy.detach()
        far = [_divergence(rows, weight, other, mine, len(place), head) for other in batch.others]
        top = [] if scores.is_top is None else [scores.is_top.to(entropy.dtype)]
        found = torch.stack([scores.logprobs, entropy, *far, *top])
        if batch.keeps_hidden:
            found = torch.cat([found, rows.detach().t().to(found.dtype)])
        return self._all_scores(found, mine, len(place))

    def _all_scores(self, scores: Tensor, mine: Tensor, num_scored: int) -> Tensor:
        """[.., R] of the row's scored tokens, of which this context-parallel rank made those at `mine`.

        Every rank then forms the whole loss, and each gradient goes back to the rank that made the score."""
        if self.groups.context.size() == 1:
            return scores
        whole = scores.new_zeros(len(scores), num_scored).index_copy(1, mine, scores)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(whole, group=self.groups.context)

    def _ban(self, weight: Tensor, banned_ids: tuple[int, ...]) -> Tensor | None:
        """The bias [V_local] on this rank's part of the vocabulary."""
        if not banned_ids:
            return None
        rows = torch.tensor(banned_ids, device=weight.device) - self.groups.tensor.rank() * len(weight)
        bias = torch.zeros(len(weight), device=weight.device)
        bias[rows[(rows >= 0) & (rows < len(weight))]] = BANNED_LOGIT_BIAS
        return bias


def _divergence(
    rows: Tensor, weight: Tensor, other: OtherContext, mine: Tensor, num_scored: int, head: Mapping[str, Any]
) -> Tensor:
    """[r] KL of the scored tokens at `mine`, whose hidden states are `rows` [r, H], 0 where the other context has none.
    The gradient goes through the row's own logits.

    Args:
        head: how both are scored, see `linear_divergence`.
    """
    place = torch.full((num_scored,), -1, device=mine.device)
    place[other.rows] = torch.arange(len(other.rows), device=mine.device)
    place = place[mine]
    here = torch.nonzero(place >= 0).squeeze(1)
    zeros = torch.zeros(len(mine), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    if len(here) == 0:
        return zeros
    pair = (rows[here], other.hidden[place[here]])
    if other.is_own:
        found = linear_divergence(pair[1], pair[0], weight, through="other", **head)
    else:
        found = linear_divergence(*pair, weight, through="own", **head)
    return zeros.index_copy(0, here, found)


def _local_grad_rows(batch: MicroBatch, mine: Tensor) -> Tensor | None:
    """Which of the scored tokens at `mine` the loss depends on; None: all."""
    if batch.grad_rows is None:
        return None
    wanted = torch.zeros_like(batch.targets, dtype=torch.bool)
    wanted[batch.grad_rows] = True
    return torch.nonzero(wanted[mine]).squeeze(1)
