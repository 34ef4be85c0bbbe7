//! What a benchmark ran on, and what of: enough to know which figures may be compared.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read;

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// The processors that this process may run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<usize>,
    /// Bytes of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The kernel's name and release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Whether it is itself a virtual machine, as its processor says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_machine: Option<bool>,
}

/// The program that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its version.
    pub version: String,
    /// Whether it was built with the checks that a release has not.
    pub debug_assertions: bool,
    /// The checksum of its file (CRC-32): figures of two builds are not mixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crc32: Option<String>,
}

impl Machine {
    /// This one, as far as it tells.
    pub fn here() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let release = nix::sys::utsname::uname().ok();
        let kernel = release.map(|of| {
            let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
            format!("{} {}", text(of.sysname()), text(of.release()))
        });
        let flags = field(&cpuinfo, "flags");
        Self {
            processor: field(&cpuinfo, "model name").map(str::to_owned),
            cores: std::thread::available_parallelism().ok().map(usize::from),
            memory_bytes: field(&meminfo, "MemTotal").and_then(kibibytes),
            kernel,
            virtual_machine: flags.map(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
        }
    }
}

impl Program {
    /// This one.
    pub fn here() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            debug_assertions: cfg!(debug_assertions),
            crc32: checksum().ok().map(|sum| format!("{sum:08x}")),
        }
    }
}

/// How many processes wanted a processor in the last minute, on average.
pub fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kibibytes(text: &str) -> Option<u64> {
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn checksum() -> std::io::Result<u32> {
    let mut file = fs::File::open("/proc/self/exe")?;
    let mut sum = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(sum.finalize()),
            read => sum.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_proc_are_found() {
        let text = "processor\t: 0\nmodel name\t: A CPU @ 2: fast\nMemTotal:  1024 kB\n";
        assert_eq!(field(text, "model name"), Some("A CPU @ 2: fast"));
        assert_eq!(field(text, "MemTotal").and_then(kibibytes), Some(1 << 20));
        assert_eq!(field(text, "flags"), None);
        assert_eq!(kibibytes("12"), None);
        let here = Machine::here();
        assert!(here.kernel.is_some_and(|kernel| kernel.starts_with("Linux ")));
    }
}
