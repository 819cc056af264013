"""The templates that a run knows: the shipped ones, and those of the configuration's section `templates`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, get_args

from megatron_sr1.config import Config
from megatron_sr1.config.rules import ConfigError, require
from megatron_sr1.prompts.answers import AnswerFormat, AnswerKind
from megatron_sr1.prompts.own import CAPTION_REASONER, COT, SEE_THINK, THINKING, THINKING_COT, THINKING_REASONER
from megatron_sr1.prompts.published import VISION_SR1, VISION_SR1_COT, VISION_SR1_REASONER
from megatron_sr1.prompts.template import Template
from megatron_sr1.types import Prompt, SftSample, TemplateName

_SHIPPED = (
    *(SEE_THINK, COT, CAPTION_REASONER),
    *(VISION_SR1, VISION_SR1_COT, VISION_SR1_REASONER),
    *(THINKING, THINKING_COT, THINKING_REASONER),
)


@dataclass(frozen=True)
class Asked:
    """The templates of the passes of a prompt."""

    first: Template
    second: Template
    plain: Template  # in place of the first, where a prompt has no images

    def of(self, prompt: Prompt) -> Asked:
        """Those of one prompt: `first` is what it is asked by."""
        return self if prompt.images else replace(self, first=self.plain)

    def __str__(self) -> str:
        """Names and digests, for what is made by them."""
        return ", ".join(f"{template.name} {template.digest}" for template in (self.first, self.second, self.plain))


@dataclass(frozen=True)
class Templates:
    """Templates by name."""

    by_name: Mapping[TemplateName, Template]

    def find(self, name: TemplateName, key: str) -> Template:
        """The template that `key`, of the configuration or of a sample, names.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.by_name:
            near = difflib.get_close_matches(str(name), self.by_name, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.by_name)
            raise ConfigError(f"{key}={name!r} is no template.{meant} Known are {known}; templates: adds others.")
        return self.by_name[name]

    def asked(self, first: TemplateName, second: TemplateName, plain: TemplateName) -> Asked:
        """The templates of the passes.

        Raises:
            ConfigError: there is none of a name, or it cannot have that role.
        """
        asked = Asked(
            self.find(first, "objective.template"),
            self.find(second, "objective.second_template"),
            self.find(plain, "objective.plain_template"),
        )
        shown = ", ".join(name for name, template in self.by_name.items() if not template.reads_description)
        read = ", ".join(name for name, template in self.by_name.items() if template.reads_description)
        for key, template in (("objective.template", asked.first), ("objective.plain_template", asked.plain)):
            allowed = f"a template without {{description}}, one of {shown}"
            require(not template.reads_description, key, template.name, allowed, "No description is there to be read.")
        require(
            asked.plain.describes is None,
            "objective.plain_template",
            asked.plain.name,
            "a template that asks for no description: its prompts have no images",
            "Set it to cot, or set describes: null in the template.",
        )
        require(
            asked.second.reads_description,
            "objective.second_template",
            asked.second.name,
            f"a template with {{description}}, one of {read}",
            "The second pass is given the description in place of the images.",
        )
        return asked

    def of_demonstration(self, sample: SftSample) -> Template:
        """The template that a demonstration names.

        Raises:
            ValueError: it is unknown, or is given a description where it reads none, or none where it reads one; images
                beside a description; a response that repeats what the chat template has opened.
        """
        where = f"sample {sample.prompt.key!r}"
        template = self.find(sample.template, f"{where}: template")
        if template.reads_description != (sample.description is not None):
            found = "lacks" if template.reads_description else "has"
            raise ValueError(
                f"{where}: template={sample.template!r} {found} a description. It belongs exactly to templates with "
                "{description}, whose prompt holds it instead of the image."
            )
        if sample.description is not None and sample.prompt.images:
            raise ValueError(
                f"{where}: a {sample.template} demonstration has {len(sample.prompt.images)} images; it must have "
                "none. Remove them."
            )
        if template.opens and template.opens in sample.response:
            raise ValueError(
                f"{where}: its response has {template.opens}, which the chat template has written already. Take it out "
                "of the response."
            )
        return template


SHIPPED = Templates(MappingProxyType({template.name: template for template in _SHIPPED}))
OURS = Asked(SEE_THINK, CAPTION_REASONER, COT)
OURS_THINKING = Asked(THINKING, THINKING_REASONER, THINKING_COT)  # where the chat template opens their block


def templates_of(config: Config) -> Templates:
    """The shipped templates and the run's own.

    Raises:
        ConfigError: one has the name of a shipped one, extends none that there is or itself, lacks its prompt, or is
            refused by `Template`.
    """
    written = config.templates
    for name in written:
        allowed = f"another name than the shipped {', '.join(SHIPPED.by_name)}"
        require(name not in SHIPPED.by_name, "templates", name, allowed, f"Write {{extends: {name}, ...}}.")
    made = dict(SHIPPED.by_name)
    for name in written:
        _make(str(name), written, made, ())
    return Templates(MappingProxyType(made))


def _make(
    name: str, written: Mapping[str, Mapping[str, Any]], made: dict[TemplateName, Template], readers: tuple[str, ...]
) -> Template:
    """The template of that name, with what it extends; `readers` are those that led to it."""
    if name in made:
        return made[name]
    keys = dict(written[name])
    parent = keys.pop("extends", None)
    fields: dict[str, Any] = {}
    if parent is not None:
        where = f"templates.{name}.extends"
        if parent in (*readers, name):
            raise ConfigError(f"{where}: {' -> '.join((*readers, name, parent))} is a circle. Break it.")
        if parent not in written:
            Templates(made).find(parent, where)
        fields = dict(_fields(_make(parent, written, made, (*readers, name))))
    require(parent is not None or "prompt" in keys, f"templates.{name}", keys, "keys with a prompt", "Or extends one.")
    described = fields.get("describes")
    fields |= {key: _value(key, value) for key, value in keys.items()}
    if "prompt" in keys:  # the parent's text without images is of its own words
        fields["text_only"] = keys.get("text_only")
    if "tags" in keys:
        tags = fields["tags"]
        kept = described if described in tags else "description" if "description" in tags else None
        if "may_be_blank" not in keys:
            fields["may_be_blank"] = tuple(tag for tag in fields.get("may_be_blank", ()) if tag in tags)
        fields["describes"] = keys.get("describes", kept)
    made[name] = Template(**{**fields, "name": name})
    return made[name]


def _fields(template: Template) -> dict[str, Any]:
    """The fields of a template, as it is made of them."""
    names = ("prompt", "tags", "may_be_blank", "answer", "describes", "text_only", "system", "opens")
    return {name: getattr(template, name) for name in names}


def _value(key: str, value: Any) -> Any:
    if key in ("tags", "may_be_blank"):
        return tuple(value)
    if key == "answer":
        kinds: dict[str, AnswerKind] = {kind: kind for kind in get_args(AnswerKind)}
        kind, name = (value, "") if isinstance(value, str) else next(iter(value.items()))
        return AnswerFormat(kinds[kind], name)
    return ("" if key == "opens" else None) if value is None else value
