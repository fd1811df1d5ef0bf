# Each target builds .venv by itself on a machine that has only Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out

.PHONY: demo test test-cpus test-slow lint bench clean

demo: $(STAMP)
	$(BIN)/mskd distill demo --out $(OUT)

# A process for every core (four at most: on a GPU each holds a context), one thread each, a file's tests in one process.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# The tests that compare numbers, as other processors would compute them: other instructions, other numbers of threads,
# and (tests/helpers/other_sums.py) products that are summed as no library does. The rooms left out compare files and
# words; Triton's interpreter is numpy's arithmetic; compiling, the benchmarks' smoke runs and the count of 12,000 samples
# take long and depend on no last bit. passive: two threads in each of several processes must not spin for each other.
NUMERIC := $(addprefix tests/,data evaluation kernels models sampling store training bench test_examples.py)
LONG := not triton and not compile and not smoke and not exact_distribution
VARIANTS := OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=DEFAULT MKL_ENABLE_INSTRUCTIONS=AVX2
VARIANTS += MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2
VARIANTS += $(shell grep -qs avx512f /proc/cpuinfo && echo ATEN_CPU_CAPABILITY=avx512) OTHER_SUMS=1

test-cpus: $(STAMP)
	failed=; for variant in $(VARIANTS); do echo "== $$variant"; env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $$variant \
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -k '$(LONG)' $(NUMERIC) \
	|| failed="$$failed $$variant"; done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test-slow: $(STAMP)-eval
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy kernels/mskd_kernels mskd

bench: $(STAMP)-bench
	$(BIN)/python -m bench.kl_kernel
	$(BIN)/python -m bench.rollout
	$(BIN)/python -m bench.train_step

# The versions that were tested together, from constraints.txt; the package itself has no upper bounds.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"mskd needs Python 3.11 or newer, this is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,track,dev]'
	touch $(STAMP)

# The peers of the benchmarks, in the same versions.
$(STAMP)-bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,track,dev,bench]'
	touch $@

# lm-eval, whose figures ours are compared with.
$(STAMP)-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,track,dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
