//! The TLS 1.3 handshake: rustls speaks it, the ring drives it, neither blocks. Records are taken from the
//! socket one by one and never past their end, so that all that follows the handshake is still in the socket
//! when somebody else (the kernel, or this process) takes the records over.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ExtractedSecrets, ServerConnection};

use super::{CIPHERTEXT, Content, HEADER, words};
use crate::identity::{Fingerprint, Identity, Peer, Reloading};
use crate::wire::Fault;

/// The longest time for a handshake.
const WITHIN: Duration = Duration::from_secs(10);

/// Most bytes of the other side's part of a handshake: several times what two certificates take.
const BYTES: usize = 64 << 10;

/// What a side that speaks TLS says to one that does not: a fatal alert, `protocol_version`.
const NOT_PLAIN: [u8; 7] = [Content::Alert as u8, 3, 3, 0, 2, 2, 70];

/// The first bytes of a hello without TLS.
const PLAIN: &[u8; HEADER] = b"omega";

/// See the [module](self).
pub(crate) struct Handshake {
    connection: Connection,
    security: Arc<Reloading>,
    /// By whose certificate the other side is verified.
    authority: Fingerprint,
    /// The record that is coming in.
    record: Vec<u8>,
    /// Bytes so far.
    received: usize,
    /// What goes out, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    deadline: Instant,
}

/// A handshake that is over.
pub(crate) struct Secured {
    /// The keys of both directions.
    pub(crate) secrets: ExtractedSecrets,
    /// Who the other side is.
    pub(crate) proven: Proven,
}

/// Who the other side proved to be, and what may revoke that.
#[derive(Clone, Debug)]
pub(crate) struct Proven {
    pub(crate) peer: Peer,
    pub(crate) security: Arc<Reloading>,
}

impl Handshake {
    /// The connecting side's, with the identity that is current. The other side must prove to be the node
    /// `expected`, or any agent.
    ///
    /// # Errors
    /// `expected` is no name of a node, or the identity cannot be used.
    pub(crate) fn asking(security: &Arc<Reloading>, expected: Option<&str>) -> Result<Self, Fault> {
        let name = Identity::server_name(expected).map_err(|e| Fault::Tls(e.to_string()))?;
        let identity = security.current();
        let connection = ClientConnection::new(identity.client_config(), name);
        Ok(Self::new(connection.map_err(|e| words::failed(&e))?.into(), security, identity.authority()))
    }

    /// The accepting side's, with the identity that is current.
    ///
    /// # Errors
    /// The identity cannot be used.
    pub(crate) fn answering(security: &Arc<Reloading>) -> Result<Self, Fault> {
        let identity = security.current();
        let connection = ServerConnection::new(identity.server_config());
        Ok(Self::new(connection.map_err(|e| words::failed(&e))?.into(), security, identity.authority()))
    }

    fn new(connection: Connection, security: &Arc<Reloading>, authority: Fingerprint) -> Self {
        let (record, out) = (Vec::new(), Vec::new());
        let deadline = Instant::now() + WITHIN;
        Self {
            connection,
            security: security.clone(),
            authority,
            record,
            received: 0,
            out,
            sent: 0,
            deadline,
        }
    }

    /// When it must be over.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it waits for room to send.
    pub(crate) fn is_blocked(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Takes it as far as the network does now. `true`: it is [over](Self::finish).
    ///
    /// # Errors
    /// It failed; the other side was told why, if it can be told.
    pub(crate) fn step(&mut self, mut socket: &TcpStream) -> Result<bool, Fault> {
        let result = self.try_step(socket);
        if let Err(fault) = &result {
            if matches!(fault, Fault::PlainPeer | Fault::NotTls) {
                self.out.extend_from_slice(&NOT_PLAIN);
            }
            let _ = self.send(socket);
            // Bytes that nobody read would make the kernel reset the connection, and the reason might be lost.
            let _ = socket.shutdown(Shutdown::Write);
            let mut rest = [0; 4096];
            for _ in 0..BYTES / rest.len() {
                if !socket.read(&mut rest).is_ok_and(|n| n > 0) {
                    break;
                }
            }
        }
        result
    }

    fn try_step(&mut self, socket: &TcpStream) -> Result<bool, Fault> {
        if self.deadline <= Instant::now() {
            return Err(Fault::HandshakeTimeout);
        }
        loop {
            if !self.send(socket)? {
                return Ok(false);
            }
            if !self.connection.is_handshaking() {
                return Ok(true);
            }
            if !self.receive(socket)? {
                return Ok(false);
            }
            let record = std::mem::take(&mut self.record);
            self.hand_in(&record)?;
        }
    }

    /// Hands a record to rustls, which takes no more than a few KiB at once.
    fn hand_in(&mut self, mut record: &[u8]) -> Result<(), Fault> {
        while !record.is_empty() {
            if self.connection.read_tls(&mut record)? == 0 {
                return Err(Fault::Protocol("a TLS record after the end"));
            }
            if let Err(error) = self.connection.process_new_packets() {
                return Err(words::failed(&error));
            }
        }
        Ok(())
    }

    /// Sends what rustls has to say; `false`: the network does not take it all now.
    fn send(&mut self, mut socket: &TcpStream) -> Result<bool, Fault> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut self.out)?;
        }
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match socket.write(rest) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(true)
    }

    /// Receives the next record, and no byte more; `false`: it is not all there.
    fn receive(&mut self, mut socket: &TcpStream) -> Result<bool, Fault> {
        loop {
            let have = self.record.len();
            let want = self.wanted()?;
            if have == want {
                return Ok(true);
            }
            if self.received + (want - have) > BYTES {
                return Err(Fault::Protocol("a TLS handshake that is too long"));
            }
            self.record.resize(want, 0);
            let received = socket.read(&mut self.record[have..]);
            self.record.truncate(have + received.as_ref().map_or(0, |n| *n));
            match received {
                Ok(0) => return Err(Fault::Closed),
                Ok(n) => self.received += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// How long the record is that is coming in, as far as is known yet.
    fn wanted(&self) -> Result<usize, Fault> {
        let have = self.record.as_slice();
        let first = self.received == have.len();
        if first && have.starts_with(PLAIN) {
            return Err(Fault::PlainPeer);
        }
        let Some(header) = have.first_chunk::<HEADER>() else { return Ok(HEADER) };
        let [kind, major, _, high, low] = *header;
        let len = usize::from(u16::from_be_bytes([high, low]));
        if Content::of(kind).is_none() || major != 3 || len > CIPHERTEXT {
            return Err(if first { Fault::NotTls } else { Fault::Protocol("a record that is none of TLS") });
        }
        Ok(HEADER + len)
    }

    /// The keys, and who the other side is.
    ///
    /// # Errors
    /// Its certificate is none of a node.
    pub(crate) fn finish(self) -> Result<Secured, Fault> {
        let certificate = self.connection.peer_certificates().and_then(|chain| chain.first());
        let missing = || Fault::Tls("The peer showed no certificate".to_owned());
        let mut peer = Peer::of(certificate.ok_or_else(missing)?).map_err(|e| Fault::Tls(e.to_string()))?;
        peer.authority = Some(self.authority);
        if self.connection.alpn_protocol() != Some(crate::identity::ALPN) {
            return Err(Fault::Tls("The peer speaks TLS, but not Omega's protocol".to_owned()));
        }
        let secrets = self.connection.dangerous_extract_secrets().map_err(|e| words::failed(&e))?;
        Ok(Secured { secrets, proven: Proven { peer, security: self.security } })
    }
}
