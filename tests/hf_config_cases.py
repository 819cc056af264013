"""The smallest config.json of a supported model, and HfConfig made of numbers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sr1.config import FAMILIES, HfConfig

DENSE, QWEN3, MIXTURE, RECURRENT, RECURRENT_MIXTURE = FAMILIES
SMALL: dict[str, Any] = {  # in the old layout; the layout of ranks is checked against these numbers
    "architectures": [DENSE],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"out_hidden_size": 64, "deepstack_visual_indexes": []},
}


def write_config(folder: Path, tree: Any) -> Path:
    """Writes it as `folder`/config.json and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def hf_config(class_name: str = DENSE, **sizes: Any) -> HfConfig:
    """A dense model of two layers; `sizes` override."""
    numbers: dict[str, Any] = {
        "path": Path("config.json"),
        "class_name": class_name,
        "family": FAMILIES[class_name],
        "repository": None,
        "num_layers": 2,
        "hidden_size": 4,
        "ffn_size": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 2,
        "vocab_size": 10,
        "tied": True,
        "num_experts": 0,
        "experts_per_token": 0,
        "expert_ffn_size": 0,
        "shared_expert_size": 0,
        "moe_layers": (False, False),
        "norm_topk_prob": None,
        "rope_theta": 10000.0,
        "rotary_dim": 2,
        "mrope_section": (1, 0, 0),
        "mrope_interleaved": None,
        "linear": None,
        "linear_layers": (False, False),
        "deepstack_layers": (),
        "visual_token_side": 28,
    }
    return HfConfig(**numbers | sizes)
