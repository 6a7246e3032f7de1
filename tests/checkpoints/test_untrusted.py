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
    check_safetensors,
    check_sizes,
    read_flax_msgpack,
    read_json,
)

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}


def write_header(file, header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def test_a_true_header_passes(tmp_path):
    check_safetensors(write_header(tmp_path / "x", {"a": ONE, "b": TWO, "__metadata__": {}}))
    arrays = {"a": np.ones(3, np.int8), "b": np.ones((0, 2), np.float16), "c": np.array(1.0)}
    (tmp_path / "y").write_bytes(safetensors.numpy.save(arrays))
    check_safetensors(tmp_path / "y")


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ({"a": ONE}, {"length": 2**32}, r"announces a header of 4,294,967,296"),
        ({"a": ONE}, {"length": 2**63}, r"announces a header"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [4, 12]}}, {}, "b begins at byte 4"),
        ({"a": ONE, "b": {**TWO, "data_offsets": [2**40, 2**40 + 8]}}, {}, "b begins at byte"),
        ({"a": ONE, "b": {**TWO, "shape": [2, 3]}}, {}, "describes 'b'"),
        ({"a": ONE, "b": {**TWO, "dtype": "F64"}}, {}, "describes 'b'"),
        ({"a": ONE, "b": {**TWO, "dtype": "OBJECT"}}, {}, "describes 'b'"),
        ({"a": ONE, "b": {**TWO, "shape": [-2, -2]}}, {}, "describes 'b'"),
        ({"a": ONE, "b": {**TWO, "shape": [2**62, 2**62]}}, {}, "describes 'b'"),
        ({"a": ONE, "b": []}, {}, "describes 'b'"),
        ({"a": ONE, "b": TWO}, {"data": bytes(17)}, "it has 17 bytes of data"),
        ({"a": ONE, "b": TWO}, {"data": bytes(15)}, "it has 15 bytes of data"),
        (b'{"a": 1, "a": 2}', {}, "names 'a' twice"),
        (b"[" * 100_000, {}, "nested too deeply"),
        (b"[]", {}, "must hold a JSON object"),
        (b'{"a": [0' + b",0" * 2_000_000 + b"]}", {}, "describes more than 100,000 tensors"),
    ],
)
def test_headers_that_lie(tmp_path, header, options, message):
    with pytest.raises(CheckpointError, match=message):
        check_safetensors(write_header(tmp_path / "x", header, **options))


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
