//! The least that any implementation has to do: bare sockets and bare files.

pub mod fault;
pub mod file;
mod placed;
pub mod tcp;
