//! Clients made from the global options.

use anyhow::Result;
use understudy_client::{Client, ClientConfig, TlsFiles};

use crate::args::Global;

/// Where the backup is if nothing else is said.
pub(crate) const BACKUP_URL: &str = "http://127.0.0.1:7500";

impl Global {
    pub(crate) fn backup_url(&self) -> &str {
        self.backup.as_deref().unwrap_or(BACKUP_URL)
    }

    pub(crate) fn primary_client(&self) -> Result<Client> {
        self.client(&self.primary)
    }

    pub(crate) fn backup_client(&self) -> Result<Client> {
        self.client(self.backup_url())
    }

    pub(crate) fn client(&self, url: &str) -> Result<Client> {
        let mut config = ClientConfig::new(url);
        config.retry_for = self.retry_for;
        config.tls = TlsFiles {
            ca: self.tls_ca.clone(),
            cert: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            server_name: None,
        };
        Ok(Client::lazy(config)?)
    }
}
