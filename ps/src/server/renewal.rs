//! Takes new certificate files while the shard runs, and says in time when a certificate ends.

use super::Hub;
use arc_topk_common::metrics::CertificateRenewal;
use arc_topk_transport::{Identity, IdentitySource, Listener, Look};
use core::time::Duration;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, watch};

/// Between two looks at the files.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// With less left, the log warns.
const SHORT: Duration = Duration::from_secs(7 * 86_400);
/// Between two such warnings.
const WARN_INTERVAL: Duration = Duration::from_secs(86_400);

pub(super) struct Renewal {
    pub(super) hub: Arc<Hub>,
    pub(super) listener: Listener,
    pub(super) source: IdentitySource,
    /// Asks for a look at once.
    pub(super) hurry: Arc<Notify>,
}

impl Renewal {
    /// Runs until the server stops. `identity` is the one in use.
    pub(super) async fn run(mut self, identity: Identity, mut stopped: watch::Receiver<bool>) {
        let mut interval = tokio::time::interval(LOOK_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut end = self.end_of(&identity);
        let mut warned: Option<Instant> = None;
        loop {
            if warned.is_none_or(|at| at.elapsed() >= WARN_INTERVAL) && warn(end) {
                warned = Some(Instant::now());
            }
            let hurried = tokio::select! {
                _ = interval.tick() => false,
                () = self.hurry.notified() => true,
                _ = stopped.wait_for(|stop| *stop) => return,
            };
            if let Some(identity) = self.look(hurried) {
                end = self.end_of(&identity);
                warned = None;
            }
        }
    }

    /// The new identity, if there is one and new connections see it.
    fn look(&mut self, hurried: bool) -> Option<Identity> {
        let look = match &self.source {
            IdentitySource::Fixed(_) => Look::Same,
            IdentitySource::Files(files) if hurried => files.look(),
            IdentitySource::Files(files) => files.look_patiently(),
        };
        let outcome = match look {
            Look::Same => return None,
            Look::Kept(_) => Err(()),
            Look::Taken(identity) => match self.listener.renew(&identity) {
                Ok(()) => Ok(identity),
                Err(error) => {
                    tracing::error!(%error, "the new certificate cannot be used; the one from before stays in use");
                    Err(())
                }
            },
        };
        let counted = match &outcome {
            Ok(_) => CertificateRenewal::Taken,
            Err(()) => CertificateRenewal::Refused,
        };
        self.hub.metrics.certificate_renewed(counted);
        outcome.ok()
    }

    /// Shows when the certificate ends.
    pub(super) fn end_of(&self, identity: &Identity) -> Option<SystemTime> {
        // Loading has looked at the end: it can be read.
        let end = identity.not_after().ok()?;
        let timestamp = end.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.hub.metrics.set_certificate_expiry(timestamp);
        Some(end)
    }
}

/// Whether there was something to warn of.
fn warn(end: Option<SystemTime>) -> bool {
    let Some(left) = end.map(|end| end.duration_since(SystemTime::now())) else {
        return false;
    };
    match left {
        Err(_) => {
            tracing::error!(
                "the certificate has expired: workers can no longer connect; renew it with `arc-ps certs --renew` and copy it to where the old one is"
            );
        }
        Ok(left) if left < SHORT => {
            let hours = left.as_secs() / 3600;
            tracing::warn!(
                hours,
                "the certificate expires soon; renew it with `arc-ps certs --renew` and copy it to where the old one is"
            );
        }
        Ok(_) => return false,
    }
    true
}
