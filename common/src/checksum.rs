//! CRC32C (Castagnoli), the checksum of blocks, records and metadata, and the digest by which runs compare.

use crc_fast::{CrcAlgorithm, Digest, checksum};

/// CRC32C of `data`, as gRPC clients and most storage tools compute it.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the algorithm has 32 bits")]
pub fn crc32c(data: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, data) as u32
}

/// CRC32C of the concatenation of `parts`.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the algorithm has 32 bits")]
pub fn crc32c_parts(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    digest.finalize() as u32
}

/// The first 16 bytes of the BLAKE3 of `data`.
#[must_use]
pub fn digest(data: &[u8]) -> [u8; 16] {
    *blake3::hash(data).as_bytes().first_chunk().expect("it has 32 bytes")
}

/// True if every byte is zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (chunks, rest) = data.as_chunks::<256>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_the_castagnoli_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_parts(&[b"1234", b"", b"56789"]), 0xe306_9283);
    }

    #[test]
    fn zero_test_sees_the_last_byte() {
        let mut data = vec![0; 1000];
        assert!(is_zero(&data));
        data[999] = 1;
        assert!(!is_zero(&data));
    }
}
