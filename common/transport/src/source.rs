//! Where a process takes its identity from, and how one is replaced while it runs.

use crate::certs::Role;
use crate::error::TransportError;
use crate::identity::{Identity, Paths, Pem};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// What a process shows to its peers, now and later.
///
/// Clones share what they have seen: a set of files is read, judged and told of once.
#[derive(Clone, Debug)]
pub enum IdentitySource {
    /// One that stays.
    Fixed(Identity),
    /// Files that may be replaced at any time.
    Files(Arc<IdentityFiles>),
}

impl From<Identity> for IdentitySource {
    fn from(identity: Identity) -> Self {
        Self::Fixed(identity)
    }
}

impl IdentitySource {
    /// Loads the files and will look at them again. See [`Identity::load_files`] and [`Identity::check_as`].
    ///
    /// # Errors
    /// The files do not load, or no peer would accept the certificate in this role.
    pub fn files(ca: &Path, cert: &Path, key: &Path, role: Role) -> Result<Self, TransportError> {
        let files = IdentityFiles::load(Paths::new(ca, cert, key), role)?;
        Ok(Self::Files(Arc::new(files)))
    }

    /// The newest identity for a connection that begins now. Files that do not fit are logged, once, and the identity
    /// before them is given.
    #[must_use]
    pub fn current(&self) -> Identity {
        self.after(IdentityFiles::look)
    }

    /// The identity that the files hold by two looks of this method that saw the same: for who watches it and connects to nobody.
    #[must_use]
    pub fn settled(&self) -> Identity {
        self.after(IdentityFiles::look_patiently)
    }

    fn after(&self, look: fn(&IdentityFiles) -> Look) -> Identity {
        match self {
            Self::Fixed(identity) => identity.clone(),
            Self::Files(files) => match look(files) {
                Look::Taken(identity) => identity,
                Look::Same | Look::Kept(_) => files.seen().current.clone(),
            },
        }
    }
}

/// What a look at the files showed.
#[derive(Clone, Debug)]
pub enum Look {
    /// What was there before.
    Same,
    /// A new identity, which is the current one from now on.
    Taken(Identity),
    /// Something that does not fit; the identity before it stays.
    Kept(TransportError),
}

/// Three files and what was last found in them.
#[derive(Debug)]
pub struct IdentityFiles {
    paths: Paths,
    role: Role,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    current: Identity,
    /// What was judged last, good or bad.
    judged: Result<Pem, TransportError>,
    /// What the last patient look saw, if that is something else.
    unsettled: Option<Result<Pem, TransportError>>,
}

impl IdentityFiles {
    fn load(paths: Paths, role: Role) -> Result<Self, TransportError> {
        let pem = paths.read()?;
        let current = judge(&paths, role, &pem)?;
        let seen = Seen {
            current,
            judged: Ok(pem),
            unsettled: None,
        };
        Ok(Self {
            paths,
            role,
            seen: Mutex::new(seen),
        })
    }

    /// Takes what is there at once.
    #[must_use]
    pub fn look(&self) -> Look {
        let found = self.paths.read();
        self.judge(&mut self.seen(), found)
    }

    /// Takes what is there if the last patient look saw the same: three files are not replaced in one instant, and what is
    /// there in between is no fault.
    #[must_use]
    pub fn look_patiently(&self) -> Look {
        let found = self.paths.read();
        let mut seen = self.seen();
        if found != seen.judged && seen.unsettled.as_ref() != Some(&found) {
            seen.unsettled = Some(found);
            return Look::Same;
        }
        self.judge(&mut seen, found)
    }

    fn judge(&self, seen: &mut Seen, found: Result<Pem, TransportError>) -> Look {
        seen.unsettled = None;
        if found == seen.judged {
            return Look::Same;
        }
        let judged = match &found {
            Ok(pem) => judge(&self.paths, self.role, pem),
            Err(error) => Err(error.clone()),
        };
        seen.judged = found;
        let cert = self.paths.cert.display();
        match judged {
            Ok(identity) => {
                tracing::info!(%cert, "new certificate files are in use for new connections");
                seen.current = identity.clone();
                Look::Taken(identity)
            }
            Err(error) => {
                tracing::error!(%cert, %error, "the certificate files were changed but cannot be used; those from before stay in use");
                Look::Kept(error)
            }
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        // What a panic left is whole: every field is replaced in one assignment.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(paths: &Paths, role: Role, pem: &Pem) -> Result<Identity, TransportError> {
    let identity = Identity::parse(paths.clone(), pem)?;
    identity.check_as(role)?;
    Ok(identity)
}
