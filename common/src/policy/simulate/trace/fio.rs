//! fio's iolog, versions 2 and 3 (HOWTO, "Trace file format").

use std::io::BufRead;

use super::{Builder, TraceError};

/// `timestamp filename action [offset length]`; the timestamp is in microseconds, as fio writes it.
pub(super) fn version_3(file: impl BufRead, builder: &mut Builder) -> Result<(), TraceError> {
    for (line, text) in (2..).zip(file.lines()) {
        let text = text?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let bad = |why: &str| TraceError::Line { line, why: format!("{why}: {}", text.trim()) };
        match fields[..] {
            [] => {}
            [at, _, "add" | "open" | "close"] => {
                number(at).ok_or_else(|| bad("the time is no number"))?;
            }
            [at, name, action, offset, length] => {
                let at = number(at).ok_or_else(|| bad("the time is no number"))?;
                let range = number(offset).zip(number(length));
                let (offset, length) = range.ok_or_else(|| bad("offset or length is no number"))?;
                take(builder, action, at, name, offset, length)?.ok_or_else(|| bad("unknown action"))?;
            }
            _ => return Err(bad("is neither a file action nor an I/O action of version 3")),
        }
    }
    Ok(())
}

/// `filename action [offset length]`. Writes follow each other at `rate_bytes_per_s`; a wait is a pause behind the
/// wait before it.
pub(super) fn version_2(file: impl BufRead, rate_bytes_per_s: u64, builder: &mut Builder) -> Result<(), TraceError> {
    let (mut now_us, mut waited_us) = (0_u64, 0_u64);
    for (line, text) in (2..).zip(file.lines()) {
        let text = text?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let bad = |why: &str| TraceError::Line { line, why: format!("{why}: {}", text.trim()) };
        match fields[..] {
            [] | [_, "add" | "open" | "close"] => {}
            [_, "wait", pause, ..] => {
                let pause = number(pause).ok_or_else(|| bad("the pause is no number"))?;
                // As fio does: below that it is noise.
                if pause >= 100 {
                    waited_us = waited_us.saturating_add(pause);
                    now_us = now_us.max(waited_us);
                    waited_us = now_us;
                }
            }
            [name, action, offset, length] => {
                let range = number(offset).zip(number(length));
                let (offset, length) = range.ok_or_else(|| bad("offset or length is no number"))?;
                take(builder, action, now_us, name, offset, length)?.ok_or_else(|| bad("unknown action"))?;
                if action == "write" {
                    let takes = u128::from(length) * 1_000_000 / u128::from(rate_bytes_per_s.max(1));
                    now_us = now_us.saturating_add(u64::try_from(takes).unwrap_or(u64::MAX));
                }
            }
            _ => return Err(bad("is neither a file action nor an I/O action of version 2")),
        }
    }
    Ok(())
}

/// `None` for an action that is not known.
fn take(
    builder: &mut Builder,
    action: &str,
    at_us: u64,
    name: &str,
    offset: u64,
    length: u64,
) -> Result<Option<()>, TraceError> {
    match action {
        "write" => builder.write(at_us, name, offset, length)?,
        "trim" => builder.trace.discards += 1,
        "read" | "sync" | "datasync" | "sync_file_range" => {}
        _ => return Ok(None),
    }
    Ok(Some(()))
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}
