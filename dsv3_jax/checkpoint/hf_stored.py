"""The parameters of a Hugging Face directory, read tensor by tensor as they are asked for."""

import collections
import dataclasses
import os
import pathlib

import numpy as np

from dsv3_jax.checkpoint.hf_names import PublishedTensor, published_tensors
from dsv3_jax.checkpoint.hf_source import resolve
from dsv3_jax.checkpoint.safetensors_files import Entry
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.published_weights import dequantize_blocks
from dsv3_jax.model import param_specs


@dataclasses.dataclass(frozen=True)
class PublishedParam:
    """One parameter in published tensors: indexing reads those of a block, as float32."""

    shape: tuple[int, ...]
    tensors: dict[tuple[int, ...], list[tuple[PublishedTensor, Entry, Entry | None]]]  # by their leading indices

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Reads the block at leading indices: of a whole parameter (), a layer, or a layer's expert."""
        block = np.empty(self.shape[len(index) :], np.float32)
        found = [index] if index in self.tensors else [key for key in self.tensors if key[: len(index)] == index]
        for key in found:
            for tensor, entry, scale in self.tensors[key]:
                weight = entry.read() if scale is None else dequantize_blocks(entry.read(), scale.read())
                dataclasses.replace(tensor, index=key[len(index) :]).place(weight, block)
        return block


def open_params(directory: str | os.PathLike, config: ModelConfig) -> dict:
    """Opens the parameters of a Hugging Face directory without reading them.

    Copies of embedding and head that MTP modules hold are not looked at.

    Returns:
      Tree of `param_specs(config)` of `PublishedParam`.

    Raises:
      ValueError: as `hf_source.resolve`.
    """
    sources = resolve(pathlib.Path(directory), config)
    tensors_of_path = collections.defaultdict(lambda: collections.defaultdict(list))
    for tensor in published_tensors(config):
        if not tensor.is_copy:
            tensors_of_path[tensor.path][tensor.index].append((tensor, *sources[tensor.name]))
    return _open_tree(param_specs(config), tensors_of_path, ())


def _open_tree(specs: dict, tensors_of_path: dict, path: tuple[str, ...]) -> dict:
    return {
        name: _open_tree(spec, tensors_of_path, (*path, name))
        if isinstance(spec, dict)
        else PublishedParam(spec.shape, dict(tensors_of_path[(*path, name)]))
        for name, spec in specs.items()
    }
