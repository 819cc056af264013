"""The rules of the house, read from the syntax trees: who may import whom, size, types, words that belong to one room.

Every rule is shown to fail, on a small made-up tree with one violation, at the end of the file.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.source_tree import (
    PACKAGE,
    REPOSITORY,
    Function,
    Module,
    docstrings,
    functions,
    imports,
    outside_nodes,
    private_names,
    read_modules,
)

LEVELS = {
    0: {"__init__", "ahead", "bounded_answers", "config", "encoded_image", "ends_with_parent", "file_lock"}
    | {"import_path", "parent_process", "phases", "printable", "processes", "ranks", "reward_stream", "schedule"}
    | {"signals", "types"},
    1: {
        "data",
        "prompts",
        "rewards",
        "objective",
        "packing",
        "streams",
        "processor",
        "chat_template",
        "opening",
        "judge",
        "metrics",
        "report",
        "digits",
        "evaluation",
    },
    2: {"platform", "kernels", "weights", "policy", "convert", "rollout", "estimate", "training", "show"},
    3: {"preflight", "loops"},
    4: {"cli", "launch", "__main__"},
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}
ALLOWED_SIDEWAYS = {  # within a level; a room that is not here imports no neighbour
    "evaluation": {
        "data",
        "prompts",
        "rewards",
        "judge",
    },  # what a description leads to is asked and graded as in the second pass
    "data": {"prompts"},  # a response that is built into a shard has the layout that its template asks for
    "processor": {"chat_template", "opening"},
    "streams": {"prompts", "rewards"},  # a stream is checked against what its rewards need and its pass writes
    "rewards": {"judge", "prompts"},  # one parser for the layouts, used by whoever looks into a response
    "platform": set(),
    "kernels": {"platform"},
    "weights": {"platform"},
    "policy": {"platform", "kernels", "weights"},
    "convert": {"platform", "weights", "policy"},
    "training": {"platform", "kernels", "weights", "policy", "estimate"},  # the operations that a step has done
    "rollout": {"platform", "weights", "kernels"},  # an engine on a CPU computes a gated delta rule as the policy does
    "estimate": {"platform", "kernels", "policy"},
    "loops": {"preflight"},  # the first phase of a run
}
FORBIDDEN = {("policy", "objective")}  # the loop passes the loss in
MEGATRON_ROOMS = {"policy", "weights", "convert", "training", "platform"}
VLLM_ROOMS = {"rollout/vllm"}
PRIVATE_FILES = {  # the names that are no public interface of a library: the one file that may use them
    "torch": f"{PACKAGE}/platform/torch_private",
    "megatron": f"{PACKAGE}/platform/megatron_private",
    "vllm": f"{PACKAGE}/rollout/vllm/private",
}
TENSOR_METHODS = {"abs", "backward", "cpu", "detach", "exp", "item", "log", "mean", "std", "sum", "tolist"}
DEVICE_ROOMS = {"platform", "kernels"}
DEVICE_WORD = re.compile(r"\b(cuda|nccl|gloo|is_cuda|is_nccl_available|is_gloo_available)\b", re.IGNORECASE)
UNFINISHED = re.compile(r"\bTODO\b|\bFIXME\b|NotImplementedError")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES, MIN_TEST_RATIO = 500, 60, 150, 0.6


def imported_rooms(module: Module, tree: ast.AST | None = None) -> Iterator[tuple[ast.AST, str]]:
    for node, name in imports(module, tree):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            is_room = len(parts) > 1 and parts[1] in LEVEL_OF
            yield node, parts[1] if is_room else "__init__"


# ---------------------------------------------------------------- the rules
def rule_every_room_has_a_level(modules: list[Module]) -> list[str]:
    return [
        m.at(m.tree, f"{m.room} has no level: add it to LEVELS, or move the file into a room")
        for m in modules
        if m.in_package and m.room not in LEVEL_OF
    ]


def rule_imports_go_down(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        for node, target in imported_rooms(module) if module.in_package and module.room in LEVEL_OF else ():
            level, target_level = LEVEL_OF[module.room], LEVEL_OF[target]
            same_level = level == target_level and level in (1, 2, 3) and module.room != target
            sideways = same_level and target not in ALLOWED_SIDEWAYS.get(module.room, set())
            if target_level > level or sideways or (module.room, target) in FORBIDDEN:
                found.append(module.at(node, f"{module.room} (L{level}) imports {target} (L{target_level})"))
    return found


def rule_commands_import_late(modules: list[Module]) -> list[str]:
    """cli and launch import only L0 and each other until a command runs: `--help` answers at once."""
    allowed = LEVELS[0] | LEVELS[4]
    return [
        module.at(node, f"{module.room} imports {target} before a command runs: import it inside the command")
        for module in modules
        if module.in_package and module.room in LEVELS[4]
        for outside in outside_nodes(module)
        if isinstance(outside, ast.Import | ast.ImportFrom)
        for node, target in imported_rooms(module, outside)
        if target not in allowed
    ]


def _library_only_in(modules: list[Module], library: str, rooms: set[str]) -> list[str]:
    return [
        module.at(node, f"{library} belongs to {', '.join(sorted(rooms))}; {module.room} imports {name}")
        for module in modules
        if module.in_package and not any(module.lies_in(room) for room in rooms)
        for node, name in imports(module)
        if name.split(".")[0] == library
    ]


def rule_megatron_has_its_rooms(modules: list[Module]) -> list[str]:
    return _library_only_in(modules, "megatron", MEGATRON_ROOMS)


def rule_vllm_has_its_room(modules: list[Module]) -> list[str]:
    return _library_only_in(modules, "vllm", VLLM_ROOMS)


def rule_private_names_are_gathered(modules: list[Module]) -> list[str]:
    """Those of torch, vLLM and Megatron in one file for each; of others there are none. Of an attribute, nothing tells
    whose it is: each of the files may have them."""
    found = []
    for module in modules:
        library = {path: name for name, path in PRIVATE_FILES.items()}.get("/".join(module.parts))
        for node, name in private_names(module):
            imported = isinstance(node, ast.Import | ast.ImportFrom)
            if library is None or (imported and name.split(".")[0] != library):
                wanted = PRIVATE_FILES.get(name.split(".")[0]) if imported else None
                where = f"{wanted}.py" if wanted else f"one of {', '.join(sorted(PRIVATE_FILES.values()))}"
                found.append(module.at(node, f"{name} is private: give it a name in {where}"))
    return found


def _imported_files(module: Module, files: dict[str, Module]) -> set[str]:
    """Dotted names of the package's files that a file imports, wherever in it. A package stands for its __init__."""
    targets = set()
    for _, name in imports(module):
        parents = [name, name.rpartition(".")[0]]  # `from a import b`: b is a file, or a name in a
        targets |= {next((parent for parent in parents if parent in files), "")}
    return targets - {""}


def rule_files_make_no_circle(modules: list[Module]) -> list[str]:
    """Imports inside functions and for types alone count, too: whoever reads one file must read the circle."""
    files = {".".join(m.parts).removesuffix(".__init__"): m for m in modules if m.in_package}
    reached = {name: _imported_files(module, files) for name, module in files.items()}
    for middle in files:  # paths through the first file, the first two, ... (Warshall 1962)
        for targets in reached.values():
            targets |= reached[middle] if middle in targets else set()
    circles = {frozenset(n for n in reached[name] if name in reached[n]) for name in files if name in reached[name]}
    lasts = [(files[max(circle)], circle) for circle in circles]
    return [last.at(last.tree, f"a circle of imports: {', '.join(sorted(circle))}") for last, circle in lasts]


def _tensor_words(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for node, name in imports(module):
        if name.split(".")[0] == "torch" and name.split(".")[:2] != ["torch", "distributed"]:
            yield node, f"import of {name}"
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name != "distributed":
                yield node, f"torch.{name}"
            case ast.Call(func=ast.Attribute(attr=name)) if name in TENSOR_METHODS:
                yield node, f".{name}()"
            case ast.Name(id=name) | ast.Constant(value=str() as name) if re.search(r"\bTensor\b", name):
                yield node, name


def rule_loops_hold_no_tensor_arithmetic(modules: list[Module]) -> list[str]:
    """Loops say what comes after what: of torch they know the collectives, of tensors not even the type."""
    return [
        module.at(node, f"{what}: loops hold the order alone, tensors belong to the rooms below")
        for module in modules
        if module.lies_in("loops")
        for skip in [docstrings(module.tree)]
        for node, what in _tensor_words(module)
        if id(node) not in skip
    ]


def rule_groups_are_passed(modules: list[Module]) -> list[str]:
    """`parallel_state.get_*` only in one file of policy/: everything else receives its process groups."""
    calls = [
        (module, node)
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "parallel_state" and node.attr.startswith("get_")
    ]
    files = {module.parts for module, _ in calls if module.room == "policy"}
    return [
        module.at(node, f"parallel_state.{node.attr}: pass the ProcessGroupCollection")
        for module, node in calls
        if module.room != "policy" or len(files) > 1
    ]


def _words(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.Constant(value=str() as word):
            return [word]
        case ast.keyword(arg=str() as word):
            return [word]
        case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.ClassDef(name=word):
            return [word]
        case ast.alias(name=word):
            return [word]
        case ast.ImportFrom(module=str() as word):
            return [word]
    return []


def rule_device_words_have_their_rooms(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        if not module.in_package or module.room in DEVICE_ROOMS:
            continue
        skip = docstrings(module.tree)
        for node in ast.walk(module.tree):
            hits = [word for word in _words(node) if id(node) not in skip and DEVICE_WORD.search(word)]
            found += [module.at(node, f"{word!r}: devices and backends are chosen in platform/") for word in hits]
    return found


def rule_errors_are_named(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                names = {ast.unparse(kind) if kind is not None else "everything" for kind in caught}
                if names & {"everything", "Exception", "BaseException"}:
                    found.append(module.at(node, "name the errors that are expected here"))
    return found


def rule_files_are_short(modules: list[Module]) -> list[str]:
    counts = {m: len(m.text.splitlines()) for m in modules}
    return [m.at(m.tree, f"{n} lines, at most {MAX_FILE_LINES}") for m, n in counts.items() if n > MAX_FILE_LINES]


def rule_functions_are_short(modules: list[Module]) -> list[str]:
    return [
        module.at(node, f"{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
        for module in modules
        for node in functions(module)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def rule_no_utils(modules: list[Module]) -> list[str]:
    return [
        m.at(m.tree, "name the file after its idea") for m in modules if m.parts[-1] in ("utils", "util", "helpers")
    ]


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        is_named = isinstance(node, Function | ast.ClassDef)
        if is_named and (not node.name.startswith("_") or node.name == "__init__"):
            yield node


def _public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[Function, bool]]:
    """Public functions, and whether each is a method that takes self or cls."""
    for node in _public(tree):
        if isinstance(node, ast.ClassDef):
            yield from _public_functions(node)
        else:
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            yield node, isinstance(tree, ast.ClassDef) and not static


def rule_public_functions_are_typed(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        for node, is_method in _public_functions(module.tree):
            a = node.args
            positional = [*a.posonlyargs, *a.args][1 if is_method else 0 :]
            every = [*positional, *a.kwonlyargs, *(extra for extra in (a.vararg, a.kwarg) if extra is not None)]
            untyped = [argument.arg for argument in every if argument.annotation is None]
            untyped += ["the result"] if node.returns is None else []
            found += [module.at(node, f"{node.name}: {name} has no type") for name in untyped]
    return found


def rule_public_names_are_documented(modules: list[Module]) -> list[str]:
    return [
        module.at(node, f"{node.name} has no docstring")
        for module in modules
        for node in _public(module.tree)
        if ast.get_docstring(node) is None and node.name != "main"
    ]


def rule_nothing_is_unfinished(modules: list[Module]) -> list[str]:
    return [
        f"{'/'.join(module.parts)}.py:{number}: {line.strip()}"
        for module in modules
        for number, line in enumerate(module.text.splitlines(), start=1)
        if UNFINISHED.search(line)
    ]


RULES: dict[str, Callable[[list[Module]], list[str]]] = {
    name.removeprefix("rule_"): rule for name, rule in list(globals().items()) if name.startswith("rule_")
}


# ---------------------------------------------------------------- the house keeps them
@pytest.fixture(scope="module")
def house() -> list[Module]:
    return read_modules(REPOSITORY)


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, house: list[Module]) -> None:
    found = RULES[name](house)
    assert not found, "\n".join(["", *found])


def test_config_starts_without_torch() -> None:
    code = f"import sys, {PACKAGE}.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_median_file_is_short(house: list[Module]) -> None:
    assert statistics.median(len(m.text.splitlines()) for m in house) <= MAX_MEDIAN_LINES


def test_tests_keep_up_with_the_source(house: list[Module]) -> None:
    source = sum(len(module.text.splitlines()) for module in house)
    tests = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (REPOSITORY / "tests").rglob("*.py"))
    assert tests >= MIN_TEST_RATIO * source, f"{tests} lines of tests for {source} lines of source"


# ---------------------------------------------------------------- each rule can fail
DOC = '"""Says what this is."""\n'
LONG = "def f() -> None:\n    '''Doc.'''\n" + "    x = 1\n" * MAX_FUNCTION_LINES
VIOLATIONS = [
    ("every_room_has_a_level", "megatron_sr1/attic.py", DOC),
    ("every_room_has_a_level", "megatron_sr1/attic/box.py", DOC),
    ("imports_go_down", "megatron_sr1/types.py", "from megatron_sr1.prompts import x\n"),
    ("imports_go_down", "megatron_sr1/objective/a.py", "from megatron_sr1 import prompts\n"),
    ("imports_go_down", "megatron_sr1/rewards/a.py", "from ..objective import losses\n"),
    ("imports_go_down", "megatron_sr1/packing.py", "import megatron_sr1.policy.model\n"),
    ("imports_go_down", "megatron_sr1/policy/a.py", "from megatron_sr1.objective.losses import x\n"),
    ("imports_go_down", "megatron_sr1/policy/a.py", "def f():\n    from megatron_sr1.training import checkpointer\n"),
    ("imports_go_down", "megatron_sr1/rollout/a.py", "from megatron_sr1.policy import model\n"),
    ("imports_go_down", "megatron_sr1/kernels/a.py", "from megatron_sr1.weights import name_table\n"),
    ("imports_go_down", "megatron_sr1/loops/a.py", "from megatron_sr1.cli import main\n"),
    ("commands_import_late", "megatron_sr1/cli/a.py", "if True:\n    from megatron_sr1.loops import grpo\n"),
    ("commands_import_late", "megatron_sr1/launch/a.py", "from megatron_sr1.metrics import Metric\n"),
    ("megatron_has_its_rooms", "megatron_sr1/loops/a.py", "from megatron.core import parallel_state\n"),
    ("vllm_has_its_room", "megatron_sr1/policy/a.py", "def f():\n    import vllm\n"),
    ("vllm_has_its_room", "megatron_sr1/rollout/passes.py", "from vllm import SamplingParams\n"),
    ("private_names_are_gathered", "megatron_sr1/data/a.py", "from torch.serialization import _get_layout\n"),
    ("private_names_are_gathered", "megatron_sr1/data/a.py", "def f():\n    from torch.utils import _device\n"),
    ("private_names_are_gathered", "megatron_sr1/data/a.py", "from torch._inductor import config\n"),
    ("private_names_are_gathered", "megatron_sr1/data/a.py", "import triton._internal_testing\n"),
    ("private_names_are_gathered", "megatron_sr1/policy/a.py", "x = parallel_state._groups\n"),
    ("private_names_are_gathered", "megatron_sr1/policy/a.py", "x = self.engine.core._finalizer\n"),
    ("private_names_are_gathered", "megatron_sr1/policy/a.py", "x = super()._apply(f)\n"),
    ("private_names_are_gathered", "megatron_sr1/policy/a.py", "setattr(engine, '_core', None)\n"),
    ("private_names_are_gathered", "tools/a.py", "x = config._name_or_path\n"),
    (
        "private_names_are_gathered",
        "megatron_sr1/platform/megatron_private.py",
        "from torch.serialization import _get_layout\n",
    ),
    ("files_make_no_circle", "megatron_sr1/data/write.py", "def f():\n    from megatron_sr1.data import read\n"),
    (
        "files_make_no_circle",
        "megatron_sr1/data/write.py",
        "if TYPE_CHECKING:\n    from megatron_sr1.data.read import x\n",
    ),
    ("files_make_no_circle", "megatron_sr1/rollout/vllm/engine.py", "from megatron_sr1.rollout import x\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "import torch\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "import torch.nn.functional as F\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "from torch import Tensor\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "import torch.distributed\nx = torch.ones(3)\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "def f(x: Tensor) -> float: ...\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "def f(x: 'list[Tensor]') -> float: ...\n"),
    ("loops_hold_no_tensor_arithmetic", "megatron_sr1/loops/a.py", "x = rewards.mean().item()\n"),
    ("groups_are_passed", "megatron_sr1/training/a.py", "x = parallel_state.get_data_parallel_rank()\n"),
    ("device_words_have_their_rooms", "megatron_sr1/loops/a.py", "x = torch.cuda.synchronize()\n"),
    ("device_words_have_their_rooms", "megatron_sr1/policy/a.py", "x = y.is_cuda\n"),
    ("device_words_have_their_rooms", "megatron_sr1/policy/a.py", "x = 'cuda:0'\n"),
    ("device_words_have_their_rooms", "megatron_sr1/rollout/a.py", "init(backend='cpu:gloo,cuda:nccl')\n"),
    ("errors_are_named", "megatron_sr1/data/a.py", "try:\n    x = 1\nexcept:\n    pass\n"),
    ("errors_are_named", "megatron_sr1/data/a.py", "try:\n    x = 1\nexcept Exception as e:\n    raise\n"),
    ("errors_are_named", "tools/a.py", "try:\n    x = 1\nexcept (OSError, BaseException):\n    pass\n"),
    ("files_are_short", "megatron_sr1/data/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    ("functions_are_short", "megatron_sr1/data/a.py", LONG),
    ("no_utils", "megatron_sr1/data/utils.py", DOC),
    ("public_functions_are_typed", "megatron_sr1/data/a.py", "def f(x) -> None:\n    '''Doc.'''\n"),
    ("public_functions_are_typed", "megatron_sr1/data/a.py", "def f(*x: int, **y) -> None:\n    '''Doc.'''\n"),
    ("public_functions_are_typed", "megatron_sr1/data/a.py", "def f(x: int):\n    '''Doc.'''\n"),
    (
        "public_functions_are_typed",
        "tools/a.py",
        "class A:\n    '''Doc.'''\n    def f(self, x) -> int:\n        return x\n",
    ),
    (
        "public_functions_are_typed",
        "tools/a.py",
        "class A:\n    '''Doc.'''\n    def __init__(self, x) -> None:\n        pass\n",
    ),
    ("public_names_are_documented", "megatron_sr1/data/a.py", "def f(x: int) -> int:\n    return x\n"),
    ("public_names_are_documented", "megatron_sr1/data/a.py", "class A:\n    x = 1\n"),
    ("nothing_is_unfinished", "megatron_sr1/data/a.py", "x = 1  # TO" + "DO later\n"),
    ("nothing_is_unfinished", "megatron_sr1/data/a.py", "raise NotImplemented" + "Error\n"),
]
CLEAN = {
    "megatron_sr1/__init__.py": DOC,
    "megatron_sr1/config.py": DOC,
    "megatron_sr1/data/read.py": DOC + "from megatron_sr1.config import x\nfrom . import write\nfrom .write import y\n",
    "megatron_sr1/data/write.py": "'''Works without cuda.'''\nbarracuda = build(use_gloo_groups=1)  # not nccl\n",
    "megatron_sr1/platform/device.py": "x = 'cuda'\nimport megatron.core\n",
    "megatron_sr1/policy/groups.py": "from megatron_sr1.platform import device\nx = parallel_state.get_a()\n",
    "megatron_sr1/platform/torch_private.py": "from torch.serialization import _get_layout\nx = y._z\n",
    "megatron_sr1/policy/own.py": "class _A:\n    def f(self):\n        self._x = _A._y\nos._exit(0)\nx.__len__\n",
    "megatron_sr1/rollout/__init__.py": "from megatron_sr1.rollout.vllm.engine import x\n",
    "megatron_sr1/rollout/vllm/engine.py": "import vllm\nfrom megatron_sr1.prompts import x\n",
    "megatron_sr1/prompts/own.py": "try:\n    x = 1\nexcept (OSError, ValueError):\n    x = 2\n",
    "megatron_sr1/loops/grpo.py": "from megatron_sr1.policy import model\nfrom megatron_sr1.objective import losses\n",
    "megatron_sr1/loops/run.py": "'''No Tensor.'''\nimport torch.distributed\ntorch.distributed.barrier()\n",
    "megatron_sr1/objective/losses.py": "class A:\n    '''Doc.'''\n    def f(self, x: int) -> int:\n        return x\n",
    "megatron_sr1/cli/command.py": "if TYPE_CHECKING:\n    from megatron_sr1.loops import grpo\n",
    "megatron_sr1/cli/main.py": "def main() -> None:\n    from megatron_sr1.loops import grpo\n",
    "tools/build.py": "from megatron_sr1.loops import grpo\ndef _f(x):\n    def inner(y): ...\n",
}


def plant(root: Path, files: dict[str, str]) -> list[Module]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_modules(root)


def test_clean_tree_breaks_no_rule(tmp_path: Path) -> None:
    modules = plant(tmp_path, CLEAN)
    assert len(modules) == len(CLEAN)
    assert {name: found for name, rule in RULES.items() if (found := rule(modules))} == {}


@pytest.mark.parametrize(("name", "path", "source"), VIOLATIONS)
def test_rule_can_fail(name: str, path: str, source: str, tmp_path: Path) -> None:
    found = RULES[name](plant(tmp_path, {**CLEAN, path: source}))
    assert found and all(line.startswith(path) for line in found)


def test_second_file_with_global_groups_is_found(tmp_path: Path) -> None:
    extra = {"megatron_sr1/policy/other.py": "x = parallel_state.get_b()\n"}
    assert RULES["groups_are_passed"](plant(tmp_path, {**CLEAN, **extra}))


def test_every_rule_has_a_violation() -> None:
    assert {name for name, _, _ in VIOLATIONS} == set(RULES)
