"""The set of versions for GPUs is one: pyproject.toml, constraints-gpu.txt, the Makefile and the image's first check.

What vLLM itself pins only its metadata tell: `make contracts` compares those with what stands here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TEXT = (REPOSITORY / "constraints-gpu.txt").read_text()
LINES = [line for line in TEXT.splitlines() if not line.startswith("#")]
PINS = {line.partition("==")[0]: line.split()[0].partition("==")[2] for line in LINES}
EXTRAS = ("gpu", "track", "test")


@pytest.fixture(params=["check_gpu_base", "pin_gpu"])
def tool(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools"))
        yield importlib.import_module(request.param)


check_tool = pytest.mark.parametrize("tool", ["check_gpu_base"], indirect=True)
pin_tool = pytest.mark.parametrize("tool", ["pin_gpu"], indirect=True)


def requirements() -> list[Requirement]:
    extras = [line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    return [need for line in PROJECT["dependencies"] + extras if (need := Requirement(line)).name != PROJECT["name"]]


def test_every_line_is_one_version_with_its_hashes() -> None:
    assert len(LINES) > 200 and len(PINS) == len(LINES), "a name stands there twice"
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+", line), line


def test_no_place_of_a_package_is_written_down() -> None:
    assert not re.search(r"https?:|file:|@|--(extra-)?index|--find-links|\+cpu", TEXT)


@pytest.mark.parametrize("need", requirements(), ids=str)
def test_the_pinned_version_is_one_that_the_project_takes(need: Requirement) -> None:
    assert need.specifier.contains(PINS[need.name.lower()])


def test_the_four_that_decide_are_exact_in_pyproject() -> None:
    """vLLM pins its torch exactly: a range of either would promise sets that do not exist."""
    exact = {
        need.name: str(need.specifier).removeprefix("==")
        for need in map(Requirement, PROJECT["optional-dependencies"]["gpu"])
        if str(need.specifier).startswith("==")
    }
    assert exact.keys() == {"megatron-core", "torch", "transformer-engine", "vllm"}
    assert exact.items() <= PINS.items() and PINS["transformer-engine-torch"] == exact["transformer-engine"]


def test_no_package_overwrites_the_files_of_another() -> None:
    """cuda-python before 13 brings its own, older cuda.bindings: whichever is installed last wins."""
    assert int(PINS["cuda-python"].split(".")[0]) == int(PINS["cuda-bindings"].split(".")[0]) >= 13


@pin_tool
def test_what_is_built_and_what_only_tests_need_stands_apart(tool: ModuleType) -> None:
    head, _, rest = TEXT.partition(f"{tool.TESTS}\n")
    tests, _, built = rest.partition(f"{tool.BUILT}\n")
    assert head.startswith(tool.HEAD) and "\npytest==" in tests and "pytest==" not in head
    assert [line.partition("==")[0] for line in built.splitlines()] == [tool.SOURCE_BUILD]


@pin_tool
def test_a_package_without_a_wheel_is_refused(tool: ModuleType) -> None:
    source = {"hashes": {"sha256": "0" * 64}}
    with pytest.raises(ValueError, match=r"new 1\.0 has no wheel"):
        tool.line({"name": "new", "version": "1.0", "sdist": source})
    assert tool.line({"name": tool.SOURCE_BUILD, "version": "1.0", "sdist": source}).startswith(tool.SOURCE_BUILD)


def test_one_python_everywhere() -> None:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import check_gpu_base
    import pin_gpu

    sys.path.pop(0)
    python = pin_gpu.PYTHON
    assert python == check_gpu_base.PYTHON and f"PYTHON_GPU ?= python{python}\n" in MAKEFILE
    assert f"sys.version_info[:2] != ({python.replace('.', ', ')})" in MAKEFILE
    assert f"wanted {python}\n" in base_check("torch==1\ntransformer-engine==1\nmegatron-core==1\nvllm==1\n")[1]


def test_the_makefile_and_the_image_install_the_file_with_its_hashes() -> None:
    recipe = MAKEFILE[MAKEFILE.index("\n$(GPU)/.installed:") : MAKEFILE.index("== ready: $(GPU)")]
    assert "constraints-gpu.txt" in recipe.splitlines()[1] and not re.search(r"==\d", recipe)
    assert "--no-deps" in MAKEFILE and "--require-hashes" in MAKEFILE
    built = recipe.index("$(GPU)/built.txt \\\n")
    assert recipe.index("$(GPU)/first.txt \\\n") < built < recipe.index("install_project"), "torch is there before"
    assert "--no-build-isolation" in recipe[:built]
    image = (REPOSITORY / "Dockerfile").read_text()
    for name in ("NVTE_PYTORCH_FORCE_BUILD=TRUE", "NVTE_BUILD_USE_NVIDIA_WHEELS=1"):
        assert name in MAKEFILE and name in image


# ---------------------------------------------------------------- the image's first check
def base_check(constraints: str) -> tuple[int, str]:
    script = [sys.executable, str(REPOSITORY / "tools/check_gpu_base.py"), "/dev/stdin"]
    done = subprocess.run(script, input=constraints, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def test_an_image_that_does_not_fit_is_told_found_and_wanted() -> None:
    torch = importlib.metadata.version("torch")
    status, said = base_check("torch==9.9.9\ntransformer-engine==1\nmegatron-core==1\nvllm==1\n")
    assert status == 1 and f"WRONG torch: found {torch}, wanted 9.9.9\n" in said and "BASE_IMAGE" in said


def test_a_file_without_the_pin_is_no_file() -> None:
    status, said = base_check("numpy==1\n")
    assert status == 1 and "0 versions of torch" in said and "Traceback" not in said


@check_tool
@pytest.mark.parametrize(
    ("found", "fits"),
    [
        (None, True),
        ("2.14.0", True),
        ("2.14.0+cu130", True),
        ("2.14.0a0+1f2e3d4", False),
        ("2.14.0.dev20260101", False),
        ("2.14.1", False),
        ("2.13.0+cpu", False),
    ],
)
def test_a_version_fits_as_the_pin_says(tool: ModuleType, found: str | None, fits: bool) -> None:
    assert tool.satisfies(found, "2.14.0") is fits
    assert found is None or Requirement("torch==2.14.0").specifier.contains(found, prereleases=True) is fits


# ---------------------------------------------------------------- make setup-gpu
def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints-gpu.txt"):
        shutil.copy2(REPOSITORY / name, folder)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        ["make", "setup-gpu", "UV=", *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# Makes an environment of itself, whose pip appends its words to `pip.txt` and fails where they have one of its own.
PROGRAM = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho "$@" >> pip.txt\\ncase "$*" in *{fail}*) exit 1;; esac\\n' > "$3/bin/pip"
    chmod +x "$3/bin/pip" ;;
esac
exit 0
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    (tmp_path / "a-python").write_text(PROGRAM.format(fail="nothing-fails"))
    (tmp_path / "a-python").chmod(0o755)
    return f"PYTHON_GPU={tmp_path}/a-python"


linux = pytest.mark.skipif(sys.platform != "linux", reason="make setup-gpu is for Linux")


@linux
def test_make_installs_everything_then_the_engine_then_the_project(tmp_path: Path, python: str) -> None:
    done = make(tmp_path, python, "CXX=true")
    assert done.returncode == 0, done.stdout
    first, engine, project, check = (tmp_path / "pip.txt").read_text().splitlines()
    assert first == "install --no-deps --require-hashes --requirement .venv-gpu/first.txt"
    assert "--no-build-isolation --requirement .venv-gpu/built.txt" in engine
    assert project.endswith("--editable .") and check == "check"
    assert (tmp_path / ".venv-gpu/built.txt").read_text().split("==")[0] == "transformer-engine-torch"
    assert "\ntransformer-engine-torch==" not in (tmp_path / ".venv-gpu/first.txt").read_text()
    assert "pip" not in make(tmp_path, python, "CXX=true").stdout, "nothing is due"


@linux
def test_make_says_in_one_line_what_is_missing(tmp_path: Path, python: str) -> None:
    for words, reason in (
        (("PYTHON_GPU=python3.99",), "python3.99: not found: Python 3.12 is needed. Run make setup-gpu PYTHON_GPU="),
        ((python, "CXX=no-compiler"), "CXX=no-compiler is no C++ compiler"),
    ):
        done = make(tmp_path, *words)
        first, *rest = done.stdout.splitlines()
        assert done.returncode and reason in first and len(rest) == 1, done.stdout
        assert not (tmp_path / ".venv-gpu").exists() and not (tmp_path / "pip.txt").exists()


@linux
@pytest.mark.parametrize("fail", ["first.txt", "built.txt", "editable", "check"])
def test_no_half_environment_stays(tmp_path: Path, python: str, fail: str) -> None:
    program = tmp_path / "a-python"
    program.write_text(PROGRAM.format(fail=fail))
    done = make(tmp_path, python, "CXX=true")
    assert done.returncode and "== .venv-gpu is not filled; the error is above." in done.stdout
    assert not (tmp_path / ".venv-gpu").exists()
