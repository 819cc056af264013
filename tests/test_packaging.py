"""What pyproject.toml says about the package, held to the files that are there and to the Makefile."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import find_packages

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "megatron_sr1"
MAKEFILE = (REPOSITORY / "Makefile").read_text()


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_folder_with_code_is_a_package_that_is_installed(pyproject: dict[str, Any]) -> None:
    find = pyproject["tool"]["setuptools"]["packages"]["find"]
    assert find["namespaces"] is False
    installed = find_packages(str(REPOSITORY), include=find["include"])
    folders = {path.parent.relative_to(REPOSITORY) for path in PACKAGE.rglob("*.py")}
    assert sorted(installed) == sorted(".".join(folder.parts) for folder in folders)


def test_every_other_file_is_installed_as_data(pyproject: dict[str, Any]) -> None:
    data = pyproject["tool"]["setuptools"]["package-data"]
    declared = {
        name: [path for pattern in patterns for path in (REPOSITORY / name.replace(".", "/")).glob(pattern)]
        for name, patterns in data.items()
    }
    assert all(declared.values()), "a pattern of package-data matches no file"
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path for paths in declared.values() for path in paths} == files


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_command_exists(pyproject: dict[str, Any]) -> None:
    module, _, name = pyproject["project"]["scripts"]["megatron-sr1"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_setup_py_says_nothing_of_its_own() -> None:
    assert (REPOSITORY / "setup.py").read_text().rstrip().endswith("\nsetup()")


def test_tests_include_the_trackers(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert f"{project['name']}[track]" in project["optional-dependencies"]["test"]


def test_the_makefile_installs_the_torch_that_the_cpu_extra_pins(pyproject: dict[str, Any]) -> None:
    (torch,) = (r for r in map(Requirement, pyproject["project"]["optional-dependencies"]["cpu"]) if r.name == "torch")
    (version,) = re.findall(r"^TORCH := torch==([\d.]+)", MAKEFILE, flags=re.MULTILINE)
    assert str(torch.specifier) == f"=={version}"


def test_one_python_is_the_oldest_everywhere(pyproject: dict[str, Any]) -> None:
    oldest = Version(pyproject["project"]["requires-python"].removeprefix(">="))
    tools = pyproject["tool"]
    assert tools["ruff"]["target-version"] == f"py{oldest.major}{oldest.minor}"
    assert f"PYTHON ?= python{oldest}" in MAKEFILE
