//! [`Voice`]: says things on a thread of its own, so that whoever has something to say never
//! waits for whoever listens.
//!
//! A reader of standard output or error can stop reading without going away: a pager, a
//! terminal after ctrl-s, a collector of logs that hangs. A write to it then takes as long as
//! that lasts. What is handed over here has a bounded room to wait in; what finds none is left
//! out and counted, and the count is said in its place as soon as somebody listens again.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Something that can be said.
pub trait Say: Send + 'static {
    /// How much of the room it takes while it waits.
    fn size(&self) -> usize;

    /// Whether it matters less than others: it never takes the room that is spared for them.
    fn is_minor(&self) -> bool;

    /// Whether it makes `older` worthless, which waits just before it: it takes its place.
    fn replaces(&self, older: &Self) -> bool;
}

/// What is to be said next.
#[derive(Debug)]
pub enum Said<T> {
    /// This.
    This(T),
    /// Nothing of so many that were to be said here.
    LeftOut(u64),
}

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Before what is minor is left out.
    pub minor: usize,
    /// Before anything is.
    pub all: usize,
}

/// Where things to say are handed over. The thread ends, after the last one, with the last
/// clone.
pub struct Voice<T: Say>(Arc<Handle<T>>);

struct Handle<T: Say>(Arc<Shared<T>>);

struct Shared<T> {
    room: Room,
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    waiting: VecDeque<Said<T>>,
    taken: usize,
    /// Since the last of those that wait.
    left_out: u64,
    speaking: bool,
    /// Nobody has anything to say any more.
    ended: bool,
    /// The thread says nothing any more.
    silent: bool,
}

impl<T: Say> Clone for Voice<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Say> Drop for Handle<T> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl<T: Say> Voice<T> {
    /// Has `say` called with each thing, on a thread of this name.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(
        name: &str,
        room: Room,
        say: impl FnMut(Said<T>) + Send + 'static,
    ) -> io::Result<Self> {
        let state = State {
            waiting: VecDeque::new(),
            taken: 0,
            left_out: 0,
            speaking: false,
            ended: false,
            silent: false,
        };
        let shared = Arc::new(Shared { room, state: Mutex::new(state), changed: Condvar::new() });
        let speaker = Speaker(shared.clone());
        std::thread::Builder::new().name(name.into()).spawn(move || speaker.run(say))?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// Hands `what` over. Never waits; says whether there was room.
    pub fn say(&self, what: T) -> bool {
        let shared = &self.0.0;
        let fits = shared.lock().push(what, shared.room);
        shared.changed.notify_all();
        fits
    }

    /// Waits until all was said, but not for long: says whether it was.
    pub fn finish(&self, within: Duration) -> bool {
        let shared = &self.0.0;
        let busy = |state: &mut State<T>| !state.silent && !state.is_done();
        let waited = shared.changed.wait_timeout_while(shared.lock(), within, busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_done()
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    fn is_done(&self) -> bool {
        !self.speaking && self.waiting.is_empty() && self.left_out == 0
    }
}

impl<T: Say> State<T> {
    fn push(&mut self, what: T, room: Room) -> bool {
        let size = what.size();
        if let Some(Said::This(last)) = self.waiting.back_mut()
            && self.left_out == 0
            && what.replaces(last)
        {
            self.taken = self.taken - last.size() + size;
            *last = what;
            return true;
        }
        let most = if what.is_minor() { room.minor } else { room.all };
        if self.taken + size > most {
            self.left_out += 1;
            return false;
        }
        if self.left_out > 0 {
            self.waiting.push_back(Said::LeftOut(std::mem::take(&mut self.left_out)));
        }
        self.taken += size;
        self.waiting.push_back(Said::This(what));
        true
    }

    fn pop(&mut self) -> Option<Said<T>> {
        let next = self.waiting.pop_front();
        match &next {
            Some(Said::This(what)) => self.taken -= what.size(),
            Some(Said::LeftOut(_)) => {}
            None if self.left_out > 0 => {
                return Some(Said::LeftOut(std::mem::take(&mut self.left_out)));
            }
            None => {}
        }
        next
    }
}

/// The thread's part.
struct Speaker<T>(Arc<Shared<T>>);

impl<T: Say> Speaker<T> {
    fn run(self, mut say: impl FnMut(Said<T>)) {
        while let Some(next) = self.next() {
            say(next);
        }
    }

    fn next(&self) -> Option<Said<T>> {
        let mut state = self.0.lock();
        state.speaking = false;
        if state.is_done() {
            self.0.changed.notify_all();
        }
        let idle = |state: &mut State<T>| state.is_done() && !state.ended;
        let mut state =
            self.0.changed.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
        let next = state.pop();
        state.speaking = next.is_some();
        next
    }
}

impl<T> Drop for Speaker<T> {
    fn drop(&mut self) {
        self.0.lock().silent = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    #[derive(Debug, PartialEq)]
    enum Thing {
        Word(&'static str),
        Figure(u32),
    }

    impl Say for Thing {
        fn size(&self) -> usize {
            1
        }
        fn is_minor(&self) -> bool {
            matches!(self, Thing::Figure(_))
        }
        fn replaces(&self, older: &Self) -> bool {
            // Tens are of one kind.
            matches!((self, older), (Thing::Figure(new), Thing::Figure(old)) if new / 10 == old / 10)
        }
    }

    /// A voice whose listener takes a thing only when it is told to, and what it heard.
    fn stalled(room: Room) -> (Voice<Thing>, Sender<()>, Receiver<String>) {
        let ((go, gone), (heard, hear)) = (channel::<()>(), channel());
        let say = move |said| {
            let _ = heard.send(match said {
                Said::This(Thing::Word(word)) => word.to_owned(),
                Said::This(Thing::Figure(figure)) => figure.to_string(),
                Said::LeftOut(count) => format!("-{count}"),
            });
            let _ = gone.recv();
        };
        (Voice::start("test", room, say).unwrap(), go, hear)
    }

    const LONG: Duration = Duration::from_secs(20);

    fn rest(go: Sender<()>, hear: &Receiver<String>) -> Vec<String> {
        // The listener reads on from here.
        drop(go);
        hear.iter().collect()
    }

    #[test]
    fn words_are_not_displaced_by_figures_and_all_that_is_left_out_is_counted_in_its_place() {
        let (voice, go, hear) = stalled(Room { minor: 2, all: 4 });
        assert!(voice.say(Thing::Word("first")));
        assert_eq!(hear.recv_timeout(LONG).unwrap(), "first");
        // From here on nobody takes any.
        for (figure, fits) in [(10, true), (20, true), (30, false), (40, false)] {
            assert_eq!(voice.say(Thing::Figure(figure)), fits, "{figure}");
        }
        assert!(voice.say(Thing::Word("second")));
        assert!(voice.say(Thing::Word("third")));
        assert!(!voice.say(Thing::Word("fourth")));
        assert!(!voice.finish(Duration::from_millis(20)), "nobody listens");
        drop(voice);
        assert_eq!(rest(go, &hear), ["10", "20", "-2", "second", "third", "-1"]);
    }

    #[test]
    fn the_newest_figure_takes_the_place_of_those_that_it_makes_worthless() {
        let (voice, go, hear) = stalled(Room { minor: 8, all: 8 });
        voice.say(Thing::Word("first"));
        assert_eq!(hear.recv_timeout(LONG).unwrap(), "first");
        for figure in [10, 11, 12, 20, 21] {
            assert!(voice.say(Thing::Figure(figure)));
        }
        voice.say(Thing::Word("second"));
        // Not over a word: it is later than that.
        voice.say(Thing::Figure(22));
        drop(voice);
        assert_eq!(rest(go, &hear), ["12", "21", "second", "22"]);
    }

    #[test]
    fn the_end_waits_for_a_listener_and_not_for_a_voice_that_is_gone() {
        let (voice, go, hear) = stalled(Room { minor: 8, all: 8 });
        voice.say(Thing::Word("first"));
        assert_eq!(hear.recv_timeout(LONG).unwrap(), "first");
        assert!(!voice.finish(Duration::from_millis(20)), "it is in the middle of it");
        drop(go);
        assert!(voice.finish(LONG));
        let broken = Voice::start("test", Room { minor: 1, all: 1 }, |_| {
            std::panic::resume_unwind(Box::new("nothing can be said"));
        });
        let broken = broken.unwrap();
        broken.say(Thing::Word("first"));
        broken.finish(LONG);
        broken.say(Thing::Word("second"));
        let began = std::time::Instant::now();
        assert!(!broken.finish(LONG));
        assert!(began.elapsed() < LONG / 2);
    }
}
