//! Certificate files: what is made, and what is said of files that do not fit.

use arc_topk_transport::certs::{CertRequest, Role, make_job_certs, renew_job_certs};
use arc_topk_transport::{Identity, PeerFault, TransportError};
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

fn names(identity: &Identity) -> Vec<String> {
    use x509_parser::extensions::GeneralName;
    let (_, parsed) = x509_parser::parse_x509_certificate(&identity.chain()[0]).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    let shown = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => (*name).to_owned(),
        GeneralName::IPAddress(bytes) => format!("{bytes:?}"),
        other => format!("{other:?}"),
    };
    names.value.general_names.iter().map(shown).collect()
}

#[test]
fn the_shards_certificate_names_its_hosts_and_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["ps-0.example".to_owned(), "10.1.2.3".to_owned()];
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &hosts, 7)).unwrap();
    let names = names(&Identity::load(&certs.shard).unwrap());
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
    assert!(error.to_string().contains("--renew"), "{error}");
}

/// Files of an identity below `dir`.
fn files(dir: &Path, name: &str) -> Vec<Vec<u8>> {
    let place = dir.join(name);
    ["ca.pem", "cert.pem", "key.pem"]
        .map(|file| fs::read(place.join(file)).unwrap())
        .into()
}

#[test]
fn renewal_keeps_authority_and_hosts_and_replaces_the_rest() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let hosts = ["ps-0.example".to_owned(), "10.1.2.3".to_owned()];
    make_job_certs(dir.path(), &CertRequest::new("job", &hosts, 9)).unwrap();
    let key = fs::read(dir.path().join("ca-key.pem")).unwrap();
    let before = ["shard", "worker"].map(|name| files(dir.path(), name));

    let request = CertRequest::new("job", &["ps-1.example".to_owned()], 7);
    let (made, end) = renew_job_certs(dir.path(), &request).unwrap();
    assert_eq!(end, request.not_after);
    assert_eq!(fs::read(dir.path().join("ca-key.pem")).unwrap(), key);
    let after = ["shard", "worker"].map(|name| files(dir.path(), name));
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before[0], after[0], "the authority stays");
        assert!(before[1] != after[1] && before[2] != after[2]);
    }
    let mode = fs::metadata(made.shard.join("key.pem")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let names = names(&Identity::load(&made.shard).unwrap());
    assert_eq!(names.len(), 6, "{names:?}");
    for expected in ["ps-0.example", "ps-1.example", "[10, 1, 2, 3]"] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
    for (dir, role) in [(&made.shard, Role::Shard), (&made.worker, Role::Worker)] {
        Identity::load(dir).unwrap().check_as(role).unwrap();
    }
}

#[test]
fn a_renewed_certificate_does_not_outlive_its_authority() {
    let dir = tempfile::tempdir().unwrap();
    let short = CertRequest::new("job", &[], 2);
    make_job_certs(dir.path(), &short).unwrap();
    let (_, end) = renew_job_certs(dir.path(), &CertRequest::new("job", &[], 30)).unwrap();
    assert_eq!(end.unix_timestamp(), short.not_after.unix_timestamp());

    let over = tempfile::tempdir().unwrap();
    let mut request = CertRequest::new("job", &[], 0);
    request.not_before -= std::time::Duration::from_secs(3 * 86_400);
    request.not_after -= std::time::Duration::from_secs(86_400);
    make_job_certs(over.path(), &request).unwrap();
    let error = renew_job_certs(over.path(), &short).unwrap_err();
    assert!(
        matches!(error, TransportError::Authority { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("--out NEW"), "{error}");
}

#[test]
fn renewal_finds_its_authority_in_a_bundle_and_hands_the_bundle_on() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let request = CertRequest::new("job", &[], 7);
    make_job_certs(old.path(), &request).unwrap();
    make_job_certs(new.path(), &request).unwrap();
    let mut both = fs::read(new.path().join("ca.pem")).unwrap();
    both.extend(fs::read(old.path().join("ca.pem")).unwrap());
    fs::write(old.path().join("ca.pem"), &both).unwrap();
    let (made, _) = renew_job_certs(old.path(), &request).unwrap();
    let identity = Identity::load(&made.worker).unwrap();
    assert_eq!(identity.authorities().len(), 2);
    identity.check_as(Role::Worker).unwrap();

    // A key of neither.
    let other = tempfile::tempdir().unwrap();
    make_job_certs(other.path(), &request).unwrap();
    let key = "ca-key.pem";
    fs::copy(other.path().join(key), old.path().join(key)).unwrap();
    let error = renew_job_certs(old.path(), &request).unwrap_err();
    assert!(
        matches!(error, TransportError::KeyMismatch { .. }),
        "{error:?}"
    );
    let error = renew_job_certs(&other.path().join("absent"), &request).unwrap_err();
    assert!(matches!(error, TransportError::Read { .. }), "{error:?}");
}

#[test]
fn an_identity_that_no_peer_would_accept_is_told_apart() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let request = CertRequest::new("job", &[], 7);
    let ours = make_job_certs(ours.path(), &request).unwrap();
    let theirs = make_job_certs(theirs.path(), &request).unwrap();
    let fault = |identity: Identity, role| match identity.check_as(role).unwrap_err() {
        TransportError::OwnUseless { fault, .. } => fault,
        other => panic!("{other:?}"),
    };
    for (dir, role) in [(&ours.shard, Role::Worker), (&ours.worker, Role::Shard)] {
        let identity = Identity::load(dir).unwrap();
        assert_eq!(fault(identity, role), PeerFault::WrongRole);
    }
    for (dir, role) in [(&theirs.shard, Role::Shard), (&theirs.worker, Role::Worker)] {
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let mixed = Identity::load_files(&ours.ca, &cert, &key).unwrap();
        assert_eq!(fault(mixed, role), PeerFault::UnknownAuthority);
    }
}
