//! What others do: programs of Debian's that do the same work.

pub mod nbd;
