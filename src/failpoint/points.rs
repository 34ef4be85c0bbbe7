//! The list of all points. `tests/tidy` compares it with the code, and the test that walks
//! them with the table in `docs/failures.md`.

/// The process in which a point is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Process {
    /// The fault server, as `postcopy migrate` or a program of its own.
    Source,
    /// `postcopy receive`.
    Destination,
    /// The VMM at the source, `postcopy run`.
    Vmm,
    /// The keeper, which has the environment of the fault server that started it.
    Keeper,
}

/// A failpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its name: component and step.
    pub name: &'static str,
    /// Where it is.
    pub process: Process,
    /// Whether the step can really fail there: whether the action `error` is for it.
    pub fails: bool,
}

const fn fails(process: Process, name: &'static str) -> Point {
    Point { name, process, fails: true }
}

const fn plain(process: Process, name: &'static str) -> Point {
    Point { name, process, fails: false }
}

/// All points, in the order of a migration at each process.
pub const POINTS: &[Point] = &[
    fails(Process::Source, "source::after_attached"),
    fails(Process::Source, "source::before_keeper_started"),
    fails(Process::Source, "source::before_hand_over"),
    fails(Process::Source, "source::after_hand_over"),
    fails(Process::Source, "source::before_epoch_kept"),
    plain(Process::Source, "source::after_epoch_kept"),
    fails(Process::Source, "source::before_dial"),
    fails(Process::Source, "source::after_urgent_connected"),
    fails(Process::Source, "source::before_push_connected"),
    fails(Process::Source, "source::after_push_connected"),
    fails(Process::Source, "source::before_hello_sent"),
    fails(Process::Source, "source::after_hello_sent"),
    fails(Process::Source, "source::before_pause"),
    fails(Process::Source, "source::after_pause"),
    fails(Process::Source, "source::before_pause_kept"),
    plain(Process::Source, "source::after_pause_kept"),
    fails(Process::Source, "source::before_state_sent"),
    fails(Process::Source, "source::after_state_sent"),
    fails(Process::Source, "source::before_seed_claimed"),
    fails(Process::Source, "source::after_seed_claimed"),
    plain(Process::Source, "source::after_seed_sent"),
    fails(Process::Source, "source::before_commit_word"),
    plain(Process::Source, "source::after_commit_word"),
    fails(Process::Source, "source::before_commit_sent"),
    fails(Process::Source, "source::after_commit_sent"),
    fails(Process::Source, "source::before_push_claimed"),
    fails(Process::Source, "source::after_push_claimed"),
    plain(Process::Source, "source::after_push_sent"),
    fails(Process::Source, "source::before_zero_scan"),
    fails(Process::Source, "source::before_zeros_claimed"),
    fails(Process::Source, "source::after_zeros_claimed"),
    plain(Process::Source, "source::after_zeros_sent"),
    fails(Process::Source, "source::before_demand_claimed"),
    fails(Process::Source, "source::after_demand_claimed"),
    plain(Process::Source, "source::after_demand_sent"),
    fails(Process::Source, "source::before_release"),
    plain(Process::Source, "source::after_release"),
    plain(Process::Source, "source::before_keeper_released"),
    plain(Process::Source, "source::after_keeper_released"),
    fails(Process::Source, "source::before_released_sent"),
    fails(Process::Source, "source::after_released_sent"),
    plain(Process::Source, "source::before_resume"),
    plain(Process::Source, "source::after_resume"),
    fails(Process::Source, "source::before_abort_sent"),
    fails(Process::Source, "source::after_abort_sent"),
    fails(Process::Source, "source::before_reattach_sent"),
    fails(Process::Source, "source::after_reattach_sent"),
    plain(Process::Source, "source::before_ledger_resumed"),
    fails(Process::Source, "source::after_keeper_attached"),
    fails(Process::Destination, "destination::after_urgent_accepted"),
    fails(Process::Destination, "destination::after_first_message"),
    fails(Process::Destination, "destination::after_push_accepted"),
    fails(Process::Destination, "destination::before_reserved"),
    plain(Process::Destination, "destination::after_reserved"),
    fails(Process::Destination, "destination::before_registered"),
    plain(Process::Destination, "destination::after_registered"),
    fails(Process::Destination, "vmm::before_prepare"),
    fails(Process::Destination, "vmm::after_prepare"),
    fails(Process::Destination, "destination::before_accept_sent"),
    fails(Process::Destination, "destination::after_accept_sent"),
    fails(Process::Destination, "destination::before_refuse_sent"),
    fails(Process::Destination, "destination::after_refuse_sent"),
    fails(Process::Destination, "vmm::before_restore"),
    fails(Process::Destination, "vmm::after_restore"),
    fails(Process::Destination, "destination::before_seed_landed"),
    fails(Process::Destination, "destination::after_seed_landed"),
    plain(Process::Destination, "destination::after_placed"),
    fails(Process::Destination, "destination::after_seed_installed"),
    fails(Process::Destination, "destination::before_ready_sent"),
    fails(Process::Destination, "destination::after_ready_sent"),
    fails(Process::Destination, "destination::before_abort_sent"),
    fails(Process::Destination, "destination::after_abort_sent"),
    fails(Process::Destination, "vmm::before_enter"),
    fails(Process::Destination, "vmm::after_enter"),
    fails(Process::Destination, "destination::before_lost_sent"),
    fails(Process::Destination, "destination::after_lost_sent"),
    fails(Process::Destination, "destination::before_running_sent"),
    fails(Process::Destination, "destination::after_running_sent"),
    fails(Process::Destination, "destination::before_fault_read"),
    plain(Process::Destination, "destination::before_fault_answered"),
    fails(Process::Destination, "destination::before_request_sent"),
    fails(Process::Destination, "destination::after_request_sent"),
    fails(Process::Destination, "destination::before_page_landed"),
    fails(Process::Destination, "destination::after_page_landed"),
    fails(Process::Destination, "destination::after_zeros_landed"),
    fails(Process::Destination, "destination::before_zero_placed"),
    fails(Process::Destination, "destination::after_page_installed"),
    plain(Process::Destination, "destination::before_unregistered"),
    fails(Process::Destination, "destination::before_drained_sent"),
    fails(Process::Destination, "destination::after_drained_sent"),
    fails(Process::Destination, "destination::before_report_sent"),
    fails(Process::Destination, "destination::after_report_sent"),
    fails(Process::Destination, "destination::before_placed_sent"),
    fails(Process::Destination, "destination::after_placed_sent"),
    fails(Process::Vmm, "vmm::before_welcome_sent"),
    fails(Process::Vmm, "vmm::after_welcome_sent"),
    fails(Process::Vmm, "vmm::before_pause"),
    fails(Process::Vmm, "vmm::after_pause"),
    fails(Process::Vmm, "vmm::after_capture"),
    fails(Process::Vmm, "vmm::before_paused_sent"),
    fails(Process::Vmm, "vmm::after_paused_sent"),
    plain(Process::Vmm, "vmm::before_abort_word"),
    plain(Process::Vmm, "vmm::after_abort_word"),
    fails(Process::Vmm, "vmm::before_resume"),
    plain(Process::Vmm, "vmm::after_resume"),
    fails(Process::Vmm, "vmm::before_resumed_sent"),
    fails(Process::Vmm, "vmm::before_released_sent"),
    plain(Process::Vmm, "vmm::after_released_sent"),
    fails(Process::Keeper, "keeper::before_hand_over"),
    fails(Process::Keeper, "keeper::before_kept_sent"),
    fails(Process::Keeper, "keeper::after_kept_sent"),
    fails(Process::Keeper, "keeper::before_welcome_sent"),
    fails(Process::Keeper, "keeper::after_welcome_sent"),
    plain(Process::Keeper, "keeper::before_abort_word"),
    plain(Process::Keeper, "keeper::after_abort_word"),
    fails(Process::Keeper, "keeper::before_resumed_sent"),
    fails(Process::Keeper, "keeper::before_released_sent"),
    plain(Process::Keeper, "keeper::after_released_sent"),
];
