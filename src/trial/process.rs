//! A child process of this very program: it does not outlive this one, and no wait for it is
//! endless if it was given a limit.

use super::Limit;
use crate::program::exit::Failure;
use anyhow::Context;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// How often something is looked at that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Lines of a child that wait to be read here; more of them are dropped.
const LINES_MAX: usize = 64;
/// As much of a line is kept.
const LINE_BYTES_MAX: u64 = 4096;
/// How much of what a child complained of is told.
const COMPLAINT_BYTES_MAX: u64 = 600;

/// A running child.
pub struct Process {
    name: &'static str,
    child: Child,
    lines: Option<Receiver<String>>,
    complaints: Option<PathBuf>,
}

impl Process {
    /// Starts this program again. What it says on standard error goes where this process's
    /// does, or into the file `complaints`.
    pub fn start(
        name: &'static str,
        complaints: Option<PathBuf>,
        arguments: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Self> {
        // Not its path: the file there may be replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg("--die-with-parent").stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(path) = &complaints {
            let file = std::fs::File::create(path);
            command.stderr(file.with_context(|| format!("cannot make {}", path.display()))?);
        }
        arguments(&mut command);
        let mut child = command.spawn().with_context(|| format!("cannot start the {name}"))?;
        let stdout = child.stdout.take();
        let mut process = Self { name, child, lines: None, complaints };
        if let Some(stdout) = stdout {
            let (to, lines) = sync_channel(LINES_MAX);
            process.lines = Some(lines);
            let read = move || read_lines(stdout, &to);
            std::thread::Builder::new().name(format!("hear-{name}")).spawn(read)?;
        }
        Ok(process)
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints, without its end.
    pub fn line(&mut self, limit: &Limit) -> anyhow::Result<String> {
        let Some(lines) = &self.lines else { anyhow::bail!("the {} says nothing", self.name) };
        loop {
            match lines.recv_timeout(LOOK_EVERY) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Timeout) => limit.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.wait(limit)?;
                    return Err(self.failure(status.code()));
                }
            }
        }
    }

    /// All lines from now on, for another thread; there are no more of them here.
    pub fn take_lines(&mut self) -> Option<Receiver<String>> {
        self.lines.take()
    }

    /// Writes a line to its standard input, and closes that.
    pub fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        if let Some(mut stdin) = self.child.stdin.take() {
            writeln!(stdin, "{line}")?;
        }
        Ok(())
    }

    /// Interrupts it, as the user would.
    pub fn interrupt(&self) -> nix::Result<()> {
        let child = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGINT)
    }

    /// Waits for its end, which must be a good one.
    pub fn succeed(&mut self, limit: &Limit) -> anyhow::Result<()> {
        let status = self.wait(limit)?;
        if status.success() {
            return Ok(());
        }
        Err(self.failure(status.code()))
    }

    fn wait(&mut self, limit: &Limit) -> anyhow::Result<std::process::ExitStatus> {
        if limit.is_endless() {
            return Ok(self.child.wait()?);
        }
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            limit.check().with_context(|| format!("waiting for the {}", self.name))?;
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Why it failed: by its exit code, and by what it said if that was kept.
    fn failure(&self, code: Option<i32>) -> anyhow::Error {
        let failure = Failure::of_child(code, self.name);
        match self.complaint() {
            Some(said) => failure.context(format!("{}: {said}", self.name)),
            None => failure,
        }
    }

    /// The end of what it said on standard error, if that was kept.
    pub fn complaint(&self) -> Option<String> {
        let mut file = std::fs::File::open(self.complaints.as_ref()?).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(COMPLAINT_BYTES_MAX))).ok()?;
        let mut said = Vec::new();
        file.take(COMPLAINT_BYTES_MAX).read_to_end(&mut said).ok()?;
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> =
            said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already unless something failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hands lines on until the child closes its output. A line that nobody takes is dropped, so
/// that the child is never held up.
fn read_lines(stdout: ChildStdout, to: &SyncSender<String>) {
    let mut stdout = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        match to.try_send(text) {
            Ok(()) | Err(TrySendError::Full(_)) => {}
            // Read on: what it says has no reader, and must have a place all the same.
            Err(TrySendError::Disconnected(_)) => {
                let _ = std::io::copy(&mut stdout, &mut std::io::sink());
                return;
            }
        }
    }
}
