"""Text and images to ids and patches, and places in a decoded text back to ids."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_sr1.processor import REQUIRED_TOKENS, Processor

NAMES_SPECIAL = "a<|image_pad|>b <image> <|im_end|>\n<|im_start|>system <|vision_start|><|video_pad|>"


@pytest.fixture(scope="module")
def processor(tiny_model_dir: str) -> Processor:
    return Processor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def template_ids(tokenizer: PreTrainedTokenizerFast, text: str, num_images: int) -> tuple[int, ...]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return tuple(encoded["input_ids"])


# ---------------------------------------------------------------- prompts
@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("text", ["Which digits?", " \n leading space", "größer 🙂\n\n", "\n", "", "'s 12 \\boxed{}"])
def test_prompt_is_the_chat_templates(processor: Processor, tokenizer: PreTrainedTokenizerFast, num_images, text):
    assert processor.prompt_ids(text, num_images) == template_ids(tokenizer, text, num_images)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_characters="<>|", exclude_categories=("Cs",)), max_size=20))
def test_prompt_is_the_chat_templates_for_any_harmless_text(
    processor: Processor, tokenizer: PreTrainedTokenizerFast, text: str
):
    assert processor.prompt_ids(text, 0) == template_ids(tokenizer, text, 0)


@pytest.mark.parametrize("num_images", [0, 2])
def test_defect_6_user_text_never_becomes_special_ids(
    processor: Processor, tokenizer: PreTrainedTokenizerFast, num_images: int
):
    special = set(tokenizer.all_special_ids) | set(processor.media_ids)
    harmless = [token for token in processor.prompt_ids("hello", num_images) if token in special]
    ids = processor.prompt_ids(NAMES_SPECIAL, num_images)
    assert [token for token in ids if token in special] == harmless
    assert ids.count(processor.image_token_id) == num_images
    assert NAMES_SPECIAL in processor.decode(ids)
    # a later call that does read special tokens must not be disturbed by the tokenizer's remembered setting
    assert processor.prompt_ids("hello", num_images + 1).count(processor.image_token_id) == num_images + 1


def test_text_and_response_ids(processor: Processor):
    ids = processor.response_ids(NAMES_SPECIAL)
    assert ids[:-1] == processor.text_ids(NAMES_SPECIAL)
    assert ids[-1] == processor.end_of_turn_id and processor.end_of_turn_id not in ids[:-1]
    assert processor.decode(ids) == NAMES_SPECIAL + "<|im_end|>"


@pytest.mark.parametrize("text", ["", "größer 🙂\n\n", "e\u0301 \x00", NAMES_SPECIAL, "Which digits? " * 50])
def test_text_ids_are_transformers_and_never_cut(tiny_model_dir: str, tokenizer: PreTrainedTokenizerFast, text: str):
    wanted = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    other.backend_tokenizer.enable_truncation(3)  # as a tokenizer.json may say
    other.backend_tokenizer.enable_padding(length=200)
    images = AutoImageProcessor.from_pretrained(tiny_model_dir, use_fast=False)
    assert Processor(other, images).text_ids(text) == tuple(wanted)


def test_threads_that_want_special_tokens_do_not_disturb_those_that_do_not(tiny_model_dir: str):
    """A new number of images has its frame tokenised with special tokens, a text is without."""
    other = Processor.from_pretrained(tiny_model_dir)
    text = NAMES_SPECIAL * 20

    def ids(one: Processor, number: int) -> tuple[int, ...]:
        return one.prompt_ids("q", number // 2) if number % 2 else one.text_ids(text)

    wanted = [ids(other, number) for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(partial(ids, Processor.from_pretrained(tiny_model_dir)), range(100))) == wanted


def test_expand(processor: Processor):
    prompt = processor.prompt_ids("q", 2)
    expanded = processor.expand(prompt, [(1, 4, 6), (1, 2, 2)])
    assert expanded.count(processor.image_token_id) == 6 + 1
    first = expanded.index(processor.image_token_id)
    assert set(expanded[first : first + 6]) == {processor.image_token_id}
    assert expanded[first + 6] != processor.image_token_id
    text_of = [token for token in expanded if token != processor.image_token_id]
    assert text_of == [token for token in prompt if token != processor.image_token_id]
    with pytest.raises(ValueError, match="2 image placeholders for 1 images"):
        processor.expand(prompt, [(1, 4, 6)])


# ---------------------------------------------------------------- images
def test_encode_image(processor: Processor, tiny_model_dir: str):
    image = Image.new("RGB", (56, 84), (255, 0, 0))
    encoded = processor.encode_image(image)
    assert encoded.grid_thw == (1, 6, 4)
    assert encoded.pixel_values.shape == (24, 3 * 2 * 14 * 14)
    assert encoded.pixel_values.dtype == torch.float32
    channels = encoded.pixel_values.view(24, 3, -1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(channels[5, :, 0], (torch.tensor([1.0, 0.0, 0.0]) - mean) / std)
    limit = json.loads(Path(tiny_model_dir, "preprocessor_config.json").read_text())["max_pixels"]
    large = processor.encode_image(Image.new("L", (2000, 1000)))
    assert limit / 2 < large.grid_thw[1] * large.grid_thw[2] * 14 * 14 <= limit


def with_preprocessor(tiny_model_dir: str, folder: Path, **changes: object) -> tuple[Processor, BaseImageProcessor]:
    """Ours, and transformers' own image processor (the torchvision one), of the same preprocessor_config.json."""
    shutil.copytree(tiny_model_dir, folder)
    path = folder / "preprocessor_config.json"
    settings_of_model = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings_of_model.items() if value is not None}))
    return Processor.from_pretrained(str(folder)), AutoImageProcessor.from_pretrained(folder)


PREPROCESSORS = {
    "qwen2_5_vl": {"min_pixels": 3136, "max_pixels": 28 * 28 * 80},
    "vision_sr1": {"min_pixels": 262_144, "max_pixels": 4_194_304},
    "qwen3_vl": {
        "min_pixels": None,
        "max_pixels": None,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        **{"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    },
}
SIZES = ((1, 1), (1, 200), (200, 1), (3, 100), (27, 29), (13, 2600), (2600, 13), (4099, 41), (333, 1001), (1500, 1499))


@pytest.fixture(scope="module", params=sorted(PREPROCESSORS))
def pair(request: pytest.FixtureRequest, tiny_model_dir: str, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model") / request.param
    return with_preprocessor(tiny_model_dir, folder, **PREPROCESSORS[request.param])


@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from(SIZES) | st.tuples(st.integers(4, 400), st.integers(4, 400)))
def test_the_grid_is_transformers(pair: tuple[Processor, BaseImageProcessor], size: tuple[int, int]):
    ours, theirs = pair
    image = Image.new("L", size)
    expected = theirs(images=[image], return_tensors="pt")["image_grid_thw"].tolist()
    assert [list(ours.grid(size))] == expected
    assert len(ours.encode_image(image).pixel_values) == expected[0][1] * expected[0][2]


@pytest.mark.parametrize("size", [(201, 1), (3, 601), (10_000, 49), (0, 5), (5, 0)])
def test_sizes_that_no_tower_takes(processor: Processor, size: tuple[int, int]):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels is not allowed.*200 times"):
        processor.grid(size)
    with pytest.raises(ValueError, match="Crop or drop it"):
        processor.encode_image(Image.new("RGB", size))


def test_patches_are_bytes_that_normalise_to_what_transformers_makes(tiny_model_dir: str, tmp_path: Path):
    image = Image.effect_noise((150, 97), 90).convert("RGB")
    other = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "rescale_factor": 1 / 128}
    for number, changes in enumerate(({}, {"do_normalize": False}, other)):
        ours, _ = with_preprocessor(tiny_model_dir, tmp_path / str(number), **changes)
        encoded = ours.encode_image(image)
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / str(number))
        expected = theirs(images=[image], return_tensors="pt")["pixel_values"]
        assert encoded.patches().dtype == torch.uint8
        torch.testing.assert_close(encoded.pixel_values, expected.float(), atol=2e-6, rtol=1e-6)


def test_only_the_last_patches_are_kept(processor: Processor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_sr1.processor.KEPT_PATCHES", 50)
    images = [Image.new("RGB", (56, 84)) for _ in range(4)]  # of 24 patches
    first, *_, last = [processor.encode_image(image) for image in images]
    assert processor.encode_image(images[3]) is last and processor.encode_image(images[0]) is not first
    assert processor._num_kept == 48 == sum(math.prod(each.grid_thw) for _, each in processor._encoded.values())


def test_patches_are_made_late_and_once(processor: Processor, tmp_path: Path):
    """The file's header gives the size; its pixels are cut off, and nobody misses them until patches are asked for."""
    whole = Image.effect_noise((84, 56), 90).convert("RGB")
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    cut = processor.encode_image(Image.open(tmp_path / "cut.png"))
    assert cut.grid_thw == (1, 4, 6)
    with pytest.raises(OSError, match="truncated"):
        _ = cut.pixel_values
    encoded = processor.encode_image(whole)
    assert not encoded.patches.started and encoded.patches() is encoded.patches()
    assert processor.encode_image(whole) is encoded


def test_a_processor_that_does_not_resize_is_refused(tiny_model_dir: str, tmp_path: Path):
    ours, _ = with_preprocessor(tiny_model_dir, tmp_path / "model", do_resize=False)
    fits, small = ours.encode_image(Image.new("RGB", (56, 28))), ours.encode_image(Image.new("RGB", (2800, 2800)))
    assert len(fits.pixel_values) == 8
    with pytest.raises(ValueError, match=r"40000 patches, grid .* = \(1, 200, 200\).*do_resize true"):
        _ = small.pixel_values


# ---------------------------------------------------------------- spans
def brute_force_spans(processor: Processor, ids: list[int]) -> list[tuple[int, int]]:
    """By definition, for ids whose bytes are valid UTF-8 together."""
    pieces = [processor._bytes_of(token) for token in ids]
    owner = [n for n, char in enumerate(b"".join(pieces).decode()) for _ in char.encode()]
    spans, place = [], 0
    for piece in pieces:
        owners = owner[place : place + len(piece)]
        spans.append((owners[0], owners[-1] + 1))
        place += len(piece)
    return spans


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
def test_spans_of_text(processor: Processor, text: str):
    ids = [*processor.text_ids(text), processor.end_of_turn_id]
    assert processor.token_spans(ids) == brute_force_spans(processor, ids)


def test_spans_of_split_characters(processor: Processor):
    ids = processor.text_ids("a🦊é")  # neither the fox nor é is in the training text: one token a byte
    assert processor.token_spans(ids) == [(0, 1)] + [(1, 2)] * 4 + [(2, 3)] * 2
    assert processor.segment_mask(ids, (1, 2)) == [False] + [True] * 4 + [False] * 2
    assert not any(processor.segment_mask(ids, (1, 1)))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 700), max_size=40))
def test_arbitrary_ids_decode_as_the_tokenizer_does(
    processor: Processor, tokenizer: PreTrainedTokenizerFast, ids: list[int]
):
    """Sampled ids need not be valid UTF-8, nor below the tokenizer's length."""
    text = processor.decode(ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spans = processor.token_spans(ids)
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(start <= end <= len(text) for start, end in spans)
    filled = [span for span in spans if span[0] < span[1]]
    assert all(before[0] <= after[0] and before[1] <= after[1] for before, after in pairwise(filled))
    for token, (start, end) in zip(ids, spans, strict=True):
        alone = processor.decode([token])
        if "\ufffd" not in alone:
            assert text[start:end] == alone


def test_id_past_the_tokenizer_has_no_text(processor: Processor):
    ids = [*processor.text_ids("ab"), processor.vocab_len + 5, *processor.text_ids("c")]
    assert processor.decode(ids) == "abc"
    assert processor.token_spans(ids)[-2:] == [(2, 2), (2, 3)]
    assert processor.segment_mask(ids, (0, 3))[-2:] == [False, True]
    with pytest.raises(ValueError, match="negative"):
        processor.decode([-1])


def test_spans_are_linear_time(processor: Processor):
    """A quadratic walk over 400 000 bytes would take minutes."""
    ids = list(processor.text_ids("🦊")[:1]) * 200_000 + list(processor.text_ids("a")) * 200_000
    started = time.perf_counter()
    assert processor.token_spans(ids)[-1] == (399_999, 400_000)
    assert time.perf_counter() - started < 20


def test_segment_mask_of_a_response(processor: Processor):
    response = "<description> 3 7 </description> <think> 10 </think>"
    ids = processor.response_ids(response)
    start, end = response.index(" 3"), response.index("</description>")
    mask = processor.segment_mask(ids, (start, end))
    inside = processor.decode([token for token, chosen in zip(ids, mask, strict=True) if chosen])
    assert response[start:end] in inside and "think" not in inside
    assert not mask[-1]


# ---------------------------------------------------------------- bad directories
def test_missing_special_token_is_named(tiny_model_dir: str, tmp_path: Path):
    for name in ("tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(Path(tiny_model_dir, name), tmp_path / name)
    vocabulary = Path(tiny_model_dir, "tokenizer.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        changed = vocabulary if name == "tokenizer.json" else (tmp_path / name).read_text()
        (tmp_path / name).write_text(changed.replace("<|image_pad|>", "<|another|>"))
    with pytest.raises(ValueError, match=r"<\|image_pad\|>"):
        Processor.from_pretrained(str(tmp_path))
    assert "<|image_pad|>" in REQUIRED_TOKENS


def test_directory_without_preprocessor(tmp_path: Path):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        Processor.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "opening", ["<think> So", "Sure, ", "<think>So</think>", "<think></thought>", "<think></think><think>", "</think>"]
)
def test_a_chat_template_that_begins_the_answer_is_refused(opening: str, tiny_model_dir: str, tmp_path: Path):
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_model_dir, folder)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    assert template.count("assistant\n") == 1
    path.write_text(template.replace("assistant\n", f"assistant\n{opening}"))
    with pytest.raises(
        ValueError, match=rf"opens the answer.s turn with .*{opening[:5]}.*prefills no more than a tag or an"
    ):
        Processor.from_pretrained(str(folder))


def test_chat_template_of_older_releases(tiny_model_dir: str, tmp_path: Path, processor: Processor):
    shutil.copytree(tiny_model_dir, tmp_path / "old")
    template = tmp_path / "old" / "chat_template.jinja"
    (tmp_path / "old" / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    assert Processor.from_pretrained(str(tmp_path / "old")).prompt_ids("q", 1) == processor.prompt_ids("q", 1)
    (tmp_path / "old" / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Processor.from_pretrained(str(tmp_path / "old"))


# ---------------------------------------------------------------- templates that a folder brings
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = (
    "<|im_start|>user\n{% for part in messages[0].content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n<|im_start|>assistant\n"
)
OPENING = "<|im_start|>assistant\n"
ODD_TEMPLATES = {
    "no generation prompt": (PLAIN.replace(OPENING, ""), "opens the answer's turn with ''"),
    "another role": (PLAIN.replace("assistant", "user"), r"opens the answer's turn with '<\|im_start\|>user'"),
    "no end of turn": (PLAIN.replace("<|im_end|>\n", ""), "as a turn of its own"),
    "no vision marks": (PLAIN.replace("<|vision_start|>", ""), "for each of 1 images"),
    "twice the image": (PLAIN.replace("<|image_pad|>", "<|image_pad|>" * 2), "for each of 1 images"),
    "json": (PLAIN.replace("part.text", "part.text | tojson"), "as a turn of its own"),
    "a list": (
        PLAIN.replace(
            "user\n", "user\n{% if messages[0].content | length == 1 %}{{ messages[0].content }}{% else %}"
        ).replace("{% endfor %}", "{% endfor %}{% endif %}"),
        "as a turn of its own",
    ),
}


@pytest.fixture
def with_template(tiny_model_dir: str, tmp_path: Path) -> Callable[[str], Processor]:
    def make(template: str) -> Processor:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return Processor.from_pretrained(str(folder))

    return make


@pytest.mark.parametrize(
    "template",
    [LOOP + PLAIN, "{% generation %}" + LOOP + "{% endgeneration %}" + PLAIN, PLAIN + "{{ 'a' * 10**11 }}"],
    ids=["loop", "tracked loop", "memory"],
)
def test_a_template_that_does_not_end_is_refused(with_template: Callable[[str], Processor], template: str) -> None:
    with pytest.raises(ValueError, match=r"chat template of '.*model' did not end within 2 s and 1024 MiB"):
        with_template(template)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for i in range(10**9) %}{% endfor %}", "{{ nope.x }}", "{% bad"]
)
def test_a_template_that_fails_is_named(with_template: Callable[[str], Processor], template: str) -> None:
    with pytest.raises(ValueError, match=r"chat template of '.*model' fails for 1 images: "):
        with_template(template)


@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_a_template_of_other_turns_is_refused(with_template: Callable[[str], Processor], name: str) -> None:
    template, words = ODD_TEMPLATES[name]
    assert template != PLAIN
    with pytest.raises(ValueError, match=words):
        with_template(template).prompt_ids("x", num_images=0)


def test_every_number_of_images_is_checked_before_it_is_rendered(with_template: Callable[[str], Processor]) -> None:
    processor = with_template(PLAIN + "{% if messages[0].content | length > 2 %}" + LOOP + "{% endif %}")
    assert processor.prompt_ids("x", num_images=1)
    with pytest.raises(ValueError, match="did not end"):
        processor.prompt_ids("x", num_images=2)


def test_a_template_with_tools_of_transformers_passes(with_template: Callable[[str], Processor]) -> None:
    """Its filter, its functions, its tag, loop controls and special tokens."""
    tools = "{{ messages | tojson(indent=2) | length }}{{ strftime_now('%Y') }}{{ eos_token }}"
    loop = "{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{% endfor %}"
    processor = with_template(f"{loop}{{% generation %}}{tools}{{% endgeneration %}}{PLAIN}")
    assert processor.prompt_ids("x", num_images=1)
