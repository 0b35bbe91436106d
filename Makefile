# Each of these works as the first command after a clone.
PYTHON ?= python3
BIN := .venv/bin
QUICK := data/quickstart

.DEFAULT_GOAL := help
.PHONY: help install quickstart datagen train export test test-all lint docs clean

help: ## this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: .venv/installed ## create .venv with everything

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "im2emb needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[all,dev]'
	@touch $@

quickstart: install ## the whole pipeline on two CPU cores, about ten minutes: images, training, scores, bundle, report
	$(BIN)/python -m datagen renderer=glyphs prompts=grammar renderer.size=112 prompts.flourish=0 prompts.detail=0.5 prompts.names=200 \
	  'prompts.objects=[0.8,0.2]' split.kind=holdout curate.dedup_threshold=null num=$(or $(NUM),8000) out=$(QUICK)
	@test -f checkpoints/quickstart/done || $(BIN)/python -m train +experiment=quickstart
	$(BIN)/python -m train.evaluate run=checkpoints/quickstart embedders=[mean,knn,ridge,regressor,ensemble]
	$(BIN)/python -m models.export checkpoint=checkpoints/quickstart/best out=bundle
	@mkdir -p $(QUICK)_images && tar -xf $(QUICK)/shards/000000.tar -C $(QUICK)_images
	$(BIN)/python bundle/predict.py --images $(QUICK)_images --out submission.csv
	$(BIN)/python -m train.report run=checkpoints/quickstart

datagen: install ## NUM=1000 images by Stable Diffusion 2.0 into data/sd2 (a GPU)
	$(BIN)/python -m datagen num=$(or $(NUM),1000)

train: install ## the flagship on data/sd2 (a GPU)
	$(BIN)/python -m train +experiment=vith14

export: install ## the newest best checkpoint → bundle/
	$(BIN)/python -m models.export

# a file's tests stay in one process: they share what its fixtures build
test: install ## the unit tests, offline on the CPU, minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# files in their order: by default those with the fewest tests come last, and some of these take minutes
test-all: install ## all tests but those that need a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu'

lint: install ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed-docs ## the documentation as a site, build/docs/site; offline once its tools are installed
	$(BIN)/python docs/build_reference.py build/docs
	cd build/docs && ../../$(BIN)/zensical build --strict > build.log 2>&1 || { cat build.log; exit 1; }
	@! grep -iE 'warning|griffe' build/docs/build.log

.venv/installed-docs: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	@touch $@

clean: ## remove .venv and caches; data, checkpoints and bundles stay
	rm -rf .venv .pytest_cache .ruff_cache build im2emb.egg-info
