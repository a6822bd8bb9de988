//! A peer's certificate, key and the authorities it trusts.

use crate::certs::Role;
use crate::error::{PeerFault, TransportError};
use crate::tls;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// File of the trusted authorities' certificates in an identity directory.
pub const CA_FILE: &str = "ca.pem";
/// File of the certificate in an identity directory.
pub const CERT_FILE: &str = "cert.pem";
/// File of the private key in an identity directory.
pub const KEY_FILE: &str = "key.pem";

/// Certificate, key and trusted authorities of a shard or worker.
///
/// More than one authority is trusted while the job's authority is replaced: first everybody trusts both, then
/// everybody gets a certificate of the new one, then nobody trusts the old one.
#[derive(Debug)]
pub struct Identity {
    authorities: Vec<CertificateDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    paths: Paths,
}

/// Where an identity lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Paths {
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// Content of the three files.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pem {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Pem {
    /// Shows no key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}

impl Paths {
    pub(crate) fn new(ca: &Path, cert: &Path, key: &Path) -> Self {
        Self {
            ca: ca.to_owned(),
            cert: cert.to_owned(),
            key: key.to_owned(),
        }
    }

    pub(crate) fn read(&self) -> Result<Pem, TransportError> {
        Ok(Pem {
            ca: read(&self.ca)?,
            cert: read(&self.cert)?,
            key: read(&self.key)?,
        })
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            authorities: self.authorities.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            paths: self.paths.clone(),
        }
    }
}

impl Identity {
    /// Loads `ca.pem`, `cert.pem` and `key.pem` of a directory made by [`crate::certs`].
    ///
    /// # Errors
    /// As [`Identity::load_files`].
    pub fn load(dir: &Path) -> Result<Self, TransportError> {
        Self::load_files(
            &dir.join(CA_FILE),
            &dir.join(CERT_FILE),
            &dir.join(KEY_FILE),
        )
    }

    /// Loads three PEM files; `ca` may hold several certificates. The key's fit is checked, and the certificate's end of
    /// validity.
    ///
    /// # Errors
    /// A file that cannot be read, holds something else, or has expired; a key of another certificate.
    /// The error names the file.
    pub fn load_files(ca: &Path, cert: &Path, key: &Path) -> Result<Self, TransportError> {
        let identity = Self::load_unchecked(ca, cert, key)?;
        identity.check_validity(SystemTime::now())?;
        Ok(identity)
    }

    /// [`Identity::load_files`] without a look at the validity, which the peer judges in any case: for
    /// tests, and for machines whose clock is known to be wrong.
    ///
    /// # Errors
    /// As [`Identity::load_files`], except for an expired certificate.
    pub fn load_unchecked(ca: &Path, cert: &Path, key: &Path) -> Result<Self, TransportError> {
        let paths = Paths::new(ca, cert, key);
        let pem = paths.read()?;
        Self::parse(paths, &pem)
    }

    pub(crate) fn parse(paths: Paths, pem: &Pem) -> Result<Self, TransportError> {
        let authorities = certificates(&paths.ca, &pem.ca, "CA certificate in PEM")?;
        let chain = certificates(&paths.cert, &pem.cert, "certificate in PEM")?;
        let key = PrivateKeyDer::from_pem_slice(&pem.key)
            .map_err(|e| content(&paths.key, "private key in PEM", &e))?;
        let identity = Self {
            authorities,
            chain,
            key,
            paths,
        };
        identity.check_key()?;
        Ok(identity)
    }

    /// DER of the first authority's certificate.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.authorities[0]
    }

    /// DER of the certificates of all authorities that this identity trusts; at least one.
    #[must_use]
    pub fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// DER of the certificate and of what follows it in its file.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// End of the certificate's validity.
    ///
    /// # Errors
    /// The certificate is not X.509.
    pub fn not_after(&self) -> Result<SystemTime, TransportError> {
        let seconds = u64::try_from(self.end()?.timestamp()).unwrap_or(0);
        Ok(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    /// Judges the certificate as a peer with the same authorities would.
    ///
    /// # Errors
    /// It is expired or not yet valid, for another role, or of an authority that [`Identity::authorities`] lacks.
    pub fn check_as(&self, role: Role) -> Result<(), TransportError> {
        self.check_validity(SystemTime::now())?;
        tls::judge(self, role)?.map_err(|error| TransportError::OwnUseless {
            cert: self.paths.cert.clone(),
            ca: self.paths.ca.clone(),
            fault: PeerFault::from_rustls(&error),
            detail: error.to_string(),
        })
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    pub(crate) fn mismatch(&self, problem: &dyn Display) -> TransportError {
        TransportError::KeyMismatch {
            cert: self.paths.cert.clone(),
            key: self.paths.key.clone(),
            problem: problem.to_string(),
        }
    }

    /// An authority's certificate that TLS cannot use.
    pub(crate) fn bad_authority(&self, problem: &dyn Display) -> TransportError {
        content(&self.paths.ca, "CA certificate that can be used", problem)
    }

    fn check_key(&self) -> Result<(), TransportError> {
        let signer = rustls::crypto::ring::sign::any_supported_type(&self.key)
            .map_err(|e| content(&self.paths.key, "private key that can sign", &e))?;
        rustls::sign::CertifiedKey::new(self.chain.clone(), signer)
            .keys_match()
            .map_err(|e| self.mismatch(&e))
    }

    fn end(&self) -> Result<x509_parser::time::ASN1Time, TransportError> {
        x509_parser::parse_x509_certificate(&self.chain[0])
            .map(|(_, parsed)| parsed.validity().not_after)
            .map_err(|e| content(&self.paths.cert, "X.509 certificate", &e))
    }

    fn check_validity(&self, now: SystemTime) -> Result<(), TransportError> {
        let now = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs().cast_signed());
        let not_after = self.end()?;
        if not_after.timestamp() < now {
            return Err(TransportError::OwnExpired {
                path: self.paths.cert.clone(),
                not_after: not_after.to_string(),
            });
        }
        Ok(())
    }
}

/// At least one.
fn certificates(
    path: &Path,
    pem: &[u8],
    expected: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| content(path, expected, &e))?;
    if found.is_empty() {
        return Err(content(path, expected, &"no such section"));
    }
    Ok(found)
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TransportError> {
    std::fs::read(path).map_err(|e| TransportError::Read {
        path: path.to_owned(),
        problem: e.to_string(),
    })
}

pub(crate) fn content(
    path: &Path,
    expected: &'static str,
    problem: &dyn Display,
) -> TransportError {
    TransportError::Content {
        path: path.to_owned(),
        expected,
        problem: problem.to_string(),
    }
}
