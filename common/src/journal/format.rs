//! Byte layout of the journal's files; the specification is the section "Journal" of `docs/formats.md`.
//!
//! Pure functions between bytes and headers. A header that does not decode is not a header: what that means is decided
//! by recovery. All numbers are little-endian.

use crate::{
    checksum::crc32c_parts,
    types::{Lsn, Uid},
};

/// Unit of placement, and what the disk writes as a whole.
pub(super) const SECTOR: u64 = 512;
pub(super) const BATCH_HEADER_LEN: usize = 64;
pub(super) const RECORD_HEADER_LEN: usize = 20;
/// Also the length of a sector, as a type for buffers.
pub(super) const FILE_HEADER_LEN: usize = 512;

const FILE_MAGIC: [u8; 8] = *b"UDSTJRNL";
const BATCH_MAGIC: [u8; 4] = *b"UJBA";
const VERSION: u32 = 1;
/// Where the checksum of the file header stands; everything before is covered, everything behind is zero.
const FILE_CRC_AT: usize = 64;
const BATCH_CRC_AT: usize = BATCH_HEADER_LEN - 4;

/// Start of a use of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) store: Uid,
    pub(super) sequence: u64,
    pub(super) first_lsn: Lsn,
    pub(super) epoch: u64,
    pub(super) file_bytes: u64,
}

impl FileHeader {
    pub(super) fn encode(&self) -> [u8; FILE_HEADER_LEN] {
        let mut out = [0; FILE_HEADER_LEN];
        out[..8].copy_from_slice(&FILE_MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..32].copy_from_slice(&self.store.0);
        for (i, n) in [self.sequence, self.first_lsn.0, self.epoch, self.file_bytes].into_iter().enumerate() {
            out[32 + i * 8..40 + i * 8].copy_from_slice(&n.to_le_bytes());
        }
        let crc = crc32c_parts(&[&out[..FILE_CRC_AT]]);
        out[FILE_CRC_AT..FILE_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `Ok(None)` for bytes that are no file header, `Err` with the version for a whole one of an unknown version.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>, u32> {
        if bytes.len() < FILE_HEADER_LEN
            || bytes[..8] != FILE_MAGIC
            || u32_at(bytes, FILE_CRC_AT) != crc32c_parts(&[&bytes[..FILE_CRC_AT]])
        {
            return Ok(None);
        }
        match u32_at(bytes, 8) {
            VERSION => Ok(Some(Self {
                store: Uid(array_at(bytes, 16)),
                sequence: u64_at(bytes, 32),
                first_lsn: Lsn(u64_at(bytes, 40)),
                epoch: u64_at(bytes, 48),
                file_bytes: u64_at(bytes, 56),
            })),
            other => Err(other),
        }
    }
}

/// Start of a batch. One without records starts an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchHeader {
    pub(super) epoch: u64,
    pub(super) file_sequence: u64,
    pub(super) first_lsn: Lsn,
    /// Everything up to here was durable when the batch was written.
    pub(super) durable_lsn: Lsn,
    pub(super) record_count: u32,
    /// This header and the records, without the padding to the next sector.
    pub(super) byte_len: u64,
}

impl BatchHeader {
    pub(super) fn encode(&self, store: &Uid) -> [u8; BATCH_HEADER_LEN] {
        let mut out = [0; BATCH_HEADER_LEN];
        out[..4].copy_from_slice(&BATCH_MAGIC);
        out[4..8].copy_from_slice(&self.record_count.to_le_bytes());
        let numbers = [self.epoch, self.file_sequence, self.first_lsn.0, self.durable_lsn.0, self.byte_len];
        for (i, n) in numbers.into_iter().enumerate() {
            out[8 + i * 8..16 + i * 8].copy_from_slice(&n.to_le_bytes());
        }
        let crc = crc32c_parts(&[&out[..BATCH_CRC_AT], &store.0]);
        out[BATCH_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8], store: &Uid) -> Option<Self> {
        if bytes.len() < BATCH_HEADER_LEN
            || bytes[..4] != BATCH_MAGIC
            || u32_at(bytes, BATCH_CRC_AT) != crc32c_parts(&[&bytes[..BATCH_CRC_AT], &store.0])
        {
            return None;
        }
        Some(Self {
            record_count: u32_at(bytes, 4),
            epoch: u64_at(bytes, 8),
            file_sequence: u64_at(bytes, 16),
            first_lsn: Lsn(u64_at(bytes, 24)),
            durable_lsn: Lsn(u64_at(bytes, 32)),
            byte_len: u64_at(bytes, 40),
        })
    }

    /// Bytes the batch takes in its file.
    pub(super) fn span(&self) -> u64 {
        self.byte_len.next_multiple_of(SECTOR)
    }

    /// The last record, or the one before the batch if it has none.
    pub(super) fn last_lsn(&self) -> Lsn {
        Lsn(self.first_lsn.0 + u64::from(self.record_count) - 1)
    }

    /// What binds the checksums of the records to this batch: a record of an older use of the same sectors, or of a
    /// dropped epoch, does not fit.
    pub(super) fn salt(&self, store: &Uid) -> [u8; 32] {
        let mut salt = [0; 32];
        salt[..16].copy_from_slice(&store.0);
        salt[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        salt[24..].copy_from_slice(&self.file_sequence.to_le_bytes());
        salt
    }
}

/// Start of a record; `head` and data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub(super) head_len: u32,
    pub(super) data_len: u32,
    pub(super) lsn: Lsn,
}

impl RecordHeader {
    pub(super) fn encode(&self, head: &[u8], salt: &[u8; 32]) -> [u8; RECORD_HEADER_LEN] {
        let mut out = [0; RECORD_HEADER_LEN];
        out[..4].copy_from_slice(&self.head_len.to_le_bytes());
        out[4..8].copy_from_slice(&self.data_len.to_le_bytes());
        out[8..16].copy_from_slice(&self.lsn.0.to_le_bytes());
        let crc = crc32c_parts(&[salt, &out[..16], head]);
        out[16..].copy_from_slice(&crc.to_le_bytes());
        out
    }
}

/// Splits the record at the start of `bytes`: header, and the ranges of its head and data. `None` if it is cut or bad.
pub(super) fn split_record(
    bytes: &[u8],
    salt: &[u8; 32],
) -> Option<(RecordHeader, std::ops::Range<usize>, std::ops::Range<usize>)> {
    if bytes.len() < RECORD_HEADER_LEN {
        return None;
    }
    let header = RecordHeader { head_len: u32_at(bytes, 0), data_len: u32_at(bytes, 4), lsn: Lsn(u64_at(bytes, 8)) };
    let head_end = RECORD_HEADER_LEN.checked_add(usize::try_from(header.head_len).ok()?)?;
    let data_end = head_end.checked_add(usize::try_from(header.data_len).ok()?)?;
    if data_end > bytes.len() {
        return None;
    }
    let head = RECORD_HEADER_LEN..head_end;
    let crc = crc32c_parts(&[salt, &bytes[..16], &bytes[head.clone()]]);
    (crc == u32_at(bytes, 16)).then_some((header, head, head_end..data_end))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    const STORE: Uid = Uid(*b"0123456789abcdef");

    #[test]
    fn golden_bytes() {
        let file = FileHeader { store: STORE, sequence: 0x102, first_lsn: Lsn(0x304), epoch: 5, file_bytes: 0x10000 };
        let bytes = file.encode();
        assert_eq!(FileHeader::decode(&bytes), Ok(Some(file)));
        assert_eq!(hex(&bytes[..68]), GOLDEN_FILE);
        assert!(bytes[68..].iter().all(|b| *b == 0));

        let batch = BatchHeader {
            epoch: 5,
            file_sequence: 0x102,
            first_lsn: Lsn(0x304),
            durable_lsn: Lsn(0x303),
            record_count: 1,
            byte_len: 93,
        };
        let bytes = batch.encode(&STORE);
        assert_eq!(BatchHeader::decode(&bytes, &STORE), Some(batch));
        assert_eq!(BatchHeader::decode(&bytes, &Uid::default()), None);
        assert_eq!(hex(&bytes), GOLDEN_BATCH);

        let record = RecordHeader { head_len: 4, data_len: 5, lsn: Lsn(0x304) };
        let salt = batch.salt(&STORE);
        let bytes = [&record.encode(b"head", &salt)[..], b"head", b"bytes"].concat();
        assert_eq!(split_record(&bytes, &salt), Some((record, 20..24, 24..29)));
        assert_eq!(split_record(&bytes[..28], &salt), None);
        assert_eq!(split_record(&bytes, &[0; 32]), None);
        assert_eq!(hex(&bytes), GOLDEN_RECORD);
    }

    // Computed by hand from docs/formats.md, not by this code.
    const GOLDEN_FILE: &str = "554453544a524e4c01000000000000003031323334353637383961626364656602010000000000000403000000000000\
        05000000000000000000010000000000316ee369";
    const GOLDEN_BATCH: &str = "554a42410100000005000000000000000201000000000000040300000000000003030000000000005d00000000000000\
        0000000000000000000000005112411c";
    const GOLDEN_RECORD: &str = "04000000050000000403000000000000350094f9686561646279746573";

    #[test]
    fn an_unknown_version_is_told_from_no_header() {
        let mut bytes =
            FileHeader { store: STORE, sequence: 1, first_lsn: Lsn(1), epoch: 1, file_bytes: 4096 }.encode();
        bytes[8] = 2;
        assert_eq!(FileHeader::decode(&bytes), Ok(None));
        let crc = crc32c_parts(&[&bytes[..64]]);
        bytes[64..68].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(FileHeader::decode(&bytes), Err(2));
    }
}
