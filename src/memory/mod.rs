//! Guest memory as this process has it mapped.

pub mod ram;
