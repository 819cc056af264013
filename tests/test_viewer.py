"""What the viewer is given: saved steps with the advantages that they were trained with, evaluations, images, files."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_sr1.cli import main
from megatron_sr1.cli.viewing import viewed_run
from megatron_sr1.config import dump_config, load_config
from megatron_sr1.data import write_shards
from megatron_sr1.report.runs import read_run
from megatron_sr1.report.starts import config_digest, note_start, read_starts
from megatron_sr1.report.viewer import write
from megatron_sr1.report.viewer.chunks import bucket_of
from megatron_sr1.report.viewer.shown import ShownGroup, ShownSample, ShownSet
from megatron_sr1.training.live_groups import live_groups, step_advantages
from megatron_sr1.training.recorder import stream_masks
from megatron_sr1.types import Question, Reading, Rollout
from tests.batch_cases import GOOD, their_rewards, two_groups
from tests.credit_cases import SavedRun, Saver, with_text
from tests.test_report import Page


@pytest.fixture
def saver(tmp_path: Path, tiny_model_dir: str) -> Saver:
    return Saver(tmp_path / "run", tiny_model_dir)


def look(run: SavedRun, folder: Path, step: int = 0) -> tuple[ShownSet, list[ShownGroup]]:
    """One step of the run, as the command shows it."""
    folder.mkdir(exist_ok=True)
    shown = viewed_run(read_run(run.folder), folder)
    found = next(one for one in shown.sets if one.name == str(step)).make()
    return found, list(found.groups)


def samples_of(groups: list[ShownGroup]) -> list[ShownSample]:
    return [sample for group in groups for sample in group.samples]


def change_lines(run: SavedRun, change: Callable[[dict[str, Any]], Any]) -> None:
    """`change` is given each line, and returns another one or changes this."""
    (path,) = (run.folder / "rollouts").glob("*.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    changed = [change(line) or line for line in lines]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in changed)


# ---------------------------------------------------------------- steps
@pytest.mark.parametrize("preset", ["vision_sr1", "perception_credit", "gdpo", "summed"])
def test_advantages_are_those_of_the_trainer(saver: Saver, tmp_path: Path, preset: str) -> None:
    """Of samples, of responses, of tokens; and which groups are dead, which samples are pulled apart."""
    run = saver.save(f"objective.preset={preset}", rewards=their_rewards())
    shown, groups = look(run, tmp_path / "images")
    ledger, _ = run.rollouts.trained
    expected = step_advantages(ledger, run.preset, run.config.objective)  # [S, B, M]
    names = [stream.name for stream in run.preset.streams]
    assert [stream.name for stream in shown.streams] == names and "advantage" not in shown.absent
    samples = samples_of(groups)
    for row, name in enumerate(names):
        assert [sample.advantages[name] for sample in samples] == pytest.approx(expected[row, :, 0].tolist())
    for index, sample in enumerate(samples):
        tracks = run.rollouts.tracks[index // 2]
        for response in sample.responses:
            track = tracks.get((index % 2, 0 if response.pass_name == "first" else 1))
            if track is not None:
                bits = [[bits >> row & 1 for bits in response.streams or ()] for row in range(len(names))]
                assert bits == stream_masks(track, len(names)).long().tolist()
                assert list(response.advantages) == pytest.approx(expected[:, index, 0].tolist())
    _, kept = live_groups(run.rollouts.ledger, run.preset, run.config.objective)
    assert [("dead" in group.samples[0].filters) for group in groups] == (~kept).tolist()
    weighted = expected[[stream.loss_weight != 0 for stream in run.preset.streams], :, 0]
    apart = ((weighted > 0).any(0) & (weighted < 0).any(0)).tolist()
    assert [("opposite" in sample.filters) for sample in samples] == apart
    assert any(apart) == (preset in ("vision_sr1", "perception_credit"))


def test_a_response_is_its_tokens_and_its_blocks(saver: Saver, tmp_path: Path) -> None:
    groups = two_groups(saver.processor)
    told = GOOD.replace("3 7", "𝟛é")
    groups[0] = replace(groups[0], pairs=(with_text(saver.processor, groups[0].pairs[0], told), groups[0].pairs[1]))
    run = saver.save(groups=groups)
    _, shown = look(run, tmp_path / "images")
    first = shown[0].samples[0].responses[0]
    assert first.tokens is not None and first.text == "".join(first.tokens) == f"{told}<|im_end|>"
    assert first.num_tokens == len(first.tokens) and first.surprise == (0.1,) * first.num_tokens
    assert [(name, first.text[start:end]) for name, start, end in first.blocks] == [
        ("description", told[: told.index(" <think>")]),
        ("think", "<think> 3 + 7 = 10 </think>"),
        ("answer", r"\boxed{10}"),
    ]
    assert "What is the sum of all digits?" in shown[0].prompt and "[image: " in shown[0].prompt
    assert "<|image_pad|>" not in shown[0].prompt
    assert [sample.filters >= {"undescribed"} for sample in samples_of(shown)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("measured", "note"),
    [
        ({}, "Nothing was trained in this step"),
        ({"grad_norm": None, "skipped_updates": 1.0}, "1 optimizer steps of it were skipped"),
        ({"grad_norm": 1.0, "skipped_updates": 0.0}, ""),
    ],
)
def test_what_has_moved_no_weight_says_so(saver: Saver, tmp_path: Path, measured: dict[str, Any], note: str) -> None:
    run = saver.save()
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 0, **measured}) + "\n")
    notes = look(run, tmp_path / "images")[0].notes
    assert (note in notes[0]) if note else not notes


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (("objective.kl_in=reward", "objective.kl_coef=0.1", "objective.kl_estimator=k1"), "kl_in=reward"),
        (("objective.preset=ves_rft",), "contrast"),
    ],
)
def test_a_stream_whose_reward_was_not_saved_has_no_advantage(
    saver: Saver, tmp_path: Path, words: tuple[str, ...], unknown: str
) -> None:
    shown, groups = look(saver.save(*words), tmp_path / "images")
    streams = [stream for stream in shown.streams if stream.unknown]
    assert streams and all(unknown in stream.unknown for stream in streams)
    assert all(sample.advantages[stream.name] is None for sample in samples_of(groups) for stream in streams)
    assert shown.absent["dead"] == shown.absent["opposite"] == streams[0].unknown
    assert not any(sample.filters & {"dead", "opposite"} for sample in samples_of(groups))


def test_a_reward_that_is_not_finite_is_shown_as_it_is(saver: Saver, tmp_path: Path) -> None:
    run = saver.save(rewards=their_rewards() | {"acc": torch.tensor([math.nan, 0.0, math.inf, 0.0])})
    shown, groups = look(run, tmp_path / "images")
    assert "not all of its rewards are finite" in shown.absent["advantage"]
    assert ["not_finite" in sample.filters for sample in samples_of(groups)] == [True, False, True, False]
    main(["report", str(run.folder), "--out", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    rewards = page.data["r0-s0"]["rewards"]["acc"]
    assert rewards == ["NaN", 0.0, "Infinity", 0.0] and page.data["r0-s0-0"][0]["samples"][0]["rewards"]["acc"] == "NaN"


def test_groups_that_are_skipped_or_dropped(saver: Saver, tmp_path: Path) -> None:
    one, two = two_groups(saver.processor)
    words = ("rollout.prompts_per_step=2", "rollout.dynamic_sampling=2")
    how = {"places": (0, None), "skipped": {1: "<no> number"}, "rounds": 1}
    run = saver.save(*words, groups=[one, replace(two, group_id=2)], rewards=their_rewards(), **how)
    shown, found = look(run, tmp_path / "images")
    assert "Prompt 1 could not be graded and was skipped: <no> number" in shown.notes
    assert shown.notes[0].startswith("Dynamic sampling: 1 further rounds, 1 prompts")
    assert ["dropped" in sample.filters for sample in samples_of(found)] == [False, False, True, True]
    assert [bool(sample.advantages) for sample in samples_of(found)] == [True, True, False, False]
    assert "dropped" not in shown.absent and "advantage" not in shown.absent


def test_passes_of_any_kind(saver: Saver, tmp_path: Path) -> None:
    """A second one of two samples, and an endpoint's with a question of its own, without ids."""
    passes = "objective.passes=[{name: second, samples: 2}, {name: reader, reader: endpoint}]"
    groups = []
    for group in two_groups(saver.processor):
        pairs = []
        for pair in group.pairs:
            if pair.second is not None:
                other = Rollout("x", (), (), "It is <b>7</b>", (), "length", 0)
                further = (
                    Reading("second", 1, pair.second, pair.description),
                    Reading("reader", 0, other, "a text", Question("Which?", "7")),
                )
                pair = replace(pair, further=further)
            pairs.append(pair)
        groups.append(replace(group, pairs=tuple(pairs)))
    right = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    run = saver.save(
        passes,
        "rewards.judge.url=http://127.0.0.1:1/v1",
        "rewards.judge.model=m",
        groups=groups,
        rewards=their_rewards() | {"acc_vis": right, "fmt_vis": right},
    )
    shown, found = look(run, tmp_path / "images")
    assert "advantage" not in shown.absent
    sample = found[0].samples[0]
    assert [(one.pass_name, one.number, one.right) for one in sample.responses] == [
        ("first", 0, True),
        ("second", 0, False),
        ("second", 1, True),
        ("reader", 0, False),
    ]
    second, further, reader = sample.responses[1:]
    expected = step_advantages(run.rollouts.ledger, run.preset, run.config.objective)
    assert list(second.advantages) == pytest.approx(expected[:, 0, 0].tolist())
    assert list(further.advantages) == pytest.approx(expected[:, 0, 1].tolist())
    assert sample.advantages["visual"] == pytest.approx(expected[1, 0].mean().item())
    assert (reader.tokens, reader.num_tokens, reader.cut, reader.question) == (None, None, True, ("Which?", "7"))
    assert sample.rewards["acc_vis"] == [0.0, 1.0] and "cut" in sample.filters


def test_prompts_of_text_alone_and_of_several_images(saver: Saver, tmp_path: Path) -> None:
    one, two = two_groups(saver.processor)
    grid = saver.processor.grid(one.prompt.images[0].size)
    plain = saver.processor.prompt_ids("Say 10", 0)
    both = saver.processor.expand(saver.processor.prompt_ids("Look", 2), [grid, grid])
    pairs = tuple(
        replace(pair, first=replace(pair.first, prompt_ids=plain), second=None, description=None) for pair in one.pairs
    )
    one = replace(one, prompt=replace(one.prompt, images=()), pairs=pairs)
    pairs = tuple(replace(pair, first=replace(pair.first, prompt_ids=both)) for pair in two.pairs)
    two = replace(two, prompt=replace(two.prompt, images=two.prompt.images * 2), pairs=pairs)
    shards = write_shards([one.prompt, two.prompt], tmp_path / "data", "train", 2)
    run = saver.save(f"data.train=[{shards[0]}]", groups=[one, two])
    shown, (first, second) = look(run, tmp_path / "images")
    assert "advantage" not in shown.absent
    assert (first.images, first.no_images) == ((), "the prompt has no image") and len(second.images) == 2
    assert not any("undescribed" in sample.filters for sample in first.samples)
    assert second.prompt.count("[image: ") == 2


def test_without_its_tokenizer_a_step_is_texts(saver: Saver, tmp_path: Path) -> None:
    run = saver.save()
    text = (run.folder / "config.yaml").read_text().replace(saver.hf_dir, str(tmp_path / "gone"))
    (run.folder / "config.yaml").write_text(text)
    shown, groups = look(run, tmp_path / "images")
    assert "is no folder, and its tokenizer is needed" in shown.absent["advantage"] == shown.absent["surprise"]
    response = groups[0].samples[0].responses[0]
    assert response.tokens is None and response.text == GOOD and groups[0].samples[0].rewards["acc"] == 1.0
    (run.folder / "hf").mkdir()  # half written
    assert "is no folder, and its tokenizer is needed" in look(run, tmp_path / "images")[0].absent["advantage"]
    (run.folder / "hf").rmdir()
    (run.folder / "hf").symlink_to(saver.hf_dir)
    assert "advantage" not in look(run, tmp_path / "images")[0].absent, "the run's own export has it"


def test_of_lines_without_their_configuration_texts_are_left(saver: Saver, tmp_path: Path) -> None:
    run = saver.save()
    (run.folder / "config.yaml").unlink()
    shown, groups = look(run, tmp_path / "images")
    assert "no config.yaml" in shown.absent["advantage"] and "no config.yaml" in groups[0].no_images
    assert "no config.yaml" in shown.absent["undescribed"] and not samples_of(groups)[3].filters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.pop("answer") and None, "a sample has no answer,"),
        (lambda line: line | {"group_id": [1]}, "a sample has no group_id,"),
        (lambda line: line | {"rewards": {"acc": "high"}}, "a sample has no rewards,"),
        (lambda line: line["first"].pop("prompt_ids") and None, "a sample has no first.prompt_ids,"),
        (lambda line: line | {"further": [{"pass_name": "x"}]}, "a sample has no further[0].number,"),
        (lambda line: line["first"].update(prompt_ids=[1.5]), "a sample has no first.prompt_ids,"),
        (lambda line: line["first"].update(generator_logprobs=[None]), "a sample has no first.generator_logprobs,"),
        (lambda line: line["first"].update(queued_at="x"), "step_000000.jsonl"),
    ],
)
def test_a_damaged_step_is_named_and_the_rest_is_shown(
    saver: Saver, tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saver.save()
    change_lines(run, change)
    main(["report", str(run.folder)])
    page = Page((run.folder / "report.html").read_text(encoding="utf-8"))
    (told,) = page.data["index"]["runs"][0]["sets"]
    assert message in told["problem"] and told["samples"] == 0
    assert "not shown: run, step 0: " in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda first: first.pop("weight_version"), lambda first: first.update(odd=1)])
def test_fields_of_other_releases_leave_the_texts(saver: Saver, tmp_path: Path, change: Any) -> None:
    run = saver.save()
    change_lines(run, lambda line: change(line["first"]) and None)
    shown, groups = look(run, tmp_path / "images")
    assert "step_000000.jsonl" in shown.absent["advantage"] and len(samples_of(groups)) == 4


def test_a_step_that_is_being_written_is_not_shown_as_whole(saver: Saver, tmp_path: Path) -> None:
    run = saver.save()
    (path,) = (run.folder / "rollouts").glob("*.gz")
    path.rename(path.with_name("step_000000.0-of-2.jsonl.gz"))
    with pytest.raises(ValueError, match="not all of one run"):
        look(run, tmp_path / "images")


def test_files_of_earlier_releases_are_read(saver: Saver, tmp_path: Path) -> None:
    """One file, without templates, passes and times."""
    run = saver.save()
    (path,) = (run.folder / "rollouts").glob("*.gz")
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    path.unlink()
    for line in lines:
        del line["templates"], line["passes"]
        for name in ("queued_at", "finished_at"):
            line["first"].pop(name)
    (run.folder / "rollouts" / "step_000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown, groups = look(run, tmp_path / "images")
    assert "advantage" not in shown.absent and len(samples_of(groups)) == 4


# ---------------------------------------------------------------- whose objective
def test_each_step_has_the_objective_of_its_start(saver: Saver, tmp_path: Path) -> None:
    run = saver.save(rewards=their_rewards())
    for step in (1, 2):
        (path,) = (run.folder / "rollouts").glob("step_000000.0*")
        path.with_name(path.name.replace("000000", f"00000{step}")).write_bytes(path.read_bytes())
    folder, first = run.folder, (run.folder / "config.yaml").read_text()
    second = dump_config(load_config(folder / "config.yaml", ["objective.advantage=centred"]))
    (folder / "config.0.yaml").write_text(first)
    (folder / "config.yaml").write_text(second)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1)))
    assert "does not tell which one made step 0" in look(run, tmp_path / "i")[0].absent["advantage"]
    note_start(folder, first, 0, {})
    note_start(folder, second, 1, {})
    note_start(folder, second, None, {})  # an evaluation
    scale = [look(run, tmp_path / "i", step)[1][0].samples[0].advantages["answer"] for step in (0, 1)]
    assert scale == pytest.approx([math.sqrt(0.5), 0.5], rel=1e-4)
    assert "step 2 is not done since then" in look(run, tmp_path / "i", 2)[0].absent["advantage"]
    (folder / "config.0.yaml").write_text(first.replace("kl_coef: 0.0", "kl_coef: 0.5"))
    assert "not in the folder any more" in look(run, tmp_path / "i")[0].absent["advantage"]


def test_a_torn_line_of_starts_is_no_start(tmp_path: Path) -> None:
    note_start(tmp_path, "a", 0, {"ranks": 2})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 3, "con')
    assert [start["step"] for start in read_starts(tmp_path)] == [0]
    note_start(tmp_path, "b", 5, {})
    assert [(start["step"], start["config"]) for start in read_starts(tmp_path)] == [
        (0, config_digest("a")),
        (5, config_digest("b")),
    ]
    (tmp_path / "starts.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"starts\.jsonl:1 is no start"):
        read_starts(tmp_path)


# ---------------------------------------------------------------- images
@pytest.fixture
def shown_run(saver: Saver, tmp_path: Path) -> SavedRun:
    """With its data."""
    groups = two_groups(saver.processor)
    (shard,) = write_shards([group.prompt for group in groups], tmp_path / "data", "train", 2)
    return saver.save(f"data.train=[{shard}]", groups=groups)


def test_images_come_from_the_data_by_their_keys(shown_run: SavedRun, tmp_path: Path) -> None:
    _, groups = look(shown_run, tmp_path / "images")
    for number, group in enumerate(groups):
        (name,) = group.images
        with Image.open(tmp_path / "images" / name) as image:
            assert (image.size, image.getpixel((5, 5))) == ((56, 28), (200 * number, 10, 10))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda prompt: replace(prompt, key=f"other-{prompt.key}"), "has no sample 'p0'"),
        (lambda prompt: replace(prompt, problem="Something else?"), "asks something else under 'p0'"),
    ],
)
def test_images_of_other_data_are_not_shown(shown_run: SavedRun, tmp_path: Path, change: Any, reason: str) -> None:
    prompts = [change(group.prompt) for group in shown_run.rollouts.groups]
    write_shards(prompts, tmp_path / "data", "train", 2)
    _, groups = look(shown_run, tmp_path / "images")
    assert not groups[0].images and reason in groups[0].no_images


def test_images_are_those_that_the_checkpoint_has_noted(shown_run: SavedRun, tmp_path: Path) -> None:
    """Other pictures under the same keys and questions."""
    progress = shown_run.folder / "checkpoints" / "step_000001" / "progress.json"
    progress.parent.mkdir(parents=True)
    progress.write_text('{"stream": null}')
    assert look(shown_run, tmp_path / "images")[1][0].images
    progress.write_text(json.dumps({"stream": {"shards": [["train-00000.tar", "another fingerprint"]]}}))
    _, groups = look(shown_run, tmp_path / "images")
    assert not groups[0].images and "its shards have other contents" in groups[0].no_images


@pytest.mark.parametrize(
    ("data", "reason"), [("nowhere-*.tar", "cannot be read"), ("https://127.0.0.1:1/t.tar", "a report does not fetch")]
)
def test_data_that_are_not_here_are_the_reason(saver: Saver, tmp_path: Path, data: str, reason: str) -> None:
    _, groups = look(saver.save(f"data.train=[{data}]"), tmp_path / "images")
    assert not groups[0].images and reason in groups[0].no_images


# ---------------------------------------------------------------- evaluations
def test_records_are_shown_with_their_controls(tmp_path: Path, saver: Saver) -> None:
    run = saver.save().folder
    response = {"text": GOOD, "tokens": 20, "finish_reason": "stop"}
    control = {"response": response, "right": True, "lent_by": "h/9", "same_question": True, "reader": ""}
    sample = {
        **{"first": response, "description": "3 7", "description_cut": False, "second": response, "judge": None},
        **{"rewards": {"acc": 1.0, "acc_vis": 0.0, "leak": 1.0}, "faithful": False},
        "further": {"reader": [response] * 2},
        **{"said": None, "controls": {"shuffled": control, "gold": control | {"response": None}}},
    }
    record = {"source": "sum", "problem": "What?", "answer": "10", "num_images": 1, "template": "see_think"}
    (run / "eval").mkdir()
    tree = {"label": "after", "step": 3, "summary": {}, "by_source": {}, "examples": []}
    (run / "eval" / "after.json").write_text(json.dumps(tree))
    lines = [json.dumps(record | {"key": f"h/{n}", "samples": [sample], "described": True}) for n in range(3)]
    (run / "eval" / "after.jsonl").write_text("\n".join([*lines[:2], '{"key": 3}', lines[2], '{"torn']))
    main(["report", str(run), "--out", str(tmp_path / "r.html")])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    told = page.data["index"]["runs"][0]["sets"][1]
    assert (told["title"], told["samples"]) == ("evaluation after", 2)
    assert "after.jsonl:3 is not a record" in told["problem"]
    (shown,) = page.data["r0-s1-0"][0]["samples"]
    assert [(one["pass_name"], one["number"], one.get("right")) for one in shown["responses"]] == [
        *(("first", 0, True), ("second", 0, False), ("reader", 0, None), ("reader", 1, None)),
        ("control: shuffled", 0, True),
    ]
    assert shown["responses"][4]["facts"] == {"lent by": "h/9"} and shown["rewards"]["faithful"] == 0.0
    assert [block[0] for block in shown["responses"][0]["blocks"]] == ["description", "think", "answer"]
    names = {one["bit"]: one["name"] for one in page.data["index"]["filters"]}
    assert {names[bit] for bit in names if shown["filters"] & bit} == {"shortcut", "leak"}


# ---------------------------------------------------------------- files
def test_a_small_page_is_one_file_and_a_large_one_has_a_folder(
    shown_run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page" / "r.html"
    main(["report", str(shown_run.folder), "--out", str(out)])
    inside = Page(out.read_text(encoding="utf-8")).data
    assert [path.name for path in out.parent.iterdir()] == ["r.html"] and len(inside["images"]) == 2
    monkeypatch.setattr(write, "INSIDE_BYTES", 0)
    main(["report", str(shown_run.folder), "--out", str(out)])
    folder = out.with_name("r_files")
    written = Page(out.read_text(encoding="utf-8")).data
    assert written.keys() == {"index"} and written["index"]["stamp"] != inside["index"]["stamp"]
    bucket = f"r0-p{bucket_of('p0')}"
    for name in ("r0-s0", "r0-s0-0", bucket):
        stamped = f"{written['index']['stamp']}-{name}"
        head, value = (folder / f"{stamped}.js").read_text().removesuffix(");\n").split(",", 1)
        assert head == f'sr1Chunk("{stamped}"' and json.loads(value) == inside[name]
    ((*where, means, _),) = inside[bucket]["p0"]
    assert where == [0, 0, 2] and means["acc"] == 1.0 and means["leak"] == 0.0
    assert {path.name for path in (folder / "images").iterdir()} == inside["images"].keys()
    main(["report", str(shown_run.folder), "--out", str(out)])  # again: in the place of the first
    monkeypatch.undo()
    main(["report", str(shown_run.folder), "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["r.html"], "what is inside now is not beside any more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "x"], "--step x is not allowed"),
        (["--step", "7"], "has no rollouts of step 7. It has those of 0."),
        (["--port", "80"], "Add --serve"),
        (["--serve", "--host", "0.0.0.0"], "served on this machine alone"),
        (["--serve", "--host", "::1"], "served on this machine alone"),
        (["--serve", "--port", "70000"], "it must be 0 ... 65535"),
    ],
)
def test_mistakes_are_one_line(
    saver: Saver, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saver.save()
    with pytest.raises(SystemExit):
        main(["report", str(run.folder), *words])
    written = capsys.readouterr().err.strip()
    assert message in " ".join(written.split()) and "\n" not in written


def test_the_command_serves_until_ctrl_c(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: ThreadingHTTPServer) -> None:
        assert server.server_address[0] == "127.0.0.1"
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    run = saver.save()
    main(["report", str(run.folder), "--serve"])
    printed = capsys.readouterr().out
    assert "serving http://127.0.0.1:" in printed and (run.folder / "report.html").is_file()
