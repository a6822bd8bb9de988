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

use crate::error::TransportError;
use crate::identity::{CA_FILE, CERT_FILE, KEY_FILE};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use std::fs;
use std::io::Write;
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

/// Makes CA and identities below `dir`. Keys are readable by their owner alone.
///
/// # Errors
/// A file exists and `force` is off (nothing is written then), a host name is malformed, or a file cannot
/// be written.
pub fn make_job_certs(dir: &Path, request: &CertRequest) -> Result<JobCerts, TransportError> {
    let places = JobCerts {
        ca: dir.join(CA_FILE),
        shard: dir.join(SHARD_DIR),
        worker: dir.join(WORKER_DIR),
    };
    let ca = make_ca(request)?;
    let shard = make_leaf(request, &ca, SHARD_DIR)?;
    let worker = make_leaf(request, &ca, WORKER_DIR)?;
    let mut files = vec![
        (places.ca.clone(), ca.pem(), false),
        (dir.join(CA_KEY_FILE), ca.key().serialize_pem(), true),
    ];
    for (place, (cert, key)) in [(&places.shard, shard), (&places.worker, worker)] {
        files.push((place.join(CA_FILE), ca.pem(), false));
        files.push((place.join(CERT_FILE), cert.pem(), false));
        files.push((place.join(KEY_FILE), key.serialize_pem(), true));
    }
    if !request.force
        && let Some((path, ..)) = files.iter().find(|(path, ..)| path.exists())
    {
        return Err(TransportError::Exists { path: path.clone() });
    }
    for (path, text, secret) in &files {
        write(path, text, *secret)?;
    }
    Ok(places)
}

fn make_ca(request: &CertRequest) -> Result<CertifiedIssuer<'static, KeyPair>, TransportError> {
    let failed = |e: rcgen::Error| generate("the CA", &e);
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    // The key's digest in the name: certificates of another CA are then told apart by issuer, which TLS
    // reports as an unknown authority instead of a damaged signature.
    let digest = params.key_identifier(&key);
    let digest: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
    let name = format!("arc-topk CA {} {digest}", request.job);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = request.not_before;
    params.not_after = request.not_after;
    CertifiedIssuer::self_signed(params, key).map_err(failed)
}

fn make_leaf(
    request: &CertRequest,
    ca: &CertifiedIssuer<'static, KeyPair>,
    role: &str,
) -> Result<(Certificate, KeyPair), TransportError> {
    let subject = format!("arc-topk {role} {}", request.job);
    let failed = |e: rcgen::Error| generate(&subject, &e);
    let (names, usage) = if role == SHARD_DIR {
        let mut names = request.shard_hosts.clone();
        for local in LOCAL_NAMES {
            if !names.iter().any(|name| name == local) {
                names.push(local.to_owned());
            }
        }
        (names, ExtendedKeyUsagePurpose::ServerAuth)
    } else {
        (Vec::new(), ExtendedKeyUsagePurpose::ClientAuth)
    };
    if let Some(bad) = names.iter().find(|name| !is_host(name)) {
        return Err(generate(&subject, &format!("{bad:?} is not a host")));
    }
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params
        .distinguished_name
        .push(DnType::CommonName, subject.clone());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params.not_before = request.not_before;
    params.not_after = request.not_after;
    let cert = params.signed_by(&key, ca).map_err(failed)?;
    Ok((cert, key))
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

fn write(path: &Path, text: &str, secret: bool) -> Result<(), TransportError> {
    let failed = |e: std::io::Error| TransportError::Write {
        path: path.to_owned(),
        problem: e.to_string(),
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    // A file made anew gets its mode before its content; one left over might be open to others.
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(if secret { 0o600 } else { 0o644 });
    }
    let mut file = options.open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)
}
