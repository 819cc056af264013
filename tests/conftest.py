"""Fixtures shared by the tests: a tiny Qwen-VL model directory, made here, nothing downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

define_missing_torchvision_ops()  # before any test module imports transformers' Qwen-VL classes


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen2.5-VL of random weights with its tokenizer, trained on digit questions, and image processor."""
    from megatron_sr1.digits.questions import make_demonstrations
    from megatron_sr1.digits.tiny_model import create_tiny_model

    folder: Path = tmp_path_factory.mktemp("tiny_model")
    samples = make_demonstrations(200, seed=0)
    texts = [text for sample in samples for text in (sample.prompt.problem, sample.description or "", sample.response)]
    create_tiny_model(folder, texts, seed=0)
    return str(folder)
