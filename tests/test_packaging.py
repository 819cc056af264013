"""What pyproject.toml says about the package, held to the files that are there and to the Makefile."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
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


# ---------------------------------------------------------------- make setup
PIP = '#!/bin/sh\necho "pip $*"\n'
GOOD_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; printf '%s' '{pip}' > "$3/bin/pip"; chmod +x "$3/bin/pip" ;;
esac
exit 0
"""
OLD_PYTHON = '#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.18" && exit 0\nexit 1\n'


def make_setup(folder: Path, python: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a copy of the Makefile, with a program in place of Python."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy2(REPOSITORY / name, folder)
    (folder / "tools").mkdir(exist_ok=True)
    shutil.copy2(REPOSITORY / "tools/mend_torchvision.py", folder / "tools")
    program = folder / "a-python"
    program.write_text(python)
    program.chmod(0o755)
    return subprocess.run(
        ["make", "setup", f"PYTHON={program}", *words],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},  # of the make above
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_make_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    done = make_setup(tmp_path, OLD_PYTHON)
    first = done.stdout.splitlines()[0]
    assert done.returncode and first.endswith(
        "is Python 3.9.18: Python 3.11 or newer is needed. Run make setup PYTHON=<the command of one>"
    ), done.stdout
    assert not (tmp_path / ".venv").exists() and "pip" not in done.stdout


def test_make_keeps_what_it_has_installed(tmp_path: Path) -> None:
    python = GOOD_PYTHON.format(pip=PIP)
    done = make_setup(tmp_path, python)
    assert done.returncode == 0 and "pip install torch==" in done.stdout, done.stdout
    assert (tmp_path / ".venv/.installed").is_file()
    assert "pip" not in make_setup(tmp_path, OLD_PYTHON).stdout, "nothing is due, whatever PYTHON is"


@pytest.mark.parametrize("python", [OLD_PYTHON, "#!/bin/sh\nexit 127\n", None], ids=["old", "broken", "absent"])
def test_make_replaces_an_environment_that_is_none(python: str | None, tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/.installed").touch()
    (tmp_path / ".venv/stale").touch()
    if python is not None:
        (tmp_path / ".venv/bin/python").write_text(python)
        (tmp_path / ".venv/bin/python").chmod(0o755)
    done = make_setup(tmp_path, GOOD_PYTHON.format(pip=PIP))
    assert done.returncode == 0 and "pip install torch==" in done.stdout, done.stdout
    assert not (tmp_path / ".venv/stale").exists()


def test_an_environment_that_cannot_be_filled_does_not_stay(tmp_path: Path) -> None:
    done = make_setup(tmp_path, GOOD_PYTHON.format(pip="#!/bin/sh\nexit 1\n"))
    assert done.returncode and "TORCH_INDEX_URL=" in done.stdout
    assert not (tmp_path / ".venv").exists()


CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LACKS_TORCH = """#!/bin/sh
echo "pip $*"
case "$*" in *{given}*) exit 0 ;; *torch==*) echo "ERROR: No matching distribution"; exit 1 ;; esac
"""


def pip_calls(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What pip was called with, in order; make's echo of a command begins otherwise."""
    return [line.removeprefix("pip install ") for line in done.stdout.splitlines() if line.startswith("pip install ")]


def test_pip_s_own_index_comes_first_and_is_enough(tmp_path: Path) -> None:
    torch, project = pip_calls(done := make_setup(tmp_path, GOOD_PYTHON.format(pip=PIP)))
    assert torch.startswith("torch==") and "index-url" not in torch and "--editable" in project
    assert "trying" not in done.stdout


def test_where_it_lacks_torch_pytorch_s_own_is_tried_and_said(tmp_path: Path) -> None:
    python = GOOD_PYTHON.format(pip=LACKS_TORCH.format(given=CPU_INDEX))
    done = make_setup(tmp_path, python)
    first, second, project = pip_calls(done)
    assert done.returncode == 0, done.stdout
    assert "index-url" not in first and second == f"{first} torchvision --index-url {CPU_INDEX}"
    assert "index-url" not in project, "nothing else comes from there"
    assert f"does not give {first}: trying {CPU_INDEX}" in done.stdout
    (tmp_path / "other").mkdir()
    failed = make_setup(tmp_path / "other", GOOD_PYTHON.format(pip=LACKS_TORCH.format(given="--editable")))
    assert failed.returncode and len(pip_calls(failed)) == 2 and not (tmp_path / "other/.venv").exists()
    assert f"not to be had from pip's own index or {CPU_INDEX}" in failed.stdout


def test_an_index_that_is_named_is_the_only_one(tmp_path: Path) -> None:
    word, python = (
        "TORCH_INDEX_URL=https://host/simple",
        GOOD_PYTHON.format(pip=LACKS_TORCH.format(given="https://host")),
    )
    torch, _ = pip_calls(make_setup(tmp_path, python, word))
    assert torch.endswith("torchvision --index-url https://host/simple")
    (tmp_path / "other").mkdir()
    failed = make_setup(tmp_path / "other", GOOD_PYTHON.format(pip=LACKS_TORCH.format(given=CPU_INDEX)), word)
    assert (
        failed.returncode and len(pip_calls(failed)) == 1 and "not to be had from https://host/simple" in failed.stdout
    )


@pytest.mark.parametrize(
    "program",
    [
        "from transformers import AutoProcessor",
        "import importlib.util; importlib.util.find_spec('torchvision'); import torchvision",
        "from megatron_sr1.platform import torchvision_ops as ops; ops.define_missing_torchvision_ops(); "
        "ops.define_missing_torchvision_ops(); import torchvision; ops.define_missing_torchvision_ops()",
        "import torchvision; from megatron_sr1.platform import torchvision_ops as ops; "
        "ops.define_missing_torchvision_ops(); ops.define_missing_torchvision_ops()",
    ],
)
def test_any_program_can_import_torchvision(program: str, tmp_path: Path) -> None:
    """With the hook that `make setup` writes where torchvision is not compiled for the torch that is there; the
    commands, which define what is missing themselves, get along with it."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from mend_torchvision import HOOK, write_hook

    sys.path.pop(0)
    write_hook(tmp_path)
    # without the one that the environment may have
    start = f"import site, sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != {HOOK!r}]; "
    start += (
        f"sys.modules.pop({HOOK!r}, None); sys.path.insert(0, {str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r}); "
    )
    done = subprocess.run([sys.executable, "-c", start + program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
