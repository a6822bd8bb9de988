//! UDP sockets, listening and connecting.

use crate::config::TransportConfig;
use crate::error::{TransportError, connection_error};
use crate::identity::Identity;
use crate::tls;
use arc_topk_common::wire::{ALPN, STORE_ALPN};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Code with which a worker closes a connection when it leaves in order. A shard that sees it treats the
/// end as a leave even if the connection's end overtakes the Leave message.
pub const LEAVE_CODE: u32 = 0x1ea5e;
/// Code with which a worker closes a connection that it replaces by another one: it has not ended and will be back.
pub const REDIAL_CODE: u32 = 0x2ed1a;

/// What a connection is for. The handshake says it (ALPN), so both share an endpoint and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// Membership and rounds.
    Training,
    /// The snapshot store.
    Store,
}

impl Service {
    /// All that a shard offers.
    pub const ALL: [Self; 2] = [Self::Training, Self::Store];

    /// Its name in the handshake.
    #[must_use]
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Training => ALPN,
            Self::Store => STORE_ALPN,
        }
    }

    /// What `connection` is for. `None` only for one that this program's endpoints would not have let in.
    #[must_use]
    pub fn of(connection: &Connection) -> Option<Self> {
        let data = connection
            .handshake_data()?
            .downcast::<HandshakeData>()
            .ok()?;
        let protocol = data.protocol?;
        Self::ALL
            .into_iter()
            .find(|service| service.alpn() == protocol)
    }
}

/// A listening endpoint whose certificate can be replaced.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    /// What it listens with. Kept whole, so that an address that is about to show that it exists (a retry) is still
    /// believed after a replacement.
    server: quinn::ServerConfig,
}

impl Listener {
    /// Listens on `address` for peers with a worker certificate of one of the identity's authorities. Port 0 takes a free
    /// one ([`Endpoint::local_addr`] tells which). A peer may open one stream, its control stream, until [`admit`] grants
    /// more. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The port is in use or not of this machine, or a setting is out of range.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        config: &TransportConfig,
    ) -> Result<Self, TransportError> {
        let mut server = quinn::ServerConfig::with_crypto(tls::server(identity)?);
        server
            .transport_config(config.server(address.ip().is_loopback())?)
            .migration(false);
        let key = identity.key();
        let secret = Some(key.secret_der());
        let endpoint = endpoint(address, Some(server.clone()), secret, config)?;
        Ok(Self { endpoint, server })
    }

    /// The endpoint, to accept from.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Shows `identity` to connections that begin from now on and judges them by it. Those that are there go on.
    ///
    /// # Errors
    /// TLS cannot use it; nothing changes then.
    pub fn renew(&mut self, identity: &Identity) -> Result<(), TransportError> {
        self.server.crypto = tls::server(identity)?;
        self.endpoint.set_server_config(Some(self.server.clone()));
        Ok(())
    }
}

/// [`Listener::bind`] for an endpoint that keeps its certificate.
///
/// # Errors
/// As [`Listener::bind`].
pub fn server_endpoint(
    address: SocketAddr,
    identity: &Identity,
    config: &TransportConfig,
) -> Result<Endpoint, TransportError> {
    Listener::bind(address, identity, config).map(|listener| listener.endpoint)
}

/// Grants an accepted peer the window of `config` and `streams` open streams, the control stream among them.
pub fn admit(connection: &Connection, config: &TransportConfig, streams: u32) {
    connection.set_receive_window(config.connection_window_bytes.into());
    connection.set_max_concurrent_bi_streams(streams.into());
}

/// A socket to connect from, fit for peers of `peer`'s address family. Must be called inside a tokio
/// runtime.
///
/// # Errors
/// No socket can be had.
pub fn client_endpoint(
    peer: SocketAddr,
    config: &TransportConfig,
) -> Result<Endpoint, TransportError> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    endpoint(SocketAddr::new(any, 0), None, None, config)
}

/// Connects to `HOST:PORT` from a socket of its own; the certificate must name HOST.
///
/// # Errors
/// Everything that [`TransportError`] says of names, handshakes and silence.
pub async fn connect(
    address: &str,
    identity: &Identity,
    config: &TransportConfig,
) -> Result<Connection, TransportError> {
    let (host, _) = split_host(address)?;
    let peer = resolve(address).await?;
    let endpoint = client_endpoint(peer, config)?;
    connect_resolved(&endpoint, peer, host, identity, config).await
}

/// Connects to `peer` from `endpoint` for training; the certificate must name `server_name`.
///
/// # Errors
/// As [`connect_service`].
pub async fn connect_resolved(
    endpoint: &Endpoint,
    peer: SocketAddr,
    server_name: &str,
    identity: &Identity,
    config: &TransportConfig,
) -> Result<Connection, TransportError> {
    let service = Service::Training;
    connect_service(endpoint, peer, server_name, identity, config, service).await
}

/// Connects to `peer` from `endpoint` for `service`; the certificate must name `server_name`.
///
/// In TLS 1.3 the server judges this side's certificate after the handshake has ended here, so a refusal
/// shows on the connection's first use: pass such errors through [`connection_error`].
///
/// # Errors
/// A handshake that fails, or no answer within `connect_timeout`.
pub async fn connect_service(
    endpoint: &Endpoint,
    peer: SocketAddr,
    server_name: &str,
    identity: &Identity,
    config: &TransportConfig,
    service: Service,
) -> Result<Connection, TransportError> {
    let mut client = quinn::ClientConfig::new(tls::client(identity, service)?);
    client.transport_config(config.client(peer.ip().is_loopback())?);
    let shown = shown(server_name, peer);
    let connecting = endpoint
        .connect_with(client, peer, server_name)
        .map_err(|e| TransportError::Unresolvable {
            address: shown.clone(),
            problem: e.to_string(),
        })?;
    let timeout = || TransportError::ConnectTimeout {
        peer: shown.clone(),
        waited: config.connect_timeout,
    };
    match tokio::time::timeout(config.connect_timeout, connecting).await {
        Err(_) => Err(timeout()),
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(quinn::ConnectionError::TimedOut)) => Err(TransportError::ConnectTimeout {
            peer: shown.clone(),
            waited: config.connect_timeout.min(config.idle_timeout),
        }),
        Ok(Err(error)) => Err(connection_error(&shown, &error)),
    }
}

fn shown(server_name: &str, peer: SocketAddr) -> String {
    if server_name == peer.ip().to_string() {
        peer.to_string()
    } else {
        format!("{server_name} ({peer})")
    }
}

/// Splits `HOST:PORT` (IPv6 hosts in brackets, as `[::1]:4433`).
///
/// # Errors
/// No port, or no host.
pub fn split_host(address: &str) -> Result<(&str, u16), TransportError> {
    let bad = |problem: &str| TransportError::Unresolvable {
        address: address.to_owned(),
        problem: problem.to_owned(),
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(|| bad("no port"))?;
    let port = port
        .parse()
        .map_err(|_| bad("the port is not a number below 65536"))?;
    let host = host
        .strip_prefix('[')
        .and_then(|inner| inner.strip_suffix(']'))
        .unwrap_or(host);
    if host.is_empty() {
        return Err(bad("no host"));
    }
    Ok((host, port))
}

/// Resolves `HOST:PORT` to its first address.
///
/// # Errors
/// The name is malformed or unknown.
pub async fn resolve(address: &str) -> Result<SocketAddr, TransportError> {
    let (host, port) = split_host(address)?;
    let bad = |problem: String| TransportError::Unresolvable {
        address: address.to_owned(),
        problem,
    };
    let mut found = tokio::net::lookup_host((host, port))
        .await
        .map_err(|e| bad(e.to_string()))?;
    found
        .next()
        .ok_or_else(|| bad("the name has no address".to_owned()))
}

fn endpoint(
    address: SocketAddr,
    server: Option<quinn::ServerConfig>,
    secret: Option<&[u8]>,
    config: &TransportConfig,
) -> Result<Endpoint, TransportError> {
    let bind = |e: io::Error| match e.kind() {
        io::ErrorKind::AddrInUse => TransportError::PortInUse {
            address: address.to_string(),
        },
        _ => TransportError::Bind {
            address: address.to_string(),
            problem: e.to_string(),
        },
    };
    let socket = udp_socket(address, config.socket_buffer_bytes).map_err(bind)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(config.endpoint(secret), server, socket, runtime).map_err(bind)
}

fn udp_socket(address: SocketAddr, buffer_bytes: usize) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    // Asked for, not required: the kernel grants what net.core.{r,w}mem_max allows.
    for (name, granted) in [
        ("receive", socket.set_recv_buffer_size(buffer_bytes)),
        ("send", socket.set_send_buffer_size(buffer_bytes)),
    ] {
        if let Err(error) = granted {
            tracing::debug!(name, %error, "the kernel keeps its own UDP buffer size");
        }
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Figures of a connection for metrics.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ConnectionSummary {
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Congestion window, bytes.
    pub congestion_window_bytes: u64,
    /// Packets counted as lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// UDP payload bytes sent: what the link carried, less IP and UDP headers.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Largest UDP payload in use on the path, bytes.
    pub udp_payload_bytes: u16,
}

/// Figures of `connection` so far.
#[must_use]
pub fn summary(connection: &Connection) -> ConnectionSummary {
    let stats = connection.stats();
    ConnectionSummary {
        rtt: stats.path.rtt,
        congestion_window_bytes: stats.path.cwnd,
        lost_packets: stats.path.lost_packets,
        sent_packets: stats.path.sent_packets,
        sent_bytes: stats.udp_tx.bytes,
        received_bytes: stats.udp_rx.bytes,
        udp_payload_bytes: stats.path.current_mtu,
    }
}
