//! Bugs on purpose: if the simulator does not find these, it would not find others.
//!
//! They sit around the machines, on what goes in and out, so that no release holds any of them.

/// A bug to be found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub enum Sabotage {
    /// A shard adds one contribution twice.
    AddTwice,
    /// What is sent again after a reconnection is added again.
    CountAgain,
    /// A fresh shard ignores what workers hold.
    ForgetHeld,
    /// A fresh shard does not wait to be told.
    NoRetelling,
    /// A roster leaves out a rank.
    WrongRoster,
    /// A worker believes that it was always counted.
    CommitUncounted,
    /// A worker keeps no answers.
    KeepNothing,
    /// A worker passes no membership on.
    SkipRelays,
    /// A shard believes whoever comes last about the members.
    TakeStale,
    /// The mean is over the members, not over those that contributed.
    DivideByMembers,
    /// A late worker is told that it was counted.
    CountLate,
    /// Contributions are added as they come.
    ArrivalOrder,
    /// A shard sends one worker another answer.
    TwoAnswers,
    /// A shard loses a frame.
    LoseFrame,
    /// A shard never notices that a connection is gone.
    WaitForEver,
    /// A worker that is cut off from one shard does not say so to the others.
    SkipAway,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::AddTwice,
        Self::CountAgain,
        Self::ForgetHeld,
        Self::NoRetelling,
        Self::WrongRoster,
        Self::CommitUncounted,
        Self::KeepNothing,
        Self::SkipRelays,
        Self::TakeStale,
        Self::DivideByMembers,
        Self::CountLate,
        Self::ArrivalOrder,
        Self::TwoAnswers,
        Self::LoseFrame,
        Self::WaitForEver,
        Self::SkipAway,
    ];

    /// Whether a job may be the same with it: a shard that is told nothing of the members by workers hears of them from
    /// whoever comes, and only waits longer for those that are gone when it is restarted.
    #[must_use]
    pub fn is_harmless(self) -> bool {
        self == Self::SkipRelays
    }
}
