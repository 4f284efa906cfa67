# Two commands on a fresh machine with Python 3.11:  make train · make test.
# Every target sets up .venv by itself when it is missing, or when the files that it is made from have changed.

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
MADE_FROM := constraints.txt settings.ini setup.py
STAMP := .venv/.made-from

# One thread a process: notebooks and tests run side by side, and threads that fight for cores are five times slower.
TESTING := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::ResourceWarning
TIMES := .venv/.times
TIMED := $(TESTING) DECOMP_TIMES=$(TIMES) $(PY) tools/timed.py
NBDEV := $(PY) tools/nbdev_command.py

.PHONY: help setup train test source-check prepare notebooks site-check docs quarto clean
.DEFAULT_GOAL := help

help:
	@echo "make train      train LSD on the embedded scenes (at most 15 minutes on 2 cores); ARGS='-p max_steps 50' sets parameters"
	@echo "make test       everything that must hold before a commit lands: notebooks, tests, lint, hygiene"
	@echo "make prepare    after editing notebooks: export, clean, README, lint"
	@echo "make notebooks  run notebooks in place and keep their outputs; NB='nbs/factors.ipynb …' names them, default all"
	@echo "make site-check what must hold of the site, without Quarto: links, words for pictures, badges, widths, sizes"
	@echo "make docs       build the site into _docs (needs Quarto)"

# The stamp holds a checksum of the files' content, so a checkout that only touches them installs nothing and needs no network.
setup:
	@sum="$$(cat $(MADE_FROM) | cksum)"; \
	if [ -x $(PY) ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$sum" ]; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "decomp_nb needs Python 3.11 or newer; name one: make PYTHON=python3.11 …" >&2; exit 1; }; \
	echo "setting up .venv (once, a few minutes)"; \
	rm -rf decomp_nb.egg-info && $(PYTHON) -m venv .venv && \
	$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	$(PY) -m ipykernel install --sys-prefix --name python3 --display-name python3 >/dev/null && \
	echo "$$sum" > $(STAMP)

train: setup
	@$(BIN)/decomp_nb run nbs/train_lsd.ipynb -p out_dir papermill_runs/out/lsd-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# Cheap checks first, those of sources and of the site side by side; pytest comes last, so that its summary closes the output.
# A worker of pytest takes whole modules, whose fixtures are made once.
test: setup
	@rm -f $(TIMES)
	$(PY) -m pip check
	$(BIN)/ruff check nbs tests tools setup.py
	$(BIN)/ruff check --config 'extend-exclude=[]' --select F821,F822,F823 decomp_nb
	$(TIMED) checks $(MAKE) --no-print-directory -j2 source-check site-check
	$(TIMED) notebooks $(NBDEV) test --n-workers 2 --timing
	$(TESTING) DECOMP_TIMES=$(TIMES) $(PY) -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder tests

source-check: setup
	$(PY) tools/hygiene.py
	$(TESTING) $(PY) -m pytest -q tests/test_package.py -k in_sync

prepare: setup
	$(PY) tools/colab_cells.py
	$(NBDEV) export
	$(NBDEV) clean
	$(PY) tools/readme.py
	$(PY) tools/llms.py
	$(BIN)/ruff check nbs tests tools setup.py
	$(PY) tools/hygiene.py

notebooks: setup
	$(NBDEV) export
	$(TESTING) $(PY) tools/run_nbs.py --flags slow $(NB)

# With Quarto on the PATH the site is rendered too; with Chromium, SHOTS=folder keeps pictures of every page at two widths.
site-check: setup
	$(TESTING) $(PY) tools/site_check.py $(if $(SHOTS),--screenshots $(SHOTS))

# nbdev would try to install Quarto with sudo when it is missing, so that is checked first. _proc is a cache that keeps deleted notebooks.
# README.md is ours (tools/readme.py): nbdev writes one of its own where README.md is older than index.ipynb, as in a fresh checkout.
docs: quarto setup
	rm -rf _proc
	touch README.md
	PYTHONPATH="$(CURDIR)/tools:$$PYTHONPATH" PATH="$(CURDIR)/$(BIN):$$PATH" $(NBDEV) docs

quarto:
	@command -v quarto >/dev/null || { echo "make docs needs Quarto on the PATH: https://quarto.org/docs/get-started" >&2; exit 1; }

clean:
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache
