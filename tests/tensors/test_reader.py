"""Headers come from strangers: each lie gets an error that names the file and the tensor."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hubforge.errors import SourceError
from hubforge.tensors.reader import MAX_HEADER, open_checkpoint, read_header


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_reads_what_the_library_wrote(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).bfloat16(),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.zeros(0, 4),
        "d": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as found:
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            read = found.read(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert found.read_rows("a", 1, 2).tolist() == [[3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not a JSON object"),
        (b"[1]", b"", "not a JSON object"),
        (b"{'a': 1}", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not a JSON object"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "'a' is defined twice"),
        ({"a": 3}, b"", "tensor 'a': needs dtype, shape and data_offsets"),
        ({"a": entry(0, 4, dtype="F31")}, b"0000", "tensor 'a': unknown dtype 'F31'"),
        ({"a": entry(0, 4, shape=[-1])}, b"0000", r"tensor 'a': shape '\[-1\]' is not a list of sizes"),
        ({"a": entry(0, 4, shape=[True])}, b"0000", r"tensor 'a': shape '\[True\]' is not a list of sizes"),
        ({"a": entry(0, 4, shape=[1.0])}, b"0000", r"tensor 'a': shape '\[1.0\]' is not a list of sizes"),
        ({"a": entry(0, 4, shape=[2])}, b"0000", r"tensor 'a': F32 of shape \[2\] takes 8 bytes, .* give 4"),
        ({"a": entry(0, 4, shape=[2**62, 2**62])}, b"0000", "tensor 'a': F32 of shape .* takes"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"0", "tensor 'a': F4 .* takes -1 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000", "tensor 'a': .* out of order"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"0000", "tensor 'a': .* out of order"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"000000", "tensor 'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12, "tensor 'b' leaves 4 bytes unused"),
        ({"a": entry(0, 8)}, b"0000", "the tensors end at byte .*'a'"),
        ({"a": entry(0, 4)}, b"00000000", "the tensors end at byte"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    ],
)
def test_a_lying_header(header, data, message, tmp_path):
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"1234567", "7 bytes, too short"),
        (struct.pack("<Q", 100) + b"{}", "header of 100 bytes, but the file has 10"),
        (struct.pack("<Q", MAX_HEADER + 1) + b"{}", f"more than {MAX_HEADER}"),
        (struct.pack("<Q", 2**64 - 1), f"more than {MAX_HEADER}"),
    ],
)
def test_a_lying_length(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_header(tmp_path / "model.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 9)
)
def test_damage_is_an_error_or_harmless(tmp_path, flips, cut):
    header = {"a": entry(0, 8), "b": entry(8, 12)}
    path = write(tmp_path / "model.safetensors", header, b"0" * 12)
    content = bytearray(path.read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    path.write_bytes(content[: len(content) - cut])
    try:
        with open_checkpoint(tmp_path) as found:
            for name in found:
                found.read(name)
    except SourceError:
        pass


def shards(folder, weight_map, files):
    for file, tensors in files.items():
        save_file({name: torch.zeros(1) for name in tensors}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "files", "message"),
    [
        ({"a": "../x.safetensors"}, {}, "'a' is said to be in '../x.safetensors'"),
        ({"a": "/etc/x.safetensors"}, {}, "'a' is said to be in"),
        ({"a": "x\\y.safetensors"}, {}, "'a' is said to be in"),
        ({"a": "weights.bin"}, {}, "'a' is said to be in 'weights.bin'"),
        ({"a": 1}, {}, "'a' is said to be in '1'"),
        ({}, {}, "no weight_map"),
        ({"a": "x.safetensors"}, {}, "shard x.safetensors is missing"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, {"x.safetensors": "a"}, "tensor 'b' is not in x.safetensors"),
        ({"a": "x.safetensors"}, {"x.safetensors": "ab"}, "holds tensor 'b', which is not listed"),
        (
            {"a": "x.safetensors", "b": "y.safetensors"},
            {"x.safetensors": "a", "y.safetensors": "ab"},
            "tensor 'a' is in x.safetensors and again in y.safetensors",
        ),
    ],
)
def test_a_lying_index(weight_map, files, message, tmp_path):
    shards(tmp_path, weight_map, files)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


def test_a_file_cut_short_after_it_was_opened(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as found:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(SourceError, match=r"tensor 'a' ends .* bytes early"):
            found.read("a")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_state_dicts_are_read_with_weights_only(tmp_path, legacy):
    state = {"a": torch.arange(6.0).reshape(3, 2).T, "b": torch.tensor(2.0)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path) as found:
        assert torch.equal(found.read_rows("a", 1, 2), state["a"][1:])
        assert found.read("b") == 2.0


def test_a_pickled_tensor_is_read_by_rows_from_its_place_in_the_file(tmp_path, monkeypatch):
    whole = torch.arange(4000.0).reshape(400, 10)
    state = {"a": whole, "view": whole[100:200], "turned": whole.T, "none": torch.zeros(0, 3), "half": whole.half()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as found:
        for name, tensor in state.items():
            assert torch.equal(found.read(name), tensor), name
        asked = []
        fill = type(found)._fill
        monkeypatch.setattr(
            type(found), "_fill", lambda self, buffer, *more: (asked.append(len(buffer)), fill(self, buffer, *more))
        )
        assert torch.equal(found.read_rows("view", 3, 5), whole[103:105])
        assert asked == [2 * 10 * 4]
        with (tmp_path / "pytorch_model.bin").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(SourceError, match=r"tensor 'a' ends .* bytes early"):
            found.read("a")


def test_pickled_shards_are_those_of_their_index(tmp_path):
    for number, name in enumerate("ab", 1):
        torch.save({name: torch.ones(2)}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{number}-of-00002.bin" for number, name in enumerate("ab", 1)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as found:
        assert {name: found.read(name).tolist() for name in found} == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    index.write_text(json.dumps({"weight_map": weight_map | {"c": weight_map["a"]}}))
    with pytest.raises(SourceError, match=r"tensor 'c' is not in pytorch_model-00001-of-00002.bin"):
        open_checkpoint(tmp_path)
    torch.save({"a": torch.ones(2), "d": torch.ones(2)}, tmp_path / weight_map["a"])
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=r"pytorch_model-00001-of-00002.bin holds tensor 'd', which is not listed"):
        open_checkpoint(tmp_path)


def test_a_pickle_cut_short_is_to_be_fetched_again(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    with (tmp_path / "pytorch_model.bin").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(SourceError, match=r"pytorch_model.bin: is cut short.*\n.*fetch it again"):
        open_checkpoint(tmp_path)


def test_a_pickle_on_several_disks_is_none_that_is_read(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    locator = content.rindex(b"PK\x06\x07")  # of the zip64 table: signature, disk, offset, number of disks
    content[locator + 16 : locator + 20] = struct.pack("<L", 2)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(SourceError, match=r"pytorch_model.bin: cannot be loaded with weights_only"):
        open_checkpoint(tmp_path)


def test_a_head_that_shares_the_memory_of_the_embeddings_is_one_tensor(tmp_path):
    embeddings = torch.ones(3, 2)
    torch.save({"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as found:
        assert list(found) == ["model.embed_tokens.weight"]
    shard = "pytorch_model-00001-of-00001.bin"
    (tmp_path / "pytorch_model.bin").rename(tmp_path / shard)
    weight_map = {"model.embed_tokens.weight": shard, "lm_head.weight": shard}  # as Transformers listed both
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as found:
        assert list(found) == ["model.embed_tokens.weight"]


class Evil:
    def __reduce__(self):
        return (print, ("pickle code ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="weights_only"):
        open_checkpoint(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_no_weights(tmp_path):
    with pytest.raises(SourceError, match="has no weights"):
        open_checkpoint(tmp_path)
