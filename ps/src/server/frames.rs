//! Reads round frames with a limit on length and on patience.

use arc_topk_common::wire::{FrameHeader, HEADER_BYTES, WireError};
use arc_topk_transport::RecvStream;
use bytes::{Bytes, BytesMut};
use core::time::Duration;
use tokio::time::timeout;

/// Memory that a claimed length alone obtains.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Pieces taken from the stream at once.
const PIECES: usize = 32;

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameFault {
    /// The connection or stream is gone; the session's end says why.
    #[error("the worker gave up the stream of a round ({0})")]
    Gone(String),
    #[error(
        "a stream was opened and no frame came on it within {:.1} s: a worker opens a stream when it has something to send; run the same release everywhere", .0.as_secs_f64()
    )]
    NoHeader(Duration),
    #[error("a frame stood still for {:.1} s after {got} of its {expected} bytes: the worker is stuck, or its link is gone", .waited.as_secs_f64())]
    Stuck {
        waited: Duration,
        got: usize,
        expected: usize,
    },
    #[error(
        "a frame announces {claimed} bytes, above the limit of {limit} under this plan: nothing of it was read; run the same release with the same plan everywhere"
    )]
    TooLong { claimed: usize, limit: usize },
    #[error("a frame ended after {got} of its {expected} bytes")]
    Truncated { got: usize, expected: usize },
    #[error("a frame's header cannot be read: {0}")]
    Header(#[from] WireError),
}

/// One frame. `patience_header`: `None` waits as long as the connection lives.
pub(super) async fn read(
    stream: &mut RecvStream,
    limit: usize,
    patience_header: Option<Duration>,
    patience_body: Duration,
) -> Result<(FrameHeader, Bytes), FrameFault> {
    let mut bytes = [0; HEADER_BYTES];
    let reading = stream.read_exact(&mut bytes);
    let read = match patience_header {
        Some(patience) => timeout(patience, reading)
            .await
            .map_err(|_| FrameFault::NoHeader(patience))?,
        None => reading.await,
    };
    read.map_err(|error| FrameFault::Gone(error.to_string()))?;
    let header = FrameHeader::decode(&bytes)?;
    let body = read_body(stream, header.body_bytes as usize, limit, patience_body).await?;
    Ok((header, body))
}

async fn read_body(
    stream: &mut RecvStream,
    expected: usize,
    limit: usize,
    patience: Duration,
) -> Result<Bytes, FrameFault> {
    if expected > limit {
        return Err(FrameFault::TooLong {
            claimed: expected,
            limit,
        });
    }
    let mut body = BytesMut::with_capacity(expected.min(FIRST_ALLOCATION_BYTES));
    let mut pieces: [Bytes; PIECES] = core::array::from_fn(|_| Bytes::new());
    while body.len() < expected {
        let got = body.len();
        let stuck = |_| FrameFault::Stuck {
            waited: patience,
            got,
            expected,
        };
        let read = timeout(patience, stream.read_chunks(&mut pieces))
            .await
            .map_err(stuck)?;
        let Some(count) = read.map_err(|error| FrameFault::Gone(error.to_string()))? else {
            return Err(FrameFault::Truncated { got, expected });
        };
        for piece in &mut pieces[..count] {
            let piece = core::mem::take(piece);
            if body.len() + piece.len() > expected {
                return Err(FrameFault::TooLong {
                    claimed: body.len() + piece.len(),
                    limit: expected,
                });
            }
            grow(&mut body, piece.len(), expected);
            body.extend_from_slice(&piece);
        }
    }
    Ok(body.freeze())
}

/// Doubles, but never past what the frame holds.
fn grow(body: &mut BytesMut, by: usize, expected: usize) {
    if body.capacity() - body.len() < by {
        let doubled = body.len().max(by);
        body.reserve(doubled.min(expected - body.len()));
    }
}
