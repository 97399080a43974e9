//! The least that any implementation has to do: bare sockets and bare files.

pub mod file;
pub mod tcp;
