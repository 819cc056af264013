"""The values that flow between the rooms, and the protocols at the seams.

Shape legend, used by every tensor file of the project:
    T  tokens of one packed row (padding included)      N  sequences in the row
    R  scored tokens of the row (the loss rows)         S  reward streams
    P  image patches, C values per patch                I  images, V visual tokens (merged patches)
    H  hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from megatron_sr1.encoded_image import EncodedImage as EncodedImage
from megatron_sr1.encoded_image import Normalisation as Normalisation
from megatron_sr1.reward_stream import AdvantageKind as AdvantageKind
from megatron_sr1.reward_stream import AdvantageScope as AdvantageScope
from megatron_sr1.reward_stream import Aggregation as Aggregation
from megatron_sr1.reward_stream import Clip as Clip
from megatron_sr1.reward_stream import ContrastDivergence as ContrastDivergence
from megatron_sr1.reward_stream import KlEstimator as KlEstimator
from megatron_sr1.reward_stream import KlPlace as KlPlace
from megatron_sr1.reward_stream import Normalize as Normalize
from megatron_sr1.reward_stream import PassName as PassName
from megatron_sr1.reward_stream import RatioLevel as RatioLevel
from megatron_sr1.reward_stream import RewardStream as RewardStream
from megatron_sr1.reward_stream import SequenceWeightFor as SequenceWeightFor
from megatron_sr1.reward_stream import Surrogate as Surrogate
from megatron_sr1.reward_stream import TokenWeighting as TokenWeighting
from megatron_sr1.schedule import Schedule as Schedule
from megatron_sr1.schedule import ScheduleShape as ScheduleShape

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from megatron_sr1.ahead import Later

Stage = Literal["first", "second"]  # second: any later pass
Context = Literal["description", "other_description", "metadata", "nothing"]
Reader = Literal["policy", "reference", "endpoint"]
TemplateName = str  # `prompts` has the templates
BANNED_LOGIT_BIAS = -100.0  # the strongest that samplers accept
MAX_ANSWER_CHARACTERS = 512  # that are graded
MAX_ASPECT = 200  # of an image's sides: transformers' `smart_resize` takes no more
# of `streams.methods`
MethodName = Literal["papo", "vppo", "caprl", "visionary_r1", "pgpo", "cappo", "ves_rft", "car", "noisy_rollout"]
WrittenName = Literal[
    "vision_r1", "see_think", "summed", "gdpo", "vision_sr1", "perception_credit", "external_reasoner"
]
PresetName = Literal[WrittenName, MethodName]
CutResponses = Literal["train", "mask"]
OldLogprobs = Literal["trainer", "generator", "none"]
RouterReplay = Literal["none", "trainer", "generator"]
MismatchKind = Literal["none", "truncate", "mask"]
MismatchLevel = Literal["token", "sequence"]
ContrastContext = Literal["no_image", "masked", "noise", "description", "metadata"]
ContrastWeights = Literal["policy", "reference"]


# ---------------------------------------------------------------- data -> rollouts
@dataclass(frozen=True)
class Prompt:
    """One question about zero or more images, as read from a shard."""

    key: str  # unique in its dataset
    problem: str
    answer: str
    images: tuple[Image, ...] = ()  # RGB, decoded
    source: str = ""  # the kind of question; evaluation reports by source
    metadata: Mapping[str, Any] = field(default_factory=dict)  # e.g. {"facts": ["3", "7"]}
    given: str | None = None  # a description that is there already, in place of images

    @property
    def choices(self) -> tuple[str, ...]:
        """The options of a multiple-choice question, in the order of their letters A, B ...; () where it has none.

        The problem names them with their letters, and the answer is one of these letters.
        """
        return tuple(self.metadata.get("choices", ()))


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image that is known by its size, and decoded where its pixels are needed."""

    size: tuple[int, int]  # width, height
    decoded: Later[Image]  # RGB


@dataclass(frozen=True)
class PromptShare:
    """The prompts of a round of rollouts, as the ranks of one engine have them."""

    keys: Sequence[str]  # of all
    own: Mapping[int, Prompt]  # by place among all: those that were read for this rank's engine, in order
    shares: Sequence[Sequence[int]] = ()  # places of each engine's, which others may answer; (): each answers its own
    read: Callable[[int], Prompt | None] | None = None  # another one, decoded here; None: it is passed over

    @classmethod
    def whole(cls, prompts: Sequence[Prompt]) -> PromptShare:
        """All of them are one engine's."""
        return cls([prompt.key for prompt in prompts], dict(enumerate(prompts)))


class DrawnPrompts(Protocol):
    """All prompts that a step has drawn, by their number: their place in the draw."""

    @property
    def keys(self) -> Sequence[str]: ...

    def read(self, number: int) -> Prompt:
        """The prompt, decoded here unless it is this rank's. Any thread may call it.

        Raises:
            ValueError: it cannot be read any more.
        """
        ...

    def images(self, number: int, sizes: Sequence[tuple[int, int]]) -> tuple[Image | ImageRef, ...]:
        """Of the prompt, whose images have these sizes: decoded where they are this rank's."""
        ...


@dataclass(frozen=True)
class SftSample:
    """One demonstration. `description` is set exactly for a template that reads one, such as `caption_reasoner`, whose
    prompt holds the description instead of the image."""

    prompt: Prompt
    template: TemplateName
    response: str
    description: str | None = None


@dataclass(frozen=True)
class Turn:
    """What a prompt says, for a chat template to write: the user's text, with the images in front of `after`."""

    after: str
    before: str = ""  # the text in front of the images
    system: str | None = None  # the system prompt; None: the model's
    opens: str = ""  # the tag that the chat template must write behind it, so that the response begins inside its block
    template: TemplateName = ""  # that it was made by


@dataclass(frozen=True)
class LaterPass:
    """A pass that follows the first, without its image: `samples` answers to the question, from a text or from nothing.

    context:  description        what this response describes
              other_description  what a response to another image's prompt describes
              metadata           the sample's `metadata[field]`
              nothing            the question alone
    reader:   policy             the weights that wrote the first pass; a stream may train what they write
              reference          the weights that the run began with
              endpoint           the model behind rewards.judge
    """

    name: PassName
    context: Context = "description"
    field: str = ""  # of the metadata, where the context is there
    question: str = ""  # field of the metadata with other questions to ask, one for each sample; "": the prompt's own
    samples: int = 1
    reader: Reader = "policy"

    def name_of(self, number: int) -> str:
        """How one of the samples is called in ids and seeds: the name, but for the first with a number."""
        return f"{self.name}.{number}" if number else self.name


SECOND = LaterPass("second")  # the paper's


class Passes(NamedTuple):
    """What a prompt is asked: by which template in its first pass, and which passes follow."""

    template: TemplateName
    later: tuple[LaterPass, ...]
    second_template: TemplateName = "caption_reasoner"  # of those that read a text
    plain_template: TemplateName = "cot"  # of those that read nothing, and of the one pass of a prompt without images

    def of(self, prompt: Prompt) -> Passes:
        """Those of a prompt, where these are of one with images: without an image there is nothing to describe."""
        if prompt.given is not None:
            return self._replace(template=self.second_template, later=())
        return self if prompt.images else self._replace(template=self.plain_template, later=())

    def template_of(self, later: LaterPass) -> TemplateName:
        """That a later pass is asked by."""
        return self.plain_template if later.context == "nothing" else self.second_template


@dataclass(frozen=True)
class Distorted:
    """The last `samples` siblings of a prompt with images are drawn from a noisy copy of these, and trained as the
    others are, on the images themselves (NoisyRollout, arXiv 2504.13055)."""

    samples: int
    strength: float | Schedule  # 0 to 1, see `rollout.distortion`

    def at(self, step: int) -> float:
        """The strength of a step."""
        return self.strength.at(step) if isinstance(self.strength, Schedule) else self.strength


@dataclass(frozen=True)
class Sampling:
    """How a generator draws responses. temperature 0 is greedy."""

    num_samples: int  # K responses per prompt
    temperature: float
    max_response_tokens: int
    seed: int
    template: TemplateName = "see_think"
    later: tuple[LaterPass, ...] = (SECOND,)
    second_template: TemplateName = "caption_reasoner"
    plain_template: TemplateName = "cot"
    reader: Reader = "policy"  # whose weights answer first passes: the policy's, or the reference's
    distorted: Distorted | None = None  # None: every first pass sees the images as they are
    notes_experts: bool = False  # of an engine that says so: which experts a response's tokens were sent to

    def passes_of(self, prompt: Prompt) -> Passes:
        """What a prompt is asked, see `Passes.of`."""
        return Passes(self.template, self.later, self.second_template, self.plain_template).of(prompt)


@dataclass(frozen=True)
class Rollout:
    """One generated response. `prompt_ids` are the ids the engine really used, image placeholders
    expanded: the one canonical track."""

    rollout_id: str  # "<step>/<prompt key>/<draw>/<pass>": draw is the sample; a repeated prompt counts on
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # ends with the end-of-turn id when finish_reason is "stop"
    response_text: str  # special tokens kept, the final end-of-turn token removed
    generator_logprobs: tuple[float, ...]  # one per response id
    finish_reason: Literal["stop", "length"]
    weight_version: int
    # ids [n, M, k] of the experts that the engine sent each of its n tokens but the last to, in the M layers that have
    # some, a byte each (two where there are more than 256); of a first pass the prompt's are with the first sample
    # alone; empty: nobody asked for them
    experts: bytes = field(default=b"", repr=False, kw_only=True)
    queued_at: float = field(default=0.0, compare=False)  # seconds since the step's round of rollouts began
    finished_at: float = field(default=0.0, compare=False)  # the same clock


@dataclass(frozen=True)
class Question:
    """What a later pass is asked in place of its prompt's own question."""

    problem: str
    answer: str
    choices: tuple[str, ...] = ()

    def asked_of(self, prompt: Prompt) -> Prompt:
        """The prompt with this question in the place of its own."""
        metadata = {key: value for key, value in prompt.metadata.items() if key != "choices"}
        choices = {"choices": list(self.choices)} if self.choices else {}
        return replace(prompt, problem=self.problem, answer=self.answer, metadata={**metadata, **choices})


@dataclass(frozen=True)
class Reading:
    """One response of a later pass. Of a model behind an endpoint there is the text alone: no ids, no log-probs."""

    pass_name: PassName
    number: int  # among the samples of its pass
    rollout: Rollout
    context: str | None  # the text it was given in place of the image; None: nothing
    question: Question | None = None  # None: the prompt's own


@dataclass(frozen=True)
class RolloutPair:
    """The passes of one sample. `second` is the pass of that name (its first sample, where it has several), and None
    where there is none, or the first pass has no description or was cut short."""

    sample_index: int
    first: Rollout
    second: Rollout | None
    description: str | None  # what the second pass was given
    description_cut: bool = False  # it was longer than a description may be
    further: tuple[Reading, ...] = ()  # of all other later passes, and the further samples of `second`
    distorted: bool = False  # the first pass was drawn from noisy images, see `Distorted`

    def readings(self, pass_name: PassName) -> tuple[Reading, ...]:
        """The responses of a later pass, in order; () where it could not be asked."""
        own = () if self.second is None else (Reading(SECOND.name, 0, self.second, self.description),)
        return tuple(reading for reading in (*own, *self.further) if reading.pass_name == pass_name)

    def rollouts(self) -> dict[PassName, tuple[Rollout, ...]]:
        """All responses by pass, the first pass first."""
        names = dict.fromkeys(reading.pass_name for reading in self.further)
        second = {SECOND.name: None} if self.second is not None else {}
        later = {name: tuple(reading.rollout for reading in self.readings(name)) for name in {**second, **names}}
        return {"first": (self.first,), **later}


@dataclass(frozen=True)
class RolloutGroup:
    """All K samples of one prompt."""

    group_id: int  # position of the prompt among those that the step has drawn, or is trained on
    prompt: Prompt
    pairs: tuple[RolloutPair, ...]


# ---------------------------------------------------------------- rollouts -> policy
@dataclass(frozen=True, eq=False)
class TokenTrack:
    """What is trained of a response: it goes from the rank that has generated it to the replica that trains it."""

    image_sizes: Tensor  # [i, 2] int32: width, height of the images that the prompt shows; none in later passes
    prompt_ids: Tensor  # [p] int32
    response_ids: Tensor  # [n] int32
    generator_logprobs: Tensor  # [n] float32
    credited: Tensor  # [n] int32: bit s is set where stream s credits it, S + e where measured segment e has it
    # where the generator's choice of experts is replayed: the ids of k experts in the M layers that have some
    prompt_experts: Tensor | None = None  # [p, M, k]; first passes share those of the first sample
    response_experts: Tensor | None = None  # [n - 1, M, k]: the last token predicts nothing


@dataclass(frozen=True)
class TokenSequence:
    """Token ids to be scored by the policy: prompt followed by response. Image ids (one run per
    image, in order) are looked for in the prompt part only; in the response they are text."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    images: tuple[EncodedImage, ...] = ()
    group: int | None = None  # those of one group may begin alike
    # [n, M, k] the experts of each of its n tokens but the last, in the M layers that have some; None: nobody knows
    experts: Tensor | None = None


@dataclass(frozen=True)
class OtherContext:
    """What predicts K tokens of a row in another context: final hidden states by the same weights, constants."""

    rows: Tensor  # [K] int64, ascending: which of the R scored tokens they are
    hidden: Tensor  # [K, H] in the weights' dtype
    is_own: bool  # it is the tokens' own context, and the row is another: KL(other || row), else KL(row || other)


@dataclass(eq=False)
class Routing:
    """Which k experts each token of a row is sent to, in each of the M layers that have some: ids alone. What is given,
    or has been kept, every pass over the row follows; the weights of the experts are those of the present router."""

    given: Tensor | None = None  # [T, M, k], by whoever drew the tokens; on the host, each rank takes its part
    is_given: Tensor | None = None  # [T] bool; other tokens go where the router sends them
    # where nothing is given: what this rank's routers chose for its part of the tokens in the first pass over the row
    kept: dict[int, Tensor] = field(default_factory=dict)  # by layer of the M: [T_part, k]
    # by layer of the M, of the last pass: how many of the experts that predict this rank's scored tokens its router
    # would have chosen itself, [] int64
    agreed: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences packed into one row of N segments, which the ranks of a model share: a segment is a sequence,
    or what sequences have in common, or what one of them has behind that. Row r of the R scored tokens is predicted by
    the hidden state at `loss_rows[r]`; it is response token `row_offset[r]` of sequence `row_sequence[r]`."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [3, T] int64: mRoPE time, height, width
    cu_seqlens: Tensor  # [N+1] int32; padding of the row is its last segment, where there is any
    max_seqlen: int
    parents: tuple[int, ...]  # [N] the segment that each sees whole besides itself, -1: none; see `packing.attention`
    visual_index: Tensor  # [T] int64: row of the visual tokens [V, H] that replaces this token, -1 for text
    images: tuple[EncodedImage, ...]  # distinct, their visual tokens in this order
    loss_rows: Tensor  # [R] int64, positions in the row
    targets: Tensor  # [R] int64
    row_sequence: Tensor  # [R] int64: index into the list of sequences that was packed
    row_offset: Tensor  # [R] int64
    grad_rows: Tensor | None = None  # [G] int64: the scored tokens whose scores the loss depends on; None: all
    entropy_grad: bool = False  # whether it depends on their entropies too, and not on their log-probs alone
    keeps_hidden: bool = False  # whether the hidden states that predict them are wanted too; without gradient alone
    marks_top: bool = False  # whether it is wanted which targets no token is likelier than; without gradient alone
    others: tuple[OtherContext, ...] = ()  # that the KL of whole distributions is wanted from
    routing: Routing | None = None  # None: every router chooses anew in every pass


@dataclass(frozen=True)
class Scoring:
    """How a sampler made probabilities of logits; the policy's log-probs must mirror it.

    log-prob = log softmax((logits + BANNED_LOGIT_BIAS on banned ids) / temperature)
    """

    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()  # ids a response should not hold; one that does stays scored, as very unlikely


@dataclass(frozen=True)
class LogProbs:
    """What the fused head returns."""

    logprobs: Tensor  # [T] natural log of the target's probability
    entropy: Tensor | None  # [T] nats
    kl: Tensor | None = None  # [O, T] nats, from each of the micro-batch's `others`; 0 where that has no token
    hidden: Tensor | None = None  # [T, H], where they are kept and this is a rank of the last stage
    is_top: Tensor | None = None  # [T] bool, where it is marked: no token of the vocabulary is likelier


# ---------------------------------------------------------------- the objective
@dataclass(frozen=True)
class LossInputs:
    """Everything the policy loss of one micro-batch needs. Masks and denominators are one number:
    token_weights[s, r] is 0 outside stream s and 1 / (global denominator of s) inside."""

    trainer_logprobs: Tensor  # [R], carries the gradient
    old_logprobs: Tensor | None  # [R], None: on-policy, the detached trainer log-probs
    ref_logprobs: Tensor | None  # [R], None only if every kl_loss_coef is 0
    advantages: Tensor  # [S, R]
    token_weights: Tensor  # [S, R]
    streams: tuple[RewardStream, ...]
    row_sequence: Tensor | None = None  # [R] int64, the response that each token is of, for ratios of whole responses
    generator_logprobs: Tensor | None = None  # [R], of whoever drew the tokens, and what it saw; for a user's own loss
    entropy: Tensor | None = None  # [R] nats; carries a gradient where a stream has an entropy_coef, and only there


class LossFn(Protocol):
    """Scores micro-batch number `index`. The returned losses add up, over micro-batches and
    data-parallel ranks, to the loss of the step; so do the metrics."""

    def __call__(self, index: int, logprobs: LogProbs) -> tuple[Tensor, Mapping[str, Tensor]]: ...


NamedTensors = Iterable[tuple[str, "Tensor"]]  # weights under their Hugging Face names, whole


class WeightSink(Protocol):
    """Takes weights in place."""

    def update_weights(self, weights: NamedTensors, version: int) -> None: ...


# (group_id, sample, the user turn, the reading that is to hold the answer)
OnQuestion = Callable[[int, int, str, Reading], None]


class Generator(WeightSink, Protocol):
    """Runs all passes for a batch of prompts; every rank gives those of its engine and gets their groups, each on one
    rank. It hands a group to its `on_group` at once, before the others are done, and what a pass of it asks an endpoint
    to its `on_question` even before that; these answers are not among the group's. `on_first` takes each sample when
    its first pass is done, as a group of one pair."""

    def generate(
        self,
        prompts: PromptShare,
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None] | None = None,
        on_question: OnQuestion | None = None,
        on_first: Callable[[RolloutGroup], None] | None = None,
    ) -> list[RolloutGroup]: ...

    def stream(
        self,
        prompts: PromptShare,
        sampling: Sampling,
        step: int,
        on_group: Callable[[RolloutGroup], None],
        on_question: OnQuestion | None = None,
    ) -> None:
        """The same for prompts that no rank has read: each is read when there is room for it, and its group is only
        handed on."""
        ...

    def pixel_differences(self, prompts: Iterable[Prompt], sampling: Sampling) -> list[str]:
        """What engines and trainer see otherwise of the prompts, each line with what to do; the same on every rank."""
        ...

    def sleep(self) -> None:
        """Gives its memory to the trainer until the next `update_weights`, where the platform can."""
        ...
