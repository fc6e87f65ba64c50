"""What a Hugging Face directory holds, checked against a configuration before any weight is read."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable

from absl import logging

from dsv3_jax.checkpoint.hf_names import PublishedTensor, published_tensors
from dsv3_jax.checkpoint.safetensors_files import DTYPES, Entry, read_header
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.published_weights import num_blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SCALE = "_scale_inv"
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")


def list_tensors(directory: pathlib.Path) -> dict[str, Entry]:
    """Returns every tensor of a directory by its published name; experts that are stored fused appear one by one.

    Raises:
      ValueError: no weights, an index that does not match its files, a file that is not whole.
    """
    if (directory / INDEX).is_file():
        entries = _list_sharded(directory)
    elif (directory / SINGLE).is_file():
        entries = read_header(directory / SINGLE)
    else:
        raise ValueError(f"{directory}: has neither {INDEX} nor {SINGLE}; check the path or fetch it again")
    listed = {}
    for name, entry in entries.items():
        listed |= _split_fused(name, entry)
    return listed


def resolve(directory: pathlib.Path, config: ModelConfig) -> dict[str, tuple[Entry, Entry | None]]:
    """Returns where every published tensor lies: its weight and, if that is FP8, its scales.

    Copies that MTP modules hold of the embedding and the head may be absent.

    Raises:
      ValueError: a missing or extra tensor, another shape, a dtype that cannot be read.
    """
    entries = list_tensors(directory)
    expected = list(published_tensors(config))
    _require_none(directory, _missing(entries, expected), "missing; fetch the directory again or correct config.json")
    _require_none(directory, _extra(entries, expected, config), "not part of this config.json; correct it")
    return {tensor.name: _source(tensor, entries) for tensor in expected if tensor.name in entries}


def _list_sharded(directory: pathlib.Path) -> dict[str, Entry]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        by_file = {file: {name for name in weight_map if weight_map[name] == file} for file in set(weight_map.values())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r}); fetch it again") from error
    absent = [file for file in by_file if not (directory / file).is_file()]
    _require_none(index, absent, "named here but does not exist; fetch it")
    entries = {}
    for file, names in sorted(by_file.items()):
        path = directory / file
        found = read_header(path)
        _require_none(path, names - found.keys(), f"missing although {INDEX} names it here; fetch both again")
        _require_none(path, found.keys() - names, f"not in {INDEX}; fetch both again")
        entries |= found
    return entries


def _split_fused(name: str, entry: Entry) -> dict[str, Entry]:
    """Cuts the stacked experts that transformers holds in memory ([E, 2F, D], [E, D, F]) into published tensors.

    Saving FP8 experts, transformers 5 writes the weights one by one and their scales stacked.
    """
    match = _FUSED.fullmatch(name)
    if match is None or len(entry.shape) != 3 or entry.dtype not in DTYPES:
        return {name: entry}
    num_experts, rows, columns = entry.shape
    projections = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    shape = (rows // len(projections), columns)
    num_bytes = math.prod(shape) * DTYPES[entry.dtype].itemsize
    suffix = f"weight{match[3]}" if match[3] else "weight"
    names = [f"{match[1]}.{expert}.{part}.{suffix}" for expert in range(num_experts) for part in projections]
    return {
        name: dataclasses.replace(entry, shape=shape, offset=entry.offset + position * num_bytes)
        for position, name in enumerate(names)
    }


def _missing(entries: dict[str, Entry], expected: list[PublishedTensor]) -> Iterable[str]:
    for tensor in expected:
        if tensor.name not in entries:
            if not tensor.is_copy:
                yield tensor.name
        elif entries[tensor.name].dtype == "F8_E4M3" and tensor.row.is_fp8 and tensor.name + _SCALE not in entries:
            yield tensor.name + _SCALE


def _extra(entries: dict[str, Entry], expected: list[PublishedTensor], config: ModelConfig) -> Iterable[str]:
    known = {tensor.name for tensor in expected}
    scales = {tensor.name + _SCALE for tensor in expected if tensor.row.is_fp8}
    for name in entries.keys() - known - scales:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        is_left_out = config.num_nextn_predict_layers == 0 and layer and int(layer[1]) >= config.num_hidden_layers
        if not is_left_out:
            yield name


def _source(tensor: PublishedTensor, entries: dict[str, Entry]) -> tuple[Entry, Entry | None]:
    entry = entries[tensor.name]
    dtypes = ("BF16", "F32", "F8_E4M3") if tensor.row.is_fp8 else ("BF16", "F32")
    _require_entry(tensor.name, entry, tensor.shape, dtypes)
    if entry.dtype != "F8_E4M3":
        if tensor.name + _SCALE in entries:  # transformers writes unused ones where 128 does not divide
            logging.warning("%s: %s is %s, its scales are ignored", entry.file, tensor.name, entry.dtype)
        return entry, None
    scale = entries[tensor.name + _SCALE]
    _require_entry(tensor.name + _SCALE, scale, tuple(num_blocks(size) for size in tensor.shape), ("F32",))
    return entry, scale


def _require_entry(name: str, entry: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if entry.shape != shape:
        raise ValueError(f"{entry.file}: {name} has shape {entry.shape} where config.json means {shape}; correct it")
    if entry.dtype not in dtypes:
        raise ValueError(f"{entry.file}: {name} has dtype {entry.dtype}; convert it to one of {', '.join(dtypes)}")


def _require_none(place: pathlib.Path, names: Iterable[str], problem: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{place}: {names[0]}{more}: {problem}")
