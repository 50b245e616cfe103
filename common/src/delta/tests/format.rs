use proptest::prelude::*;

use super::PAGE;
use crate::{
    checksum::crc32c_parts,
    delta::{BlockSet, SetKind, SetRow},
    types::VolumeId,
};

const KEY: (VolumeId, SetKind, u32) = (VolumeId(3), SetKind::Frozen, 9);

fn encode(row: &SetRow) -> Vec<u8> {
    row.encode(KEY.0, KEY.1, KEY.2)
}

fn decode(blob: &[u8]) -> Result<SetRow, &'static str> {
    SetRow::decode(KEY.0, KEY.1, KEY.2, blob)
}

fn seal(body: &[u8]) -> Vec<u8> {
    let crc = crc32c_parts(&[&3_u64.to_le_bytes(), &[1], &9_u32.to_le_bytes(), body]);
    [&crc.to_le_bytes(), body].concat()
}

/// The row of the first page.
fn row_of(set: &mut BlockSet) -> SetRow {
    set.take_changed().rows.swap_remove(0).1.unwrap()
}

fn runs() -> SetRow {
    let mut set = BlockSet::new();
    set.insert_range(2, 1);
    set.insert_range(0x100, 0x200);
    set.insert_range(PAGE - 1, 1);
    row_of(&mut set)
}

fn bitmap() -> SetRow {
    let mut set = BlockSet::new();
    (0..PAGE / 2).for_each(|n| set.insert_range(2 * n, 1));
    set.insert_range(9, 1);
    row_of(&mut set)
}

fn full() -> SetRow {
    let mut set = BlockSet::new();
    set.insert_all(0x0102 * PAGE);
    row_of(&mut set)
}

#[test]
fn golden_bytes() {
    let body = [1, 1, 3, 0, 2, 0, 2, 0, 0, 1, 0xff, 2, 0xff, 0x7f, 0xff, 0x7f];
    assert_eq!(encode(&runs()), seal(&body));
    assert_eq!(encode(&full()), seal(&[1, 3, 0, 0, 2, 1, 0, 0]));
    let mut body = vec![1, 2, 0, 0];
    body.resize(4 + 4096, 0x55);
    body[5] = 0x57;
    assert_eq!(encode(&bitmap()), seal(&body));
    for row in [runs(), full(), bitmap()] {
        assert_eq!(decode(&encode(&row)).unwrap(), row);
    }
}

#[test]
fn every_flipped_bit_a_cut_and_a_foreign_key_are_detected() {
    for row in [runs(), full(), bitmap()] {
        let blob = encode(&row);
        assert!(SetRow::decode(VolumeId(2), KEY.1, KEY.2, &blob).is_err());
        assert!(SetRow::decode(KEY.0, SetKind::Active, KEY.2, &blob).is_err());
        assert!(SetRow::decode(KEY.0, KEY.1, 8, &blob).is_err());
        for bit in 0..blob.len() * 8 {
            let mut bad = blob.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for len in (0..blob.len()).filter(|len| *len < 64 || *len > 4090) {
            assert!(decode(&blob[..len]).is_err());
        }
    }
}

#[test]
fn what_no_set_holds_is_refused() {
    let refused = |body: &[u8], why: &str| assert_eq!(decode(&seal(body)), Err(why));
    refused(&[2, 1, 1, 0, 0, 0, 0, 0], "unknown version");
    refused(&[1, 4, 0, 0], "unknown kind");
    refused(&[1, 1, 0, 0], "an empty or a full page");
    refused(&[1, 1, 1, 0, 0, 0, 0xff, 0x7f], "an empty or a full page");
    refused(&[1, 1, 1, 0, 0, 0, 0, 0x80], "bad run");
    refused(&[1, 1, 1, 0, 2, 0, 1, 0], "bad run");
    refused(&[1, 1, 2, 0, 0, 0, 1, 0, 2, 0, 3, 0], "bad run");
    refused(&[1, 1, 2, 0, 0, 0, 1, 0], "bad length");
    refused(&[1, 3, 0, 0, 0, 0, 0, 0], "bad number of pages");
    refused(&[1, 3, 0, 0, 0xff, 0xff, 0xff, 0xff], "bad number of pages");
    refused(&[1, 3, 1, 0, 1, 0, 0, 0], "a count where there is none");
    refused(&[vec![1, 2, 0, 0], vec![0; 4096]].concat(), "an empty or a full page");
}

#[test]
fn rows_that_overlap_are_refused() {
    assert!(BlockSet::from_rows([(0, full()), (0x0101, runs())]).is_err());
    assert!(BlockSet::from_rows([(0, full()), (0x0102, full())]).is_err());
    assert!(BlockSet::from_rows([(1, runs()), (1, runs())]).is_err());
    assert!(BlockSet::from_rows([(u32::MAX, runs())]).is_err());
    let set = BlockSet::from_rows([(0, full()), (0x0102, runs())]).unwrap();
    assert_eq!(set.len(), 0x0102 * PAGE + 0x202);
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_valid(
        kind in 0_u8..4,
        count in 0_u8..4,
        rest in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0)], 0..20),
    ) {
        let blob = seal(&[&[1, kind, count, 0], &rest[..]].concat());
        if let Ok(row) = decode(&blob) {
            prop_assert_eq!(decode(&encode(&row)), Ok(row));
        }
    }
}
