"""Between text and images on one side and the ids and patches the policy reads on the other.

A question, a description and a demonstration are data: whatever they spell (`<|image_pad|>`, `<|im_end|>`), they are
tokenised as text and never become special ids. Only the chat template places special ids.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sr1.ahead import Later
from megatron_sr1.chat_template import TEMPLATE_ERRORS, check_it_ends
from megatron_sr1.config import PixelLimits
from megatron_sr1.opening import check_known, opened_block
from megatron_sr1.types import MAX_ASPECT, EncodedImage, ImageRef, Normalisation, Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

END_OF_TURN = "<|im_end|>"
IMAGE = "<|image_pad|>"
REQUIRED_TOKENS = (END_OF_TURN, IMAGE, "<|vision_start|>", "<|vision_end|>")
MEDIA_TOKENS = (IMAGE, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")

KEPT_PATCHES = 800_000  # about 1 GiB at 1,176 bytes each: what waits between an engine's use and the trainer's
_BEFORE_TEXT = re.compile(r"[^{}\[\]'\"]*")  # no Python list or JSON that the text stands in
# what stands for texts of a turn while the chat template is rendered
_SYSTEM_TEXT, _BEFORE_IMAGES, _USER_TEXT = "@system-text@", "@text-before-images@", "@user-text@"
_SLOT = re.compile(f"({_SYSTEM_TEXT}|{_BEFORE_IMAGES}|{_USER_TEXT})")
_LENGTH_CODE = 0xD800  # code points that UTF-8 cannot decode to: 0xD800 + n marks n undecodable bytes


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `bytes.decode`: one marker per undecodable run of bytes, where "replace" gives one U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(_LENGTH_CODE + error.end - error.start), error.end


codecs.register_error("megatron_sr1.mark", _mark_undecodable)


_Piece = tuple[int, ...] | str  # ids, or a text with slots


class Processor:
    """The tokenizer, chat template and image processor of a Qwen-VL model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Qwen2VLImageProcessorPil,
        *,
        num_threads: int = 2,
        system_prompt: str | None = None,
    ) -> None:
        """
        Args:
            num_threads: that make patches ahead of their use.
            system_prompt: of every turn that has none of its own; None: what the chat template writes by itself.

        Raises:
            ValueError: the tokenizer lacks a special token or a chat template, or the template does not end, does not
                hold the user's text once, begins the answer with more than a tag, or has no place for the system
                prompt.
        """
        vocabulary = tokenizer.get_vocab()
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(special, key=len, reverse=True)
        missing = [token for token in REQUIRED_TOKENS if token not in special]
        if missing:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} lacks the special tokens {', '.join(missing)}. "
                "Give the directory of a Qwen-VL model in Hugging Face format."
            )
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{tokenizer.name_or_path!r} has no chat template. Add the chat_template.jinja of its instruct model."
            )
        self._tokenizer = tokenizer
        self._tokenising = threading.Lock()
        tokenizer.backend_tokenizer.no_truncation()  # whatever tokenizer.json says: a text is taken whole
        tokenizer.backend_tokenizer.no_padding()
        self._image_processor = image_processor
        self._num_threads = num_threads
        self._encoded: OrderedDict[int, tuple[Image | ImageRef, EncodedImage]] = (
            OrderedDict()
        )  # by the identity of the image
        self._num_kept = 0  # patches of these
        self._system_prompt = system_prompt
        self._frames: dict[tuple[int, bool, bool], list[_Piece]] = {}
        self._opening = ""  # of an answer's turn, as the chat template begins every one
        self.opened = ""  # the tag that the chat template begins the answer with, such as <think>
        self.end_of_turn_id: int = vocabulary[END_OF_TURN]
        self.image_token_id: int = vocabulary[IMAGE]
        self.media_ids: tuple[int, ...] = tuple(vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary)
        self.vocab_len: int = len(tokenizer)  # ids the tokenizer knows; the model's matrices may have more rows
        self.merge_size: int = image_processor.merge_size
        self.num_frames: int = image_processor.temporal_patch_size  # that a still image is repeated in
        self._frame(1, False, system_prompt is not None)  # what is wrong with it is told before anything else is made

    @classmethod
    def from_pretrained(
        cls, hf_dir: str, *, pixels: PixelLimits | None = None, num_threads: int = 2, system_prompt: str | None = None
    ) -> Processor:
        """Reads the tokenizer and preprocessor files of `hf_dir`; runs no code from there.

        Args:
            pixels: of every image, in place of those that the files state.

        transformers decides as it is imported whether torchvision and torchaudio are there to be used, hence here and
        not at the import of this module: the platform looks first whether they can be loaded.

        Raises:
            ValueError: not a directory, no file of an image processor, a special token or the chat template is missing.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = Path(hf_dir)
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise ValueError(
                f"{hf_dir!r} has no preprocessor_config.json and no processor_config.json. "
                "Give the directory of a Qwen-VL model in Hugging Face format."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=False)
        except (OSError, ValueError, LookupError, AttributeError, TypeError, StrictDataclassError) as error:
            raise ValueError(
                f"{hf_dir}: its tokenizer cannot be read, {_first_line(error)}. Compare tokenizer.json, "
                "tokenizer_config.json, chat_template.jinja and config.json with those of the original model."
            ) from error
        legacy_template = folder / "chat_template.json"  # where releases before chat_template.jinja keep it
        if tokenizer.chat_template is None and legacy_template.is_file():
            try:
                tokenizer.chat_template = json.loads(legacy_template.read_text(encoding="utf-8"))["chat_template"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{legacy_template} has no chat_template: {_first_line(error)}. Copy it again."
                ) from error
        try:
            images = Qwen2VLImageProcessorPil.from_pretrained(hf_dir, **_changes(pixels))
            return cls(tokenizer, images, num_threads=num_threads, system_prompt=system_prompt)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{hf_dir}: its image processor cannot be read, {_first_line(error)}. Copy preprocessor_config.json "
                "again."
            ) from error

    # ------------------------------------------------------------ text and images -> ids and patches
    def prompt_ids(self, user_text: str, num_images: int) -> tuple[int, ...]:
        """One user turn, images first, ready for the assistant; each image is one `<|image_pad|>` still."""
        return self._turn_ids(Turn(user_text), num_images)

    def turn_ids(self, turn: Turn, num_images: int) -> tuple[int, ...]:
        """The same of a template's turn, with its images where they stand in it, and its system prompt.

        Raises:
            ValueError: the chat template opens another block of the answer than the turn's template expects; it has no
                place for a system prompt, or for images behind text.
        """
        ids = self._turn_ids(turn, num_images)
        self.check_opening(turn)
        return ids

    def check_opening(self, turn: Turn) -> None:
        """Raises ValueError where the chat template opens another block of the answer than `turn.opens`."""
        check_known(self.opened, turn, self._whose)

    def expand(self, prompt_ids: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
        """Replaces the n-th `<|image_pad|>` by t*h*w / merge_size^2 of them.

        Raises:
            ValueError: there are not as many placeholders as grids.
        """
        num_placeholders = sum(token == self.image_token_id for token in prompt_ids)
        if num_placeholders != len(grids):
            raise ValueError(
                f"the prompt has {num_placeholders} image placeholders for {len(grids)} images; they must be as many. "
                "Build it with prompt_ids(text, num_images=<number of images>)."
            )
        remaining = iter(grids)
        expanded: list[int] = []
        for token in prompt_ids:
            if token == self.image_token_id:
                time, height, width = next(remaining)
                expanded.extend([token] * (time * height * width // self.merge_size**2))
            else:
                expanded.append(token)
        return tuple(expanded)

    def num_visual_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens an image of a size takes up in a prompt. Arguments and errors as `grid`."""
        return math.prod(self.grid(size)) // self.merge_size**2

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Patches along time, height and width of a still image; no pixel is read.

        The image is resized to multiples of patch_size * merge_size whose product lies within the pixel limits
        (`smart_resize` of transformers' own processor); a side is never less than one of these multiples, so a thin
        image may have more pixels than the limit. What counts tokens counts these.

        Args:
            size: width and height in pixels, as `Image.size` gives them.

        Raises:
            ValueError: a side is 0, or one is more than 200 times the other.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        width, height = size
        if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
            raise ValueError(
                f"an image of {width} x {height} pixels is not allowed: both sides must be at least 1 pixel and "
                f"neither more than {MAX_ASPECT} times the other. Crop or drop it."
            )
        patch, limits = self._image_processor.patch_size, self._image_processor.size
        rows, columns = smart_resize(
            height,
            width,
            factor=patch * self.merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
        return 1, rows // patch, columns // patch

    def encode_image(self, image: Image | ImageRef) -> EncodedImage:
        """The image as the vision tower reads it; it is resized and cut when its patches are started or first asked
        for. The same object for the same image, while it is among the last ones that were asked for.

        Raises:
            ValueError: an image of such a size cannot be encoded (see `grid`).
        """
        known = self._encoded.pop(id(image), None)
        if known is None:
            grid = self.grid(image.size)
            make = Later(partial(self._patches, image, grid), self._pool)
            known = image, EncodedImage(grid, make, self._normalisation)
            self._num_kept += math.prod(grid)
        self._encoded[id(image)] = known
        while self._num_kept > KEPT_PATCHES and len(self._encoded) > 1:
            _, (_, oldest) = self._encoded.popitem(last=False)
            self._num_kept -= math.prod(oldest.grid_thw)
        return known[1]

    def changed(self, image: EncodedImage, change: Callable[[Tensor], Tensor]) -> EncodedImage:
        """Another image on the same grid, whose patches `change` makes of the image's, ahead or when first needed."""
        return EncodedImage(image.grid_thw, Later(lambda: change(image.patches()), self._pool), image.normalisation)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of `text` as data: no special id, whatever it spells."""
        return self._tokenise(text, split_special_tokens=True)

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a complete response: the text, then the end of the turn."""
        return (*self.text_ids(text), self.end_of_turn_id)

    # ------------------------------------------------------------ ids -> text and places in it
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens kept, nothing cleaned up, U+FFFD for each undecodable run of bytes."""
        return b"".join(self._bytes_of(token) for token in ids).decode("utf-8", errors="replace")

    def token_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """[start, end) of each id in `decode(ids)`, in characters.

        A token covers every character one of whose bytes it holds, so the spans of neighbours overlap where a
        character is split. An id without text has an empty span. Linear in the number of bytes.
        """
        pieces = [self._bytes_of(token) for token in ids]
        text = b"".join(pieces).decode("utf-8", errors="megatron_sr1.mark")
        char_ends = np.cumsum(_utf8_lengths(text))
        char_starts = np.concatenate([[0], char_ends])[:-1]
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        token_ends = np.cumsum(lengths)
        starts = np.searchsorted(char_ends, token_ends - lengths, side="right")
        ends = np.where(lengths > 0, np.searchsorted(char_starts, token_ends, side="left"), starts)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def segment_mask(self, ids: Sequence[int], span: tuple[int, int]) -> list[bool]:
        """Which ids hold at least a part of the characters [span[0], span[1]) of `decode(ids)`."""
        first, last = span
        return [max(start, first) < min(end, last) for start, end in self.token_spans(ids)]

    # ------------------------------------------------------------ inside
    def _patches(self, image: Image | ImageRef, grid: tuple[int, int, int]) -> Tensor:
        """[P, C] uint8: resized and cut as the model's own processor does.

        Raises:
            ValueError: they are not the patches of `grid`, by which prompts and rows were laid out.
        """
        import torch

        image = image.decoded() if isinstance(image, ImageRef) else image
        features = self._image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")
        found, patches = tuple(features["image_grid_thw"][0].tolist()), features["pixel_values"].to(torch.uint8)
        if found != grid or len(patches) != math.prod(grid):
            raise ValueError(
                f"the image processor makes {len(patches)} patches, grid (time, height, width) = {found}, of an image "
                f"of {image.width} x {image.height} pixels; its size asks for {grid}. Use the preprocessor_config.json "
                "of the Qwen-VL model as released, with do_resize true."
            )
        return patches

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="patches")

    @cached_property
    def _normalisation(self) -> Normalisation:
        settings = self._image_processor
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0.0] * 3, [1.0] * 3)
        return Normalisation(settings.rescale_factor if settings.do_rescale else 1.0, tuple(mean), tuple(std))

    def _tokenise(self, text: str, split_special_tokens: bool) -> tuple[int, ...]:
        """As the tokenizer of transformers does, without what else that makes for a text: offsets, masks."""
        backend: Any = self._tokenizer.backend_tokenizer
        with self._tokenising:  # threads that read data ask as well, and another may want the other way
            backend.encode_special_tokens = split_special_tokens
            return tuple(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _turn_ids(self, turn: Turn, num_images: int) -> tuple[int, ...]:
        system = self._system_prompt if turn.system is None else turn.system
        before, user = (turn.before, turn.after) if num_images else ("", turn.before + turn.after)
        texts = {_SYSTEM_TEXT: system or "", _BEFORE_IMAGES: before, _USER_TEXT: user}
        ids: tuple[int, ...] = ()
        for piece in self._frame(num_images, before != "", system is not None):
            ids += piece if isinstance(piece, tuple) else self.text_ids(_SLOT.sub(lambda slot: texts[slot[0]], piece))
        return ids

    def _frame(self, num_images: int, text_first: bool, has_system: bool) -> list[_Piece]:
        """The chat template around the texts of a turn: ids, and texts with slots.

        The plain text between a slot and the nearest special tokens is kept as text, to be tokenised together with what
        comes into the slot: that gives the ids the whole rendered prompt would have had.
        """
        place = (num_images, text_first, has_system)
        if place not in self._frames:
            rendered = self._rendered(*place)
            parts = re.split(f"({'|'.join(map(re.escape, self._special))})", rendered)
            pieces: list[_Piece] = []
            fixed = ""
            for part in parts:
                if _SLOT.search(part) is None:
                    fixed += part
                    continue
                pieces += [self._tokenise(fixed, split_special_tokens=False), part]
                fixed = ""
            self._check_turns(rendered, *place)
            self._frames[place] = [*pieces, self._tokenise(fixed, split_special_tokens=False)]
        return self._frames[place]

    def _rendered(self, num_images: int, text_first: bool, has_system: bool) -> str:
        """A turn with its slots, by the model's own chat template."""
        content = [{"type": "text", "text": _BEFORE_IMAGES}] if text_first else []
        content += [{"type": "image"}] * num_images + [{"type": "text", "text": _USER_TEXT}]
        conversation: list[Any] = [{"role": "system", "content": _SYSTEM_TEXT}] if has_system else []
        conversation.append({"role": "user", "content": content})
        self._check_template(conversation)
        try:
            rendered = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            told = " and a system prompt" if has_system else ""
            raise ValueError(
                f"{self._whose} fails for {num_images} images{told}: {error}. Use the chat template of a Qwen-VL model."
            ) from error
        assert isinstance(rendered, str), "text was asked for"
        return rendered

    @property
    def _whose(self) -> str:
        return f"the chat template of {self._tokenizer.name_or_path!r}"

    def _check_turns(self, rendered: str, num_images: int, text_first: bool, has_system: bool) -> None:
        wanted = [_BEFORE_IMAGES] * text_first + [_USER_TEXT]
        slots = [slot for slot in _SLOT.findall(rendered) if slot != _SYSTEM_TEXT]
        if slots != wanted:
            raise ValueError(
                f"{self._whose} writes the user's text {slots.count(_USER_TEXT)} times; it must be once, and where it "
                "stands among images. Use the chat template of a Qwen-VL model."
            )
        before, _, behind = rendered.partition(wanted[0])
        between, _, behind = behind.partition(_USER_TEXT) if text_first else ("", "", behind)
        plain = before[
            max((before.rfind(token) + len(token) for token in self._special if token in before), default=0) :
        ]
        pictures = f"<|vision_start|>{IMAGE}<|vision_end|>"
        if not _BEFORE_TEXT.fullmatch(plain) or END_OF_TURN not in behind:
            raise ValueError(
                f"{self._whose} does not write the user's text as a turn of its own, but {plain!r}, TEXT, {behind!r}. "
                "Use the chat template of a Qwen-VL model."
            )
        if not rendered.count(IMAGE) == rendered.count(pictures) == num_images:
            raise ValueError(
                f"{self._whose} does not write one {pictures} for each of {num_images} images. "
                "Use the chat template of a Qwen-VL model."
            )
        if text_first and between.count(pictures) != num_images:
            raise ValueError(
                f"{self._whose} does not keep {num_images} images behind the text in front of them. Leave {{images}} "
                "out of the template, so that they stand in front."
            )
        if has_system:
            self._check_system(rendered)
        opening = behind.rpartition(END_OF_TURN)[2].strip()
        self.opened = opened_block(opening, self._whose)
        if self._frames and opening != self._opening:
            raise ValueError(
                f"{self._whose} begins the answer with {opening!r} here and with {self._opening!r} elsewhere, by "
                "images or system prompt: passes would be asked in two ways. Use one that always does the same."
            )
        self._opening = opening

    def _check_system(self, rendered: str) -> None:
        """The system prompt is the first turn, and there is no other one of the system."""
        turn = re.compile(rf"\s*<\|im_start\|>\s*system\s*{_SYSTEM_TEXT}\s*{re.escape(END_OF_TURN)}")
        num_turns = len(re.findall(r"<\|im_start\|>\s*system", rendered))
        if turn.match(rendered) is None or num_turns != 1:
            found = "writes none" if _SYSTEM_TEXT not in rendered else f"writes {num_turns} of the system"
            raise ValueError(
                f"{self._whose} does not write a system prompt as one turn in front of the user's: it {found}. Set "
                "model.system_prompt, and system in the template, to null, or use a chat template with a system role."
            )

    def _check_template(self, conversation: list[Any]) -> None:
        """Every rendering comes here first: there is one for each number of images, and none has a sample's text."""
        variables = {"messages": conversation, "tools": None, "documents": None, "add_generation_prompt": True}
        template = self._tokenizer.get_chat_template()
        variables |= self._tokenizer.special_tokens_map
        check_it_ends(template, variables, repr(self._tokenizer.name_or_path))

    def _bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of one id; none for an id past the tokenizer's last, which the model may have rows for."""
        if token < 0:
            raise ValueError(f"token id {token} is negative; ids start at 0")
        return self._id_bytes[token] if token < len(self._id_bytes) else b""

    @cached_property
    def _id_bytes(self) -> list[bytes]:
        added = {token: entry.content for token, entry in self._tokenizer.added_tokens_decoder.items()}
        byte_of = _byte_alphabet()
        table = [b""] * (max(self._tokenizer.get_vocab().values()) + 1)
        for piece, token in self._tokenizer.get_vocab().items():
            table[token] = added[token].encode() if token in added else bytes(byte_of[char] for char in piece)
        return table


def _changes(pixels: PixelLimits | None) -> dict[str, Any]:
    """Arguments of transformers' image processor. By these names: in a file they win over `size`."""
    return {} if pixels is None else {"min_pixels": pixels.least, "max_pixels": pixels.most}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _byte_alphabet() -> dict[str, int]:
    """The character by which a byte-level BPE vocabulary writes each byte (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _utf8_lengths(marked: str) -> np.ndarray:
    """Bytes behind each character of a text that was decoded with the marking error handler: [characters] int64."""
    codes = np.frombuffer(marked.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.int64)
    lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    marks = (codes >= _LENGTH_CODE) & (codes <= _LENGTH_CODE + 4)
    return np.where(marks, codes - _LENGTH_CODE, lengths)
