//! TLS 1.3 records by the kernel (its `tls` module, `Documentation/networking/tls.rst`): the socket's own
//! sends and receives are encrypted, so the link goes on as without TLS and nothing more is copied.
#![allow(unsafe_code)] // one socket option and the control messages around a record's type are raw calls

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::{CLOSE_NOTIFY, Content, PLAINTEXT, control};
use crate::wire::Fault;

/// Tickets and the like that a peer may send.
const IGNORED_MOST: u32 = 8;

/// Once the kernel said that it has no TLS, or not a cipher, it is not asked for that again: as root, each
/// question would start modprobe. One bit each.
static REFUSED: AtomicU8 = AtomicU8::new(0);

/// The bit of TLS itself; those of ciphers are [`bit`]'s.
const NO_TLS: u8 = 1;

/// The option after which the kernel decrypts straight into the receiver's memory, since Linux 6.0: nobody
/// here pads records.
const TLS_RX_EXPECT_NO_PAD: libc::c_int = 4;

/// A socket whose records the kernel makes. It counts them, rather too many than too few.
#[derive(Default)]
pub(crate) struct Kernel {
    sent: u64,
    received: u64,
    ignored: u32,
}

/// Hands the records of `socket` to the kernel; `None` if it has no TLS or not this cipher.
///
/// # Errors
/// The kernel took only one direction, so that the connection is lost.
pub(crate) fn take_over(socket: &TcpStream, secrets: &ExtractedSecrets) -> Result<Option<Kernel>, Fault> {
    let (Some(tx), Some(rx)) = (info(&secrets.tx), info(&secrets.rx)) else { return Ok(None) };
    let ciphers = bit(&tx) | bit(&rx);
    if REFUSED.load(Ordering::Relaxed) & (NO_TLS | ciphers) != 0 {
        return Ok(None);
    }
    let name: &[u8] = b"tls";
    // Until a direction has its keys, the socket behaves as before; so a refusal of the first costs nothing.
    if let Err(e) = setsockopt(socket, TcpUlp::default(), &name) {
        REFUSED.fetch_or(for_good(e, NO_TLS), Ordering::Relaxed);
        return Ok(None);
    }
    if let Err(e) = setsockopt(socket, TcpTlsRx, &rx) {
        REFUSED.fetch_or(for_good(e, ciphers), Ordering::Relaxed);
        return Ok(None);
    }
    if let Err(e) = setsockopt(socket, TcpTlsTx, &tx) {
        REFUSED.fetch_or(for_good(e, ciphers), Ordering::Relaxed);
        return Err(Fault::Network(format!("the kernel's TLS takes only one direction: {e}")));
    }
    let yes: libc::c_int = 1;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    let value = (&raw const yes).cast();
    // SAFETY: the value is an int, which lives through the call. An older kernel refuses it, which is well.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_TLS, TLS_RX_EXPECT_NO_PAD, value, len) };
    Ok(Some(Kernel::default()))
}

/// What of `asked` the kernel will not do for another connection either. Anything else is about this one: the
/// other side closed it already, which a peer may do at will, or memory is short.
fn for_good(error: Errno, asked: u8) -> u8 {
    match error {
        // No module, a kernel without TLS, or with a TLS that does not know the cipher.
        Errno::ENOENT | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP => asked,
        Errno::EINVAL if asked != NO_TLS => asked,
        _ => 0,
    }
}

/// A cipher's bit in [`REFUSED`].
fn bit(info: &TlsCryptoInfo) -> u8 {
    match info {
        TlsCryptoInfo::Aes128Gcm(_) => 1 << 1,
        TlsCryptoInfo::Aes256Gcm(_) => 1 << 2,
        TlsCryptoInfo::Chacha20Poly1305(_) => 1 << 3,
    }
}

/// One direction's keys as the kernel wants them.
fn info((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Option<TlsCryptoInfo> {
    let head = |cipher_type| libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type };
    let rec_seq = sequence.to_be_bytes();
    Some(match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            let (salt, iv) = iv.as_ref().split_first_chunk()?;
            TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: head(libc::TLS_CIPHER_AES_GCM_128),
                iv: iv.try_into().ok()?,
                key: key.as_ref().try_into().ok()?,
                salt: *salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            let (salt, iv) = iv.as_ref().split_first_chunk()?;
            TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: head(libc::TLS_CIPHER_AES_GCM_256),
                iv: iv.try_into().ok()?,
                key: key.as_ref().try_into().ok()?,
                salt: *salt,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                info: head(libc::TLS_CIPHER_CHACHA20_POLY1305),
                iv: iv.as_ref().try_into().ok()?,
                key: key.as_ref().try_into().ok()?,
                salt: [],
                rec_seq,
            })
        }
        _ => return None,
    })
}

impl Kernel {
    /// One call sent so many bytes.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.sent += records(bytes);
    }

    /// One call received so many bytes of the peer's records, which may be shorter than ours.
    pub(crate) fn received(&mut self, bytes: usize) {
        self.received += records(bytes);
    }

    /// Records under our own key and under the peer's so far.
    pub(crate) fn count(&self) -> (u64, u64) {
        (self.sent, self.received)
    }

    /// A record of type `content` came that is no data.
    ///
    /// # Errors
    /// What it means for the connection, which is as a rule its end.
    pub(crate) fn control(&mut self, content: u8, bytes: &[u8]) -> Result<(), Fault> {
        control(content, bytes)?;
        self.ignored += 1;
        if self.ignored > IGNORED_MOST {
            return Err(Fault::Protocol("too many TLS records that carry nothing"));
        }
        Ok(())
    }
}

/// Records for so many bytes of one call at most: full ones, and the rest.
fn records(bytes: usize) -> u64 {
    (bytes / PLAINTEXT) as u64 + 1
}

/// Room for the control message with a record's type, aligned as the kernel wants it.
#[derive(Default)]
pub(crate) struct Type([u64; 4]);

impl Type {
    /// Has the next receive with `message` say of which type the record is.
    pub(crate) fn ask(&mut self, message: &mut libc::msghdr) {
        self.0 = [0; 4];
        message.msg_control = self.0.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&self.0);
    }

    /// What the kernel said; data unless it said otherwise.
    pub(crate) fn said(&self, message: &libc::msghdr) -> u8 {
        // SAFETY: `message` names this control buffer, and the kernel set its length.
        let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() };
        match header {
            Some(h) if h.cmsg_level == libc::SOL_TLS && h.cmsg_type == libc::TLS_GET_RECORD_TYPE => {
                // SAFETY: a control message of this type carries one byte.
                unsafe { *libc::CMSG_DATA(h) }
            }
            _ => Content::Data as u8,
        }
    }
}

/// Tells the other side that nothing more comes, as far as the network takes it now.
pub(crate) fn close_notify(socket: &TcpStream) {
    let mut text = CLOSE_NOTIFY;
    let mut segment = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    let mut room = Type::default();
    // SAFETY: all zeros is a message without address, segments and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut segment;
    message.msg_iovlen = 1;
    room.ask(&mut message);
    // SAFETY: the length that one byte takes.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(1) } as usize;
    // SAFETY: the control buffer has room for one message of one byte.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if let Some(header) = header.as_mut() {
            header.cmsg_level = libc::SOL_TLS;
            header.cmsg_type = libc::TLS_SET_RECORD_TYPE;
            header.cmsg_len = libc::CMSG_LEN(1) as usize;
            *libc::CMSG_DATA(header) = Content::Alert as u8;
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message names memory that lives through the call. The peer sees the end in any case.
    unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_connection_is_refused_is_asked_for_the_next_unless_the_kernel_does_not_have_it() {
        let secrets =
            || ConnectionTrafficSecrets::Chacha20Poly1305 { key: [7; 32].into(), iv: [9; 12].into() };
        let cipher = info(&(0, secrets())).map_or(0, |info| bit(&info));
        assert!(cipher != 0 && cipher & NO_TLS == 0);
        for missing in [Errno::ENOENT, Errno::ENOPROTOOPT, Errno::EOPNOTSUPP] {
            assert_eq!(for_good(missing, NO_TLS), NO_TLS, "{missing}");
            assert_eq!(for_good(missing, cipher), cipher, "only this cipher: {missing}");
        }
        assert_eq!((for_good(Errno::EINVAL, cipher), for_good(Errno::EINVAL, NO_TLS)), (cipher, 0));
        for passing in [Errno::ENOTCONN, Errno::EPIPE, Errno::ECONNRESET, Errno::ENOMEM, Errno::ENOBUFS] {
            assert_eq!((for_good(passing, NO_TLS), for_good(passing, cipher)), (0, 0), "{passing}");
        }
    }
}
