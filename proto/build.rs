//! Compiles the .proto files without an installed `protoc`.

use prost::Message as _;
use std::{env, fs, path::PathBuf};

const FILES: [&str; 5] = [
    "understudy/v1/types.proto",
    "understudy/v1/block.proto",
    "understudy/v1/volume.proto",
    "understudy/v1/replication.proto",
    "understudy/v1/replica.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("understudy_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").codec_path("crate::codec::BlockCodec").compile_fds(descriptors)?;
    Ok(())
}
