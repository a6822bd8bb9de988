//! Who is late, and whether that is a habit.

use core::time::Duration;

/// Rounds that are looked at.
const ROUNDS: u32 = 20;
/// Late in so many of them is a habit; a straggler that is late in at most half as many has lost it.
const HABIT: u32 = 15;

/// One member's record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Lateness {
    /// The newest rounds, the newest lowest; 1: closed without it.
    recent: u32,
    pub(super) persistent: bool,
    /// Phases that closed without it.
    pub(super) missed: u64,
    /// Longest time by which a contribution of its came after the close.
    pub(super) worst: Duration,
}

impl Lateness {
    /// A phase closed with or without the member. Says when its standing changes.
    pub(super) fn closed(&mut self, in_time: bool) -> Option<bool> {
        self.recent = (self.recent << 1 | u32::from(!in_time)) & ((1 << ROUNDS) - 1);
        self.missed += u64::from(!in_time);
        let late = self.recent.count_ones();
        let persistent = late >= HABIT || (self.persistent && late > HABIT / 2);
        let changed = persistent != self.persistent;
        self.persistent = persistent;
        changed.then_some(persistent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_habit_is_said_once_and_lost_again() {
        let mut lateness = Lateness::default();
        let said: Vec<bool> = (0..40).filter_map(|_| lateness.closed(false)).collect();
        assert_eq!((said, lateness.missed), (vec![true], 40));
        let said: Vec<bool> = (0..40).filter_map(|_| lateness.closed(true)).collect();
        assert_eq!(said, [false]);
    }

    #[test]
    fn a_hiccup_is_no_habit() {
        let mut lateness = Lateness::default();
        assert!((0..200).all(|round| lateness.closed(round % 3 != 0).is_none()));
    }
}
