//! What output waits in for one reader, and what is kept for readers to come.

use std::collections::VecDeque;
use std::io;

/// How much output waits for one reader; what comes after that is dropped.
const BACKLOG: usize = 256 << 10;
/// How much output a new reader is shown.
pub(super) const SCROLLBACK: usize = 64 << 10;

/// The output that one reader has not taken yet.
#[derive(Default)]
pub(super) struct Sink {
    backlog: VecDeque<u8>,
    dropped: u64,
}

impl Sink {
    /// Adds output; what does not fit is dropped, and a notice says so once there is room again.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.tell_dropped();
        let room = if self.dropped > 0 { 0 } else { BACKLOG.saturating_sub(self.backlog.len()) };
        let taken = room.min(bytes.len());
        self.backlog.extend(&bytes[..taken]);
        self.drop_more((bytes.len() - taken) as u64);
    }

    /// Counts output that was lost on the way here.
    pub(super) fn drop_more(&mut self, bytes: u64) {
        self.dropped = self.dropped.saturating_add(bytes);
    }

    fn tell_dropped(&mut self) {
        if self.dropped > 0 && self.backlog.len() <= BACKLOG / 2 {
            let notice = format!("\r\n[omega: {} bytes of output were dropped here]\r\n", self.dropped);
            self.backlog.extend(notice.as_bytes());
            self.dropped = 0;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.backlog.is_empty() && self.dropped == 0
    }

    /// Gives to `write` until all is taken or it would block.
    ///
    /// # Errors
    /// The reader is gone.
    pub(super) fn drain(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        loop {
            self.tell_dropped();
            let (first, _) = self.backlog.as_slices();
            if first.is_empty() {
                return Ok(());
            }
            match write(first) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => drop(self.backlog.drain(..taken.min(self.backlog.len()))),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(why) => return Err(why),
            }
        }
    }
}

/// The last output, for readers to come.
#[derive(Default)]
pub(super) struct Scrollback {
    bytes: VecDeque<u8>,
    cut: bool,
}

impl Scrollback {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(SCROLLBACK)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(SCROLLBACK);
        self.cut |= excess > 0;
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    /// What is kept; from the first whole line on, when older output is gone.
    pub(super) fn replay(&self) -> Vec<u8> {
        let line = self.bytes.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let start = if self.cut && line < self.bytes.len() { line } else { 0 };
        self.bytes.range(start..).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(sink: &mut Sink) -> Vec<u8> {
        let mut all = Vec::new();
        sink.drain(|bytes| {
            all.extend_from_slice(bytes);
            Ok(bytes.len())
        })
        .expect("the reader takes all");
        all
    }

    #[test]
    fn a_reader_that_is_too_slow_loses_output_and_is_told_how_much() {
        let mut sink = Sink::default();
        sink.push(&vec![b'a'; BACKLOG]);
        sink.push(b"lost");
        sink.push(b"lost too");
        let blocked = sink.drain(|_| Err(io::ErrorKind::WouldBlock.into()));
        assert!(blocked.is_ok() && !sink.is_empty());
        let all = taken(&mut sink);
        let tail = String::from_utf8_lossy(&all[BACKLOG..]).into_owned();
        assert_eq!(tail, "\r\n[omega: 12 bytes of output were dropped here]\r\n");
        sink.push(b"back");
        assert_eq!(taken(&mut sink), b"back");
        assert!(sink.is_empty());
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error() {
        let mut sink = Sink::default();
        sink.push(b"x");
        assert!(sink.drain(|_| Err(io::ErrorKind::BrokenPipe.into())).is_err());
        assert!(sink.drain(|_| Ok(0)).is_err());
    }

    #[test]
    fn the_scrollback_keeps_the_last_output_from_a_whole_line_on() {
        let mut scrollback = Scrollback::default();
        scrollback.push(b"no newline");
        assert_eq!(scrollback.replay(), b"no newline");
        for line in 0..10_000 {
            scrollback.push(format!("line {line:05}\n").as_bytes());
        }
        let kept = String::from_utf8(scrollback.replay()).expect("the output was text");
        assert!(kept.len() <= SCROLLBACK && kept.len() > SCROLLBACK - 12, "{}", kept.len());
        assert!(kept.starts_with("line ") && kept.ends_with("line 09999\n"));
        scrollback.push(&vec![b'x'; 2 * SCROLLBACK]);
        assert_eq!(scrollback.replay().len(), SCROLLBACK, "a line longer than all is shown as it is");
    }
}
