//! What memory lines carry: messages between any two members, all of which go by way of the console node.
//!
//! ```text
//! helper → console node:   for whom (1 byte), letters, content
//! console node → helper:   from whom (1 byte), letters, content
//! ```
//!
//! The console node passes on what is for another helper as it came. So helpers need no way to each other, and no trust:
//! who a message is from is what the console node knows, not what it says.

use std::sync::Arc;

use transport::buffer::Buffer;
use transport::line::{Hear, Sender};
use transport::wire::Body;

use crate::memory::coherence::message::Member;
use crate::memory::coherence::{Ear, Lines};

fn addressed(member: Member, body: &[u8]) -> Body {
    let mut out = Body::new();
    out.push(member.number());
    out.extend_from_slice(body);
    out
}

fn read(body: &[u8]) -> Option<(Member, &[u8])> {
    let (member, body) = body.split_first()?;
    Some((Member::new(*member)?, body))
}

/// A helper's way to all other members.
pub(super) struct Up(pub(super) Sender);

impl Lines for Up {
    fn send(&self, to: Member, body: &[u8], content: Option<Buffer>) {
        self.0.send(&addressed(to, body), content);
    }
}

/// Has a helper's engine hear what the console node sent.
///
/// # Errors
/// It makes no sense; in words.
pub(super) fn came_down(ear: &Ear, body: &[u8], content: Option<Buffer>) -> Result<(), &'static str> {
    let (from, body) = read(body).ok_or("a message about memory that makes no sense")?;
    ear.hear(from, body, content);
    Ok(())
}

/// The console node's ways to its helpers.
pub struct Hub {
    /// The memory lines, by member; the console node itself has none.
    lines: Vec<Option<Sender>>,
}

impl Hub {
    /// Helpers 1, 2, … at the ends of `lines`.
    #[must_use]
    pub fn new(lines: &[Sender]) -> Arc<Self> {
        let lines = std::iter::once(None).chain(lines.iter().cloned().map(Some)).collect();
        Arc::new(Self { lines })
    }

    fn line(&self, member: Member) -> Option<&Sender> {
        self.lines.get(usize::from(member.number()))?.as_ref()
    }
}

impl Lines for Hub {
    fn send(&self, to: Member, body: &[u8], content: Option<Buffer>) {
        if let (Some(line), Some(console)) = (self.line(to), Member::new(0)) {
            line.send(&addressed(console, body), content);
        }
    }
}

/// Hears a helper's memory line at the console node.
pub struct HubEar {
    hub: Arc<Hub>,
    helper: Member,
    ear: Ear,
}

impl HubEar {
    /// Hears `helper`; what is for the console node is for `ear`.
    #[must_use]
    pub fn new(hub: &Arc<Hub>, helper: Member, ear: Ear) -> Arc<Self> {
        Arc::new(Self { hub: Arc::clone(hub), helper, ear })
    }
}

impl Hear for HubEar {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        match read(body) {
            Some((to, body)) if to.number() == 0 => self.ear.hear(self.helper, body, payload),
            Some((to, body)) if to != self.helper && self.hub.line(to).is_some() => {
                if let Some(line) = self.hub.line(to) {
                    line.send(&addressed(self.helper, body), payload);
                }
            }
            _ => self.ear.lost("a helper sends to a member that there is not"),
        }
    }

    fn away(&self, _why: &str) {}

    fn back(&self) {}

    fn over(&self, why: &str) {
        self.ear.lost(why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::coherence::testing::{Order, Scene, member};

    #[test]
    fn an_address_is_what_comes_first() {
        assert_eq!(read(&addressed(member(3), b"letters")), Some((member(3), &b"letters"[..])));
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[u8::MAX, 1]), None, "nobody has such a number");
    }

    #[test]
    fn a_message_for_another_helper_goes_on_to_it_and_one_for_nobody_stops_the_guest() {
        for nowhere in [&[1_u8, 9][..], &[3, 9], &[200, 9], &[]] {
            let Some(scene) = Scene::new(3, 16 << 20, 1, Order::Sent) else { return };
            let lines = [0, 1].map(|_| Sender::new().expect("a line"));
            let hub = Hub::new(&lines);
            let ear = HubEar::new(&hub, member(1), scene.engines[0].ear());
            ear.hear(&[2, 9, 9], None);
            assert_eq!(lines.each_ref().map(Sender::waiting), [0, 1]);
            assert!(scene.stopped.lock().expect("no panic").is_empty());
            ear.hear(nowhere, None);
            assert_eq!(scene.stopped.lock().expect("no panic").len(), 1, "{nowhere:?}");
            assert_eq!(lines.each_ref().map(Sender::waiting), [0, 1]);
        }
    }
}
