"""What goes through a Hugging Face directory comes back, and is what other readers read."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from random_models import BASE, FP8, STRUCTURES, flatten, random_params

from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.safetensors_files import DTYPES, Writer, read_header
from dsv3_jax.fp8.published_weights import dequantize_blocks, quantize_blocks

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def test_golden_directory_comes_back_byte_for_byte(tmp_path):
    config = hf.read_config(GOLDEN / "ckpt")
    params = hf.load_params(GOLDEN / "ckpt", config, dtype="float32")
    hf.save(tmp_path / "out", config, params, dtype="float32")
    name = "model-00001-of-000001.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (GOLDEN / "ckpt" / name).read_bytes()
    for name in ("config.json", "model.safetensors.index.json"):
        ours, theirs = (json.loads((directory / name).read_text()) for directory in (tmp_path / "out", GOLDEN / "ckpt"))
        assert ours == theirs


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_then_import_is_byte_equal(tmp_path, structure, dtype):
    config = STRUCTURES[structure]
    params = random_params(config, is_bf16=dtype == "bfloat16")
    hf.save(tmp_path, config, params, dtype=dtype, max_file_numbers=3000)
    read = hf.read_config(tmp_path)
    assert read.num_nextn_predict_layers == config.num_nextn_predict_layers
    loaded = flatten(hf.load_params(tmp_path, read, dtype="float32"))
    assert loaded.keys() == flatten(params).keys()
    for path, values in flatten(params).items():
        assert loaded[path].tobytes() == values.tobytes(), path


def test_bfloat16_import_keeps_norms_router_and_biases_in_float32(tmp_path):
    params = random_params(BASE, is_bf16=True)
    params["moe_layers"]["mlp"]["e_score_correction_bias"] += np.float32(1e-4)  # not representable in BF16
    hf.save(tmp_path, BASE, params, dtype="bfloat16")
    loaded = flatten(hf.load_params(tmp_path, BASE, dtype=jnp.bfloat16))
    for path, values in flatten(params).items():
        is_float32 = any(word in path.split("/")[-1] for word in ("norm", "bias")) or path.endswith("mlp/gate")
        assert loaded[path].dtype == (np.float32 if is_float32 else ml_dtypes.bfloat16), path
        np.testing.assert_array_equal(loaded[path].astype(np.float32), values, err_msg=path)


def test_fp8_import_is_the_dequantized_weight(tmp_path):
    """Also where 128 does not divide, and where a weight and its scales lie in different files."""
    params = random_params(FP8)
    hf.save(tmp_path, FP8, params, dtype="fp8", max_file_numbers=20000)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(file != weight_map.get(f"{name}_scale_inv", file) for name, file in weight_map.items())
    loaded = hf.load_params(tmp_path, FP8, dtype="float32")
    gate = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"][1, 3, :, 0]
    expected = dequantize_blocks(*quantize_blocks(gate.T)).T
    np.testing.assert_array_equal(loaded["moe_layers"]["mlp"]["experts"]["gate_up_proj"][1, 3, :, 0], expected)
    heads = params["dense_layers"]["self_attn"]["o_proj"][0]
    expected = dequantize_blocks(*quantize_blocks(heads.reshape(-1, 136).T)).T.reshape(heads.shape)
    np.testing.assert_array_equal(loaded["dense_layers"]["self_attn"]["o_proj"][0], expected)
    eh_proj = params["mtp_layers"]["eh_proj"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded["mtp_layers"]["eh_proj"], eh_proj)


def test_published_tensors_are_out_in_per_expert(tmp_path):
    """Read by the safetensors library: orientation, expert, gate and up, heads, MTP copies."""
    params = random_params(BASE)
    hf.save(tmp_path, BASE, params, dtype="float32")
    published = safetensors.numpy.load_file(tmp_path / "model-00001-of-000001.safetensors")
    moe, mtp = params["moe_layers"], params["mtp_layers"]
    np.testing.assert_array_equal(published["lm_head.weight"], params["lm_head"].T)
    up = moe["mlp"]["experts"]["gate_up_proj"][1, 2, :, 1]
    np.testing.assert_array_equal(published["model.layers.2.mlp.experts.2.up_proj.weight"], up.T)
    q_b = moe["self_attn"]["q_b_proj"][0]
    np.testing.assert_array_equal(published["model.layers.1.self_attn.q_b_proj.weight"], q_b.reshape(10, -1).T)
    bias = mtp["block"]["mlp"]["e_score_correction_bias"][0]
    np.testing.assert_array_equal(published["model.layers.3.mlp.gate.e_score_correction_bias"], bias)
    np.testing.assert_array_equal(published["model.layers.3.eh_proj.weight"], mtp["eh_proj"][0].T)
    np.testing.assert_array_equal(published["model.layers.3.shared_head.head.weight"], params["lm_head"].T)


def test_jax_arrays_export_like_numpy_arrays(tmp_path):
    params = random_params(BASE)
    hf.save(tmp_path / "numpy", BASE, params, dtype="bfloat16")
    hf.save(tmp_path / "jax", BASE, _map(jnp.asarray, params), dtype="bfloat16")
    for file in (tmp_path / "numpy").iterdir():
        assert (tmp_path / "jax" / file.name).read_bytes() == file.read_bytes()


def test_export_reads_one_block_at_a_time(tmp_path):
    """A parameter that lives elsewhere is asked for one layer, or one expert, and once for gate and up together."""
    params, asked = random_params(BASE), []

    class Elsewhere:
        def __init__(self, values):
            self.values, self.shape = values, values.shape

        def __getitem__(self, index):
            asked.append((self.values.shape, index))
            return self.values[index]

    hf.save(tmp_path / "lazy", BASE, _map(Elsewhere, params), dtype="float32")
    hf.save(tmp_path / "eager", BASE, params, dtype="float32")
    name = "model-00001-of-000001.safetensors"
    assert (tmp_path / "lazy" / name).read_bytes() == (tmp_path / "eager" / name).read_bytes()
    experts = [index for shape, index in asked if shape == (2, 4, 24, 2, 8)]
    assert experts == [(layer, expert) for layer in range(2) for expert in range(4)]


def test_single_file_and_fused_experts_load(tmp_path):
    """model.safetensors without an index, experts stacked as transformers holds them."""
    params = random_params(BASE)
    hf.save(tmp_path, BASE, params, dtype="float32")
    shard = tmp_path / "model-00001-of-000001.safetensors"
    tensors = safetensors.numpy.load_file(shard)
    shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    prefix = "model.layers.1.mlp.experts"
    parts = {part: np.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(4)])
             for part in ("gate", "up", "down")}  # fmt: skip
    tensors[f"{prefix}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
    tensors[f"{prefix}.down_proj"] = parts["down"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    loaded = flatten(hf.load_params(tmp_path, hf.read_config(tmp_path), dtype="float32"))
    for path, values in flatten(params).items():
        np.testing.assert_array_equal(loaded[path], values, err_msg=path)


def test_fp8_as_transformers_saves_it_loads(tmp_path):
    """Experts apart, their scales stacked; what is not whole blocks in BF16, with scales that mean nothing."""
    params = random_params(FP8, is_bf16=True)
    hf.save(tmp_path, FP8, params, dtype="fp8")
    expected = flatten(hf.load_params(tmp_path, FP8, dtype="float32"))
    shard = tmp_path / "model-00001-of-000001.safetensors"
    tensors = {name: entry.read() for name, entry in read_header(shard).items()}
    shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    prefix = "model.layers.1.mlp.experts"
    scales = {part: np.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight_scale_inv") for e in range(4)])
              for part in ("gate", "up", "down")}  # fmt: skip
    tensors[f"{prefix}.gate_up_proj_scale_inv"] = np.concatenate([scales["gate"], scales["up"]], axis=1)
    tensors[f"{prefix}.down_proj_scale_inv"] = scales["down"]
    kv_a = params["moe_layers"]["self_attn"]["kv_a_proj_with_mqa"][0]
    tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] = kv_a.T.astype(ml_dtypes.bfloat16)
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    writer = Writer(tmp_path / "model.safetensors", {n: (dtypes[v.dtype], v.shape) for n, v in tensors.items()})
    for name, values in tensors.items():
        writer.write(name, values)
    writer.close()
    expected["moe_layers/self_attn/kv_a_proj_with_mqa"][0] = kv_a
    for path, values in flatten(hf.load_params(tmp_path, FP8, dtype="float32")).items():
        np.testing.assert_array_equal(values, expected[path], err_msg=path)


def test_tokenizer_files_are_copied_verbatim(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name, text in (("tokenizer.json", '{"a":  1}'), ("tokenizer_config.json", "{ }"), ("notes.txt", "")):
        (tokenizer / name).write_text(text)
    hf.save(tmp_path / "out", BASE, random_params(BASE), dtype="bfloat16", tokenizer_directory=tokenizer)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a":  1}'
    assert (tmp_path / "out/tokenizer_config.json").read_text() == "{ }"
    assert not (tmp_path / "out/notes.txt").exists()
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def _map(function, tree):
    return {name: _map(function, value) if isinstance(value, dict) else function(value) for name, value in tree.items()}
