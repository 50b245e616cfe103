//! The `understudy-primary` binary.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    understudy_primary::run::main(understudy_primary::node::open)
}
