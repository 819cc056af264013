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
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (REPOSITORY / "constraints-gpu.txt").read_text(), flags=re.MULTILINE))
Instruction = tuple[str, str]  # FROM, RUN ...; the rest of its lines as one


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """The project table of pyproject.toml."""
    return PYPROJECT["project"]


def pinned(name: str) -> str:
    return PINS[name]


def of(instructions: list[Instruction], kind: str) -> list[str]:
    return [rest for name, rest in instructions if name == kind]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_image_has_the_pinned_torch_and_can_be_another(instructions: list[Instruction]) -> None:
    kind, argument = instructions[0]
    name, _, image = argument.partition("=")
    assert (kind, name) == ("ARG", "BASE_IMAGE")
    tag = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda([\d.]+)-cudnn\d+-devel", image)
    assert tag is not None and tag[1] == pinned("torch")
    assert tag[2] == ".".join(pinned("nvidia-cuda-runtime").split(".")[:2]), "the CUDA that this torch is built for"
    stages = of(instructions, "FROM")
    assert stages[0] == "${BASE_IMAGE} AS pinned" and all(stage.split()[0] == "pinned" for stage in stages[1:])


def test_the_first_step_says_what_does_not_fit(instructions: list[Instruction]) -> None:
    first = of(instructions, "RUN")[0]
    assert first == "python tools/check_gpu_base.py constraints-gpu.txt"


def test_every_version_is_that_of_the_constraints(instructions: list[Instruction]) -> None:
    """None is written here, none is resolved, and no file is taken whose hash nobody has seen."""
    assert not re.search(r"==\d", TEXT)
    pip = [rest for rest in of(instructions, "RUN") if re.search(r"pip (install|wheel)", rest)]
    assert len(pip) == 4 and all("--no-deps" in rest for rest in pip)
    packages, engine, wheels, project = pip
    assert "--require-hashes" in packages and "--requirement pinned.txt" in packages
    assert "--require-hashes" in engine and "--requirement built.txt" in engine
    assert wheels.endswith("/wheels/*.whl") and project.endswith(" .")


def test_the_engine_is_built_in_a_stage_of_its_own(instructions: list[Instruction]) -> None:
    name = "transformer-engine"
    begin = instructions.index(("FROM", f"pinned AS {name}"))
    stage = instructions[
        begin + 1 : next(i for i in range(begin + 1, len(instructions)) if instructions[i][0] == "FROM")
    ]
    ((_, build),) = stage
    assert "--no-build-isolation" in build and "--wheel-dir /wheels" in build
    assert sum(f"from={name}" in rest for rest in of(instructions, "RUN")) == 1


def test_the_tests_packages_stay_out(instructions: list[Instruction]) -> None:
    """As the image's own sed cuts the file."""
    (cut,) = re.findall(r"(sed -e '.*?' constraints-gpu.txt)", TEXT)
    kept = subprocess.run(shlex.split(cut), cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    names = {line.partition("==")[0] for line in kept.splitlines() if not line.startswith("#")}
    assert {"torch", "vllm", "megatron-core", "transformer-engine"} <= names
    assert not names & {"pytest", "ruff", "transformer-engine-torch"}


def test_it_copies_what_it_needs_and_no_more(instructions: list[Instruction], packaging: dict[str, Any]) -> None:
    sources = [word for rest in of(instructions, "COPY") for word in rest.split()[:-1]]
    assert all((REPOSITORY / source).exists() for source in sources)
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignore and {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    before_install = TEXT[: TEXT.index("--no-build-isolation .")]
    read_by_the_installer = {"setup.py", "pyproject.toml", packaging["readme"], *packaging["license-files"]}
    assert "COPY megatron_sr1" in before_install and read_by_the_installer <= set(before_install.split())


def test_it_builds_without_isolation_only_with_what_is_pinned() -> None:
    for line in PYPROJECT["build-system"]["requires"]:
        need = Requirement(line)
        assert need.specifier.contains(pinned(need.name)), need


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
