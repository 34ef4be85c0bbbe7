//! The arguments that describe a guest, and the guest made of them.

use anyhow::Context;
use clap::Args;
use postcopy::host::new_guest;
use postcopy::memory::hugetlb;
use postcopy::memory::limits::check_can_hold;
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::program::signals::complain;
use postcopy::program::units::parse_memory;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::PAGE_SIZE;
use postcopy::vmm::choice::WorkloadChoice;
use postcopy::vmm::guest::{DirtyLogChoice, Guest, GuestKind};
use postcopy::vmm::kvm::kvm_available;
use postcopy::vmm::trace::{Trace, TraceError};
use postcopy::vmm::workload::{Cpl, MachineForm, PageTables, Pattern, Workload};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What guest to start.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// A virtual machine under KVM, or threads of a process [default: kvm where it works, and
    /// process for a trace].
    #[arg(long, value_enum)]
    pub guest: Option<GuestKind>,
    /// Guest memory, for instance 512M or 4G.
    #[arg(long, default_value = "512M", value_parser = parse_memory, value_name = "SIZE")]
    pub memory: u64,
    /// Make it of huge pages of 2 MiB (hugetlbfs) from the host's pool, vm.nr_hugepages. What it is
    /// made of at the destination is said there.
    #[arg(long)]
    pub hugetlb: bool,
    /// Virtual CPUs, 1 to 4.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    pub vcpus: u32,
    /// The order in which the guest visits its pages: sequential, strided, random, zipf,
    /// hot-set-with-scan, pointer-chase or read-modify-write; or trace:FILE, a trace of a real
    /// guest's first touches, which the process guest replays, anew when it has moved and
    /// whenever it ends.
    #[arg(long, default_value = "random", value_name = "PATTERN")]
    pub workload: WorkloadChoice,
    /// Least time from one step of a vCPU to its next, in nanoseconds. A trace has its own
    /// times beside it.
    #[arg(long, default_value_t = 0, value_name = "NS")]
    pub think_ns: u64,
    /// Steps that each vCPU makes before it rests; 0: no end.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub steps: u64,
    /// Seed of the memory's content and of the random patterns.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Part of the memory that is zero, in percent: half of it holes, half written.
    #[arg(long, default_value_t = 0, value_name = "PERCENT",
          value_parser = clap::value_parser!(u64).range(0..=90))]
    pub zero: u64,
    /// How the guest's page tables map its memory: by 2 MiB where possible, or each page by
    /// an entry of its own. For the KVM guest.
    #[arg(long, value_enum, default_value = "2m")]
    pub page_tables: PageTables,
    /// The privilege of the guest's program: 3, or 0, which a KVM without VT-x or SVM
    /// emulates, a thousand times slower. For the KVM guest.
    #[arg(long, value_enum, default_value = "3")]
    pub cpl: Cpl,
}

impl GuestArgs {
    /// The guest asked for; where KVM does not work and was not asked for, the process
    /// guest, with a line that says so.
    pub fn kind(&self) -> GuestKind {
        self.guest.unwrap_or_else(|| kind_for([&self.workload]))
    }

    /// What the guest does.
    ///
    /// # Errors
    /// A trace that cannot be read.
    pub fn workload(&self) -> Result<Workload, TraceError> {
        let pages = self.memory / PAGE_SIZE as u64;
        let (pattern, trace) = match &self.workload {
            WorkloadChoice::Pattern(pattern) => (*pattern, None),
            WorkloadChoice::Trace(file) => (Pattern::Trace, Some(Arc::new(Trace::load(file)?))),
        };
        Ok(Workload {
            pattern,
            seed: self.seed,
            vcpus: self.vcpus,
            think_ns: self.think_ns,
            step_limit: self.steps,
            zero_pages: pages * self.zero / 100,
            form: MachineForm { page_tables: self.page_tables, cpl: self.cpl },
            trace,
        })
    }

    /// Makes the guest; it does not run yet.
    pub fn create(&self, dirty_log: DirtyLogChoice) -> anyhow::Result<Box<dyn Guest>> {
        let kind = self.kind();
        if kind == GuestKind::Kvm {
            kvm_available().map_err(anyhow::Error::msg).context("KVM does not work here")?;
        }
        let layout = MemoryLayout::pc(self.memory / PAGE_SIZE as u64)?;
        let workload = self.workload()?;
        match kind {
            GuestKind::Kvm => workload.check_under_kvm(&layout)?,
            GuestKind::Process => workload.check_without_machine(&layout)?,
        }
        let ram = if self.hugetlb {
            let ram = GuestRam::new(layout, Backing::Hugetlb)?;
            hugetlb::reserve(&ram, &AtomicBool::new(false)).context("the guest does not fit")?;
            ram
        } else {
            check_can_hold(self.memory).context("the guest does not fit")?;
            GuestRam::new(layout, Backing::Memfd)?
        };
        let ram = Arc::new(ram);
        Ok(new_guest(kind, ram, workload, dirty_log)?)
    }

    /// The same arguments for a child process.
    pub fn to_arguments(&self, kind: GuestKind) -> Vec<String> {
        [
            ("--guest", kind.name().to_owned()),
            ("--memory", self.memory.to_string()),
            ("--vcpus", self.vcpus.to_string()),
            ("--workload", self.workload.to_string()),
            ("--think-ns", self.think_ns.to_string()),
            ("--steps", self.steps.to_string()),
            ("--seed", self.seed.to_string()),
            ("--zero", self.zero.to_string()),
            ("--page-tables", self.page_tables.name().to_owned()),
            ("--cpl", self.cpl.name().to_owned()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .chain(self.hugetlb.then(|| "--hugetlb".to_owned()))
        .collect()
    }
}

/// The guest that does any of `workloads`: KVM, but the process guest for a trace, and where KVM
/// does not work, with a line that says so.
pub fn kind_for<'a>(workloads: impl IntoIterator<Item = &'a WorkloadChoice>) -> GuestKind {
    match kvm_available() {
        _ if workloads.into_iter().any(|of| of.trace().is_some()) => GuestKind::Process,
        Ok(()) => GuestKind::Kvm,
        Err(why) => {
            let why = format!("KVM does not work here ({why}); using the process guest");
            complain("postcopy", &why);
            GuestKind::Process
        }
    }
}
