//! Connections of the store: one request on each stream.

use super::{BLOCK_BYTES, Incoming, Opened, Sink, Store, StoreFault, blocking};
use crate::server::Hub;
use crate::server::frames::while_moving;
use arc_topk_common::metrics::{Flow, StoreOutcome, StoreRequestKind};
use arc_topk_common::wire::{
    MAX_STORE_MESSAGE_BYTES, Manifest, PieceMeta, SnapshotId, StoreCode, StoreRequest,
    StoreResponse,
};
use arc_topk_transport::{
    Connection, RecvStream, SendStream, VarInt, connection_error, read_message, write_message,
};
use bytes::{Bytes, BytesMut};
use core::sync::atomic::Ordering;
use std::sync::Arc;
use tokio::task::JoinSet;

/// Requests that a connection may have open.
const STREAMS: u32 = 8;
/// Bytes that a peer may send before they are read.
const WINDOW_BYTES: u32 = 16 << 20;
const PEER: &str = "the worker";

/// One of the connections that the store bears.
struct Place(Arc<Store>);

impl Place {
    /// No more than half of what the shard bears, so that training always finds room.
    fn take(hub: &Hub) -> Option<Self> {
        let limit = hub.connections_limit.div_ceil(2);
        let free = |taken| (taken < limit).then_some(taken + 1);
        let taken = &hub.store.connections;
        taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
            .ok()
            .map(|_| Self(Arc::clone(&hub.store)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection of the store, from its handshake to its end.
pub(in crate::server) async fn serve(hub: Arc<Hub>, connection: Connection, peer: &str) {
    let Some(_held_to_the_end) = Place::take(&hub) else {
        let text = b"the snapshot store has as many connections as it bears: try again";
        return connection.close(VarInt::from_u32(StoreCode::Busy as u32), text);
    };
    connection.set_receive_window(WINDOW_BYTES.into());
    connection.set_max_concurrent_bi_streams(STREAMS.into());
    let mut requests = JoinSet::new();
    let end = loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                while requests.try_join_next().is_some() {}
                let request = Request {
                    hub: Arc::clone(&hub),
                    connection: connection.clone(),
                    send,
                    recv,
                };
                requests.spawn(request.serve());
            }
            Err(error) => break connection_error(peer, &error),
        }
    };
    tracing::debug!(peer, %end, "a connection of the snapshot store ended");
    requests.shutdown().await;
}

struct Request {
    hub: Arc<Hub>,
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
}

impl Request {
    async fn serve(mut self) {
        let request = match self.request().await {
            Ok(request) => request,
            Err(fault) => return self.answer(StoreRequestKind::Unreadable, Err(fault)).await,
        };
        self.hub.store.ready().await;
        let (kind, done) = match request {
            StoreRequest::Put(meta) => (StoreRequestKind::Put, self.put(meta).await),
            StoreRequest::Get {
                snapshot,
                owner,
                piece,
                pieces,
            } => {
                let got = self.get(snapshot, (owner, pieces, piece)).await;
                (StoreRequestKind::Get, got)
            }
            StoreRequest::List => (StoreRequestKind::List, Ok(Some(self.listing()))),
            StoreRequest::Commit(manifest) => {
                (StoreRequestKind::Commit, self.commit(manifest).await)
            }
        };
        self.answer(kind, done).await;
    }

    async fn request(&mut self) -> Result<StoreRequest, StoreFault> {
        let what = "a request of the snapshot store";
        let reading = read_message(&mut self.recv, MAX_STORE_MESSAGE_BYTES, what, PEER);
        let progress = progress(&self.connection);
        let patience = self.hub.timeouts.header;
        let read = while_moving(patience, &progress, &mut progress(), reading).await;
        let read = read.ok_or_else(|| StoreFault::Gone("no request came".to_owned()))?;
        let message = read.map_err(|error| StoreFault::Gone(error.to_string()))?;
        let message = message.ok_or_else(|| StoreFault::Gone("no request came".to_owned()))?;
        StoreRequest::decode(&message).map_err(|error| StoreFault::Unreadable(error.to_string()))
    }

    /// Says how it ended; `None`: it was said already.
    async fn answer(
        &mut self,
        kind: StoreRequestKind,
        done: Result<Option<StoreResponse>, StoreFault>,
    ) {
        let outcome = match &done {
            Ok(_) => StoreOutcome::Done,
            Err(StoreFault::Refused(_) | StoreFault::Unreadable(_)) => StoreOutcome::Refused,
            Err(_) => StoreOutcome::Failed,
        };
        self.hub.metrics.store_request(kind, outcome);
        self.hub.observe_store();
        let response = match done {
            Ok(None) => return,
            Ok(Some(response)) => response,
            Err(fault) => {
                let peer = self.connection.remote_address();
                tracing::warn!(%peer, request = kind.label(), error = %fault, "a request of the snapshot store was not done");
                StoreResponse::Failed {
                    code: fault.code(),
                    detail: fault.to_string(),
                }
            }
        };
        let message = response.encode();
        let sending = write_message(&mut self.send, &message, PEER);
        let progress = sent(&self.connection);
        let patience = self.hub.timeouts.body;
        // A peer that does not read its answer, or is gone, is not waited for.
        let _unread = while_moving(patience, &progress, &mut progress(), sending).await;
        let _stopped = self.send.finish();
    }

    fn listing(&self) -> StoreResponse {
        StoreResponse::Listing(self.hub.store.listing())
    }

    async fn commit(&self, manifest: Manifest) -> Result<Option<StoreResponse>, StoreFault> {
        let store = Arc::clone(&self.hub.store);
        blocking(move || store.commit(manifest)).await?;
        Ok(Some(StoreResponse::Stored))
    }

    async fn put(&mut self, meta: PieceMeta) -> Result<Option<StoreResponse>, StoreFault> {
        let store = Arc::clone(&self.hub.store);
        let (incoming, removals) = store.begin(&meta)?;
        let mut sink = blocking({
            let store = Arc::clone(&store);
            move || {
                store.remove(&removals);
                Sink::new(&store, &meta)
            }
        })
        .await?;
        while let Some(block) = self.block().await? {
            if !incoming.is_wanted() {
                let snapshot = incoming.ticket.snapshot;
                return Err(crate::store::refusal::Refusal::Dropped(snapshot).into());
            }
            let bytes = block.len() as u64;
            sink = blocking(move || sink.write(block).map(|()| sink)).await?;
            self.hub.metrics.add_store_bytes(Flow::Up, bytes);
        }
        let publish = move |incoming: Incoming| store.publish(&incoming, sink);
        blocking(move || publish(incoming)).await?;
        Ok(Some(StoreResponse::Stored))
    }

    /// The next bytes of a Put; `None` at their end.
    async fn block(&mut self) -> Result<Option<Bytes>, StoreFault> {
        let progress = progress(&self.connection);
        let patience = self.hub.timeouts.body;
        let mut seen = progress();
        let mut block = BytesMut::new();
        while block.len() < BLOCK_BYTES {
            let reading = self.recv.read_chunk(BLOCK_BYTES - block.len(), true);
            let read = while_moving(patience, &progress, &mut seen, reading).await;
            let read = read.ok_or_else(|| StoreFault::Gone("its bytes stood still".to_owned()))?;
            match read.map_err(|error| StoreFault::Gone(error.to_string()))? {
                Some(chunk) => block.extend_from_slice(&chunk.bytes),
                None => break,
            }
        }
        Ok((!block.is_empty()).then(|| block.freeze()))
    }

    async fn get(
        &mut self,
        snapshot: SnapshotId,
        key: crate::store::index::PieceKey,
    ) -> Result<Option<StoreResponse>, StoreFault> {
        let store = Arc::clone(&self.hub.store);
        let mut opened = blocking(move || store.open_piece(snapshot, key)).await?;
        let message = StoreResponse::Piece(opened.meta.clone()).encode();
        let gone = |error: &dyn core::fmt::Display| StoreFault::Gone(error.to_string());
        let written = write_message(&mut self.send, &message, PEER).await;
        written.map_err(|error| gone(&error))?;
        let meta = opened.meta.clone();
        loop {
            let (next, still) = next(opened).await?;
            opened = still;
            let Some(block) = next else {
                break;
            };
            let bytes = block.len() as u64;
            let progress = sent(&self.connection);
            let writing = self.send.write_chunk(block);
            let patience = self.hub.timeouts.body;
            let written = while_moving(patience, &progress, &mut progress(), writing).await;
            let written = written.ok_or_else(|| gone(&"it reads nothing"))?;
            written.map_err(|error| gone(&error))?;
            self.hub.metrics.add_store_bytes(Flow::Down, bytes);
        }
        // The peer sees the missing bytes or the wrong hash itself.
        let _stopped = self.send.finish();
        if !opened.came_whole() {
            self.hub.store.forget_piece(&meta);
            return Err(StoreFault::Changed(meta.snapshot));
        }
        Ok(None)
    }
}

/// Reads the next block. A file that cannot be read any further ends there, and is then not whole.
async fn next(mut opened: Opened) -> Result<(Option<Bytes>, Opened), StoreFault> {
    blocking(move || match opened.next() {
        Ok(block) => Ok((block, opened)),
        Err(error) => {
            tracing::warn!(%error, snapshot = %opened.meta.snapshot, "a piece cannot be read");
            Ok((None, opened))
        }
    })
    .await
}

/// Grows with everything that the connection's streams bring.
fn progress(connection: &Connection) -> impl Fn() -> u64 + use<> {
    let connection = connection.clone();
    move || connection.stats().frame_rx.stream
}

/// Grows with everything that is sent on the connection's streams.
fn sent(connection: &Connection) -> impl Fn() -> u64 + use<> {
    let connection = connection.clone();
    move || connection.stats().frame_tx.stream
}
