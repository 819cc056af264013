"""Fixtures shared by the tests: a tiny Qwen-VL model directory, made here, nothing downloaded."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from tests.workspace import Workspace, build_workspace

# Files of ten seconds or more, the longest first. They start first, so that no worker ends with one of them while the
# other has nothing left. The first makes `workspace` and `finished`; the second needs neither, and is no quicker.
LONG = (
    *("end_to_end", "layouts", "weight_sync", "faults", "watchdog", "preemption", "sweep", "convert"),
    *("joining", "router_replay", "qwen3_5", "freeze", "shared_prefix", "memory_estimate", "resume", "vision"),
    *("launch", "checkpoint", "sweep_report", "contrast", "cpu_capabilities", "evaluation_run", "triton_logprob"),
    *("gradients", "family_runs", "rollout", "step_time", "logprob_memory", "parameter_counts", "engine_ranks"),
    *("credit", "viewer", "recipes", "viewer_browser"),
    *("private_names", "packaging", "processor", "config", "cli", "precision", "sweep_file", "families", "policy"),
    *("fused_loss", "offload", "trackers", "report", "saved_rollouts", "pixels", "your_own_data", "heldout_loss"),
)

# As in a terminal, for the commands that are started here: a shell's background jobs ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
define_missing_torchvision_ops()  # before any test module imports transformers' Qwen-VL classes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files before the others; the order within a file stays."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def no_place_among_ranks() -> Iterator[None]:
    """An engine in the test process tells vLLM its rank by the environment, where later commands would find it."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], Path]
) -> Path:
    """The folder that `make` returns, made by the first worker that asks; the others wait for it."""
    if not hasattr(request.config, "workerinput"):
        return make()
    shared = tmp_path_factory.getbasetemp().parent  # of all workers of this run
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = shared / f"{name}.made"
        if not made.exists():
            made.write_text(str(make()))
        return Path(made.read_text())


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
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Data, an untrained model and a short cold start, for whole commands. All workers share it: each test gives its
    runs names that no other uses."""

    def make() -> Path:
        return build_workspace(tmp_path_factory.mktemp("workspace")).folder

    return Workspace(made_once(request, tmp_path_factory, "workspace", make))


@pytest.fixture(scope="session")
def finished(
    workspace: Workspace, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    """With `whole`, an uninterrupted run of eight steps, TP=2, which other runs are compared with."""

    def make() -> Path:
        leaves = ("offload.gradients=true", "offload.optimizer=true", "offload.reference=true")  # the others' stays
        kept = ("train.save_hf=true", "train.evaluate_every=3", "train.keep_best=accuracy")
        looks = ("preflight.enabled=true", "preflight.prompts=4")  # the others begin without
        words = ("train.steps=8", "train.save_every=3", "evaluate.verify_export=12", *leaves, *kept, *looks)
        words = (*words, "profile.steps=[3]", "track.samples.every=3")
        printed = workspace.run("grpo", "whole", *words)
        told = [line.split("  ")[0] for line in printed.splitlines() if line.startswith("step ")]
        assert told == [f"step {number}/8" for number in range(1, 9)], "a line a step, of one rank"
        return workspace.folder

    return Workspace(made_once(request, tmp_path_factory, "finished", make))
