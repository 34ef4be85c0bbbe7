//! [`DirtyLog`]: which pages the vCPUs' threads wrote, as the kernel logs it for the mapping
//! that they work through.
//!
//! Whatever of the reference VMM writes to guest memory does so through this mapping, too: the
//! first content, and the instruments that are reset. The fault-server's mapping is read-only,
//! and nobody writes to the files.

use super::ProcessError;
use crate::memory::dirty_bitmap::DirtyBitmap;
use crate::memory::ram::GuestRam;
use crate::proto::page::PageIndex;
use crate::uffd::WriteLog;
use std::sync::Arc;

/// Whether a guest's writes are logged.
#[derive(Debug, Default)]
pub(super) struct DirtyLog(Option<WriteLog>);

impl DirtyLog {
    /// Begins to log, with nothing logged.
    pub(super) fn start(&mut self, ram: &Arc<GuestRam>) -> Result<(), ProcessError> {
        // Memory cannot be under two logs.
        self.stop()?;
        self.0 = Some(WriteLog::start(Arc::clone(ram))?);
        Ok(())
    }

    /// Folds what was written since the last round into `bitmap`, and with it the pages
    /// that this process wrote; returns how many pages those are together. After an error
    /// nothing is logged any more.
    pub(super) fn round(
        &mut self,
        by_this_process: &[PageIndex],
        bitmap: &DirtyBitmap,
    ) -> Result<u64, ProcessError> {
        let log = self.0.as_mut().ok_or(ProcessError::NotLogging)?;
        let mut unseen = by_this_process.to_vec();
        let mut pages = 0;
        let taken = log.take(|run| {
            bitmap.set_run(run);
            pages += run.count();
            unseen.retain(|page| !run.contains(*page));
        });
        if let Err(error) = taken {
            self.0 = None;
            return Err(error.into());
        }
        unseen.iter().for_each(|page| bitmap.set(*page));
        Ok(pages + unseen.len() as u64)
    }

    /// Logs no more.
    pub(super) fn stop(&mut self) -> Result<(), ProcessError> {
        self.0.take().map_or(Ok(()), WriteLog::stop).map_err(ProcessError::from)
    }
}
