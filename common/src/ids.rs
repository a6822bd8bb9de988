//! Newtypes for the field's terms, so that a rank is never taken for a shard.

use core::fmt;
use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl $name {
            /// The id as an index into a table of its kind.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

id!(
    /// Position of a worker in the order in which contributions are summed. A run gives each rank once: those that
    /// start it are `0..world size`, one that joins later gets the next number, and none is given again.
    Rank(u16)
);
id!(
    /// Position of a shard in the list that every worker was given. Shard 0 coordinates.
    ShardId(u16)
);
id!(
    /// Position of a tensor in the registered parameter list. Names the tensor to Philox.
    TensorId(u32)
);
id!(
    /// Position of a bucket in the plan.
    BucketId(u16)
);
id!(
    /// Version of the membership. It grows by one whenever a worker joins, leaves or is lost.
    Epoch(u32)
);
id!(
    /// Number of the round, counted from 0 and shared by all workers. A skipped update still uses one up.
    Step(u64)
);

/// Names one start of a job: sixteen random bytes of the worker that came first. Members of another start are told to
/// join again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RunId(pub [u8; 16]);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
