"""The set of packages, the package's own modules, and every call, import and override of a library."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sysconfig
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
from packaging.requirements import Requirement

import megatron_sr1
from tests.contracts.library_calls import check_calls, narrower
from tests.source_tree import PACKAGE, REPOSITORY, read_modules

LIBRARIES = ("megatron", "vllm", "transformers", "torch", "triton")
LAUNCH = ("nemo_run", "torchx", "leptonai")  # of the environment that submits
HARMLESS = {"build_backend.py"}  # left by the builds of two packages; nobody imports it
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (REPOSITORY / "constraints-gpu.txt").read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module", autouse=True)
def platform() -> None:
    from megatron_sr1.platform import start_platform
    from megatron_sr1.rollout.vllm.engine import prepare_environment

    start_platform()
    prepare_environment()


def distributions() -> Iterable[importlib.metadata.Distribution]:
    """The environment's own, not those that setuptools carries within itself."""
    return importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])


def test_the_pinned_versions_are_installed() -> None:
    """All but Transformer Engine: without its part for torch, Megatron-Core cannot be imported beside it."""
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in distributions()}
    expected = {name: version for name, version in PINS.items() if not name.startswith("transformer-engine")}
    assert len(expected) > 200 and expected.items() <= installed.items()


def test_vllm_pins_the_torch_of_the_gpu_extra() -> None:
    pins = [Requirement(line) for line in importlib.metadata.requires("vllm") or ()]
    (theirs,) = (need for need in pins if need.name == "torch" and (need.marker is None or need.marker.evaluate()))
    (ours,) = (need for need in map(Requirement, EXTRAS["gpu"]) if need.name == "torch")
    assert theirs.specifier == ours.specifier == Requirement(f"torch=={PINS['torch']}").specifier


def test_torch_is_built_for_the_pinned_cuda() -> None:
    import torch

    assert torch.version.cuda == ".".join(PINS["nvidia-cuda-runtime"].split(".")[:2])


def test_no_package_overwrites_a_file_of_another() -> None:
    """As cuda-python 12 does with cuda-bindings 13: what is installed last decides what is imported."""
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for distribution in distributions():
        name = distribution.name  # read anew each time
        for file in distribution.files or ():
            if file.hash is not None:
                owners[str(file)].add((name, file.hash.value))
    shared = {name: found for name, found in owners.items() if len({value for _, value in found}) > 1}
    assert len(owners) > 10_000 and shared.keys() <= HARMLESS, shared


def test_every_module_of_the_package_is_imported() -> None:
    names = [info.name for info in pkgutil.walk_packages(megatron_sr1.__path__, f"{PACKAGE}.")]
    assert len(names) > 100
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_call_takes_its_arguments(library: str) -> None:
    """Every function and class that the source calls by its imported name: arguments by place and by name."""
    modules = [module for module in read_modules(REPOSITORY) if module.in_package]
    compared, wrong = check_calls(modules, library)
    assert compared and not wrong, "\n".join(["", *wrong])


def test_every_override_takes_what_the_library_passes() -> None:
    compared, wrong = 0, []
    for name in (info.name for info in pkgutil.walk_packages(megatron_sr1.__path__, f"{PACKAGE}.")):
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for ours in vars(module).values():
            if not (inspect.isclass(ours) and ours.__module__ == name):
                continue
            for method, function in vars(ours).items():
                theirs = _overridden(ours, method)
                if inspect.isfunction(function) and theirs is not None:
                    compared += 1
                    why = narrower(inspect.signature(function), inspect.signature(theirs))
                    wrong += [f"{name}.{ours.__name__}.{method}: {why}"] if why else []
    assert compared > 3 and not wrong, "\n".join(["", *wrong])


def _overridden(ours: type, method: str) -> Any:
    """The function of a library's class that `method` replaces. Constructors and `forward` are what their callers make
    of them: the tests of the policy call them."""
    if method in ("__init__", "forward"):
        return None
    for base in ours.__mro__[1:]:
        if method in vars(base) and base.__module__.split(".")[0] in LIBRARIES:
            found = vars(base)[method]
            return found if inspect.isfunction(found) else None
    return None
