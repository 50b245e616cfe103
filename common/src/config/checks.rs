//! Rules that bind several settings.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use super::{
    Service,
    load::{Effective, Problem},
    setting::Value,
};
use crate::{
    lane::LaneProblem,
    policy::{PolicyProblem, criteria_problem},
};

/// Every rule that `effective` breaks.
#[must_use]
pub fn check(service: Service, effective: &Effective) -> Vec<Problem> {
    let mut checks = Checks { effective, problems: Vec::new() };
    checks.listeners(service);
    checks.tls(service);
    checks.numbers();
    checks.devices();
    if service == Service::Primary {
        checks.replication();
        checks.lanes();
    }
    checks.log();
    checks.problems
}

struct Checks<'a> {
    effective: &'a Effective,
    problems: Vec<Problem>,
}

impl Checks<'_> {
    fn listeners(&mut self, service: Service) {
        if self.effective.flag("tls.allow_plaintext") {
            return;
        }
        let encrypted = self.effective.path("tls.certificate").is_some();
        let replica = (service == Service::Backup).then_some(("replica.listen", encrypted));
        // The admin port speaks plain HTTP.
        for (path, encrypted) in [("listen", encrypted), ("admin_listen", false)].into_iter().chain(replica) {
            let Some(address) = self.effective.address(path) else { continue };
            if !encrypted && !address.ip().is_loopback() {
                let tls = if path == "admin_listen" { "" } else { "set tls.certificate and tls.key, or " };
                self.report(
                    path,
                    "would be served without TLS on an address that is not loopback",
                    format!("{tls}listen on 127.0.0.1, or allow it with tls.allow_plaintext = true"),
                );
            }
        }
    }

    fn tls(&mut self, service: Service) {
        let certificate = self.effective.path("tls.certificate").is_some();
        let key = self.effective.path("tls.key").is_some();
        if certificate && !key {
            self.report("tls.certificate", "has no private key", "set tls.key");
        }
        if key && !certificate {
            self.report("tls.key", "has no certificate", "set tls.certificate");
        }
        if self.effective.path("tls.client_ca").is_some() && !certificate {
            self.report("tls.client_ca", "needs TLS", "set tls.certificate and tls.key");
        }
        // On the primary it also proves the backup's certificate, for which no own certificate is needed.
        if service == Service::Backup && self.effective.path("tls.replica_ca").is_some() && !certificate {
            self.report("tls.replica_ca", "needs TLS", "set tls.certificate and tls.key");
        }
        for path in ["tls.certificate", "tls.key", "tls.client_ca", "tls.replica_ca"] {
            if let Some(file) = self.effective.path(path)
                && let Err(error) = fs::File::open(file)
            {
                self.report(path, format!("cannot be read ({error})"), "name a readable PEM file");
            }
        }
    }

    fn numbers(&mut self) {
        let (heartbeat, timeout) = (self.effective.duration("link.heartbeat"), self.effective.duration("link.timeout"));
        if timeout < heartbeat * 2 {
            let message = "leaves no room for two heartbeats (link.heartbeat)";
            self.report("link.timeout", message, "make it at least twice link.heartbeat");
        }
        if self.effective.bytes("limits.message") > self.effective.bytes("limits.in_flight") {
            let message = "is larger than limits.in_flight: the largest message could never be admitted";
            self.report("limits.message", message, "raise limits.in_flight or lower it");
        }
        if !self.effective.bytes("pool.segment").is_power_of_two() {
            self.report("pool.segment", "is not a power of two", "write a size as 64KiB");
        }
    }

    fn replication(&mut self) {
        let policy = super::typed::policy(self.effective);
        let listed = self.effective.value("policy.criteria").map(|(value, _)| value.clone());
        let unknown = listed.and_then(|value| criteria_problem("policy.criteria", &value));
        for PolicyProblem { setting, message, remedy } in unknown.into_iter().chain(policy.validate()) {
            self.report(&setting, message, remedy);
        }
        let throttle = self.effective.text("delta.throttle").unwrap_or_default().to_owned();
        if let Err(error) = super::Throttle::parse(&throttle) {
            let remedy = "write adaptive, none, or a size as 50MiB (bytes a second)";
            self.report("delta.throttle", format!("is not understood ({error})"), remedy);
        }
    }

    fn lanes(&mut self) {
        for LaneProblem { setting, message, remedy } in super::typed::lanes(self.effective).err().unwrap_or_default() {
            self.report(setting, message, remedy);
        }
    }

    fn devices(&mut self) {
        let devices = self.effective.list("pool.devices").to_vec();
        for (index, text) in devices.iter().enumerate() {
            match super::DeviceSetting::parse(text) {
                Ok(device) => {
                    let same = |other: &String| super::DeviceSetting::parse(other).is_ok_and(|o| o.path == device.path);
                    if devices[..index].iter().any(same) {
                        self.report("pool.devices", format!("names {} twice", device.path.display()), "name it once");
                    }
                }
                Err(error) => self.report(
                    "pool.devices",
                    format!("`{text}` is not PATH or PATH=SIZE ({error})"),
                    "write as /srv/pool=64GiB",
                ),
            }
        }
    }

    fn log(&mut self) {
        let level = self.effective.text("log.level").unwrap_or_default().to_owned();
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(level) {
            let remedy = "write error, warn, info, debug, trace, or directives as h2=warn,info";
            self.report("log.level", format!("is not understood ({error})"), remedy);
        }
    }

    fn report(&mut self, path: &str, message: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem {
            place: self.effective.place(path),
            value: self.effective.value(path).map(|(value, _)| value.to_string()),
            message: message.into(),
            remedy: remedy.into(),
        });
    }
}

/// Typed access. Each panics for a row that the table does not have or has with another kind: a mistake of ours that
/// the test over both tables finds.
impl Effective {
    /// Of a setting with a default.
    #[must_use]
    pub fn bytes(&self, path: &str) -> u64 {
        match self.value(path) {
            Some((Value::Bytes(v), _)) => *v,
            other => panic!("{path} is no size: {other:?}"),
        }
    }

    /// Of a setting with a default.
    #[must_use]
    pub fn duration(&self, path: &str) -> Duration {
        match self.value(path) {
            Some((Value::Duration(v), _)) => *v,
            other => panic!("{path} is no time: {other:?}"),
        }
    }

    /// Of a setting with a default.
    #[must_use]
    pub fn integer(&self, path: &str) -> u64 {
        match self.value(path) {
            Some((Value::Integer(v), _)) => *v,
            other => panic!("{path} is no whole number: {other:?}"),
        }
    }

    /// A share, 0 to 1, of a setting with a default.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "cut to 0 to 1,000,000")]
    pub fn millionths(&self, path: &str) -> u32 {
        match self.value(path) {
            Some((Value::Float(v), _)) => (v.clamp(0.0, 1.0) * 1e6).round() as u32,
            other => panic!("{path} is no number: {other:?}"),
        }
    }

    /// Of a setting with a default.
    #[must_use]
    pub fn flag(&self, path: &str) -> bool {
        match self.value(path) {
            Some((Value::Bool(v), _)) => *v,
            other => panic!("{path} is no truth value: {other:?}"),
        }
    }

    /// `None` when it is not set.
    #[must_use]
    pub fn text(&self, path: &str) -> Option<&str> {
        match self.value(path) {
            Some((Value::Text(v), _)) => Some(v),
            None => None,
            other => panic!("{path} is no text: {other:?}"),
        }
    }

    /// `None` when it is not set.
    #[must_use]
    pub fn path(&self, path: &str) -> Option<&Path> {
        match self.value(path) {
            Some((Value::Path(v), _)) => Some(v),
            None => None,
            other => panic!("{path} is no path: {other:?}"),
        }
    }

    /// `None` when it is not set.
    #[must_use]
    pub fn address(&self, path: &str) -> Option<SocketAddr> {
        match self.value(path) {
            Some((Value::SocketAddr(v), _)) => Some(*v),
            None => None,
            other => panic!("{path} is no address: {other:?}"),
        }
    }

    /// Empty when it is not set.
    #[must_use]
    pub fn list(&self, path: &str) -> &[String] {
        match self.value(path) {
            Some((Value::List(v), _)) => v,
            None => &[],
            other => panic!("{path} is no list: {other:?}"),
        }
    }
}
