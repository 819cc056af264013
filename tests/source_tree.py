"""The source files as syntax trees, and the questions that rules ask of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_sr1"
CHECKED_FOLDERS = (PACKAGE, "tools")
Function = ast.FunctionDef | ast.AsyncFunctionDef
PRIVATE = re.compile(r"_(?!_)")  # at the start of a name
DOCUMENTED = {"os._exit"}  # private by its look only


@dataclass(frozen=True)
class Module:
    """One source file; `room` is the first name below the package, or the folder for files outside it."""

    path: Path
    parts: tuple[str, ...]  # relative to the repository, without .py
    text: str
    tree: ast.Module

    @property
    def in_package(self) -> bool:
        return self.parts[0] == PACKAGE

    @property
    def room(self) -> str:
        return self.parts[1] if self.in_package else self.parts[0]

    def lies_in(self, room: str) -> bool:
        """Whether the file is in `room`, a room or a folder of one: policy, rollout/vllm."""
        folders = tuple(room.split("/"))
        return self.in_package and self.parts[1 : 1 + len(folders)] == folders

    def at(self, node: ast.AST, what: str) -> str:
        return f"{'/'.join(self.parts)}.py:{1 if isinstance(node, ast.Module) else node.lineno}: {what}"


def read_modules(root: Path) -> list[Module]:
    modules = []
    for folder in CHECKED_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            modules.append(Module(path, path.relative_to(root).with_suffix("").parts, text, ast.parse(text)))
    return modules


def imports(module: Module, tree: ast.AST | None = None) -> Iterator[tuple[ast.AST, str]]:
    """Every imported dotted name, relative imports resolved; `from a import b` gives `a.b`."""
    for node in ast.walk(tree or module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(module.parts[: -node.level]) if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            yield from ((node, f"{prefix}.{alias.name}") for alias in node.names)


def outside_nodes(module: Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: everything outside functions and `if TYPE_CHECKING`."""
    queue: list[ast.AST] = [module.tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        queue += [c for c in ast.iter_child_nodes(node) if not isinstance(c, Function | ast.Lambda)]


def functions(module: Module) -> Iterator[Function]:
    yield from (node for node in ast.walk(module.tree) if isinstance(node, Function))


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of bare string statements: docstrings, which may use any word."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def _is_own(value: ast.expr, classes: set[str]) -> bool:
    """Whether the private attributes of `value` are the file's own: of self, cls, or a class that it defines."""
    return isinstance(value, ast.Name) and value.id in {"self", "cls", *classes}


def private_names(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Names with a leading underscore that are somebody else's: imported ones, parts of a module's path, attributes."""
    classes = {node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
    for node, name in imports(module):
        if any(PRIVATE.match(part) for part in name.split(".")):
            yield node, name
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr) and not _is_own(node.value, classes):
            if ast.unparse(node) not in DOCUMENTED:
                yield node, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            words = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((node, word) for word in words if PRIVATE.match(word))
