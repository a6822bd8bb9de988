//! What can go wrong, by who has to act.

use arc_topk_common::wire::{ALPN, WireError};
use std::path::PathBuf;
use std::time::Duration;

/// What a TLS handshake found wrong with a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerFault {
    /// It is not signed by the job's CA.
    UnknownAuthority,
    /// It is expired or not yet valid.
    Expired,
    /// There is none.
    Missing,
    /// It belongs to another role: a worker's where a shard's is needed, or the other way round.
    WrongRole,
    /// It does not name the address that was dialled.
    WrongName,
    /// Anything else.
    Bad,
}

impl PeerFault {
    /// From a TLS alert and the text beside it.
    fn from_alert(alert: u8, text: &str) -> Option<Self> {
        Some(match alert {
            48 | 51 => Self::UnknownAuthority,
            45 => Self::Expired,
            116 => Self::Missing,
            43 => Self::WrongRole,
            42 if text.contains("not valid for name") => Self::WrongName,
            41 | 42 | 44 | 46 | 49 => Self::Bad,
            _ => return None,
        })
    }

    /// From what rustls says of a certificate on this side.
    pub(crate) fn from_rustls(error: &rustls::Error) -> Self {
        use rustls::CertificateError as E;
        let rustls::Error::InvalidCertificate(error) = error else {
            return Self::Bad;
        };
        match error {
            E::UnknownIssuer | E::BadSignature => Self::UnknownAuthority,
            E::Expired | E::ExpiredContext { .. } => Self::Expired,
            E::NotValidYet | E::NotValidYetContext { .. } => Self::Expired,
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => Self::WrongRole,
            _ => Self::Bad,
        }
    }

    fn cause(self) -> &'static str {
        match self {
            Self::UnknownAuthority => "is not signed by this job's CA",
            Self::Expired => "is expired or not yet valid",
            Self::Missing => "is missing",
            Self::WrongRole => "is for another role",
            Self::WrongName => "does not name the address that was dialled",
            Self::Bad => "is not acceptable",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::UnknownAuthority => {
                "give both sides certificates from one run of `arc-ps certs` (the same ca.pem)"
            }
            Self::Expired => {
                "check both clocks, or renew with `arc-ps certs --renew` and copy the files to where the old ones are"
            }
            Self::Missing => "pass --certs DIR with ca.pem, cert.pem and key.pem",
            Self::WrongRole => "give shards the `shard` directory and workers the `worker` one",
            Self::WrongName => {
                "run `arc-ps certs --host NAME` with every name or address that workers dial"
            }
            Self::Bad => "make new certificates with `arc-ps certs --force`",
        }
    }
}

/// Failures of files, sockets, handshakes and streams.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum TransportError {
    /// A certificate or key file cannot be read.
    #[error(
        "cannot read {path}: {problem}; make the job's certificates with `arc-ps certs --out DIR` or correct the path"
    )]
    Read {
        /// File.
        path: PathBuf,
        /// The system's words.
        problem: String,
    },
    /// A file holds something else than expected.
    #[error(
        "{path} holds no {expected} ({problem}); make the file anew with `arc-ps certs --force`"
    )]
    Content {
        /// File.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Certificate and key do not belong together.
    #[error("{key} is not the key of {cert}: {problem}; take both from the same directory")]
    KeyMismatch {
        /// Certificate file.
        cert: PathBuf,
        /// Key file.
        key: PathBuf,
        /// What rustls says.
        problem: String,
    },
    /// This side's own certificate has expired.
    #[error(
        "{path} expired on {not_after}; renew it with `arc-ps certs --renew` and copy it to where the old one is"
    )]
    OwnExpired {
        /// Certificate file.
        path: PathBuf,
        /// End of its validity.
        not_after: String,
    },
    /// No peer with the same authorities would accept this side's own certificate.
    #[error("peers will refuse {cert}: with the authorities in {ca} it {} ({detail}); {}", .fault.cause(), .fault.remedy())]
    OwnUseless {
        /// Certificate file.
        cert: PathBuf,
        /// File of the authorities.
        ca: PathBuf,
        /// What is wrong.
        fault: PeerFault,
        /// What rustls says.
        detail: String,
    },
    /// An authority cannot issue what is asked of it.
    #[error(
        "{path} cannot renew this job's certificates: {problem}; make a new authority with `arc-ps certs --out NEW` and let ca.pem hold both until all have certificates of the new one"
    )]
    Authority {
        /// Certificate file of the authority.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A file would be overwritten.
    #[error(
        "{path} exists; use --renew for new certificates of the same authority, --force to replace the authority too (peers with the old ones can then no longer connect), or another directory"
    )]
    Exists {
        /// File.
        path: PathBuf,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {problem}; choose a directory that this user may write to")]
    Write {
        /// File or directory.
        path: PathBuf,
        /// The system's words.
        problem: String,
    },
    /// A certificate cannot be made.
    #[error(
        "cannot make the certificate of {subject}: {problem}; host names must be DNS names or IP addresses"
    )]
    Generate {
        /// Whose.
        subject: String,
        /// What rcgen says.
        problem: String,
    },
    /// A setting is out of range.
    #[error("transport setting {name} {rule}")]
    Setting {
        /// Field of [`crate::TransportConfig`].
        name: &'static str,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// Another process listens there.
    #[error(
        "UDP port {address} is in use: another shard or program listens there; stop it or choose another port with --listen"
    )]
    PortInUse {
        /// Address.
        address: String,
    },
    /// The socket cannot be opened.
    #[error(
        "cannot listen on {address}: {problem}; use an address of this machine, or 0.0.0.0 for all"
    )]
    Bind {
        /// Address.
        address: String,
        /// The system's words.
        problem: String,
    },
    /// An address has no meaning.
    #[error(
        "cannot resolve {address}: {problem}; write HOST:PORT with a host that this machine knows"
    )]
    Unresolvable {
        /// As given.
        address: String,
        /// The system's words.
        problem: String,
    },
    /// This side refuses the peer's certificate.
    #[error("the certificate of {peer} {} ({detail}); {}", .fault.cause(), .fault.remedy())]
    PeerCertificate {
        /// Peer.
        peer: String,
        /// What is wrong.
        fault: PeerFault,
        /// What TLS says.
        detail: String,
    },
    /// The peer refuses this side's certificate.
    #[error("{peer} refused this side's certificate: it {} ({detail}); {}", .fault.cause(), .fault.remedy())]
    OwnCertificate {
        /// Peer.
        peer: String,
        /// What is wrong.
        fault: PeerFault,
        /// What TLS says.
        detail: String,
    },
    /// The peer speaks another version, or another protocol.
    #[error(
        "{peer} does not speak {}: it is another release of arc-topk or another program; run the same release everywhere and check the address",
        String::from_utf8_lossy(ALPN)
    )]
    Alpn {
        /// Peer.
        peer: String,
    },
    /// Nobody answered.
    #[error("no answer from {peer} within {:.1} s: no shard listens there (yet), or a firewall drops UDP; start the shard or check the address and UDP port", .waited.as_secs_f64())]
    ConnectTimeout {
        /// Peer.
        peer: String,
        /// How long it was tried.
        waited: Duration,
    },
    /// The peer turned the connection away before it began.
    #[error(
        "{peer} refuses new connections: it is shutting down or at its limit; start it again or wait"
    )]
    ConnectRefused {
        /// Peer.
        peer: String,
    },
    /// The peer fell silent.
    #[error(
        "{peer} fell silent: its process, machine or link is gone, or stands still; the job goes on, and takes it in again when it is back"
    )]
    IdleTimeout {
        /// Peer.
        peer: String,
    },
    /// The peer's process restarted.
    #[error(
        "{peer} no longer knows this connection: its process was started again, or it had given this one up for lost"
    )]
    Reset {
        /// Peer.
        peer: String,
    },
    /// The peer closed the connection with a code and words of its own.
    #[error("{peer} closed the connection: {reason} (code {code})")]
    Closed {
        /// Peer.
        peer: String,
        /// A `RefusalCode`'s number, or 0.
        code: u64,
        /// Its words.
        reason: String,
    },
    /// This side closed the connection.
    #[error("the connection to {peer} was closed here")]
    ClosedHere {
        /// Peer.
        peer: String,
    },
    /// QUIC itself failed.
    #[error(
        "QUIC error with {peer}: {detail}; if it persists, check that both run the same release"
    )]
    Quic {
        /// Peer.
        peer: String,
        /// What quinn says.
        detail: String,
    },
    /// A peer announced more than it may send.
    #[error(
        "a peer announced {claimed} bytes of {what}, above the limit of {limit}: it runs another plan or release, or is hostile"
    )]
    TooLong {
        /// What.
        what: &'static str,
        /// Announced, bytes.
        claimed: usize,
        /// Limit, bytes.
        limit: usize,
    },
    /// A stream ended inside a message.
    #[error(
        "the stream ended inside {what}: {missing} bytes are missing; the peer stopped in the middle"
    )]
    Truncated {
        /// What.
        what: &'static str,
        /// How much is missing, bytes.
        missing: usize,
    },
    /// The peer gave a stream up.
    #[error("the peer gave the stream up (code {code})")]
    StreamReset {
        /// Its code.
        code: u64,
    },
    /// Bytes that do not parse.
    #[error(transparent)]
    Wire(#[from] WireError),
}

const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;

/// Says why a connection to `peer` (a name for people) ended.
#[must_use]
pub fn connection_error(peer: &str, error: &quinn::ConnectionError) -> TransportError {
    use quinn::ConnectionError as E;
    let peer = peer.to_owned();
    match error {
        E::TransportError(e) => handshake_error(peer, u64::from(e.code), &e.reason, false),
        E::ConnectionClosed(close) => {
            let text = String::from_utf8_lossy(&close.reason).into_owned();
            handshake_error(peer, u64::from(close.error_code), &text, true)
        }
        E::ApplicationClosed(close) => TransportError::Closed {
            peer,
            code: close.error_code.into_inner(),
            reason: match String::from_utf8_lossy(&close.reason) {
                text if text.is_empty() => "no reason given".to_owned(),
                text => text.into_owned(),
            },
        },
        E::VersionMismatch => TransportError::Alpn { peer },
        E::Reset => TransportError::Reset { peer },
        E::TimedOut => TransportError::IdleTimeout { peer },
        E::LocallyClosed => TransportError::ClosedHere { peer },
        E::CidsExhausted => TransportError::Quic {
            peer,
            detail: error.to_string(),
        },
    }
}

/// QUIC carries TLS alert `a` as code 0x100 + a. `remote`: the peer raised it.
fn handshake_error(peer: String, code: u64, text: &str, remote: bool) -> TransportError {
    if code == u64::from(quinn::TransportErrorCode::CONNECTION_REFUSED) {
        return TransportError::ConnectRefused { peer };
    }
    let detail = match text {
        "" => format!("code {code:#x}"),
        text => text.to_owned(),
    };
    let Some(alert) = code.checked_sub(0x100).and_then(|a| u8::try_from(a).ok()) else {
        return TransportError::Quic { peer, detail };
    };
    if alert == ALERT_NO_APPLICATION_PROTOCOL {
        return TransportError::Alpn { peer };
    }
    match (PeerFault::from_alert(alert, text), remote) {
        (Some(fault), true) => TransportError::OwnCertificate {
            peer,
            fault,
            detail,
        },
        (Some(fault), false) => TransportError::PeerCertificate {
            peer,
            fault,
            detail,
        },
        (None, _) => TransportError::Quic { peer, detail },
    }
}
