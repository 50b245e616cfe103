//! TLS of the listeners: 1.3 only, our own certificate, and where it is asked for the client's.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use thiserror::Error;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{VerifierBuilderError, WebPkiClientVerifier},
    },
};

/// Why TLS could not be set up. All are errors of the configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The file could not be read or holds no PEM of this sort.
    #[error("{path}: no {what} could be read ({source}); name a PEM file that holds one")]
    Pem {
        /// Of the setting.
        path: PathBuf,
        /// Certificate or private key.
        what: &'static str,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The file is good PEM without a certificate.
    #[error("{path}: holds no certificate; name a PEM file that holds one")]
    Empty {
        /// Of the setting.
        path: PathBuf,
    },
    /// The certificate or the pair with its key is not usable.
    #[error("{path}: is not usable ({source}); check that certificate and key belong together")]
    Certificate {
        /// Of the setting.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authorities are not usable.
    #[error("{path}: cannot be used to check clients ({source})")]
    Authority {
        /// Of the setting.
        path: PathBuf,
        /// Why.
        source: VerifierBuilderError,
    },
}

/// The two sides of a listener's identity, and when it ends.
#[derive(Clone)]
pub struct ServerTls {
    /// Ends TLS on accepted connections.
    pub acceptor: TlsAcceptor,
    /// End of the own certificate; `None` when it cannot be read from it.
    pub expiry: Option<SystemTime>,
}

/// Reads `certificate` and `key`; with `client_ca` every client must show a certificate of those authorities. `protocol`
/// is what both sides agree on (`h2`).
pub fn server(
    certificate: &Path,
    key: &Path,
    client_ca: Option<&Path>,
    protocol: &'static str,
) -> Result<ServerTls, TlsError> {
    let chain = certificates(certificate)?;
    let expiry = chain.first().and_then(|own| not_after(own));
    let private = PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Pem {
        path: key.into(),
        what: "private key",
        source,
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of TLS 1.3");
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|source| TlsError::Certificate { path: path.into(), source })?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|source| TlsError::Authority { path: path.into(), source })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(chain, private)
        .map_err(|source| TlsError::Certificate { path: certificate.into(), source })?;
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Ok(ServerTls { acceptor: TlsAcceptor::from(Arc::new(config)), expiry })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(TlsError::Empty { path: path.into() }),
        Ok(found) => Ok(found),
        Err(source) => Err(TlsError::Pem { path: path.into(), what: "certificate", source }),
    }
}

/// End of validity of an X.509 certificate (RFC 5280, 4.1): the one field of it that nothing else here exposes.
fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let (_, certificate, _) = element(certificate)?;
    let (_, body, _) = element(certificate)?;
    let (tag, _, rest) = element(body)?;
    // The version is optional.
    let rest = if tag == 0xa0 { element(rest)?.2 } else { rest };
    // Behind the serial number: algorithm, issuer, validity.
    let (_, _, rest) = element(rest)?;
    let (_, _, rest) = element(rest)?;
    let (_, validity, _) = element(rest)?;
    let (_, _, rest) = element(validity)?;
    let (tag, text, _) = element(rest)?;
    let text = std::str::from_utf8(text).ok()?;
    let (year, rest) = match tag {
        // UTCTime: two digits, 1950 to 2049.
        0x17 => {
            let year: u64 = text.get(..2)?.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, text.get(2..)?)
        }
        0x18 => (text.get(..4)?.parse().ok()?, text.get(4..)?),
        _ => return None,
    };
    let digits = |at: usize| rest.get(at..at + 2).and_then(|two| two.parse::<u64>().ok());
    let (month, day, hour, minute, second) = (digits(0)?, digits(2)?, digits(4)?, digits(6)?, digits(8)?);
    let seconds = days_since_epoch(year, month, day)? * 86_400 + hour * 3600 + minute * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// The first DER element: its tag, its contents, and what is behind it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f)).filter(|(bytes, _)| bytes.len() <= 4)?;
        (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
    };
    let (contents, behind) = rest.split_at_checked(length)?;
    Some((tag, contents, behind))
}

/// Days from 1970-01-01 to a day of the Gregorian calendar; `None` before, and for no day at all.
fn days_since_epoch(year: u64, month: u64, day: u64) -> Option<u64> {
    const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let before = *BEFORE.get(usize::try_from(month).ok()?.checked_sub(1)?)?;
    let leap = |year: u64| year / 4 - year / 100 + year / 400;
    let in_leap_year = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let leap_days = leap(year.checked_sub(1)?).checked_sub(leap(1969))?;
    let whole_years = year.checked_sub(1970)? * 365 + leap_days;
    Some(whole_years + before + u64::from(in_leap_year && month > 2) + day.checked_sub(1)?)
}

/// Turns the error into one of I/O, for callers that have no other.
impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        assert_eq!(days_since_epoch(1970, 1, 1), Some(0));
        assert_eq!(days_since_epoch(2000, 2, 29), Some(11_016));
        assert_eq!(days_since_epoch(2000, 3, 1), Some(11_017));
        assert_eq!(days_since_epoch(2026, 11, 23), Some(20_780));
        assert_eq!(days_since_epoch(2026, 13, 1), None);
        assert_eq!(days_since_epoch(1969, 12, 31), None);
    }

    #[test]
    fn the_end_of_validity_is_found_with_both_kinds_of_time() {
        let time = |tag: u8, text: &str| [&[tag, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        let sequence = |parts: &[Vec<u8>]| {
            let body = parts.concat();
            [vec![0x30, 0x81, u8::try_from(body.len()).unwrap()], body].concat()
        };
        for (end, seconds) in [(time(0x17, "261123010203Z"), 20_780), (time(0x18, "20261123010203Z"), 20_780)] {
            let validity = sequence(&[time(0x17, "200101000000Z"), end]);
            let version = vec![0xa0, 3, 2, 1, 2];
            let body = sequence(&[version, vec![2, 1, 7], sequence(&[]), sequence(&[]), validity]);
            let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds * 86_400 + 3723);
            assert_eq!(not_after(&sequence(&[body])), Some(expected));
        }
        assert_eq!(not_after(&[0x30, 0x85, 1]), None);
    }
}
