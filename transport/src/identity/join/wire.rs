//! What the two sides of a join say, inside TLS. Numbers are little endian.
//!
//! ```text
//! the new node:   | secret, 16 | port, 2 | length, 2 | request for a certificate (PKCS #10) |
//! the authority:  | 0 | length, 4 | ca | length, 4 | certificate | length, 4 | crl |      or
//!                 | 1 | length, 4 | why not, in words |
//! the new node:   | 1 |                                           stored
//! ```

use std::io::{self, Read};

use super::token::{SECRET, Secret};
use crate::identity::MAX_CRL;

/// A request for a certificate has at most so many bytes; one for a key on P-256 has some hundred.
const MAX_REQUEST: usize = 2048;
/// A certificate has at most so many bytes.
const MAX_CERTIFICATE: usize = 4096;
/// A refusal's words have at most so many bytes.
const MAX_WORDS: usize = 512;

/// What the new node says.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) secret: Secret,
    /// Where it is going to listen, 0 if it is not.
    pub(crate) port: u16,
    pub(crate) csr: Vec<u8>,
}

impl Request {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.secret.bytes().to_vec();
        bytes.extend(self.port.to_le_bytes());
        bytes.extend(u16::try_from(self.csr.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend(&self.csr);
        bytes
    }

    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let secret = Secret::of(array::<SECRET>(from)?);
        let port = u16::from_le_bytes(array(from)?);
        let len = usize::from(u16::from_le_bytes(array(from)?));
        Ok(Self { secret, port, csr: bytes(from, len, MAX_REQUEST)? })
    }
}

/// What the authority answers.
#[derive(Debug)]
pub(crate) enum Answer {
    Welcome { ca: Vec<u8>, node: Vec<u8>, crl: Vec<u8> },
    Refused(String),
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let part = |bytes: &[u8]| {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            [&len.to_le_bytes(), bytes].concat()
        };
        match self {
            Self::Welcome { ca, node, crl } => [vec![0], part(ca), part(node), part(crl)].concat(),
            Self::Refused(why) => [vec![1], part(why.as_bytes())].concat(),
        }
    }

    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        match array(from)? {
            [0] => Ok(Self::Welcome {
                ca: part(from, MAX_CERTIFICATE)?,
                node: part(from, MAX_CERTIFICATE)?,
                crl: part(from, MAX_CRL)?,
            }),
            [1] => {
                let words = part(from, MAX_WORDS)?;
                let words = String::from_utf8_lossy(&words);
                Ok(Self::Refused(words.chars().filter(|c| !c.is_control()).collect()))
            }
            _ => Err(invalid("the answer is neither yes nor no")),
        }
    }
}

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut array = [0; N];
    from.read_exact(&mut array)?;
    Ok(array)
}

fn part(from: &mut impl Read, most: usize) -> io::Result<Vec<u8>> {
    let len = u32::from_le_bytes(array(from)?);
    bytes(from, usize::try_from(len).unwrap_or(usize::MAX), most)
}

fn bytes(from: &mut impl Read, len: usize, most: usize) -> io::Result<Vec<u8>> {
    if len == 0 || len > most {
        return Err(invalid("a length is wrong"));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
