//! How much more memory this process can get, so that a migration that cannot
//! fit is refused at its start and not killed in its middle.
//!
//! It looks once, and other processes may take the memory meanwhile; `reserve` takes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Why memory of some size will not fit.
#[derive(Debug, thiserror::Error)]
pub enum NotEnoughMemory {
    /// The host or a control group has less left.
    #[error(
        "{needed_bytes} bytes of guest memory do not fit: {limit} leaves {available_bytes} bytes"
    )]
    Limit {
        /// What was asked for.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
        /// Where the limit is, in words.
        limit: String,
    },
    /// The host's memory could not be looked up.
    #[error("cannot tell how much memory is available ({path})")]
    Unknown {
        /// The file that could not be read or understood.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Whether `needed_bytes` more fit into the host's memory and into all control
/// groups that this process is in. A control group that cannot be read is taken
/// to have no limit.
pub fn check_can_hold(needed_bytes: u64) -> Result<(), NotEnoughMemory> {
    let (available_bytes, limit) = available()?;
    if needed_bytes > available_bytes {
        return Err(NotEnoughMemory::Limit { needed_bytes, available_bytes, limit });
    }
    Ok(())
}

/// The bytes that this process can still get, and what limits them.
pub fn available() -> Result<(u64, String), NotEnoughMemory> {
    const MEMINFO: &str = "/proc/meminfo";
    let unknown = |source| NotEnoughMemory::Unknown { path: MEMINFO, source };
    let meminfo = fs::read_to_string(MEMINFO).map_err(unknown)?;
    let available = parse_mem_available(&meminfo)
        .ok_or_else(|| unknown(io::Error::other("no line MemAvailable")))?;
    let host = (available, format!("MemAvailable in {MEMINFO}"));
    let groups = groups_of_this_process();
    let all = groups.iter().filter_map(group_room).chain([host]);
    // There is one at least; the smallest counts.
    Ok(all.min_by_key(|(bytes, _)| *bytes).unwrap_or((0, String::new())))
}

/// A control group's directory, and how its files are named.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    directory: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// What is left in a group, and its limit in words; `None` without a limit.
fn group_room(group: &Group) -> Option<(u64, String)> {
    let (limit_file, used_file, reclaimable) = match group.version {
        Version::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        Version::V2 => ("memory.max", "memory.current", "inactive_file"),
    };
    let read = |name: &str| fs::read_to_string(group.directory.join(name)).ok();
    let limit = parse_limit(&read(limit_file)?)?;
    let used = read(used_file)?.trim().parse::<u64>().ok()?;
    // Used memory includes the page cache, which the kernel drops at the limit.
    let cache = read("memory.stat").and_then(|stat| parse_stat(&stat, reclaimable)).unwrap_or(0);
    let room = limit.saturating_sub(used.saturating_sub(cache));
    let path = group.directory.join(limit_file);
    Some((room, format!("{} ({limit} bytes, {used} in use)", path.display())))
}

/// The groups that limit this process's memory, innermost first.
fn groups_of_this_process() -> Vec<Group> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    groups(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
}

/// The same, from the text of `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn groups(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in cgroup.lines() {
        // hierarchy:controllers:path; controllers are empty for version 2.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" => Version::V2,
            _ if controllers.split(',').any(|name| name == "memory") => Version::V1,
            _ => continue,
        };
        if let Some((mount_point, root)) = mount_of(mountinfo, version) {
            // The mount shows the hierarchy from `root` on only.
            let inside = Path::new(path).strip_prefix(&root).unwrap_or(Path::new(""));
            let ancestors = inside.ancestors().map(|part| mount_point.join(part));
            groups.extend(ancestors.map(|directory| Group { directory, version }));
        }
    }
    groups
}

/// Where the memory controller of a version is mounted, and which directory of
/// its hierarchy is seen there.
fn mount_of(mountinfo: &str, version: Version) -> Option<(PathBuf, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        // id parent major:minor root mount-point options [tags] - type source options
        let (front, back) = line.split_once(" - ")?;
        let mut back = back.split(' ');
        let kind = back.next()?;
        let options = back.nth(1).unwrap_or_default();
        let wanted = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        let mut front = front.split(' ').skip(3);
        let (root, mount_point) = (front.next()?, front.next()?);
        wanted.then(|| (PathBuf::from(mount_point), PathBuf::from(root)))
    })
}

/// The bytes in the `MemAvailable` line of `/proc/meminfo`.
fn parse_mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The bytes of a limit; `None` for "max" and for version 1's word for it, the
/// largest multiple of the page size.
fn parse_limit(text: &str) -> Option<u64> {
    const NO_LIMIT: u64 = i64::MAX as u64 - 4095;
    text.trim().parse::<u64>().ok().filter(|limit| *limit < NO_LIMIT)
}

/// The value of `key` in a `memory.stat`.
fn parse_stat(stat: &str, key: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_limits_and_stat_are_parsed_and_nonsense_is_not() {
        let meminfo = "MemTotal:       24618936 kB\nMemFree:  1 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(parse_mem_available(meminfo), Some(23_000_000 * 1024));
        for bad in ["", "MemAvailable: x kB", "MemAvailable: 5", "MemTotal: 5 kB"] {
            assert_eq!(parse_mem_available(bad), None, "{bad}");
        }
        assert_eq!(parse_mem_available("MemAvailable: 18446744073709551615 kB"), None);

        assert_eq!(parse_limit("1073741824\n"), Some(1 << 30));
        assert_eq!(parse_limit("max\n"), None);
        assert_eq!(parse_limit("9223372036854771712\n"), None);
        assert_eq!(parse_limit(""), None);

        let stat = "active_file 1\ninactive_file 4096\ntotal_inactive_file 8192\n";
        assert_eq!(parse_stat(stat, "inactive_file"), Some(4096));
        assert_eq!(parse_stat(stat, "total_inactive_file"), Some(8192));
        assert_eq!(parse_stat(stat, "inactive"), None);
    }

    const V2: &str =
        "35 25 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
    const V1: &str = "32 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
36 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory";

    fn directories(cgroup: &str, mountinfo: &str) -> Vec<String> {
        let name = |group: &Group| format!("{:?} {}", group.version, group.directory.display());
        groups(cgroup, mountinfo).iter().map(name).collect()
    }

    #[test]
    fn all_groups_up_to_the_mounts_root_count() {
        assert_eq!(
            directories("0::/a.slice/b.scope\n", V2),
            [
                "V2 /sys/fs/cgroup/a.slice/b.scope",
                "V2 /sys/fs/cgroup/a.slice",
                "V2 /sys/fs/cgroup/"
            ]
        );
        assert_eq!(
            directories("9:name=systemd:/x\n4:cpu,memory:/m\n0::/\n", V1),
            ["V1 /sys/fs/cgroup/memory/m", "V1 /sys/fs/cgroup/memory/"]
        );
        // A container that sees its own group as the mount's root.
        let inner = V2.replace("0:30 / ", "0:30 /docker/abc ");
        assert_eq!(
            directories("0::/docker/abc/d\n", &inner),
            ["V2 /sys/fs/cgroup/d", "V2 /sys/fs/cgroup/"]
        );
        assert_eq!(directories("0::/\n", ""), [""; 0]);
        assert_eq!(directories("nonsense\n::\n", V1), [""; 0]);
    }

    #[test]
    fn a_groups_room_is_its_limit_without_what_cannot_be_reclaimed() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let group = Group { directory: directory.path().into(), version: Version::V2 };
        assert_eq!(group_room(&group), None);
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(group_room(&group), None);
        write("memory.max", "1000\n");
        assert_eq!(group_room(&group).unwrap().0, 300);
        write("memory.stat", "anon 600\ninactive_file 100\n");
        let (room, limit) = group_room(&group).unwrap();
        assert_eq!(room, 400);
        assert!(limit.contains("memory.max (1000 bytes, 700 in use)"), "{limit}");
        write("memory.current", "5000\n");
        assert_eq!(group_room(&group).unwrap().0, 0);
    }

    #[test]
    fn a_page_fits_here_and_all_addresses_do_not() {
        check_can_hold(4096).unwrap();
        let refused = check_can_hold(u64::MAX).unwrap_err();
        let NotEnoughMemory::Limit { available_bytes, .. } = &refused else { panic!("{refused}") };
        let text = refused.to_string();
        assert!(*available_bytes > 4096 && text.contains(&available_bytes.to_string()), "{text}");
        assert!(text.contains(&u64::MAX.to_string()), "{text}");
    }
}
