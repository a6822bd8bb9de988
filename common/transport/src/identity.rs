//! A peer's certificate, key and the CA it trusts.

use crate::error::TransportError;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// File of the CA's certificate in an identity directory.
pub const CA_FILE: &str = "ca.pem";
/// File of the certificate in an identity directory.
pub const CERT_FILE: &str = "cert.pem";
/// File of the private key in an identity directory.
pub const KEY_FILE: &str = "key.pem";

/// Certificate, key and trusted CA of a shard or worker.
#[derive(Debug)]
pub struct Identity {
    ca: CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    cert_path: PathBuf,
    key_path: PathBuf,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            ca: self.ca.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            cert_path: self.cert_path.clone(),
            key_path: self.key_path.clone(),
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

    /// Loads three PEM files. The key's fit is checked, and the certificate's end of validity.
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
        let authority = CertificateDer::from_pem_slice(&read(ca)?)
            .map_err(|e| content(ca, "CA certificate in PEM", &e))?;
        let chain = CertificateDer::pem_slice_iter(&read(cert)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| content(cert, "certificate in PEM", &e))?;
        if chain.is_empty() {
            return Err(content(cert, "certificate in PEM", &"no such section"));
        }
        let secret = PrivateKeyDer::from_pem_slice(&read(key)?)
            .map_err(|e| content(key, "private key in PEM", &e))?;
        let identity = Self {
            ca: authority,
            chain,
            key: secret,
            cert_path: cert.to_owned(),
            key_path: key.to_owned(),
        };
        identity.check_key()?;
        Ok(identity)
    }

    /// DER of the CA certificate.
    #[must_use]
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// DER of the certificate and of what follows it in its file.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    pub(crate) fn mismatch(&self, problem: &dyn std::fmt::Display) -> TransportError {
        TransportError::KeyMismatch {
            cert: self.cert_path.clone(),
            key: self.key_path.clone(),
            problem: problem.to_string(),
        }
    }

    fn check_key(&self) -> Result<(), TransportError> {
        let signer = rustls::crypto::ring::sign::any_supported_type(&self.key)
            .map_err(|e| content(&self.key_path, "private key that can sign", &e))?;
        rustls::sign::CertifiedKey::new(self.chain.clone(), signer)
            .keys_match()
            .map_err(|e| self.mismatch(&e))
    }

    fn check_validity(&self, now: SystemTime) -> Result<(), TransportError> {
        let (_, parsed) = x509_parser::parse_x509_certificate(&self.chain[0])
            .map_err(|e| content(&self.cert_path, "X.509 certificate", &e))?;
        let now = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs().cast_signed());
        let not_after = parsed.validity().not_after;
        if not_after.timestamp() < now {
            return Err(TransportError::OwnExpired {
                path: self.cert_path.clone(),
                not_after: not_after.to_string(),
            });
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TransportError> {
    std::fs::read(path).map_err(|e| TransportError::Read {
        path: path.to_owned(),
        problem: e.to_string(),
    })
}

fn content(path: &Path, expected: &'static str, problem: &dyn std::fmt::Display) -> TransportError {
    TransportError::Content {
        path: path.to_owned(),
        expected,
        problem: problem.to_string(),
    }
}
