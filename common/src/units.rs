//! Sizes and times as people write them: `64MiB`, `500ms`.
//!
//! A number without a unit is bytes for a size; a time always names its unit, except `0`. Both directions are exact:
//! what [`format_bytes`] and [`format_duration`] print parses back to the same value.

use std::time::Duration;

/// Why a text is not a size or a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No number in front.
    #[error("\"{text}\" does not start with a number; write {example}")]
    NoNumber {
        /// What was given.
        text: String,
        /// What would have been right.
        example: &'static str,
    },
    /// The unit is not known.
    #[error("\"{unit}\" in \"{text}\" is no unit; use one of {known}")]
    UnknownUnit {
        /// What was given.
        text: String,
        /// The part that was not understood.
        unit: String,
        /// The units there are.
        known: &'static str,
    },
    /// More than 64 bits, or a fraction of the smallest unit.
    #[error("\"{text}\" cannot be represented; the value must be a whole number of {smallest} below 2^64")]
    OutOfRange {
        /// What was given.
        text: String,
        /// Name of the smallest unit.
        smallest: &'static str,
    },
}

/// Longest name first where one is a prefix of nothing else; matched whole, ignoring case.
const SIZES: [(&str, u64); 12] = [
    ("tib", 1 << 40),
    ("gib", 1 << 30),
    ("mib", 1 << 20),
    ("kib", 1 << 10),
    ("tb", 1_000_000_000_000),
    ("gb", 1_000_000_000),
    ("mb", 1_000_000),
    ("kb", 1_000),
    ("t", 1 << 40),
    ("g", 1 << 30),
    ("m", 1 << 20),
    ("k", 1 << 10),
];

const TIMES: [(&str, u64); 9] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("min", 60_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("µs", 1_000),
    ("ns", 1),
];

/// Bytes of a size such as `4096`, `64KiB`, `1.5GiB` or `2MB` (decimal). `K`, `M`, `G`, `T` alone are binary.
///
/// # Errors
/// The text has no number in front, an unknown unit, or a value that is not a whole number of bytes below 2^64.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text, "64MiB")?;
    let scale = match unit {
        "" => 1,
        _ if unit.eq_ignore_ascii_case("b") => 1,
        _ => SIZES.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name)).map(|(_, s)| *s).ok_or_else(|| {
            UnitError::UnknownUnit {
                text: text.to_owned(),
                unit: unit.to_owned(),
                known: "B, KiB, MiB, GiB, TiB, kB, MB, GB, TB",
            }
        })?,
    };
    scaled(number, scale).ok_or_else(|| UnitError::OutOfRange { text: text.to_owned(), smallest: "bytes" })
}

/// The shortest exact form with a binary unit: `64MiB`, `4097B`.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    for (name, scale) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= scale && bytes.is_multiple_of(scale) {
            return format!("{}{name}", bytes / scale);
        }
    }
    format!("{bytes}B")
}

/// For people: three digits and a binary unit, as `1.5 GiB`. Not exact; see [`format_bytes`].
#[must_use]
pub fn short_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 6] =
        [("EiB", 1 << 60), ("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let Some((name, scale)) = UNITS.into_iter().find(|(_, scale)| bytes >= *scale) else {
        return format!("{bytes} B");
    };
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    if tenths >= 1000 { format!("{} {name}", tenths / 10) } else { format!("{}.{} {name}", tenths / 10, tenths % 10) }
}

/// A time such as `500ms`, `1.5s`, `30min`, `2h` or `1d`.
///
/// # Errors
/// The text has no number in front, no unit or an unknown one, or a value beyond 2^64 nanoseconds (584 years).
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text, "500ms")?;
    let scale = if unit.is_empty() && number.bytes().all(|b| b == b'0') {
        1
    } else {
        TIMES.iter().find(|(name, _)| unit == *name).map(|(_, s)| *s).ok_or_else(|| UnitError::UnknownUnit {
            text: text.to_owned(),
            unit: unit.to_owned(),
            known: "ns, us, ms, s, min, h, d",
        })?
    };
    scaled(number, scale)
        .map(Duration::from_nanos)
        .ok_or_else(|| UnitError::OutOfRange { text: text.to_owned(), smallest: "nanoseconds" })
}

/// The shortest exact form: `500ms`, `30s`, `2h`.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    for (name, scale) in TIMES.iter().filter(|(name, _)| !matches!(*name, "m" | "µs" | "ns")) {
        let scale = u128::from(*scale);
        if nanos >= scale && nanos.is_multiple_of(scale) {
            return format!("{}{name}", nanos / scale);
        }
    }
    if nanos == 0 { "0s".to_owned() } else { format!("{nanos}ns") }
}

fn split<'a>(text: &'a str, example: &'static str) -> Result<(&'a str, &'a str), UnitError> {
    let trimmed = text.trim();
    let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(UnitError::NoNumber { text: text.to_owned(), example });
    }
    Ok((number, unit.trim_start()))
}

/// `number * scale` if that is whole and fits. Integer arithmetic only: sizes are exact.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let mut value = u128::from(whole) * u128::from(scale);
    if !fraction.is_empty() {
        let digits = u32::try_from(fraction.len()).ok().filter(|d| *d <= 18)?;
        let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale);
        let divisor = 10_u128.pow(digits);
        if !part.is_multiple_of(divisor) {
            return None;
        }
        value += part / divisor;
    }
    u64::try_from(value).ok()
}

/// Year, month and day of a count of days since 1970 (Hinnant, "chrono-compatible low-level date algorithms").
#[must_use]
pub fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let of_era = z % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// A time in RFC 3339, with milliseconds; empty where it is not known.
#[must_use]
pub fn time_text(unix_ms: i64) -> String {
    let Ok(ms @ 1..) = u64::try_from(unix_ms) else { return String::new() };
    let (seconds, millis) = (ms / 1000, ms % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4097B", 4097),
            ("4KiB", 4096),
            (" 64 MiB ", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2MB", 2_000_000),
            ("1k", 1024),
            ("1TiB", 1 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn people_get_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (99 << 20, "99.0 MiB"),
            (1000 << 20, "1000 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(short_bytes(bytes), text);
        }
    }

    #[test]
    fn bad_sizes_are_refused_with_the_reason() {
        assert!(matches!(parse_bytes("MiB"), Err(UnitError::NoNumber { .. })));
        assert!(matches!(parse_bytes("-1"), Err(UnitError::NoNumber { .. })));
        assert!(matches!(parse_bytes("4 parsecs"), Err(UnitError::UnknownUnit { .. })));
        assert!(matches!(parse_bytes("0.3B"), Err(UnitError::OutOfRange { .. })));
        assert!(matches!(parse_bytes("1.2.3MiB"), Err(UnitError::OutOfRange { .. })));
        assert!(matches!(parse_bytes("99999999TiB"), Err(UnitError::OutOfRange { .. })));
    }

    #[test]
    fn times_parse_as_written() {
        for (text, nanos) in [
            ("0", 0),
            ("500ms", 500_000_000),
            ("1.5s", 1_500_000_000),
            ("2m", 120_000_000_000),
            ("30min", 1_800_000_000_000),
            ("1h", 3_600_000_000_000),
            ("10us", 10_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        assert!(matches!(parse_duration("5"), Err(UnitError::UnknownUnit { .. })));
        assert!(matches!(parse_duration("soon"), Err(UnitError::NoNumber { .. })));
    }

    #[test]
    fn what_is_printed_parses_back() {
        for bytes in [0, 1, 1023, 1024, 4097, 64 << 20, 3 << 29, u64::MAX] {
            assert_eq!(parse_bytes(&format_bytes(bytes)), Ok(bytes));
        }
        for nanos in [0, 1, 999, 1_000, 500_000_000, 90_000_000_000, 86_400_000_000_000, u64::MAX] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
