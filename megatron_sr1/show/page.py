"""Samples as one HTML file without anything from outside. What data hold is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from megatron_sr1.show.read import Found
from megatron_sr1.show.seen import Picture, Seen
from megatron_sr1.show.text import MAX_LISTED, bars, facts, histograms, summary, visible

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.7rem;border:1px solid #8886;border-radius:6px}"
    "img{max-width:100%;image-rendering:pixelated;border:1px solid #8886}figure{display:inline-block;margin:0 1rem 0 0}"
    "figcaption,.note{color:#777}article{border-top:1px solid #8886;margin-top:2rem}"
    "td{padding:0 .6rem;text-align:right}td:last-child{text-align:left}"
    ".bar{display:inline-block;height:.8em;background:#2563eb}"
)


def page_of(title: str, found: Found) -> str:
    """The whole document.

    Args:
        title: what was looked at.
    """
    bad = "".join(f"<li>{_text(reason)}</li>" for reason in found.bad[:MAX_LISTED])
    sections = [
        *(_histogram(name, values) for name, values in histograms(found)),
        *(_sample(seen) for seen in found.seen),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(title)}</h1><p>{escape(summary(found))}</p><ul>{bad}</ul>{''.join(sections)}</body></html>\n"
    )


def _text(text: str) -> str:
    return escape(visible(text))


def _histogram(title: str, values: Sequence[int]) -> str:
    rows = "".join(
        f'<tr><td>{label}</td><td>{count}</td><td><span class="bar" style="width:{bar / 4:g}rem"></span></td></tr>'
        for label, count, bar in bars(values)
    )
    return f"<section><h2>{escape(title)}</h2><table>{rows}</table></section>"


def _sample(seen: Seen) -> str:
    pictures = "".join(_figure(number, picture) for number, picture in enumerate(seen.pictures, 1))
    response = f"<h3>response</h3><pre>{_text(seen.response)}</pre>" if seen.response is not None else ""
    choices = f"<p>choices: {_text(', '.join(seen.choices))}</p>" if seen.choices else ""
    lines = "".join(f"<br>{escape(line)}" for line in facts(seen))
    return (
        f"<article><h2>{_text(seen.key)}</h2><p class=note>asked by {_text(seen.template)}{lines}</p>"
        f"<div>{pictures}</div><pre>{_text(seen.prompt)}</pre><p>answer: {_text(seen.answer)}</p>{choices}{response}"
        "</article>"
    )


def _figure(number: int, picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.seen.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    what = "as the model sees it" if picture.num_tokens is not None else "as it is stored"
    size = f"{picture.seen.width} x {picture.seen.height}"
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="image {number}">'
        f"<figcaption>image {number}, {what}, {size}</figcaption></figure>"
    )
