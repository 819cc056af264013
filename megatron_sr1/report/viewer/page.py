"""The page around the viewer: what is loaded with it, and a policy under which nothing but its own script runs.

Small data are in the page itself, which is then one file; more are in a folder beside it. In both, model text is JSON
that the script makes text nodes of.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from megatron_sr1.report.viewer.chunks import told_filters
from megatron_sr1.report.viewer.names import MEASURES, PASSES, SEGMENTS
from megatron_sr1.report.viewer.script_json import script_json

KEYS = (  # (key, what it does)
    ("j k", "next, previous sample; also ↓ ↑"),
    ("n p", "next, previous prompt; also → ←"),
    ("[ ]", "previous, next step or evaluation"),
    ("1 … 9", "the filters, in their order"),
    ("c", "other colours of the tokens"),
    ("/", "search in prompts, answers and keys"),
    ("t", "light, dark, or as the system"),
    ("o", "between overview and rollouts"),
    ("?", "these keys; Esc closes"),
)


def viewer_page(
    title: str,
    sections: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
    folder: str,
    stamp: str,
    blocks: Iterable[tuple[str, str]] = (),
) -> Iterable[str]:
    """The document, in parts.

    Args:
        sections: of the overview.
        runs: as `write_run` returned them.
        folder: beside the page; "": the data are in it.
        stamp: in the names of its chunks.
        blocks: of data that are in the page: name and JSON, safe in a script.
    """
    style = _asset("style.css", "megatron_sr1.report") + _asset("viewer.css")
    script = viewer_script()
    index = {"runs": list(runs), "folder": folder, "stamp": stamp, "filters": told_filters()}
    index |= {"measures": dict(MEASURES), "segments": dict(SEGMENTS), "passes": dict(PASSES)}
    policy = (
        f"default-src 'none'; script-src {_digest(script)} 'self'; style-src {_digest(style)}; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'"
    )
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>Megatron-SR1 report: {escape(title)}</title><style>{style}</style></head><body>{_top(title, runs)}"
        f'<main id="overview"><header><p>Megatron-SR1 report</p><h1>{escape(title)}</h1></header>{"".join(sections)}'
        f"</main>{_viewer()}{_help()}"
    )
    yield f'<script type="application/json" data-chunk="index">{script_json(index)}</script>'
    for name, text in blocks:
        yield f'<script type="application/json" data-chunk="{escape(name)}">{text}</script>'
    yield f"<script>{script}</script></body></html>\n"


def viewer_script() -> str:
    """All files of script/, in the order of their numbers, as one."""
    found = sorted(
        (file.name, file.read_text(encoding="utf-8"))
        for file in files("megatron_sr1.report.viewer").joinpath("script").iterdir()
        if file.name.endswith(".js")
    )
    return '(() => {\n"use strict";\n' + "".join(text for _, text in found) + "})();\n"


def _asset(name: str, package: str = "megatron_sr1.report.viewer") -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _top(title: str, runs: Sequence[Mapping[str, Any]]) -> str:
    viewer = '<a id="to-viewer" href="#">Rollouts</a>' if runs else ""
    return (
        f'<nav class="top"><b>{escape(title)}</b><a id="to-overview" href="#overview" aria-current="page">Overview</a>'
        f'{viewer}<span class="space"></span><button id="theme" title="light, dark, or as the system (key t)"></button>'
        f"{'<button id=help-button title=keys>?</button>' if runs else ''}</nav>"
    )


def _viewer() -> str:
    return (
        '<div id="viewer" hidden><div id="bar">'
        '<label>run <select id="run"></select></label><label>step <select id="step"></select></label>'
        '<label>sort by <select id="sort"></select></label><button id="order">↑</button>'
        '<label>colour tokens by <select id="colour"></select></label>'
        '<input id="search" type="search" placeholder="search" aria-label="search in prompts, answers and keys">'
        '<details id="unknown" hidden><summary>what is not known here</summary><ul id="unknown-list"></ul></details>'
        '<div id="filters" role="group" aria-label="filters"></div><div id="notes"></div></div>'
        '<div id="side"><p id="count" aria-live="polite"></p><div id="list" role="listbox" tabindex="0" '
        'aria-label="samples"><div id="height"></div></div></div><div id="detail" tabindex="-1"></div></div>'
    )


def _help() -> str:
    rows = "".join(f"<dt><kbd>{escape(key)}</kbd></dt><dd>{escape(what)}</dd>" for key, what in KEYS)
    return f'<div id="help" hidden><div><h2>Keys</h2><dl>{rows}</dl></div></div>'
