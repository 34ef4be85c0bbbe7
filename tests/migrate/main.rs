//! Whole migrations with the real `postcopy` binary, each side a process of its own.
//!
//! Every child process is in a process group of its own and under a hard limit: a
//! vCPU whose page never comes hears no signal but SIGKILL, so that is what the group
//! gets. At most two migrations run at a time, because each guest fills a core.
#![cfg(feature = "io")]

// Child processes: limits, captured output, the number that runs at a time.
#[allow(dead_code)] // The torture tests use the rest.
mod harness;
// A source and a destination made in the test, which do what the real ones never do.
mod fakes;

// Guests of every kind and workload over loopback, in every configuration.
mod loopback;
// The same over an emulated link: slow, long and lossy.
mod limited_link;
// Memory that is copied before the guest moves.
mod switchover;
// The same at random, cut and called off.
mod random_cuts;
// Guests that their user has paused.
mod paused_guest;
// Two network namespaces joined by a real, limited link.
mod netns;

// A guest at the attach protocol: which pages it writes, and that it writes none once it is
// paused.
mod dirty_rounds;
mod frozen;

// What users get wrong: arguments, paths, permissions, ports.
mod bad_arguments;
// Tickets that are wrong, used or expired, and strangers at the port.
mod bad_ticket;
// A link that is lost after the commit, wholly or in part, and comes back or does not.
mod link_loss;
// A VMM that leaves early, a fault server that dies, and the keeper between them.
mod keeper;
// A fault server that dies, and the one that is started in its place.
mod supervise;
// The same under a service manager with a descriptor store.
mod descriptor_store;
// The commit word of another process.
#[allow(dead_code)] // Its other test uses the rest.
#[path = "../torture/commit_word.rs"]
mod commit_word;
// Peers that break the protocol or go away.
mod bad_peer;
// Guests that the destination cannot take, or cannot run.
mod broken_guest;
// Descriptors and threads that run out.
mod scarce;
// Hosts without KVM, without userfaultfd, or with a full disk.
mod missing_devices;
// Destinations with too little memory.
mod little_memory;
// Guests that get huge pages in the end.
mod huge_pages;
// Guests whose memory is made of them.
mod huge_page_pool;
mod hugetlb;
// Outputs that are full, and that nobody reads.
mod stalled_reader;
// What an operator sees and decides.
mod operator;
// Memory that is not what it should be.
mod wrong_memory;
// Nothing of the tests' failpoints in a program built without them.
#[cfg(not(feature = "failpoints"))]
mod no_failpoints;
