"""The rooms of the package: imports go down only, modules stay short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "dsv3_jax"
MAX_LINES = 450

# Every room and the rooms it may import, besides itself. `testing` is for tests: no room may import it.
ALLOWED = {
    "config": set(),
    "fp8.formats": set(),  # the one module of fp8 that the kernels below it may import
    "kernels": {"fp8.formats", "config"},
    "fp8": {"fp8.formats", "kernels", "config"},
    "sharding": {"kernels", "config"},
    "model": {"sharding", "fp8", "kernels", "config"},
    "checkpoint": {"model", "sharding", "fp8", "kernels", "config"},
    "data": {"model", "sharding", "fp8", "kernels", "config"},
    "train": {"checkpoint", "data", "model", "sharding", "fp8", "kernels", "config"},
    "serve": {"checkpoint", "data", "model", "sharding", "fp8", "kernels", "config"},
    "language_model": {"train", "serve", "checkpoint", "data", "model", "sharding", "fp8", "kernels", "config"},
    "plan": {"train", "serve", "checkpoint", "data", "model", "sharding", "fp8", "kernels", "config"},
    "benchmarks": {
        "plan", "train", "serve", "checkpoint", "data", "model", "sharding", "fp8", "kernels", "config",
    },
    "config_flags": {"config"},
    "process_flags": {"sharding", "config"},
    "testing": {"model", "sharding", "fp8", "kernels", "config"},
    "__init__": {"language_model", "config"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
OPS = sorted(path.name for path in (PACKAGE / "kernels").iterdir() if path.is_dir() and (path / "__init__.py").exists())


def _room(name: str) -> str:
    """Returns the room of a dotted name below dsv3_jax."""
    parts = name.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ALLOWED else parts[0]


def _name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: pathlib.Path) -> set[str]:
    """Returns the dotted names below dsv3_jax that a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: spell it out
                parent = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join((*parent, *([node.module] if node.module else [])))
            else:
                base = node.module
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.removeprefix("dsv3_jax.") for name in names if name.startswith("dsv3_jax.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_rooms_below_its_own(path):
    room = _room(_name(path))
    assert room in ALLOWED, f"{room} is not in the table of rooms"
    for name in _imports(path):
        target = _room(name)
        if not (PACKAGE / target.split(".")[0]).exists() and not (PACKAGE / f"{target}.py").exists():
            target = "__init__"  # a name that the package itself offers
        allowed = ALLOWED[room] | ({"fp8.formats"} if "fp8" in ALLOWED[room] else set())
        assert target == room or target in allowed, f"{room} may not import dsv3_jax.{name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_op_is_imported_through_its_package_only(path):
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "kernels" and len(parts) > 2 and parts[1] in OPS:
            is_inside = path.is_relative_to(PACKAGE / "kernels" / parts[1])
            is_module = (PACKAGE / "kernels" / parts[1] / f"{parts[2]}.py").exists()
            assert is_inside or not is_module, f"import dsv3_jax.kernels.{parts[1]}, not its {parts[2]}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_run_config_imports_config_only(path):
    assert {name.split(".")[0] for name in _imports(path)} <= {"config"}


def test_table_of_rooms_has_no_cycle():
    def below(room, seen=()):
        assert room not in seen, f"{room} is above itself"
        for other in ALLOWED[room]:
            below(other, (*seen, room))

    for room in ALLOWED:
        below(room)


def test_modules_are_short_and_named_for_what_they_hold():
    for path in [*MODULES, *(ROOT / "launch").glob("*.py")]:
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines; split it"
        assert path.stem not in ("util", "utils", "helpers", "common", "misc"), f"{path}: find the noun"
