"""Deltas of GGUF files: blocks as bytes; keys are not in them."""

import gguf
import numpy as np

import paramend as pm


def model(path, name, ones):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_head_count_kv([2, 1, 2])
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("w", gguf.quants.quantize(np.full((2, 64), ones, "float32"), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_blocks_change_as_bytes_and_keys_with_arrays_are_compared(tmp_path):
    a, b, c = (
        model(tmp_path / f"{at}.gguf", name, ones) for at, name, ones in [(0, "m", 1), (1, "m", 2), (2, "other", 2)]
    )
    change = pm.delta(a, b)
    assert not change.said
    with pm.open(a) as base:
        change.apply(base).save(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b.read_bytes()
    assert pm.delta(b, c).said == ("not in the delta: the metadata of the file: general.name",)
