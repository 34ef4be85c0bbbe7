//! Standard output and error, of which nothing in this process waits for the reader: each has
//! a [`Voice`].

use super::voice::{Room, Said, Say, Voice};
use std::io::{self, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

/// How long the end of a process waits for those who read what it said.
pub const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes of lines that wait. The log leaves some to words: they say how the process ended.
const ROOM: Room = Room { minor: 1 << 20, all: (1 << 20) + (256 << 10) };

/// A line, or several that belong together, with the last end of line.
#[derive(Debug)]
pub struct Line {
    bytes: Vec<u8>,
    is_log: bool,
}

impl Line {
    /// A word to people.
    pub fn word(line: &str) -> Self {
        Self { bytes: format!("{line}\n").into_bytes(), is_log: false }
    }
}

impl Say for Line {
    fn size(&self) -> usize {
        self.bytes.len()
    }

    fn is_minor(&self) -> bool {
        self.is_log
    }

    fn replaces(&self, _older: &Self) -> bool {
        false
    }
}

/// A voice that writes to `stream`.
///
/// # Errors
/// If there is no thread to be had.
pub fn voice_to(name: &str, mut stream: impl Write + Send + 'static) -> io::Result<Voice<Line>> {
    Voice::start(name, ROOM, move |said| write(&mut stream, said))
}

fn write(stream: &mut impl Write, said: Said<Line>) {
    // Whoever read there may be gone, which is nothing to the guest.
    let _ = match said {
        Said::This(line) => stream.write_all(&line.bytes),
        Said::LeftOut(count) => {
            writeln!(stream, "({count} lines are missing here: nobody read for too long)")
        }
    };
    let _ = stream.flush();
}

static OUT: LazyLock<io::Result<Voice<Line>>> = LazyLock::new(|| voice_to("stdout", io::stdout()));
static ERR: LazyLock<io::Result<Voice<Line>>> = LazyLock::new(|| voice_to("stderr", io::stderr()));

/// Makes both voices: later there may be no threads to be had.
pub(super) fn open() {
    LazyLock::force(&OUT);
    LazyLock::force(&ERR);
}

fn hand_over(voice: &io::Result<Voice<Line>>, mut stream: impl Write, line: Line) {
    match voice {
        Ok(voice) => drop(voice.say(line)),
        // Without a thread there is no guest that could wait for this one.
        Err(_) => write(&mut stream, Said::This(line)),
    }
}

/// Says a line on standard output.
pub fn out(line: &str) {
    hand_over(&OUT, io::stdout(), Line::word(line));
}

/// Says a line on standard error.
pub fn err(line: &str) {
    hand_over(&ERR, io::stderr(), Line::word(line));
}

/// To be called before the process ends: waits a moment for what was said to be read.
pub fn farewell() {
    let until = Instant::now() + FAREWELL;
    for voice in [&OUT, &ERR].into_iter().filter_map(|voice| voice.as_ref().ok()) {
        voice.finish(until.saturating_duration_since(Instant::now()));
    }
}

/// Where the log goes: to standard error, line by line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        hand_over(&ERR, io::stderr(), Line { bytes: line.to_owned(), is_log: true });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

/// Has panics said here, too. The usual way is to write to standard error at once: a thread
/// that panics would not end before somebody reads, nor would whoever waits for its end.
pub(super) fn take_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let trace = std::backtrace::Backtrace::capture();
        let mut text = format!("thread {:?} {panic}", thread.name().unwrap_or("without a name"));
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            text += &format!("\n{trace}");
        }
        err(&text);
        // It may be the last thing that this process does.
        farewell();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_reader_who_comes_back_is_told_how_much_is_missing_and_all_words_are_there() {
        let (mut read, write) = io::pipe().unwrap();
        let voice = voice_to("test", write).unwrap();
        let log = vec![b'x'; ROOM.minor / 8 - 1];
        let log = || Line { bytes: [log.as_slice(), b"\n"].concat(), is_log: true };
        // One is on its way into the pipe, which it does not fit, and no other leaves.
        assert!(voice.say(log()));
        read.read_exact(&mut [0]).unwrap();
        let fit = (0..20).filter(|_| voice.say(log())).count();
        assert_eq!(fit, 8);
        assert!(voice.say(Line::word("a word")));
        assert!(!voice.finish(Duration::from_millis(20)), "nobody reads");
        drop(voice);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        let rest: Vec<&str> = text.lines().skip(1 + fit).collect();
        assert_eq!(rest, ["(12 lines are missing here: nobody read for too long)", "a word"]);
    }
}
