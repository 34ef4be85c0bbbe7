//! What a migration did: measured ([`latency`]), written down ([`schema`]), shown
//! while it goes on ([`progress`]) and told at the end ([`human`]).
//!
//! It decides nothing and stamps no times of its own; the engine hands them in.

mod check;
mod compression;
pub mod human;
pub mod latency;
pub mod merge;
pub mod progress;
pub mod schema;

#[cfg(test)]
mod tests;
