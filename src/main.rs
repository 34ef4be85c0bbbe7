//! The `postcopy` command.
fn main() {}
