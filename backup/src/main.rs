//! The `understudy-backup` binary.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    understudy_backup::run::main(understudy_backup::node::open)
}
