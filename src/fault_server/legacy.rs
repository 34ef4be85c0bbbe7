//! [`Legacy`]: what a fault server leaves to the one after it, whoever holds it meanwhile.

use super::record::{RecordError, RecordFile};
use crate::attach::commit_word::CommitWord;
use crate::attach::handover::MemoryFiles;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The guest's memory, its commit word and the session's record, as files.
#[derive(Debug)]
pub struct Legacy {
    memory: Vec<OwnedFd>,
    word: Arc<CommitWord>,
    record: RecordFile,
}

impl Legacy {
    /// Of these.
    ///
    /// # Errors
    /// If there is no room for more descriptors.
    pub fn of(
        memory: &MemoryFiles<'_>,
        word: &Arc<CommitWord>,
        record: &RecordFile,
    ) -> Result<Self, RecordError> {
        let own = |file: &BorrowedFd<'_>| file.try_clone_to_owned();
        let memory = memory.files().iter().map(own).collect::<io::Result<_>>();
        let memory =
            memory.map_err(|source| RecordError::System { action: "leave files with", source })?;
        Ok(Self { memory, word: word.clone(), record: record.share()? })
    }

    /// The files that the memory lies in: where in them, the record says.
    pub fn memory(&self) -> Vec<BorrowedFd<'_>> {
        self.memory.iter().map(AsFd::as_fd).collect()
    }

    /// The commit word.
    pub fn word(&self) -> &CommitWord {
        &self.word
    }

    /// The session's record.
    pub fn record(&self) -> &RecordFile {
        &self.record
    }
}
