//! What a setting is: its kind, its range, and how text or TOML becomes its value.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use crate::units::{format_bytes, format_duration, parse_bytes, parse_duration};

/// One row of the table of settings.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// `section.name`, or a bare name for settings outside of sections.
    pub path: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// What it is when nobody sets it.
    pub preset: Preset,
    /// One sentence; the unit, range and default are added from the other fields.
    pub help: &'static str,
}

impl Setting {
    /// The flag, without dashes in front: `link.timeout` is `link-timeout`.
    #[must_use]
    pub fn flag(&self) -> String {
        self.path.replace(['.', '_'], "-")
    }

    /// The variable: `link.timeout` is `UNDERSTUDY_LINK_TIMEOUT`.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("{}{}", super::VARIABLE_PREFIX, self.path.replace('.', "_").to_ascii_uppercase())
    }

    /// `link` of `link.timeout`; `None` outside of sections.
    #[must_use]
    pub fn section(&self) -> Option<&'static str> {
        self.path.split_once('.').map(|(section, _)| section)
    }

    /// `timeout` of `link.timeout`.
    #[must_use]
    pub fn key(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, key)| key)
    }
}

/// The value of a setting that nobody set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Somebody must.
    Required,
    /// The feature is off.
    Unset,
    /// This text, parsed as if it had been given.
    Is(&'static str),
    /// This name inside `data_dir`.
    InDataDir(&'static str),
}

/// What values a setting takes. Ranges are inclusive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Any text that is not empty.
    Text,
    /// A path of the file system.
    Path,
    /// A size, as `64MiB`.
    Bytes {
        /// In bytes.
        min: u64,
        /// In bytes.
        max: u64,
    },
    /// A time, as `500ms`.
    Duration {
        /// Smallest.
        min: Duration,
        /// Largest.
        max: Duration,
    },
    /// A number.
    Float {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
    },
    /// A whole number.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// `true` or `false`.
    Bool,
    /// Texts; separated by commas in a flag or variable.
    List,
    /// `address:port`; port 0 takes a free one.
    SocketAddr,
    /// `http://host:port` or `https://host:port`.
    Url,
    /// One of a few words.
    Choice(&'static [&'static str]),
}

/// A checked value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of [`Kind::Text`], [`Kind::Choice`] and [`Kind::Url`].
    Text(String),
    /// Of [`Kind::Path`].
    Path(PathBuf),
    /// Of [`Kind::Bytes`].
    Bytes(u64),
    /// Of [`Kind::Duration`].
    Duration(Duration),
    /// Of [`Kind::Float`].
    Float(f64),
    /// Of [`Kind::Integer`].
    Integer(u64),
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::List`].
    List(Vec<String>),
    /// Of [`Kind::SocketAddr`].
    SocketAddr(SocketAddr),
}

impl fmt::Display for Value {
    /// As a TOML value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |s: String| toml::Value::String(s);
        match self {
            Self::Text(v) => text(v.clone()).fmt(f),
            Self::Path(v) => text(v.display().to_string()).fmt(f),
            Self::Bytes(v) => text(format_bytes(*v)).fmt(f),
            Self::Duration(v) => text(format_duration(*v)).fmt(f),
            Self::Float(v) => toml::Value::Float(*v).fmt(f),
            Self::Integer(v) => v.fmt(f),
            Self::Bool(v) => v.fmt(f),
            Self::List(v) => toml::Value::Array(v.iter().cloned().map(toml::Value::String).collect()).fmt(f),
            Self::SocketAddr(v) => text(v.to_string()).fmt(f),
        }
    }
}

impl Value {
    /// As a flag takes it: without quotes, lists with commas.
    #[must_use]
    pub fn to_text(&self) -> String {
        match self {
            Self::Text(v) => v.clone(),
            Self::Path(v) => v.display().to_string(),
            Self::Bytes(v) => format_bytes(*v),
            Self::Duration(v) => format_duration(*v),
            Self::Float(v) => v.to_string(),
            Self::Integer(v) => v.to_string(),
            Self::Bool(v) => v.to_string(),
            Self::List(v) => v.join(","),
            Self::SocketAddr(v) => v.to_string(),
        }
    }
}

/// Why a value was refused and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl Kind {
    /// The word for a value in help texts.
    #[must_use]
    pub fn value_name(self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Path => "PATH",
            Self::Bytes { .. } => "SIZE",
            Self::Duration { .. } => "TIME",
            Self::Float { .. } | Self::Integer { .. } => "NUMBER",
            Self::Bool => "BOOL",
            Self::List => "LIST",
            Self::SocketAddr => "ADDRESS:PORT",
            Self::Url => "URL",
            Self::Choice(_) => "WORD",
        }
    }

    /// The allowed values, in words; also the remedy of a refused value.
    #[must_use]
    pub fn range(self) -> String {
        match self {
            Self::Text => "any text".into(),
            Self::Path => "a path".into(),
            Self::Bytes { min, max } => format!("a size from {} to {}", format_bytes(min), format_bytes(max)),
            Self::Duration { min, max } => {
                format!("a time from {} to {}", format_duration(min), format_duration(max))
            }
            Self::Float { min, max } => format!("a number from {min} to {max}"),
            Self::Integer { min, max } => format!("a whole number from {min} to {max}"),
            Self::Bool => "true or false".into(),
            Self::List => "texts, separated by commas (an array in TOML)".into(),
            Self::SocketAddr => "an IP address and a port, as 127.0.0.1:7400 (port 0 takes a free one)".into(),
            Self::Url => "http://host:port or https://host:port".into(),
            Self::Choice(words) => format!("one of {}", words.join(", ")),
        }
    }

    /// Parses what a flag or a variable holds.
    pub fn parse(self, text: &str) -> Result<Value, Fault> {
        let value = match self {
            _ if text.is_empty() => return Err(self.fault("is empty")),
            Self::Text => Value::Text(text.into()),
            Self::Path => Value::Path(text.into()),
            Self::Bytes { .. } => Value::Bytes(parse_bytes(text).map_err(|e| self.fault(e))?),
            Self::Duration { .. } => Value::Duration(parse_duration(text).map_err(|e| self.fault(e))?),
            Self::Float { .. } => Value::Float(text.parse().map_err(|_| self.fault("is not a number"))?),
            Self::Integer { .. } => Value::Integer(text.parse().map_err(|_| self.fault("is not a whole number"))?),
            Self::Bool => Value::Bool(text.parse().map_err(|_| self.fault("is neither true nor false"))?),
            Self::List => Value::List(text.split(',').map(|item| item.trim().to_owned()).collect()),
            Self::SocketAddr => Value::SocketAddr(text.parse().map_err(|_| self.fault("is not an address and port"))?),
            Self::Url => Value::Text(self.url(text)?),
            Self::Choice(_) => Value::Text(text.into()),
        };
        self.in_range(value)
    }

    /// Checks the type of what a file holds.
    pub fn parse_toml(self, value: &toml::Value) -> Result<Value, Fault> {
        match (self, value) {
            (Self::Bool, toml::Value::Boolean(v)) => Ok(Value::Bool(*v)),
            (Self::Bytes { .. }, toml::Value::Integer(v)) => {
                let bytes = u64::try_from(*v).map_err(|_| self.fault("is negative"))?;
                self.in_range(Value::Bytes(bytes))
            }
            (Self::Integer { .. }, toml::Value::Integer(v)) => {
                let number = u64::try_from(*v).map_err(|_| self.fault("is negative"))?;
                self.in_range(Value::Integer(number))
            }
            (Self::Float { .. }, toml::Value::Float(v)) => self.in_range(Value::Float(*v)),
            #[allow(clippy::cast_precision_loss, reason = "a number somebody wrote by hand")]
            (Self::Float { .. }, toml::Value::Integer(v)) => self.in_range(Value::Float(*v as f64)),
            (Self::Duration { .. }, toml::Value::Integer(_) | toml::Value::Float(_)) => {
                Err(self.fault("is a time without a unit"))
            }
            (Self::List, toml::Value::Array(items)) => {
                let texts: Option<Vec<_>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                self.in_range(Value::List(texts.ok_or_else(|| self.fault("holds something that is not a text"))?))
            }
            (Self::Bool | Self::Integer { .. } | Self::Float { .. } | Self::List, _) | (_, _) if !value.is_str() => {
                Err(self.fault(format!("has the wrong type, {}", value.type_str())))
            }
            (Self::Bool | Self::Integer { .. } | Self::Float { .. } | Self::List, _) => {
                Err(self.fault("has the wrong type, string"))
            }
            (_, value) => self.parse(value.as_str().unwrap_or_default()),
        }
    }

    fn in_range(self, value: Value) -> Result<Value, Fault> {
        let inside = match (self, &value) {
            (Self::Bytes { min, max }, Value::Bytes(v)) | (Self::Integer { min, max }, Value::Integer(v)) => {
                (min..=max).contains(v)
            }
            (Self::Duration { min, max }, Value::Duration(v)) => (min..=max).contains(v),
            (Self::Float { min, max }, Value::Float(v)) => (min..=max).contains(v),
            (Self::List, Value::List(items)) => items.iter().all(|item| !item.is_empty()),
            (Self::Choice(words), Value::Text(v)) => words.contains(&v.as_str()),
            _ => true,
        };
        if inside { Ok(value) } else { Err(self.fault("is not allowed")) }
    }

    fn url(self, text: &str) -> Result<String, Fault> {
        let url: http::Uri = text.parse().map_err(|_| self.fault("is not a URL"))?;
        match url.scheme_str() {
            Some("http" | "https") => {}
            _ => return Err(self.fault("starts with neither http:// nor https://")),
        }
        if !matches!(url.path_and_query().map(http::uri::PathAndQuery::as_str), None | Some("/")) {
            return Err(self.fault("has a path"));
        }
        match url.port_u16() {
            Some(port) if port > 0 => Ok(text.trim_end_matches('/').to_owned()),
            _ => Err(self.fault("names no port")),
        }
    }

    fn fault(self, message: impl ToString) -> Fault {
        Fault { message: message.to_string(), remedy: format!("write {}", self.range()) }
    }
}
