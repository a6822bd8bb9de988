//! One process of a job: its standard output as lines, its standard error in a log file, its end.

use super::error::CliError;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, Command};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// What becomes of a process's standard error, besides its log file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Errors {
    /// Nothing.
    Logged,
    /// Its lines are passed on, like those of its standard output.
    Shown,
}

/// What a process did.
#[derive(Debug)]
pub(super) enum Output {
    /// It wrote a line to its standard output, or to its standard error if that is shown.
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
        errors: Errors,
        events: UnboundedSender<(usize, Output)>,
    ) -> Result<Self, CliError> {
        let file = File::create(&log).map_err(|source| CliError::File {
            action: "create",
            path: log.clone(),
            source,
        })?;
        let (stderr, copy) = match errors {
            Errors::Logged => (Stdio::from(file), None),
            Errors::Shown => (Stdio::piped(), Some(file)),
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .process_group(0);
        let mut child = command.spawn().map_err(|source| CliError::Program {
            program: command.as_std().get_program().to_owned(),
            source,
        })?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("standard output is piped");
        let (signals, mut wanted) = unbounded_channel();
        let told = child.stderr.take().zip(copy).map(|(stderr, file)| {
            let events = events.clone();
            tokio::spawn(show(stderr, file, move |line| {
                drop(events.send((key, Output::Line(line))));
            }))
        });
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
            if let Some(told) = told {
                let _held_open = tokio::time::timeout(Duration::from_millis(200), told).await;
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

/// Copies standard error to the log, and says each line.
async fn show(stderr: ChildStderr, mut log: File, say: impl Fn(String)) {
    let mut parts = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(line)) = parts.next_segment().await {
        // A full disk must not stop the process that writes.
        let _full = log.write_all(&line).and_then(|()| log.write_all(b"\n"));
        // Of a progress bar only what it showed last.
        let line = String::from_utf8_lossy(&line);
        let shown = line.trim_end_matches('\r').rsplit('\r').next();
        say(shown.unwrap_or_default().to_owned());
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
            Errors::Logged,
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
    async fn errors_that_are_shown_are_in_the_log_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let (send, mut events) = unbounded_channel();
        let log = dir.path().join("log");
        let script = shell(r"printf '10 %%\r20 %%\nplain\n\377\n' >&2");
        let process = Process::start(0, "x".into(), script, log, Errors::Shown, send).unwrap();
        let mut seen = Vec::new();
        while let Some((_, Output::Line(line))) = events.recv().await {
            seen.push(line);
        }
        assert_eq!(seen, ["20 %", "plain", "\u{fffd}"]);
        let logged = std::fs::read(&process.log).unwrap();
        assert_eq!(logged, b"10 %\r20 %\nplain\n\xff\n");
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
            let mut process = Process::start(
                0,
                "x".into(),
                shell(script),
                dir.path().join("log"),
                Errors::Logged,
                send,
            )
            .unwrap();
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
