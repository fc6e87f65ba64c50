# The two commands: `make demo` trains a small DeepSeek-V3 on this machine's own text; `make test` proves the project right.
PYTHON ?= python3
UV := .tools/bin/uv
RUN := .venv/bin/python
DEMO := runs/demo
EXPORT := $(DEMO)/huggingface

.PHONY: help setup demo test lint clean
help:
	@echo "make demo   set up, then train, sample, export and read back a small model (under 10 minutes on 2 cores)"
	@echo "make test   set up, then run the tests (under 15 minutes on 2 cores)"
	@echo "make lint   check the style"
	@echo "make clean  remove the demo's runs and the environment"

setup: .venv/.synced

$(UV):
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools "uv==0.13.9"

.venv/.synced: pyproject.toml uv.lock | $(UV)
	UV_PROJECT_ENVIRONMENT=.venv $(UV) sync --quiet --locked --inexact --extra data --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
	@touch $@

demo: setup
	rm -rf $(EXPORT)
	$(RUN) launch/prepare_data.py --output=$(DEMO)/corpus --max_bytes=12000000 --heldout_fraction=0.03
	$(RUN) launch/train.py --config=configs/tiny.py --config.data.corpus=$(DEMO)/corpus --workdir=$(DEMO)/run
	$(RUN) launch/generate.py --workdir=$(DEMO)/run --prompt="def main(" --max_new_tokens=64 --temperature=0.7
	$(RUN) launch/export_hf.py --workdir=$(DEMO)/run --output=$(EXPORT) --dtype=float32
	$(RUN) launch/generate.py --hf=$(EXPORT) --dtype=float32 --prompt="def main(" --max_new_tokens=64 --temperature=0.7

test: setup
	$(RUN) -m pytest -n 2 -m "not slow and not gpu"

lint: setup
	.venv/bin/ruff check .

clean:
	rm -rf $(DEMO) .venv .tools
