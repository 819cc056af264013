"""Fixtures shared by the tests: a tiny Qwen-VL model directory, made here, nothing downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from tests.workspace import Workspace, build_workspace

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


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Data, an untrained model and a short cold start, for whole commands."""
    return build_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def finished(workspace: Workspace) -> Workspace:
    """With `whole`, an uninterrupted run of eight steps, TP=2, which other runs are compared with."""
    printed = workspace.run("grpo", "whole", "train.steps=8", "train.save_every=3", "evaluate.verify_export=12")
    assert "step 8/8" in printed
    return workspace
