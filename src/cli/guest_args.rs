//! The arguments that describe a guest, and the guest made of them.

use anyhow::Context;
use clap::Args;
use postcopy::host::new_guest;
use postcopy::memory::limits::check_can_hold;
use postcopy::memory::ram::{Backing, GuestRam};
use postcopy::program::signals::complain;
use postcopy::program::units::parse_memory;
use postcopy::proto::layout::MemoryLayout;
use postcopy::proto::page::PAGE_SIZE;
use postcopy::vmm::guest::{Guest, GuestKind};
use postcopy::vmm::kvm::kvm_available;
use postcopy::vmm::workload::{Cpl, MachineForm, PageTables, Pattern, Workload};
use std::sync::Arc;

/// What guest to start.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// A virtual machine under KVM, or threads of a process [default: kvm where it works].
    #[arg(long, value_enum)]
    pub guest: Option<GuestKind>,
    /// Guest memory, for instance 512M or 4G.
    #[arg(long, default_value = "512M", value_parser = parse_memory, value_name = "SIZE")]
    pub memory: u64,
    /// Virtual CPUs, 1 to 4.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    pub vcpus: u32,
    /// The order in which the guest visits its pages.
    #[arg(long, value_enum, default_value = "random")]
    pub workload: Pattern,
    /// Least time from one step of a vCPU to its next, in nanoseconds.
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
        self.guest.unwrap_or_else(default_kind)
    }

    /// What the guest does.
    pub fn workload(&self) -> Workload {
        let pages = self.memory / PAGE_SIZE as u64;
        Workload {
            pattern: self.workload,
            seed: self.seed,
            vcpus: self.vcpus,
            think_ns: self.think_ns,
            step_limit: self.steps,
            zero_pages: pages * self.zero / 100,
            form: MachineForm { page_tables: self.page_tables, cpl: self.cpl },
        }
    }

    /// Makes the guest; it does not run yet.
    pub fn create(&self) -> anyhow::Result<Box<dyn Guest>> {
        let kind = self.kind();
        if kind == GuestKind::Kvm {
            kvm_available().map_err(anyhow::Error::msg).context("KVM does not work here")?;
        }
        let layout = MemoryLayout::pc(self.memory / PAGE_SIZE as u64)?;
        let workload = self.workload();
        match kind {
            GuestKind::Kvm => workload.check(&layout)?,
            GuestKind::Process => workload.check_without_machine(&layout)?,
        }
        check_can_hold(self.memory).context("the guest does not fit")?;
        let ram = Arc::new(GuestRam::new(layout, Backing::Memfd)?);
        Ok(new_guest(kind, ram, workload)?)
    }

    /// The same arguments for a child process.
    pub fn to_arguments(&self, kind: GuestKind) -> Vec<String> {
        let pattern = clap::ValueEnum::to_possible_value(&self.workload);
        let pattern = pattern.map(|value| value.get_name().to_owned()).unwrap_or_default();
        [
            ("--guest", kind.name().to_owned()),
            ("--memory", self.memory.to_string()),
            ("--vcpus", self.vcpus.to_string()),
            ("--workload", pattern),
            ("--think-ns", self.think_ns.to_string()),
            ("--steps", self.steps.to_string()),
            ("--seed", self.seed.to_string()),
            ("--zero", self.zero.to_string()),
            ("--page-tables", self.page_tables.name().to_owned()),
            ("--cpl", self.cpl.name().to_owned()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

/// KVM, or where that does not work the process guest, with a line that says so.
pub fn default_kind() -> GuestKind {
    match kvm_available() {
        Ok(()) => GuestKind::Kvm,
        Err(why) => {
            let why = format!("KVM does not work here ({why}); using the process guest");
            complain("postcopy", &why);
            GuestKind::Process
        }
    }
}
