//! QEMU's machine protocol (QMP) over a Unix socket: commands, answers, and the events in
//! between with QEMU's own times.

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long QEMU may take to answer a command.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How often a wait looks at the time.
const LOOK: Duration = Duration::from_millis(100);
/// The most events that are kept.
const EVENTS_MAX: usize = 4096;

/// Something that happened in QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// What it says besides.
    pub data: Value,
    /// When, in microseconds of `CLOCK_REALTIME`: the same for all processes here.
    pub at_us: u64,
}

impl Event {
    /// Whether it tells that the migration has come to `status`.
    pub fn is_migration(&self, status: &str) -> bool {
        self.name == "MIGRATION" && self.data["status"] == status
    }
}

/// A connection to one QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    line: Vec<u8>,
    events: Vec<Event>,
}

impl Qmp {
    /// Connects, and leaves the negotiation behind.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        let mut qmp = Self { reader: BufReader::new(stream), line: Vec::new(), events: Vec::new() };
        let deadline = Instant::now() + ANSWER_MAX;
        while qmp.message(deadline)?.get("QMP").is_none() {}
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Executes a command, without arguments if they are null.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let failed = || format!("QEMU's command {command}");
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes()).with_context(failed)?;
        let deadline = Instant::now() + ANSWER_MAX;
        loop {
            let mut message = self.message(deadline).with_context(failed)?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// Executes a command of the monitor for people.
    pub fn monitor(&mut self, line: &str) -> anyhow::Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// The first event of this kind since the connection was made; waits for it.
    /// `None` if it does not come in time.
    pub fn event(
        &mut self,
        is: impl Fn(&Event) -> bool,
        deadline: Instant,
    ) -> anyhow::Result<Option<Event>> {
        let mut seen = 0;
        loop {
            if let Some(event) = self.events[seen..].iter().find(|event| is(event)) {
                return Ok(Some(event.clone()));
            }
            seen = self.events.len();
            if self.try_message(deadline)?.is_none() {
                return Ok(None);
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> anyhow::Result<Value> {
        self.try_message(deadline)?.ok_or_else(|| anyhow!("no answer in time"))
    }

    /// The next line that QEMU says. An event is kept as well.
    fn try_message(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        loop {
            // What was read before a time-out stays in `line`.
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => break,
                Ok(_) => bail!("QEMU has closed its socket"),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    if Instant::now() >= deadline {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error).context("cannot read QEMU's socket"),
            }
        }
        let message: Value = serde_json::from_slice(&self.line).context("QEMU says no JSON")?;
        self.line.clear();
        if let Some(name) = message["event"].as_str()
            && self.events.len() < EVENTS_MAX
        {
            let time = &message["timestamp"];
            let part = |name: &str| time[name].as_u64().unwrap_or_default();
            self.events.push(Event {
                name: name.to_owned(),
                data: message["data"].clone(),
                at_us: part("seconds") * 1_000_000 + part("microseconds"),
            });
        }
        Ok(Some(message))
    }
}
