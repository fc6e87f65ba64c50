"""launch/import_hf.py and launch/export_hf.py, as a user runs them."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/ckpt"
SHARD = "model-00001-of-000001.safetensors"


def launch(script, *arguments):
    return subprocess.run([sys.executable, f"launch/{script}", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_imported_workdir_exports_the_same_bytes(tmp_path):
    directory = shutil.copytree(GOLDEN, tmp_path / "hf")
    (directory / "tokenizer.json").write_text('{"any":  "text"}')
    assert launch("import_hf.py", f"--hf={directory}", f"--workdir={tmp_path}/run").returncode == 0
    arguments = [f"--workdir={tmp_path}/run", f"--output={tmp_path}/out", "--dtype=float32"]
    exported = launch("export_hf.py", *arguments)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / SHARD).read_bytes() == (GOLDEN / SHARD).read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"any":  "text"}'


def test_export_that_cannot_be_ends_with_one_line(tmp_path):
    result = launch("export_hf.py", f"--workdir={tmp_path}/nowhere", f"--output={tmp_path}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: workdir='{tmp_path}/nowhere': holds no whole checkpoint")
