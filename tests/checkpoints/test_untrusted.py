import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.untrusted import (
    check_finite,
    check_sizes,
    open_safetensors,
    read_flax_msgpack,
    read_json,
)

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}


def as_json(entry):
    return json.dumps(entry).encode()


def write_header(file, header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else as_json(header)
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def shapes_in(file):
    opened = open_safetensors(file)
    return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def test_a_true_header_passes(tmp_path):
    file = write_header(tmp_path / "x", {"a": ONE, "b": TWO, "__metadata__": {}})
    assert shapes_in(file) == {"a": (2,), "b": (2, 2)}
    arrays = {"a": np.ones(3, np.int8), "b": np.ones((0, 2), np.float16), "c": np.array(1.0)}
    (tmp_path / "y").write_bytes(safetensors.numpy.save(arrays))
    assert shapes_in(tmp_path / "y") == {name: array.shape for name, array in arrays.items()}
    assert shapes_in(write_header(tmp_path / "z", {}, b"")) == {}


DAMAGED = "is not a whole safetensors file .*: it is damaged"


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        # What safetensors refuses.
        ({"a": ONE}, {"length": 500}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "data_offsets": [4, 12]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "data_offsets": [12, 20]}}, {"data": bytes(20)}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "data_offsets": [16, 8]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "data_offsets": [2**40, 2**40 + 8]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "shape": [2, 3]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "shape": [-2, -2]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "shape": [2.0, 2.0]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "shape": [2**62, 2**62]}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "dtype": "F64"}}, {}, DAMAGED),
        ({"a": ONE, "b": {**TWO, "dtype": "OBJECT"}}, {}, DAMAGED),
        ({"a": ONE, "b": {"dtype": "BF16", "shape": [2, 2]}}, {}, DAMAGED),
        ({"a": ONE, "b": []}, {}, DAMAGED),
        ({"a": ONE, "b": TWO}, {"data": bytes(17)}, DAMAGED),
        ({"a": ONE, "b": TWO}, {"data": bytes(15)}, DAMAGED),
        (b'{"\xff": 1}', {}, DAMAGED),
        (b'{"a":' * 50_000, {}, DAMAGED),
        (b"[]", {}, DAMAGED),
        # What it lets pass.
        ({"a": ONE}, {"length": 2**25 + 1}, r"announces a header of 33,554,433 bytes\): it is dam"),
        ({"a": ONE}, {"length": 2**63}, r"announces a header of 9,223,"),
        (b'{"a": [0' + b",0" * 2_000_000 + b"]}", {}, "describes more than 100,000 tensors"),
        (b'{"a": %s, "b": %s, "b": %s}' % tuple(map(as_json, (ONE, TWO, TWO))), {}, "names 'b' tw"),
        ({"a": ONE, "b" * 1025: TWO}, {}, "has a name of 1,025 characters: at most 1,024 are read"),
    ],
)
def test_headers_that_lie(tmp_path, header, options, message):
    file = write_header(tmp_path / "x", header, **options)
    with pytest.raises(CheckpointError, match=message) as error:
        open_safetensors(file)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_safetensors_file_too_short_for_a_header(tmp_path):
    for content in (b"", b"1234567", bytes(8)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CheckpointError, match=DAMAGED):
            open_safetensors(tmp_path / "x")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk", [2**30, 40])
def test_msgpack_arrays_are_what_flax_wrote(tmp_path, monkeypatch, dtype, chunk):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tree = {"a": {"b": np.arange(30).reshape(5, 6).astype(dtype)}, "c": np.ones((), dtype)}
    file = tmp_path / "x"
    file.write_bytes(serialization.msgpack_serialize(tree))
    arrays = read_flax_msgpack(file, memoryview(file.read_bytes()))
    assert set(arrays) == {"a.b", "c"}
    assert len(arrays["a.b"].parts) == (
        1 if chunk > 1000 else -(-30 // (chunk // np.dtype(dtype).itemsize))
    )
    for name, expected in (("a.b", tree["a"]["b"]), ("c", tree["c"])):
        read = arrays[name].read(file)
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xdf\xff\xff\xff\xff", "announces a map beyond the end"),
        (b"\x81\xdb\xff\xff\xff\xffa", "announces a string beyond the end"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "ends too soon"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "something else than an array as a"),
        (b"\x81\xa1a" * 40_000, "nested too deeply"),
        (b"\x82\xa1a\x80\xa1a\x80", "names a twice"),
        (b"\x80\x80", "more follows"),
        (b"\x81\xa1a\xd4\x02\x00", "something else than an array as a"),
        (b"\xde\xff\xff" + b"\xa1a\x80" * 30_000, "names a twice"),
    ],
)
def test_msgpack_bombs(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        read_flax_msgpack(tmp_path / "x", memoryview(data))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(dtype, value):
    array = np.ones((3, 4), dtype)
    assert check_finite(array, "w", "file") is array
    array[1, 2] = value
    with pytest.raises(CheckpointError, match=rf"file holds w with .*{value}.* at \(1, 2\)"):
        check_finite(array, "w", "file")


def test_weights_beyond_float32():
    with pytest.raises(CheckpointError, match=r"w with the value 1e\+300 at \(0,\)"):
        check_finite(np.array([1e300]), "w", "file")


def test_configs_beyond_what_is_stored():
    shapes = [(97, 32), (32,)]
    check_sizes(2, {"vocab_size": 97}, shapes, "config")
    with pytest.raises(CheckpointError, match="config has 3 layers, but the checkpoint has 2"):
        check_sizes(3, {}, shapes, "config")
    with pytest.raises(CheckpointError, match=f"vocab_size={10**12}, but no stored tensor"):
        check_sizes(2, {"vocab_size": 10**12}, shapes, "config")


def test_json_that_is_far_too_large(tmp_path):
    file = tmp_path / "x.json"
    with file.open("wb") as f:
        f.truncate(2**40)
    with pytest.raises(CheckpointError, match="has 1,099,511,627,776 bytes, too many"):
        read_json(file)
