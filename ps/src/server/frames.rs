//! Reads round frames with a limit on length and on patience.
//!
//! What may not stand still is the connection, not the stream: a worker's streams have priorities, so that a packet of one
//! that was lost is sent again after all data of higher ones, and on a slow link that takes longer than any patience.
//! A connection that trickles stands still: otherwise one byte now and then would hold a round open for ever.

use arc_topk_common::wire::{FrameHeader, HEADER_BYTES, WireError};
use arc_topk_transport::{ReadError, ReadExactError, RecvStream};
use bytes::{Bytes, BytesMut};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use tokio::time::timeout;

/// Memory that a claimed length alone obtains.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Pieces taken from the stream at once.
const PIECES: usize = 32;

/// A connection that moves fewer bytes than this in the time of one patience counts as standing still. With the default of
/// 10 s that is 13 kbit/s, a hundredth of the slowest link that can train anything.
pub(super) const LEAST_BYTES: u64 = 16 << 10;

/// How long a connection may bring nothing while a frame is awaited.
pub(super) struct Patience<'a> {
    /// Bytes that were read from all round streams of the connection.
    pub(super) received: &'a AtomicU64,
    /// Until a header; `None` waits as long as the connection lives.
    pub(super) header: Option<Duration>,
    /// Between pieces of a body.
    pub(super) body: Duration,
}

impl Patience<'_> {
    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn read(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Waits for `future` until `progress` (bytes) has grown by less than [`LEAST_BYTES`] for as long as `patience`.
pub(super) async fn while_moving<T>(
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
        let now = progress();
        if now.saturating_sub(*seen) < LEAST_BYTES {
            return None;
        }
        *seen = now;
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
        "an answer was not taken for {:.1} s: a worker reads the answers to its frames; it is stuck, or its link is gone", .0.as_secs_f64()
    )]
    NotTaken(Duration),
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
    patience: Patience<'_>,
) -> Result<(FrameHeader, Bytes), FrameFault> {
    let mut bytes = [0; HEADER_BYTES];
    let reading = stream.read_exact(&mut bytes);
    let read = match patience.header {
        Some(header) => {
            let mut seen = patience.received();
            while_moving(header, &|| patience.received(), &mut seen, reading)
                .await
                .ok_or(FrameFault::NoHeader(header))?
        }
        None => reading.await,
    };
    read.map_err(|error| match error {
        ReadExactError::FinishedEarly(0) => FrameFault::Finished,
        error => FrameFault::Gone(error.to_string()),
    })?;
    patience.read(HEADER_BYTES);
    let header = FrameHeader::decode(&bytes)?;
    // More frames may follow at once on the stream of held answers alone.
    let alone = !header.flags.held;
    let expected = header.body_bytes as usize;
    let body = read_body(stream, expected, limit, alone, &patience).await?;
    Ok((header, body))
}

async fn read_body(
    stream: &mut RecvStream,
    expected: usize,
    limit: usize,
    alone: bool,
    patience: &Patience<'_>,
) -> Result<Bytes, FrameFault> {
    if expected > limit {
        return Err(FrameFault::TooLong {
            claimed: expected,
            limit,
        });
    }
    let mut body = BytesMut::with_capacity(expected.min(FIRST_ALLOCATION_BYTES));
    let mut seen = patience.received();
    // One patience for the whole body: with one for every piece, a piece now and then would be enough.
    let reading = read_pieces(stream, &mut body, expected, alone, patience);
    match while_moving(patience.body, &|| patience.received(), &mut seen, reading).await {
        Some(read) => read?,
        None => {
            return Err(FrameFault::Stuck {
                waited: patience.body,
                got: body.len(),
                expected,
            });
        }
    }
    Ok(body.freeze())
}

/// Fills `body` up to what is expected, and leaves what comes after it if that is another frame.
async fn read_pieces(
    stream: &mut RecvStream,
    body: &mut BytesMut,
    expected: usize,
    alone: bool,
    patience: &Patience<'_>,
) -> Result<(), FrameFault> {
    let mut pieces: [Bytes; PIECES] = core::array::from_fn(|_| Bytes::new());
    while body.len() < expected {
        let got = body.len();
        let read = if alone {
            stream.read_chunks(&mut pieces).await
        } else {
            one_piece(stream, &mut pieces, expected - got).await
        };
        let Some(count) = read.map_err(|error| FrameFault::Gone(error.to_string()))? else {
            return Err(FrameFault::Truncated { got, expected });
        };
        for piece in &mut pieces[..count] {
            let piece = core::mem::take(piece);
            patience.read(piece.len());
            if body.len() + piece.len() > expected {
                return Err(FrameFault::TooLong {
                    claimed: body.len() + piece.len(),
                    limit: expected,
                });
            }
            grow(body, piece.len(), expected);
            body.extend_from_slice(&piece);
        }
    }
    Ok(())
}

/// The next piece, of no more than what is `missing`.
async fn one_piece(
    stream: &mut RecvStream,
    pieces: &mut [Bytes; PIECES],
    missing: usize,
) -> Result<Option<usize>, ReadError> {
    let chunk = stream.read_chunk(missing, true).await?;
    Ok(chunk.map(|chunk| {
        pieces[0] = chunk.bytes;
        1
    }))
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
            LEAST_BYTES * looks.get().min(5)
        };
        let mut seen = 0;
        let waited = while_moving(SHORT, &progress, &mut seen, pending::<()>()).await;
        assert_eq!((waited, looks.get()), (None, 6));
    }

    #[tokio::test]
    async fn a_trickle_is_no_movement() {
        let looks = Cell::new(0);
        let progress = || {
            looks.set(looks.get() + 1);
            looks.get() * (LEAST_BYTES - 1)
        };
        let waited = while_moving(SHORT, &progress, &mut 0, pending::<()>()).await;
        assert_eq!((waited, looks.get()), (None, 1));
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
            LEAST_BYTES * looks.get()
        };
        let waited = while_moving(SHORT, &progress, &mut 0, arrived).await;
        assert_eq!(waited, Some(Ok(7)));
    }
}
