"""tools/convert.py: there and back without losing a bit, into and out of every layout, and what it says of damage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import run_ranks
from tests.tool_modules import load_tool

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "convert.py"
ODD_VOCABULARY = 1001  # of no layout's tensor-parallel ranks a multiple


def silent(done: int, total: int) -> None:
    """No progress bar."""


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder as safetensors' own reader gives them, as bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: value.contiguous().view(torch.uint8) for name, value in load_file(file).items()}
    return found


def assert_same_bits(first: Path, second: Path) -> None:
    one, other = bits(first), bits(second)
    assert one and one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def recast(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Rewrites the weights of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, value).contiguous() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- round trips and layouts, four ranks
def make_families(folder: Path) -> dict[str, Path]:
    """Every family; bf16 and fp32, an odd vocabulary, experts in both orders, a head that is stored though tied."""
    from tests.model_zoo import ZOO, create_family, publish_experts

    models = {name: create_family(folder / name, name, vocab_size=ODD_VOCABULARY) for name in ZOO}
    models["published"] = create_family(folder / "published", "qwen3_vl_moe", seed=1)
    publish_experts(models["published"])
    for name in ("qwen2_5_vl_tied", "published"):
        recast(models[name], lambda _, value: value.bfloat16())
    models["stored_head"] = create_family(folder / "stored_head", "qwen2_5_vl_tied", seed=2)
    tensors = load_file(models["stored_head"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, models["stored_head"] / "model.safetensors", metadata={"format": "pt"})
    return models


LAYOUTS = {
    "TP4": {"tensor": 4},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "PP4": {"pipeline": 4},
    "PP2 VPP2": {"pipeline": 2, "virtual": 2},
}


def check_layouts(hf_dir: Path, megatron_dir: Path, extra: dict[str, dict[str, int]]) -> None:
    """The checkpoint gives every rank of every layout what the Hugging Face weights give it."""
    from megatron_sr1.config import Config, LayoutConfig, ModelConfig
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy import read_architecture
    from megatron_sr1.policy.build import build_chunks
    from megatron_sr1.policy.groups import build_groups
    from megatron_sr1.policy.read import open_tensors
    from megatron_sr1.policy.sharded import load_model_weights
    from megatron_sr1.weights import load_hf_weights

    platform = start_platform()
    architecture = read_architecture(str(hf_dir))
    for name, layout in (LAYOUTS | extra).items():
        config = Config(nproc=4, layout=LayoutConfig(**layout), model=ModelConfig(hf_dir=str(hf_dir)))
        groups = build_groups(config.layout)
        both = [build_chunks(architecture, config, platform, groups, platform.device) for _ in range(2)]
        for chunks in both:
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                parameter.data.fill_(float("nan"))
        load_hf_weights(both[0], open_tensors(architecture), architecture, groups)
        load_model_weights(both[1], str(megatron_dir))
        for one, other in zip(*both, strict=True):
            found = dict(other.named_parameters())
            for key, parameter in one.named_parameters():
                assert torch.equal(parameter, found[key]), (name, hf_dir.name, key)


def check_training_checkpoint(folder: Path, hf_dir: Path) -> None:
    """What a run saves, padded vocabulary, optimizer and all, becomes the Hugging Face weights it started from."""
    from megatron_sr1.config import Config, LayoutConfig, ModelConfig, PixelLimits
    from megatron_sr1.convert.export import megatron_to_hf
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy import Policy
    from megatron_sr1.training.checkpointer import Checkpointer, HfSource, Progress

    platform = start_platform()
    layout = LayoutConfig(tensor=2, pipeline=2, sequence_parallel=True)
    config = Config(nproc=4, layout=layout, model=ModelConfig(hf_dir=str(hf_dir)))
    policy = Policy(config, platform, num_optimizer_steps=1, keep_reference=False)
    pixels = {"least": 3000, "most": 30_000}  # of model.min_pixels and max_pixels
    progress = Progress(step=10, position=0, dataset_fingerprint="", model_dir=str(hf_dir), pixels=pixels)
    checkpoints, saved = Checkpointer(folder / "checkpoints", 2, platform), folder / "checkpoints" / "step_000010"
    checkpoints.save(policy, progress)
    checkpoints.save(policy, replace(progress, step=11), HfSource(str(hf_dir), PixelLimits(3000, 30_000)))
    beside = saved.with_name("step_000011") / "hf"
    assert_same_bits(hf_dir, beside)
    assert json.loads((beside / "preprocessor_config.json").read_text())["min_pixels"] == 3000
    with pytest.raises(ValueError, match=r"step_000010 has no hf/config\.json\. Give --hf"):
        megatron_to_hf(str(saved), None, folder / "no_config", platform, silent)
    megatron_to_hf(str(saved), str(hf_dir), folder / "exported", platform, silent, max_shard_bytes=100_000)
    if platform.is_main:
        assert len(list((folder / "exported").glob("*.safetensors"))) > 3
        assert_same_bits(hf_dir, folder / "exported")
        said = json.loads((folder / "exported" / "preprocessor_config.json").read_text())
        own = json.loads((hf_dir / "preprocessor_config.json").read_text())
        assert said == own | {"min_pixels": 3000, "max_pixels": 30_000}, "the images that it was trained with"
    megatron_to_hf(str(beside.parent), None, folder / "of_its_own", platform, silent)
    if platform.is_main:
        assert_same_bits(hf_dir, folder / "of_its_own")


def check_four_ranks(rank: int, num_ranks: int, path: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.export import megatron_to_hf
    from megatron_sr1.convert.save import hf_to_megatron

    folder = Path(path)
    models: list[dict[str, Path]] = [make_families(folder) if rank == 0 else {}]
    torch.distributed.broadcast_object_list(models, 0)
    for name, hf_dir in models[0].items():
        megatron_dir, back = folder / f"{name}.megatron", folder / f"{name}.back"
        if rank == 0:
            megatron_dir.mkdir()
        torch.distributed.barrier()
        hf_to_megatron(str(hf_dir), megatron_dir, platform, silent)
        megatron_to_hf(str(megatron_dir), None, back, platform, silent)
        if rank == 0:
            assert len(list(megatron_dir.glob("*.distcp"))) == num_ranks  # all have worked
            assert_same_bits(hf_dir, back)
            for file in ("config.json", "tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"):
                assert (back / file).read_bytes() == (hf_dir / file).read_bytes()
    check_layouts(models[0]["qwen2_5_vl_tied"], folder / "qwen2_5_vl_tied.megatron", {})
    check_layouts(models[0]["qwen3_vl_moe"], folder / "qwen3_vl_moe.megatron", {"EP2": {"expert": 2}})
    check_training_checkpoint(folder, models[0]["qwen2_5_vl_untied"])


def test_every_family_comes_back_bit_for_bit_and_loads_in_every_layout(tmp_path: Path) -> None:
    run_ranks(4, check_four_ranks, str(tmp_path))


# ---------------------------------------------------------------- the command, one rank
def call(*arguments: object) -> tuple[int, str]:
    """The tool's exit status and all it prints, on one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = load_tool("convert").main([str(argument) for argument in arguments])
    return status, " ".join(said.getvalue().split())


def expect_error(source: Path, *words: str, command: str = "hf-to-megatron") -> None:
    """Converting `source` fails with all the words, and leaves nothing behind."""
    out = source.with_name("result")
    status, said = call(command, "--hf" if command == "hf-to-megatron" else "--megatron", source, "--out", out)
    assert status == 2, said
    assert [word for word in words if word not in said] == [], said
    assert not out.exists() and not out.with_name("result.partial").exists()


def damaged(source: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a Hugging Face folder with other tensors."""
    folder = source.with_name(name)
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


GATE = "model.layers.1.mlp.gate_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


def check_damaged_hf(model: Path) -> None:
    """Every kind of damage to a Hugging Face folder, each named with file, tensor and remedy."""
    expect_error(damaged(model, "missing", lambda t: t.pop(GATE)), GATE, "no tensor", "Copy the missing files")
    expect_error(damaged(model, "extra", lambda t: t.update(odd=torch.ones(2))), "holds odd", "correct config.json")
    shape = damaged(model, "shape", lambda t: t.update({GATE: t[GATE][:-1].clone()}))
    expect_error(shape, "model.safetensors", GATE, "shape [95, 64]", "calls for [96, 64]")
    rotated = damaged(model, "rotated", lambda t: t.update({KEY: t[KEY].T.contiguous()}))
    expect_error(rotated, KEY, "shape [64, 32]", "[32, 64]")
    mixed = damaged(model, "mixed", lambda t: t.update({GATE: t[GATE].half()}))
    expect_error(mixed, GATE, "float16[96, 64]", "only one type")
    head = damaged(model, "head", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    expect_error(head, "lm_head.weight differs", "tie_word_embeddings")
    for value in (float("nan"), float("-inf")):

        def spoil(tensors: dict[str, torch.Tensor], value: float = value) -> None:
            tensors[GATE][7, 5] = value

        expect_error(damaged(model, f"spoilt {value}", spoil), f"model.safetensors: {GATE}[7, 5] is {value}")
    short = damaged(model, "short", lambda t: None)
    with (short / "model.safetensors").open("r+b") as file:
        file.truncate((short / "model.safetensors").stat().st_size - 1)
    expect_error(short, "short/model.safetensors", "truncated?", "Copy it again")
    other = damaged(model, "other", lambda t: None)
    tree = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(tree | {"architectures": ["LlamaForCausalLM"]}))
    expect_error(other, "LlamaForCausalLM", "Qwen3VLForConditionalGeneration")
    expect_error(model.with_name("nowhere"), "nowhere holds no config.json")


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def check_damaged_megatron(model: Path) -> None:
    """The same for a Megatron checkpoint, and pickles that would run code."""

    def copy(name: str) -> Path:
        return shutil.copytree(model, model.with_name(name))

    def expect(folder: Path, *words: str) -> None:
        expect_error(folder, *words, command="megatron-to-hf")

    gone = copy("gone")
    (gone / "common.pt").unlink()
    expect(gone, "gone is no complete Megatron checkpoint: common.pt is missing")
    short = copy("short_pieces")
    data = short / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 100)
    expect(short, "short_pieces/__0_0.distcp is missing or truncated")
    overwritten = copy("overwritten")
    (overwritten / "__0_0.distcp").write_bytes(bytes(data.stat().st_size + 100))
    expect(overwritten, "overwritten/__0_0.distcp", "cannot be read", "Copy the checkpoint again")
    wrong = copy("wrong_config")
    tree = json.loads((wrong / "hf" / "config.json").read_text())
    tree["text_config"]["intermediate_size"] = 80
    (wrong / "hf" / "config.json").write_text(json.dumps(tree))
    expect(wrong, ".metadata", "linear_fc1.weight has the shape [4, 192, 64]", "calls for [4, 160, 64]")
    evil = copy("evil")
    (evil / ".metadata").write_bytes(pickle.dumps(Malicious()))
    expect(evil, "evil/.metadata asks for posix.mkdir", "foreign code")
    evil_common = copy("evil_common")
    torch.save({"x": Malicious()}, evil_common / "common.pt")
    expect(evil_common, "evil_common/common.pt asks for posix.mkdir", "foreign code")
    outside = copy("outside")
    (outside / ".metadata").write_bytes((outside / ".metadata").read_bytes().replace(b"__0_0.distcp", b"../0_.distcp"))
    expect(outside, "outside of the checkpoint", "../0_.distcp")
    torn = copy("torn")
    (torn / ".metadata").write_bytes((torn / ".metadata").read_bytes()[:200])
    expect(torn, "torn/.metadata is corrupt")
    assert not Path("unpickled").exists()


def check_values(hf_dir: Path) -> None:
    """Values that are not finite, or that the type asked for cannot hold, are named under their Hugging Face name."""
    from megatron_sr1.convert import save

    for name, value, options, words in (
        ("spoilt", float("nan"), (), (f"{GATE}[7, 5] is nan", "damaged")),
        ("large", 1e30, ("--dtype", "fp16"), (f"{GATE} has values that torch.float16 cannot hold", "--dtype bf16")),
    ):

        def spoil(tensors: dict[str, torch.Tensor], value: float = value) -> None:
            tensors[GATE][7, 5] = value

        source, there = damaged(hf_dir, name, spoil), hf_dir.with_name(f"{name}.megatron")
        with mock.patch.object(save, "check_finite"):
            assert call("hf-to-megatron", "--hf", source, "--out", there)[0] == 0
        out = hf_dir.with_name(f"{name}.back")
        status, said = call("megatron-to-hf", "--megatron", there, "--out", out, *options)
        assert status == 2 and [word for word in words if word not in said] == [], said
        assert not out.exists() and not out.with_name(f"{name}.back.partial").exists()


def check_verify(hf_dir: Path, megatron_dir: Path) -> None:
    """Equal, one bit, type, missing and extra; exit statuses 0, 1 and 2."""
    assert call("verify", hf_dir, megatron_dir)[0] == 0
    assert call("verify", megatron_dir, megatron_dir)[0] == 0

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE].view(torch.int32)[95, 63] ^= 1

    status, said = call("verify", megatron_dir, damaged(hf_dir, "flipped", flip), "--only-differences")
    folders = (hf_dir, hf_dir.with_name("flipped"))
    values = [load_file(folder / "model.safetensors")[GATE][95, 63].item() for folder in folders]
    assert status == 1 and f"[95, 63]: {values[0]!r}, {values[1]!r}" in said and "1 different" in said, said
    assert said.count("proj") == 1  # equal tensors are left out

    status, said = call("verify", hf_dir, damaged(hf_dir, "typed", lambda t: t.update({GATE: t[GATE].double()})))
    assert status == 1 and "float64[96, 64]" in said and "type" in said, said
    renamed = damaged(hf_dir, "renamed", lambda t: t.update(odd=t.pop(GATE)))
    status, said = call("verify", hf_dir, renamed, "--only-differences")
    assert status == 1 and "only in A" in said and "only in B" in said and "2 different" in said, said
    status, said = call("verify", hf_dir, hf_dir.with_name("nowhere"))
    assert status == 2 and "nowhere is no folder" in said, said


def check_outputs(hf_dir: Path, megatron_dir: Path) -> None:
    """What lies at --out is never lost by accident."""
    command = ("megatron-to-hf", "--megatron", megatron_dir, "--out")
    documents = hf_dir.with_name("documents")
    documents.mkdir()
    (documents / "thesis.tex").write_text("years of work")
    for options in ((), ("--overwrite",)):
        status, said = call(*command, documents, *options)
        assert status == 2 and str(documents) in said, said
    assert (documents / "thesis.tex").read_text() == "years of work"
    earlier = shutil.copytree(hf_dir, hf_dir.with_name("earlier"))
    (earlier / "old.txt").touch()
    status, said = call(*command, earlier)
    assert status == 2 and "--overwrite" in said and (earlier / "old.txt").exists(), said
    assert call(*command, earlier, "--overwrite", "--max-shard-gb", "0.0001")[0] == 0
    assert not (earlier / "old.txt").exists() and not earlier.with_name("earlier.old").exists()
    assert_same_bits(hf_dir, earlier)
    status, said = call(*command, megatron_dir / "inside")
    assert status == 2 and "lie in each other" in said, said


def check_cast(hf_dir: Path, megatron_dir: Path) -> None:
    """--dtype rounds as torch does, and config.json says so."""
    out = hf_dir.with_name("cast")
    assert call("megatron-to-hf", "--megatron", megatron_dir, "--out", out, "--dtype", "bf16")[0] == 0
    found = load_file(out / "model.safetensors")
    for name, value in load_file(hf_dir / "model.safetensors").items():
        assert torch.equal(found[name], value.bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.tool_modules import load_tool
from megatron_sr1.platform import start_platform
start_platform()
from megatron_sr1.convert import save
from megatron_sr1.weights import safetensors
from tests.test_convert import load_tool

def dies(function, calls=[20]):
    def counted(*arguments, **options):
        calls[0] -= 1
        if calls[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted

save._read = dies(save._read)
safetensors.TensorSlot.write = dies(safetensors.TensorSlot.write)
load_tool("convert").main(sys.argv[2:])
"""


def check_killed(hf_dir: Path) -> None:
    """kill -9 in the middle of either conversion: no result; run again: a whole one."""
    there, back = hf_dir.with_name("killed.megatron"), hf_dir.with_name("killed.hf")
    for command, out in (
        (("hf-to-megatron", "--hf", hf_dir, "--out", there), there),
        (("megatron-to-hf", "--megatron", there, "--out", back), back),
    ):
        run = subprocess.run([sys.executable, "-c", KILLED, str(REPOSITORY), *map(str, command)], capture_output=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
        partial = out.with_name(out.name + ".partial")
        assert not out.exists() and partial.exists()
        assert call("verify", hf_dir, partial)[0] != 0  # what is left does not pass for a result
        assert call(*command)[0] == 0 and not partial.exists()
    assert_same_bits(hf_dir, back)


def check_command(rank: int, num_ranks: int, path: str) -> None:
    from megatron_sr1.platform import start_platform

    start_platform()
    from tests.model_zoo import create_family

    os.chdir(path)
    hf_dir = create_family(Path(path) / "hf", "qwen2_5_vl_tied")
    megatron_dir = Path(path) / "megatron"
    assert call("hf-to-megatron", "--hf", hf_dir, "--out", megatron_dir)[0] == 0
    check_killed(hf_dir)
    check_verify(hf_dir, megatron_dir)
    check_outputs(hf_dir, megatron_dir)
    check_cast(hf_dir, megatron_dir)
    check_damaged_hf(hf_dir)
    check_damaged_megatron(megatron_dir)
    check_values(hf_dir)


def test_the_command_names_every_damage_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    run_ranks(1, check_command, str(tmp_path))


# ---------------------------------------------------------------- the command, as a user starts it
def test_two_processes_share_the_work_and_the_models_say_the_same(tiny_model_dir: str, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)

    there, back = tmp_path / "megatron", tmp_path / "hf"
    done = run("hf-to-megatron", "--hf", tiny_model_dir, "--out", there, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert len(list(there.glob("*.distcp"))) == 2
    refused = run("megatron-to-hf", "--megatron", there, "--out", back, "--nproc", 2, "--hf", tmp_path)
    assert refused.returncode == 2 and not back.exists(), refused.stderr
    assert f"\nconvert megatron-to-hf: {tmp_path} holds no config.json." in refused.stderr, refused.stderr
    same = run("verify", tiny_model_dir, there, "--only-differences", "--logits", "--tp", 2, "--pp", 2)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "several images" in same.stdout and same.stdout.strip().endswith("equal")
