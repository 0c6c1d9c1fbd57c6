"""Folders of safetensors files that somebody else wrote: read whole, or refused in one line."""

import json
import os
import random
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lightning_jax.config.errors import UserError
from lightning_jax.interop import hf
from lightning_jax.interop.hf.safetensors_files import INDEX, SINGLE, Reader
from tests.interop.hf.test_models import LLAMA, assert_same_bits, edit_tensors, make

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path / "model", config, params)
    return tmp_path / "model"


def shard(folder, names=("a.safetensors", "b.safetensors")):
    """Splits the folder's file in two, with an index; returns the index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    where = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        held = {name: value for name, value in tensors.items() if where[name] == file}
        save_file(held, folder / file)
    write_index(folder, where)
    return where


def write_index(folder, where):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# Case E5: links into a cache, as downloads have them, are followed; paths are not.
def test_links_that_leave_the_folder_are_read(folder):
    whole = hf.load(folder).params
    where = shard(folder)
    (folder.parent / "blobs").mkdir()
    for file in set(where.values()):
        os.rename(folder / file, folder.parent / "blobs" / file)
        (folder / file).symlink_to(f"../blobs/{file}")
    assert_same_bits(hf.load(folder).params, whole)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./a.safetensors"]
    + ["..\\x", "a\0b", "\ud800.safetensors", "a\nb", "x" * 1000],
)
def test_a_path_in_the_index_is_refused(file, folder):
    where = shard(folder)
    write_index(folder, where | {NORM: file})
    refused(folder, f"{INDEX}: weight_map: {NORM} = ")


@pytest.mark.parametrize("where", [None, [], "x", {NORM: 1}, {NORM: None}, {NORM: ["a"]}])
def test_an_index_of_another_shape_is_refused(where, folder):
    shard(folder)
    write_index(folder, where)
    refused(folder, f"{INDEX}: weight_map = ")
    (folder / INDEX).write_text("{}")
    refused(folder, f"{INDEX}: lacks weight_map")


def test_files_that_the_index_names_in_vain(folder):
    where = shard(folder)
    write_index(folder, where | {NORM: "c.safetensors"})
    refused(folder, "c.safetensors: no such file")
    write_index(folder, where | {"model.bonus": "a.safetensors"})
    refused(folder, "a.safetensors: lacks 'model.bonus', which model.safetensors.index.json says")
    (folder / "c.safetensors").mkdir()
    write_index(folder, where | {NORM: "c.safetensors"})
    refused(folder, "c.safetensors: no such file")


def test_two_models_in_one_folder(folder):
    content = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / SINGLE).write_bytes(content)
    refused(folder, "has model.safetensors, and model.safetensors.index.json of other files")
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), SINGLE))
    hf.load(folder)


def test_a_tensor_in_two_files(folder):
    where = shard(folder)
    held = load_file(folder / "a.safetensors")
    save_file(held | {NORM: np.ones(32, np.float32)}, folder / "a.safetensors")
    save_file(
        load_file(folder / "b.safetensors") | {NORM: np.ones(32, np.float32)},
        folder / "b.safetensors",
    )
    write_index(folder, where)
    refused(folder, f"{NORM} is in a.safetensors and in b.safetensors")


def test_a_tensor_under_two_names(folder):
    edit_tensors(folder, lambda t: t.update({"norm.weight": t[NORM]}))
    refused(folder, "norm.weight and .*norm.weight are names of the same tensor")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint16", "bool"])
def test_integers_are_no_weights(dtype, folder):
    edit_tensors(folder, lambda t: t.update({NORM: np.ones(32, dtype)}))
    refused(folder, f"{NORM} is (I|U|B).*: weights are one of F64, F32, F16, BF16")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_are_no_weights(dtype, folder):
    edit_tensors(folder, lambda t: t.update({NORM: np.ones(32, getattr(ml_dtypes, dtype))}))
    refused(folder, f"{NORM} is F8_.*: save them dequantized first|weights are one of")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_floats_are_read(dtype, folder):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    edit_tensors(folder, lambda t: t.update({NORM: np.full(32, 0.5, dtype)}))
    np.testing.assert_array_equal(hf.load(folder).params["final_norm"]["scale"], 0.5)


# Cases D1, E5
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_are_not_finite_are_named(value, name, folder):
    edit_tensors(folder, lambda t: t[name].reshape(-1).__setitem__(3, value))
    refused(folder, f"{name} has values that are not finite")


def test_weights_that_are_not_finite_once_they_are_float32(folder):
    edit_tensors(folder, lambda t: t.update({NORM: np.full(32, 1e300)}))
    refused(folder, f"{NORM} has values that are not finite")


@pytest.mark.parametrize("shape", [(0,), (), (32, 1), (32, 0), (31,)])
def test_shapes_that_the_config_does_not_say(shape, folder):
    edit_tensors(folder, lambda t: t.update({NORM: np.ones(shape, np.float32)}))
    refused(folder, f"{NORM} has shape .*, config.json says")


def header(folder, change):
    """Replaces the header of the file, whose length stands before it."""
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    described = json.loads(content[8 : 8 + length])
    made = json.dumps(change(described)).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(made)) + made + content[8 + length :])


@pytest.mark.parametrize("length", [0, 1, 8, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file(length, folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, f"{SINGLE}: not a whole safetensors file")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 2000, -1])
def test_cut_files(size, folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:size])
    refused(folder, f"{SINGLE}: not a whole safetensors file")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: [h],
        lambda h: h | {NORM: 1},
        lambda h: h | {NORM: h[NORM] | {"dtype": "X9"}},
        lambda h: h | {NORM: h[NORM] | {"dtype": None}},
        lambda h: h | {NORM: h[NORM] | {"shape": [2**63, 2**63]}},
        lambda h: h | {NORM: h[NORM] | {"shape": [-32]}},
        lambda h: h | {NORM: h[NORM] | {"data_offsets": [0, 2**63]}},
        lambda h: h | {NORM: h[NORM] | {"data_offsets": [128, 0]}},
        lambda h: h | {"__metadata__": [1]},
    ],
)
def test_headers_that_make_no_sense(change, folder):
    header(folder, change)
    refused(folder, f"{SINGLE}: not a whole safetensors file")


# Case E4
def test_flipped_and_cut_bytes_of_the_header_are_a_line_or_read(folder):
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    generator = random.Random(0)
    lines = 0
    for _ in range(400):
        broken = bytearray(content)
        for _ in range(generator.choice([1, 1, 3, 30])):
            broken[generator.randrange(8 + length)] = generator.randrange(256)
        (folder / SINGLE).write_bytes(broken)
        try:
            with Reader(folder) as reader:
                for name in reader.names:
                    reader.shape(name)
        except UserError as error:
            assert "\n" not in str(error)
            lines += 1
    assert lines > 300
