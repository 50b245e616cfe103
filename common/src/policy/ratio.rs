//! A ratio in millionths: exact, equal on every machine, and what a person wrote.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Millionths in one.
const ONE: u64 = 1_000_000;

/// A ratio of two amounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ratio(u64);

impl Ratio {
    /// 1.
    pub const ONE: Self = Self(ONE);

    /// So many millionths.
    #[must_use]
    pub const fn from_millionths(millionths: u64) -> Self {
        Self(millionths)
    }

    /// In millionths.
    #[must_use]
    pub const fn millionths(self) -> u64 {
        self.0
    }

    /// `part / whole`, rounded down to a millionth; `None` where `whole` is 0.
    #[must_use]
    pub fn of(part: u64, whole: u64) -> Option<Self> {
        let millionths = (u128::from(part) * u128::from(ONE)).checked_div(u128::from(whole))?;
        Some(Self(u64::try_from(millionths).unwrap_or(u64::MAX)))
    }

    /// The nearest to a number somebody wrote; negative numbers become 0.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates at 0 and the top")]
    pub fn from_f64(number: f64) -> Self {
        Self((number * 1e6).round() as u64)
    }

    /// The nearest number.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "shown, or written into a file with six decimals")]
    pub fn to_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// True if `part / whole` is above this ratio, without rounding. 0/0 is no ratio, so above nothing.
    #[must_use]
    pub fn is_exceeded_by(self, part: u64, whole: u64) -> bool {
        u128::from(part) * u128::from(ONE) > u128::from(whole) * u128::from(self.0)
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, fraction) = (self.0 / ONE, self.0 % ONE);
        if fraction == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{fraction:06}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patents_example_is_three_exactly() {
        let ratio = Ratio::of(9000, 3000).unwrap();
        assert_eq!((ratio.millionths(), ratio.to_string().as_str()), (3_000_000, "3"));
        assert!(!ratio.is_exceeded_by(9000, 3000));
        assert!(ratio.is_exceeded_by(9001, 3000));
        assert!(Ratio::from_millionths(2_999_999).is_exceeded_by(9000, 3000));
    }

    #[test]
    fn nothing_over_nothing_is_no_ratio() {
        assert_eq!(Ratio::of(0, 0), None);
        assert!(!Ratio::default().is_exceeded_by(0, 0));
    }

    #[test]
    fn what_is_shown_is_what_was_written() {
        for text in ["0.9", "3", "1.5", "0.000001", "1000", "0.85"] {
            let ratio = Ratio::from_f64(text.parse().unwrap());
            assert_eq!(ratio.to_string(), text);
            assert_eq!(Ratio::from_f64(ratio.to_f64()), ratio);
        }
        assert_eq!(Ratio::from_f64(-1.0), Ratio::default());
        assert_eq!(Ratio::of(u64::MAX, 1), Some(Ratio::from_millionths(u64::MAX)));
    }
}
