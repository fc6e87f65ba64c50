"""The command line of a run: `--config=configs/tiny.py --config.train.num_steps=100`.

Every setting is an absl flag of its own, so that `--help` lists them with their units, values are typed, and a mistyped
name is refused with a suggestion.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging

from dsv3_jax.config import MeshConfig, RopeScaling, RunConfig, Setting, override, settings

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def define() -> None:
    """Registers `--config` and one flag per setting. Call once, before absl parses."""
    flags.DEFINE_string("config", None, "Python file whose get_config() returns the run's configuration; what it "
                        "leaves open has the defaults below")  # fmt: skip
    flags.DEFINE_enum("config.model.rope_scaling", None, ["none", "yarn"], "YaRN on with its defaults, or off")
    _define(settings())
    for name in ("config", "config.model.rope_scaling", *(f"config.{setting.path}" for setting in settings())):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help lists it


def define_mesh() -> None:
    """Registers the flags of the mesh's axes, for a command that takes the rest of its configuration from elsewhere."""
    _define(_mesh_axes())
    for axis in _mesh_axes():
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[f"config.{axis.path}"])


def run(main: Callable[..., None], *, takes_arguments: bool = False) -> None:
    """Parses the command line and runs main; what a user can mend ends with its message alone and exit code 1.

    `--verbosity=1` shows the traceback as well.

    Args:
      main: called without arguments, or with the list of those that are no flags.
      takes_arguments: whether there may be any.
    """

    def run_main(argv: list[str]) -> None:
        arguments = argv[1:]
        if arguments and not takes_arguments:
            sys.exit(f"error: unexpected argument {arguments[0]!r}; settings are written --config.name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main(arguments) if takes_arguments else main()
        except (ValueError, OSError) as error:
            logging.debug("stopped by", exc_info=error)
            sys.exit(f"error: {error}")

    app.run(run_main)


def resolve() -> RunConfig:
    """Returns the configuration of `--config` with the command line's settings, validated.

    Raises:
      ValueError: no or an unusable config file, or a setting that validation refuses.
    """
    path = flags.FLAGS["config"].value
    if path is None:
        raise ValueError("--config is missing: name a file such as configs/tiny.py")
    return override(load(path), overrides())


def mesh() -> MeshConfig:
    """Returns the mesh of the command line, validated."""
    return override(RunConfig(), _given(_mesh_axes())).mesh


def overrides() -> dict[str, object]:
    """Returns the settings given on the command line, dotted path -> value."""
    given = {}
    scaling = flags.FLAGS["config.model.rope_scaling"].value
    if scaling is not None:
        given["model.rope_scaling"] = RopeScaling() if scaling == "yarn" else None
    return given | _given(settings())


def load(path: str) -> RunConfig:
    """Runs a config file's get_config().

    Raises:
      ValueError: the file is missing, does not run, or returns something else.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location("run_config", path)
    if spec is None:
        raise ValueError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={path}: defines no get_config()")
    config = module.get_config()
    if not isinstance(config, RunConfig):
        raise ValueError(f"--config={path}: get_config() returns {type(config).__name__}, not a RunConfig")
    return config


def _define(chosen: list[Setting]) -> None:
    for setting in chosen:
        flags.DEFINE(_SettingParser(setting), f"config.{setting.path}", None, _help(setting))


def _given(chosen: list[Setting]) -> dict[str, object]:
    found = {setting.path: flags.FLAGS[f"config.{setting.path}"] for setting in chosen}
    return {path: flag.value for path, flag in found.items() if flag.present}


def _mesh_axes() -> list[Setting]:
    return [setting for setting in settings() if setting.path.startswith("mesh.") and setting.type is int]


class _SettingParser(flags.ArgumentParser):
    """Parses one setting's text into its type."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.syntactic_help = ""

    def parse(self, argument):
        if not isinstance(argument, str):
            return argument
        if self.setting.is_optional and argument.lower() == "none":
            return None
        if self.setting.type is bool:
            if argument.lower() not in _BOOLEANS:
                raise ValueError(f"{argument!r} is neither true nor false")
            return _BOOLEANS[argument.lower()]
        if self.setting.type is int:
            return _parse_int(argument)
        return self.setting.type(argument)

    def flag_type(self) -> str:
        return self.setting.type.__name__


def _parse_int(argument: str) -> int:
    """Reads an integer; 14.8e12 is one too."""
    try:
        return int(argument.replace("_", ""))
    except ValueError:
        number = float(argument)
        if number != int(number):
            raise ValueError(f"{argument!r} is not a whole number") from None
        return int(number)


def _help(setting: Setting) -> str:
    return f"{setting.help} (default: {setting.default!r})"
