//! Two network namespaces, joined by a pair of virtual Ethernet devices whose rate the
//! kernel limits: two hosts as far as the network is concerned.
//!
//! Needs root and iproute2; without them one line says that it was skipped.

use super::harness::{Guest, MIGRATION, POSTCOPY, Receiver, check_report, read_report};
use nix::unistd::geteuid;
use std::process::{Command, Output};

const SOURCE: &str = "10.213.7.1";
const DESTINATION: &str = "10.213.7.2";
/// What the largest packet leaves to UDP over IPv4.
const PAYLOAD: u64 = 1500 - 28;

/// Two namespaces and the link between them; both go when it is dropped.
struct TwoHosts {
    source: String,
    destination: String,
}

fn run(command: &str) -> std::io::Result<Output> {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap_or_default()).args(words).output()
}

fn must(command: &str) {
    let output = run(command).unwrap_or_else(|error| panic!("{command}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
}

impl TwoHosts {
    /// Namespaces named after this process and `name`.
    fn new(name: &str) -> Self {
        let pid = std::process::id();
        // Dropped, and so cleared away, also if a step below fails.
        let hosts = Self {
            source: format!("postcopy-{pid}-{name}-s"),
            destination: format!("postcopy-{pid}-{name}-d"),
        };
        let Self { source, destination } = &hosts;
        must(&format!("ip netns add {source}"));
        must(&format!("ip netns add {destination}"));
        // Made inside, so that nothing of it is ever in the namespace of the tests.
        must(&format!(
            "ip -n {source} link add eth0 mtu 1500 type veth peer name eth0 mtu 1500 \
             netns {destination}"
        ));
        for (host, address) in [(source, SOURCE), (destination, DESTINATION)] {
            must(&format!("ip -n {host} address add {address}/24 dev eth0"));
            must(&format!("ip -n {host} link set lo up"));
            must(&format!("ip -n {host} link set eth0 up"));
            must(&format!(
                "tc -n {host} qdisc add dev eth0 root tbf rate 500mbit burst 256kb latency 20ms"
            ));
        }
        hosts
    }

    fn inside(namespace: &str) -> Command {
        let mut command = Command::new("ip");
        // `ip` becomes the program that it starts: it is one process.
        command.args(["netns", "exec", namespace, POSTCOPY]);
        command
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        // The devices go with their namespaces.
        for host in [&self.source, &self.destination] {
            if let Err(error) = run(&format!("ip netns delete {host}")) {
                eprintln!("cannot delete the network namespace {host}: {error}");
            }
        }
    }
}

fn skipped() -> bool {
    let why = if !geteuid().is_root() {
        "it needs root"
    } else if ["ip -V", "tc -V"].iter().any(|command| run(command).is_err()) {
        "it needs iproute2"
    } else {
        return false;
    };
    eprintln!("skipped: the migration between two network namespaces: {why}");
    true
}

fn migrates(name: &str, guest: &[&str], receive: &[&str], migrate: &[&str]) {
    if skipped() {
        return;
    }
    let hosts = TwoHosts::new(name);
    let guest = Guest::start_as(TwoHosts::inside(&hosts.source), guest);
    let listen = ["--listen", DESTINATION];
    let inside = TwoHosts::inside(&hosts.destination);
    let receiver = Receiver::start_as(inside, &[&listen, receive].concat());
    assert!(receiver.ticket.contains(DESTINATION), "the ticket names the address listened on");
    let report = guest.path("report.json");
    let migration = guest.migrate_as(
        TwoHosts::inside(&hosts.source),
        &receiver.ticket,
        &[&["--report", &report], migrate].concat(),
    );
    migration.succeed(MIGRATION);
    let destination = receiver.report();
    let mut whole = read_report(&report);
    whole["verified"] = destination["verified"].clone();
    check_report(&whole);
    assert_eq!(whole["link"]["mtu"], PAYLOAD, "{whole:#}");
    let pages = whole["pages"]["total"].as_u64().expect("a number of pages");
    let bytes = whole["wire_bytes"]["to_destination"].as_u64().expect("bytes sent");
    assert!(bytes > pages * 4096, "no page came over this link: {whole:#}");
    guest.has_left();
}

#[test]
fn a_process_moves_from_host_to_host() {
    let guest = ["--guest", "process", "--memory", "64M", "--vcpus", "2"];
    migrates("process", &guest, &[], &[]);
}

#[test]
fn a_virtual_machine_moves_from_host_to_host() {
    let guest = ["--guest", "kvm", "--memory", "64M", "--workload", "zipf"];
    let receive = ["--push-lanes", "2", "--backing", "anonymous", "--port", "7400"];
    migrates("kvm", &guest, &receive, &["--policy", "linear"]);
}
