# Everyday commands. Each does its own set-up, so that it works in a clean clone on a fresh Debian 12 with Rust.

CARGO ?= cargo
DESTDIR ?=
PREFIX ?= /usr
bin := target/release

# RDMA is built in where libibverbs is; `omega check` says when it is not. `make RDMA=` leaves it out.
RDMA ?= $(shell pkg-config --exists libibverbs librdmacm 2>/dev/null && echo yes)
# Asked for again in every recipe, since `setup` may just have installed it.
rdma = $(if $(RDMA),--features omega-vmm/rdma$(comma)omega-agent/rdma)
comma := ,

.PHONY: all setup build images demo demo-span test bench lint fmt fuzz model litmus install deb clean

all: build

## Install the Debian packages that building, testing and the demo need.
setup:
	packaging/setup

build:
	$(CARGO) build --release --locked -p omega-vmm -p omega-agent -p omega-lab -p omega-lab-clock $(rdma)

## Guest and lab images, cached by the content of their recipes.
images: setup
	guest-images/build all

## Boot Debian with its root disk on a second PC, twice.
demo: setup build images
	$(bin)/lab demo

## Boot one guest on two PCs, a vCPU on each: some ten minutes where PCs are emulated.
demo-span: setup build images
	$(bin)/lab demo-span

## Everything: unit, micro-guest, fuzz-corpus and lab tests, with their counts.
# The suite was built with the rest: `cargo run` would build its libraries once more, with fewer features.
# Signals that whoever runs this ignores (as nohup does) are not ignored by the guests under test.
test: setup build images
	env --default-signal=HUP,INT,QUIT CARGO=$(CARGO) $(bin)/suite

## Figures beside their floors; writes target/bench/summary.json.
bench: setup build images
	$(CARGO) run --quiet --release --locked -p omega-benches --bin bench

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet
	$(CARGO) test --quiet --locked -p omega-lab --test dependencies

fmt:
	$(CARGO) fmt --all

## Coverage-guided fuzzing of one decoder: make fuzz TARGET=wire SECONDS=60 (needs nightly and cargo-fuzz).
fuzz:
	cd tests && $(CARGO) +nightly fuzz run $(TARGET) -- -max_total_time=$(or $(SECONDS),60)

## Search the coherence protocol further than the tests do: some minutes, and 2 GB of memory.
model:
	OMEGA_MODEL_FAR=1 $(CARGO) test --release --locked -p omega-vmm --lib coherence -- --nocapture --test-threads=1

## A million and more litmus iterations between members of a guest's memory: some minutes.
litmus:
	OMEGA_LITMUS=60000 $(CARGO) test --release --locked -p omega-vmm --lib litmus -- --nocapture --test-threads=1

install: build
	packaging/install "$(DESTDIR)" "$(PREFIX)"

deb: build
	packaging/build-deb

clean:
	$(CARGO) clean
