"""What a checkpoint costs a step, and what a rank holds for it.

    python -m benchmarks.checkpoints --ranks 4 --ffn 100000

Replicas on gloo hold an untrained Qwen2.5-VL of four layers and save it five times, the first of which is not counted.
Rows:

    megatron       Megatron-Core's own fully reshardable state, written while the ranks wait
    waiting        train.async_save=false
    background     train.async_save, and what a rank computes meanwhile

Columns: seconds that a rank waits for the save, median; seconds until it is whole; MiB of optimizer state that the rank
with most holds for it, and the MiB of all of it; the seconds of a loop of Python and of products of matrices by itself,
and while a checkpoint is written beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_files import timed, training
from tests.model_zoo import create_family
from tests.policy_cases import built
from tests.ranks import run_ranks

TIMES = 4


def _measure(rank: int, num_ranks: int, model_dir: str, folder: str, out: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_sr1.policy.sharded import sharded_weights
    from megatron_sr1.training.checkpointer import Checkpointer, Progress

    def state_bytes(state: dict[str, Any]) -> int:
        moments = (value for value in nested_values(state["optimizer"]) if hasattr(value, "data"))
        return sum(value.data.nbytes for value in moments if isinstance(value.data, torch.Tensor))

    def whole(number: int) -> Callable[[], None]:
        def save() -> None:
            place = Path(folder) / f"megatron_{number}"
            if rank == 0:
                place.mkdir()
            torch.distributed.barrier()
            dist_checkpointing.save(megatrons(), str(place))

        return save

    with built(model_dir, []) as (policy, _):

        def megatrons() -> dict[str, Any]:
            model = sharded_weights(policy.chunks)
            kind = {"distrib_optim_sharding_type": "fully_reshardable"}
            return {"model": model, "optimizer": policy.optimizer.sharded_state_dict(model, metadata=kind)}

        found: dict[str, Any] = {"held": {}, "waits": {}, "whole": {}}
        for name, state in (("megatron", megatrons), ("waiting", lambda: policy.sharded_state(loading=False))):
            found["held"][name] = state_bytes(state())
        found["waits"]["megatron"] = found["whole"]["megatron"] = [timed(whole(n)) for n in range(TIMES + 1)][1:]
        for name in ("waiting", "background"):
            place = Path(folder) / name
            checkpoints = Checkpointer(place, 1, policy.platform, in_background=name == "background")
            waits, ends = [], []
            for step in range(1, TIMES + 2):
                start = time.perf_counter()
                checkpoints.save(policy, Progress(step, 0, "", ""))
                waits.append(time.perf_counter() - start)
                checkpoints.settle()
                ends.append(time.perf_counter() - start)
            found["waits"][name], found["whole"][name] = waits[1:], ends[1:]
        loop = training(2 * statistics.median(found["whole"]["background"]))
        found["alone"] = timed(loop)
        checkpoints.save(policy, Progress(99, 0, "", ""))
        found["beside"] = timed(loop)
        checkpoints.settle()
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=100_000, help="intermediate_size of the language model's layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = create_family(Path(folder) / "model", "qwen2_5_vl_untied", intermediate_size=options.ffn)
        run_ranks(options.ranks, _measure, str(model), folder, folder)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
        shutil.rmtree(model)
    total = sum(each["held"]["waiting"] for each in found)
    print(f"{options.ranks} replicas, {total / 2**20:.0f} MiB of optimizer state\n")
    print(f"{'':12}{'waits s':>10}{'whole s':>10}{'held MiB':>10}")
    for name in ("megatron", "waiting", "background"):
        waits = max(statistics.median(each["waits"][name]) for each in found)
        whole = max(statistics.median(each["whole"][name]) for each in found)
        held = max(each["held"]["waiting" if name == "background" else name] for each in found)
        print(f"{name:12}{waits:10.2f}{whole:10.2f}{held / 2**20:10.0f}")
    alone, beside = (max(each[name] for each in found) for name in ("alone", "beside"))
    print(f"\na loop of {alone:.2f} s takes {beside:.2f} s beside a checkpoint that is written")


if __name__ == "__main__":
    main()
