"""A tiny Qwen2.5-VL, made on the spot in Hugging Face format: random weights, a tokenizer trained on given texts.

It has every part of the real model (windowed vision tower, 2 x 2 merger, mRoPE, grouped-query attention, tied
embeddings, byte-level BPE with the Qwen special tokens, a padded vocabulary), so all code that runs on it runs
unchanged on the real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

# Qwen2's pre-tokenizer (transformers, models/qwen2/tokenization_qwen2.py): every digit is a token of its own.
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NUM_LEARNED_TOKENS = 640  # bytes and merges, without the special tokens
VOCAB_MULTIPLE = 64  # the embedding has rows beyond the tokenizer's last id, as in the real model
MAX_POSITION = 2048
# mRoPE gives an image's columns the slowest frequencies, theta^(-10/16) ... theta^(-15/16) here. With the real model's
# 1e6 neighbouring columns differ by less than 0.0002 rad and the order of the digits is invisible; with 20, by 0.1 rad.
ROPE_THETA = 20.0
VISION_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "max_pixels": 28 * 28 * 64,
    "min_pixels": 28 * 28,
    "temporal_patch_size": 2,
}
# ChatML, without the system turn that the real template puts first: prompts stay short.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif item.type == 'text' -%}{{ item.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def create_tiny_model(out_dir: Path, texts: Iterable[str], seed: int) -> None:
    """Writes config, weights, tokenizer and processor files into `out_dir`, loadable by transformers and vLLM.

    Args:
        out_dir: created where it does not exist.
        texts: what the tokenizer is trained on: prompts and responses as the model will see them.
        seed: of the weights.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer(train_tokenizer(texts))
    tokenizer.save_pretrained(out_dir)
    _save_processor(out_dir)
    _save_model(tokenizer.get_vocab(), out_dir, seed)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with Qwen2's normalizer and pre-tokenizer; all 256 bytes have a token, so any text has ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNED_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def qwen_tokenizer(tokenizer: Tokenizer) -> Qwen2Tokenizer:
    """The same vocabulary in transformers' class, with the special tokens behind it."""
    from transformers import Qwen2Tokenizer

    state = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITION,
        chat_template=CHAT_TEMPLATE,
    )


def _save_processor(out_dir: Path) -> None:
    """Plain JSON, because the video processor's class cannot be imported where torchvision is broken."""
    processors = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    for name, kind in processors.items():
        fields = kind | VISION_PREPROCESSOR | {"processor_class": "Qwen2_5_VLProcessor"}
        (out_dir / name).write_text(json.dumps(fields, indent=2) + "\n")


def _save_model(ids: Mapping[str, int], out_dir: Path, seed: int) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=_text_config(ids),
        vision_config=_vision_config(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(out_dir)


def _text_config(ids: Mapping[str, int]) -> dict[str, object]:
    return {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": (len(ids) // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE,  # at least one padded row
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "initializer_range": 0.05,  # 0.02 is for thousands of channels; a narrow model learns faster from a wider start
    }


def _vision_config() -> dict[str, object]:
    return {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.08,
    }
