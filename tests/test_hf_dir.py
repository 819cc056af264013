"""Folders of safetensors against safetensors' own reader and writer; a checkpoint's pickles against malicious ones."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import pickle
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sr1.platform.torch_private import StorageInfo
from megatron_sr1.ranks import OneRank
from megatron_sr1.weights import ForeignCode, HfShare, HfTensors, check_megatron_dir, write_hf_dir
from megatron_sr1.weights import hf_dir as module
from megatron_sr1.weights.hf_dir import check_finite, row_blocks
from megatron_sr1.weights.hf_shards import GrowingShards, PlannedShards
from megatron_sr1.weights.safetensors import TensorInfo, encode_header, read_header

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8, alphabet='ab.é"\\'),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple), st.integers(0, 99)),
    min_size=1,
    max_size=6,
)


def make(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values > 0) if dtype == torch.bool else (values * 3).abs().to(dtype)


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


# ---------------------------------------------------------------- reading
@settings(max_examples=30, deadline=None)
@given(TENSORS)
def test_what_safetensors_writes_is_read(tmp_path_factory: pytest.TempPathFactory, spec: dict) -> None:
    folder = tmp_path_factory.mktemp("hf")
    tensors = {name: make(*entry) for name, entry in spec.items()}
    save_file(tensors, folder / "model.safetensors")
    found = HfTensors(folder)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name] == TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert same(found[name], tensor)
        if tensor.dim() and len(tensor) > 1:
            assert same(found.rows(name, 1, len(tensor)), tensor[1:])


def test_pieces_cover_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    tensors = {
        "long": torch.randn(11, 7),
        "wide": torch.randn(2, 300),
        "scalar": torch.tensor(3.0),
        "none": torch.ones(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = HfTensors(tmp_path)
    assert list(row_blocks(found.tensors["long"])) == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert list(row_blocks(found.tensors["wide"])) == [(0, 1), (1, 2)]
    for name, tensor in tensors.items():
        pieces = list(found.pieces(name))
        whole = torch.cat([piece.reshape(-1) for _, piece in pieces]) if pieces else torch.empty(0)
        assert same(whole.reshape(tensor.shape), tensor)
        assert [row for row, _ in pieces] == [start for start, _ in row_blocks(found.tensors[name])]


def sharded(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    assert HfTensors(sharded(tmp_path / "good"))["b"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"good has no tensor 'c'"):
        HfTensors(tmp_path / "good")["c"]
    folder = sharded(tmp_path / "absent")
    (folder / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"absent/two\.safetensors is missing"):
        HfTensors(folder)
    folder = sharded(tmp_path / "swapped")
    save_file({"other": torch.zeros(2)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"index\.json puts tensor 'b' into two\.safetensors, which does not hold it"):
        HfTensors(folder)
    folder = sharded(tmp_path / "index")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index\.json is corrupt"):
        HfTensors(folder)
    for strange in (None, 3, "../good/two.safetensors"):
        index = {"weight_map": {"a": "one.safetensors", "b": strange}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json is corrupt.*is no name of a file"):
            HfTensors(folder)
    folder = sharded(tmp_path / "both")
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"both holds two sets of weights.*Remove the older"):
        HfTensors(folder)


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors file: 0 bytes"),
        (b"\x40", "truncated or no safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "truncated or no safetensors file"),
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(7), "has 69 bytes where its header calls for 70"),
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(9), "has 71 bytes where its header calls for 70"),
        ((2).to_bytes(8, "little") + b"[]", "corrupt"),
        ((2).to_bytes(8, "little") + b"{x", "corrupt"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "corrupt"),
        (len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[2]", b"[3]") + bytes(8), "corrupt.*bytes 0 to 8"),
        (len(HEADER).to_bytes(8, "little") + HEADER.replace(b"F32", b"F33") + bytes(8), "corrupt.*F33"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        HfTensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(300)}, tmp_path / "model.safetensors")
    found = HfTensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(ValueError, match=r"ends at byte 200, before its tensors do"):
        found["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_named(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 3).to(dtype)
    check_finite(tensor, "w", Path("file"))
    tensor[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"file: w\[12, 1\] is nan"):
        check_finite(tensor, "w", Path("file"), first_row=10)
    check_finite(torch.tensor([1 << 62]), "ids", Path("file"))
    check_finite(torch.empty(0), "none", Path("file"))
    with pytest.raises(ValueError, match=r"s\[\] is -inf"):
        check_finite(torch.tensor(float("-inf")), "s", Path("file"))


# ---------------------------------------------------------------- writing
@settings(max_examples=30, deadline=None)
@given(TENSORS, st.integers(1, 200))
def test_safetensors_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, spec: dict, max_shard_bytes: int
) -> None:
    tensors = {name: make(*entry) for name, entry in spec.items()}
    planned, growing = tmp_path_factory.mktemp("planned"), tmp_path_factory.mktemp("growing")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    PlannedShards(planned, infos, max_shard_bytes).create()
    for name in reversed(tensors):  # in any order, by several writers, some rows at a time
        writer = PlannedShards(planned, infos, max_shard_bytes)
        for row in range(len(tensors[name]) if tensors[name].dim() else 0):
            writer.write(name, tensors[name][row : row + 1], row)
        if not tensors[name].dim():
            writer.write(name, tensors[name])
    shards = GrowingShards(growing, max_shard_bytes)
    for name, tensor in tensors.items():
        shards.append(name, tensor)
    shards.finish()
    for folder in (planned, growing):
        found = {}
        for file in folder.glob("*.safetensors"):
            content = load_file(file)
            assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= max_shard_bytes
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
            found |= content
        assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)
        assert all(same(HfTensors(folder)[name], tensors[name]) for name in tensors)  # by its index


def test_many_tensors_fill_a_header_and_go_to_another_file(tmp_path: Path) -> None:
    shards = GrowingShards(tmp_path)
    for number in range(5000):
        shards.append(f"layer.{number}.{'long' * 20}", torch.full((1,), float(number)))
    shards.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    found = HfTensors(tmp_path)
    assert found[f"layer.4999.{'long' * 20}"].tolist() == [4999.0] and len(found.tensors) == 5000


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 5), st.integers(4, 200))
def test_ranks_write_a_folder_together(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], num_ranks: int, max_bytes: int
) -> None:
    """Each of its files is one rank's, which keeps no tensor of the others; what changes afterwards is not written."""
    folder = tmp_path_factory.mktemp("shared")
    tensors = {f"t{n}": torch.randn(length) for n, length in enumerate(lengths)}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    shares = [HfShare(tensors.items(), OneRank(rank, num_ranks), max_bytes) for rank in range(num_ranks)]
    for tensor in tensors.values():
        tensor.zero_()
    for share in reversed(shares):
        before = set(folder.iterdir())
        share.write(folder)
        sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in set(folder.iterdir()) - before]
        assert all(size <= max(max_bytes, 4 * max(lengths)) for size in sizes)
        assert len(sizes) <= len(lengths) // num_ranks + 1
    shares[0].write_index(folder)
    found = HfTensors(folder)
    assert found.tensors.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_headers_end_where_tensors_may_be_mapped(tmp_path: Path) -> None:
    header = encode_header({"x": TensorInfo(torch.float32, (1,))})
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + bytes(4))
    assert read_header(tmp_path / "x.safetensors")["x"].offset == len(header)


def test_an_export_takes_the_side_files_and_replaces_an_older_one(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in (
        "config.json",
        "merges.txt",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model.safetensors",
        "run.py",
    ):
        (source / name).write_text(name)
        (source / name).chmod(0o444)
    before = os.umask(0o077)
    try:
        write_hf_dir([("a", torch.ones(2, 3).T), ("b", torch.ones(3, requires_grad=True))], str(source), out, 24)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}, "the user's umask, not the source's"
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert HfTensors(out)["a"].shape == (3, 2)
    write_hf_dir([("a", torch.zeros(2))], str(source), out)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path not in (source, out)] == []


# ---------------------------------------------------------------- pickles
def checkpoint(folder: Path, **changes: object) -> Path:
    """What torch's own writer makes of a tensor and an object, and the two files Megatron adds; newer ones add one, and
    have what is in the other as such an object."""
    folder.mkdir()
    with (folder / "data.distcp").open("wb") as stream:
        torch.save(torch.ones(2, 2), stream)
        end = stream.tell()
        torch.save(changes.get("stored", {"step": 1}), stream)
        places = [StorageInfo("data.distcp", 0, end), StorageInfo("data.distcp", end, stream.tell() - end)]
    key = str(changes.get("key", "scheduler"))
    indices = [MetadataIndex("w", (0, 0)), MetadataIndex(key)]
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 2)))
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size((2, 2)), [chunk])
    metadata = Metadata({"w": entry, key: BytesStorageMetadata()}, planner_data=changes.get("planner_data"))
    results = [WriteResult(index, place.length, place) for index, place in zip(indices, places, strict=True)]
    FileSystemWriter(folder).finish(metadata, [results])
    if "key" not in changes:
        torch.save(changes.get("common", {"iteration": 3}), folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": changes.get("backend", "torch_dist")}))
    return folder


class RunsCode:
    """Unpickling it calls a function of its choice."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def test_a_checkpoint_of_torchs_own_writer_passes(tmp_path: Path) -> None:
    found = check_megatron_dir(checkpoint(tmp_path / "x", planner_data={"w": ("model", "w")}))
    assert found.state_dict_metadata["w"].properties.dtype == torch.bfloat16
    assert found.storage_data[MetadataIndex("w", (0, 0))].relative_path == "data.distcp"


def test_a_checkpoint_without_common_pt_passes_where_its_content_is_an_object(tmp_path: Path) -> None:
    newer = "common_state/shard_0_1"
    assert newer in check_megatron_dir(checkpoint(tmp_path / "x", key=newer)).state_dict_metadata
    with pytest.raises(ForeignCode, match=r"data\.distcp asks for posix\.system"):
        check_megatron_dir(checkpoint(tmp_path / "y", key=newer, stored=RunsCode(os.system, "touch hacked")))
    evil = checkpoint(tmp_path / "z", key=newer)
    torch.save(RunsCode(os.system, "touch hacked"), evil / "common.pt")  # Megatron-Core would read it first
    with pytest.raises(ForeignCode, match=r"common\.pt asks for posix\.system"):
        check_megatron_dir(evil)
    with pytest.raises(ValueError, match=r"common\.pt is missing"):
        check_megatron_dir(checkpoint(tmp_path / "w", key="common_states"))


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (RunsCode(os.system, "touch hacked"), r"posix\.system"),
        (RunsCode(eval, "open('hacked', 'w')"), r"eval,"),
        (RunsCode(getattr, "text", "upper"), r"getattr,"),
        (RunsCode(pathlib.Path.touch, "hacked"), r"pathlib|getattr"),
        (RunsCode(time.sleep, 0), r"time\.sleep"),
        (RunsCode(torch.load, "hacked"), r"torch\.serialization\.load"),
    ],
)
def test_code_in_a_pickle_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: RunsCode, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (where, file) in enumerate(
        {"planner_data": ".metadata", "common": "common.pt", "stored": "data.distcp"}.items()
    ):
        folder = checkpoint(tmp_path / str(number), **{where: evil})
        with pytest.raises(ValueError, match=rf"{number}/{file.replace('.', '[.]')}.* asks for .*({name})"):
            check_megatron_dir(folder)
    assert not (tmp_path / "hacked").exists()


def test_names_with_dots_reach_no_attribute_of_an_allowed_class(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    payload = b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93."  # protocol 4 looks attributes of attributes up
    (folder / ".metadata").write_bytes(payload)
    with pytest.raises(ValueError, match=r"asks for torch\.Size\.__class__"):
        check_megatron_dir(folder)


def test_incomplete_checkpoints_are_named(tmp_path: Path) -> None:
    for file in (".metadata", "common.pt", "metadata.json"):
        folder = checkpoint(tmp_path / file.strip("."))
        (folder / file).unlink()
        with pytest.raises(ValueError, match=f"no complete Megatron checkpoint: {file} is missing"):
            check_megatron_dir(folder)
    with pytest.raises(ValueError, match="'zarr', which cannot be read"):
        check_megatron_dir(checkpoint(tmp_path / "zarr", backend="zarr"))
    folder = checkpoint(tmp_path / "other")
    (folder / ".metadata").write_bytes(pickle.dumps(collections.OrderedDict(a=1)))
    with pytest.raises(ValueError, match=r"holds a OrderedDict"):
        check_megatron_dir(folder)
    folder = checkpoint(tmp_path / "short")
    os.truncate(folder / "data.distcp", 100)
    with pytest.raises(ValueError, match=r"data\.distcp is missing or truncated: w should lie at bytes 0 to"):
        check_megatron_dir(folder)
