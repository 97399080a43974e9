//! Numbers in order, each once: the rules of a line, without effects.

use std::collections::{BTreeMap, VecDeque};

use super::{MOST_PAYLOAD, Message, WINDOW};

/// The other end broke the line's rules. The text is what people see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The peer broke the protocol: {0}")]
pub(crate) struct Violation(pub(crate) &'static str);

/// Nobody takes what is sent, for so long that too much waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// So many messages wait at most.
const MOST_MESSAGES: usize = 1 << 15;
/// So many bytes of them wait at most.
const MOST_BYTES: usize = 64 << 20;

/// Messages that wait to go, and those that went and were not confirmed.
#[derive(Debug)]
pub(crate) struct Sending {
    queue: VecDeque<Message>,
    /// The number of the first in the queue.
    first: u64,
    /// So many of the queue went over the connection that lasts.
    out: usize,
    /// So many of them went over any.
    went: usize,
    bytes: usize,
}

impl Sending {
    pub(crate) fn new() -> Self {
        Self { queue: VecDeque::new(), first: 1, out: 0, went: 0, bytes: 0 }
    }

    /// Takes one more.
    pub(crate) fn push(&mut self, message: Message) -> Result<(), Full> {
        if self.queue.len() >= MOST_MESSAGES || self.bytes + message.cost() > MOST_BYTES {
            return Err(Full);
        }
        self.bytes += message.cost();
        self.queue.push_back(message);
        Ok(())
    }

    /// So many have not gone.
    pub(crate) fn waiting(&self) -> usize {
        self.queue.len() - self.out
    }

    /// The next to go, with its number. It is kept until it is confirmed.
    pub(crate) fn next(&mut self) -> Option<(u64, Message)> {
        let message = self.queue.get(self.out)?.again();
        self.out += 1;
        self.went = self.went.max(self.out);
        Some((self.first + self.out as u64 - 1, message))
    }

    /// The next to go, with its number, for a carrier that keeps it until it is confirmed.
    pub(crate) fn pop(&mut self) -> Option<(u64, Message)> {
        debug_assert_eq!(self.out, 0, "nothing was only shown");
        let message = self.queue.pop_front()?;
        self.bytes -= message.cost();
        self.first += 1;
        Some((self.first - 1, message))
    }

    /// All up to `number` have come.
    ///
    /// # Errors
    /// So many have not gone.
    pub(crate) fn acked(&mut self, number: u64) -> Result<(), Violation> {
        // A request that is sent again says what was true when it was made.
        let Some(count) = number.checked_sub(self.first - 1).filter(|count| *count > 0) else {
            return Ok(());
        };
        if count > self.went as u64 {
            return Err(Violation("it confirms a message that was not sent"));
        }
        for message in self.queue.drain(..count as usize) {
            self.bytes -= message.cost();
        }
        self.first += count;
        self.went -= count as usize;
        self.out = self.out.saturating_sub(count as usize);
        Ok(())
    }

    /// What went and was not confirmed has to go again.
    pub(crate) fn rewind(&mut self) {
        self.out = 0;
    }

    /// Nothing will go any more.
    pub(crate) fn clear(&mut self) {
        *self = Self { first: self.first, ..Self::new() };
    }
}

/// What came.
#[derive(Debug, Default)]
pub(crate) struct Receiving {
    /// All up to this one came.
    last: u64,
    /// Those that overtook others.
    early: BTreeMap<u64, Message>,
}

impl Receiving {
    /// All messages up to this one have come.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// A message came; hands those that are due to `deliver`, in order.
    ///
    /// # Errors
    /// It is one that cannot be.
    pub(crate) fn take(
        &mut self,
        number: u64,
        message: Message,
        mut deliver: impl FnMut(Message),
    ) -> Result<(), Violation> {
        if message.payload.len() > MOST_PAYLOAD {
            return Err(Violation("a message with too long a payload"));
        }
        if number <= self.last {
            return Ok(());
        }
        if number - self.last > WINDOW as u64 {
            return Err(Violation("a message before its time"));
        }
        if number != self.last + 1 {
            self.early.entry(number).or_insert(message);
            return Ok(());
        }
        self.last = number;
        deliver(message);
        while let Some(message) = self.early.remove(&(self.last + 1)) {
            self.last += 1;
            deliver(message);
        }
        Ok(())
    }
}

/// Anything as what an answering end sends and confirms: no number does harm, and what is delivered is in order.
pub(crate) fn exercise(data: &[u8]) {
    let (mut sending, mut receiving) = (Sending::new(), Receiving::default());
    let (mut delivered, mut went) = (0, 0);
    let message = |number: u64| Message {
        body: super::Body::from_slice(&number.to_le_bytes()),
        payload: super::Buffer::empty(),
    };
    for step in data.chunks_exact(9) {
        let number =
            u64::from_le_bytes([step[1], step[2], step[3], step[4], step[5], step[6], step[7], step[8]]);
        match step[0] % 5 {
            0 => {
                let taken = receiving.take(number, message(number), |message| {
                    delivered += 1;
                    assert_eq!(message.body.as_slice(), u64::to_le_bytes(delivered), "in order");
                });
                assert!(taken.is_ok() || number > delivered);
                assert!(receiving.early.len() < WINDOW && receiving.last == delivered);
            }
            1 => assert!(sending.push(message(number)).is_ok()),
            2 => {
                if let Some((number, _)) = sending.next() {
                    went = went.max(number);
                }
            }
            3 => assert!(sending.acked(number).is_err() || number <= went),
            _ => sending.rewind(),
        }
    }
}
