//! Certificate files: what is made, and what is said of files that do not fit.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{Identity, TransportError};
use std::fs;
use std::path::Path;

fn load(dir: &Path) -> Result<(), TransportError> {
    Identity::load(dir).map(drop)
}

#[test]
fn identities_load_and_keys_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["ps-0.example".to_owned(), "10.1.2.3".to_owned()];
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &hosts, 7)).unwrap();
    load(&certs.shard).unwrap();
    load(&certs.worker).unwrap();
    #[cfg(unix)]
    for key in ["ca-key.pem", "shard/key.pem", "worker/key.pem"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(dir.path().join(key)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{key}");
    }
}

#[test]
fn the_shards_certificate_names_its_hosts_and_loopback() {
    use x509_parser::extensions::GeneralName;
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["ps-0.example".to_owned(), "10.1.2.3".to_owned()];
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &hosts, 7)).unwrap();
    let identity = Identity::load(&certs.shard).unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(&identity.chain()[0]).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    let names: Vec<String> = names.value.general_names.iter().map(name).collect();
    fn name(name: &GeneralName<'_>) -> String {
        match name {
            GeneralName::DNSName(name) => (*name).to_owned(),
            GeneralName::IPAddress(bytes) => format!("{bytes:?}"),
            other => format!("{other:?}"),
        }
    }
    assert_eq!(names.len(), 5, "{names:?}");
    for expected in [
        "ps-0.example",
        "localhost",
        "[10, 1, 2, 3]",
        "[127, 0, 0, 1]",
    ] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
}

#[test]
fn nothing_is_overwritten_without_force() {
    let dir = tempfile::tempdir().unwrap();
    let mut request = CertRequest::new("job", &[], 7);
    let certs = make_job_certs(dir.path(), &request).unwrap();
    let before = fs::read(certs.worker.join("key.pem")).unwrap();
    let error = make_job_certs(dir.path(), &request).unwrap_err();
    assert!(matches!(error, TransportError::Exists { .. }), "{error:?}");
    assert!(error.to_string().contains("--force"), "{error}");
    assert_eq!(fs::read(certs.worker.join("key.pem")).unwrap(), before);
    request.force = true;
    make_job_certs(dir.path(), &request).unwrap();
    assert_ne!(fs::read(certs.worker.join("key.pem")).unwrap(), before);
    load(&certs.worker).unwrap();
}

#[test]
fn a_malformed_host_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let request = CertRequest::new("job", &["not a host".to_owned()], 7);
    let error = make_job_certs(dir.path(), &request)
        .unwrap_err()
        .to_string();
    assert!(error.contains("not a host"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn errors_name_the_file_and_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &[], 7)).unwrap();

    let error = load(&dir.path().join("absent")).unwrap_err().to_string();
    assert!(
        error.contains("absent/ca.pem") && error.contains("arc-ps certs"),
        "{error}"
    );

    fs::copy(certs.shard.join("key.pem"), certs.worker.join("key.pem")).unwrap();
    let error = load(&certs.worker).unwrap_err();
    assert!(
        matches!(error, TransportError::KeyMismatch { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("worker/key.pem"));

    fs::write(certs.worker.join("cert.pem"), "nonsense").unwrap();
    let error = load(&certs.worker).unwrap_err();
    assert!(matches!(error, TransportError::Content { .. }), "{error:?}");
    assert!(error.to_string().contains("worker/cert.pem"));
}

#[test]
fn an_expired_certificate_is_noticed_before_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let mut request = CertRequest::new("job", &[], 0);
    request.not_before -= std::time::Duration::from_secs(3 * 86_400);
    request.not_after -= std::time::Duration::from_secs(86_400);
    let certs = make_job_certs(dir.path(), &request).unwrap();
    let error = load(&certs.worker).unwrap_err();
    assert!(
        matches!(error, TransportError::OwnExpired { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("--force"), "{error}");
}
