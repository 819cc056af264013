"""What a report with all rollouts of a run costs, to write and to look at.

    python -m benchmarks.report_page --rollouts 10000

The run is made here: its prompts are questions about digits, in a shard with their pictures; every rollout has two
passes, the first of about --tokens tokens, with ids, log-probs, rewards and measures of tokens that are drawn.
`megatron-sr1 report --step all` writes the page in a process of its own; then a headless Chromium opens it, from
file:// as a person would. In seconds, unless it says otherwise:

    write     the report, all of it: images, tokens, advantages
    cpu       of that, on all cores together
    peak      memory of that process, MiB
    page      of the page itself, MiB; beside it, the folder of chunks and images
    overview  until the page answers
    viewer    until one sample of a step is shown, everything loaded anew
    step      from step to step
    all       until the list of all rollouts of the run is there
    filter    until they are filtered
    sort      until they are sorted
    key       from one sample to the next, by its key
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting import empty_folder
from megatron_sr1.config import dump_config, load_config
from megatron_sr1.data import write_shards
from megatron_sr1.digits.questions import make_demonstrations, make_prompts
from megatron_sr1.digits.tiny_model import create_tiny_model
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import SEE_THINK
from megatron_sr1.streams import preset_of
from megatron_sr1.training.rollout_files import rollouts_file, steps_in, told_passes
from megatron_sr1.training.token_files import ENTROPY, GAP, MeasuredResponse, ResponseName, write_tokens
from megatron_sr1.types import Prompt
from tests.browser import MISSING, Browser, addresses, find_browser

SAMPLES, PER_STEP = 8, 64  # of a prompt; prompts
REWARDS = ("acc", "acc_vis", "fmt", "fmt_vis", "leak", "format")


def make_run(folder: Path, num_rollouts: int, num_tokens: int) -> Path:
    """A run's folder, with everything that its report reads."""
    steps = -(-num_rollouts // (SAMPLES * PER_STEP))
    prompts = make_prompts("train", PER_STEP * max(1, steps // 4), seed=0)  # each comes back three times
    (shard,) = write_shards(prompts, folder / "data", "train", len(prompts))
    texts = [text for one in make_demonstrations(200, seed=0) for text in (one.prompt.problem, one.response)]
    create_tiny_model(folder / "model", texts, seed=0)
    run = folder / "run"
    words = [f"run_dir={run}", f"model.hf_dir={folder / 'model'}", f"data.train=[{shard}]", "objective.kl_coef=0"]
    words += [f"rollout.prompts_per_step={PER_STEP}", f"rollout.samples_per_prompt={SAMPLES}"]
    config = load_config(None, [*words, f"train.batch_size={PER_STEP}"])
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    preset, processor = preset_of(config), Processor.from_pretrained(str(folder / "model"))
    same = {"templates": str(preset.asked), "passes": told_passes(preset.passes.later)}
    draw = random.Random(0)
    with (run / "metrics.jsonl").open("w") as metrics:
        for step in range(steps):
            path = rollouts_file(run / "rollouts", step)
            measured: list[MeasuredResponse] = []
            with gzip.open(path.with_name(f"{path.stem}.0-of-1.jsonl.gz"), "wt", compresslevel=1) as file:
                for group in range(PER_STEP):
                    prompt = prompts[(step * PER_STEP + group) % len(prompts)]
                    for line in _lines(group, prompt, processor, num_tokens, draw):
                        file.write(json.dumps({**line, **same}) + "\n")
                        measured += _measured(line)
            write_tokens(run / "rollouts", step, measured)
            metrics.write(json.dumps({"step": step, "reward/total": draw.random(), "seconds/train": 1.0}) + "\n")
    return run


def _lines(
    group: int, prompt: Prompt, processor: Processor, num_tokens: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    grids = [processor.grid(image.size) for image in prompt.images]
    prompt_ids = processor.expand(processor.prompt_ids(SEE_THINK.user_text(prompt.problem), len(grids)), grids)
    for sample in range(SAMPLES):
        description = f"The digits are {' '.join(str(draw.randrange(10)) for _ in range(3))} ."
        answer = prompt.answer if draw.random() < 0.5 else str(draw.randrange(30))
        last = rf"</think> \boxed{{{answer}}}"
        thought = " ".join(f"{draw.randrange(10)} + {draw.randrange(10)} =" for _ in range(num_tokens // 6))
        first = f"<description> {description} </description> <think> {thought} {last}"
        second = f"<think> {thought[: len(thought) // 3]} {last}"
        values = {name: float(draw.random() < 0.5) for name in REWARDS}
        texts = {"key": prompt.key, "problem": prompt.problem, "answer": prompt.answer}
        told = {"description": description, "description_cut": False, "rewards": values}
        passes = {
            name: _rollout(processor, text, prompt_ids, draw) for name, text in (("first", first), ("second", second))
        }
        yield {"group_id": group, **texts, "sample": sample, **told, **passes}


def _rollout(processor: Processor, text: str, prompt_ids: Sequence[int], draw: random.Random) -> dict[str, Any]:
    ids = processor.response_ids(text)
    made = {"rollout_id": "", "prompt_ids": prompt_ids, "response_ids": ids, "response_text": text}
    logprobs = [-draw.expovariate(2.0) for _ in ids]
    return {**made, "generator_logprobs": logprobs, "finish_reason": "stop", "weight_version": 0}


def _measured(line: dict[str, Any]) -> Iterator[MeasuredResponse]:
    for name in ("first", "second"):
        ids = line[name]["response_ids"]
        values = {GAP: 0.1 * torch.randn(len(ids)), ENTROPY: torch.rand(len(ids))}
        halves = {measure: value.to(torch.float16) for measure, value in values.items()}
        yield MeasuredResponse(ResponseName(line["group_id"], line["sample"], name, 0), ids, halves)


def write(run: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, of these on a core, and MiB at most."""
    code = "import resource, sys; from megatron_sr1.cli import main; main(sys.argv[1:]); "
    code += "used = resource.getrusage(resource.RUSAGE_SELF); "
    code += "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
    start = time.perf_counter()
    command = [sys.executable, "-c", code, "report", str(run), "--step", "all", "--out", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cpu, peak = map(float, printed.split()[-2:])
    return time.perf_counter() - start, cpu, peak


def timed(act: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def look(page: Path, browser: Browser, steps: int) -> dict[str, float]:
    """Seconds of each of the columns that a browser takes."""
    is_open = "document.querySelector('.pass')"
    heading = "(document.querySelector('.heading')?.textContent ?? '')"

    def viewer() -> None:
        browser.open(addresses(page, run="run", step=str(steps // 2), colour="gap"))
        browser.wait(is_open)

    def other_step() -> None:
        browser.press("]")
        browser.wait(f"{heading}.includes('step {steps // 2 + 1} ')")

    def all_steps() -> None:
        browser.choose("step", "all")
        browser.wait(
            "document.getElementById('list').querySelector('.row') && "
            f"document.getElementById('count').textContent.includes('of {steps * PER_STEP * SAMPLES} ')"
        )

    def filtered() -> None:
        browser.press("1")
        browser.wait(f"!document.getElementById('count').textContent.startsWith('{steps * PER_STEP * SAMPLES} ')")

    def sorts() -> None:
        browser.choose("sort", "advantage:answer")
        browser.wait("document.querySelector('.row .value')")

    def key() -> None:
        before = browser.value("location.hash")
        browser.press("j")
        browser.wait(f"location.hash !== {before!r}")

    found = {"overview": timed(lambda: browser.open(addresses(page))), "viewer": timed(viewer)}
    found["step"] = timed(other_step) if steps > 2 else float("nan")
    return found | {"all": timed(all_steps), "filter": timed(filtered), "sort": timed(sorts), "key": timed(key)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=300, help="of a first response, about")
    parser.add_argument("--keep", type=Path, help="a new folder that stays, with the run and its page")
    args = parser.parse_args(arguments)
    program = find_browser()
    if program is None:
        parser.error(MISSING)
    define_missing_torchvision_ops()
    if args.keep is not None:
        args.keep.mkdir(parents=True)
        report(args.keep, program, args.rollouts, args.tokens)
        return
    with empty_folder(None, "report-page") as folder:
        report(folder, program, args.rollouts, args.tokens)


def report(folder: Path, program: str, num_rollouts: int, num_tokens: int) -> None:
    """Makes the run, its page, and the line."""
    run, page = make_run(folder, num_rollouts, num_tokens), folder / "page" / "report.html"
    steps = len(steps_in(run / "rollouts"))
    seconds, cpu, peak = write(run, page)
    beside = sum(file.stat().st_size for file in page.with_name("report_files").rglob("*")) / 2**20
    print(f"{steps * PER_STEP * SAMPLES} rollouts in {steps} steps: write {seconds:.1f}, cpu {cpu:.1f}, ", end="")
    print(f"peak {peak:.0f} MiB, page {page.stat().st_size / 2**20:.2f} MiB, beside it {beside:.1f} MiB")
    browser = Browser(program)
    try:
        print(", ".join(f"{name} {value:.2f}" for name, value in look(page, browser, steps).items()))
        assert not browser.told, browser.told
    finally:
        browser.close()


if __name__ == "__main__":
    main()
