//! What the demo says: a line a step.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};
use understudy_client::proto::VolumeStatus;

use crate::convert;
use crate::output::{print_json, print_line};

/// Prints the steps, as text or as JSON.
#[derive(Debug)]
pub(super) struct Report {
    json: bool,
    start: Instant,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { json, start: Instant::now() }
    }

    /// One step, with the volume's mode and its cause where they are known.
    pub(super) fn step(&self, step: &str, volume: Option<&VolumeStatus>, text: &str, fields: Value) -> Result<()> {
        let mode = volume.map(|v| convert::mode(v.mode()));
        let cause = volume.map(|v| v.cause.as_str());
        if self.json {
            let mut line = Map::new();
            line.insert("step".to_owned(), step.into());
            line.insert("mode".to_owned(), json!(mode));
            line.insert("cause".to_owned(), json!(cause));
            line.insert("seconds".to_owned(), self.seconds().into());
            if let Value::Object(fields) = fields {
                line.extend(fields);
            }
            return print_json(&line.into());
        }
        let mode = match (mode, cause) {
            (Some(mode), Some(cause)) if !cause.is_empty() => format!(" [{mode}: {cause}]"),
            (Some(mode), _) => format!(" [{mode}]"),
            (None, _) => String::new(),
        };
        print_line(&format!("{:7.2}s  {text}{mode}", self.seconds()))
    }

    /// The last line of `--json`.
    pub(super) fn last(&self, text: &str, fields: Value) -> Result<()> {
        if self.json { print_json(&fields) } else { print_line(&format!("{:7.2}s  {text}", self.seconds())) }
    }

    pub(super) fn seconds(&self) -> f64 {
        (self.start.elapsed().as_secs_f64() * 1000.0).round() / 1000.0
    }
}
