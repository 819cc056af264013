"""One prompt of one pass, checked against the engine's limits before anything is submitted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sr1.processor import Processor
from megatron_sr1.prompts import SHIPPED, Template, Templates
from megatron_sr1.rollout.later import OpenReading, ask_later, check_metadata, metadata_context
from megatron_sr1.types import LaterPass, Passes, PassName, Prompt, TemplateName

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PassPrompt:
    """What one pass is asked, in ids."""

    key: str
    pass_name: PassName  # of a later pass' further samples with their number, see `LaterPass.name_of`
    ids: tuple[int, ...]  # one placeholder per image: what the engine is given
    expanded_ids: tuple[int, ...]  # one placeholder per visual token: what the engine must report back
    images: tuple[Image, ...]


def plan_first(processor: Processor, prompt: Prompt, template: Template) -> PassPrompt:
    """The first pass: question and images, or a description in their place.

    Raises:
        ValueError: `template` is not one of a first pass; the model's chat template does not suit it.
    """
    if template.reads_description and prompt.given is None:
        raise ValueError(
            f"sampling.template={template.name!r} is not a first-pass template: no description is there to be read. "
            "Those without {description} are, such as see_think, cot."
        )
    turn = template.render(prompt.problem, len(prompt.images), prompt.given)
    ids = processor.turn_ids(turn, num_images=len(prompt.images))
    grids = [processor.grid(image.size) for image in prompt.images]
    return PassPrompt(prompt.key, "first", ids, processor.expand(ids, grids), prompt.images)


def plan_later(processor: Processor, prompt: Prompt, template: Template, asked: OpenReading) -> PassPrompt:
    """A later pass: a question, and the text of its context where it has one; no image."""
    ids = processor.turn_ids(template.render(asked.problem(prompt), 0, asked.context), num_images=0)
    return PassPrompt(prompt.key, asked.later.name_of(asked.number), ids, ids, ())


def cut_description(processor: Processor, description: str, max_tokens: int) -> str:
    """At most `max_tokens` tokens of it; a character whose bytes the cut separates is dropped."""
    ids = processor.text_ids(description)
    return description if len(ids) <= max_tokens else processor.decode(ids[:max_tokens]).rstrip("\ufffd")


@dataclass(frozen=True)
class Limits:
    """What an engine can take, in tokens."""

    max_response: int
    max_model: int  # prompt + response
    max_description: int  # a longer description is cut before the second pass


class Planner:
    """Plans the passes of prompts, and knows what does not fit the engine.

    A first pass is planned once, whoever asks first: the check of the data, or the generator. The plan lives as long as
    its prompt.
    """

    def __init__(self, processor: Processor, limits: Limits, templates: Templates = SHIPPED) -> None:
        self.processor = processor
        self.limits = limits
        self._templates = templates
        self._firsts: dict[tuple[int, TemplateName], PassPrompt] = {}  # by the identity of the prompt

    def template(self, name: TemplateName) -> Template:
        """Of that name."""
        return self._templates.find(name, "sampling.template")

    def check(self, passes: Passes) -> None:
        """Whether the model's chat template suits what is asked, before any sample is looked at.

        Raises:
            ValueError: it does not, see `Processor.turn_ids`.
        """
        names = (passes.template, passes.plain_template, *(passes.template_of(later) for later in passes.later))
        for template in map(self.template, names):
            description = "" if template.reads_description else None
            num_images = 0 if template.reads_description or template.name == passes.plain_template else 1
            self.processor.turn_ids(template.render("?", num_images, description), num_images)

    def first(self, prompt: Prompt, template: TemplateName) -> PassPrompt:
        """The first pass. Raises as `plan_first`."""
        place = (id(prompt), template)
        if place not in self._firsts:
            self._firsts[place] = plan_first(self.processor, prompt, self.template(template))
            weakref.finalize(prompt, self._firsts.pop, place, None).atexit = False
        return self._firsts[place]

    def later(self, prompt: Prompt, passes: Passes, asked: OpenReading) -> PassPrompt:
        """A later pass, whose context is a text that `cut` has returned.

        Raises:
            ValueError: it does not fit the engine: a text that was cut became longer again as part of a prompt.
        """
        plan = self._later(prompt, passes, asked)
        text = refusal(plan, self.limits)
        if text is not None:
            raise ValueError(text)
        return plan

    def cut(self, description: str) -> str:
        """The description, or as much of it as a later pass may hold."""
        return cut_description(self.processor, description, self.limits.max_description)

    def question(self, prompt: Prompt, passes: Passes, asked: OpenReading) -> str:
        """The same for a reader behind an endpoint."""
        template = self.template(passes.template_of(asked.later))
        return template.as_question(asked.problem(prompt), asked.context)

    def given(self, prompt: Prompt, later: LaterPass) -> str | None:
        """The context of a pass that reads no response.

        Raises:
            ValueError: see `metadata_context`; it is longer than a description may be.
        """
        if later.context != "metadata":
            return None
        text = metadata_context(prompt, later)
        if self.cut(text) != text:
            raise ValueError(
                f"sample {prompt.key!r}: the metadata's {later.field!r}, which the pass {later.name!r} reads, is "
                f"longer than rollout.max_description_tokens={self.limits.max_description}. Raise that, or shorten it."
            )
        return text

    def refusals(self, prompt: Prompt, passes: Passes) -> list[str]:
        """Why the engine cannot take a prompt, for each pass that does not fit; of a pass that reads a description all
        but that is known, which is counted in full.

        Raises:
            ValueError: the sample lacks what a later pass reads or asks.
        """
        check_metadata(prompt, passes.later)
        texts = [refusal(self.first(prompt, passes.template), self.limits)]
        for one in passes.later:
            reads = one.context in ("description", "other_description")
            for asked in ask_later(one, prompt, "" if reads else self.given(prompt, one)):
                shortest = self._later(prompt, passes, asked)
                texts.append(refusal(shortest, self.limits, reserved=self.limits.max_description if reads else 0))
        return list(dict.fromkeys(text for text in texts if text is not None))

    def _later(self, prompt: Prompt, passes: Passes, asked: OpenReading) -> PassPrompt:
        return plan_later(self.processor, prompt, self.template(passes.template_of(asked.later)), asked)


def refusal(plan: PassPrompt, limits: Limits, reserved: int = 0) -> str | None:
    """Why the engine cannot take a pass, or None. `reserved`: tokens that are still to join the prompt."""
    length = len(plan.expanded_ids) + reserved
    if length + limits.max_response <= limits.max_model:
        return None
    return (
        f"sample {plan.key!r}, {plan.pass_name} pass: its prompt of {length} tokens and a response of up to "
        f"{limits.max_response} exceed the engine's limit of {limits.max_model} tokens. Raise "
        "rollout.max_model_tokens to at least their sum, lower rollout.max_response_tokens or "
        "rollout.max_description_tokens, or drop the sample."
    )


def check_same_ids(plan: PassPrompt, engine_ids: Sequence[int]) -> None:
    """The trainer scores `expanded_ids`; the engine must have used the same.

    Raises:
        ValueError: naming the sample, both lengths and the first position where they differ.
    """
    text = id_difference(plan, engine_ids)
    if text is not None:
        raise ValueError(text)


def id_difference(plan: PassPrompt, engine_ids: Sequence[int]) -> str | None:
    """How the ids that an engine makes of a prompt differ from the processor's; None where they do not."""
    if tuple(engine_ids) == plan.expanded_ids:
        return None
    pairs = zip(plan.expanded_ids, engine_ids, strict=False)
    shorter = min(len(plan.expanded_ids), len(engine_ids))
    position = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
    return (
        f"sample {plan.key!r}, {plan.pass_name} pass: the processor makes {len(plan.expanded_ids)} prompt ids, "
        f"the engine used {len(engine_ids)}; they differ first at position {position}. "
        "Processor and engine must have the same pixel limits and merge size: model.min_pixels and model.max_pixels, "
        "and for what these do not say the same preprocessor_config.json."
    )
