"""Does a contrast find the tokens that say what the image shows? On described digits that is known token by token.

    make quickstart
    python -m benchmarks.dependency --run runs/quickstart/grpo --model runs/quickstart/sft/hf

Takes the responses of a step that a run has saved, scores the first passes in their own context and under each contrast
(`megatron_sr1.training.contrasts`), and grades the log-prob gap of a token as a detector: AUC is the probability that a
token of the first kind has a larger gap than one of the second (Hanley and McNeil 1982), a tie counting half.

    digits        tokens with a digit in the description, against all other tokens of the response
    in block      the same against the other tokens of the description alone
    repeated      tokens with a digit behind the description, against the other tokens there: read from what was written
    second pass   tokens with a digit against the others, of responses that see no image: there is nothing to take
                  away, so every gap is 0 and the AUC is 0.5

The model should be the one that has written the responses: those of step 0 are the cold start's. With --measures the
numbers of the first contrast go into RUN/measures.json, which reports of sweeps show. One process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sr1.config import load_config
from megatron_sr1.data import ShardDataset, expand_shards
from megatron_sr1.platform import start_platform
from megatron_sr1.prompts import SEE_THINK
from megatron_sr1.streams import Contrast
from megatron_sr1.types import Scoring, TokenSequence

CONTRASTS = (
    Contrast("no image"),
    Contrast("masked 0.6", "masked", 0.6),
    Contrast("noise", "noise"),
    Contrast("description", "description"),
)


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """[n] values and [n] bool -> the share of pairs that are in the right order; nan where a kind is missing."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1 on; ties share their mean
    number, others = int(positive.sum()), int((~positive).sum())
    if number == 0 or others == 0:
        return float("nan")
    return float((ranks[positive].sum() - number * (number + 1) / 2) / (number * others))


def digit_tokens(processor: Any, ids: Sequence[int], text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token: whether it has a digit, whether it is of the description's block, whether it is behind it."""
    spans = processor.token_spans(ids)
    digit = np.array([any(c.isdigit() for c in text[start:end]) for start, end in spans])
    block = SEE_THINK.block(text, "description")
    first, last = block or (0, 0)
    inside = np.array([max(start, first) < min(end, last) for start, end in spans])
    behind = np.array([block is not None and start >= last for start, _ in spans])
    return digit, inside, behind


def gaps(
    policy: Any,
    processor: Any,
    config: Any,
    sequences: Sequence[TokenSequence],
    keys: Sequence[str],
    contrasts: Sequence[Contrast],
) -> Any:
    """By contrast, the gap [n] of each response; None where it has no other context."""
    from megatron_sr1.packing import gather_rows, pack
    from megatron_sr1.training.contrasts import ContextMaker

    scoring = Scoring(config.rollout.temperature, processor.media_ids)

    def scored(some: Sequence[TokenSequence]) -> list[torch.Tensor]:
        rows = pack(
            some,
            max_tokens=config.train.micro_batch_tokens,
            row_multiple=config.row_multiple,
            image_token_id=processor.image_token_id,
            merge_size=processor.merge_size,
        )
        return gather_rows([one.logprobs for one in policy.logprobs(rows, scoring)], rows, len(some))

    own, make, found = scored(sequences), ContextMaker(processor, config, 0), {}
    for contrast in contrasts:
        others = {}
        for index, sequence in enumerate(sequences):
            text = processor.decode(sequence.response_ids)
            _, inside, _ = digit_tokens(processor, sequence.response_ids, text)
            other = make.sequence(contrast, sequence, torch.from_numpy(inside), keys[index], -1 - index)
            if other is not None:
                others[index] = other
        under = dict(zip(others, scored(list(others.values())), strict=True))
        found[contrast.name] = [
            (mine - under[index]).numpy() if index in under else None for index, mine in enumerate(own)
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart/grpo"), help="whose rollouts are read")
    parser.add_argument("--model", default="runs/quickstart/sft/hf", help="a Hugging Face folder")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--contrasts", nargs="+", choices=[c.name for c in CONTRASTS], default=[], help="default: all")
    parser.add_argument("--measures", action="store_true", help="write RUN/measures.json")
    options = parser.parse_args(arguments)
    contrasts = [c for c in CONTRASTS if not options.contrasts or c.name in options.contrasts]
    processor, config, policy, lines = load(options.run, options.model, options.step)
    sequences, keys = responses(config, processor, lines)
    print(f"step {options.step} of {options.run}: {len(lines)} responses, model {options.model}")
    print(f"{'contrast':<14}{'gap of digits':>15}{'of others':>11}{'AUC digits':>12}{'in block':>10}{'repeated':>10}")
    kinds = [digit_tokens(processor, s.response_ids, processor.decode(s.response_ids)) for s in sequences]
    found = {}
    for name, each in gaps(policy, processor, config, sequences, keys, contrasts).items():
        row = graded(each, kinds)
        found[name] = row
        print(f"{name:<14}{row['digits']:>15.3f}{row['others']:>11.3f}", end="")
        print(f"{row['auc']:>12.3f}{row['auc_in_description']:>10.3f}{row['auc_repeated']:>10.3f}")
    if options.measures:
        row = found[contrasts[0].name]
        write_measures(options.run, {f"dependency_{key}": row[key] for key in ("auc", "auc_in_description")})
    second = [line["second"] for line in lines if line.get("second")]
    if not second:
        return
    digit = np.concatenate(
        [digit_tokens(processor, s["response_ids"], processor.decode(s["response_ids"]))[0] for s in second]
    )
    print(
        f"second pass: {len(digit)} tokens without a context to take away, AUC {auc(np.zeros(len(digit)), digit):.3f}"
    )


def load(run: Path, model: str, step: int) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
    """Processor, configuration for one process, policy with a model's weights, and the samples of a saved step."""
    platform = start_platform()
    from megatron_sr1.policy.scorer import Scorer
    from megatron_sr1.processor import Processor
    from megatron_sr1.training.rollout_files import rollouts_file, step_lines

    alone = [f"layout.{key}=1" for key in ("tensor", "pipeline", "context", "expert", "virtual")]
    alone += ["layout.sequence_parallel=false", "rollout.engine_tensor=1", "nproc=1"]
    config = load_config(run / "config.yaml", [*alone, f"model.hf_dir={model}"])
    lines = [line for line in step_lines(rollouts_file(run / "rollouts", step)) if "sample" in line]
    return Processor.from_pretrained(model), config, Scorer(config, platform), lines


def responses(config: Any, processor: Any, lines: Sequence[Any]) -> tuple[list[TokenSequence], list[str]]:
    """First passes with the images that they were written to, and the keys of their prompts."""
    dataset = ShardDataset(expand_shards(config.data.train, "data.train"))
    prompts: dict[str, Any] = {prompt.key: prompt for prompt in map(dataset.read, range(len(dataset)))}
    sequences = []
    for line in lines:
        images = tuple(processor.encode_image(image) for image in prompts[line["key"]].images)
        sequences.append(TokenSequence(line["first"]["prompt_ids"], line["first"]["response_ids"], images))
    return sequences, [line["key"] for line in lines]


def graded(each: Sequence[Any], kinds: Sequence[Any]) -> dict[str, float]:
    """Mean gaps of the two kinds of tokens in nats, and the AUCs; of the responses that have another context."""
    there = [index for index, gap in enumerate(each) if gap is not None]
    gap = np.concatenate([each[index] for index in there])
    digit, inside, behind = (np.concatenate([kinds[index][k] for index in there]) for k in range(3))
    wanted = digit & inside
    return {
        "digits": _mean(gap[wanted]),
        "others": _mean(gap[~wanted]),
        "auc": auc(gap, wanted),
        "auc_in_description": auc(gap[inside], digit[inside]),
        "auc_repeated": auc(gap[behind], digit[behind]),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def write_measures(run: Path, numbers: dict[str, float]) -> None:
    """Adds them to RUN/measures.json; a number that is none, of a kind of tokens that there is not, is null there."""
    path = run / "measures.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
