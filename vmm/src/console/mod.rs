//! Consoles: a guest's serial (or virtio) console fans out to the terminal, to attached clients and to a
//! bounded scrollback; what people type goes back to the guest. The guest never waits for a reader.

mod escape;
mod event;
mod hub;
mod pump;
mod sink;
pub mod terminal;

pub use escape::{Command, Escape};
pub use hub::{Hub, Options};

/// A console could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket for `omega console` cannot be made.
    #[error("The console socket {path} cannot be made: {source}")]
    Socket {
        /// Where.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file for the output cannot be opened.
    #[error("The console file {path} cannot be opened: {source}")]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A thread or descriptor cannot be had.
    #[error("The console cannot be started: {0}")]
    Start(#[from] std::io::Error),
}
