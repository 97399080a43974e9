//! The join token: what a person carries from one PC to another.
//!
//! ```text
//!  0       1          9                    41         57      58
//! +-------+----------+--------------------+----------+-------+---------------- - - -+----------+
//! | 1     | expires  | authority          | secret   | count | addresses            | checksum |
//! +-------+----------+--------------------+----------+-------+---------------- - - -+----------+
//!          seconds    SHA-256 of its       random              4 or 6, the IP,        SHA-256 of all
//!          since 1970 certificate                              the port               before, 4 bytes
//! ```
//! Numbers are big endian; the whole is written in base 32 (RFC 4648, 6; lower case) after `omega-`. The checksum
//! is against slips of the hand: what an attacker could change is either verified later or only misleads.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use super::Error;
use crate::identity::Fingerprint;
use crate::identity::peer::sha256;

const PREFIX: &str = "omega-";
const VERSION: u8 = 1;
const CHECKSUM: usize = 4;
/// A token names at most so many addresses.
pub const MAX_ADDRESSES: usize = 8;
/// No token is longer.
const MAX_TEXT: usize = 512;
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// The secret's length.
pub(crate) const SECRET: usize = 16;

/// What makes a node of whoever knows it, once.
#[derive(Clone)]
pub struct Secret([u8; SECRET]);

impl Secret {
    pub(crate) fn new() -> Result<Self, crate::identity::Error> {
        let mut secret = [0; SECRET];
        getrandom::fill(&mut secret)
            .map_err(|why| crate::identity::Error::crypto("There is no randomness", &why))?;
        Ok(Self(secret))
    }

    pub(crate) fn of(bytes: [u8; SECRET]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; SECRET] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Secret")
    }
}

/// An invitation as the joining side knows it.
#[derive(Clone, Debug)]
pub struct Token {
    /// Where the authority waits.
    pub addresses: Vec<SocketAddr>,
    /// Which authority it must be.
    pub authority: Fingerprint,
    /// What it is to be told.
    pub secret: Secret,
    /// When it stops waiting.
    pub expires: SystemTime,
}

impl fmt::Display for Token {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expires = self.expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut bytes = vec![VERSION];
        bytes.extend(expires.to_be_bytes());
        bytes.extend(self.authority.0);
        bytes.extend(self.secret.0);
        let count = self.addresses.len().min(MAX_ADDRESSES);
        bytes.push(u8::try_from(count).unwrap_or(0));
        for address in self.addresses.iter().take(count) {
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend(ip.octets());
                }
            }
            bytes.extend(address.port().to_be_bytes());
        }
        let checksum = sha256(&bytes);
        bytes.extend(checksum.iter().take(CHECKSUM));
        write!(to, "{PREFIX}{}", base32(&bytes))
    }
}

impl FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_TEXT {
            return Err(Error::Token("it is too long"));
        }
        let digits = text.strip_prefix(PREFIX).ok_or(Error::Token("it does not begin with `omega-`"))?;
        let bytes = unbase32(digits).ok_or(Error::Token("it has a character too many, too few or wrong"))?;
        let short = Error::Token("it is too short");
        let split = bytes.len().checked_sub(CHECKSUM).ok_or(short)?;
        let (bytes, checksum) = bytes.split_at(split);
        if sha256(bytes).get(..CHECKSUM) != Some(checksum) {
            return Err(Error::Token("a character is wrong"));
        }
        if bytes.first() != Some(&VERSION) {
            return Err(Error::Token("it is another version's; use the same version of Omega on both PCs"));
        }
        let mut reader = Reader(bytes.get(1..).unwrap_or_default());
        reader.token().ok_or(Error::Token("its content makes no sense"))
    }
}

/// Takes fields off the front.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn token(&mut self) -> Option<Token> {
        let expires = Duration::from_secs(u64::from_be_bytes(self.take()?));
        let expires = SystemTime::UNIX_EPOCH.checked_add(expires)?;
        let authority = Fingerprint(self.take()?);
        let secret = Secret::of(self.take()?);
        let [count] = self.take()?;
        if !(1..=MAX_ADDRESSES).contains(&usize::from(count)) {
            return None;
        }
        let addresses = (0..count).map(|_| self.address()).collect::<Option<_>>()?;
        self.0.is_empty().then_some(Token { addresses, authority, secret, expires })
    }

    fn address(&mut self) -> Option<SocketAddr> {
        let ip = match self.take()? {
            [4] => IpAddr::V4(Ipv4Addr::from(self.take::<4>()?)),
            [6] => IpAddr::V6(Ipv6Addr::from(self.take::<16>()?)),
            _ => return None,
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }
}

fn base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut bits, mut count) = (0u32, 0);
    for byte in bytes {
        bits = bits << 8 | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(digit(bits >> count));
        }
        bits &= (1 << count) - 1;
    }
    if count > 0 {
        text.push(digit(bits << (5 - count)));
    }
    text
}

fn digit(bits: u32) -> char {
    char::from(DIGITS[(bits & 31) as usize])
}

/// The bytes that `text` writes; `None` if [`base32`] would have written them otherwise.
fn unbase32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut bits, mut count) = (0u32, 0);
    for character in text.bytes() {
        let value = match character {
            b'a'..=b'z' => character - b'a',
            b'2'..=b'7' => character - b'2' + 26,
            _ => return None,
        };
        bits = bits << 5 | u32::from(value);
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    (count < 5 && bits == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            addresses: vec!["192.168.1.5:7421".parse().unwrap(), "[fd00::1]:7421".parse().unwrap()],
            authority: Fingerprint([0xa5; 32]),
            secret: Secret::of([0x3c; SECRET]),
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        }
    }

    #[test]
    fn a_token_comes_back_as_it_was() {
        let text = token().to_string();
        let back: Token = text.parse().expect("its own text");
        assert_eq!(back.addresses, token().addresses);
        assert_eq!((back.authority, back.expires), (token().authority, token().expires));
        assert_eq!(back.secret.bytes(), token().secret.bytes());
        assert!(!format!("{back:?}").contains("60"), "a secret is not printed");
        assert!(text.len() < 180, "short enough to paste: {}", text.len());
    }

    #[test]
    fn a_token_with_any_character_changed_left_out_or_added_is_refused() {
        let text = token().to_string();
        for at in 0..text.len() {
            for other in "abcz27-A=\0 ".chars().filter(|c| !text[at..].starts_with(*c)) {
                let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
                assert!(changed.parse::<Token>().is_err(), "{at}: {other}");
                let added = format!("{}{other}{}", &text[..at], &text[at..]);
                assert!(added.parse::<Token>().is_err(), "{at}: {other} added");
            }
            let mut shorter = text.clone();
            shorter.remove(at);
            assert!(shorter.parse::<Token>().is_err(), "{at} left out");
            assert!(text[..at].parse::<Token>().is_err(), "cut at {at}");
        }
        assert!(format!("{text}a").parse::<Token>().is_err());
        assert!(format!("{text} ").parse::<Token>().is_err());
    }

    #[test]
    fn a_token_of_another_version_says_so() {
        let text = token().to_string();
        let mut bytes = unbase32(&text[PREFIX.len()..]).unwrap();
        bytes.truncate(bytes.len() - CHECKSUM);
        bytes[0] = 2;
        bytes.extend(&sha256(&bytes)[..CHECKSUM]);
        let why = format!("{PREFIX}{}", base32(&bytes)).parse::<Token>().unwrap_err().to_string();
        assert!(why.contains("another version"), "{why}");
    }
}
