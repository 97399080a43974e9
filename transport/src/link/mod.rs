//! What carries frames between two sides: TCP, with TLS between the socket and the decoder unless it is
//! switched off; a [`Channel`](crate::channel::Channel) and a
//! [`Connection`](crate::server::Connection) see only this trait.

pub(crate) mod connect;
pub(crate) mod rdma;
pub(crate) mod tcp;
pub(crate) mod tls;

use std::time::Instant;

use crate::carrier::Carrier;
use crate::core::stream::Peer;
use crate::ring::Ring;
use crate::wire::Fault;

/// A connection that carries frames. It holds no pointer to anybody's memory between two calls.
pub(crate) trait Link: Send {
    /// Sends what `peer` has ready, as far as the network takes it now.
    ///
    /// # Errors
    /// The connection is broken.
    fn send(&mut self, peer: &mut dyn Peer) -> Result<(), Fault>;

    /// Asks `ring` to say when there is more to receive or room to send.
    fn arm(&mut self, ring: &mut Ring);

    /// An operation of this link completed, `token` being the low 48 bits of its token; receives what is
    /// there, within a bound. `true`: something was.
    ///
    /// # Errors
    /// The connection is broken, or the other side broke the protocol.
    fn completed(&mut self, token: u64, result: i32, peer: &mut dyn Peer) -> Result<bool, Fault>;

    /// Whether the network took all that was handed to it.
    fn is_flushed(&self) -> bool;

    /// When it wants to be asked to [`send`](Self::send) next at the latest, of its own.
    fn due(&self) -> Option<Instant>;

    /// Since when the network takes nothing, if it does not.
    fn blocked_since(&self) -> Option<Instant>;

    /// The memory of request `id` is wanted by its owner, `receiving` also that of the payload coming in.
    fn let_go(&mut self, id: u64, receiving: bool);

    /// Whether the other side's hello came.
    fn greeted(&self) -> bool;

    /// What carries the frames.
    fn carrier(&self) -> Carrier;

    /// Something else carries the connection since this was last asked, or why RDMA does not.
    fn take_notice(&mut self) -> Option<(Carrier, String)> {
        None
    }

    /// Forgets what it took from its side and did not hand to the network. `true`: frames may follow, as nothing
    /// was cut in the middle.
    fn drop_queued(&mut self) -> bool;

    /// Nothing more will be sent; the other side sees the end of the stream after all that was.
    fn finish(&mut self);

    /// Ends the connection.
    fn close(&mut self, ring: &mut Ring);
}
