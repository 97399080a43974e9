//! What can be wrong with an identity.

use std::io;
use std::path::PathBuf;

/// An identity, or a part of one, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error(
        "There is no identity in {folder} ({file} is missing); `omega node invite` on the PC that has the \
         household's authority gives a token to join with here",
        folder = folder.display()
    )]
    Missing {
        /// Where it was looked for.
        folder: PathBuf,
        /// The first file that is not there.
        file: &'static str,
    },
    /// A file cannot be read or written.
    #[error("Cannot use {path}: {source}", path = path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than the owner may read a key or change a folder.
    #[error(
        "Others may use {path} (mode {mode:03o}); if nobody can have copied it, `chmod {right:o} {path}`, else \
         revoke it and join again",
        path = path.display()
    )]
    Exposed {
        /// Which file or folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        right: u32,
    },
    /// Whoever owns the folder around it could have others written or read by it.
    #[error("{path} is a symbolic link; put what it names in its place", path = .0.display())]
    Link(PathBuf),
    /// A file or message is not what it should be.
    #[error("{what} is damaged: {why}")]
    Malformed {
        /// What.
        what: String,
        /// Why.
        why: String,
    },
    /// Certificate, key and authority do not belong together.
    #[error("{what} does not belong to {whose}; join again with a new token")]
    Unrelated {
        /// What.
        what: String,
        /// To what it should belong.
        whose: &'static str,
    },
    /// There is no authority here.
    #[error(
        "There is no household authority in {path}; make one with `omega ca init`, or run this on the PC that has it",
        path = .0.display()
    )]
    NoAuthority(PathBuf),
    /// There is an authority already.
    #[error(
        "There is a household authority in {path} already; a second one would not know its nodes",
        path = .0.display()
    )]
    AuthorityExists(PathBuf),
    /// The authority made no node of this name.
    #[error("There is no node named `{0}`; `omega node list` shows those that there are")]
    NoNode(String),
    /// A node's name cannot be one.
    #[error(
        "`{0}` is no name for a node: 1 to 63 lower-case letters, digits and `-`, which is not first or last"
    )]
    Name(String),
    /// A role is unknown.
    #[error("`{0}` is no role; there are `console` and `agent`")]
    Role(String),
    /// Keys, certificates or TLS cannot be set up.
    #[error("{what}: {why}")]
    Crypto {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        why: String,
    },
}

impl Error {
    pub(crate) fn malformed(what: impl Into<String>, why: &(impl ToString + ?Sized)) -> Self {
        Self::Malformed { what: what.into(), why: why.to_string() }
    }

    pub(crate) fn crypto(what: &'static str, why: &(impl ToString + ?Sized)) -> Self {
        Self::Crypto { what, why: why.to_string() }
    }
}
