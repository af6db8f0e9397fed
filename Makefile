# dpo.h: the programs around it. `make help` lists what can be made.
#
#   make              train and eval, with the compiler and the OpenMP that are there
#   make CC=clang     another compiler            make NO_OMP=1   one thread
#   make DEBUG=1      sanitizers and debug info   make ARCH=x86-64-v3   another CPU than this one
#   make test CC=aarch64-linux-gnu-gcc ARCH=armv8.6-a RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
#        PYTHON_TESTS=    tests of another CPU, run by an emulator
#
# The programs are one C file each, so without make it is
#   cc -std=gnu11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math \
#      -fopenmp train.c -o train -lm

PYTHON ?= python3
# Threads that spin while they wait make a busy machine slow; sleeping ones cost little on an idle one.
# bench, for which nothing else may run, leaves it to OpenMP, as users on an idle machine do.
ifeq ($(filter bench,$(MAKECMDGOALS)),)
export OMP_WAIT_POLICY ?= passive
endif
ARCH ?= native

ifneq ($(filter-out clean help,$(or $(MAKECMDGOALS),all)),)

# ---- what this machine has: each candidate must compile, link and run a program ----

define probe_source
#ifdef _OPENMP
#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel reduction(+:n)
    n += omp_get_max_threads() > 0;
    return n == 0;
}
#else
int main(void) { return OPENMP; }
#endif
endef
define newline


endef
$(shell mkdir -p build && printf '$(subst $(newline),\n,$(probe_source))\n' > build/probe.c)
# $(call runs,compiler and flags) is "yes" or empty.
runs = $(shell $(1) build/probe.c -o build/probe -lm > build/probe.log 2>&1 && $(RUN) ./build/probe && echo yes)

ifeq ($(origin CC),default)
CC := $(firstword $(foreach c,gcc clang cc,$(if $(call runs,$(c) -DOPENMP=0),$(c))))
else
override CC := $(if $(call runs,$(CC) -DOPENMP=0),$(CC))
endif
ifeq ($(CC),)
$(error no C compiler that works (build/probe.log has its words); install gcc or clang (apt-get install gcc, xcode-select --install))
endif
$(info ✓ compiler $(CC): $(shell $(CC) --version | head -n 1))

# Apple's older clang has -mcpu=native instead.
march := $(if $(call runs,$(CC) -DOPENMP=0 -march=$(ARCH)),-march=$(ARCH),$(if \
           $(call runs,$(CC) -DOPENMP=0 -mcpu=$(ARCH)),-mcpu=$(ARCH)))
$(info $(if $(march),✓ CPU $(march),✗ CPU: no -march=$(ARCH), so slower code))

ifdef NO_OMP
$(info ✗ OpenMP: switched off by NO_OMP, so one thread)
else
# Homebrew keeps libomp away from the compiler's paths.
brew := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
apple_omp := -Xpreprocessor -fopenmp -I$(brew)/include -L$(brew)/lib -lomp
openmp := $(if $(call runs,$(CC) -DOPENMP=1 -fopenmp),-fopenmp,$(if \
            $(call runs,$(CC) -DOPENMP=1 $(apple_omp)),$(apple_omp)))
$(info $(if $(openmp),✓ OpenMP $(openmp),✗ OpenMP: one thread (apt-get install libomp-dev, brew install libomp)))
endif

# ---- flags ----

# No -ffast-math: none of these reorders a sum or loses a NaN.
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
ifdef DEBUG
OPTIMIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
else
OPTIMIZE = -O3
endif
FLAGS = -std=gnu11 $(OPTIMIZE) $(march) -ffp-contract=fast -fno-math-errno -fno-trapping-math \
        $(WARNINGS) $(CFLAGS)
BUILD = $(CC) $(FLAGS) -I.
LIBRARIES = $(openmp) $(LDFLAGS) -lm

# build/flags changes when the command does, and everything depends on it.
command := $(BUILD) $(LIBRARIES)
ifneq ($(command),$(shell cat build/flags 2> /dev/null))
$(shell echo '$(command)' > build/flags)
endif
endif

# ---- programs ----

.PHONY: all test demo demo-lora mutate conformance bench large clean help
all: train eval
# "make -j clean all" means one after the other.
ifneq ($(filter clean,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif

build/flags:
	@mkdir -p build && echo '$(command)' > $@

train eval: %: %.c dpo.h tools.h build/flags
	$(BUILD) $< -o $@ $(LIBRARIES)

build/test_%: tests/test_%.c dpo.h $(wildcard tests/*.h) build/flags
	$(BUILD) $< -o $@ $(LIBRARIES)

build/bench: tests/bench.c dpo.h build/flags
	$(BUILD) $< -o $@ $(LIBRARIES)

# ---- targets ----

C_TESTS = $(patsubst tests/%.c,build/%,$(wildcard tests/test_*.c))
PYTHON_TESTS = $(wildcard tests/test_*.py)
# A word for the C tests: TEST=products, for test_invariants and test_modes, is arithmetic alone.
TEST =

# A test ends with "N passed, N failed" and exits with 0 if none failed; one that does not say counts
# as one. The last line adds them up.
test: all $(C_TESTS)
	@passed=0; failed=0; \
	for test in $(C_TESTS) $(PYTHON_TESTS); do \
	    case $$test in *.py) run="$(PYTHON) $$test";; *) run="$(RUN) ./$$test $(TEST)";; esac; \
	    $$run > build/test.log 2>&1; status=$$?; \
	    counts=$$(tail -n 1 build/test.log | sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed.*/\1 \2/p'); \
	    set -- $${counts:-$$((status == 0)) $$((status != 0))}; \
	    if [ $$status -ne 0 ] && [ $$2 -eq 0 ]; then set -- $$1 1; fi; \
	    passed=$$((passed + $$1)); failed=$$((failed + $$2)); \
	    if [ $$1 -eq 0 ] && [ $$2 -eq 0 ]; then echo "- $$test: $$(head -n 1 build/test.log)"; \
	    elif [ $$2 -eq 0 ]; then echo "✓ $$test: $$1 passed"; \
	    else cat build/test.log; echo "✗ $$test: $$1 passed, $$2 failed (exit status $$status)"; fi; \
	done; \
	echo "$$passed passed, $$failed failed"; [ $$failed -eq 0 ] && [ $$passed -gt 0 ]

demo: all
	sh demo/run.sh

demo-lora: all
	sh demo/run.sh --lora

mutate: all
	$(PYTHON) tests/mutate.py

conformance: all
	sh tests/conformance/run.sh

bench: build/bench
	./build/bench $(BENCH)

large: all
	$(PYTHON) tests/large.py $(PAIRS)

clean:
	rm -rf build train eval

help:
	@echo "make              train and eval"
	@echo "make test         C and Python tests, about 3 minutes"
	@echo "make demo         a tiny model learns a preference, under a minute"
	@echo "make demo-lora    the same with an adapter, and its size"
	@echo "make mutate       breaks dpo.h in many places; the tests must notice each"
	@echo "make conformance  compares with PyTorch, transformers and TRL (installs them first)"
	@echo "make bench        speed, beside what the machine can do (20 minutes; BENCH=quick: a part)"
	@echo "make large PAIRS=hh/train.jsonl    memory of models up to 3B (20 GB, half an hour)"
	@echo "make clean"
	@echo "CC=clang, NO_OMP=1 (one thread), DEBUG=1 (sanitizers), ARCH=x86-64-v3 (another CPU)"
