//! `omega-agent`: lends this PC's parts to Omega guests on other PCs. Today it serves volumes to lease
//! holders and reports what the PC has.
//!
//! One thread accepts connections and watches over the others; each connection has a thread of its own
//! with one io_uring, on which its socket and its volumes' files complete. See `docs/agent.md`.

mod admission;
pub mod cli;
pub mod config;
mod connection;
pub mod cpu;
pub mod inventory;
pub mod join;
pub mod lease;
mod lists;
mod memory;
mod metrics;
pub mod policy;
pub mod protection;
mod renewal;
pub mod serve;
mod tally;
pub mod volume;

/// Why the agent cannot do what it was asked to: one line for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] vmm::config::Mistakes),
    /// The address cannot be listened on.
    #[error("Cannot listen on {address}: {source}; is another agent running, or `listen` wrong?")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Strangers are not kept away.
    #[error(transparent)]
    Protection(#[from] protection::Error),
    /// The address for metrics cannot be listened on.
    #[error("Cannot serve metrics on {address}: {source}; is another agent running, or `metrics` wrong?")]
    Metrics {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Memory cannot be lent as the configuration says.
    #[error("{0}")]
    Memory(String),
    /// The lease table cannot be read or written.
    #[error("Cannot use the state folder {path}: {source}", path = path.display())]
    State {
        /// The folder or file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The running agent cannot be asked.
    #[error("{0}; is omega-agent running?")]
    Ask(#[from] transport::blocking::Error),
    /// The running agent's answer makes no sense.
    #[error("The agent's answer makes no sense: {0}")]
    Answer(String),
    /// The last flush failed.
    #[error(
        "Stopped, but not everything acknowledged is on stable storage: the log says which volume could not be \
         flushed; mend its storage, then start the agent again before the guests that use it end"
    )]
    NotFlushed,
    /// This PC does not become a node.
    #[error("{0}")]
    Join(#[from] transport::identity::join::Error),
    /// Anything else of the system's.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}
