//! Block traces: what a real client wrote, and when.
//!
//! The format is told by the first line. Reads, syncs and file management are skipped. Discards are counted and not
//! simulated: they carry no data in either mode.

mod blkparse;
mod fio;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, io::BufRead};

/// Writes that a trace may have.
pub const WRITES_MAX: usize = 20_000_000;

/// One write of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceWrite {
    /// Microseconds since the first event.
    pub at_us: u64,
    /// Which of the trace's files or devices, in the order of appearance.
    pub device: u32,
    /// First byte.
    pub offset_bytes: u64,
    /// Never 0.
    pub length_bytes: u64,
}

/// The writes of a trace, in the order of time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    /// Never empty.
    pub writes: Vec<TraceWrite>,
    /// Files or devices that were written.
    pub devices: u32,
    /// Discards that were left out.
    pub discards: u64,
}

/// Why a file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot be read")]
    Io(#[from] std::io::Error),
    /// The first line is not known.
    #[error(
        "is no trace: it starts neither with \"fio version 2 iolog\" or \"fio version 3 iolog\" nor with a line of blkparse"
    )]
    UnknownFormat,
    /// Version 2 of fio's format has no times.
    #[error("is an iolog of version 2, which has no times: give the rate of its writes, as --trace-rate 50MiB")]
    NoRate,
    /// A line cannot be understood.
    #[error("line {line}: {why}")]
    Line {
        /// From 1.
        line: u64,
        /// What is wrong.
        why: String,
    },
    /// Nothing was written.
    #[error("holds no write")]
    Empty,
    /// See [`WRITES_MAX`].
    #[error("holds more than {WRITES_MAX} writes; cut it into pieces")]
    TooLong,
}

/// Reads a trace. `rate_bytes_per_s` times the writes of a format without times; never 0.
///
/// # Errors
/// The file is no trace, or too long.
pub fn parse(mut file: impl BufRead, rate_bytes_per_s: Option<u64>) -> Result<Trace, TraceError> {
    let mut first = String::new();
    // Blank lines in front are no format.
    while first.trim().is_empty() {
        first.clear();
        if file.read_line(&mut first)? == 0 {
            return Err(TraceError::UnknownFormat);
        }
    }
    let mut builder = Builder::default();
    match first.trim() {
        "fio version 3 iolog" => fio::version_3(file, &mut builder)?,
        "fio version 2 iolog" => fio::version_2(file, rate_bytes_per_s.ok_or(TraceError::NoRate)?, &mut builder)?,
        line if blkparse::is_event(line) => {
            let lines = std::iter::once(Ok(first.clone())).chain(file.lines());
            blkparse::events(lines, &mut builder)?;
        }
        _ => return Err(TraceError::UnknownFormat),
    }
    builder.finish()
}

#[derive(Default)]
struct Builder {
    trace: Trace,
    devices: HashMap<String, u32>,
}

impl Builder {
    fn write(&mut self, at_us: u64, device: &str, offset_bytes: u64, length_bytes: u64) -> Result<(), TraceError> {
        if length_bytes == 0 {
            return Ok(());
        }
        if self.trace.writes.len() >= WRITES_MAX {
            return Err(TraceError::TooLong);
        }
        let device = match self.devices.get(device) {
            Some(device) => *device,
            None => {
                let next = self.trace.devices;
                self.trace.devices += 1;
                self.devices.insert(device.to_owned(), next);
                next
            }
        };
        self.trace.writes.push(TraceWrite { at_us, device, offset_bytes, length_bytes });
        Ok(())
    }

    /// Forgets what was taken; better events were found.
    fn restart(&mut self) {
        *self = Self::default();
    }

    fn finish(mut self) -> Result<Trace, TraceError> {
        self.trace.writes.sort_by_key(|write| write.at_us);
        let first = self.trace.writes.first().ok_or(TraceError::Empty)?.at_us;
        for write in &mut self.trace.writes {
            write.at_us -= first;
        }
        Ok(self.trace)
    }
}
