"""Parameters read from published tensors block by block are those that are loaded whole."""

import numpy as np
import pytest
from random_models import FP8, STRUCTURES, flatten, random_params

from dsv3_jax.checkpoint import hf, hf_stored
from dsv3_jax.checkpoint.safetensors_files import Entry

CASES = [(config, "float32") for config in STRUCTURES.values()] + [(FP8, "fp8")]


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=[*STRUCTURES, "fp8"])
def test_blocks_equal_what_is_loaded_whole(tmp_path, config, dtype):
    hf.save(tmp_path / "hf", config, random_params(config), dtype=dtype)
    expected = flatten(hf.load_params(tmp_path / "hf", config, dtype=np.float32))
    stored = flatten(hf_stored.open_params(tmp_path / "hf", config))
    assert stored.keys() == expected.keys()
    for path, values in expected.items():
        assert stored[path].shape == values.shape
        np.testing.assert_array_equal(stored[path][()], values)
        depth = 1 + ("/experts/" in path) if "layers" in path else 0
        for index in np.ndindex(values.shape[:depth]):
            np.testing.assert_array_equal(stored[path][index], values[index])


def test_only_the_tensors_of_a_block_are_read(tmp_path, monkeypatch):
    config, names = FP8, []
    hf.save(tmp_path / "hf", config, random_params(config), dtype="fp8")
    stored = hf_stored.open_params(tmp_path / "hf", config)
    monkeypatch.setattr(Entry, "read", lambda entry, read=Entry.read: names.append(entry.offset) or read(entry))
    stored["moe_layers"]["mlp"]["experts"]["gate_up_proj"][(1, 2)]
    assert len(names) == 4, "gate and up, codes and scales"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="has neither"):
        hf_stored.open_params(tmp_path, FP8)
