"""Transformer Engine's Python source, read and not imported: that takes its part for torch, and a GPU's libraries."""

from __future__ import annotations

import ast
import functools
import inspect
import os
from pathlib import Path
from typing import Any

# where `make contracts` puts the package alone, beside its environment
FOLDER = Path(os.environ.get("TE_SOURCE", ".venv-contracts/te_source"))


@functools.cache
def read_module(name: str) -> ast.Module:
    """
    Raises:
        ModuleNotFoundError: Transformer Engine has no such module.
    """
    path = FOLDER.joinpath(*name.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    raise ModuleNotFoundError(f"{name}: not in {FOLDER}")


def te_version() -> str:
    """The version whose source is read."""
    (folder,) = FOLDER.glob("transformer_engine-*.dist-info")
    return folder.name.removeprefix("transformer_engine-").removesuffix(".dist-info")


def find(name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The module and definition of a dotted name, followed through the imports of the modules between; None without."""
    module, _, last = name.rpartition(".")
    try:
        tree = read_module(module)
    except ModuleNotFoundError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == last:
            return module, node
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        source = _absolute(module, node)
        for alias in node.names:
            whole = f"{source}.{alias.name}"
            if last == (alias.asname or alias.name) and source.startswith("transformer_engine") and whole != name:
                return find(whole)
            if alias.name == "*" and source.startswith("transformer_engine") and (found := find(f"{source}.{last}")):
                return found
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = (FOLDER.joinpath(*module.split(".")) / "__init__.py").is_file()
    parts = module.split(".") if is_package else module.split(".")[:-1]
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def signature(name: str) -> inspect.Signature:
    """How a function, or a class of a dotted name, is called; a class without a constructor of its own as the first
    base that has one, and a dataclass by its fields.

    Raises:
        AttributeError: there is no such name.
    """
    found = find(name)
    if found is None:
        raise AttributeError(f"Transformer Engine has no {name}")
    module, node = found
    if isinstance(node, ast.FunctionDef):
        return _signature(node, bound=False)
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _signature(member, bound=True)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return _fields(node)
    for base in node.bases:
        if find(f"{module}.{ast.unparse(base)}") is not None:
            return signature(f"{module}.{ast.unparse(base)}")
    return inspect.Signature()


def _signature(node: ast.FunctionDef, *, bound: bool) -> inspect.Signature:
    kinds, arguments = inspect.Parameter, node.args
    placed = [*arguments.posonlyargs, *arguments.args]
    required = len(placed) - len(arguments.defaults)
    parameters = [
        kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if place < required else None)
        for place, a in enumerate(placed)
    ][bound:]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _fields(node: ast.ClassDef) -> inspect.Signature:
    kinds = inspect.Parameter
    fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
    return inspect.Signature(
        [
            kinds(ast.unparse(field.target), kinds.KEYWORD_ONLY, default=kinds.empty if field.value is None else None)
            for field in fields
        ]
    )


def run(name: str, **names: Any) -> Any:
    """What a function of Transformer Engine returns without arguments; `names` stand for what its module has."""
    found = find(name)
    if found is None:
        raise AttributeError(f"Transformer Engine has no {name}")
    node = found[1]
    node.decorator_list.clear()
    node.returns = None  # type: ignore[union-attr]
    space: dict[str, Any] = dict(names)
    exec(compile(ast.Module([node], type_ignores=[]), name, "exec"), space)
    return space[node.name]()
