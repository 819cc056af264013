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

The model should be the one that has written the responses: those of step 0 are the cold start's. One process.
"""

from __future__ import annotations

import argparse
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


def gaps(policy: Any, processor: Any, config: Any, sequences: Sequence[TokenSequence], keys: Sequence[str]) -> Any:
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
    for contrast in CONTRASTS:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart/grpo"), help="whose rollouts are read")
    parser.add_argument("--model", default="runs/quickstart/sft/hf", help="a Hugging Face folder")
    parser.add_argument("--step", type=int, default=0)
    options = parser.parse_args()
    platform = start_platform()
    from megatron_sr1.policy.scorer import Scorer
    from megatron_sr1.processor import Processor
    from megatron_sr1.training.rollout_files import rollouts_file, step_lines

    alone = [f"layout.{key}=1" for key in ("tensor", "pipeline", "context", "expert", "virtual")]
    alone += ["layout.sequence_parallel=false", "rollout.engine_tensor=1", "nproc=1"]
    config = load_config(options.run / "config.yaml", [*alone, f"model.hf_dir={options.model}"])
    policy, processor = Scorer(config, platform), Processor.from_pretrained(options.model)
    dataset = ShardDataset(expand_shards(config.data.train, "data.train"))
    prompts: dict[str, Any] = {prompt.key: prompt for prompt in map(dataset.read, range(len(dataset)))}
    lines = [line for line in step_lines(rollouts_file(options.run / "rollouts", options.step)) if "sample" in line]
    sequences, keys = [], []
    for line in lines:
        images = tuple(processor.encode_image(image) for image in prompts[line["key"]].images)
        first = line["first"]
        sequences.append(TokenSequence(first["prompt_ids"], first["response_ids"], images))
        keys.append(line["key"])
    print(f"step {options.step} of {options.run}: {len(lines)} responses, model {options.model}")
    print(f"{'contrast':<14}{'gap of digits':>15}{'of others':>11}{'AUC digits':>12}{'in block':>10}{'repeated':>10}")
    kinds = [digit_tokens(processor, s.response_ids, processor.decode(s.response_ids)) for s in sequences]
    for name, each in gaps(policy, processor, config, sequences, keys).items():
        there = [index for index, gap in enumerate(each) if gap is not None]
        gap = np.concatenate([each[index] for index in there])
        digit, inside, behind = (np.concatenate([kinds[index][k] for index in there]) for k in range(3))
        wanted = digit & inside
        row = (auc(gap, wanted), auc(gap[inside], digit[inside]), auc(gap[behind], digit[behind]))
        means = f"{gap[wanted].mean():>15.3f}{gap[~wanted].mean():>11.3f}"
        print(f"{name:<14}{means}{row[0]:>12.3f}{row[1]:>10.3f}{row[2]:>10.3f}")
    second = [line["second"] for line in lines if line.get("second")]
    digit = np.concatenate(
        [digit_tokens(processor, s["response_ids"], processor.decode(s["response_ids"]))[0] for s in second]
    )
    print(
        f"second pass: {len(digit)} tokens without a context to take away, AUC {auc(np.zeros(len(digit)), digit):.3f}"
    )


if __name__ == "__main__":
    main()
