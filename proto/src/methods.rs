//! The methods of our services, as the compiled descriptors list them.

use prost::Message;
use prost_types::FileDescriptorSet;
use understudy_common::grpc::Method;

/// Every method of `descriptors` (an encoded `FileDescriptorSet`). Streams of package `understudy.v1` end themselves
/// at shutdown.
#[must_use]
pub fn methods(descriptors: &[u8]) -> Vec<Method> {
    let files = FileDescriptorSet::decode(descriptors).expect("compiled into the program").file;
    let mut methods = Vec::new();
    for file in &files {
        for service in &file.service {
            methods.extend(service.method.iter().map(|method| {
                let streaming = method.client_streaming() || method.server_streaming();
                Method {
                    service: format!("{}.{}", file.package(), service.name()),
                    method: method.name().to_owned(),
                    streaming,
                    drains: !streaming || file.package() == "understudy.v1",
                }
            }));
        }
    }
    methods
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unary_and_streaming_methods_are_told_apart() {
        let methods = methods(crate::FILE_DESCRIPTOR_SET);
        let streaming = |name: &str| methods.iter().find(|method| method.method == name).unwrap().streaming;
        assert!(!streaming("CreateVolume"));
        assert!(streaming("WriteBlocks"));
        assert!(streaming("ReadBlocks"));
        assert!(methods.iter().any(|method| method.service == "understudy.v1.ReplicaService"));
    }
}
