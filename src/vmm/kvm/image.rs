//! The guest's memory at its beginning: content, tables and program, and where a processor
//! enters them. Nothing here is KVM's own: any machine whose memory lies as the layout says,
//! with a processor in long mode, runs the same program from the same image.

use super::error::KvmError;
use super::payload;
use super::tables::{self, TablePage};
use crate::memory::ram::GuestRam;
use crate::proto::layout::MemoryLayout;
use crate::proto::page::{PAGE_SIZE, PageIndex, PageRun};
use crate::vmm::content::fill_memory;
use crate::vmm::workload::{Workload, control_page};

/// The registers that a vCPU's program begins with, segments and stacks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `cr3`: guest physical address of the page tables' root.
    pub page_tables: u64,
    /// `rip`: guest virtual address of the first instruction.
    pub instruction: u64,
    /// `r15`: guest virtual address of the vCPU's control page.
    pub control: u64,
}

impl Entry {
    /// That of `vcpu`.
    pub fn new(layout: &MemoryLayout, vcpu: u32) -> Self {
        Self {
            page_tables: tables::root_address(layout),
            instruction: payload::entry_address(),
            control: tables::virtual_address(control_page(vcpu)),
        }
    }
}

/// Writes all of the guest's memory. `tick_hz` is the rate of the time-stamp counter that the
/// program is going to see.
pub fn write(ram: &GuestRam, workload: &Workload, tick_hz: u64) -> Result<(), KvmError> {
    workload.check_under_kvm(ram.layout())?;
    let tables = tables::page_tables(ram.layout(), workload.form.page_tables)?;
    fill_memory(ram, workload, tick_hz);
    for (page, table) in tables {
        write_page(ram, page, &table_bytes(&table));
    }
    let interrupts = tables::interrupt_table(payload::handlers());
    write_page(ram, tables::IDT, &table_bytes(&interrupts));
    for (page, part) in (tables::CODE.get()..).zip(payload::program().chunks(PAGE_SIZE)) {
        write_page(ram, PageIndex::new(page), part);
    }
    for vcpu in 0..workload.vcpus {
        write_page(ram, tables::processor_page(vcpu), &tables::processor_tables(vcpu));
        write_page(ram, tables::clock_page(vcpu), &[]);
    }
    Ok(())
}

/// The rest of the page becomes 0.
fn write_page(ram: &GuestRam, page: PageIndex, bytes: &[u8]) {
    let mut whole = [0; PAGE_SIZE];
    whole[..bytes.len()].copy_from_slice(bytes);
    ram.write_run(PageRun::single(page), &whole);
}

fn table_bytes(table: &TablePage) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
