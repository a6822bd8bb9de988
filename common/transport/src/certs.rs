//! Makes a job's CA and the certificates of its shards and workers.
//!
//! ```text
//! DIR/ca.pem            certificate of the CA
//! DIR/ca-key.pem        its key: keep it away from shards and workers
//! DIR/shard/{ca,cert,key}.pem    for every shard (serverAuth)
//! DIR/worker/{ca,cert,key}.pem   for every worker (clientAuth)
//! ```
//!
//! One certificate per role suffices: ranks are given by shard 0, not by certificates.
//!
//! Certificates end, authorities do not have to end with them: [`renew_job_certs`] makes new ones from the key that is
//! there. Processes that run take the new files as they find them ([`crate::source`]).

use crate::error::TransportError;
use crate::identity::{CA_FILE, CERT_FILE, KEY_FILE, content, read};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

/// File of the CA's key.
pub const CA_KEY_FILE: &str = "ca-key.pem";
/// Directory of the shards' identity.
pub const SHARD_DIR: &str = "shard";
/// Directory of the workers' identity.
pub const WORKER_DIR: &str = "worker";
/// Names that every shard certificate holds besides the given ones.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// What to make.
#[derive(Clone, PartialEq, Debug)]
pub struct CertRequest {
    /// Job name; part of the CA's name.
    pub job: String,
    /// DNS names and IP addresses under which workers dial the shards; localhost is always among them.
    pub shard_hosts: Vec<String>,
    /// Start of the validity.
    pub not_before: OffsetDateTime,
    /// End of the validity.
    pub not_after: OffsetDateTime,
    /// Replace files that exist.
    pub force: bool,
}

impl CertRequest {
    /// A request valid from an hour ago (clocks differ) for `days` days.
    #[must_use]
    pub fn new(job: &str, shard_hosts: &[String], days: u32) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            job: job.to_owned(),
            shard_hosts: shard_hosts.to_vec(),
            not_before: now - Duration::hours(1),
            not_after: now + Duration::days(i64::from(days)),
            force: false,
        }
    }
}

/// Where the files lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobCerts {
    /// Certificate of the CA.
    pub ca: PathBuf,
    /// Identity directory for shards.
    pub shard: PathBuf,
    /// Identity directory for workers.
    pub worker: PathBuf,
}

/// Who holds a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A shard: serverAuth, with names.
    Shard,
    /// A worker: clientAuth.
    Worker,
}

impl Role {
    /// Directory of its identity.
    #[must_use]
    pub fn dir(self) -> &'static str {
        match self {
            Self::Shard => SHARD_DIR,
            Self::Worker => WORKER_DIR,
        }
    }
}

/// Makes CA and identities below `dir`. Keys are readable by their owner alone.
///
/// # Errors
/// A file exists and `force` is off (nothing is written then), a host name is malformed, or a file cannot
/// be written.
pub fn make_job_certs(dir: &Path, request: &CertRequest) -> Result<JobCerts, TransportError> {
    let authority = Authority::new(request)?;
    let places = places(dir);
    let mut files = vec![
        File::public(places.ca.clone(), authority.pem.clone()),
        File::secret(
            dir.join(CA_KEY_FILE),
            authority.issuer.key().serialize_pem(),
        ),
    ];
    files.extend(authority.identity(&places.shard, Role::Shard, request)?);
    files.extend(authority.identity(&places.worker, Role::Worker, request)?);
    write_all(&files, request.force)?;
    Ok(places)
}

/// Makes new identities below `dir` from the authority that is there; says until when they are valid.
///
/// The authority and its key stay as they are. Every certificate in `ca.pem` goes into the identities, so that one that is
/// about to be replaced is trusted as long as it is kept there. The hosts of the shards' old certificate are kept beside
/// those of the request. No certificate outlives its authority. `force` has no say: identities are there to be replaced.
///
/// # Errors
/// The authority or its key is not there, does not fit, or has ended; a host name is malformed; a file cannot be written.
pub fn renew_job_certs(
    dir: &Path,
    request: &CertRequest,
) -> Result<(JobCerts, OffsetDateTime), TransportError> {
    let places = places(dir);
    let (authority, end) = Authority::load(dir)?;
    let mut request = request.clone();
    request.not_after = request.not_after.min(end);
    if request.not_after <= OffsetDateTime::now_utc() {
        return Err(TransportError::Authority {
            path: places.ca,
            problem: format!("its validity ended on {end}"),
        });
    }
    request.shard_hosts.extend(hosts_of(&places.shard));
    let mut files = Vec::from(authority.identity(&places.shard, Role::Shard, &request)?);
    files.extend(authority.identity(&places.worker, Role::Worker, &request)?);
    write_all(&files, true)?;
    Ok((places, request.not_after))
}

fn places(dir: &Path) -> JobCerts {
    JobCerts {
        ca: dir.join(CA_FILE),
        shard: dir.join(SHARD_DIR),
        worker: dir.join(WORKER_DIR),
    }
}

/// Hosts that the certificate in `dir` names; none if there is no certificate.
fn hosts_of(dir: &Path) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let Ok(der) = CertificateDer::from_pem_file(dir.join(CERT_FILE)) else {
        return Vec::new();
    };
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(&der) else {
        return Vec::new();
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else {
        return Vec::new();
    };
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let v6 = <[u8; 16]>::try_from(*bytes).map(IpAddr::from);
            v4.or(v6).ok().map(|address| address.to_string())
        }
        _ => None,
    };
    names.value.general_names.iter().filter_map(host).collect()
}

/// A job's CA, which can issue further identities as long as it is in memory.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// What the identities trust: its certificate, and whatever stands beside it in its file.
    pem: String,
}

impl Authority {
    /// A fresh CA with the request's name and validity.
    ///
    /// # Errors
    /// If the system has no randomness to make a key of.
    pub fn new(request: &CertRequest) -> Result<Self, TransportError> {
        let failed = |e: rcgen::Error| generate("the CA", &e);
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
        // The key's digest in the name: certificates of another CA are then told apart by issuer, which
        // TLS reports as an unknown authority instead of a damaged signature.
        let digest = params.key_identifier(&key);
        let digest: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        let name = format!("arc-topk CA {} {digest}", request.job);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = request.not_before;
        params.not_after = request.not_after;
        let pem = params.self_signed(&key).map_err(failed)?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, pem })
    }

    /// The CA whose `ca.pem` and `ca-key.pem` are in `dir`, and the end of its validity. If `ca.pem` holds several
    /// certificates, that of the key is taken.
    ///
    /// # Errors
    /// A file that cannot be read or holds something else; a key of none of the certificates.
    pub fn load(dir: &Path) -> Result<(Self, OffsetDateTime), TransportError> {
        let (path, key_path) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
        let text =
            |path: &Path, what| String::from_utf8(read(path)?).map_err(|e| content(path, what, &e));
        let pem = text(&path, "CA certificate in PEM")?;
        let key = KeyPair::from_pem(&text(&key_path, "private key in PEM")?)
            .map_err(|e| content(&key_path, "private key in PEM", &e))?;
        let bad =
            |problem: &dyn std::fmt::Display| content(&path, "CA certificate in PEM", problem);
        for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let der = der.map_err(|e| bad(&e))?;
            let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|e| bad(&e))?;
            if parsed.public_key().subject_public_key.data != key.der_bytes() {
                continue;
            }
            let end = parsed.validity().not_after.to_datetime();
            let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| bad(&e))?;
            return Ok((Self { issuer, pem }, end));
        }
        Err(TransportError::KeyMismatch {
            cert: path,
            key: key_path,
            problem: "no certificate there has its public key".to_owned(),
        })
    }

    /// Writes `ca.pem`, `cert.pem` and `key.pem` of one more peer into `dir`, with the request's hosts (for
    /// shards) and validity.
    ///
    /// # Errors
    /// As [`make_job_certs`].
    pub fn issue(
        &self,
        dir: &Path,
        role: Role,
        request: &CertRequest,
    ) -> Result<(), TransportError> {
        write_all(&self.identity(dir, role, request)?, request.force)
    }

    fn identity(
        &self,
        dir: &Path,
        role: Role,
        request: &CertRequest,
    ) -> Result<[File; 3], TransportError> {
        let (cert, key) = make_leaf(request, &self.issuer, role)?;
        Ok([
            File::public(dir.join(CA_FILE), self.pem.clone()),
            File::public(dir.join(CERT_FILE), cert.pem()),
            File::secret(dir.join(KEY_FILE), key.serialize_pem()),
        ])
    }
}

fn make_leaf(
    request: &CertRequest,
    ca: &Issuer<'static, KeyPair>,
    role: Role,
) -> Result<(Certificate, KeyPair), TransportError> {
    let subject = format!("arc-topk {} {}", role.dir(), request.job);
    let failed = |e: rcgen::Error| generate(&subject, &e);
    let (names, usage) = match role {
        Role::Shard => (
            shard_names(&request.shard_hosts),
            ExtendedKeyUsagePurpose::ServerAuth,
        ),
        Role::Worker => (Vec::new(), ExtendedKeyUsagePurpose::ClientAuth),
    };
    if let Some(bad) = names.iter().find(|name| !is_host(name)) {
        return Err(generate(&subject, &format!("{bad:?} is not a host")));
    }
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new(names).map_err(failed)?;
    let name = &mut params.distinguished_name;
    name.push(DnType::CommonName, subject.clone());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params.not_before = request.not_before;
    params.not_after = request.not_after;
    let cert = params.signed_by(&key, ca).map_err(failed)?;
    Ok((cert, key))
}

fn shard_names(hosts: &[String]) -> Vec<String> {
    let local = LOCAL_NAMES.map(str::to_owned);
    let mut names: Vec<String> = Vec::with_capacity(hosts.len() + local.len());
    for name in hosts.iter().cloned().chain(local) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn is_host(name: &str) -> bool {
    rustls_pki_types::ServerName::try_from(name).is_ok()
}

fn generate(subject: &str, problem: &dyn std::fmt::Display) -> TransportError {
    TransportError::Generate {
        subject: subject.to_owned(),
        problem: problem.to_string(),
    }
}

/// A file to write.
struct File {
    path: PathBuf,
    text: String,
    secret: bool,
}

impl File {
    fn public(path: PathBuf, text: String) -> Self {
        Self {
            path,
            text,
            secret: false,
        }
    }

    fn secret(path: PathBuf, text: String) -> Self {
        Self {
            path,
            text,
            secret: true,
        }
    }
}

/// All or, if one exists and may not be replaced, none.
fn write_all(files: &[File], force: bool) -> Result<(), TransportError> {
    if !force && let Some(file) = files.iter().find(|file| file.path.exists()) {
        return Err(TransportError::Exists {
            path: file.path.clone(),
        });
    }
    files.iter().try_for_each(|file| {
        write(file).map_err(|e| TransportError::Write {
            path: file.path.clone(),
            problem: e.to_string(),
        })
    })
}

/// By a file beside it that takes its name, so that a process that reads meanwhile sees the old content or the new one.
fn write(file: &File) -> io::Result<()> {
    if let Some(parent) = file.path.parent() {
        fs::create_dir_all(parent)?;
    }
    let beside = file.path.with_extension("pem.new");
    // A file made anew gets its mode before its content; one left over might be open to others.
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(if file.secret { 0o600 } else { 0o644 });
    }
    let mut made = options.open(&beside)?;
    made.write_all(file.text.as_bytes())?;
    made.sync_all()?;
    fs::rename(&beside, &file.path)
}
