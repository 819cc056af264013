"""What is used of Transformer Engine, compared with its Python source: it runs only with a GPU's libraries."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest

from megatron_sr1.platform.accelerator import Accelerator
from megatron_sr1.platform.precision import _RECIPES, _runs_on
from tests.contracts import te_source
from tests.contracts.library_calls import library_calls, misfit
from tests.source_tree import REPOSITORY, imports, read_modules

CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
SUPPORT = {"delayed": "fp8", "current": "fp8", "blockwise": "fp8_block_scaling", "mxfp8": "mxfp8"}
STAND_IN = REPOSITORY / "tests" / "te_stand_in"


def test_it_is_the_pinned_version() -> None:
    (pin,) = (
        line.split()[0].partition("==")[2]
        for line in (REPOSITORY / "constraints-gpu.txt").read_text().splitlines()
        if line.startswith("transformer-engine==")
    )
    assert te_source.te_version() == pin


def test_every_import_and_call_of_the_package_is_there() -> None:
    modules = [module for module in read_modules(REPOSITORY) if module.in_package]
    names = {n for m in modules for _, n in imports(m) if n.split(".")[0] == "transformer_engine"}
    assert names
    for name in names:
        if te_source.find(name) is None:
            te_source.read_module(name)
    for call in library_calls(modules, "transformer_engine"):
        assert misfit(call.node, te_source.signature(call.name)) is None, call.place


def stand_ins() -> list[tuple[str, ast.ClassDef]]:
    """The classes that stand for Transformer Engine's where tests build its layers."""
    found = []
    for path in sorted(STAND_IN.rglob("*.py")):
        parts = path.relative_to(STAND_IN).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.append((f"{module}.{node.name}", node))
    return found


@pytest.mark.parametrize(("name", "node"), stand_ins(), ids=[name for name, _ in stand_ins()])
def test_what_stands_in_for_a_class_takes_arguments_that_it_takes(name: str, node: ast.ClassDef) -> None:
    """By name, those that the stand-in asks for; what it passes over is between Megatron-Core and the class."""
    theirs = te_source.signature(name).parameters
    variadic = any(parameter.kind == parameter.VAR_KEYWORD for parameter in theirs.values())
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            asked = {a.arg for a in (*member.args.args[1:], *member.args.kwonlyargs)}
            asked |= {  # options["name"]
                part.slice.value
                for part in ast.walk(member)
                if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "options"
                if isinstance(part.slice, ast.Constant)
            }
            assert variadic or asked <= theirs.keys(), asked - theirs.keys()


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_recipe_is_allowed_only_on_cards_where_it_computes(recipe: str) -> None:
    """The functions with which Transformer Engine asks a card, run for each generation and for the CUDA that this set
    has."""
    cuda = "13.0"
    needed = tuple(map(int, _RECIPES[recipe].min_toolkit.split(".")))
    assert needed <= (13, 0)
    for capability in CARDS:
        supported, why = te_source.run(
            f"transformer_engine.pytorch.quantization._compute_{SUPPORT[recipe]}_support",
            get_device_compute_capability=lambda card=capability: card,
            torch=SimpleNamespace(version=SimpleNamespace(cuda=cuda)),
            tex=SimpleNamespace(get_cublasLt_version=lambda: 130000),
        )
        allowed = _runs_on(_RECIPES[recipe], Accelerator("a card", capability, cuda, "2.20.2"))
        only_imitated = recipe == "blockwise" and capability >= (10, 0)
        assert allowed == (supported and not only_imitated), f"{capability}: {why}"


@pytest.mark.parametrize("recipe", _RECIPES)
def test_megatron_knows_a_recipe_by_its_name(recipe: str) -> None:
    from megatron.core.enums import Fp8Recipe

    assert _RECIPES[recipe].megatron_name in {member.value for member in Fp8Recipe}
