//! What happened in a run, for people.

use core::fmt;
use core::time::Duration;
use std::collections::VecDeque;

/// Lines kept for a report.
const KEPT: usize = 60;

/// The last lines of a run, or all of them on the terminal.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    lines: VecDeque<String>,
    level: Level,
}

/// How much of a run is written down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Level {
    /// Nothing: runs are repeatable, so a failed one is run again with more.
    #[default]
    Off,
    /// The last lines.
    Last,
    /// Every line, at once.
    Print,
}

impl Trace {
    /// An empty trace.
    #[must_use]
    pub fn new(level: Level) -> Self {
        Self {
            lines: VecDeque::new(),
            level,
        }
    }

    /// Whether lines are wanted at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.level != Level::Off
    }

    /// Takes a line.
    pub fn line(&mut self, now: Duration, text: fmt::Arguments<'_>) {
        let line = match self.level {
            Level::Off => return,
            _ => format!("{:>11.6} {text}", now.as_secs_f64()),
        };
        if self.level == Level::Print {
            println!("{line}");
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The last lines.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}
