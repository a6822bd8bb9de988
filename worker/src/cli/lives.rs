//! When a process of a local job that died is started again.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// The lives of one process.
#[derive(Debug)]
pub(super) struct Lives {
    started: Instant,
    /// One that fails sooner by itself cannot start at all.
    least: Duration,
    /// When it was started again.
    restarts: Vec<Instant>,
    /// This life has finished a step.
    pub(super) took_part: bool,
    /// It was asked to end, since the job is over.
    pub(super) dismissed: bool,
}

impl Lives {
    /// Most restarts within [`Lives::WINDOW`].
    const MOST: usize = 5;
    const WINDOW: Duration = Duration::from_secs(60);
    /// Within which this project's own programs are ready.
    pub(super) const LEAST_LIFE: Duration = Duration::from_secs(2);
    /// Any other program may load much before it fails: importing PyTorch takes that long on a busy machine.
    pub(super) const LEAST_LIFE_OF_PROGRAM: Duration = Duration::from_secs(30);

    /// The first life begins. One that fails by itself within `least` is not started again.
    pub(super) fn new(now: Instant, least: Duration) -> Self {
        Self {
            started: now,
            least,
            restarts: Vec::new(),
            took_part: false,
            dismissed: false,
        }
    }

    /// Whether it was started again.
    pub(super) fn is_again(&self) -> bool {
        !self.restarts.is_empty()
    }

    /// Begins another life after one that ended with `status`, unless that would help nobody. Returns its number.
    pub(super) fn next(&mut self, now: Instant, status: ExitStatus) -> Option<usize> {
        let wrong_usage_or_asked = matches!(status.code(), Some(2 | 130));
        let failed = status.code().is_some_and(|code| code != 0);
        let stillborn = failed && now - self.started < self.least;
        let recent = |at: &&Instant| now - **at < Self::WINDOW;
        let often = self.restarts.iter().filter(recent).count() >= Self::MOST;
        if wrong_usage_or_asked || stillborn || often {
            return None;
        }
        self.restarts.push(now);
        (self.started, self.took_part) = (now, false);
        Some(self.restarts.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn code(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    #[test]
    fn what_would_help_nobody_is_not_done() {
        let start = Instant::now();
        let mut lives = Lives::new(start, Lives::LEAST_LIFE);
        assert_eq!(lives.next(start, code(1)), None, "it failed at once");
        let later = start + Duration::from_secs(5);
        assert_eq!(lives.next(later, code(2)), None, "wrong usage");
        assert_eq!(lives.next(later, code(130)), None, "it was asked to end");
        assert!(!lives.is_again());
        let mut asked = Lives::new(start, Lives::LEAST_LIFE);
        assert_eq!(asked.next(start, code(0)), Some(1), "it could start");
        let mut slow = Lives::new(start, Lives::LEAST_LIFE_OF_PROGRAM);
        assert_eq!(slow.next(later, code(1)), None, "nor does it help here");
        assert_eq!(lives.next(later, code(1)), Some(1));
        assert!(lives.is_again());
    }

    #[test]
    fn a_killed_process_comes_back_but_not_too_often() {
        let now = Instant::now();
        let mut lives = Lives::new(now, Lives::LEAST_LIFE);
        let killed = ExitStatus::from_raw(9);
        for life in 1..=Lives::MOST {
            lives.took_part = true;
            assert_eq!(lives.next(now, killed), Some(life));
            assert!(!lives.took_part);
        }
        assert_eq!(lives.next(now, killed), None);
        assert_eq!(
            lives.next(now + Lives::WINDOW, killed),
            Some(Lives::MOST + 1)
        );
    }
}
