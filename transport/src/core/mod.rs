//! The protocol without sockets and clocks: plain state machines that a link feeds with bytes and time.

pub(crate) mod answerer;
pub(crate) mod asker;
pub(crate) mod stream;
pub(crate) mod table;

#[cfg(test)]
mod sim_test;
