"""The quickstart's task: scans split without overlap, questions that need the picture, a model that loads."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_sr1.data import ShardDataset, expand_shards
from megatron_sr1.digits import ALL_KINDS, KINDS, compose, describe, load_scans, make_demonstrations, make_prompts
from megatron_sr1.digits.tiny_model import SPECIAL_TOKENS, create_tiny_model, train_tokenizer
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import CAPTION_REASONER, SEE_THINK, SHIPPED
from megatron_sr1.types import Prompt, SftSample
from tests.tool_modules import load_tool

GOLD = {
    "sum": sum,
    "difference": lambda digits: max(digits) - min(digits),
    "number": lambda digits: "".join(str(digit) for digit in digits),
}


GOLD_OF_ALL = {**GOLD, "largest": max, "leftmost": lambda digits: digits[0]}


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def facts(prompt: Prompt) -> list[int]:
    return [int(fact) for fact in prompt.metadata["facts"]]


# ---------------------------------------------------------------- pictures
def test_the_splits_share_no_scan_and_cover_all() -> None:
    dataset = load_digits()
    total, seen = 0, set()
    for digit in range(10):
        train, heldout = load_scans("train")[digit], load_scans("heldout")[digit]
        assert len(heldout) / (len(train) + len(heldout)) == pytest.approx(0.2, abs=0.01)
        source = Counter(scan.tobytes() for scan in dataset.images[dataset.target == digit])
        assert Counter(scan.tobytes() for scan in (*train, *heldout)) == source
        total += len(train) + len(heldout)
        seen |= {scan.tobytes() for scan in train} & {scan.tobytes() for scan in heldout}
    assert total == 1797 and not seen


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split='test' is not allowed: it must be one of train, heldout"):
        load_scans("test")


@pytest.mark.parametrize("num_digits", [1, 2, 3])
def test_a_picture_is_a_row_of_cells_in_the_order_given(num_digits: int) -> None:
    blank, stroke = np.zeros((8, 8)), np.full((8, 8), 16.0)
    for bright in range(num_digits):
        scans = [stroke if cell == bright else blank for cell in range(num_digits)]
        image = compose(scans)
        assert (image.mode, image.size) == ("RGB", (28 * num_digits, 28))
        means = np.asarray(image)[:, :, 0].reshape(28, num_digits, 28).mean(axis=(0, 2))
        assert means.argmax() == bright and np.ptp(np.delete(means, bright)) == 0 if num_digits > 1 else means[0] > 100


def test_the_drawing_keeps_the_scan() -> None:
    for scan in load_scans("train")[3][:20]:
        small = np.asarray(compose([scan]).convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.95


def test_bad_scans_are_refused() -> None:
    with pytest.raises(ValueError, match="no scans"):
        compose([])
    with pytest.raises(ValueError, match=r"shape \(8, 7\)"):
        compose([np.zeros((8, 7))])


# ---------------------------------------------------------------- questions
def test_answers_are_right_and_kinds_take_turns() -> None:
    prompts = make_prompts("train", 60, seed=3)
    assert Counter(prompt.source for prompt in prompts) == dict.fromkeys(KINDS, 20)
    assert set(KINDS) == set(GOLD)
    for prompt in prompts:
        assert prompt.answer == str(GOLD[prompt.source](facts(prompt)))
        assert prompt.images[0].size == (28 * len(facts(prompt)), 28)
    assert len({prompt.key for prompt in prompts}) == 60


def test_the_text_does_not_give_the_answer_away() -> None:
    prompts = make_prompts("train", 2000, seed=1)
    for kind in KINDS:
        asked = [prompt for prompt in prompts if prompt.source == kind]
        assert len({prompt.problem for prompt in asked}) == 1
        commonest = Counter(prompt.answer for prompt in asked).most_common(1)[0][1]
        assert commonest / len(asked) < 0.15  # the best constant guess


def test_prompts_are_reproducible_and_splits_use_their_own_scans() -> None:
    def pictures(split: str, seed: int) -> list[str]:
        return [digest(prompt.images[0]) for prompt in make_prompts(split, 12, seed)]

    assert pictures("train", 1) == pictures("train", 1)
    assert make_prompts("train", 5, 1)[4].answer == make_prompts("train", 12, 1)[4].answer
    assert not set(pictures("train", 1)) & set(pictures("train", 2))
    assert not set(pictures("train", 1)) & set(pictures("heldout", 1))


def test_a_split_draws_from_its_scans_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(
        "megatron_sr1.digits.questions.load_scans", lambda split: used.append(split) or load_scans(split)
    )
    make_prompts("heldout", 4, 1)
    assert set(used) == {"heldout"}
    used.clear()
    make_demonstrations(8, 1)
    assert set(used) == {"train"}


@pytest.mark.parametrize("questions", [2, 3, 5])
def test_a_picture_is_asked_several_kinds_and_every_prompt_names_the_others(questions: int) -> None:
    prompts = make_prompts("train", 60, seed=3, questions=questions)
    assert Counter(prompt.source for prompt in prompts) == dict.fromkeys(GOLD_OF_ALL, 12)
    assert len({prompt.key for prompt in prompts}) == 60
    problems = {kind.problem: name for name, kind in ALL_KINDS.items()}
    for first in range(0, 60, questions):
        about = prompts[first : first + questions]
        assert len({digest(prompt.images[0]) for prompt in about}) == 1
        assert len({prompt.source for prompt in about}) == questions
        for prompt in about:
            assert prompt.answer == str(GOLD_OF_ALL[prompt.source](facts(prompt)))
            assert prompt.metadata["description"] == describe(facts(prompt))
            others = {problems[one["problem"]]: one["answer"] for one in prompt.metadata["questions"]}
            assert others.keys() == ALL_KINDS.keys() - {prompt.source}
            assert others == {name: str(GOLD_OF_ALL[name](facts(prompt))) for name in others}
    assert len({digest(prompt.images[0]) for prompt in prompts}) == 60 // questions


def test_one_question_a_picture_is_what_it_was_and_a_wrong_number_is_refused() -> None:
    assert all("questions" not in prompt.metadata for prompt in make_prompts("train", 6, 1))
    assert make_prompts("train", 6, 1, questions=1)[5].answer == make_prompts("train", 6, 1)[5].answer
    for wrong in (0, len(ALL_KINDS) + 1):
        with pytest.raises(ValueError, match=f"questions={wrong} is not allowed: it must be 1 ... 5"):
            make_prompts("train", 1, 1, questions=wrong)


# ---------------------------------------------------------------- demonstrations
def test_demonstrations_of_several_questions_are_of_all_kinds() -> None:
    samples = make_demonstrations(40, seed=2, questions=3)
    assert Counter((sample.template, sample.prompt.source) for sample in samples) == {
        (template, kind): 4 for template in ("see_think", "caption_reasoner") for kind in GOLD_OF_ALL
    }
    for sample in samples:
        check_demonstration(sample)


def test_demonstrations_keep_the_strict_layout_and_reason_correctly() -> None:
    samples = make_demonstrations(48, seed=2)
    assert Counter((sample.template, sample.prompt.source) for sample in samples) == {
        (template, kind): 8 for template in ("see_think", "caption_reasoner") for kind in KINDS
    }
    for sample in samples:
        check_demonstration(sample)


def check_demonstration(sample: SftSample) -> None:
    prompt, digits = sample.prompt, facts(sample.prompt)
    assert prompt.answer == str(GOLD_OF_ALL[prompt.source](digits))
    parsed = SHIPPED.by_name[sample.template].parse(sample.response)
    assert parsed is not None and parsed.answer == prompt.answer
    assert re.findall(r"\d+", parsed.blocks["think"])[-1] == prompt.answer
    if sample.template == "see_think":
        assert (
            parsed.blocks["description"] == describe(digits) and sample.description is None and len(prompt.images) == 1
        )
        assert "  " not in sample.response
    else:
        assert sample.description == describe(digits) and prompt.images == ()


def test_demonstrations_are_no_copies_of_the_prompts() -> None:
    drawn = {digest(image) for sample in make_demonstrations(40, 1) for image in sample.prompt.images}
    assert not drawn & {digest(prompt.images[0]) for prompt in make_prompts("train", 40, 1)}


# ---------------------------------------------------------------- the tiny model
def texts() -> list[str]:
    found = []
    for sample in make_demonstrations(40, 1):
        problem, description = sample.prompt.problem, sample.description
        found.append(
            SEE_THINK.user_text(problem) if description is None else CAPTION_REASONER.user_text(problem, 0, description)
        )
        found.append(sample.response)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    define_missing_torchvision_ops()
    folder = tmp_path_factory.mktemp("tiny") / "base"
    create_tiny_model(folder, texts(), seed=1)
    return folder


def test_any_text_survives_the_tokenizer_and_digits_stand_alone() -> None:
    tokenizer = train_tokenizer(texts())
    for text in ("größer 数字 🙂\n\n x", "\\boxed{1234}", *texts()[:6]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("1234567").ids) == 7


def test_ids_in_the_config_are_the_tokenizers(base: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    vocabulary = tokenizer.get_vocab()
    assert config.image_token_id == vocabulary["<|image_pad|>"] and config.video_token_id == vocabulary["<|video_pad|>"]
    assert config.vision_start_token_id == vocabulary["<|vision_start|>"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert vocabulary["<|im_end|>"] in GenerationConfig.from_pretrained(base).eos_token_id
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)
    rows = config.text_config.vocab_size
    assert rows > len(tokenizer) and rows % 64 == 0 and config.tie_word_embeddings


def test_the_checkpoint_has_the_names_and_size_of_a_small_qwen(base: Path) -> None:
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    assert 0.5e6 < sum(int(np.prod(shape)) for shape in shapes.values()) < 1.0e6
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"} <= set(shapes)
    assert "lm_head.weight" not in shapes  # tied


def test_the_seed_decides_the_weights(base: Path, tmp_path: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    create_tiny_model(tmp_path / "same", texts(), seed=1)
    create_tiny_model(tmp_path / "other", texts(), seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [(folder / "model.safetensors").read_bytes() for folder in (base, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_picture_goes_through_processor_and_model(base: Path) -> None:
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    prompt = next(prompt for prompt in make_prompts("train", 40, 1) if len(facts(prompt)) == 3)
    ours = Processor.from_pretrained(str(base))
    image = ours.encode_image(prompt.images[0])
    ids = ours.expand(ours.prompt_ids(SEE_THINK.user_text(prompt.problem), 1), [image.grid_thw])
    assert image.grid_thw == (1, 2, 6) and ids.count(ours.image_token_id) == 3  # one visual token a digit
    auto = AutoProcessor.from_pretrained(base)
    content = [{"type": "image"}, {"type": "text", "text": SEE_THINK.user_text(prompt.problem)}]
    text = auto.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = auto(text=[text], images=[prompt.images[0]], return_tensors="pt")
    assert batch["input_ids"][0].tolist() == list(ids)
    torch.testing.assert_close(batch["pixel_values"], image.pixel_values, atol=1e-3, rtol=0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (1, len(ids), model.config.text_config.vocab_size) and bool(logits.isfinite().all())


# ---------------------------------------------------------------- the tool
def test_the_tool_builds_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("build_digits")
    counts = ["--train", "8", "--heldout", "5", "--demonstrations", "16"]
    arguments = ["--out", str(tmp_path / "quickstart"), *counts]
    tool.main(arguments)
    sizes = {
        name: len(ShardDataset(expand_shards([f"{tmp_path}/quickstart/data/{name}-*.tar"], "data")))
        for name in ("train", "heldout", "cold_start")
    }
    assert sizes == {"train": 8, "heldout": 5, "cold_start": 16}
    assert json.loads((tmp_path / "quickstart/base/config.json").read_text())["model_type"] == "qwen2_5_vl"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "quickstart").rglob("*")}
    capsys.readouterr()
    tool.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "quickstart").rglob("*")} == files
    (tmp_path / "quickstart/data/train-00000.tar").write_bytes(b"cut")
    tool.main(arguments)
    assert "nothing to do" not in capsys.readouterr().out
    tool.main([*arguments, "--seed", "2"])
    assert "nothing to do" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--train", "0"], ["--seed", "-1"]])
def test_the_tool_names_a_wrong_argument(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_tool("build_digits").main(["--out", str(tmp_path), *wrong])
    assert f"{wrong[0]} {wrong[1]}: it must be" in capsys.readouterr().err
