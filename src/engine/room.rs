//! [`Room`]: how much may wait for a session's driver of what others can say at any time.
//!
//! A driver may stand still for a while, because its peer takes no message. All else that it
//! waits for comes from what it has begun itself, and each of that has one end.

use std::sync::Arc;
use tokio::sync::Semaphore;

/// Two, because a second one means more than the first: not even to tell the peer.
const CANCELS_MAX: usize = 2;
/// The most requests of operators, those included whose askers have gone.
pub(super) const REQUESTS_MAX: usize = 64;

/// What waits holds one of these permits until it is taken.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub cancels: Arc<Semaphore>,
    pub requests: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Self {
        let of = |most| Arc::new(Semaphore::new(most));
        Self { cancels: of(CANCELS_MAX), requests: of(REQUESTS_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::operator::{Answer, Asked, Operator, Refusal, Request};
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    #[test]
    fn of_many_who_ask_a_session_that_stands_still_those_who_find_no_room_are_told_at_once() {
        let room = Room::default();
        let waiting: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let queue = waiting.clone();
        let operator = Operator::new(&room, move |asked| {
            queue.lock().unwrap().push(asked);
            true
        });
        let full = Answer::Refused(Refusal::NotNow {
            why: format!("{REQUESTS_MAX} others have asked, and wait for an answer"),
        });
        std::thread::scope(|scope| {
            let ask = |_| scope.spawn(|| operator.clone().ask(Request::Status));
            let asking: Vec<_> = (0..REQUESTS_MAX).map(ask).collect();
            let began = Instant::now();
            while waiting.lock().unwrap().len() < REQUESTS_MAX {
                assert!(began.elapsed() < Duration::from_secs(8), "not all have asked");
                std::thread::yield_now();
            }
            for _ in 0..1000 {
                assert_eq!(operator.ask(Request::Status), full);
            }
            let done = || Answer::Done { text: String::new() };
            waiting.lock().unwrap().drain(..).for_each(|asked| asked.answer(done()));
            for asked in asking {
                assert_eq!(asked.join().unwrap(), done());
            }
        });
        assert_eq!(room.requests.available_permits(), REQUESTS_MAX);
    }
}
