//! `fault-server`: serves a guest's memory from the source host.
fn main() {}
