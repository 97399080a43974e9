//! What carries a connection's frames.

use std::fmt;

/// What carries a connection's frames, chosen at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Carrier {
    /// TCP, neither encrypted nor authenticated.
    Tcp = 0,
    /// TLS 1.3, whose records the kernel makes.
    KernelTls = 1,
    /// TLS 1.3, whose records this program makes.
    TlsRecords = 2,
    /// RDMA, set up over TLS; its payloads are not encrypted.
    Rdma = 3,
}

impl Carrier {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::KernelTls, Self::TlsRecords, Self::Rdma];
}

impl fmt::Display for Carrier {
    /// `tcp`, `kernel-tls`, `tls-records`, `rdma`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::KernelTls => "kernel-tls",
            Self::TlsRecords => "tls-records",
            Self::Rdma => "rdma",
        })
    }
}
