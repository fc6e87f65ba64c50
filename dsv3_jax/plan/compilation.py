"""Compiles a lowered program and keeps what the compiler writes about its memory."""

import dataclasses
import pathlib
import tempfile

import jax

from dsv3_jax.plan import hlo

# Without a device no candidate for a kernel can be timed; XLA would still compile each, a fifth of all the work.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_dump_hlo_as_text": True}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled program and the compiler's texts about it."""

    compiled: jax.stages.Compiled
    program: hlo.Program
    assignment: str  # the place of every buffer
    live_ranges: str  # from which instruction to which each buffer lives


def compile_program(lowered: jax.stages.Lowered) -> Compilation:
    """Compiles a program for the devices that it was lowered for, GPUs or CPUs."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = lowered.compile(compiler_options=_OPTIONS | {"xla_dump_to": directory})
        program = hlo.parse(_text(directory, ""))  # compiled.as_text() names some instructions otherwise
        return Compilation(compiled, program, _text(directory, "-buffer-assignment"), _text(directory, "-live-range"))


def _text(directory: str, ending: str) -> str:
    """Reads the dump with this ending; the largest, should the compiler have compiled small parts apart."""
    files = sorted(pathlib.Path(directory).glob(f"*after_optimizations{ending}.txt"), key=lambda f: f.stat().st_size)
    if not files:
        raise RuntimeError(f"XLA wrote no *after_optimizations{ending}.txt: another version of jaxlib is needed")
    return files[-1].read_text()
