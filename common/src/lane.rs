//! Lanes: the order in which the records of different clients travel to the backup (the patent's client priorities).
//!
//! A lane is *immediate* or *paced*: of a paced one at most so many records are sent every so often. Within a lane the
//! order is that of the LSNs. A record carries the number of its lane, so another configuration changes nothing of what
//! is journaled. Without a configuration there is one lane, number 0, and it is immediate.

use std::{fmt, time::Duration};

use crate::units::{format_duration, parse_duration};

/// Lanes of a node.
pub const LANES_MAX: usize = 8;
/// Share of the journal that a paced lane may hold if nobody says.
const PACED_SHARE_PERCENT: u8 = 50;
/// Longest name of a lane: it is a label of metrics.
const NAME_BYTES_MAX: usize = 32;

/// When records of a lane are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneClass {
    /// At once.
    Immediate,
    /// At most `items` in each period.
    Paced {
        /// From 1.
        items: u32,
        /// Length of a period; never zero.
        every: Duration,
    },
}

impl fmt::Display for LaneClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Immediate => f.write_str("immediate"),
            Self::Paced { items, every } => write!(f, "{items}/{}", format_duration(*every)),
        }
    }
}

/// One lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneConfig {
    /// For people and metrics.
    pub name: String,
    /// When its records are sent.
    pub class: LaneClass,
    /// Percent of the journal that its retained records may hold.
    pub share_percent: u8,
}

/// Whose writes go to a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ClientRule {
    /// The client id, or how it begins.
    client: String,
    is_prefix: bool,
    lane: u8,
}

/// `[lanes]`: the lanes by number, and who writes to which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lanes {
    lanes: Vec<LaneConfig>,
    clients: Vec<ClientRule>,
    default: u8,
}

impl Default for Lanes {
    fn default() -> Self {
        let only = LaneConfig { name: "default".into(), class: LaneClass::Immediate, share_percent: 100 };
        Self { lanes: vec![only], clients: Vec::new(), default: 0 }
    }
}

/// What is wrong with `[lanes]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneProblem {
    /// Its full name.
    pub setting: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to write.
    pub remedy: &'static str,
}

const CLASSES: &str = "lanes.classes";
const CLIENTS: &str = "lanes.clients";
const DEFAULT: &str = "lanes.default";
const CLASS_REMEDY: &str =
    "write NAME=immediate or NAME=N/TIME, with @PERCENT for the share: urgent=immediate,batch=100/1s@30";
const CLIENT_REMEDY: &str = "write CLIENT=LANE, or PREFIX*=LANE: db=urgent,backup-*=batch";

impl Lanes {
    /// From the texts of the settings. None at all is one immediate lane.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn parse(classes: &[String], clients: &[String], default: Option<&str>) -> Result<Self, Vec<LaneProblem>> {
        let mut problems = Vec::new();
        if classes.is_empty() {
            for (setting, set) in [(CLIENTS, !clients.is_empty()), (DEFAULT, default.is_some())] {
                if set {
                    let message = "names lanes, and lanes.classes has none".to_owned();
                    problems.push(LaneProblem { setting, message, remedy: "set lanes.classes" });
                }
            }
            return if problems.is_empty() { Ok(Self::default()) } else { Err(problems) };
        }
        let mut problem = |setting, message, remedy| problems.push(LaneProblem { setting, message, remedy });
        if !(2..=LANES_MAX).contains(&classes.len()) {
            let message = format!("names {} lanes; 2 to {LANES_MAX} are possible", classes.len());
            problem(CLASSES, message, "name 2 to 8 lanes, or none");
        }
        let mut lanes: Vec<LaneConfig> = Vec::new();
        for text in classes.iter().take(LANES_MAX) {
            match parse_class(text) {
                Ok(lane) if lanes.iter().any(|l| l.name == lane.name) => {
                    problem(CLASSES, format!("names lane {} twice", lane.name), "name it once");
                }
                Ok(lane) => lanes.push(lane),
                Err(why) => problem(CLASSES, format!("`{text}`: {why}"), CLASS_REMEDY),
            }
        }
        let number = |name: &str| lanes.iter().position(|l| l.name == name).and_then(|at| u8::try_from(at).ok());
        let mut rules: Vec<ClientRule> = Vec::new();
        for text in clients {
            let Some((client, name)) = text.rsplit_once('=').filter(|(client, _)| !client.is_empty()) else {
                problem(CLIENTS, format!("`{text}` names no client and lane"), CLIENT_REMEDY);
                continue;
            };
            let Some(lane) = number(name) else {
                problem(CLIENTS, format!("`{text}`: there is no lane {name}"), "name a lane of lanes.classes");
                continue;
            };
            let (client, is_prefix) = client.strip_suffix('*').map_or((client, false), |prefix| (prefix, true));
            if rules.iter().any(|r| (r.client.as_str(), r.is_prefix) == (client, is_prefix)) {
                problem(CLIENTS, format!("names {client} twice"), "name it once");
                continue;
            }
            rules.push(ClientRule { client: client.to_owned(), is_prefix, lane });
        }
        let default = default.map_or(Some(0), number);
        if default.is_none() {
            problem(DEFAULT, "there is no such lane".into(), "name a lane of lanes.classes");
        }
        // The most exact rule that fits is the one that counts.
        rules.sort_by_key(|rule| (rule.is_prefix, std::cmp::Reverse(rule.client.len())));
        match default {
            Some(default) if problems.is_empty() => Ok(Self { lanes, clients: rules, default }),
            _ => Err(problems),
        }
    }

    /// The lane of a client's writes.
    #[must_use]
    pub fn of_client(&self, client: Option<&str>) -> u8 {
        let fits = |rule: &&ClientRule| {
            client.is_some_and(|c| if rule.is_prefix { c.starts_with(&rule.client) } else { c == rule.client })
        };
        self.clients.iter().find(fits).map_or(self.default, |rule| rule.lane)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// A lane by its number; `None` for one of an earlier configuration, which is immediate and bounded by the journal.
    #[must_use]
    pub fn get(&self, lane: u8) -> Option<&LaneConfig> {
        self.lanes.get(usize::from(lane))
    }

    /// When records of a lane are sent.
    #[must_use]
    pub fn class(&self, lane: u8) -> LaneClass {
        self.get(lane).map_or(LaneClass::Immediate, |l| l.class)
    }

    /// True for a lane whose records wait for their turn.
    #[must_use]
    pub fn is_paced(&self, lane: u8) -> bool {
        self.class(lane) != LaneClass::Immediate
    }

    /// Percent of the journal that the lane's retained records may hold.
    #[must_use]
    pub fn share_percent(&self, lane: u8) -> u8 {
        self.get(lane).map_or(100, |l| l.share_percent)
    }

    /// Its share of so many bytes.
    #[must_use]
    pub fn share_bytes(&self, lane: u8, capacity_bytes: u64) -> u64 {
        capacity_bytes / 100 * u64::from(self.share_percent(lane))
    }

    /// The name of a lane; that of one of an earlier configuration is its number.
    #[must_use]
    pub fn name(&self, lane: u8) -> String {
        self.get(lane).map_or_else(|| lane.to_string(), |l| l.name.clone())
    }
}

fn parse_class(text: &str) -> Result<LaneConfig, String> {
    let (name, class) = text.split_once('=').ok_or("there is no `=`")?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.chars().all(good) {
        return Err(format!("a name has 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`"));
    }
    let (class, share) = match class.split_once('@') {
        Some((class, share)) => {
            let percent = share.trim_end_matches('%').parse().ok().filter(|p| (1..=100).contains(p));
            (class, Some(percent.ok_or_else(|| format!("the share {share} is not 1 to 100 percent"))?))
        }
        None => (class, None),
    };
    let (class, usual) = match class.split_once('/') {
        None if class == "immediate" => (LaneClass::Immediate, 100),
        None => return Err(format!("the class {class} is neither immediate nor N/TIME")),
        Some((items, every)) => {
            let items = items.parse().ok().filter(|n| *n > 0).ok_or("N is not a number from 1 on")?;
            let every = parse_duration(every).map_err(|e| e.to_string())?;
            if every.is_zero() {
                return Err("the period is 0".into());
            }
            (LaneClass::Paced { items, every }, PACED_SHARE_PERCENT)
        }
    };
    Ok(LaneConfig { name: name.to_owned(), class, share_percent: share.unwrap_or(usual) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&t| t.to_owned()).collect()
    }

    #[test]
    fn the_most_exact_rule_names_the_lane() {
        let classes = texts(&["urgent=immediate", "batch=100/1s@30%", "slow=1/1min"]);
        let clients = texts(&["job-*=batch", "job-7-*=slow", "job-7-x=urgent"]);
        let lanes = Lanes::parse(&classes, &clients, Some("slow")).unwrap();
        let of = |client| lanes.of_client(Some(client));
        assert_eq!([of("job-1"), of("job-7-a"), of("job-7-x"), of("other")], [1, 2, 0, 2]);
        assert_eq!(lanes.of_client(None), 2);
        assert_eq!(lanes.class(1), LaneClass::Paced { items: 100, every: Duration::from_secs(1) });
        assert_eq!([0, 1, 2, 7].map(|l| lanes.share_percent(l)), [100, 30, 50, 100]);
        assert_eq!((lanes.is_paced(0), lanes.is_paced(1), lanes.is_paced(7)), (false, true, false));
        assert_eq!((lanes.name(1).as_str(), lanes.name(7).as_str()), ("batch", "7"));
        assert_eq!(lanes.class(1).to_string(), "100/1s");
    }

    #[test]
    fn every_mistake_is_named() {
        for (classes, clients, default, setting) in [
            (&["a=immediate"][..], &[][..], None, CLASSES),
            (&["a=immediate", "a=1/1s"], &[], None, CLASSES),
            (&["a=immediate", "b=0/1s"], &[], None, CLASSES),
            (&["a=immediate", "b=1/0s"], &[], None, CLASSES),
            (&["a=immediate", "b=fast"], &[], None, CLASSES),
            (&["a=immediate", "b=1/1s@0"], &[], None, CLASSES),
            (&["a=immediate", "b c=1/1s"], &[], None, CLASSES),
            (&["a=immediate"; 9], &[], None, CLASSES),
            (&["a=immediate", "b=1/1s"], &["x=c"], None, CLIENTS),
            (&["a=immediate", "b=1/1s"], &["x"], None, CLIENTS),
            (&["a=immediate", "b=1/1s"], &["x=a", "x=b"], None, CLIENTS),
            (&["a=immediate", "b=1/1s"], &[], Some("c"), DEFAULT),
            (&[], &["x=a"], None, CLIENTS),
            (&[], &[], Some("a"), DEFAULT),
        ] {
            let problems = Lanes::parse(&texts(classes), &texts(clients), default).unwrap_err();
            assert!(problems.iter().any(|p| p.setting == setting), "{classes:?} {clients:?}: {problems:?}");
        }
        assert_eq!(Lanes::parse(&[], &[], None), Ok(Lanes::default()));
    }
}
