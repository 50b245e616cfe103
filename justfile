# Every recipe is a step of `.ci/run`, so that a developer and CI run the same commands.

# List the recipes.
default:
    @just --list

# Rewrite the code in the house format.
fmt:
    cargo fmt --all

# Clippy on all targets, warnings denied.
lint:
    .ci/run lint

# The README's test command.
test:
    .ci/run test

# Simulation: UNDERSTUDY_SEEDS sets how many seeds, UNDERSTUDY_SEED replays one.
sim:
    .ci/run sim

# The whole pair in virtual time, with the same variables.
virtual:
    .ci/run virtual

# Every known hazard, switched in and caught.
mutants:
    .ci/run mutants

# The pair on loopback, shown step by step.
demo:
    .ci/run build demo

# Speed, against bare loops measured in the same run.
bench *ARGS:
    cargo run --release --bin understudy -- bench {{ARGS}}

# The independent gRPC client.
black-box:
    .ci/run build blackbox

# Release binaries killed for 50 rounds.
processes:
    .ci/run build process

# Release binaries under strace.
strace:
    .ci/run build strace

# The Kubernetes manifests against their schemas.
deploy-check:
    .ci/run deploy

# Licences, bans and sources of the dependencies.
deny:
    .ci/run deny

# Everything CI runs.
ci:
    .ci/run
