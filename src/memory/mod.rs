//! Guest memory as this process has it mapped.

pub mod dirty_bitmap;
pub mod guarded;
pub mod huge;
pub mod hugetlb;
pub mod limits;
pub mod ram;
pub mod reserve;
pub mod scan;
pub mod segment;
pub mod users;

#[cfg(test)]
mod properties;
