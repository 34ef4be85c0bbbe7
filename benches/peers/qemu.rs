//! One migration between two QEMUs of this machine, and what they tell of it.
//!
//! Set so as to do QEMU no wrong: no bandwidth limit, the destination's memory private and
//! anonymous as with a plain `-m`, and post-copy asked for in the same breath as the
//! migration, so that no round of pre-copy comes before it.

use crate::credentials;
use crate::figures::Figures;
use crate::payload::{Instruments, LOW_BYTES, Load, Payload};
use crate::qmp::{Event, Qmp};
use anyhow::{Context, anyhow, bail, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::{prctl, signal::Signal};
use postcopy::vmm::workload::{STATUS_FINISHED, control, control_page};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Seek, copy};
use std::os::fd::AsRawFd;
use std::os::unix::{fs::FileExt, process::CommandExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long QEMU may take to start, and its guest to make its first step.
const START_MAX: Duration = Duration::from_secs(30);
/// How long a post-copy may take.
const POST_COPY_MAX: Duration = Duration::from_secs(300);
/// In bytes a second: no limit, for every version.
const UNLIMITED: u64 = 1 << 40;
/// How often the guest is looked for between two steps: it is there most of the time, or at
/// least at one time in ten.
const STOPS_MAX: u32 = 200;

/// How QEMU moves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Post-copy with one connection.
    PostCopy,
    /// Post-copy with a connection for page requests (`postcopy-preempt`).
    Preempt,
    /// `post-copy` with TLS.
    Tls,
    /// `preempt` with TLS.
    PreemptTls,
    /// Pre-copy.
    PreCopy,
}

impl Mode {
    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn preempts(self) -> bool {
        matches!(self, Self::Preempt | Self::PreemptTls)
    }

    fn encrypts(self) -> bool {
        matches!(self, Self::Tls | Self::PreemptTls)
    }
}

/// A QEMU that is there.
pub struct Qemu {
    program: PathBuf,
    /// What it says of itself.
    pub version: String,
}

impl Qemu {
    /// Looks for it; or says in one line why it is of no use.
    pub fn find(program: &Path) -> Result<Self, String> {
        let shown = program.display();
        let answer = Command::new(program).arg("--version").stdin(Stdio::null()).output();
        let answer = answer.map_err(|error| format!("{shown} cannot be run: {error}"))?;
        let text = String::from_utf8_lossy(&answer.stdout);
        match text.lines().next().filter(|_| answer.status.success()) {
            Some(version) => Ok(Self { program: program.into(), version: version.into() }),
            None => Err(format!("{shown} does not tell its version")),
        }
    }

    /// Runs a guest for `run_before`, moves it, and compares all its memory.
    pub fn migrate(
        &self,
        mode: Mode,
        load: &Load,
        run_before: Duration,
        pre_copy_max: Duration,
    ) -> anyhow::Result<Figures> {
        let folder = tempfile::Builder::new().prefix("postcopy-peers-").tempdir()?;
        let payload = Payload::new(load)?;
        let mut pair = Pair::start(self, mode, folder.path(), &payload)?;
        pair.set_up(mode)?;
        let uri = pair.listen()?;
        std::thread::sleep(run_before);
        let limit = if mode == Mode::PreCopy { pre_copy_max } else { POST_COPY_MAX };
        match pair.migrate(mode, &uri, limit, &payload)? {
            Some(figures) => {
                pair.source.end();
                pair.destination.verify(&payload, load)?;
                Ok(figures)
            }
            None if mode == Mode::PreCopy => pair.unfinished(limit),
            None => bail!("the migration did not end within {limit:?}"),
        }
    }
}

struct Pair {
    source: Machine,
    destination: Machine,
}

impl Pair {
    fn start(qemu: &Qemu, mode: Mode, folder: &Path, payload: &Payload) -> anyhow::Result<Self> {
        fs::write(folder.join("rom"), payload.rom())?;
        if mode.encrypts() {
            credentials::write(folder)?;
        }
        let bytes = payload.regions_bytes().map(|(_, bytes)| bytes).sum::<u64>();
        let there = payload.memory_path()?;
        let memory = format!("memory-backend-file,id=guest,size={bytes},mem-path={there},share=on");
        let source = Machine::start(qemu, mode, folder, "client", bytes, &memory, &[])?;
        let memory = format!("memory-backend-ram,id=guest,size={bytes}");
        let incoming = ["-incoming", "defer"];
        let destination = Machine::start(qemu, mode, folder, "server", bytes, &memory, &incoming)?;
        let deadline = Instant::now() + START_MAX;
        while payload.instruments()?.steps == 0 {
            ensure!(Instant::now() < deadline, "the guest makes no step: {}", source.said());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { source, destination })
    }

    /// Capabilities and parameters, the same on both sides.
    fn set_up(&mut self, mode: Mode) -> anyhow::Result<()> {
        for (machine, measures) in [(&mut self.source, false), (&mut self.destination, true)] {
            let mut capabilities = vec!["events"];
            if mode != Mode::PreCopy {
                capabilities.push("postcopy-ram");
                if measures {
                    capabilities.push("postcopy-blocktime");
                }
            }
            if mode.preempts() {
                capabilities.push("postcopy-preempt");
            }
            let on = |name: &&str| json!({ "capability": name, "state": true });
            let capabilities: Vec<Value> = capabilities.iter().map(on).collect();
            machine.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
            let mut parameters =
                json!({ "max-bandwidth": UNLIMITED, "max-postcopy-bandwidth": UNLIMITED });
            if mode.encrypts() {
                parameters["tls-creds"] = "tls".into();
            }
            machine.execute("migrate-set-parameters", parameters)?;
        }
        Ok(())
    }

    fn listen(&mut self) -> anyhow::Result<String> {
        let machine = &mut self.destination;
        machine.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let address = machine.execute("query-migrate", Value::Null)?;
        let port = address["socket-address"][0]["port"].as_str();
        Ok(format!("tcp:127.0.0.1:{}", port.context("QEMU does not tell its port")?))
    }

    /// `None` if it takes too long.
    fn migrate(
        &mut self,
        mode: Mode,
        uri: &str,
        limit: Duration,
        payload: &Payload,
    ) -> anyhow::Result<Option<Figures>> {
        let asked = now_us();
        let deadline = Instant::now() + limit;
        self.source.execute("migrate", json!({ "uri": uri }))?;
        if mode != Mode::PreCopy {
            self.source.execute("migrate-start-postcopy", Value::Null)?;
        }
        let ended = |event: &Event| {
            ["completed", "failed", "cancelled"].iter().any(|status| event.is_migration(status))
        };
        let Some(there) = self.destination.event(ended, deadline)? else {
            return Ok(None);
        };
        // At once: the guest runs on.
        let after = match there.is_migration("completed") {
            true => self.destination.instruments(payload)?,
            false => bail!("the migration failed: {}", self.source.error()?),
        };
        let soon = Instant::now() + START_MAX;
        let needed = |event: Option<Event>, what: &str| {
            event.with_context(|| format!("QEMU tells of no {what}"))
        };
        let here = needed(self.source.event(ended, soon)?, "end at the source")?;
        ensure!(here.is_migration("completed"), "the source: {}", self.source.error()?);
        let is = |name: &'static str| move |event: &Event| event.name == name;
        let stopped = needed(self.source.event(is("STOP"), soon)?, "pause")?;
        let resumed = needed(self.destination.event(is("RESUME"), soon)?, "resumption")?;
        // The source's guest stands where it was stopped.
        let before = payload.instruments()?;
        ensure!(after.is_running(), "the guest found a wrong word in its memory");
        ensure!(after.steps >= before.steps, "the guest makes no steps at the destination");

        let source = self.source.execute("query-migrate", Value::Null)?;
        let destination = self.destination.execute("query-migrate", Value::Null)?;
        let ended_at = here.at_us.max(there.at_us);
        let post_copy = mode != Mode::PreCopy;
        let stalls = after.stalls_since(&before);
        let blocktime = destination["postcopy-blocktime"].as_u64();
        Ok(Some(Figures {
            total_us: Some(ended_at.saturating_sub(asked)),
            downtime_us: Some(resumed.at_us.saturating_sub(stopped.at_us)),
            brownout_us: post_copy.then(|| ended_at.saturating_sub(resumed.at_us)),
            faults: source["ram"]["postcopy-requests"].as_u64().filter(|_| post_copy),
            blocktime_us: blocktime.filter(|_| post_copy).map(|ms| ms * 1000),
            stalls: post_copy.then_some(stalls),
            steps: post_copy.then(|| after.steps - before.steps),
            bytes: source["ram"]["transferred"].as_u64(),
        }))
    }

    /// A pre-copy that did not converge.
    fn unfinished(&mut self, after: Duration) -> anyhow::Result<Figures> {
        let told = self.source.execute("query-migrate", Value::Null)?;
        self.source.execute("migrate_cancel", Value::Null)?;
        println!("    pre-copy had not converged after {after:?} and was cancelled");
        Ok(Figures { bytes: told["ram"]["transferred"].as_u64(), ..Figures::default() })
    }
}

/// One QEMU; it does not outlive this.
struct Machine {
    child: Child,
    qmp: Qmp,
    is_source: bool,
    log: PathBuf,
}

impl Machine {
    fn start(
        qemu: &Qemu,
        mode: Mode,
        folder: &Path,
        side: &str,
        bytes: u64,
        memory: &str,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        let socket = folder.join(format!("{side}.qmp"));
        let log = folder.join(format!("{side}.log"));
        let mut command = Command::new(&qemu.program);
        command.args(["-no-user-config", "-nodefaults", "-display", "none"]);
        // A guest that crashes stands still.
        command.args(["-no-reboot", "-no-shutdown"]);
        command.args(["-accel", "tcg", "-machine", "pc,max-ram-below-4g=3G", "-smp", "1"]);
        command.args(["-m", &format!("{}M", (LOW_BYTES + bytes) >> 20)]);
        // In this order: QEMU 9.0 and later take the dirty pages of any memory for those of the
        // first one when they tell TCG which of them to watch again.
        command.args(["-object", memory]);
        command.args(["-object", &format!("memory-backend-ram,id=low,size={LOW_BYTES}")]);
        command.args(["-numa", "node,nodeid=0,cpus=0,memdev=low"]);
        command.args(["-numa", "node,nodeid=1,memdev=guest"]);
        command.arg("-bios").arg(folder.join("rom"));
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        if mode.encrypts() {
            let folder = folder.display();
            let tls = format!("tls-creds-x509,id=tls,dir={folder},endpoint={side},verify-peer=on");
            command.args(["-object", &tls]);
        }
        command.args(more);
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // SAFETY: one system call, which may be made between fork and exec.
        unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        let mut child = command.spawn().context("cannot start QEMU")?;
        let deadline = Instant::now() + START_MAX;
        let qmp = loop {
            match Qmp::connect(&socket) {
                Ok(qmp) => break qmp,
                Err(error) => {
                    let ended = child.try_wait()?.is_some();
                    if ended || Instant::now() > deadline {
                        let _ = child.kill();
                        let _ = child.wait();
                        let said = fs::read_to_string(&log).unwrap_or_default();
                        return Err(error.context(format!("QEMU does not start: {said}")));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        };
        Ok(Self { child, qmp, is_source: side == "client", log })
    }

    fn event(
        &mut self,
        is: impl Fn(&Event) -> bool,
        deadline: Instant,
    ) -> anyhow::Result<Option<Event>> {
        let event = self.qmp.event(is, deadline);
        event.with_context(|| self.said())
    }

    fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let answer = self.qmp.execute(command, arguments);
        answer.with_context(|| self.said())
    }

    /// Which one it is, and what it wrote to standard error.
    fn said(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let side = if self.is_source { "source" } else { "destination" };
        format!("QEMU at the {side}, which says {:?}", said.trim())
    }

    fn error(&mut self) -> anyhow::Result<String> {
        let told = self.execute("query-migrate", Value::Null)?;
        Ok(told["error-desc"].as_str().unwrap_or("no reason told").to_owned())
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Copies guest memory to a file of this process.
    fn save(&mut self, address: u64, bytes: u64) -> anyhow::Result<File> {
        let file = File::from(memfd_create(c"saved-memory", MFdFlags::MFD_CLOEXEC)?);
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let arguments = json!({ "val": address, "size": bytes, "filename": path });
        self.execute("pmemsave", arguments)?;
        ensure!(file.metadata()?.len() == bytes, "QEMU saved less memory than it has");
        Ok(file)
    }

    fn instruments(&mut self, payload: &Payload) -> anyhow::Result<Instruments> {
        let (address, bytes) = payload.instruments_at();
        let file = self.save(address, bytes as u64)?;
        let mut page = vec![0; bytes];
        file.read_exact_at(&mut page, 0)?;
        Instruments::parse(&page)
    }

    /// Stops the guest between two steps and has the independent checker compare its memory
    /// with what it must hold.
    fn verify(&mut self, payload: &Payload, load: &Load) -> anyhow::Result<()> {
        self.stop_between_steps(payload)?;
        let regions: Vec<(u64, u64)> = payload.regions_bytes().collect();
        let saved = regions.iter().map(|&(address, bytes)| self.save(address, bytes));
        let mut saved = saved.collect::<anyhow::Result<Vec<File>>>()?;
        self.end();
        // What a guest that is asked to stop says itself.
        let status = control_page(0).get() * 4096 + 8 * control::STATUS as u64;
        let first = saved.first().context("no memory")?;
        first.write_all_at(&STATUS_FINISHED.to_le_bytes(), status)?;
        let mut checker = Command::new(env!("CARGO_BIN_EXE_postcopy"));
        checker.args(["--die-with-parent", "check", "--workload", "random", "--kvm"]);
        checker.args(["--pages", &payload.pages().to_string()]);
        checker.args(["--seed", &load.seed.to_string(), "--regions", &payload.regions()]);
        let mut checker = checker.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut into = checker.stdin.take().ok_or_else(|| anyhow!("the checker has no input"))?;
        let copied: std::io::Result<()> = saved.iter_mut().try_for_each(|file| {
            file.rewind()?;
            copy(file, &mut into).map(drop)
        });
        drop(into);
        let verdict = checker.wait()?;
        ensure!(verdict.success(), "the guest's memory is not what it must be");
        Ok(copied?)
    }

    fn stop_between_steps(&mut self, payload: &Payload) -> anyhow::Result<()> {
        for _ in 0..STOPS_MAX {
            self.execute("stop", Value::Null)?;
            let registers = self.qmp.monitor("info registers")?;
            let instruction = registers
                .split("RIP=")
                .nth(1)
                .and_then(|rest| u64::from_str_radix(rest.split_whitespace().next()?, 16).ok());
            if payload.is_between_steps(instruction.context("no instruction pointer")?) {
                return Ok(());
            }
            self.execute("cont", Value::Null)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("the guest was never found between two steps")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_micros() as u64
}
