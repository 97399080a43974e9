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
        self.out[start + HEADER + len] = content as u8;
        self.encrypt(start, len + 1)
    }

    /// Encrypts what is inside a record: content, type, padding.
    fn encrypt(&mut self, start: usize, inner: usize) -> Result<(), Fault> {
        let [high, low] = ((inner + TAG) as u16).to_be_bytes();
        let header = [Content::Data as u8, 3, 3, high, low];
        let record = &mut self.out[start..start + HEADER + inner + TAG];
        record[..HEADER].copy_from_slice(&header);
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

/// For the fuzzer: a peer that has the keys and makes records of anything (`data` is a list of these: one
/// byte that says whether what follows is encrypted, two of length, the bytes), received in pieces.
pub(crate) fn exercise(data: &[u8]) {
    let Some((piece, mut data)) = data.split_first() else { return };
    let (Ok(mut peer), Ok(mut ours)) = (Records::new(&fixed()), Records::new(&fixed())) else { return };
    let mut wire = Vec::new();
    while let Some(([kind, low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (inner, rest) = rest.split_at(len);
        data = rest;
        if *kind == 0 {
            wire.extend_from_slice(inner);
            continue;
        }
        let inner = &inner[..inner.len().min(CIPHERTEXT)];
        peer.out.clear();
        peer.out.resize(HEADER + inner.len() + TAG, 0);
        peer.out[HEADER..HEADER + inner.len()].copy_from_slice(inner);
        if peer.encrypt(0, inner.len()).is_err() {
            return;
        }
        wire.extend_from_slice(peer.unsent());
        peer.sent(usize::MAX - 1);
    }
    let (mut input, mut have) = (vec![0; 64 << 10], 0);
    for piece in wire.chunks(usize::from(*piece) * 64 + 1) {
        input[have..have + piece.len()].copy_from_slice(piece);
        let opened = ours.open(&mut input[..have + piece.len()], |content| {
            assert!(content.len() <= PLAINTEXT, "a record has at most 16 KiB");
            Ok(())
        });
        let Ok(rest) = opened else { return };
        have = rest;
        assert!(have < HEADER + CIPHERTEXT, "what is kept is less than a record");
    }
}

/// The same keys in both directions.
fn fixed() -> ExtractedSecrets {
    let secrets = || ConnectionTrafficSecrets::Chacha20Poly1305 { key: [7; 32].into(), iv: [9; 12].into() };
    ExtractedSecrets { tx: (0, secrets()), rx: (0, secrets()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Records, Records) {
        (Records::new(&fixed()).expect("a cipher"), Records::new(&fixed()).expect("a cipher"))
    }

    /// A record with this inside, whatever it is.
    fn raw(peer: &mut Records, inner: &[u8]) -> Vec<u8> {
        peer.out.clear();
        peer.out.resize(HEADER + inner.len() + TAG, 0);
        peer.out[HEADER..HEADER + inner.len()].copy_from_slice(inner);
        peer.encrypt(0, inner.len()).expect("it encrypts");
        let bytes = peer.unsent().to_vec();
        peer.sent(bytes.len());
        bytes
    }

    fn opened(ours: &mut Records, mut bytes: Vec<u8>) -> Result<Vec<u8>, Fault> {
        let mut got = Vec::new();
        let rest = ours.open(&mut bytes, |content| {
            got.extend_from_slice(content);
            Ok(())
        })?;
        assert_eq!(rest, 0);
        Ok(got)
    }

    #[test]
    fn bytes_of_any_length_are_gathered_into_records_and_come_out_alike() {
        let (mut peer, mut ours) = pair();
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i / 7) as u8).collect();
        let (mut from, mut got, mut input, mut have) = (0, Vec::new(), vec![0; 64 << 10], 0);
        while from < bytes.len() {
            loop {
                let n = peer
                    .seal(bytes.len() - from, |plain| {
                        plain.copy_from_slice(&bytes[from..from + plain.len()]);
                        plain.len()
                    })
                    .expect("it seals");
                if n == 0 {
                    break;
                }
                from += n;
            }
            assert!(peer.unsent().len() <= AHEAD * (HEADER + PLAINTEXT + 1 + TAG));
            while !peer.unsent().is_empty() {
                let n = peer.unsent().len().min(5000);
                input[have..have + n].copy_from_slice(&peer.unsent()[..n]);
                peer.sent(n);
                let take = |content: &[u8]| {
                    got.extend_from_slice(content);
                    Ok(())
                };
                have = ours.open(&mut input[..have + n], take).expect("it opens");
            }
        }
        assert!(got == bytes && have == 0);
        assert_eq!((peer.count().0, ours.count().1), (13, 13), "full records but for the last");
    }

    #[test]
    fn padding_is_taken_off_and_a_record_without_a_type_is_refused() {
        let (mut peer, mut ours) = pair();
        let padded = raw(&mut peer, b"some\x17\0\0\0\0");
        assert_eq!(opened(&mut ours, padded), Ok(b"some".to_vec()));
        assert_eq!(opened(&mut ours, raw(&mut peer, b"\x17")), Ok(Vec::new()), "an empty one");
        let empty = opened(&mut ours, raw(&mut peer, &[0; 30]));
        assert_eq!(empty, Err(Fault::Protocol("a TLS record without a type")));
    }

    #[test]
    fn a_record_longer_than_allowed_inside_or_outside_is_refused() {
        let (mut peer, mut ours) = pair();
        let mut most = vec![1; PLAINTEXT];
        most.push(23);
        assert_eq!(opened(&mut ours, raw(&mut peer, &most)).map(|got| got.len()), Ok(PLAINTEXT));
        most.push(23);
        let longer = opened(&mut ours, raw(&mut peer, &most));
        assert_eq!(longer, Err(Fault::Protocol("a TLS record that is too long")));
        let header = vec![23, 3, 3, 0x41, 1];
        assert!(matches!(opened(&mut ours, header), Err(Fault::Protocol(_))), "before it is received");
    }

    #[test]
    fn a_record_that_is_repeated_left_out_or_swapped_does_not_open() {
        let changed = |wire: &[&Vec<u8>]| {
            let mut ours = pair().1;
            wire.iter().map(|record| opened(&mut ours, record.to_vec())).find_map(Result::err)
        };
        let mut peer = pair().0;
        let records: Vec<Vec<u8>> = [b"a\x17", b"b\x17", b"c\x17"].map(|r| raw(&mut peer, r)).into();
        let [a, b, c] = &records[..] else { panic!("three") };
        assert_eq!(changed(&[a, b, c]), None);
        for wire in [&[a, a][..], &[a, c], &[b, a], &[a, b, b]] {
            assert!(matches!(changed(wire), Some(Fault::Tls(_))), "{wire:?}");
        }
    }

    #[test]
    fn alerts_end_the_connection_in_words_and_tickets_are_ignored_but_not_for_ever() {
        let (mut peer, mut ours) = pair();
        let (mut other, mut theirs) = pair();
        assert_eq!(opened(&mut ours, raw(&mut peer, &[1, 0, 21])), Err(Fault::Closed));
        let revoked = opened(&mut theirs, raw(&mut other, &[2, 44, 21]));
        assert!(revoked.expect_err("an alert").to_string().contains("was revoked"));
        let (mut peer, mut ours) = pair();
        for _ in 0..IGNORED_MOST {
            assert_eq!(opened(&mut ours, raw(&mut peer, &[4, 0, 0, 0, 22])), Ok(Vec::new()));
        }
        assert!(opened(&mut ours, raw(&mut peer, &[4, 0, 0, 0, 22])).is_err());
        let (mut peer, mut ours) = pair();
        assert!(opened(&mut ours, raw(&mut peer, &[24, 0, 0, 1, 0, 22])).is_err(), "a key update");
        let (mut peer, mut ours) = pair();
        peer.seal_alert(super::super::CLOSE_NOTIFY).expect("it seals");
        assert_eq!(opened(&mut ours, peer.unsent().to_vec()), Err(Fault::Closed), "as we say it ourselves");
    }
}
