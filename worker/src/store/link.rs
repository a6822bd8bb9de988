//! One shard's store: a connection that is made when it is needed, and requests that are tried again.

use super::{StoreConfig, StoreError};
use arc_topk_common::wire::{MAX_STORE_MESSAGE_BYTES, PieceMeta, StoreRequest, StoreResponse};
use arc_topk_transport::{
    Connection, Endpoint, RecvStream, SendStream, Service, TransportError, VarInt, client_endpoint,
    connect_service, connection_error, read_error, read_message, resolve, split_host, write_error,
    write_message,
};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

/// First pause between attempts; it doubles up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// What a shard answered.
#[derive(Debug)]
pub(super) enum Answer {
    Message(StoreResponse),
    /// A piece whose bytes have their hash.
    Piece(PieceMeta, Vec<u8>),
}

/// Pauses between attempts.
#[derive(Debug)]
pub(super) struct Backoff {
    pause: Duration,
    ends: Option<Instant>,
    deadline: Duration,
}

impl Backoff {
    pub(super) fn new(deadline: Duration) -> Self {
        Self {
            pause: FIRST_PAUSE,
            ends: None,
            deadline,
        }
    }

    /// Waits after a failure; false if that would pass the deadline, which runs from the first failure on.
    pub(super) async fn wait(&mut self) -> bool {
        let now = Instant::now();
        let ends = *self.ends.get_or_insert(now + self.deadline);
        if now + self.pause >= ends {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        true
    }
}

#[derive(Debug)]
struct Connected {
    connection: Connection,
    /// Drives the connection's socket.
    endpoint: Endpoint,
}

/// A shard's store.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) shard: u16,
    pub(super) address: String,
    peer: String,
    config: Arc<StoreConfig>,
    connected: Mutex<Option<Connected>>,
}

impl Link {
    pub(super) fn new(shard: u16, config: &Arc<StoreConfig>) -> Self {
        let address = config.shards[usize::from(shard)].clone();
        Self {
            shard,
            peer: format!("shard {shard} at {address}"),
            address,
            config: Arc::clone(config),
            connected: Mutex::new(None),
        }
    }

    /// Asks until there is an answer that is not "later", or the deadline has passed.
    pub(super) async fn request(
        &self,
        request: &StoreRequest,
        body: Option<&Bytes>,
    ) -> Result<Answer, StoreError> {
        let mut backoff = Backoff::new(self.config.deadline);
        loop {
            let error = match self.attempt(request, body).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !error.may_pass() || !backoff.wait().await {
                return Err(error);
            }
            tracing::debug!(shard = self.shard, %error, "the snapshot store is asked again");
        }
    }

    /// Asks once.
    pub(super) async fn attempt(
        &self,
        request: &StoreRequest,
        body: Option<&Bytes>,
    ) -> Result<Answer, StoreError> {
        let connection = self.connection().await?;
        let asked = self.ask(&connection, request, body);
        let moved = || {
            let stats = connection.stats();
            stats.frame_rx.stream.saturating_add(stats.frame_tx.stream)
        };
        match while_moving(self.config.patience, moved, asked).await {
            Some(answer) => answer,
            None => {
                connection.close(VarInt::from_u32(0), b"the request stood still");
                Err(StoreError::Stalled {
                    shard: self.shard,
                    address: self.address.clone(),
                    seconds: self.config.patience.as_secs(),
                })
            }
        }
    }

    async fn connection(&self) -> Result<Connection, StoreError> {
        let mut connected = self.connected.lock().await;
        if let Some(there) = &*connected
            && there.connection.close_reason().is_none()
        {
            return Ok(there.connection.clone());
        }
        let made = self.connect().await.map_err(|source| self.failed(source))?;
        let connection = made.connection.clone();
        *connected = Some(made);
        Ok(connection)
    }

    async fn connect(&self) -> Result<Connected, TransportError> {
        let config = &self.config;
        let (name, _) = split_host(&self.address)?;
        let target = resolve(&self.address).await?;
        let endpoint = client_endpoint(target, &config.transport)?;
        let (identity, transport) = (&config.identity.current(), &config.transport);
        let service = Service::Store;
        let connection =
            connect_service(&endpoint, target, name, identity, transport, service).await?;
        Ok(Connected {
            connection,
            endpoint,
        })
    }

    async fn ask(
        &self,
        connection: &Connection,
        request: &StoreRequest,
        body: Option<&Bytes>,
    ) -> Result<Answer, StoreError> {
        let opened = connection.open_bi().await;
        let (mut send, mut recv) =
            opened.map_err(|e| self.failed(connection_error(&self.peer, &e)))?;
        match self.send(&mut send, request, body).await {
            // A shard that knows its answer already stops reading, and says why.
            Ok(()) | Err(TransportError::StreamReset { .. }) => {}
            Err(error) => return Err(self.failed(error)),
        }
        self.receive(&mut recv).await
    }

    async fn send(
        &self,
        send: &mut SendStream,
        request: &StoreRequest,
        body: Option<&Bytes>,
    ) -> Result<(), TransportError> {
        write_message(send, &request.encode(), &self.peer).await?;
        if let Some(body) = body {
            let written = send.write_chunk(body.clone()).await;
            written.map_err(|e| write_error(&self.peer, &e))?;
        }
        // Already finished means that the shard stopped it.
        let _stopped = send.finish();
        Ok(())
    }

    async fn receive(&self, recv: &mut RecvStream) -> Result<Answer, StoreError> {
        let what = "an answer of the snapshot store";
        let message = read_message(recv, MAX_STORE_MESSAGE_BYTES, what, &self.peer).await;
        let message = message.map_err(|source| self.failed(source))?;
        let message = message.ok_or(self.failed(TransportError::Truncated { what, missing: 1 }))?;
        let message = StoreResponse::decode(&message).map_err(|error| self.failed(error.into()))?;
        match message {
            StoreResponse::Failed { code, detail } => Err(StoreError::Refused {
                shard: self.shard,
                address: self.address.clone(),
                code,
                detail,
            }),
            StoreResponse::Piece(meta) => {
                let bytes = self.read_piece(recv, &meta).await?;
                Ok(Answer::Piece(meta, bytes))
            }
            other => Ok(Answer::Message(other)),
        }
    }

    /// The bytes of a piece, checked; memory grows with what arrives.
    async fn read_piece(
        &self,
        recv: &mut RecvStream,
        meta: &PieceMeta,
    ) -> Result<Vec<u8>, StoreError> {
        let damaged = |detail: &str| StoreError::Damaged {
            snapshot: meta.snapshot,
            owner: meta.owner,
            detail: format!("{} {detail}", self.piece_name(meta)),
        };
        let (mut bytes, mut hash) = (Vec::new(), Sha256::new());
        while let Some(chunk) = recv
            .read_chunk(usize::MAX, true)
            .await
            .map_err(|e| self.failed(read_error(&self.peer, &e)))?
        {
            let length = (bytes.len() + chunk.bytes.len()) as u64;
            if length > meta.piece_bytes {
                return Err(damaged("has more bytes than it should"));
            }
            hash.update(&chunk.bytes);
            bytes.extend_from_slice(&chunk.bytes);
        }
        if bytes.len() as u64 != meta.piece_bytes {
            return Err(damaged("was cut short"));
        }
        if hash.finalize().as_slice() != meta.piece_sha256 {
            return Err(damaged("does not have its hash"));
        }
        Ok(bytes)
    }

    fn piece_name(&self, meta: &PieceMeta) -> String {
        format!(
            "piece {} of {} on shard {} at {}",
            meta.piece, meta.pieces, self.shard, self.address
        )
    }

    pub(super) fn failed(&self, source: TransportError) -> StoreError {
        let (shard, address) = (self.shard, self.address.clone());
        match source {
            TransportError::Alpn { .. } => StoreError::NoStore { shard, address },
            source => StoreError::Transport {
                shard,
                address,
                source,
            },
        }
    }

    pub(super) fn unexpected(&self, answer: &Answer) -> StoreError {
        let answer = match answer {
            Answer::Message(StoreResponse::Stored) => "Stored",
            Answer::Message(StoreResponse::Listing(_)) => "a listing",
            Answer::Message(_) => "another message",
            Answer::Piece(..) => "another piece",
        };
        StoreError::Answer {
            shard: self.shard,
            address: self.address.clone(),
            answer: answer.to_owned(),
        }
    }

    /// Closes the connection, if there is one, and waits a little for the shard to take that.
    pub(super) async fn close(&self, patience: Duration) {
        if let Some(connected) = self.connected.lock().await.take() {
            connected.connection.close(VarInt::from_u32(0), b"done");
            let _lost_shard_never_answers = timeout(patience, connected.endpoint.wait_idle()).await;
        }
    }
}

/// Waits for `future` until `moved` has stood still for as long as `patience`.
async fn while_moving<T>(
    patience: Duration,
    moved: impl Fn() -> u64,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut seen = moved();
    loop {
        if let Ok(output) = timeout(patience, &mut future).await {
            return Some(output);
        }
        if std::mem::replace(&mut seen, moved()) == seen {
            return None;
        }
    }
}
