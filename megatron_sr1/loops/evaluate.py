"""Evaluation of both passes on held-out prompts: answered, graded and recorded (`answering.py`), judged, summarised.

Prompts without images are answered in one pass, with the plain reasoning template: there is nothing to describe.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_sr1.config import Config, EvaluateConfig
from megatron_sr1.data import open_dataset
from megatron_sr1.evaluation import (
    Identity,
    check_identity,
    check_same_data,
    digest_of,
    drop_unfinished,
    file_digests,
    judge_records,
    keep_identity,
    model_digest,
    print_controls,
    print_sources,
)
from megatron_sr1.evaluation.best import best_step, measured
from megatron_sr1.evaluation.files import EvaluationFiles, check_measured, write_summary
from megatron_sr1.evaluation.heldout import Heldout
from megatron_sr1.evaluation.parts import RecordParts
from megatron_sr1.import_path import is_import_path, source_digest
from megatron_sr1.judge import Judge
from megatron_sr1.loops.answering import answer, evaluation_sampling
from megatron_sr1.loops.control_material import check_material
from megatron_sr1.loops.controls import ask_controls, chosen_controls
from megatron_sr1.loops.generation import build_generator, engine_ranks, prompt_check
from megatron_sr1.loops.run import Run, open_run
from megatron_sr1.metrics.pace import EVALUATION
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.prompts import OURS
from megatron_sr1.report import print_table, summary_rows
from megatron_sr1.rewards import (
    find_reward,
)
from megatron_sr1.rollout import deal_prompts
from megatron_sr1.streams import Preset, own_code, preset_of
from megatron_sr1.types import SECOND, Generator, Prompt, RolloutGroup, SftSample

_RECORDED = ("max_prompts", "samples", "temperature", "chunk_prompts", "rounded_decimals")
_FIELDS = {"gold_field": "facts", "other_questions": ""}  # with what earlier releases would have read
_PIXELS = ("min_pixels", "max_pixels")
_LOG_WIDTH = 120  # characters of a table in a file


def run_evaluate(config: Config, platform: Platform, *, restart: bool = False) -> None:
    """Evaluates the weights of `model.hf_dir` on `data.heldout`: tables, `<run_dir>/eval/evaluate.json` and, for every
    sample, `evaluate.jsonl`. One that was interrupted goes on with what is not recorded, to the same bytes; one that
    is complete starts no engine, and asks the judge for verdicts that are missing.

    Args:
        restart: what an earlier evaluation left in the folder is removed first.

    Raises:
        ValueError: what is in the folder was made of another model, other data or another sampling.
        ConfigError: the judge's key is not in the environment, or the judge refuses every question.
    """
    label, settings = "evaluate", config.evaluate
    with open_run(config, platform, "evaluate") as run:
        with run.stage("data"):
            heldout = heldout_prompts(run)
        files = EvaluationFiles(run.folder, label)
        model = model_digest(platform.ranks.gather(file_digests(Path(config.model.hf_dir), platform.ranks)))
        identity = _identity(config, heldout, model)
        keys, parts = platform.on_main(lambda: _resume(files, identity, restart))
        recorded = heldout.places(keys)
        run.accept()
        engines = functools.cache(lambda: build_generator(run))  # not where all is answered
        reader = config.objective.reference_dir
        with run.stage(EVALUATION):
            answer(run, engines, heldout, files, digest_of(identity), 0, recorded, parts)
            ask_controls(run, engines, files, 0, reader)
        if platform.is_main:  # the others are done: no collective may wait for a judge
            if settings.judge_url:
                _judge(run, files, settings)
            settings = replace(settings, controls=chosen_controls(config, reader))
            summary, by_source = write_summary(files, identity, heldout, settings, 0)
            console = Console() if Console().is_terminal else Console(width=_LOG_WIDTH)
            print_table(console, summary_rows(run.folder))
            print_sources(console, summary, by_source)
            print_controls(console, summary, by_source)


class Evaluations:
    """Those of a training run, of the weights that its engines hold: before, now and then, after. Collective."""

    def __init__(self, run: Run, generator: Generator, heldout: Heldout) -> None:
        self._run, self._generator, self._heldout = run, generator, heldout

    def before(self, step: int) -> None:
        """Where the run begins, which is at step 0.

        Raises:
            ConfigError: the evaluation has no number `train.keep_best`; on every rank.
        """
        if step == 0:
            self._run.say(f"evaluating the starting point on {len(self._heldout)} held-out prompts")
            evaluate(self._run, self._generator, self._heldout, label="before", step=0)
        self._run.platform.on_main(self._check_best)

    def between(self, step: int) -> None:
        """Ahead of a step, not behind the last: a run that was stopped or killed in between makes it up."""
        every = self._run.config.train.evaluate_every
        if step and every and step % every == 0:
            evaluate(self._run, self._generator, self._heldout, label=f"step-{step}", step=step)
            self._say_best(step)

    def after(self, steps: int) -> list[RolloutGroup]:
        """Of the trained policy, after all `steps` of the run. Returns as `evaluate`."""
        self._run.say(f"evaluating the trained policy on {len(self._heldout)} held-out prompts")
        answers = evaluate(self._run, self._generator, self._heldout, label="after", step=steps)
        self._say_best(steps)
        return answers

    def _check_best(self) -> None:
        files = EvaluationFiles(self._run.folder, "before")
        if self._run.config.train.keep_best and files.summary.is_file():
            check_measured(files, self._run.config.train.keep_best)

    def _say_best(self, step: int) -> None:
        train, platform = self._run.config.train, self._run.platform
        if not (train.keep_best and platform.is_main):
            return
        found = measured(self._run.folder, train.keep_best)
        if best_step(found, train.keep_best_mode, [n for n in found if n]) == step:
            self._run.say(f"{train.keep_best} is {found[step]:.4g} after step {step}, the best so far")


class NoEvaluations:
    """Takes the place of `Evaluations` where there is nothing to evaluate with."""

    def before(self, step: int) -> None:
        """No evaluation."""

    def between(self, step: int) -> None:
        """No evaluation."""

    def after(self, steps: int) -> list[RolloutGroup]:
        """No answers."""
        return []


def evaluate(run: Run, generator: Generator, heldout: Heldout, *, label: str, step: int) -> list[RolloutGroup]:
    """Evaluates the weights that the generator holds; writes `eval/<label>.json` and `.jsonl`, from the beginning.
    Collective.

    Returns:
        On the main rank the answers to the first `evaluate.verify_export` prompts; [] on the others.
    """
    files = EvaluationFiles(run.folder, label)
    identity = _identity(run.config, heldout, f"the policy after step {step}")
    reader = run.config.objective.reference_dir or run.config.model.hf_dir
    if run.platform.is_main:
        files.remove()
        keep_identity(files.identity, identity)
    with run.stage(EVALUATION):
        answers = answer(run, lambda: generator, heldout, files, digest_of(identity), step)
        ask_controls(run, lambda: generator, files, step, reader)
        if run.platform.is_main:
            write_summary(files, identity, heldout, replace(run.config.evaluate, judge_url=""), step)
    return answers


def heldout_prompts(run: Run) -> Heldout:
    """The prompts of `data.heldout`, at most `evaluate.max_prompts` of them where that is not 0.

    Raises:
        ValueError: as `open_dataset`; more images in a prompt than rollout.max_images; templates that do not suit the
            model's chat template.
    """
    config, quarantine = run.config, run.quarantine("heldout")
    dataset = open_dataset(config.data, "heldout", quarantine)
    preset = preset_of(config)
    run.planner.check(preset.passes)
    fits, fields = prompt_check(run.planner, preset.passes.of), [getattr(config.evaluate, name) for name in _FIELDS]

    def check(sample: Prompt | SftSample) -> None:
        fits(sample)
        if isinstance(sample, Prompt):
            check_material(sample, *fields)

    heldout = Heldout(dataset, quarantine, config.evaluate.max_prompts, check, ranks=run.platform.ranks)
    heldout.divide(engine_ranks(run), partial(deal_prompts, run.processor, evaluation_sampling(config, preset)))
    heldout.check_images(config.rollout.max_images)
    return heldout


def check_heldout(run: Run, heldout: Heldout) -> None:
    """Whether a run that goes on is evaluated on the samples that it was evaluated on before, however `data.heldout` is
    spelled. Collective.

    Raises:
        ValueError: they are others.
    """
    if run.progress is not None:
        kept = EvaluationFiles(run.folder, "before").identity
        run.platform.on_main(lambda: check_same_data(kept, heldout.fingerprint, run.config.run_dir))


def _identity(config: Config, heldout: Heldout, model: str) -> Identity:
    """What the records depend on, by configuration key where there is one."""
    rollout, settings, preset = config.rollout, config.evaluate, preset_of(config)
    own = own_code(replace(config.objective, loss=""), preset.templates)
    code = {name: source_digest(function) for name, function in own.items()}
    system = config.model.system_prompt
    return {
        "the model": model,
        "the data": heldout.fingerprint,
        "the template": preset.template,
        **({"the passes": repr(preset.passes.later)} if preset.passes.later not in ((), (SECOND,)) else {}),
        **_readers(config, preset),
        **({"the templates": str(preset.asked)} if preset.asked != OURS else {}),
        **({"model.system_prompt": system} if system is not None else {}),
        **({"the rewards": ", ".join(f"{name} ({digest})" for name, digest in code.items())} if code else {}),
        **{f"model.{name}": limit for name in _PIXELS if (limit := getattr(config.model, name)) is not None},
        "seed": config.seed,
        "rollout.max_response_tokens": rollout.max_response_tokens,
        "rollout.max_description_tokens": rollout.max_description_tokens,
        **{f"evaluate.{name}": getattr(settings, name) for name in _RECORDED},
        **{f"evaluate.{name}": value for name in _FIELDS if (value := getattr(settings, name)) != _FIELDS[name]},
    }


def _readers(config: Config, preset: Preset) -> Identity:
    """Who reads later passes, and answers the questions of rewards, beside the model that is evaluated."""
    readers = {later.reader for later in preset.passes.later}
    asks = any("judge" in find_reward(name).needs for name in preset.rewards if is_import_path(name))
    found: dict[str, str] = {}
    if "reference" in readers:
        found["objective.reference_dir"] = config.objective.reference_dir
    if "endpoint" in readers or asks:
        judge = config.rewards.judge
        found |= {"rewards.judge.model": judge.model, "rewards.judge.url": judge.url}
        found["rewards.judge.parameters"] = json.dumps(judge.parameters, sort_keys=True)
    return found


def _resume(files: EvaluationFiles, identity: Identity, restart: bool) -> tuple[list[str], list[int]]:
    """What is answered already: the keys of the records, and the numbers of the samples of those in parts."""
    if restart:
        files.remove()
    check_identity(files.identity, identity)
    made_of = digest_of(identity)
    return drop_unfinished(files.records, made_of), RecordParts(files.parts).indices(made_of)


def _judge(run: Run, files: EvaluationFiles, settings: EvaluateConfig) -> None:
    run.say(f"asking {settings.judge_model} about the descriptions")
    with during("judge", math.inf), Judge(settings.judge) as judge:  # which has a patience of its own
        outcome = judge_records(
            files.records,
            judge.ask,
            settings.judge_model,
            settings.judge_concurrency,
            rounded=settings.rounded_decimals,
            template=preset_of(run.config).asked.second,
        )
    run.say(f"asked {outcome.num_asked} questions")
    if outcome.num_missing:
        run.say(
            f"{outcome.num_missing} verdicts are missing and are counted nowhere; the last one because: "
            f"{outcome.last_failure}. Run the command again to ask for them."
        )
