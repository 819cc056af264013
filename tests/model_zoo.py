"""The small random models of every family, and the other ways in which checkpoints hold their tensors."""

from __future__ import annotations

from pathlib import Path

from megatron_sr1.digits.tiny_families import TEXTS, ZOO, create_family

__all__ = ["TEXTS", "ZOO", "create_family", "name_by_place", "publish_experts"]


def publish_experts(folder: Path) -> None:
    """Rewrites the experts of a model as published checkpoints hold them, gate_up [E, H, 2I] and down [E, I, H]."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def name_by_place(folder: Path) -> None:
    """Rewrites a Qwen2.5-VL's tensor names as transformers from 4.52 on may write them: by their place in the model."""
    from safetensors.torch import load_file, save_file

    def place(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name

    path = folder / "model.safetensors"
    save_file({place(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
