//! A run drawn as SVG: mode bands, span, age of the recovery point and rates over time.

use std::fmt::Write as _;

use super::{Observation, Phase, Tick};
use crate::{policy::ms_text, units::short_bytes};

/// Columns of a plot; a run that is longer is folded together.
const COLUMNS: usize = 1000;

/// What is drawn: the maximum of each value within a column of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    /// Time of a column, milliseconds.
    column_ms: u64,
    columns: Vec<Column>,
    /// Of the first observation; simulations begin at 0.
    start_ms: Option<u64>,
    /// An observation log does not say how old the recovery point was.
    has_age: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Column {
    phase: Phase,
    age_ms: u64,
    span_bytes: u64,
    usage_bytes_per_s: u64,
    link_bytes_per_s: u64,
}

impl Default for Samples {
    fn default() -> Self {
        Self { column_ms: super::TICK_MS, columns: Vec::new(), start_ms: None, has_age: false }
    }
}

impl Samples {
    /// Nothing was seen yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what a tick shows.
    pub fn on_tick(&mut self, tick: &Tick<'_>) {
        self.has_age = true;
        let column = Column {
            phase: tick.phase,
            age_ms: tick.age_ms,
            span_bytes: tick.span_bytes,
            usage_bytes_per_s: tick.usage_bytes_per_s,
            link_bytes_per_s: tick.link_bytes_per_s,
        };
        self.put(tick.now_ms, column);
    }

    /// Takes an observation, of any group; the observations of a log are in the order of time.
    pub fn on_observation(&mut self, obs: &Observation) {
        let start_ms = *self.start_ms.get_or_insert(obs.now_ms);
        let column = Column {
            phase: obs.phase,
            age_ms: 0,
            span_bytes: obs.span_bytes,
            usage_bytes_per_s: obs.usage_bytes_per_s,
            link_bytes_per_s: obs.link_bytes_per_s,
        };
        self.put(obs.now_ms.saturating_sub(start_ms), column);
    }

    fn put(&mut self, at_ms: u64, new: Column) {
        let index = |column_ms| usize::try_from(at_ms / column_ms).unwrap_or(usize::MAX);
        while index(self.column_ms) >= 2 * COLUMNS {
            self.fold();
        }
        match self.columns.last().copied() {
            // Between two observations the first one holds.
            Some(last) if index(self.column_ms) >= self.columns.len() => {
                self.columns.resize(index(self.column_ms), last);
                self.columns.push(new);
            }
            Some(last) => {
                let end = self.columns.len() - 1;
                self.columns[end] = last.and(new);
            }
            None => self.columns.push(new),
        }
    }

    /// Two columns become one.
    fn fold(&mut self) {
        self.column_ms *= 2;
        let halves = self.columns.chunks(2).map(|pair| pair.iter().copied().reduce(Column::and));
        self.columns = halves.flatten().collect();
    }

    fn most(&self, value: impl Fn(&Column) -> u64) -> u64 {
        self.columns.iter().map(value).max().unwrap_or(0)
    }
}

impl Column {
    fn and(self, later: Self) -> Self {
        Self {
            phase: later.phase,
            age_ms: self.age_ms.max(later.age_ms),
            span_bytes: self.span_bytes.max(later.span_bytes),
            usage_bytes_per_s: self.usage_bytes_per_s.max(later.usage_bytes_per_s),
            link_bytes_per_s: self.link_bytes_per_s.max(later.link_bytes_per_s),
        }
    }
}

const LEFT: u64 = 90;
const WIDTH: u64 = 1000;
const PANEL: u64 = 150;
const GAP: u64 = 40;
const TOP: u64 = 60;

/// The picture.
#[must_use]
pub fn svg(title: &str, samples: &Samples, capacity_bytes: u64) -> String {
    let mut panels = vec![
        Panel {
            name: "span",
            top: samples.most(|c| c.span_bytes).max(capacity_bytes),
            text: short_bytes,
            lines: vec![("#1f5fa8", "span of the journal", |c: &Column| c.span_bytes)],
            mark: Some(capacity_bytes),
        },
        Panel {
            name: "age",
            top: samples.most(|c| c.age_ms).max(1),
            text: |ms| ms_text(ms / 100 * 100),
            lines: vec![("#a8321f", "age of the recovery point", |c: &Column| c.age_ms)],
            mark: None,
        },
        Panel {
            name: "rate",
            top: samples.most(|c| c.usage_bytes_per_s.max(c.link_bytes_per_s)).max(1),
            text: |rate| format!("{}/s", short_bytes(rate)),
            lines: vec![
                ("#777777", "written by clients", |c: &Column| c.usage_bytes_per_s),
                ("#2e8540", "on the link", |c: &Column| c.link_bytes_per_s),
            ],
            mark: None,
        },
    ];
    if !samples.has_age {
        panels.retain(|panel| panel.name != "age");
    }
    let height = TOP + u64::try_from(panels.len()).unwrap_or(0) * (PANEL + GAP) + 10;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"20\" \
         font-size=\"14\">{}</text>\n",
        LEFT + WIDTH + 20,
        escaped(title)
    );
    legend(&mut out);
    for (number, panel) in (0..).zip(&panels) {
        panel.draw(&mut out, samples, TOP + number * (PANEL + GAP));
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String) {
    for (number, phase) in (0..).zip(Phase::ALL) {
        let x = LEFT + number * 110;
        let color = color(*phase);
        put(
            out,
            format_args!("<rect x=\"{x}\" y=\"30\" width=\"12\" height=\"12\" fill=\"{color}\" stroke=\"#999\"/>"),
        );
        put(out, format_args!("<text x=\"{}\" y=\"40\">{phase}</text>", x + 17));
    }
}

struct Panel {
    name: &'static str,
    /// Value at the upper edge.
    top: u64,
    text: fn(u64) -> String,
    lines: Vec<Line>,
    mark: Option<u64>,
}

/// Colour, name, value.
type Line = (&'static str, &'static str, fn(&Column) -> u64);

impl Panel {
    fn draw(&self, out: &mut String, samples: &Samples, y: u64) {
        self.bands(out, samples, y);
        put(
            out,
            format_args!(
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#999\"/>"
            ),
        );
        for part in 0..=2 {
            let at = y + PANEL - PANEL * part / 2;
            let text = (self.text)(self.top / 2 * part);
            put(out, format_args!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{text}</text>", LEFT - 5, at + 4));
        }
        if let Some(mark) = self.mark {
            let at = y + PANEL - height(mark, self.top);
            put(
                out,
                format_args!(
                    "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>",
                    LEFT + WIDTH
                ),
            );
        }
        for (number, (color, name, value)) in (0..).zip(&self.lines) {
            let points = points(samples, |column| y + PANEL - height(value(column), self.top));
            put(out, format_args!("<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\"/>"));
            put(
                out,
                format_args!("<text x=\"{}\" y=\"{}\" fill=\"{color}\">{name}</text>", LEFT + number * 160, y - 5),
            );
        }
        let end = samples.column_ms * u64::try_from(samples.columns.len()).unwrap_or(0);
        put(
            out,
            format_args!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} over {}</text>",
                LEFT + WIDTH,
                y + PANEL + 14,
                self.name,
                ms_text(end / 1000 * 1000)
            ),
        );
    }

    /// One rectangle for each stretch of one phase.
    fn bands(&self, out: &mut String, samples: &Samples, y: u64) {
        let mut from = 0;
        for stretch in samples.columns.chunk_by(|a, b| a.phase == b.phase) {
            let to = from + u64::try_from(stretch.len()).unwrap_or(0);
            let (left, right) = (x(samples, from), x(samples, to));
            let width = right.saturating_sub(left).max(1);
            let fill = color(stretch[0].phase);
            put(
                out,
                format_args!("<rect x=\"{left}\" y=\"{y}\" width=\"{width}\" height=\"{PANEL}\" fill=\"{fill}\"/>"),
            );
            from = to;
        }
    }
}

/// The corners of a line: what continues level is left out.
fn points(samples: &Samples, y: impl Fn(&Column) -> u64) -> String {
    let mut text = String::new();
    let heights: Vec<u64> = samples.columns.iter().map(y).collect();
    for (column, height) in (0..).zip(&heights) {
        let at = |n: usize| heights.get(n);
        let level = column > 0 && at(column - 1) == Some(height) && at(column + 1) == Some(height);
        if !level {
            let _ = write!(text, "{},{height} ", x(samples, u64::try_from(column).unwrap_or(0)));
        }
    }
    text
}

fn x(samples: &Samples, column: u64) -> u64 {
    LEFT + WIDTH * column / u64::try_from(samples.columns.len()).unwrap_or(1).max(1)
}

fn height(value: u64, top: u64) -> u64 {
    u64::try_from(u128::from(PANEL) * u128::from(value) / u128::from(top.max(1))).unwrap_or(PANEL).min(PANEL)
}

fn color(phase: Phase) -> &'static str {
    match phase {
        Phase::Streaming => "#e6f4ea",
        Phase::Tracking => "#fdecd2",
        Phase::Round => "#dbe8fb",
        Phase::FinalRound => "#e8defa",
        Phase::FullRun => "#f6d9e4",
    }
}

fn put(out: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = writeln!(out, "{line}");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
