//! One process of a job: its standard output as lines, its standard error in a log file, its end.

use super::error::CliError;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// What a process did.
#[derive(Debug)]
pub(super) enum Output {
    /// It wrote a line to its standard output.
    Line(String),
    /// It ended.
    Ended(ExitStatus),
}

/// A running process. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Process {
    /// `shard 0`, `worker 3`.
    pub(super) name: String,
    /// Where its standard error goes.
    pub(super) log: PathBuf,
    /// Closed to ask it to end; the system closes it too when this process dies, however it dies.
    stdin: Option<ChildStdin>,
    signals: UnboundedSender<Signal>,
}

impl Process {
    /// Starts `command`. What it does is sent to `events` under `key`.
    ///
    /// It gets a process group of its own, so that a Ctrl-C in the terminal reaches this process alone, which then ends
    /// the others in order.
    pub(super) fn start(
        key: usize,
        name: String,
        mut command: Command,
        log: PathBuf,
        events: UnboundedSender<(usize, Output)>,
    ) -> Result<Self, CliError> {
        let file = File::create(&log).map_err(|source| CliError::File {
            action: "create",
            path: log.clone(),
            source,
        })?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true)
            .process_group(0);
        let mut child = command.spawn().map_err(|source| CliError::Program {
            program: command.as_std().get_program().to_owned(),
            source,
        })?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("standard output is piped");
        let (signals, mut wanted) = unbounded_channel();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            let (mut open, mut held) = (true, true);
            let status = loop {
                tokio::select! {
                    line = lines.next_line(), if open => match line {
                        // Nobody listens any more only when the job is over.
                        Ok(Some(line)) => drop(events.send((key, Output::Line(line)))),
                        _ => open = false,
                    },
                    status = child.wait() => break status,
                    signal = wanted.recv(), if held => {
                        held = signal.is_some();
                        // Not waited for yet, so the number is still its own, even if it has ended already.
                        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
                        if let Some(pid) = pid {
                            let _gone = kill_process(pid, signal.unwrap_or(Signal::KILL));
                        }
                    }
                }
            };
            // A grandchild may hold the pipe open for ever.
            while let Ok(Ok(Some(line))) =
                tokio::time::timeout(Duration::from_millis(200), lines.next_line()).await
            {
                drop(events.send((key, Output::Line(line))));
            }
            if let Ok(status) = status {
                drop(events.send((key, Output::Ended(status))));
            }
        });
        Ok(Self {
            name,
            log,
            stdin,
            signals,
        })
    }

    /// Asks it to end in order, by ending its standard input.
    pub(super) fn ask_to_end(&mut self) {
        self.stdin = None;
    }

    /// Asks it to end in order, by SIGTERM: for programs that do not watch their standard input.
    pub(super) fn terminate(&mut self) {
        self.stdin = None;
        self.signal(Signal::TERM);
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        self.stdin = None;
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // A process that has ended listens no more.
        let _gone = self.signals.send(signal);
    }
}

/// The last lines of a log, indented; says so if there are none.
pub(super) fn tail(log: &Path) -> String {
    const LINES: usize = 12;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        return "    (it logged nothing)".to_owned();
    }
    let last = &lines[lines.len().saturating_sub(LINES)..];
    last.iter()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn lines_come_before_the_end_and_errors_go_to_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let (send, mut events) = unbounded_channel();
        let log = dir.path().join("log");
        let process = Process::start(
            7,
            "x".into(),
            shell("echo one; echo oops >&2; echo two; exit 3"),
            log,
            send,
        )
        .unwrap();
        let mut seen = Vec::new();
        while let Some((key, output)) = events.recv().await {
            assert_eq!(key, 7);
            match output {
                Output::Line(line) => seen.push(line),
                Output::Ended(status) => {
                    assert_eq!(status.code(), Some(3));
                    break;
                }
            }
        }
        assert_eq!(seen, ["one", "two"]);
        assert_eq!(tail(&process.log), "    oops");
    }

    #[tokio::test]
    async fn the_end_of_its_input_is_a_request_and_a_kill_is_none() {
        let dir = tempfile::tempdir().unwrap();
        type End = fn(&mut Process);
        let cases: [(&str, End, Option<i32>, Option<i32>); 3] = [
            ("cat; exit 4", Process::ask_to_end, Some(4), None),
            ("exec sleep 600", Process::terminate, None, Some(15)),
            ("trap '' TERM; exec sleep 600", Process::kill, None, Some(9)),
        ];
        for (script, end, code, signal) in cases {
            let (send, mut events) = unbounded_channel();
            let mut process =
                Process::start(0, "x".into(), shell(script), dir.path().join("log"), send).unwrap();
            end(&mut process);
            let Some((_, Output::Ended(status))) = events.recv().await else {
                panic!("no end")
            };
            assert_eq!((status.code(), status.signal()), (code, signal));
        }
    }

    #[test]
    fn an_empty_log_is_said_to_be_empty() {
        assert!(tail(Path::new("/nonexistent")).contains("logged nothing"));
    }
}
