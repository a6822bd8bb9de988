//! Ctrl-C and SIGTERM, and the end of the process that started this one.

use super::error::{CliError, INTERRUPTED};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals closer together are one request.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// Whether this process was asked to stop.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop {
    asked: Arc<AtomicBool>,
    in_order: Arc<AtomicBool>,
}

impl Stop {
    /// Starts to listen, on a thread of its own. Until [`Stop::end_in_order`] a signal ends the process at once; after
    /// it the first signal is a request, and the second ends the process at once.
    pub(super) fn listen(until_stdin_ends: bool) -> Result<Self, CliError> {
        let stop = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build();
        let runtime = runtime.map_err(|source| CliError::System {
            action: "start the runtime",
            source,
        })?;
        let listener = stop.clone();
        let listen = move || {
            runtime.block_on(async move {
                let Ok(mut signals) = Signals::new() else {
                    return;
                };
                loop {
                    signals.next().await;
                    listener.ask();
                }
            });
        };
        let spawned = std::thread::Builder::new()
            .name("arc-signals".into())
            .spawn(listen);
        spawned.map_err(|source| CliError::System {
            action: "start a thread",
            source,
        })?;
        if until_stdin_ends {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let _ended = io::copy(&mut io::stdin(), &mut io::sink());
                stop.ask();
            });
        }
        Ok(stop)
    }

    /// From now on the program asks [`Stop::asked`] and ends in order.
    pub(super) fn end_in_order(&self) {
        self.in_order.store(true, Ordering::SeqCst);
    }

    /// From now on a signal ends the process at once again. One that was asked for in between does so, too.
    pub(super) fn end_at_once(&self) {
        self.in_order.store(false, Ordering::SeqCst);
        if self.asked() {
            std::process::exit(i32::from(INTERRUPTED));
        }
    }

    /// Whether to stop.
    pub(super) fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    fn ask(&self) {
        let again = self.asked.swap(true, Ordering::SeqCst);
        if again || !self.in_order.load(Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    }
}

/// SIGINT and SIGTERM.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    last: Option<Instant>,
}

impl Signals {
    /// Takes both over from their default, which is to end the process. Needs a tokio runtime.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            last: None,
        })
    }

    /// Waits for the next one. Those that come within a second of the last are the same request: `timeout`, for one,
    /// signals a process and then its whole group.
    pub(super) async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
            }
            let now = Instant::now();
            if self
                .last
                .replace(now)
                .is_none_or(|last| now - last > ONE_REQUEST)
            {
                return;
            }
        }
    }
}
