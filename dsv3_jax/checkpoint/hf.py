"""Hugging Face directories in and out, streamed: beside the parameters, one tensor is in memory at a time.

Three layouts of the weights: "float32", "bfloat16", and "fp8", the published one (E4M3 with a float32
`weight_scale_inv` per 128x128 block; embedding, head, norms, router and `eh_proj` in BF16). The router's correction
bias is float32 in all three.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from dsv3_jax.checkpoint import hf_config
from dsv3_jax.checkpoint.hf_names import PublishedTensor, leaf, published_tensors
from dsv3_jax.checkpoint.hf_source import INDEX, list_tensors, resolve
from dsv3_jax.checkpoint.safetensors_files import DTYPES, Writer, num_bytes
from dsv3_jax.config import ModelConfig, require
from dsv3_jax.fp8.published_weights import BLOCK, dequantize_blocks, num_blocks, quantize_blocks
from dsv3_jax.model import param_specs
from dsv3_jax.model.params import FLOAT32_PARAMS

LAYOUTS = {"float32": "F32", "bfloat16": "BF16", "fp8": "BF16"}  # -> dtype of what the layout does not quantize
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# The published checkpoint was written by eight pipeline stages, a file closing when it held 2^32 numbers.
MAX_FILE_NUMBERS = 2**32
_PUBLISHED_DEPTH = 61
_PUBLISHED_STAGE_STARTS = (7, 15, 23, 31, 39, 47, 54)
_COMPARED_ROWS = 4096
_ALIGNMENT = 64  # bytes; a CPU device takes such memory as it is


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of an export."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as in safetensors: F8_E4M3, BF16 or F32
    file: str


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """Reads the network's configuration from a Hugging Face directory.

    The number of MTP modules is that of the weights: transformers writes `num_nextn_predict_layers` 1 and drops the
    module, older configs lack the field. Weights with modules that config.json contradicts are refused.

    Raises:
      ValueError: a missing or unreadable file, another architecture, an unsupported value.
    """
    directory = pathlib.Path(directory)
    values = _read_config_json(directory)
    config = hf_config.from_json(values)
    layers = {tensor.split(".")[2] for tensor in list_tensors(directory) if tensor.startswith("model.layers.")}
    found = sum(layer.isdecimal() and int(layer) >= config.num_hidden_layers for layer in layers)
    claimed = config.num_nextn_predict_layers
    field = "num_nextn_predict_layers"
    require(field not in values or found in (0, claimed), f"{directory}/config.json: {field}", claimed,
            f"the weights hold {found} layers beyond num_hidden_layers={config.num_hidden_layers}; "
            "correct either field")  # fmt: skip
    if found < claimed:
        logging.warning("%s: the weights hold no MTP module; config.json says %d", directory, claimed)
    return dataclasses.replace(config, num_nextn_predict_layers=found)


def load_params(directory: str | os.PathLike, config: ModelConfig, *, dtype: Any) -> dict:
    """Loads a Hugging Face directory into the tree of `param_specs(config)`.

    BF16, float32 and FP8 weights, sharded with an index or in one `model.safetensors`, experts apart (as published)
    or fused (as transformers holds them). Everything is checked before any weight is read. With
    `config.num_nextn_predict_layers` 0, MTP modules in the directory are left out.

    Args:
      dtype: float32 or bfloat16, of linears and embeddings. Norms, router and biases are float32.

    Returns:
      numpy arrays, aligned so that `jax.device_put` onto a CPU does not copy them (`jnp.asarray` does).

    Raises:
      ValueError: a missing, extra or mis-shaped tensor, a dtype that cannot be read, a missing or truncated file, MTP
        copies of the embedding or head that differ from the originals.
    """
    dtype = np.dtype(dtype)
    require(dtype in (DTYPES["F32"], DTYPES["BF16"]), "dtype", str(dtype), "choose float32 or bfloat16")
    directory = pathlib.Path(directory)
    sources = resolve(directory, config)
    params = _allocate(param_specs(config), dtype)
    for tensor in published_tensors(config):
        if tensor.name not in sources:  # an absent copy
            continue
        entry, scale = sources[tensor.name]
        weight = entry.read() if scale is None else dequantize_blocks(entry.read(), scale.read())
        parameter = leaf(params, tensor.path)
        if tensor.is_copy:
            _require_equal(tensor, weight, parameter, entry.file)
        else:
            tensor.place(weight, parameter)
    return params


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    *,
    dtype: str,
    tokenizer_directory: str | os.PathLike | None = None,
    max_file_numbers: int = MAX_FILE_NUMBERS,
) -> None:
    """Writes a Hugging Face directory: weights, index, config.json, generation_config.json, tokenizer files.

    It appears whole or not at all: written beside its place as `.NAME.partial`, then renamed.

    Args:
      directory: does not exist yet, or is empty.
      params: tree of `param_specs(config)`. Leaves are jax or numpy arrays, or anything that has `shape` and returns
        an array for `leaf[()]`, `leaf[(layer,)]` or `leaf[(layer, expert)]`: only one such block is in memory.
      dtype: "float32", "bfloat16" or "fp8".
      tokenizer_directory: its tokenizer files are copied byte for byte; so are the published repository's own Python
        files if it has them, and `auto_map` then names them.
      max_file_numbers: numbers after which a weight file is closed.

    Raises:
      ValueError: the directory is not empty, the disk is too small, the tokenizer is missing, the layout cannot hold
        this configuration, parameters of another configuration, or (FP8) values that are not finite.
    """
    target = pathlib.Path(directory).absolute()
    table = tensor_table(config, dtype=dtype, max_file_numbers=max_file_numbers)
    extra_files = _extra_files(tokenizer_directory)
    _require_same_tree(param_specs(config), params, "")
    _require_room(target, sum(num_bytes(info.dtype, info.shape) for info in table))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, table, _tensors(config, params, dtype))
        _write_index(partial, table)
        _write_json(partial / "config.json", hf_config.to_json(
            config, dtype=dtype, has_remote_code=set(hf_config.REMOTE_CODE_FILES) <= {file.name for file in extra_files}
        ))  # fmt: skip
        _write_json(partial / "generation_config.json", hf_config.generation_json(config))
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tensor_table(config: ModelConfig, *, dtype: str, max_file_numbers: int = MAX_FILE_NUMBERS) -> list[TensorInfo]:
    """Lists every tensor of an export, in the order it is written; nothing is allocated.

    For the published depth, files break where those of the published checkpoint do.

    Raises:
      ValueError: an unknown layout, or one that cannot hold this configuration.
    """
    _require_layout(config, dtype)
    tensors, file, numbers = [], 0, 0
    starts = set(_PUBLISHED_STAGE_STARTS) if config.num_hidden_layers == _PUBLISHED_DEPTH else set()
    for tensor in published_tensors(config):
        if tensor.layer in starts:
            starts.remove(tensor.layer)
            numbers = max_file_numbers
        for name, shape, stored in _stored(tensor, dtype):
            if numbers >= max_file_numbers:
                file, numbers = file + 1, 0
            tensors.append((name, shape, stored, file))
            numbers += math.prod(shape)
    return [
        TensorInfo(name, shape, stored, f"model-{file + 1:05d}-of-{tensors[-1][-1] + 1:06d}.safetensors")
        for name, shape, stored, file in tensors
    ]


def _stored(tensor: PublishedTensor, dtype: str) -> list[tuple[str, tuple[int, ...], str]]:
    if dtype == "fp8" and tensor.row.is_fp8:
        scale_shape = tuple(num_blocks(size) for size in tensor.shape)
        return [(tensor.name, tensor.shape, "F8_E4M3"), (f"{tensor.name}_scale_inv", scale_shape, "F32")]
    return [(tensor.name, tensor.shape, "F32" if tensor.row.is_float32 else LAYOUTS[dtype])]


def _require_layout(config: ModelConfig, dtype: str) -> None:
    require(dtype in LAYOUTS, "dtype", dtype, f"choose one of {tuple(LAYOUTS)}")
    if dtype != "fp8":
        return
    require(config.moe_intermediate_size % BLOCK == 0, "model.moe_intermediate_size", config.moe_intermediate_size,
            f"vLLM refuses FP8 experts whose width is not a multiple of {BLOCK}; export as bfloat16")  # fmt: skip
    merged = {"q_lora_rank": config.q_lora_rank}  # vLLM fuses q_a with kv_a, and gate with up
    if config.num_dense_layers:
        merged["intermediate_size"] = config.intermediate_size
    for name, value in merged.items():
        if value is not None and value % BLOCK:
            logging.warning("model.%s=%d is not a multiple of %d: vLLM may refuse this FP8 export", name, value, BLOCK)


def _tensors(config: ModelConfig, params: dict, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of `tensor_table`, in its order; reads every block of `params` once."""
    key, block = None, None
    for tensor in published_tensors(config):
        if (tensor.path, tensor.index) != key:  # gate and up share a block
            key, block = (tensor.path, tensor.index), None  # the previous block is freed first
            block = _read_block(leaf(params, tensor.path), tensor.index)
        (name, _, stored), *scale = _stored(tensor, dtype)
        weight = tensor.publish(block)
        if scale:
            codes, scales = quantize_blocks(weight)
            require(bool(np.isfinite(scales).all()), tensor.name, "not finite", "FP8 has no infinity; mend the weights")
            yield name, codes
            yield scale[0][0], scales
        else:
            yield name, weight.astype(DTYPES[stored], copy=False)


def _read_block(parameter: Any, index: tuple[int, ...]) -> np.ndarray:
    is_in_host_memory = isinstance(parameter, jax.Array) and [d.platform for d in parameter.devices()] == ["cpu"]
    if is_in_host_memory:
        parameter = np.asarray(parameter)  # a view: nothing is copied, and no slice is compiled
    return np.asarray(parameter[index])


def _write_weights(directory: pathlib.Path, table: list[TensorInfo], tensors: Iterator) -> None:
    files: dict[str, dict] = {}
    for info in table:
        files.setdefault(info.file, {})[info.name] = (info.dtype, info.shape)
    for file, contents in files.items():
        writer = Writer(directory / file, contents)
        for expected in contents:
            name, values = next(tensors)
            assert name == expected, (name, expected)
            writer.write(name, values)
        writer.close()


def _write_index(directory: pathlib.Path, table: list[TensorInfo]) -> None:
    total = sum(num_bytes(info.dtype, info.shape) for info in table)
    weight_map = {info.name: info.file for info in sorted(table, key=lambda info: info.name)}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: pathlib.Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def _extra_files(tokenizer_directory: str | os.PathLike | None) -> list[pathlib.Path]:
    if tokenizer_directory is None:
        return []
    directory = pathlib.Path(tokenizer_directory)
    require((directory / "tokenizer.json").is_file(), "tokenizer_directory", str(directory), "has no tokenizer.json")
    names = TOKENIZER_FILES + hf_config.REMOTE_CODE_FILES
    return [directory / name for name in names if (directory / name).is_file()]


def _require_same_tree(specs: dict, params: dict, prefix: str) -> None:
    for name in params:
        require(name in specs, prefix + name, "present", "the configuration has no such parameter")
    for name, spec in specs.items():
        require(name in params, prefix + name, None, "this parameter of the configuration is missing")
        if isinstance(spec, dict):
            _require_same_tree(spec, params[name], f"{prefix}{name}/")
        else:
            shape = tuple(params[name].shape)
            require(shape == spec.shape, prefix + name, shape, f"the configuration needs shape {spec.shape}")


def _require_room(target: pathlib.Path, needed: int) -> None:
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(is_free, "output directory", str(target), "exists and is not empty; choose another or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    require(needed < free, "output directory", str(target),
            f"the weights need {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")  # fmt: skip


def _read_config_json(directory: pathlib.Path) -> dict:
    file = directory / "config.json"
    require(file.is_file(), "Hugging Face directory", str(directory), "has no config.json; check the path")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch it again") from error


def _allocate(specs: dict, dtype: np.dtype) -> dict:
    return {
        name: _allocate(spec, dtype)
        if isinstance(spec, dict)
        else _aligned(spec.shape, DTYPES["F32"] if name in FLOAT32_PARAMS else dtype)
        for name, spec in specs.items()
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _require_equal(tensor: PublishedTensor, weight: np.ndarray, parameter: np.ndarray, file: pathlib.Path) -> None:
    original = parameter.T if tensor.row.in_dims else parameter
    for start in range(0, len(weight), _COMPARED_ROWS):
        rows = slice(start, start + _COMPARED_ROWS)
        is_equal = np.array_equal(weight[rows].astype(original.dtype), original[rows])
        require(is_equal, f"{file}: {tensor.name}", "another matrix",
                f"must repeat {'.'.join(tensor.path)}: MTP modules share embedding and head")  # fmt: skip
