//! Taking a committed guest back where no fault server is left that could be asked to: from
//! its VMM, which has it paused, and under the eyes of its keeper, if there is one.

use super::{FaultServer, FaultServerError, Holder, LeftBehind, Place, keeper};
use crate::attach::client::{AttachError, Attached};
use crate::attach::commit_word::{Decision, NotInDoubt};
use crate::engine::operator::{Refusal, allowed};
use crate::proto::operator::{Consequence, Risk};
use std::path::Path;

/// Why a guest is not taken back. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum TakeBackError {
    /// It takes an acknowledgement.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Its VMM is not there, say, or somebody else is attached to it.
    #[error("the VMM cannot be asked whether it still has the guest")]
    Vmm(#[source] AttachError),
    /// It has failed, as its VMM says.
    #[error("the guest cannot go on: {0}")]
    Broken(String),
    /// It runs there, or was never committed.
    #[error(transparent)]
    NotInDoubt(#[from] NotInDoubt),
    /// Nobody can go on with the session, or somebody does.
    #[error(transparent)]
    FaultServer(#[from] FaultServerError),
}

/// What follows.
const COSTS: Consequence = Consequence {
    text: "the guest runs on in its VMM, from where it was paused. If the destination runs it, \
           there are two running guests that both believe to be the only one: make sure that its \
           host is down or cut off for good, or that it has been given up there",
    risk: Some(Risk::TwoRunningGuests),
};

impl FaultServer {
    /// Has the guest of the VMM behind `control`, which was committed by a fault server that
    /// has died, run on there: on the caller's word that it does not run at the destination,
    /// and never will. That there are two of it otherwise has to be acknowledged.
    ///
    /// Returns the session, if its keeper is there: its [`run`](Self::run) tells the
    /// destination, if that comes back, and ends aborted.
    ///
    /// # Errors
    /// If the guest was heard to run at the destination, was not committed, or is not in its
    /// VMM any more; and while a fault server is at work, which is asked through its operator
    /// socket.
    pub fn take_back(
        control: &Path,
        acknowledged: Option<Risk>,
    ) -> Result<Option<Self>, TakeBackError> {
        // While this one is attached no fault server can begin to go on with the session.
        let keeper = match keeper::connect(&keeper::socket_path(control)) {
            Ok(keeper) => Some(keeper),
            Err(AttachError::Connect { .. }) => None,
            Err(AttachError::Refused { .. }) => {
                let path = keeper::socket_path(control);
                let state = keeper::Occupied::Busy;
                return Err(FaultServerError::Kept { path, state }.into());
            }
            Err(error) => return Err(FaultServerError::from(error).into()),
        };
        let mut vmm = Attached::connect(control).map_err(TakeBackError::Vmm)?;
        let resumed_before = keeper.as_ref().is_some_and(|keeper| {
            keeper.word.decision() == Decision::TakenBack && !keeper.word.is(&vmm.word)
        });
        if !resumed_before {
            vmm.word.in_doubt()?;
            let status = vmm.status().map_err(TakeBackError::Vmm)?;
            if let Some(why) = status.failure {
                return Err(TakeBackError::Broken(why));
            }
            allowed(Ok(COSTS), acknowledged)?;
            let _its_vmms = vmm.word.take_back()?;
            // The word has decided: a VMM that does not answer now does it later.
            if let Err(error) = vmm.resume() {
                let error = crate::engine::error_chain(&error);
                tracing::warn!(error, "the VMM has not said yet that the guest runs on");
            }
        }
        match keeper {
            Some(keeper) => {
                let left =
                    LeftBehind::with(keeper, Place::Keeper).map_err(FaultServerError::from)?;
                Ok(Some(Self::go_on(left, control, None, Holder::Nobody)?))
            }
            None => Ok(None),
        }
    }
}
