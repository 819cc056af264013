"""Moves weights between a stage of the policy and Hugging Face names and shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.convert.table import Sizes, WeightRule, hf_from_shards, language_rules, shard_from_hf, vision_rule

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LAYER = "decoder.layers."


def stage_parameters(stage: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The stage's parameters by their name in the whole model: layers counted from the first stage."""
    named = {}
    for name, parameter in stage.named_parameters():
        if name.startswith(_LAYER):
            local, rest = name.removeprefix(_LAYER).split(".", 1)
            name = f"{_LAYER}{stage.decoder.layers[int(local)].layer_number - 1}.{rest}"
        named[name] = parameter
    return named


def _rules_of(names: Iterable[str], sizes: Sizes) -> dict[str, WeightRule]:
    table = {rule.megatron: rule for rule in language_rules(sizes)}
    return {name: table[name] if name in table else vision_rule(name) for name in names}


class HfTensors:
    """Reads tensors by name from the safetensors files of a Hugging Face directory."""

    def __init__(self, hf_dir: str) -> None:
        """Raises ValueError where the directory holds no safetensors weights."""
        self.folder = Path(hf_dir)
        if (self.folder / INDEX).is_file():
            self.files: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
        elif (self.folder / SINGLE).is_file():
            with safe_open(self.folder / SINGLE, "pt") as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ValueError(f"{hf_dir} holds neither {INDEX} nor {SINGLE}. Give a model saved in safetensors format.")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name!r}, which the model's config.json calls for.")
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)


@torch.no_grad()
def load_hf_weights(stage: torch.nn.Module, hf_dir: str, sizes: Sizes, tensor_group: ProcessGroup) -> None:
    """Fills the stage's parameters from `hf_dir`.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    tensors = HfTensors(hf_dir)
    parameters = stage_parameters(stage)
    for name, rule in _rules_of(parameters, sizes).items():
        shard = shard_from_hf(rule, [tensors[x] for x in rule.hf], sizes, tensor_group.rank(), tensor_group.size())
        if shard.shape != parameters[name].shape:
            raise ValueError(
                f"{hf_dir}: {', '.join(rule.hf)} give {name} the shape {tuple(shard.shape)}, but the model has "
                f"{tuple(parameters[name].shape)}. config.json and weights do not belong together."
            )
        parameters[name].copy_(shard)
        if rule.kind != "replicated" and "tensor_model_parallel" not in vars(parameters[name]):
            # Megatron marks shards only when it initialises them itself; unmarked, they would be taken for copies of
            # one tensor and left out of the gradient norm on every rank but the first
            set_tensor_model_parallel_attributes(parameters[name], True, 1 if rule.kind == "columns" else 0, 1)


@torch.no_grad()
def export_hf_weights(
    stage: torch.nn.Module, sizes: Sizes, tensor_group: ProcessGroup, pipeline_group: ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model under its Hugging Face name, on every rank. All ranks iterate together.

    Memory beyond the model: one tensor and its gathered copy.
    """
    parameters = stage_parameters(stage)
    stages: list[list[tuple[str, torch.Size, torch.dtype]] | None] = [None] * pipeline_group.size()
    mine = [(name, parameter.shape, parameter.dtype) for name, parameter in parameters.items()]
    torch.distributed.all_gather_object(stages, mine, group=pipeline_group)
    empty = torch.empty((), device=next(stage.parameters()).device)  # stands for what another stage holds
    seen: set[str] = set()
    for owner, contents in enumerate(stages):
        assert contents is not None
        rules = _rules_of((name for name, _, _ in contents), sizes)
        for name, shape, dtype in contents:
            if not seen.isdisjoint(rules[name].hf):  # a tied head is the embedding of the first stage
                continue
            seen.update(rules[name].hf)
            parameter = parameters[name] if name in parameters else empty.to(dtype).expand(shape)
            shards = _gather(parameter, rules[name], owner, tensor_group, pipeline_group)
            yield from zip(rules[name].hf, hf_from_shards(rules[name], shards, sizes), strict=True)


def _gather(
    parameter: Tensor,
    rule: WeightRule,
    owner: int,
    tensor_group: ProcessGroup,
    pipeline_group: ProcessGroup,
) -> list[Tensor]:
    """The parameter's shards in tensor-parallel order, sent from its stage to all stages."""
    local = parameter.detach()
    if pipeline_group.size() > 1:
        source = torch.distributed.get_process_group_ranks(pipeline_group)[owner]
        local = local.clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(local, source, group=pipeline_group)
    if rule.kind == "replicated" or tensor_group.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(tensor_group.size())]
    torch.distributed.all_gather(shards, local.contiguous(), group=tensor_group)
    return shards


def write_hf_dir(weights: Iterable[tuple[str, Tensor]], source_dir: str, out_dir: Path) -> None:
    """Writes one safetensors file and copies configuration, tokenizer and processor files of `source_dir`.

    The folder appears under its name only when it is complete.
    """
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in weights}, partial / SINGLE, metadata={"format": "pt"}
    )
    for file in sorted(Path(source_dir).iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".jinja", ".model") and file.name != INDEX:
            shutil.copy(file, partial / file.name)
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
