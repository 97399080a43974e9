//! Numbers and texts in the bodies of the protocols that the transport carries: little-endian, and one encoding only
//! for each value.

use super::{Body, is_invisible};

/// A body is not what its operation says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The {0} is malformed")]
pub struct Malformed(pub &'static str);

/// Takes numbers and texts off the front of a body.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Of a body that is called `what` if it turns out to be none.
    #[must_use]
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    /// What to answer if the values do not fit each other.
    #[must_use]
    pub fn malformed(&self) -> Malformed {
        Malformed(self.what)
    }

    /// So many bytes are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.bytes.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.bytes.split_at_checked(len).ok_or(Malformed(self.what))?;
        self.bytes = tail;
        Ok(head)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed(self.what))
    }

    /// The next number.
    ///
    /// # Errors
    /// It is cut off.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next number.
    ///
    /// # Errors
    /// It is cut off.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next number.
    ///
    /// # Errors
    /// It is cut off.
    pub fn u128(&mut self) -> Result<u128, Malformed> {
        self.array().map(u128::from_le_bytes)
    }

    /// A length in two bytes, and so many bytes of UTF-8 without characters that change what is shown around them,
    /// since it goes to logs.
    ///
    /// # Errors
    /// It is cut off, is none of this, or has more than `most` bytes.
    pub fn text(&mut self, most: usize) -> Result<String, Malformed> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| Malformed(self.what))?;
        if len > most || text.chars().any(is_invisible) {
            return Err(Malformed(self.what));
        }
        Ok(text.to_owned())
    }

    /// `value`, if nothing is left.
    ///
    /// # Errors
    /// Something is left.
    pub fn end<T>(self, value: T) -> Result<T, Malformed> {
        if self.bytes.is_empty() { Ok(value) } else { Err(Malformed(self.what)) }
    }
}

/// Appends `text` as [`Reader::text`] takes it: cut to `most` bytes (65535 at most), and what it does not take is a
/// space.
pub fn put_text(out: &mut Body, text: &str, most: usize) {
    let clean: String = text.chars().map(|c| if is_invisible(c) { ' ' } else { c }).collect();
    let mut end = clean.len().min(most).min(usize::from(u16::MAX));
    while !clean.is_char_boundary(end) {
        end -= 1;
    }
    out.extend((end as u16).to_le_bytes());
    out.extend_from_slice(&clean.as_bytes()[..end]);
}
