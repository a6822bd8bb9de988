//! Tuning of a session.

use crate::error::TransportError;
use quinn::{ConnectionId, ConnectionIdGenerator};
use ring::rand::{SecureRandom, SystemRandom};
use std::sync::Arc;
use std::time::Duration;

/// quinn hands the kernel up to ten datagrams at once, and the kernel takes at most 65507 bytes: with larger
/// payloads a full batch fails with EMSGSIZE, which quinn takes for a failed path probe and drops.
pub const LARGEST_UDP_PAYLOAD_BYTES: u16 = 65507 / 10;

/// Connection window of a peer that has not been admitted, bytes. A longer Hello is read piece by piece.
pub const HELLO_WINDOW_BYTES: u32 = 1 << 20;

/// Settings of a QUIC endpoint, the same for shards and workers.
///
/// The defaults suit 0.1–25 Gbit/s with round trips up to about 20 ms: a window must hold at least
/// bandwidth × round trip (25 Gbit/s × 20 ms = 62 MB).
#[derive(Clone, PartialEq, Debug)]
pub struct TransportConfig {
    /// Bytes that a peer may send on one stream before they are read.
    pub stream_window_bytes: u32,
    /// Bytes that a peer may send on all streams of a connection before they are read. Bounds what one
    /// peer can make this process buffer. A listening side grants it by [`crate::admit`], and
    /// [`HELLO_WINDOW_BYTES`] until then.
    pub connection_window_bytes: u32,
    /// Bytes written here that may wait for the peer's acknowledgement.
    pub send_window_bytes: u64,
    /// Silence after which a peer counts as lost. The smaller of both sides' values holds.
    pub idle_timeout: Duration,
    /// Interval of keep-alive packets; below half of `idle_timeout`.
    pub keep_alive: Duration,
    /// Kernel buffer of the UDP socket, bytes, each direction. The kernel may grant less
    /// (`net.core.rmem_max`, `net.core.wmem_max`).
    pub socket_buffer_bytes: usize,
    /// Largest UDP payload that path discovery tries, bytes; 1452 fits Ethernet, more needs jumbo frames.
    /// At most [`LARGEST_UDP_PAYLOAD_BYTES`] is used.
    pub max_udp_payload_bytes: u16,
    /// UDP payload to start with towards loopback addresses, bytes, where no path can be too small.
    /// At most [`LARGEST_UDP_PAYLOAD_BYTES`] is used.
    pub loopback_udp_payload_bytes: u16,
    /// Time that one attempt to connect may take.
    pub connect_timeout: Duration,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            stream_window_bytes: 64 << 20,
            connection_window_bytes: 128 << 20,
            send_window_bytes: 128 << 20,
            idle_timeout: Duration::from_secs(3),
            keep_alive: Duration::from_secs(1),
            socket_buffer_bytes: 8 << 20,
            max_udp_payload_bytes: LARGEST_UDP_PAYLOAD_BYTES,
            loopback_udp_payload_bytes: LARGEST_UDP_PAYLOAD_BYTES,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl TransportConfig {
    /// Settings of a side that connects: the other one opens no streams.
    pub(crate) fn client(
        &self,
        loopback: bool,
    ) -> Result<Arc<quinn::TransportConfig>, TransportError> {
        let mut quic = self.quinn(loopback)?;
        quic.max_concurrent_bidi_streams(0u32.into());
        Ok(Arc::new(quic))
    }

    /// Settings of a side that listens: a peer that has not been admitted gets a control stream and a small window,
    /// for what the handshake granted cannot be taken back.
    pub(crate) fn server(
        &self,
        loopback: bool,
    ) -> Result<Arc<quinn::TransportConfig>, TransportError> {
        let mut quic = self.quinn(loopback)?;
        quic.max_concurrent_bidi_streams(1u32.into())
            .receive_window(self.connection_window_bytes.min(HELLO_WINDOW_BYTES).into());
        Ok(Arc::new(quic))
    }

    /// Settings of quinn's own for a peer at a loopback address or not.
    fn quinn(&self, loopback: bool) -> Result<quinn::TransportConfig, TransportError> {
        let idle = quinn::IdleTimeout::try_from(self.idle_timeout).map_err(|_| {
            TransportError::Setting {
                name: "idle_timeout",
                rule: "must be below 2^62 milliseconds",
            }
        })?;
        if self.keep_alive * 2 > self.idle_timeout {
            return Err(TransportError::Setting {
                name: "keep_alive",
                rule: "must be at most half of idle_timeout, or a quiet peer counts as lost",
            });
        }
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        let mut quic = quinn::TransportConfig::default();
        if loopback {
            let payload = self
                .loopback_udp_payload_bytes
                .min(LARGEST_UDP_PAYLOAD_BYTES);
            quic.initial_mtu(payload);
            discovery.upper_bound(payload);
            // quinn starts with a window of 14720 bytes, two or three of these.
            let mut cubic = quinn::congestion::CubicConfig::default();
            cubic.initial_window(10 * u64::from(payload));
            quic.congestion_controller_factory(Arc::new(cubic));
        } else {
            discovery.upper_bound(self.max_udp_payload_bytes.min(LARGEST_UDP_PAYLOAD_BYTES));
        }
        quic.mtu_discovery_config(Some(discovery))
            .stream_receive_window(self.stream_window_bytes.into())
            .receive_window(self.connection_window_bytes.into())
            .send_window(self.send_window_bytes)
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            .max_concurrent_uni_streams(0u32.into())
            .datagram_receive_buffer_size(None)
            // Streams of equal priority go out in the order written: a bucket that is complete is worth
            // more than two that are half there.
            .send_fairness(false);
        Ok(quic)
    }

    /// Largest UDP payload to accept, bytes. With a `secret` that outlives the process, a restarted one tells peers of its
    /// predecessor at their next packet that their connection is gone (stateless reset, RFC 9000 §10.3), instead of
    /// leaving them to their idle timeout.
    pub(crate) fn endpoint(&self, secret: Option<&[u8]>) -> quinn::EndpointConfig {
        let mut config = match secret {
            Some(secret) => quinn::EndpointConfig::new(Arc::new(reset_key(secret))),
            None => quinn::EndpointConfig::default(),
        };
        if secret.is_some() {
            config.cid_generator(|| Box::new(PlainIds));
        }
        let largest = self
            .max_udp_payload_bytes
            .max(self.loopback_udp_payload_bytes)
            .clamp(1200, 65527);
        config
            .max_udp_payload_size(largest)
            .expect("clamped to what QUIC allows");
        config
    }
}

/// The private key itself must not be a MAC's key, so that neither can say anything of the other.
fn reset_key(secret: &[u8]) -> ring::hmac::Key {
    let label = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"arc-topk stateless reset");
    ring::hmac::Key::new(
        ring::hmac::HMAC_SHA256,
        ring::hmac::sign(&label, secret).as_ref(),
    )
}

/// Connection identifiers without a mark of the process that made them. By the mark in quinn's usual ones a restarted process
/// takes its predecessor's for noise, and resets nothing.
struct PlainIds;

impl ConnectionIdGenerator for PlainIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; 8];
        SystemRandom::new()
            .fill(&mut id)
            .expect("the system has randomness: the handshake's keys are made of it");
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
