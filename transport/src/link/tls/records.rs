//! TLS 1.3 records in this process (RFC 8446, 5.2), where the kernel has no TLS. Frames are gathered into
//! records of up to 16 KiB and encrypted in place: one copy. What comes is decrypted in place and copied
//! once, to where it belongs.

use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::{CIPHERTEXT, Content, HEADER, PLAINTEXT, control};
use crate::wire::Fault;

/// Length of the tag behind a record in bytes, in every cipher of TLS 1.3 that rustls speaks.
const TAG: usize = 16;

/// Records that are encrypted ahead of the network.
const AHEAD: usize = 4;

/// Tickets and the like that a peer may send.
const IGNORED_MOST: u32 = 8;

/// One direction's key. Each record takes the next nonce; there is no way to use one twice.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Cipher {
    fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, Fault> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Fault::Tls("TLS took a cipher that this program does not know".to_owned())),
        };
        let unfit = || Fault::Tls("TLS made a key of a wrong length".to_owned());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unfit())?;
        let iv = iv.as_ref().try_into().map_err(|_| unfit())?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence: *sequence })
    }

    fn nonce(&mut self) -> Result<Nonce, Fault> {
        let mut nonce = self.iv;
        for (byte, sequence) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= sequence;
        }
        // Two to the 64th records are never reached: the connection is replaced long before.
        self.sequence = self.sequence.checked_add(1).ok_or(Fault::KeysUsed)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// See the [module](self).
pub(crate) struct Records {
    seal: Cipher,
    open: Cipher,
    /// Encrypted records; what lies between `sent` and `sealed` is not on the network.
    out: Vec<u8>,
    sealed: usize,
    sent: usize,
    ignored: u32,
}

impl Records {
    /// The records of a connection whose handshake is done.
    ///
    /// # Errors
    /// The secrets are of a cipher that is not known here.
    pub(crate) fn new(secrets: &ExtractedSecrets) -> Result<Self, Fault> {
        let (seal, open) = (Cipher::new(&secrets.tx)?, Cipher::new(&secrets.rx)?);
        Ok(Self { seal, open, out: Vec::new(), sealed: 0, sent: 0, ignored: 0 })
    }

    /// Encrypts one record of what `fill` writes, which is at most 16 KiB, and returns how much that was.
    /// 0: there is nothing, or enough is encrypted ahead.
    ///
    /// # Errors
    /// The key is used up.
    pub(crate) fn seal(
        &mut self,
        want: usize,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<usize, Fault> {
        let want = want.min(PLAINTEXT);
        if want == 0 || self.sealed >= AHEAD * PLAINTEXT {
            return Ok(0);
        }
        let start = self.sealed;
        let need = start + HEADER + want + 1 + TAG;
        if self.out.len() < need {
            self.out.resize(need, 0);
        }
        let Some(plain) = self.out.get_mut(start + HEADER..start + HEADER + want) else { return Ok(0) };
        let filled = fill(plain).min(want);
        if filled > 0 {
            self.finish(start, filled, Content::Data)?;
        }
        Ok(filled)
    }

    /// Encrypts an alert behind everything else.
    ///
    /// # Errors
    /// The key is used up.
    pub(crate) fn seal_alert(&mut self, alert: [u8; 2]) -> Result<(), Fault> {
        let start = self.sealed;
        self.out.resize(self.out.len().max(start + HEADER + alert.len() + 1 + TAG), 0);
        self.out[start + HEADER..start + HEADER + alert.len()].copy_from_slice(&alert);
        self.finish(start, alert.len(), Content::Alert)
    }

    /// Makes a record of the `len` bytes that lie behind the place of its header.
    fn finish(&mut self, start: usize, len: usize, content: Content) -> Result<(), Fault> {
        let inner = len + 1;
        let [high, low] = ((inner + TAG) as u16).to_be_bytes();
        let header = [Content::Data as u8, 3, 3, high, low];
        let record = &mut self.out[start..start + HEADER + inner + TAG];
        record[..HEADER].copy_from_slice(&header);
        record[HEADER + len] = content as u8;
        let (text, tag_place) = record[HEADER..].split_at_mut(inner);
        let nonce = self.seal.nonce()?;
        let tag = self.seal.key.seal_in_place_separate_tag(nonce, Aad::from(header), text);
        let tag = tag.map_err(|_| Fault::Tls("A record could not be encrypted".to_owned()))?;
        tag_place.copy_from_slice(tag.as_ref());
        self.sealed = start + HEADER + inner + TAG;
        Ok(())
    }

    /// What is encrypted and not on the network yet.
    pub(crate) fn unsent(&self) -> &[u8] {
        self.out.get(self.sent..self.sealed).unwrap_or_default()
    }

    /// The network took so much of it.
    pub(crate) fn sent(&mut self, n: usize) {
        self.sent += n;
        if self.sent >= self.sealed {
            (self.sent, self.sealed) = (0, 0);
        }
    }

    /// Records under our own key and under the peer's so far.
    pub(crate) fn count(&self) -> (u64, u64) {
        (self.seal.sequence, self.open.sequence)
    }

    /// Decrypts all whole records in `input`, hands what they carry to `take`, and returns how many bytes
    /// of an unfinished one were moved to the front.
    ///
    /// # Errors
    /// The peer ended the connection, or what came is not its; or `take` fails.
    pub(crate) fn open(
        &mut self,
        input: &mut [u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<usize, Fault> {
        let mut at = 0;
        while let Some(record) = whole(&input[at..])? {
            let end = at + record;
            let (header, text) = input[at..end].split_at_mut(HEADER);
            let header: [u8; HEADER] = header.try_into().map_err(|_| Fault::Closed)?;
            let nonce = self.open.nonce()?;
            let plain = self.open.key.open_in_place(nonce, Aad::from(header), text).map_err(|_| {
                Fault::Tls("A record is not as the peer sent it: it was changed on the way".to_owned())
            })?;
            // Zeros behind the content's type are padding.
            let Some(last) = plain.iter().rposition(|byte| *byte != 0) else {
                return Err(Fault::Protocol("a TLS record without a type"));
            };
            if last > PLAINTEXT {
                return Err(Fault::Protocol("a TLS record that is too long"));
            }
            let (content, kind) = (&plain[..last], plain[last]);
            if kind == Content::Data as u8 {
                take(content)?;
            } else {
                control(kind, content)?;
                self.ignored += 1;
                if self.ignored > IGNORED_MOST {
                    return Err(Fault::Protocol("too many TLS records that carry nothing"));
                }
            }
            at = end;
        }
        input.copy_within(at.., 0);
        Ok(input.len() - at)
    }
}

/// Length of the encrypted record at the start of `bytes`, if it is all there.
fn whole(bytes: &[u8]) -> Result<Option<usize>, Fault> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let [kind, 3, 3, high, low] = *header else {
        return Err(Fault::Protocol("something else than a TLS record"));
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if kind != Content::Data as u8 || len > CIPHERTEXT || len <= TAG {
        return Err(Fault::Protocol("a TLS record that is out of order or of a wrong length"));
    }
    Ok(Some(HEADER + len).filter(|len| bytes.len() >= *len))
}
