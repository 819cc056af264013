"""The contrasts of an objective, and what a stream makes of one (`objective.contrast`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sr1.prompts import metadata_text
from megatron_sr1.types import ContrastContext, ContrastWeights, Prompt, RewardStream

_OF_CONTRAST = (
    *("token_weighting", "token_share", "token_threshold", "sequence_weight_low", "sequence_weight_for"),
    *("contrast_coef", "contrast_divergence", "contrast_entropy_coef", "contrast_reward", "contrast_entropy_reward"),
)


@dataclass(frozen=True)
class Contrast:
    """Another context that the first passes of prompts with images are scored under, token for token as they are.

    context:  no_image     the prompt without its images
              masked       `share` of the images' patches are black (PAPO, arXiv 2507.06448, section 3.2)
              noise        every pixel is drawn anew
              description  the block that this response describes with, in the place of the images (CapPO, 2509.21854)
              metadata     the sample's `metadata[field]`, a text, in the place of the images
    weights:  policy       those that are trained
              reference    those that the run began with
    """

    name: str
    context: ContrastContext = "no_image"
    share: float = 0.6  # of patches, where they are masked
    field: str = ""  # of the metadata, where the context is there
    weights: ContrastWeights = "policy"

    def text_of(self, prompt: Prompt) -> str:
        """The metadata's, for a prompt with images.

        Raises:
            ValueError: the sample has no such text.
        """
        return metadata_text(prompt, self.field, f"the contrast {self.name!r}", "take it out of objective.contrast")


def contrasts_of(entries: Sequence[Mapping[str, Any]]) -> tuple[Contrast, ...]:
    """In the order that they were written.

    Args:
        entries: of `objective.contrast`, checked by `config.contrast`.
    """
    return tuple(Contrast(**entry) for entry in entries)


def contrast_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of `objective.streams` says of its contrast, as fields of `RewardStream`.

    Raises:
        ValueError: a share or threshold of tokens without its weighting; whom weights are for without any; which
            divergence without its coefficient; keys of a contrast without its name, or its name without any.
    """
    where, weighting = f"objective.streams: {entry['name']!r}", entry.get("token_weighting", "none")
    for key, kind in (("token_share", "top"), ("token_threshold", "gated")):
        if key in entry and not weighting.startswith(kind):
            raise ValueError(
                f"{where} has {key}={entry[key]}, which belongs to token_weighting={kind}, and its "
                f"token_weighting is {weighting}. Leave it out, or set token_weighting={kind}."
            )
    if "sequence_weight_for" in entry and "sequence_weight_low" not in entry:  # null takes a preset's weights away
        raise ValueError(
            f"{where} has sequence_weight_for={entry['sequence_weight_for']}, and no sequence_weight_low, without "
            "which all responses weigh the same. Leave it out, or set sequence_weight_low=0.9."
        )
    if "contrast_divergence" in entry and "contrast_coef" not in entry:
        raise ValueError(
            f"{where} has contrast_divergence={entry['contrast_divergence']}, and no contrast_coef, without which no "
            "divergence is trained. Leave it out, or set contrast_coef=0.01."
        )
    found = {key: entry[key] for key in _OF_CONTRAST if key in entry}
    if found and "contrast" not in entry:
        raise ValueError(
            f"{where} has {', '.join(found)}, and names no contrast that it is of. Add contrast: <a name of "
            "objective.contrast>."
        )
    if "contrast" in entry and not found:
        raise ValueError(
            f"{where} has contrast={entry['contrast']!r} and makes nothing of it. Add one of "
            f"{', '.join(_OF_CONTRAST)}; what objective.contrast has is measured without it."
        )
    return found | ({"contrast": entry["contrast"]} if "contrast" in entry else {})


def check_contrast(stream: RewardStream, contrasts: Sequence[Contrast], where: str) -> None:
    """
    Args:
        where: the stream is, for messages.

    Raises:
        ValueError: the stream names a contrast that there is not, is of a pass that sees no image, adds to a sum of
            rewards that there is not, or would train weights that are frozen.
    """
    if not stream.contrast:
        return
    named = {contrast.name: contrast for contrast in contrasts}
    if stream.contrast not in named:
        known = ", ".join(named) or "none"
        raise ValueError(
            f"{where}: contrast={stream.contrast!r} is not among objective.contrast, which has {known}. Add it there: "
            f"{{name: {stream.contrast}, context: no_image}}."
        )
    if stream.trajectory != "first":
        raise ValueError(
            f"{where}: contrast={stream.contrast!r} takes the image away, and the {stream.trajectory} pass sees none. "
            "Give it to a stream of the first pass."
        )
    if stream.earns_by_contrast and stream.normalize == "per_component":
        key = "contrast_reward" if stream.contrast_reward != 0 else "contrast_entropy_reward"
        raise ValueError(
            f"{where}: {key} adds to one sum of rewards, and normalize=per_component makes an advantage of "
            f"each reward by itself. Set normalize=sum, or leave {key} out."
        )
    if stream.trains_contrast and named[stream.contrast].weights == "reference":
        raise ValueError(
            f"{where}: contrast_coef and contrast_entropy_coef train the policy under the contrast "
            f"{stream.contrast!r}, and its weights are the reference's. Set weights: policy there."
        )
