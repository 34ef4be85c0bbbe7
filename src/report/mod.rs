//! What a migration did: measured, written down, and shown.
