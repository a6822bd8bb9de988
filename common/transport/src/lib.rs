//! QUIC sessions with mutual TLS 1.3: what stands between the sans-IO machines and the network.
//!
//! | module | room for |
//! |---|---|
//! | [`certs`] | making a job's CA and the certificates of its shards and workers |
//! | [`identity`] | loading a peer's certificate, key and authorities |
//! | [`source`] | taking a new identity while the process runs |
//! | [`config`] | windows, timeouts, buffers and path sizes of a session |
//! | [`endpoint`] | UDP sockets, listening and connecting |
//! | [`stream`] | control messages and round frames on QUIC streams |
//! | [`error`] | what can go wrong, by who has to act |
//!
//! Invariants: a peer without a certificate of the job's CA never gets past the handshake; nothing is
//! allocated for a length that a peer merely claims; every error names its cause and a remedy.
//!
//! Non-goals: 0-RTT (replayable), TLS session resumption across CAs, connection migration (a worker whose
//! address changes is lost and says so).

pub mod certs;
pub mod config;
pub mod endpoint;
pub mod error;
pub mod identity;
pub mod source;
pub mod stream;
mod tls;

pub use config::TransportConfig;
pub use endpoint::{
    ConnectionSummary, LEAVE_CODE, Listener, REDIAL_CODE, Service, admit, client_endpoint, connect,
    connect_resolved, connect_service, resolve, server_endpoint, split_host, summary,
};
pub use error::{PeerFault, TransportError, connection_error};
pub use identity::Identity;
pub use source::{IdentitySource, Look};
pub use stream::{
    ControlReceiver, ControlSender, ControlStream, LongMessages, read_error, read_frame,
    read_message, write_error, write_frame, write_message,
};

pub use quinn::{
    Connection, Endpoint, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError,
};
