//! What people and machines are shown: tables, progress bars, JSON.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
pub(crate) use understudy_common::units::time_text as time;

/// One line of an error, however many the cause had.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Prints one JSON value on a line of its own.
pub(crate) fn print_json(value: &Value) -> Result<()> {
    print_line(&value.to_string())
}

/// Prints a line; a reader that went away ends the command as a failure instead of a panic.
pub(crate) fn print_line(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// A plain table: columns apart by spaces, so that it can be piped.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt()
}

/// A bar with rate and remaining time on a terminal, nothing elsewhere.
pub(crate) fn progress(total: u64, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} ETA {eta} {msg}");
    ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A size to read: three digits and a binary unit.
#[allow(clippy::cast_precision_loss, reason = "shown with three digits")]
pub(crate) fn size(bytes: u64) -> String {
    rate(bytes as f64)
}

/// As [`size`], for a measured amount.
pub(crate) fn rate(bytes: f64) -> String {
    let (mut value, mut unit) = (bytes, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" || value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// `bytes` in `time` as bytes per second.
#[allow(clippy::cast_precision_loss, reason = "a measurement")]
pub(crate) fn per_second(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(1e-9)
}

/// How long ago a time of the services was.
pub(crate) fn ago(unix_ms: i64) -> Duration {
    let then = UNIX_EPOCH + Duration::from_millis(u64::try_from(unix_ms).unwrap_or(0));
    SystemTime::now().duration_since(then).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_date() {
        assert_eq!(time(0), "");
        assert_eq!(time(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(time(1_763_914_732_123), "2025-11-23T16:18:52.123Z");
        assert_eq!(time(4_102_444_799_999), "2099-12-31T23:59:59.999Z");
    }

    #[test]
    fn sizes_have_three_digits() {
        assert_eq!(size(17), "17 B");
        assert_eq!(size(64 << 20), "64.0 MiB");
        assert_eq!(size(1000 << 20), "1000 MiB");
        assert_eq!(size(3 << 39), "1.5 TiB");
    }

    #[test]
    fn errors_are_one_line() {
        assert_eq!(one_line("a\n  b\tc"), "a b c");
    }
}
