# larder - plain GNU make; no configure step. Users own CC CFLAGS LDFLAGS PREFIX
# DESTDIR. Variants: SAN=address|undefined|thread, each with its own object directory.
#
#   make            everything          make check      all tests
#   make demo       the tour            make bench      benchmarks against peers
#   make install    DESTDIR, PREFIX     make clean
#   make CUDA=1     and larder-prefill-cuda (CUDA Toolkit 13 in CUDA_HOME); then make check-cuda
#                   and make bench-cuda on a machine with a GPU

VERSION := $(shell cat VERSION)
PREFIX ?= /usr/local
CC ?= cc
OBJCOPY ?= objcopy
CFLAGS ?= -O2 -g
SAN ?=
PYTHON ?= python3

comma := ,
V ?=
Q := $(if $(V),,@)
say = $(if $(V),:,printf '  %-5s %s\n' $1 $2)

B := build$(if $(SAN),-$(subst $(comma),-,$(SAN)))

# ---- who may include whom (DESIGN.md, "Folders"): a directory is compiled with -I
# for itself and its row only, so a forbidden include does not compile.
MAY_base    :=
MAY_store   := base
MAY_model   := base
MAY_compute := model base
MAY_prefill := compute model base
MAY_cuda    := prefill compute model base
MAY_ipc     := base
MAY_client  := ipc base
MAY_daemon  := store ipc base
# The engine does not know the daemon; its program (main*.c) speaks to it.
MAY_prefill_main := compute model ipc base

DIRS := base store model compute prefill cuda ipc client daemon
# A directory and its row, in the order in which their archives are linked.
with = $1 $(MAY_$1)

# ---- CUDA: device code and what talks to the driver is in cuda/*.cu; with the plain C around it,
# which is compiled and tested everywhere, it goes into larder-prefill-cuda alone.
CUDA ?=
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(CUDA_HOME)/bin/nvcc
CUDA_ARCHS ?= 80 90 100 120
comma_sm = -gencode arch=compute_$1,code=sm_$1
# PTX of the oldest: kernels use nothing newer, and a GPU with no code of its own compiles it.
nvflags = -std=c++17 -O3 -g -Werror all-warnings $(addprefix -I,$(call with,cuda)) \
    $(foreach a,$(CUDA_ARCHS),$(call comma_sm,$a)) \
    -gencode arch=compute_$(firstword $(CUDA_ARCHS)),code=compute_$(firstword $(CUDA_ARCHS)) \
    -Xcompiler=-Wall,-Wextra,-fPIC,-fstack-protector-strong \
    $(if $(filter %_dequant.cu %_pack.cu %_select.cu,$1),--fmad=false)
LIBS_toolkit := -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcudart -lcublasLt -lcusolver -lstdc++

WARN := -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes \
        -Wvla -Wwrite-strings -Wundef -Wformat=2 -Werror
must := -std=c11 -D_GNU_SOURCE -DLARDER_VERSION='"$(VERSION)"' -fPIC -pthread \
        -ffp-contract=off -fvisibility=hidden -fstack-protector-strong $(WARN) -MMD -MP \
        $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer)
ldmust := -pthread -Wl,-z,relro,-z,now $(if $(SAN),-fsanitize=$(SAN))

# Kernels for one instruction set live in a file named after it and are reached
# only through a run-time check of the processor.
isa_flags = $(if $(findstring _avx512bf16.,$1),-O3 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma) \
            $(if $(findstring _avx512.,$1),-O3 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mfma) \
            $(if $(findstring _avx2.,$1),-O3 -mavx2 -mfma -mf16c)

# Plain loops that are worth vectors.
loop_flags = $(if $(filter base/packed.c,$1),-O3)

row = $(if $(filter prefill/main%,$1),$(MAY_prefill_main),$(MAY_$(firstword $(subst /, ,$1))))
cflags = $(must) -I$(firstword $(subst /, ,$1)) $(addprefix -I,$(call row,$1)) $(CFLAGS) $(call isa_flags,$1) $(call loop_flags,$1)

# ---- outside libraries, by directory
pkg = $(shell pkg-config --libs $1 2>/dev/null || echo -l$(subst lib,,$1))
LIBS_base    := -lcrypto
LIBS_store   := -llmdb -lzstd -lxxhash -lm $(LIBS_base)
LIBS_ipc     := -ljansson $(LIBS_base)
LIBS_model   := -lutf8proc -ljansson -lm $(LIBS_base)
LIBS_compute := -ldnnl -lgomp $(LIBS_model)
LIBS_prefill := $(LIBS_compute)
LIBS_cuda    := $(LIBS_prefill) -lstdc++
LIBS_client  := -ljansson
LIBS_cli     := $(LIBS_client) -lz -lm $(LIBS_base)
LIBS_daemon  := -levent_core -lsystemd $(LIBS_store) $(LIBS_ipc)
LIBS_tests   := -lcmocka

src = $(wildcard $1/*.c)
obj = $(patsubst %.c,$(B)/%.o,$1)

PREFILL_MAIN := $(wildcard prefill/main*.c)
CLI_SRC      := $(wildcard client/cli*.c)
DAEMON_MAIN  := $(wildcard daemon/larderd.c)

SRC_base    := $(call src,base)
SRC_store   := $(call src,store)
SRC_ipc     := $(call src,ipc)
SRC_model   := $(call src,model)
SRC_compute := $(call src,compute)
SRC_cuda    := $(call src,cuda)
SRC_prefill := $(filter-out $(PREFILL_MAIN),$(call src,prefill))
SRC_client  := $(filter-out $(CLI_SRC),$(call src,client))
SRC_daemon  := $(filter-out $(DAEMON_MAIN),$(call src,daemon))

lib = $(B)/lib$1.a
PROGRAMS := $(if $(DAEMON_MAIN),$(B)/larderd) $(if $(CLI_SRC),$(B)/larder) \
            $(if $(PREFILL_MAIN),$(B)/larder-prefill) $(if $(CUDA),$(B)/larder-prefill-cuda)
CLIENT_LIBS := $(if $(SRC_client),$(B)/liblarder.so $(B)/liblarder.a)

.PHONY: all tests check check-all check-unit check-e2e check-golden check-models check-tokenizers check-decoders \
    check-cuda eval-public eval-long bench bench-decoders bench-cuda demo install clean lint format
.DELETE_ON_ERROR:
.SECONDARY:

# Worked examples know the installed headers only.
EXAMPLES := $(patsubst client/%.c,$(B)/%,$(wildcard client/examples/*.c))

all: $(PROGRAMS) $(CLIENT_LIBS) $(EXAMPLES)

# A text that is part of the program (.incbin) is not seen by -MMD.
$(B)/prefill/calibration.o: $(wildcard prefill/calibration/*.txt)

$(B)/%.o: %.c
	@mkdir -p $(@D)
	@$(call say,CC,$<)
	$(Q)$(CC) $(call cflags,$<) -c -o $@ $<

define archive
$$(call lib,$1): $$(call obj,$$(SRC_$1))
	@mkdir -p $$(@D)
	@rm -f $$@ && ar rcs $$@ $$^
endef
$(foreach d,$(DIRS),$(eval $(call archive,$d)))

archives = $(foreach d,$1,$(call lib,$d))
# What larder-prefill is made of, beside its main*.c.
ENGINE := $(call archives,prefill compute model ipc base)

$(B)/larderd: $(call obj,$(DAEMON_MAIN)) $(call archives,$(call with,daemon))
	@$(call say,LD,$@)
	$(Q)$(CC) $(ldmust) $(LDFLAGS) -o $@ $^ $(LIBS_daemon)

$(B)/larder-prefill: $(call obj,$(PREFILL_MAIN)) $(ENGINE)
	@$(call say,LD,$@)
	$(Q)$(CC) $(ldmust) $(LDFLAGS) -o $@ $^ $(LIBS_prefill) $(LIBS_ipc)

CUDA_SRC := $(wildcard cuda/*.cu)
CUDA_DIR := $(B)/cuda-$(subst $(eval ) ,-,$(strip $(CUDA_ARCHS)))
CUDA_OBJ := $(patsubst %.cu,$(CUDA_DIR)/%.o,$(CUDA_SRC))

$(CUDA_DIR)/%.o: %.cu $(wildcard cuda/*.h cuda/*.cuh tests/cuda/harness.h)
	@mkdir -p $(@D)
	@$(call say,NVCC,$<)
	$(Q)$(NVCC) $(call nvflags,$<) $(if $(filter tests/%,$<),-Itests/cuda) -c -o $@ $<

# The list of backends, with cuda in it.
$(B)/cuda/backend.o: compute/backend.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(call cflags,$<) -DLARDER_CUDA -c -o $@ $<

$(CUDA_DIR)/larder-prefill-cuda: $(call obj,$(PREFILL_MAIN)) $(B)/cuda/backend.o $(CUDA_OBJ) \
        $(call lib,cuda) $(ENGINE)
	@$(call say,LD,$@)
	$(Q)$(CC) $(ldmust) $(LDFLAGS) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) \
	    -Wl,--end-group $(LIBS_prefill) $(LIBS_ipc) $(LIBS_toolkit)
$(B)/larder-prefill-cuda: $(CUDA_DIR)/larder-prefill-cuda
	@cp $< $@

$(B)/larder: $(call obj,$(CLI_SRC)) $(call archives,$(call with,client))
	@$(call say,LD,$@)
	$(Q)$(CC) $(ldmust) $(LDFLAGS) -o $@ $^ $(LIBS_cli)

# liblarder: the client library with the parts of ipc and base it needs. Decoders
# link this, so it exports larder_* only and pulls in no library but jansson: what needs
# libcrypto stays out.
hashing := base/sha256.c base/profile_id.c ipc/profile.c
client_parts := $(call obj,$(filter-out $(hashing),$(SRC_client) $(SRC_ipc) $(SRC_base)))
SOVERSION := 0
$(B)/liblarder.so: $(client_parts) client/liblarder.map
	@$(call say,LD,$@)
	$(Q)$(CC) -shared $(ldmust) $(LDFLAGS) -Wl,-soname,liblarder.so.$(SOVERSION) \
	    -Wl,--version-script=client/liblarder.map -o $@ $(client_parts) $(LIBS_client)

# One object whose hidden symbols are local, so that the archive, too, defines larder_* only.
$(B)/liblarder.a: $(client_parts)
	@rm -f $@
	$(Q)$(LD) -r -o $(B)/liblarder.o $^
	$(Q)$(OBJCOPY) --localize-hidden $(B)/liblarder.o
	$(Q)ar rcs $@ $(B)/liblarder.o

$(B)/examples/%: client/examples/%.c $(B)/liblarder.a
	@mkdir -p $(@D)
	@$(call say,LD,$@)
	$(Q)$(CC) -std=c99 $(WARN) $(CFLAGS) -Iclient -Ibase -Iipc $(ldmust) $(LDFLAGS) -o $@ $^ $(LIBS_client) -lm

# ---- tests: tests/unit/test_DIR_what.c links what DIR may use, and nothing else
UNIT := $(patsubst tests/unit/%.c,$(B)/tests/%,$(wildcard tests/unit/test_*.c))
unit_dir = $(word 2,$(subst _, ,$(notdir $1)))
.SECONDEXPANSION:
$(B)/tests/test_%: tests/unit/test_%.c tests/unit/testlib.h $$(call archives,$$(call with,$$(firstword $$(subst _, ,$$*))))
	@mkdir -p $(@D)
	@$(call say,LD,$@)
	$(Q)$(CC) $(must) $(CFLAGS) -Itests/unit $(addprefix -I,$(call with,$(call unit_dir,$@))) $(ldmust) $(LDFLAGS) -o $@ $< \
	    -Wl,--start-group $(filter %.a,$^) -Wl,--end-group $(LIBS_tests) $(LIBS_$(call unit_dir,$@)) -lm

# Parts of the program `larder` that can be tested without running it.
$(B)/libcli.a: $(call obj,$(filter-out client/cli_main.c,$(CLI_SRC)))
	@rm -f $@ && ar rcs $@ $^
$(B)/tests/test_client_eval $(B)/tests/test_client_export: $(B)/libcli.a
$(B)/tests/test_client_eval $(B)/tests/test_client_export: LIBS_client := $(LIBS_cli)

# The CUDA kernels, built for a processor, and a device that is host memory (tests/cuda).
SHIM_OBJ := $(patsubst cuda/%.cu,$(B)/shim/%.o,$(filter-out %/cuda_driver.cu,$(CUDA_SRC))) \
            $(B)/shim/shim.o $(B)/shim/fake_device.o $(B)/shim/harness_host.o
shim_flags = -std=c++17 -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -MMD -MP \
             $(if $(SAN),-fsanitize=$(SAN)) $(CFLAGS) -Itests/cuda $(addprefix -I,$(call with,cuda))
$(B)/shim/%.o: cuda/%.cu tests/cuda/shim.h
	@mkdir -p $(@D)
	$(Q)$(CXX) $(shim_flags) -include tests/cuda/shim.h -x c++ -c -o $@ $<
$(B)/shim/shim.o: tests/cuda/shim.cc
	@mkdir -p $(@D)
	$(Q)$(CXX) $(shim_flags) -c -o $@ $<
$(B)/shim/%.o: tests/cuda/%.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(must) $(CFLAGS) -Itests/cuda $(addprefix -I,$(call with,cuda)) -c -o $@ $<
$(B)/libcudashim.a: $(SHIM_OBJ)
	@rm -f $@ && ar rcs $@ $^
# larder-prefill-cuda on that device: what the program does, without a GPU.
$(B)/shim/larder-prefill-cuda: $(call obj,$(PREFILL_MAIN)) $(B)/cuda/backend.o \
        $(call lib,cuda) $(ENGINE) $(B)/libcudashim.a
	@$(call say,LD,$@)
	$(Q)$(CC) $(ldmust) $(LDFLAGS) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) \
	    -Wl,--end-group $(LIBS_prefill) $(LIBS_ipc) -lstdc++
CUDA_UNIT := $(patsubst tests/unit/%.c,$(B)/tests/%,$(wildcard tests/unit/test_cuda_*.c))
$(CUDA_UNIT): $(B)/libcudashim.a tests/cuda/fake_device.h tests/cuda/cuda_fixture.h
$(CUDA_UNIT): CFLAGS += -Itests/cuda

# The same kernel tests, and others, on a GPU.
DEVICE_TESTS := $(addprefix $(CUDA_DIR)/test_,kernels select match pack device) $(CUDA_DIR)/bench_device
device_parts := $(CUDA_OBJ) $(call archives,$(call with,cuda))
device_cc = $(CC) $(must) $(CFLAGS) -Itests/unit -Itests/cuda $(addprefix -I,$(call with,cuda)) $(ldmust) \
    $(LDFLAGS) -o $@ $(filter %.c %.o,$^) -Wl,--start-group $(filter %.a,$^) -Wl,--end-group \
    $(LIBS_tests) $(LIBS_cuda) $(LIBS_toolkit)
$(CUDA_DIR)/test_kernels $(CUDA_DIR)/test_select: $(CUDA_DIR)/test_%: tests/unit/test_cuda_%.c \
        $(CUDA_DIR)/tests/cuda/harness_device.o $(device_parts)
	@$(call say,LD,$@)
	$(Q)$(device_cc)
$(CUDA_DIR)/test_match $(CUDA_DIR)/test_pack: $(CUDA_DIR)/test_%: tests/unit/test_cuda_%.c \
        $(device_parts)
	@$(call say,LD,$@)
	$(Q)$(device_cc) -DLARDER_ON_GPU
$(CUDA_DIR)/test_device $(CUDA_DIR)/bench_device: $(CUDA_DIR)/%: tests/cuda/%.c \
        $(device_parts)
	@$(call say,LD,$@)
	$(Q)$(device_cc)

# tests/bench/bench_DIR_what.c likewise; bench_all_what.c is a decoder, client and engine in one.
MAY_all   := prefill compute model client ipc base
LIBS_all  := $(LIBS_prefill) $(LIBS_client)
BENCH := $(patsubst tests/bench/%.c,$(B)/bench/%,$(wildcard tests/bench/bench_*.c))
$(B)/bench/bench_%: tests/bench/bench_%.c $(wildcard tests/bench/*.h) $$(call archives,$$(filter-out all,$$(call with,$$(firstword $$(subst _, ,$$*)))))
	@mkdir -p $(@D)
	@$(call say,LD,$@)
	$(Q)$(CC) $(must) $(CFLAGS) $(addprefix -I,$(filter-out all,$(call with,$(call unit_dir,$@)))) $(ldmust) $(LDFLAGS) -o $@ $< \
	    $(filter %.a,$^) $(LIBS_$(call unit_dir,$@)) -lm

tests: all $(UNIT) $(B)/shim/larder-prefill-cuda

check: tests
	tests/run.sh $(B) lint cuda-build unit models python eval e2e golden

# And what needs PyPI's decoders (tests/bench/setup-peers.sh decoders), which may not be skipped:
# one count of everything. It is what CI runs.
check-all: tests
	tests/run.sh $(B) lint cuda-build unit models python eval e2e golden decoders! models-made!

# On a machine with a GPU: kernels, products, memory, sanitizers, recorded runs. What the
# machine lacks is named and skipped.
check-cuda: all $(B)/larder-prefill-cuda $(DEVICE_TESTS)
	CUDA_DIR=$(CUDA_DIR) tests/run.sh $(B) cuda

bench-cuda: $(B)/larder-prefill-cuda $(DEVICE_TESTS)
	$(PYTHON) tests/cuda/bench.py --build $(B) --device-bench $(CUDA_DIR)/bench_device $(BENCH_FLAGS)

check-unit: $(UNIT)
	tests/run.sh $(B) unit

# The Python package and the decoders that it feeds; those whose libraries are not there
# (tests/bench/setup-peers.sh decoders) are named and skipped.
check-decoders: all
	tests/run.sh $(B) python decoders

check-e2e: all $(B)/shim/larder-prefill-cuda
	tests/run.sh $(B) e2e

# Every recorded run on both backends (make check runs a covering subset).
check-golden: all $(B)/shim/larder-prefill-cuda
	tests/run.sh $(B) golden-all

# Models of every architecture, made at random by transformers, as directories and as GGUF (make
# check has small ones). Skipped where tests/bench/setup-peers.sh decoders has not
# been run.
check-models: all $(B)/shim/larder-prefill-cuda
	tests/run.sh $(B) models models-made

# Token ids against the reference implementations, 100,000 strings for each family of tokenizers;
# the references come from PyPI and are not part of the tree. COUNT=1000 for a first look.
COUNT ?= 100000
$(B)/tests/encode: tests/tokenizers/encode.c $(call archives,$(call with,model))
	@mkdir -p $(@D)
	@$(call say,LD,$@)
	$(Q)$(CC) $(must) $(CFLAGS) $(addprefix -I,$(call with,model)) $(ldmust) $(LDFLAGS) -o $@ $^ $(LIBS_model)

check-tokenizers: $(B)/tests/encode
	COUNT=$(COUNT) tests/run.sh $(B) tokenizers

# Do pruned caches still answer? Tasks and the model are not part of the tree; what is not there
# is named and skipped. Results are kept in $(B)/eval and a second run goes on from them.
#   make eval-public POLICIES="snapkv,rows=25% asl,rows=25%" EVAL_FLAGS="--limit 5"
POLICIES ?= asl,rows=25% snapkv,rows=25%
EVAL_TASKS ?= ../shared/tasks
EVAL_FLAGS ?=
evaluate = $(PYTHON) tests/eval/public.py --build $(B) --tasks $(EVAL_TASKS)/$1.jsonl \
    $(foreach p,$(POLICIES),--policy '$p') --markdown $(B)/eval/$1.md --csv $(B)/eval/$1.csv $(EVAL_FLAGS) || [ $$? -eq 77 ]

eval-public: all
	$(call evaluate,public_tasks)

eval-long: all
	$(call evaluate,long_tasks_public)

lint:
	tests/run.sh $(B) lint

bench: all $(BENCH)
	tests/bench/run.sh $(B) "" "" "" "$(BENCH_PARTS)"

# First token in each decoder, from a stored cache and after its own prefill: one table.
bench-decoders: all $(B)/bench/bench_all_resume
	LARDER_PEERS_PYTHON="$${LARDER_PEERS_PYTHON:-$${XDG_CACHE_HOME:-$$HOME/.cache}/larder/decoders/bin/python}" \
	    $(PYTHON) tests/bench/decoder_peers.py --build $(B) $(BENCH_FLAGS) \
	    --model "$${XDG_CACHE_HOME:-$$HOME/.cache}/larder/SmolLM2-135M-Instruct.Q4_1.gguf"

demo: all
	etc/demo.sh --built $(B)

format:
	clang-format -i $(foreach d,$(DIRS),$(wildcard $d/*.[ch])) $(wildcard client/examples/*.c tests/*/*.[ch])

# ---- installation
install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/libexec/larder \
	    $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/share/doc/larder \
	    $(DESTDIR)/etc/larder $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/doc/larder/examples \
	    $(DESTDIR)$(PREFIX)/lib/sysusers.d $(DESTDIR)$(PREFIX)/lib/tmpfiles.d \
	    $(foreach s,1 3 5 8,$(DESTDIR)$(PREFIX)/share/man/man$s)
	install -m 755 $(B)/larderd $(DESTDIR)$(PREFIX)/sbin/larderd
	install -m 755 $(B)/larder $(B)/larder-prefill $(if $(CUDA),$(B)/larder-prefill-cuda) $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(B)/liblarder.so $(DESTDIR)$(PREFIX)/lib/liblarder.so.$(SOVERSION)
	ln -sf liblarder.so.$(SOVERSION) $(DESTDIR)$(PREFIX)/lib/liblarder.so
	install -m 644 $(B)/liblarder.a $(DESTDIR)$(PREFIX)/lib
	install -m 644 client/larder.h base/larder_status.h ipc/larder_image.h $(DESTDIR)$(PREFIX)/include
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' etc/larder.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/larder.pc
	for u in larderd.service larder-prefill@.service; do \
	    sed -e 's|@PREFIX@|$(PREFIX)|' etc/$$u > $(DESTDIR)$(PREFIX)/lib/systemd/system/$$u; done
	for m in client/larder.1 client/liblarder.3 daemon/larder.conf.5 daemon/larderd.8 prefill/larder-prefill.8; do \
	    install -m 644 $$m $(DESTDIR)$(PREFIX)/share/man/man$${m##*.}; done
	install -m 644 etc/larder.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/larder.conf
	install -m 644 etc/larder.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/larder.conf
	test -e $(DESTDIR)/etc/larder/larder.conf || install -m 644 etc/larder.conf $(DESTDIR)/etc/larder/larder.conf
	install -m 644 README.md DESIGN.md PERFORMANCE.md EVALUATION.md LICENSE ipc/PROTOCOL.md ipc/IMAGE.md store/FORMAT.md $(DESTDIR)$(PREFIX)/share/doc/larder
	install -m 644 client/examples/*.c $(DESTDIR)$(PREFIX)/share/doc/larder/examples

clean:
	rm -rf build build-*

-include $(shell find $(B) -name '*.d' 2>/dev/null)
