//! From flags, variables and a file to one checked set of values, with every error at once.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

use super::{
    Service, VARIABLE_PREFIX,
    command::{self, CHECK, CONFIG},
    setting::{Fault, Kind, Preset, Setting, Value},
    table::settings,
};

/// Where a value came from, in the order of precedence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command line.
    Flag,
    /// A variable of the environment.
    Variable,
    /// This file.
    File(PathBuf),
    /// Nobody set it.
    Default,
}

impl Source {
    /// Where exactly `setting` was set: `FILE:key`, the flag or the variable.
    #[must_use]
    pub fn place(&self, setting: &Setting) -> String {
        match self {
            Self::Flag => format!("--{}", setting.flag()),
            Self::Variable => setting.variable(),
            Self::File(file) => format!("{}:{}", file.display(), setting.path),
            Self::Default => format!("default of {}", setting.path),
        }
    }
}

/// Something wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `FILE:key`, a flag or a variable.
    pub place: String,
    /// As it was given; `None` where nothing was.
    pub value: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} = {value}: {}; {}", self.place, self.message, self.remedy),
            None => write!(f, "{}: {}; {}", self.place, self.message, self.remedy),
        }
    }
}

/// The values in force, each with its source. Settings that are off are absent.
#[derive(Debug, Clone)]
pub struct Effective {
    /// The table that was used.
    pub settings: Vec<Setting>,
    values: BTreeMap<&'static str, (Value, Source)>,
}

impl Effective {
    /// The value of `path` and its source.
    #[must_use]
    pub fn value(&self, path: &str) -> Option<&(Value, Source)> {
        self.values.get(path)
    }

    /// Where `path` was set.
    #[must_use]
    pub fn place(&self, path: &str) -> String {
        let setting = self.settings.iter().find(|setting| setting.path == path).expect("asked for rows of the table");
        self.value(path).map_or(&Source::Default, |(_, source)| source).place(setting)
    }
}

/// What the command line, the environment and the file say.
#[derive(Debug)]
pub struct Loaded {
    /// `--check-config` was given.
    pub check: bool,
    /// What holds; where a setting has an error, its default.
    pub effective: Effective,
    /// Empty for a good configuration.
    pub problems: Vec<Problem>,
    /// Worth a line in the log.
    pub warnings: Vec<Problem>,
}

/// Reads everything. Fails only where the command line itself cannot be read (or asks for help).
pub fn load(
    service: Service,
    arguments: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, clap::Error> {
    let table = settings(service);
    let matches = command::command(service).try_get_matches_from(arguments)?;
    let variables: BTreeMap<String, String> = variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
        .filter(|(name, _)| name.starts_with(VARIABLE_PREFIX))
        .collect();
    let mut loaded = Loaded {
        check: matches.get_flag(CHECK),
        effective: Effective { settings: table.clone(), values: BTreeMap::new() },
        problems: Vec::new(),
        warnings: Vec::new(),
    };

    let config_variable = format!("{VARIABLE_PREFIX}CONFIG");
    let file = matches.get_one::<String>(CONFIG).or_else(|| variables.get(&config_variable)).map(PathBuf::from);
    let mut keys = file.as_deref().map(|file| loaded.read_file(file)).unwrap_or_default();

    for setting in &table {
        // Every source is checked, also one that another overrides: it would break the day the other goes away.
        let in_file = keys.remove(setting.path).and_then(|raw| {
            let source = Source::File(file.clone().unwrap_or_default());
            loaded.take(setting, source, &raw.to_string(), setting.kind.parse_toml(&raw))
        });
        let in_variable = variables
            .get(&setting.variable())
            .and_then(|raw| loaded.take(setting, Source::Variable, raw, setting.kind.parse(raw)));
        let in_flag = matches.get_many::<String>(setting.path).and_then(|raw| {
            let raw = raw.map(String::as_str).collect::<Vec<_>>().join(",");
            loaded.take(setting, Source::Flag, &raw, setting.kind.parse(&raw))
        });
        if let Some(chosen) = in_flag.or(in_variable).or(in_file).or_else(|| loaded.preset(setting)) {
            loaded.effective.values.insert(setting.path, chosen);
        }
    }
    for (key, value) in keys {
        loaded.unknown_key(file.as_deref().unwrap_or(Path::new("")), &key, &value);
    }
    loaded.unknown_variables(service, &variables);
    let found = super::checks::check(service, &loaded.effective);
    loaded.problems.extend(found);
    Ok(loaded)
}

impl Loaded {
    fn take(
        &mut self,
        setting: &Setting,
        source: Source,
        raw: &str,
        parsed: Result<Value, Fault>,
    ) -> Option<(Value, Source)> {
        match parsed {
            Ok(value) => Some((value, source)),
            Err(Fault { message, remedy }) => {
                let place = source.place(setting);
                self.problems.push(Problem { place, value: Some(raw.to_owned()), message, remedy });
                None
            }
        }
    }

    fn preset(&mut self, setting: &Setting) -> Option<(Value, Source)> {
        let value = match setting.preset {
            Preset::Unset => return None,
            Preset::Is(text) => setting.kind.parse(text).expect("defaults are checked by a test"),
            Preset::InDataDir(name) => match self.effective.value("data_dir") {
                Some((Value::Path(directory), _)) => Value::Path(directory.join(name)),
                _ => return None,
            },
            Preset::Required => {
                // A value that was given and refused has its own entry.
                let (flag, variable) = (setting.flag(), setting.variable());
                let refused = |place: &str| {
                    place == format!("--{flag}") || place == variable || place.ends_with(&format!(":{}", setting.path))
                };
                if !self.problems.iter().any(|problem| refused(&problem.place)) {
                    self.problems.push(Problem {
                        place: setting.path.to_owned(),
                        value: None,
                        message: "is required and not set".into(),
                        remedy: format!("set --{flag}, {variable}, or `{}` in the file of --config", setting.path),
                    });
                }
                return None;
            }
        };
        Some((value, Source::Default))
    }

    /// All keys of the file by path; none when it cannot be read.
    fn read_file(&mut self, file: &Path) -> BTreeMap<String, toml::Value> {
        let problem = |message: String, remedy: &str| Problem {
            place: file.display().to_string(),
            value: None,
            message,
            remedy: remedy.into(),
        };
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) => {
                self.problems.push(problem(format!("cannot be read ({error})"), "check the path given with --config"));
                return BTreeMap::new();
            }
        };
        match text.parse::<toml::Table>() {
            Ok(table) => {
                let mut keys = BTreeMap::new();
                flatten("", table, &mut keys);
                keys
            }
            Err(error) => {
                let message = format!("is not TOML: {}", error.to_string().trim_end().replace('\n', "\n    "));
                self.problems.push(problem(message, "correct the file"));
                BTreeMap::new()
            }
        }
    }

    fn unknown_key(&mut self, file: &Path, key: &str, value: &toml::Value) {
        let paths = self.effective.settings.iter().map(|setting| setting.path);
        let remedy = match nearest(key, paths) {
            Some(known) => format!("did you mean `{known}`?"),
            None => "remove it, or see --help for all settings".into(),
        };
        self.problems.push(Problem {
            place: format!("{}:{key}", file.display()),
            value: Some(value.to_string().trim().replace('\n', " ")),
            message: "no such setting".into(),
            remedy,
        });
    }

    /// A variable close to a setting is a typing error. Others are only mentioned: orchestrators add variables named
    /// after services, and the operator's command has some of its own.
    fn unknown_variables(&mut self, service: Service, variables: &BTreeMap<String, String>) {
        let own: Vec<String> = self.effective.settings.iter().map(Setting::variable).collect();
        let other: Vec<String> = settings(service.other()).iter().map(Setting::variable).collect();
        for (name, value) in variables {
            let known = own.contains(name) || other.contains(name);
            if known || super::FOREIGN_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let nearest = nearest(name, own.iter().map(String::as_str)).map(str::to_owned);
            let problem = |message: &str, remedy| Problem {
                place: name.clone(),
                value: Some(value.clone()),
                message: message.into(),
                remedy,
            };
            match nearest {
                Some(known) => self.problems.push(problem("no such setting", format!("did you mean {known}?"))),
                None => self.warnings.push(problem("no such setting, ignored", "see --help for all settings".into())),
            }
        }
    }
}

fn flatten(prefix: &str, table: toml::Table, keys: &mut BTreeMap<String, toml::Value>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) if !inner.is_empty() => flatten(&path, inner, keys),
            // An empty section says nothing, whatever its name.
            toml::Value::Table(_) => {}
            value => {
                keys.insert(path, value);
            }
        }
    }
}

/// The candidate within two edits of `word`.
fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates.map(|known| (edits(word, known), known)).min().filter(|(edits, _)| *edits <= 2).map(|(_, known)| known)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// True for settings that a flag may give more than once.
pub(super) fn repeats(kind: Kind) -> bool {
    matches!(kind, Kind::List)
}
