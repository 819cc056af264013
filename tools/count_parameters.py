"""Parameters that each rank of a layout holds.

python tools/count_parameters.py --hf DIR_OR_CONFIG.json [--tp 8 --pp 4 --cp 2 --ep 8 --vpp 2 --stage-layers 8 9 9 9]

Builds the modules of a rank of every pipeline stage without memory for their weights: a minute for the largest model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sr1.config import LayoutConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, help="a model directory, or a config.json")
    for name, text in (("tp", "tensor"), ("pp", "pipeline"), ("vpp", "virtual pipeline"), ("cp", "context")):
        parser.add_argument(f"--{name}", type=int, default=1, help=f"{text} parallel size")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size")
    parser.add_argument("--stage-layers", type=int, nargs="*", default=[], help="layers of each chunk; none: equal")
    parser.add_argument("--nproc", type=int, default=0, help="ranks of the run; 0: the fewest that the layout allows")
    options = parser.parse_args()
    try:
        layout = LayoutConfig(
            tensor=options.tp,
            pipeline=options.pp,
            virtual=options.vpp,
            context=options.cp,
            expert=options.ep,
            stage_layers=tuple(options.stage_layers),
            sequence_parallel=options.tp > 1,  # changes no count, but a mixture of experts insists on it
        )
        from megatron_sr1.platform import start_platform

        start_platform()
        from megatron_sr1.policy.parameter_counts import count_table

        with _model_dir(Path(options.hf)) as folder:
            print(count_table(str(folder), layout, options.nproc or _fewest_ranks(layout)))
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def _fewest_ranks(layout: LayoutConfig) -> int:
    """Experts are spread over the ranks of a pipeline stage; whole replicas are added until they fit."""
    ranks = layout.model_ranks
    while ranks % (layout.expert * layout.pipeline):
        ranks += layout.model_ranks
    return ranks


@contextmanager
def _model_dir(path: Path) -> Iterator[Path]:
    """The directory itself, or one that holds a copy of the given configuration file under the name config.json."""
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        yield Path(folder)


if __name__ == "__main__":
    main()
