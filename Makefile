# `make train` and `make test` set everything up on a fresh machine, then run. The rest is for those who work on attnx.
PY    := $(shell for p in python3.14 python3.13 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
EXTRA ?= test
STAMP := .venv/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)-$(EXTRA)
BIN   := .venv/bin
WORKERS ?= -n auto --maxprocesses 8 --dist loadscope

.PHONY: train test lint types check clean help
.DEFAULT_GOAL := help

help:                   ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml
	@test -n "$(PY)" || { echo 'attnx needs Python >= 3.12; none was found (tried python3.14, python3.13, python3.12, python3)'; exit 1; }
	@test -x $(BIN)/python || $(PY) -m venv .venv
	@echo 'installing attnx[$(EXTRA)] into .venv (once)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(EXTRA)]'
	@touch $@

train: $(STAMP)         ## trains the default small language model on real text; ARGS='--config.steps=2000' passes flags
	@$(BIN)/python train.py $(ARGS)

test: $(STAMP)          ## laws over all mechanisms, ops, models, training; SLOW=1 adds the heavy tests
	@$(BIN)/python -m attnx.catalog --check
	@$(BIN)/python -m pytest $(WORKERS) $(if $(SLOW),,-m 'not slow') $(ARGS)

lint:                   ## ruff
	@$(MAKE) --no-print-directory EXTRA=dev .venv/.dev
	@$(BIN)/ruff check .

types:                  ## pyright
	@$(MAKE) --no-print-directory EXTRA=dev .venv/.dev
	@$(BIN)/pyright

.venv/.dev: $(STAMP)
	@touch $@

clean:                  ## removes the environment and caches, not runs/
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache build *.egg-info
