//! The default text of blkparse: `8,0 3 11 0.009507758 697 Q W 223490 + 8 [kjournald]`.

use std::io;

use super::{Builder, TraceError};

/// In the unit of blktrace.
const SECTOR_BYTES: u64 = 512;

/// The same write shows up queued, issued and completed. One kind of event is taken, the earliest there is.
const ACTIONS: [&str; 3] = ["C", "D", "Q"];

/// True for a line that begins as an event does.
pub(super) fn is_event(line: &str) -> bool {
    line.split_whitespace().next().and_then(|device| device.split_once(',')).is_some_and(|(major, minor)| {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits(major) && digits(minor)
    })
}

/// Takes the writes; other events, messages and the summary at the end are skipped.
pub(super) fn events(lines: impl Iterator<Item = io::Result<String>>, builder: &mut Builder) -> Result<(), TraceError> {
    let mut taken = 0;
    for (line, text) in (1..).zip(lines) {
        let text = text?;
        if !is_event(&text) {
            continue;
        }
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [device, _, _, time, _, action, kind, sector, "+", sectors, ..] = fields[..] else { continue };
        let Some(rank) = ACTIONS.iter().position(|known| *known == action) else { continue };
        let bad = |why: &str| TraceError::Line { line, why: format!("{why}: {}", text.trim()) };
        let range = sector.parse::<u64>().ok().zip(sectors.parse::<u64>().ok());
        let bytes = |(first, count): (u64, u64)| first.checked_mul(SECTOR_BYTES).zip(count.checked_mul(SECTOR_BYTES));
        let (offset, length) = range.and_then(bytes).ok_or_else(|| bad("sector or length is no number"))?;
        let at_us = micros(time).ok_or_else(|| bad("the time is no number of seconds"))?;
        if rank < taken {
            continue;
        }
        if rank > taken {
            builder.restart();
            taken = rank;
        }
        if kind.starts_with('D') {
            builder.trace.discards += 1;
        } else if kind.contains('W') {
            builder.write(at_us, device, offset, length)?;
        }
    }
    Ok(())
}

/// `12.000345678` in microseconds.
fn micros(seconds: &str) -> Option<u64> {
    let (whole, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
    whole.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(digits.parse().ok()?)
}
