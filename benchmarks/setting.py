"""What several benchmarks start from: a folder that is gone afterwards, a model of random weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_HEAD_SIZE = 128
_MAX_POSITION = 4096


@contextmanager
def empty_folder(wanted: Path | None, prefix: str) -> Iterator[Path]:
    """A new folder at `wanted`, or in the system's own place; removed at the end.

    Raises:
        ValueError: `wanted` holds something.
    """
    folder = wanted or Path(tempfile.mkdtemp(prefix=prefix))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Give a new folder.")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_model(
    out: Path, texts: Sequence[str], *, hidden: int, layers: int, feed_forward: int, heads: int, vocab: int
) -> None:
    """A Qwen2.5-VL of random weights with a small tokenizer and vision tower, in Hugging Face format.

    Args:
        hidden: channels of the language model, 128 for each of its `heads`; a quarter of these are key/value heads.
        vocab: rows of embedding and output head, which are not tied.
    """
    import torch

    from megatron_sr1.digits.tiny_model import create_tiny_model
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

    define_missing_torchvision_ops()
    import transformers

    create_tiny_model(out, texts, seed=0)  # its weights are replaced
    tree = json.loads((out / "config.json").read_text())
    ids = {key: value for key, value in tree.items() if key.endswith("_token_id")}
    text = {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "vocab_size": vocab,
        "max_position_embeddings": _MAX_POSITION,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    assert hidden == _HEAD_SIZE * heads, "the sections of mRoPE are for heads of 128"
    vision = tree["vision_config"] | {"out_hidden_size": hidden}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = transformers.GenerationConfig.from_pretrained(out)
    (out / "model.safetensors").unlink()
    model.save_pretrained(out)
