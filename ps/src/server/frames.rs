//! Reads round frames with a limit on length and on patience.
//!
//! What may not stand still is the connection, not the stream: a worker's streams have priorities, so that a packet of one
//! that was lost is sent again after all data of higher ones, and on a slow link that takes longer than any patience.

use arc_topk_common::wire::{FrameHeader, HEADER_BYTES, WireError};
use arc_topk_transport::{ReadError, ReadExactError, RecvStream};
use bytes::{Bytes, BytesMut};
use core::time::Duration;
use tokio::time::timeout;

/// Memory that a claimed length alone obtains.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Pieces taken from the stream at once.
const PIECES: usize = 32;

/// How long a connection may bring nothing while a frame is awaited.
pub(super) struct Patience<P> {
    /// Grows with everything that the connection's streams bring.
    pub(super) progress: P,
    /// Until a header; `None` waits as long as the connection lives.
    pub(super) header: Option<Duration>,
    /// Between pieces of a body.
    pub(super) body: Duration,
}

/// Waits for `future` until nothing has grown for as long as `patience`.
async fn while_moving<T>(
    patience: Duration,
    progress: &impl Fn() -> u64,
    seen: &mut u64,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = core::pin::pin!(future);
    loop {
        if let Ok(output) = timeout(patience, &mut future).await {
            return Some(output);
        }
        if core::mem::replace(seen, progress()) == *seen {
            return None;
        }
    }
}

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameFault {
    /// The connection or stream is gone; the session's end says why.
    #[error("the worker gave up the stream of a round ({0})")]
    Gone(String),
    /// Between two frames.
    #[error("the worker finished a stream on which a frame was due")]
    Finished,
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

/// One frame.
pub(super) async fn read(
    stream: &mut RecvStream,
    limit: usize,
    patience: Patience<impl Fn() -> u64>,
) -> Result<(FrameHeader, Bytes), FrameFault> {
    let mut bytes = [0; HEADER_BYTES];
    let reading = stream.read_exact(&mut bytes);
    let read = match patience.header {
        Some(header) => {
            let mut seen = (patience.progress)();
            while_moving(header, &patience.progress, &mut seen, reading)
                .await
                .ok_or(FrameFault::NoHeader(header))?
        }
        None => reading.await,
    };
    read.map_err(|error| match error {
        ReadExactError::FinishedEarly(0) => FrameFault::Finished,
        error => FrameFault::Gone(error.to_string()),
    })?;
    let header = FrameHeader::decode(&bytes)?;
    // More frames may follow at once on the stream of held answers alone.
    let alone = !header.flags.held;
    let body = read_body(stream, header.body_bytes as usize, limit, alone, &patience).await?;
    Ok((header, body))
}

/// What the stream has, in up to [`PIECES`]; of one that goes on after the body not more than what is `missing`.
async fn read_pieces(
    stream: &mut RecvStream,
    pieces: &mut [Bytes; PIECES],
    missing: usize,
    alone: bool,
) -> Result<Option<usize>, ReadError> {
    if alone {
        return stream.read_chunks(pieces).await;
    }
    let chunk = stream.read_chunk(missing, true).await?;
    Ok(chunk.map(|chunk| {
        pieces[0] = chunk.bytes;
        1
    }))
}

async fn read_body(
    stream: &mut RecvStream,
    expected: usize,
    limit: usize,
    alone: bool,
    patience: &Patience<impl Fn() -> u64>,
) -> Result<Bytes, FrameFault> {
    if expected > limit {
        return Err(FrameFault::TooLong {
            claimed: expected,
            limit,
        });
    }
    let mut body = BytesMut::with_capacity(expected.min(FIRST_ALLOCATION_BYTES));
    let mut pieces: [Bytes; PIECES] = core::array::from_fn(|_| Bytes::new());
    // Looked at once a frame and not at every piece, each of which would have to ask the connection.
    let mut seen = (patience.progress)();
    while body.len() < expected {
        let got = body.len();
        let stuck = FrameFault::Stuck {
            waited: patience.body,
            got,
            expected,
        };
        let reading = read_pieces(stream, &mut pieces, expected - got, alone);
        let read = while_moving(patience.body, &patience.progress, &mut seen, reading)
            .await
            .ok_or(stuck)?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use core::cell::Cell;
    use core::future::pending;

    const SHORT: Duration = Duration::from_millis(2);

    #[tokio::test]
    async fn patience_lasts_while_anything_comes() {
        let looks = Cell::new(0);
        // Grows at the first five looks.
        let progress = || {
            looks.set(looks.get() + 1);
            looks.get().min(5)
        };
        let mut seen = 0;
        let waited = while_moving(SHORT, &progress, &mut seen, pending::<()>()).await;
        assert_eq!((waited, looks.get()), (None, 6));
    }

    #[tokio::test]
    async fn a_frame_that_waits_behind_others_still_comes() {
        let (arrive, arrived) = tokio::sync::oneshot::channel();
        let (arrive, looks) = (Cell::new(Some(arrive)), Cell::new(0));
        let progress = || {
            looks.set(looks.get() + 1);
            if looks.get() == 4 {
                arrive.take().unwrap().send(7).unwrap();
            }
            looks.get()
        };
        let waited = while_moving(SHORT, &progress, &mut 0, arrived).await;
        assert_eq!(waited, Some(Ok(7)));
    }
}
