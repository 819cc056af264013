"""What the policy and the memory estimate rely on in the Megatron-Core for GPUs: the layers' configuration of every
recipe, the rule of buckets, and what a checkpoint exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_sr1.config import load_config
from tests.contracts.te_source import te_version
from tests.model_zoo import create_family
from tests.policy_cases import built, exchanged_bytes
from tests.ranks import run_ranks
from tests.source_tree import REPOSITORY

FOLDER = REPOSITORY / "examples" / "recipes"
RECIPES = [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.glob("*/*.yaml")) if path.parent.name != "base"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_s_layers_are_configured(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core's own checks of the fields, as with the pinned Transformer Engine and its fused rotation."""
    monkeypatch.chdir(REPOSITORY)
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(utils, "get_te_version", lambda: Version(te_version()))
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda: None)
    from megatron_sr1.policy.read import read_architecture
    from megatron_sr1.policy.transformer_config import transformer_config

    config = load_config(FOLDER / recipe, [])
    model = REPOSITORY / "examples" / "models" / Path(config.model.hf_dir).name
    architecture = read_architecture(str(model))
    made = transformer_config(architecture, config, spec="te", on_cpu=False)
    assert made.num_layers == architecture.num_layers and made.bf16 and made.apply_rope_fusion


def _in_buckets(rank: int, num_ranks: int, model_dir: str, count: Any) -> None:
    with built(model_dir, ["layout.gradient_bucket=20000"]) as (policy, config):
        from megatron_sr1.estimate.state import gathered_bytes

        (wrapped,) = policy.model
        assert wrapped.ddp_config.overlap_grad_reduce and not wrapped.expert_parallel_buffers
        (buffer,) = wrapped.buffers
        sizes = [bucket.grad_data.numel() for bucket in buffer.buckets]
        assert len(sizes) > 3 and sum(sizes) == buffer.grad_data.numel()
        for group in wrapped.bucket_groups:  # what `zero_gradients` says to them
            assert group.per_param_grad_ready_counts == {} and group.is_first_batch and group.params

        most = max(exchanged_bytes(policy))
        assert most <= gathered_bytes(count, config) <= 2.5 * most, "a bucket ends with some parameter, not the largest"


def test_a_save_exchanges_a_bucket_of_gradients_size_at_a_time(tmp_path: Path) -> None:
    """What `estimate/state.py` counts for the checkpoint phase, observed in a save of two ranks."""
    from megatron_sr1.policy.parameter_counts import count_model

    model_dir = str(create_family(tmp_path, "qwen2_5_vl_tied"))
    run_ranks(2, _in_buckets, model_dir, count_model(model_dir))
