//! Control messages and round frames on QUIC streams.

use crate::error::{TransportError, connection_error};
use arc_topk_common::wire::{
    CONTROL_LENGTH_BYTES, Control, FrameHeader, HEADER_BYTES, MAX_CONTROL_BYTES,
};
use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream, WriteError};
use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Memory that a claimed length alone obtains; more is taken as bytes arrive.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Name for errors.
const CONTROL: &str = "a control message";

/// The control stream of a session.
#[derive(Debug)]
pub struct ControlStream {
    /// Its sending half.
    pub sender: ControlSender,
    /// Its receiving half.
    pub receiver: ControlReceiver,
}

impl ControlStream {
    /// Opens it (workers).
    ///
    /// # Errors
    /// The connection has ended, for example because the peer refused this side's certificate.
    pub async fn open(connection: &Connection, peer: &str) -> Result<Self, TransportError> {
        let halves = connection.open_bi().await;
        let (send, recv) = halves.map_err(|e| connection_error(peer, &e))?;
        Ok(Self::from_halves(send, recv, peer))
    }

    /// Accepts it (shards): the first stream that the peer opens.
    ///
    /// # Errors
    /// The connection has ended.
    pub async fn accept(connection: &Connection, peer: &str) -> Result<Self, TransportError> {
        let halves = connection.accept_bi().await;
        let (send, recv) = halves.map_err(|e| connection_error(peer, &e))?;
        Ok(Self::from_halves(send, recv, peer))
    }

    /// From the two halves of a stream.
    #[must_use]
    pub fn from_halves(send: SendStream, recv: RecvStream, peer: &str) -> Self {
        // What the control stream says is never to wait behind gradients.
        let _closed_already = send.set_priority(i32::MAX);
        Self {
            sender: ControlSender {
                stream: send,
                peer: peer.to_owned(),
            },
            receiver: ControlReceiver {
                stream: recv,
                peer: peer.to_owned(),
            },
        }
    }

    /// [`ControlSender::send`].
    ///
    /// # Errors
    /// The stream or connection has ended.
    pub async fn send(&mut self, message: &Control) -> Result<(), TransportError> {
        self.sender.send(message).await
    }

    /// [`ControlReceiver::recv`].
    ///
    /// # Errors
    /// As [`ControlReceiver::recv`].
    pub async fn recv(&mut self) -> Result<Option<Control>, TransportError> {
        self.receiver.recv().await
    }
}

/// Sending half of a [`ControlStream`].
#[derive(Debug)]
pub struct ControlSender {
    stream: SendStream,
    peer: String,
}

impl ControlSender {
    /// Sends one message.
    ///
    /// # Errors
    /// The stream or connection has ended.
    pub async fn send(&mut self, message: &Control) -> Result<(), TransportError> {
        let body = message.encode();
        let mut bytes = BytesMut::with_capacity(CONTROL_LENGTH_BYTES + body.len());
        let length = u32::try_from(body.len()).expect("control messages are below 16 MiB");
        bytes.put_u32_le(length);
        bytes.put_slice(&body);
        let sent = self.stream.write_chunk(bytes.freeze()).await;
        sent.map_err(|e| write_error(&self.peer, &e))
    }

    /// Says that nothing more follows, and waits until the peer has received everything.
    ///
    /// # Errors
    /// The connection has ended before.
    pub async fn finish(&mut self) -> Result<(), TransportError> {
        let _finished_already = self.stream.finish();
        match self.stream.stopped().await {
            Ok(_) => Ok(()),
            Err(quinn::StoppedError::ConnectionLost(e)) => Err(connection_error(&self.peer, &e)),
            Err(quinn::StoppedError::ZeroRttRejected) => {
                unreachable!("sessions do not use 0-RTT")
            }
        }
    }
}

/// Receiving half of a [`ControlStream`].
#[derive(Debug)]
pub struct ControlReceiver {
    stream: RecvStream,
    peer: String,
}

impl ControlReceiver {
    /// Waits for one message; `None` if the peer has finished the stream. Not cancel-safe: give it a task
    /// of its own.
    ///
    /// # Errors
    /// A message above its limit or one that does not parse; the stream or connection has ended inside one.
    pub async fn recv(&mut self) -> Result<Option<Control>, TransportError> {
        match self.claim().await? {
            Some(claimed) => self.body(claimed).await.map(Some),
            None => Ok(None),
        }
    }

    /// [`ControlReceiver::recv`] from a peer that is not known yet: a long message waits until `budget` has room for it.
    ///
    /// # Errors
    /// As [`ControlReceiver::recv`].
    pub async fn recv_within(
        &mut self,
        budget: &LongMessages,
    ) -> Result<Option<Control>, TransportError> {
        let Some(claimed) = self.claim().await? else {
            return Ok(None);
        };
        let _held_until_it_is_decoded = budget.room_for(claimed).await;
        self.body(claimed).await.map(Some)
    }

    /// Length of the message that comes, if one does.
    async fn claim(&mut self) -> Result<Option<usize>, TransportError> {
        let mut length = [0; CONTROL_LENGTH_BYTES];
        let comes = read_start(&mut self.stream, &mut length, CONTROL, &self.peer).await?;
        let claimed = u32::from_le_bytes(length) as usize;
        if claimed > MAX_CONTROL_BYTES {
            return Err(TransportError::TooLong {
                what: CONTROL,
                claimed,
                limit: MAX_CONTROL_BYTES,
            });
        }
        Ok(comes.then_some(claimed))
    }

    async fn body(&mut self, claimed: usize) -> Result<Control, TransportError> {
        let limit = MAX_CONTROL_BYTES;
        let body = read_body(&mut self.stream, claimed, limit, CONTROL, &self.peer).await?;
        Ok(Control::decode(&body)?)
    }
}

/// What control messages longer than 64 KiB may take together while they come. Shorter ones are free: a Hello is longer only
/// for models of more than a thousand tensors.
#[derive(Debug)]
pub struct LongMessages(Semaphore);

impl LongMessages {
    /// Room for so many bytes, and for at least the longest message.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(Semaphore::new(bytes.max(MAX_CONTROL_BYTES)))
    }

    async fn room_for(&self, claimed: usize) -> Option<SemaphorePermit<'_>> {
        if claimed <= FIRST_ALLOCATION_BYTES {
            return None;
        }
        let bytes = u32::try_from(claimed).unwrap_or(u32::MAX);
        // It is never closed.
        self.0.acquire_many(bytes).await.ok()
    }
}

/// Reads one round frame; `None` if the peer finished the stream before it. Not cancel-safe.
///
/// The body is one contiguous buffer, so that decoders run over it at full speed: each byte is copied once,
/// out of the decrypted packet. At most 64 KiB are allocated on the strength of the header alone.
///
/// # Errors
/// A header that does not parse, a body above `limit` bytes (nothing of it is read then), a stream that ends
/// inside the frame, or a lost connection.
pub async fn read_frame(
    stream: &mut RecvStream,
    limit: usize,
    peer: &str,
) -> Result<Option<(FrameHeader, Bytes)>, TransportError> {
    let mut header = [0; HEADER_BYTES];
    if !read_start(stream, &mut header, "a frame header", peer).await? {
        return Ok(None);
    }
    let header = FrameHeader::decode(&header)?;
    let body = read_body(stream, header.body_bytes as usize, limit, "a frame", peer).await?;
    Ok(Some((header, body)))
}

/// Writes one round frame. The body is not copied: QUIC keeps a reference until the peer has acknowledged it.
///
/// # Errors
/// The stream or connection has ended.
///
/// # Panics
/// If `header.body_bytes` is not the body's length: frames are built by this program.
pub async fn write_frame(
    stream: &mut SendStream,
    header: &FrameHeader,
    body: Bytes,
    peer: &str,
) -> Result<(), TransportError> {
    assert_eq!(header.body_bytes as usize, body.len(), "header and body");
    let mut chunks = [Bytes::copy_from_slice(&header.encode()), body];
    let written = stream.write_all_chunks(&mut chunks).await;
    written.map_err(|e| write_error(peer, &e))
}

/// Fills `bytes`, the start of a message. False if the stream ends before its first byte.
async fn read_start(
    stream: &mut RecvStream,
    bytes: &mut [u8],
    what: &'static str,
    peer: &str,
) -> Result<bool, TransportError> {
    let mut filled = 0;
    while filled < bytes.len() {
        let read = stream.read(&mut bytes[filled..]).await;
        match read.map_err(|e| read_error(peer, &e))? {
            Some(count) => filled += count,
            None if filled == 0 => return Ok(false),
            None => {
                let missing = bytes.len() - filled;
                return Err(TransportError::Truncated { what, missing });
            }
        }
    }
    Ok(true)
}

async fn read_body(
    stream: &mut RecvStream,
    claimed: usize,
    limit: usize,
    what: &'static str,
    peer: &str,
) -> Result<Bytes, TransportError> {
    if claimed > limit {
        return Err(TransportError::TooLong {
            what,
            claimed,
            limit,
        });
    }
    let mut body = BytesMut::with_capacity(claimed.min(FIRST_ALLOCATION_BYTES));
    while body.len() < claimed {
        let missing = claimed - body.len();
        if body.capacity() == body.len() {
            body.reserve(missing.min(body.len()));
        }
        let read = stream.read_buf(&mut (&mut body).limit(missing)).await;
        let count = read.map_err(|e| io_error(peer, e))?;
        if count == 0 {
            return Err(TransportError::Truncated { what, missing });
        }
    }
    Ok(body.freeze())
}

fn io_error(peer: &str, error: std::io::Error) -> TransportError {
    let detail = error.to_string();
    match error.downcast::<ReadError>() {
        Ok(error) => read_error(peer, &error),
        Err(_) => TransportError::Quic {
            peer: peer.to_owned(),
            detail,
        },
    }
}

fn read_error(peer: &str, error: &ReadError) -> TransportError {
    match error {
        ReadError::Reset(code) => TransportError::StreamReset {
            code: code.into_inner(),
        },
        ReadError::ConnectionLost(e) => connection_error(peer, e),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            TransportError::Quic {
                peer: peer.to_owned(),
                detail: error.to_string(),
            }
        }
    }
}

fn write_error(peer: &str, error: &WriteError) -> TransportError {
    match error {
        WriteError::Stopped(code) => TransportError::StreamReset {
            code: code.into_inner(),
        },
        WriteError::ConnectionLost(e) => connection_error(peer, e),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => TransportError::Quic {
            peer: peer.to_owned(),
            detail: error.to_string(),
        },
    }
}
