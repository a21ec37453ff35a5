# make demo and make test do everything on a fresh machine. With PYTHON=... they use that interpreter and its torch.
# TORCH_INDEX=URL takes torch from another package index, say PyTorch's own one of CPU builds.

.PHONY: demo test test-all notebooks lint format sanitize sanitize-gpu fuzz bench gpu clean

ifeq ($(origin PYTHON), undefined)
  PY := .venv/bin/python
  READY := .venv/ready
else
  PY := $(PYTHON)
  READY :=
endif
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
BUILT := build/installed
PIP := $(PY) -m pip --disable-pip-version-check
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
OUT ?= build/gpu
SECONDS ?= 60

demo: $(BUILT)
	$(PY) -m vaeops.train.demo

test: $(BUILT)
	$(PY) -m pytest tests $(PARALLEL)

# The slow ones one after the other: some take most of the memory.
test-all: test
	$(PY) -m pytest tests --slow -m slow

# Runs the example notebooks and keeps what they print and draw.
notebooks: $(BUILT)
	$(PY) examples/run.py

# torchvision stays apart: a CUDA build of it breaks whatever imports it next to a CPU torch (bench/peers.py mends that).
.venv/ready: constraints.txt pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	$(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch triton numpy setuptools \
	  ninja pybind11 pytest pytest-xdist pytest-benchmark hypothesis scikit-learn scipy matplotlib pillow tqdm \
	  safetensors torchmetrics ruff mypy clang-format nbclient nbformat ipykernel vector-quantize-pytorch diffusers
	$(PIP) install -q --no-deps -c constraints.txt lpips
	$(PIP) install -q --no-deps -c constraints.txt --upgrade --target .venv/peers torchvision
	touch $@

# Without build isolation: the kernels are built against the torch that is installed.
$(BUILT): $(SOURCES) $(READY)
	$(PIP) install -q --no-index --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@
	$(PY) -m vaeops info

# Rivals that are not installed are left out of the tables.
bench: $(BUILT)
	-$(PIP) install -q -c constraints.txt faiss-cpu
	$(PY) bench/run.py

# Everything that a GPU machine is needed for, in stages, each result written before the next stage.
gpu:
	$(PY) bench/gpu.py --out $(OUT) $(if $(CASE),--case $(CASE))

sanitize-gpu: $(BUILT)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) bench/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PY) bench/sanitize.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m clang_format --version >/dev/null 2>&1 || true
	$(dir $(PY))clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*/* tests/cpp/*.* tests/cpp/*/* tests/fuzz/*)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $(wildcard csrc/*.h csrc/*/* tests/cpp/*.* tests/cpp/*/* tests/fuzz/*)

# A copy of the package whose native parts carry the sanitizers, under the CPU suite; then the C++ tests with them.
SAN := build/sanitize
SAN_FLAGS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow \
  -fno-omit-frame-pointer -fno-sanitize-recover=undefined
PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so) $(shell g++ -print-file-name=libstdc++.so)
# The C++ tests and the fuzz targets share one build, by clang where there is one (CLANG names another one).
CLANG ?= $(firstword $(foreach c,clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14,$(if $(shell command -v $(c)),$(c))))
CONFIGURE = cmake -S . -B build/ctest -G Ninja -DVAEOPS_SANITIZE=address,undefined \
  $(if $(CLANG),-DCMAKE_CXX_COMPILER=$(CLANG)) > build/ctest.log
sanitize: $(READY)
	rm -rf $(SAN) && mkdir -p $(SAN) && cp -r csrc vaeops tests setup.py pyproject.toml $(SAN)/ && rm -f $(SAN)/vaeops/*.so
	cd $(SAN) && VAEOPS_NATIVE=require CFLAGS="$(SAN_FLAGS)" LDFLAGS="-fsanitize=address,undefined" \
	  $(abspath $(PY)) setup.py -q build_ext --inplace > build.log 2>&1 || { tail -30 build.log; exit 1; }
	cd $(SAN) && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=. $(abspath $(PY)) -m pytest $(PARALLEL) tests/test_gaussian.py \
	  tests/test_rng.py tests/test_bad_arguments.py tests/test_vq.py tests/test_vq_arguments.py \
	  tests/test_recon.py::test_sizes tests/test_recon_transforms.py::test_layouts \
	  -k "not compile and not statistics and not [ref" -p no:cacheprovider
	$(CONFIGURE) && cmake --build build/ctest && ctest --test-dir build/ctest --output-on-failure -j $$(getconf _NPROCESSORS_ONLN)

# libFuzzer over the torch-free kernels, in the build of `make sanitize`; needs clang. SECONDS a target.
fuzz:
	@test -n "$(CLANG)" || { echo "make fuzz needs clang++ with libFuzzer"; exit 1; }
	$(CONFIGURE) && cmake --build build/ctest --target fuzz
	cd build/ctest && for target in fuzz_*; do test ! -x $$target || ./$$target -max_total_time=$(SECONDS) -print_final_stats=1 || exit 1; done

clean:
	rm -rf build *.egg-info vaeops/*.so
