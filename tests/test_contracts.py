"""The reading that `make contracts` asks with, on libraries that are here and on made-up sources. What the libraries
for GPUs answer is in docs/contracts.txt."""

from __future__ import annotations

import ast
import datetime
import inspect
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from tests.contracts import __main__ as contracts
from tests.contracts import te_source
from tests.contracts.library_calls import check_calls, library_calls, misfit, narrower
from tests.source_tree import REPOSITORY, Module, read_modules


def module_of(text: str) -> Module:
    return Module(Path("a.py"), ("megatron_sr1", "a"), text, ast.parse(text))


@pytest.mark.parametrize(
    "source",
    [
        "from json import dumps\ndumps({}, indent=1)",
        "import json\njson.dumps({}, sort_keys=True)",
        "import json as j\nj.dumps({})",
        "import json.decoder\njson.decoder.JSONDecoder(strict=True)",
        "from json import dumps as d\nd(*things, **options)",
    ],
)
def test_a_call_that_fits_is_compared(source: str) -> None:
    assert check_calls([module_of(source)], "json") == (1, [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("from json import dumps\ndumps({}, 1)", "too many positional"),
        ("from json import dumps\ndumps()", "missing a required argument"),
        ("import json\njson.detect_encoding(b'1', nothing=2)", "unexpected keyword argument 'nothing'"),
        ("import json\njson.moved('1')", "no attribute 'moved'"),
        ("def f():\n    from json import dumps as d\n    d(*things, colour=1, **{})", None),
        ("from json import JSONDecoder\nJSONDecoder(stric=True)", "unexpected keyword argument 'stric'"),
    ],
)
def test_a_call_that_does_not_fit_is_named(source: str, words: str | None) -> None:
    _, wrong = check_calls([module_of(source)], "json")
    if words is None:  # dumps takes **kw
        assert not wrong
    else:
        assert len(wrong) == 1 and wrong[0].startswith("megatron_sr1/a.py:2: json.") and words in wrong[0]


def test_the_calls_that_matter_are_read_from_the_package() -> None:
    modules = [module for module in read_modules(REPOSITORY) if module.in_package]
    names = {
        call.name.rpartition(".")[2] for library in ("megatron", "vllm") for call in library_calls(modules, library)
    }
    assert names >= {"EngineArgs", "SamplingParams", "TransformerConfig", "DistributedDataParallelConfig"}
    assert names >= {
        "OptimizerConfig",
        "DistributedDataParallel",
        "get_megatron_optimizer",
        "initialize_model_parallel",
    }


def test_an_override_that_takes_less_is_named() -> None:
    def theirs(self: object, a: int, b: int = 0, *, c: int = 0) -> None: ...

    def same(self: object, a: int, b: int = 0, *, c: int = 0, more: int = 1) -> None: ...

    def renamed(self: object, x: int, b: int = 0, *, c: int = 0) -> None: ...

    def shorter(self: object, a: int, *, c: int = 0) -> None: ...

    def anything(self: object, *arguments: int, **options: int) -> None: ...

    expected = inspect.signature(theirs)
    assert narrower(inspect.signature(same), expected) is None is narrower(inspect.signature(anything), expected)
    assert narrower(inspect.signature(renamed), expected) and narrower(inspect.signature(shorter), expected)


def test_transformer_engine_is_read_through_its_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    (package / "module").mkdir(parents=True)
    (package.parent / "__init__.py").write_text("from . import pytorch\n")
    (package / "__init__.py").write_text("from .module import *\nfrom .autocasting import autocast as fp8_autocast\n")
    (package / "module" / "__init__.py").write_text("from .linear import Linear\n")
    (package / "module" / "linear.py").write_text(
        "class Base:\n    def __init__(self, a, b=1, *, c): ...\nclass Linear(Base): ...\n"
    )
    (package / "autocasting.py").write_text("@x\ndef autocast(enabled=True): ...\ndef ask():\n    return card() >= 9\n")
    monkeypatch.setattr(te_source, "FOLDER", tmp_path)
    te_source.read_module.cache_clear()
    try:
        assert list(te_source.signature("transformer_engine.pytorch.Linear").parameters) == ["a", "b", "c"]
        assert "enabled" in te_source.signature("transformer_engine.pytorch.fp8_autocast").parameters
        assert (
            te_source.find("transformer_engine.pytorch.Moved") is None is te_source.find("transformer_engine.pytorch")
        )
        with pytest.raises(AttributeError):
            te_source.signature("transformer_engine.pytorch.Moved")
        (call,) = library_calls(
            [module_of("from transformer_engine import pytorch as te\nte.Linear(1, c=3, d=2)")], "transformer_engine"
        )
        assert "'d'" in str(misfit(call.node, te_source.signature(call.name)))
        assert te_source.run("transformer_engine.pytorch.autocasting.ask", card=lambda: 10)
        assert not te_source.run("transformer_engine.pytorch.autocasting.ask", card=lambda: 8)
    finally:
        te_source.read_module.cache_clear()


# ---------------------------------------------------------------- the report
RESULTS = f"""<testsuites><testsuite>
<testcase classname="tests.contracts.check_a" name="test_it_holds"/>
<testcase classname="tests.contracts.check_a" name="test_cases[x]"/>
<testcase classname="tests.contracts.check_a" name="test_cases[{REPOSITORY}/y]"><failure>t</failure></testcase>
<testcase classname="tests.contracts.check_a" name="test_set_up"><error>t</error></testcase>
<testcase classname="tests.contracts.check_a" name="test_left"><skipped message="m"/></testcase>
</testsuite></testsuites>"""


def test_the_report_has_a_line_for_each_contract_and_no_place_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "PACKAGES", ("torch",))
    monkeypatch.setattr(contracts, "te_version", lambda: "9.9")
    found = contracts.contracts(xml.fromstring(RESULTS))
    text = "\n".join(contracts.report({"a group": found}, datetime.date(2026, 1, 2)))
    assert "2026-01-02, Python" in text and "transformer-engine 9.9" in text
    assert "\nok      check_a: it holds\n" in text and "\nskipped check_a: left\n" in text
    assert "\nBROKEN  check_a: cases (2 cases): y\n" in text and "\nBROKEN  check_a: set up\n" in text
    assert text.endswith("4 contracts of 5 cases, 2 broken") and str(REPOSITORY) not in text


def test_every_file_of_contracts_is_asked_and_none_is_collected_here() -> None:
    own = {f"tests/contracts/{path.name}" for path in (REPOSITORY / "tests" / "contracts").glob("check_*.py")}
    asked = [file for files in contracts.GROUPS.values() for file in files]
    assert own <= set(asked) and len(set(asked)) == len(asked)
    assert all((REPOSITORY / file).is_file() for file in asked)
    assert not list((REPOSITORY / "tests" / "contracts").glob("test_*.py"))


def test_the_kept_output_is_of_the_pinned_versions_and_nothing_in_it_is_broken() -> None:
    text = (REPOSITORY / "docs" / "contracts.txt").read_text()
    pins = dict(
        line.split()[0].split("==")
        for line in (REPOSITORY / "constraints-gpu.txt").read_text().splitlines()
        if "==" in line
    )
    for name in (*contracts.PACKAGES, "transformer-engine"):
        assert f"{name} {pins[name]}" in text, "run make contracts: constraints-gpu.txt has changed"
    assert "BROKEN" not in text and text.rstrip().endswith(", 0 broken")
    assert not re.search(r"(^|\s)/\w", text), "a place on the machine that wrote it"
