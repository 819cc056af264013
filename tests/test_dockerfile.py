"""The image's recipe: linted, pinned, and in step with pyproject.toml. No engine is needed to read it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
Instruction = tuple[str, str]  # FROM, RUN ...; the rest of its lines as one


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """The project table of pyproject.toml."""
    return PYPROJECT["project"]


def of(instructions: list[Instruction], kind: str) -> list[str]:
    return [rest for name, rest in instructions if name == kind]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_image_is_the_builder_s_choice(instructions: list[Instruction]) -> None:
    assert instructions[0] == ("ARG", "BASE_IMAGE") and of(instructions, "FROM") == ["${BASE_IMAGE}"]


def test_pins_are_versions_that_the_project_allows(instructions: list[Instruction], packaging: dict[str, Any]) -> None:
    pins = dict(re.findall(r"([A-Za-z][\w-]+)==(\d[\w.]*)", TEXT))
    needs = [Requirement(line) for line in packaging["dependencies"] + packaging["optional-dependencies"]["gpu"]]
    for need in needs:
        if need.name in pins:
            assert need.specifier.contains(pins.pop(need.name)), need
    assert not pins, f"pyproject.toml does not ask for {', '.join(pins)}"


def test_what_decides_the_results_is_pinned(packaging: dict[str, Any]) -> None:
    """Each package of the gpu extra is pinned, or kept as the base image has it."""
    for line in packaging["optional-dependencies"]["gpu"]:
        name = Requirement(line).name
        kept = re.search(r"grep -E '\^\((.*?)\)=='", TEXT)
        assert kept is not None
        assert f"{name}==" in TEXT or re.fullmatch(kept.group(1), name), name


def test_everything_that_is_installed_is_an_extra_of_the_project(
    instructions: list[Instruction], packaging: dict[str, Any]
) -> None:
    (install,) = [rest for rest in of(instructions, "RUN") if "pip install" in rest]
    words = shlex.split(install)
    (target,) = [word for word in words if word.startswith(".")]
    extras = re.fullmatch(r"\.\[(.*)\]", target)
    assert extras is not None and set(extras.group(1).split(",")) <= packaging["optional-dependencies"].keys()
    assert "gpu" in extras.group(1).split(",") and "launch" not in extras.group(1)
    assert words[words.index("--constraint") + 1] == "constraints.txt"


def test_it_copies_what_it_needs_and_no_more(instructions: list[Instruction], packaging: dict[str, Any]) -> None:
    sources = [word for rest in of(instructions, "COPY") for word in rest.split()[:-1]]
    assert all((REPOSITORY / source).exists() for source in sources)
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignore and {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    before_install = TEXT[: TEXT.index("pip install")]
    read_by_the_installer = {"setup.py", "pyproject.toml", packaging["readme"], *packaging["license-files"]}
    assert "COPY megatron_sr1" in before_install and read_by_the_installer <= set(before_install.split())


def test_it_builds_without_isolation_only_where_the_image_can() -> None:
    (backend,) = map(Requirement, PYPROJECT["build-system"]["requires"])
    assert backend.name == "setuptools" and "--no-build-isolation" in TEXT
    (oldest,) = (specifier.version for specifier in backend.specifier)
    check = f">= {oldest}, 'it needs setuptools {oldest} or newer'"
    assert check in TEXT[: TEXT.index("pip install")]


def test_it_runs_the_command_without_root(instructions: list[Instruction], packaging: dict[str, Any]) -> None:
    (user,) = of(instructions, "USER")
    assert int(user) > 0 and instructions.index(("USER", user)) > max(
        index for index, (kind, _) in enumerate(instructions) if kind == "RUN"
    )
    (command,) = packaging["scripts"]
    assert of(instructions, "ENTRYPOINT") == [f'["{command}"]']


def test_no_secret_and_no_registry_is_written_into_it() -> None:
    assert not re.search(r"(?i)token|password|secret|api_key", TEXT)
    assert not re.search(r"\b[\w-]+\.(io|com|org)/", TEXT)
