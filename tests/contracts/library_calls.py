"""The calls of libraries in the package's source, and whether what is called takes those arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.source_tree import Module, imports


@dataclass(frozen=True)
class LibraryCall:
    """`name(...)` somewhere in the source, `name` being the library's own dotted one."""

    place: str
    name: str
    node: ast.Call


def library_calls(modules: list[Module], library: str) -> Iterator[LibraryCall]:
    """Calls of what a module has imported from `library`, by its name or through attributes of it. What is called on
    an object is not among them: the source does not say whose it is."""
    for module in modules:
        names = _imported(module, library)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                first, _, rest = ast.unparse(node.func).partition(".")
                if first in names and (not rest or rest.replace(".", "").replace("_", "").isalnum()):
                    name = ".".join(filter(None, (names[first], rest)))
                    yield LibraryCall(module.at(node, name), name, node)


def _imported(module: Module, library: str) -> dict[str, str]:
    """The library's dotted names by those that the module gives them."""
    found = {}
    for node, name in imports(module):
        if name.split(".")[0] != library:
            continue
        assert isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names:
            whole = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            if whole == name:
                plain = alias.name if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
                found[alias.asname or plain] = name if alias.asname or isinstance(node, ast.ImportFrom) else plain
    return found


def resolve(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        AttributeError: nothing.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"nothing is called {name}")


def signature_of(function: Any) -> inspect.Signature:
    """What a function takes itself; one that takes anything, what it wraps takes."""
    own = inspect.signature(function, follow_wrapped=False)
    kinds = {parameter.kind for parameter in own.parameters.values()}
    passes_on = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    return inspect.signature(function) if passes_on else own


def misfit(call: ast.Call, signature: inspect.Signature) -> str | None:
    """Why `signature` does not take the arguments of `call`; None where it does. What stands behind * and ** is
    unknown, so that then only what is named must be taken."""
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    named = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    unknown = starred or len(named) < len(call.keywords)
    values = [None for argument in call.args if not isinstance(argument, ast.Starred)]
    try:
        (signature.bind_partial if unknown else signature.bind)(*values, **dict.fromkeys(named))
    except TypeError as error:
        return str(error)
    return None


def check_calls(modules: list[Module], library: str) -> tuple[int, list[str]]:
    """How many calls were compared with what is installed, and those that do not fit. Functions without a signature,
    written in C, are not compared."""
    compared, wrong = 0, []
    for call in library_calls(modules, library):
        try:
            signature = signature_of(resolve(call.name))
        except ValueError:
            continue
        except AttributeError as error:
            wrong.append(f"{call.place}: {error}")
            continue
        compared += 1
        why = misfit(call.node, signature)
        if why is not None:
            wrong.append(f"{call.place}{signature}: {why}")
    return compared, wrong


def narrower(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Why a method of ours cannot be called as the one that it overrides; None where it can, by place and by name."""
    fixed = [p for p in theirs.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    placed = [p for p in fixed if p.kind != p.KEYWORD_ONLY]
    kept = [p for p in placed[1:] if p.kind == p.POSITIONAL_OR_KEYWORD]  # self has no name for whoever calls
    only = {p.name: None for p in fixed if p.kind == p.KEYWORD_ONLY}
    for values, named in (
        ([None] * len(placed), only),
        ([None] * (len(placed) - len(kept)), only | {p.name: None for p in kept}),
    ):
        try:
            ours.bind(*values, **named)
        except TypeError as error:
            return str(error)
    return None
