//! One process of the job: started, read line by line, signalled by its own number alone.

use super::AnyError;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::Instant;

/// A line that a process wrote.
pub(crate) struct Line {
    /// Index of the process in its job.
    pub(crate) slot: usize,
    /// Which of its lives wrote it.
    pub(crate) life: usize,
    pub(crate) at: Instant,
    pub(crate) text: String,
}

/// A running process. Dropped, it is killed.
pub(crate) struct Process {
    child: Child,
    /// Closed to ask it to end; the system closes it too should this program die.
    stdin: Option<ChildStdin>,
    pub(crate) log: PathBuf,
}

impl Process {
    pub(crate) fn start(
        mut command: Command,
        log: &Path,
        slot: usize,
        life: usize,
        lines: Sender<Line>,
    ) -> Result<Self, AnyError> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?);
        let mut child = command.spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        std::thread::spawn(move || {
            for text in stdout
                .into_iter()
                .flat_map(|out| BufReader::new(out).lines())
            {
                let Ok(text) = text else { break };
                let at = Instant::now();
                if lines
                    .send(Line {
                        slot,
                        life,
                        at,
                        text,
                    })
                    .is_err()
                {
                    break;
                }
            }
        });
        Ok(Self {
            child,
            stdin,
            log: log.to_owned(),
        })
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Asks it to end in order.
    pub(crate) fn ask_to_end(&mut self) {
        self.stdin = None;
    }

    /// It is a child that has not been waited for, so that its number is still its own.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Some(pid) = Pid::from_raw(self.child.id().cast_signed())
        {
            let _gone = kill_process(pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _waited = self.child.wait();
    }
}
