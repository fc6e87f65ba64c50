"""The 671B configuration against the published config.json."""

import dataclasses
import importlib.util
import json
import pathlib

from dsv3_jax.checkpoint import hf_config
from dsv3_jax.model import count_params

ROOT = pathlib.Path(__file__).parents[2]
OFFICIAL = json.loads((ROOT / "tests/golden/official_config.json").read_text())


def published_model():
    spec = importlib.util.spec_from_file_location("deepseek_v3_671b", ROOT / "configs/deepseek_v3_671b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().model


def test_config_json_equals_the_published_one_field_by_field():
    written = hf_config.to_json(published_model(), dtype="fp8", has_remote_code=True)
    assert written == OFFICIAL
    assert list(written) == list(OFFICIAL)


def test_model_equals_the_published_one():
    read = hf_config.from_json(OFFICIAL)
    assert published_model() == dataclasses.replace(read, remat_policy="report")


def test_parameter_count():
    assert count_params(published_model(), with_mtp=False) == 671_026_419_200
