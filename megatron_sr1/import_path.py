"""What users bring: objects by their import path, and whose fault it is when these fail.

`module.path:name` is imported as Python does; `path/to/file.py:name` is a file, which may import what lies beside it.
Either may name a part of an object, `module:name.part`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

_BESIDE: dict[str, Path] = {}  # modules that files of users have imported from beside them, by their names
_EXAMPLE = "Write module.path:name, or path/to/file.py:name"


class UserCodeError(ValueError):
    """Code that a configuration names has failed; the message says which, where and why."""


class UserCode:
    """Says of what is raised inside a `with` where the user's code raised it; what this project raises on purpose
    (`UserCodeError`) passes."""

    def __init__(self, what: str, source: str | None, kind: type[UserCodeError] = UserCodeError) -> None:
        """
        Args:
            what: begins the message: "the reward 'a.py:b' failed on sample '7'".
            source: the user's file, whose innermost line is named; None: the innermost line of all.
            kind: what is raised.
        """
        self._what, self._source, self._kind = what, source, kind

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception | SystemExit) or isinstance(error, UserCodeError):
            return
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise self._kind(f"{self._what} at {self._place(error)}: {reason}") from error

    def _place(self, error: BaseException) -> str:
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self._source]
        last = (own or frames)[-1]
        return f"{last.filename}:{last.lineno} in {last.name}"


def is_import_path(text: str) -> bool:
    """Whether a component's name is an import path, not one of ours."""
    return ":" in text


@functools.cache
def load_object(path: str, key: str) -> Any:
    """The object at an import path.

    Args:
        key: where the path is written, for messages.

    Raises:
        ValueError: no such file, module or name.
        UserCodeError: the module fails where it is imported.
    """
    place, _, name = path.rpartition(":")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{key}: {path!r} is no import path. {_EXAMPLE}.")
    found: Any = _load_file(place, path, key) if place.endswith(".py") else _load_module(place, path, key)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{key}: {path!r}: there is no {part!r} in {place}. {_known(found)}")
        found = getattr(found, part)
    return found


def source_of(function: Callable[..., Any]) -> str | None:
    """The file that a function was written in; None where that cannot be told, as of a function in C."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else code.co_filename


def source_digest(function: Callable[..., Any]) -> str:
    """Of the file that a function was written in and of those beside it that it imports, as they are now; "" where
    there is none."""
    return _digest(_sources(function))


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else ""


def _sources(function: Callable[..., Any]) -> list[Path]:
    source = source_of(function)
    if source is None or not Path(source).is_file():
        return []
    return [Path(source), *sorted(set(imported_beside(Path(source)).values()) - {Path(source)})]


def imported_beside(file: Path) -> dict[str, Path]:
    """By their names, the modules in the folder of a file that it imports, anywhere in its text, and what these import
    there. Nothing is imported."""
    found: dict[str, Path] = {}
    waiting = [file]
    while waiting:
        here = waiting.pop()
        try:
            tree = ast.parse(here.read_bytes())
        except (SyntaxError, ValueError):  # where it is imported, this is told
            continue
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level < 2:
                names |= {node.module} if node.module else {alias.name for alias in node.names}
        for name in {name.partition(".")[0] for name in names} - found.keys() - sys.stdlib_module_names:
            places = (here.parent / f"{name}.py", here.parent / name / "__init__.py")
            beside = next((place for place in places if place.is_file()), None)
            if beside is not None:
                found[name] = beside
                waiting.append(beside)
    return found


def keep_code(folder: Path, functions: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Copies the file of each function, and what it imports from beside it, by their digests, so that every version
    that a run was trained with stays there.

    Args:
        functions: by import path.

    Returns:
        The import paths whose code was another when this was last called on the folder.
    """
    index = folder / "index.json"
    kept = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    found = {}
    for name, function in functions.items():
        files = _sources(function)
        for number, file in enumerate(files):
            copy = f"{file.stem}_{_digest(files if number == 0 else [file])}.py"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / copy)
            found.setdefault(name, copy)
    if found:
        index.write_text(json.dumps({**kept, **found}, indent=1) + "\n", encoding="utf-8")
    return [name for name, file in found.items() if kept.get(name, file) != file]


def _load_module(name: str, path: str, key: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{key}: {path!r} is no import path: {name!r} is neither a module nor a .py file. {_EXAMPLE}.")
    if name not in sys.modules and not _can_be_found(name):
        raise ValueError(
            f"{key}: {path!r}: there is no module {name!r}. Install it, start the command in the folder that holds it "
            "with PYTHONPATH=., or name its file: path/to/file.py:name."
        )
    with UserCode(f"{key}: the import of {name!r} failed", None):
        return importlib.import_module(name)


def _can_be_found(name: str) -> bool:
    """Whether all packages on the way to a module are there; those above it are imported."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        try:
            if importlib.util.find_spec(".".join(parts[:number])) is None:
                return False
        except ModuleNotFoundError:
            return False
    return True


def _load_file(place: str, path: str, key: str) -> ModuleType:
    file = Path(place).expanduser()
    if not file.is_file():
        raise ValueError(f"{key}: {path!r}: there is no file {str(file.absolute())!r}. {_EXAMPLE}.")
    file = file.resolve()
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"  # two files of one name are two modules
    if name in sys.modules:
        return sys.modules[name]
    for beside, other in imported_beside(file).items():
        if (first := _BESIDE.setdefault(beside, other)) != other:
            raise ValueError(
                f"{key}: {path!r} imports {beside!r}, which is {other} there, and {first} for code that was loaded "
                "before. Python knows one module of a name: call one of them otherwise."
            )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end: nothing in it may stand in for what is installed
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    done = False
    try:
        with UserCode(f"{key}: the import of {place!r} failed", str(file)):
            spec.loader.exec_module(module)
        done = True
    finally:
        if not done:
            del sys.modules[name]
    return module


def _known(found: Any) -> str:
    names = sorted(name for name in dir(found) if not name.startswith("_"))[:20]
    return f"It has {', '.join(names)}." if names else "It is empty."
