//! The task that keeps one shard connected: it serves a connection until it ends, and dials again.

use super::dial::{Dialer, Dialled, FIRST_PAUSE, Patience};
use super::error::ConnectError;
use super::link::{ControlOut, Link, write_control};
use super::shared::{Peer, Shared, What, Work};
use crate::reducer::ReduceError;
use arc_topk_common::ids::ShardId;
use arc_topk_common::wire::{Control, Intent, RefusalCode};
use arc_topk_transport::{Connection, ControlReceiver, REDIAL_CODE, TransportError, VarInt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc::unbounded_channel, oneshot};
use tokio::time::Instant;

/// Longest pause between attempts to reach a shard that was lost: workers wait for it.
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// Patience of the first attempt; it doubles up to the setting. An attempt that began before the shard's new process
/// listens sends its next packet only after a second.
const FIRST_PATIENCE: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Supervisor {
    pub(super) dialer: Arc<Dialer>,
    pub(super) shared: Arc<Shared>,
    pub(super) shard: ShardId,
}

/// A connection that the engine has.
pub(super) struct Served {
    connection: Connection,
    receiver: ControlReceiver,
}

/// How a connection ended, or the attempts to get one.
enum End {
    /// It was lost, for this cause.
    Lost(String),
    /// The shard does not want this worker.
    Refused(RefusalCode, String),
    /// Dialling it again is no help.
    Failed(ReduceError),
}

impl End {
    fn refused(code: RefusalCode, detail: String) -> Self {
        match code {
            // It may be started again.
            RefusalCode::Shutdown => Self::Lost(detail),
            _ => Self::Refused(code, detail),
        }
    }

    fn of(shard: ShardId, error: TransportError) -> Self {
        match &error {
            // A refusal's close may overtake its words.
            TransportError::Closed { code, reason, .. } => match RefusalCode::from_number(*code) {
                Some(code) => Self::refused(code, reason.clone()),
                None => Self::Lost(error.to_string()),
            },
            // Not what a shard of this release says, however often it is dialled.
            TransportError::Wire(_)
            | TransportError::TooLong { .. }
            | TransportError::Truncated { .. } => Self::Failed(ReduceError::Disconnected {
                shard: shard.0,
                detail: error.to_string(),
            }),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl Supervisor {
    /// Runs until the session ends. `served` is the first connection, number 0.
    pub(super) async fn run(self, mut served: Served) {
        let mut generation = 0;
        loop {
            let mut end = self.serve(served, generation).await;
            if self.shared.is_ending() {
                return;
            }
            generation += 1;
            if let End::Lost(cause) = end {
                match self.dial_again(cause).await {
                    Ok(again) => {
                        served = self.open(again, generation);
                        continue;
                    }
                    Err(failed) => end = failed,
                }
            }
            return self.end(end);
        }
    }

    fn end(&self, end: End) {
        match end {
            End::Refused(code, detail) => self.shared.urgent(Work::Refused {
                shard: self.shard,
                message: Control::Refused { code, detail },
            }),
            End::Failed(failure) => self.shared.fail(failure),
            End::Lost(detail) => self.shared.fail(ReduceError::Disconnected {
                shard: self.shard.0,
                detail,
            }),
        }
    }

    /// Hands the connection to the engine, which has it before all work that comes later. Inside the runtime.
    pub(super) fn open(&self, dialled: Dialled, generation: u64) -> Served {
        let Dialled {
            shard,
            peer,
            connection,
            control,
            endpoint,
            welcome,
        } = dialled;
        let (messages, queue) = unbounded_channel();
        let writer = write_control(Arc::clone(&self.shared), control.sender, queue);
        let link = Link {
            generation,
            shard,
            connection: connection.clone(),
            peer,
            control: ControlOut::new(messages, tokio::spawn(writer)),
        };
        let peer = Peer {
            connection: connection.clone(),
            endpoint,
        };
        self.shared.register(shard, peer);
        let up = What::Up { link, welcome };
        self.shared.arrived(shard, generation, up);
        Served {
            connection,
            receiver: control.receiver,
        }
    }

    /// Reads a connection's control stream until it ends.
    async fn serve(&self, served: Served, generation: u64) -> End {
        let Served {
            connection,
            receiver,
        } = served;
        let shard = self.shard;
        let end = self.listen(receiver, generation).await;
        if let End::Lost(reason) = &end {
            // If it was not the connection that ended: it must not be used any more.
            connection.close(VarInt::from_u32(REDIAL_CODE), b"dialling again");
            let reason = reason.clone();
            let down = What::Down { reason };
            self.shared.arrived(shard, generation, down);
        }
        end
    }

    async fn listen(&self, mut receiver: ControlReceiver, generation: u64) -> End {
        let shard = self.shard;
        loop {
            match receiver.recv().await {
                Ok(Some(Control::Refused { code, detail })) => {
                    return End::refused(code, detail);
                }
                Ok(Some(message)) => {
                    self.shared.control.add_received(&message);
                    self.shared
                        .arrived(shard, generation, What::Control(message));
                }
                Ok(None) => {
                    return End::Lost(
                        "the shard ended the session without a reason; look at its log".to_owned(),
                    );
                }
                Err(error) => return End::of(shard, error),
            }
        }
    }

    /// Dials until the shard welcomes this worker, or the time is over. The shard may be starting, its network or its
    /// certificates may be on their way back to order: whatever is not a refusal may pass.
    async fn dial_again(&self, first_cause: String) -> Result<Dialled, End> {
        let mut cause = "it was not tried".to_owned();
        let config = &self.dialer.config;
        let deadline = Instant::now() + config.reconnect_timeout;
        let longest = config.transport.connect_timeout;
        let (mut pause, mut handshake) = (FIRST_PAUSE, FIRST_PATIENCE.min(longest));
        while Instant::now() < deadline {
            let patience = Patience {
                handshake: handshake.min(deadline.saturating_duration_since(Instant::now())),
                welcome: longest,
            };
            let intent = self.intent().await?;
            match self
                .dialer
                .attempt(self.shard, intent, patience, REDIAL_CODE)
                .await
            {
                Ok(dialled) => return Ok(dialled),
                Err(ConnectError::Refused { code, detail, .. }) => match End::refused(code, detail)
                {
                    End::Lost(detail) => cause = detail,
                    refused => return Err(refused),
                },
                Err(ConnectError::Join { seconds, .. }) => {
                    cause =
                        format!("the shard answers, but does not say Welcome within {seconds} s");
                }
                Err(ConnectError::Transport { source, .. }) => cause = source.to_string(),
                Err(error) => cause = error.to_string(),
            }
            self.dialer.retrying(self.shard, cause.clone());
            let rest = deadline.saturating_duration_since(Instant::now());
            tokio::time::sleep(pause.min(rest)).await;
            pause = (pause * 2).min(LAST_PAUSE);
            handshake = (handshake * 2).min(longest);
        }
        Err(End::Lost(format!(
            "{first_cause}; it was dialled for {:.1} s and did not come back ({cause}); start it again, or give it longer with --reconnect-timeout-seconds",
            config.reconnect_timeout.as_secs_f64()
        )))
    }

    /// What to say in the next Hello.
    async fn intent(&self) -> Result<Intent, End> {
        let (reply, intent) = oneshot::channel();
        let shard = self.shard;
        self.shared.urgent(Work::Intent { shard, reply });
        intent.await.map_err(|_| {
            End::Failed(ReduceError::Ended {
                detail: "the engine's thread ended while a shard was dialled again".to_owned(),
            })
        })
    }
}
