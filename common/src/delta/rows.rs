//! A row of a block set in the catalogue: `docs/formats.md`, "Delta table".

use std::sync::Arc;

use crate::{checksum::crc32c_parts, types::VolumeId};

use super::{
    SetKind,
    blocks::Row,
    page::{PAGE_BLOCKS, Page, Run, WORDS},
};

const VERSION: u8 = 1;
const KIND_RUNS: u8 = 1;
const KIND_BITMAP: u8 = 2;
const KIND_FULL: u8 = 3;
const BITMAP_BYTES: usize = PAGE_BLOCKS as usize / 8;

/// The blocks of a page of a set, or that it and those behind it are full. Shares the page with the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRow(pub(super) Row);

impl SetRow {
    /// The byte form, for the key (`volume`, `set`, `page`).
    #[must_use]
    pub fn encode(&self, volume: VolumeId, set: SetKind, page: u32) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 0, VERSION];
        match &self.0 {
            Row::Full(pages) => {
                out.extend_from_slice(&[KIND_FULL, 0, 0]);
                out.extend_from_slice(&pages.to_le_bytes());
            }
            Row::Some(content) => match content.words() {
                Some(words) => {
                    out.extend_from_slice(&[KIND_BITMAP, 0, 0]);
                    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
                }
                None => {
                    out.extend_from_slice(&[KIND_RUNS, 0, 0]);
                    let mut count = 0_u16;
                    for run in content.runs() {
                        out.extend_from_slice(&run.first.to_le_bytes());
                        out.extend_from_slice(&run.last.to_le_bytes());
                        count += 1;
                    }
                    out[6..8].copy_from_slice(&count.to_le_bytes());
                }
            },
        }
        let crc = seal(volume, set, page, &out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the byte form.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(volume: VolumeId, set: SetKind, page: u32, blob: &[u8]) -> Result<Self, &'static str> {
        let (crc, body) = blob.split_first_chunk::<4>().ok_or("too short")?;
        if u32::from_le_bytes(*crc) != seal(volume, set, page, body) {
            return Err("bad checksum");
        }
        let (&[version, kind, count @ ..], rest) = body.split_first_chunk::<4>().ok_or("too short")?;
        if version != VERSION {
            return Err("unknown version");
        }
        let count = u16::from_le_bytes(count);
        if kind != KIND_RUNS && count != 0 {
            return Err("a count where there is none");
        }
        let content = match kind {
            KIND_RUNS => decode_runs(rest, count)?,
            KIND_BITMAP => decode_bitmap(rest)?,
            KIND_FULL => {
                let pages = u32::from_le_bytes(rest.try_into().map_err(|_| "bad length")?);
                return match page.checked_add(pages) {
                    Some(_) if pages > 0 => Ok(Self(Row::Full(pages))),
                    _ => Err("bad number of pages"),
                };
            }
            _ => return Err("unknown kind"),
        };
        if content.is_empty() || content.is_full() {
            return Err("an empty or a full page");
        }
        Ok(Self(Row::Some(Arc::new(content))))
    }
}

fn decode_runs(bytes: &[u8], count: u16) -> Result<Page, &'static str> {
    let (chunks, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() || chunks.len() != usize::from(count) {
        return Err("bad length");
    }
    let runs: Vec<Run> = chunks
        .iter()
        .map(|[a, b, c, d]| Run { first: u16::from_le_bytes([*a, *b]), last: u16::from_le_bytes([*c, *d]) })
        .collect();
    let in_page = runs.iter().all(|r| r.first <= r.last && u32::from(r.last) < PAGE_BLOCKS);
    let apart = runs.windows(2).all(|w| u32::from(w[0].last) + 1 < u32::from(w[1].first));
    if in_page && apart { Ok(Page::from_runs(runs)) } else { Err("bad run") }
}

fn decode_bitmap(bytes: &[u8]) -> Result<Page, &'static str> {
    let bytes: &[u8; BITMAP_BYTES] = bytes.try_into().map_err(|_| "bad length")?;
    let mut words = Box::new([0; WORDS]);
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    Ok(Page::from_words(words))
}

/// The checksum covers the key, so that a row under another key is noticed.
fn seal(volume: VolumeId, set: SetKind, page: u32, body: &[u8]) -> u32 {
    crc32c_parts(&[&volume.0.to_le_bytes(), &[set.number()], &page.to_le_bytes(), body])
}
