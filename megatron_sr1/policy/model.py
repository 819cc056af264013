"""Qwen-VL on Megatron-Core: a pipeline stage, with the vision tower on the first and log-probs on the last."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_sr1.kernels import linear_logprob
from megatron_sr1.platform.layers import torch_block_spec
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.groups import ParallelGroups
from megatron_sr1.types import BANNED_LOGIT_BIAS, MicroBatch, Scoring


class QwenVLModel(GPTModel):
    """One pipeline stage of the policy. It returns hidden states [T, 1, H] (a part of T under sequence parallelism) or,
    on the last stage, log-probs and entropies [2, R] of the micro-batch's scored tokens."""

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        groups: ParallelGroups,
        *,
        max_position: int,
        train_vision: bool,
    ) -> None:
        ranks = groups.tensor.size()
        super().__init__(
            config=config,
            transformer_layer_spec=torch_block_spec(config.num_layers // groups.pipeline.size()),
            vocab_size=-(-architecture.vocab_size // ranks) * ranks,  # padded to equal shards
            max_sequence_length=max_position,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="mrope",
            rotary_base=architecture.hf.text_config.rope_parameters["rope_theta"],
            scatter_embedding_sequence_parallel=False,  # visual tokens are written into the whole row first
            pg_collection=groups.collection,
        )
        self.architecture = architecture
        self.groups = groups
        self.train_vision = train_vision
        if self.pre_process:
            self.vision = Qwen2_5_VisionTransformerPretrainedModel._from_config(
                architecture.hf.vision_config, attn_implementation="sdpa", dtype=config.params_dtype
            )
            self.vision.requires_grad_(train_vision)

    def forward(self, batch: MicroBatch, scoring: Scoring) -> Tensor:
        """See the class."""
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        hidden = super().forward(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[:, None],
            attention_mask=None,
            decoder_input=self._embed(batch) if self.pre_process else None,
            packed_seq_params=packed,
        )
        return self._score(hidden, batch, scoring) if self.post_process else hidden

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Megatron would form logits here; the head is ours, so the hidden states pass through."""
        return hidden_states

    def _embed(self, batch: MicroBatch) -> Tensor:
        """Token embeddings with the visual tokens in their places, [T, 1, H]."""
        embedded = self.embedding(input_ids=batch.input_ids[None], position_ids=None)  # [T, 1, H]
        if batch.pixel_values is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
                visual = self.vision(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output  # [V, H]
            rows = torch.nonzero(batch.visual_index >= 0).squeeze(1)
            embedded = embedded.index_put((rows,), visual[batch.visual_index[rows]][:, None])
        if self.config.sequence_parallel:
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded, group=self.groups.tensor)
        return embedded

    def _score(self, hidden: Tensor, batch: MicroBatch, scoring: Scoring) -> Tensor:
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.groups.tensor
            )
            rows = hidden[:, 0][batch.loss_rows]
        else:
            rows = hidden[:, 0][batch.loss_rows]
            rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.groups.tensor)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        scores = linear_logprob(
            rows,
            weight,
            batch.targets,
            temperature=scoring.temperature,
            entropy=True,
            tp_group=self.groups.tensor if self.groups.tensor.size() > 1 else None,
            vocab_start=self.groups.tensor.rank() * len(weight),
            vocab_size=self.architecture.vocab_size,
            logit_bias=self._ban(weight, scoring.banned_ids),
        )
        return torch.stack([scores.logprobs, scores.entropy.detach()])

    def _ban(self, weight: Tensor, banned_ids: tuple[int, ...]) -> Tensor | None:
        """The bias [V_local] on this rank's part of the vocabulary."""
        if not banned_ids:
            return None
        rows = torch.tensor(banned_ids, device=weight.device) - self.groups.tensor.rank() * len(weight)
        bias = torch.zeros(len(weight), device=weight.device)
        bias[rows[(rows >= 0) & (rows < len(weight))]] = BANNED_LOGIT_BIAS
        return bias
