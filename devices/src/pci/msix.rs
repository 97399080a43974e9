//! MSI-X: the table of messages, masks and pending bits (section 6.8.2).

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::irq::{InterruptController, MsiMessage, MsiRoute};

/// The capability's ID.
pub(crate) const CAPABILITY: u8 = 0x11;
/// Bytes of one table entry.
pub(crate) const ENTRY: u64 = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// One vector's state as a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    /// The table entry: address low, address high, data, vector control.
    pub entry: [u32; 4],
    /// Whether an interrupt waits for the vector to be unmasked.
    pub pending: bool,
}

/// A function's MSI-X state as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The message control word's enable and function mask bits.
    pub control: u16,
    /// The vectors.
    pub vectors: Vec<VectorState>,
}

struct Vector {
    state: VectorState,
    route: Arc<dyn MsiRoute>,
    /// The message and mask that the route has.
    programmed: Option<MsiMessage>,
    open: bool,
}

/// The vectors of one function. Workers trigger them, vCPUs program them; each vector has its own lock.
pub struct Msix {
    control: AtomicU16,
    vectors: Vec<Mutex<Vector>>,
}

impl Msix {
    /// `count` vectors (1 to 2048), all masked, on routes of `interrupts`.
    ///
    /// # Errors
    /// The controller has no routes left.
    pub fn new(count: u16, interrupts: &dyn InterruptController) -> io::Result<Self> {
        let vectors = (0..count)
            .map(|_| {
                let state = VectorState { entry: [0, 0, 0, VECTOR_MASKED], pending: false };
                Ok(Mutex::new(Vector { state, route: interrupts.msi()?, programmed: None, open: false }))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { control: AtomicU16::new(0), vectors })
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Whether the function uses MSI-X at all.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.control.load(Ordering::Acquire) & CONTROL_ENABLE != 0
    }

    /// The capability's bytes after ID and next pointer, for a table and pending bits in `bar`.
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        body
    }

    fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
        vector.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new message control word.
    pub fn set_control(&self, control: u16) {
        let control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        if self.control.swap(control, Ordering::AcqRel) != control {
            for vector in &self.vectors {
                self.update(&mut Self::lock(vector));
            }
        }
    }

    /// Brings the route in line with the vector's state, and delivers what was held back.
    fn update(&self, vector: &mut Vector) {
        let control = self.control.load(Ordering::Acquire);
        let open = control & CONTROL_ENABLE != 0
            && control & CONTROL_FUNCTION_MASK == 0
            && vector.state.entry[3] & VECTOR_MASKED == 0;
        let result = if open { Self::open(vector) } else { Self::close(vector) };
        if let Err(error) = result {
            tracing::error!(%error, "an MSI-X vector could not be programmed");
        }
    }

    fn open(vector: &mut Vector) -> io::Result<()> {
        let [low, high, data, _] = vector.state.entry;
        let message = MsiMessage { address: u64::from(high) << 32 | u64::from(low), data };
        if vector.programmed != Some(message) {
            vector.route.set(message)?;
            vector.programmed = Some(message);
        }
        if !vector.open {
            vector.route.mask(false)?;
            vector.open = true;
        }
        if std::mem::take(&mut vector.state.pending) {
            vector.route.trigger()?;
        }
        Ok(())
    }

    fn close(vector: &mut Vector) -> io::Result<()> {
        if std::mem::take(&mut vector.open) {
            vector.route.mask(true)?;
        }
        Ok(())
    }

    /// Delivers an interrupt, or remembers it while the vector is masked. Unknown vectors are ignored,
    /// and so is everything while MSI-X is off.
    pub fn trigger(&self, vector: u16) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else { return };
        let mut vector = Self::lock(vector);
        if !vector.open {
            vector.state.pending = self.enabled();
        } else if let Err(error) = vector.route.trigger() {
            tracing::error!(%error, "an MSI-X interrupt was lost");
        }
    }

    /// Reads the table; aligned accesses of 4 or 8 bytes, others read zeros.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        for (i, word) in data.chunks_exact_mut(4).enumerate() {
            let at = offset + 4 * i as u64;
            if let Some(vector) = self.vectors.get((at / ENTRY) as usize) {
                let value = Self::lock(vector).state.entry[(at % ENTRY / 4) as usize];
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table; aligned accesses of 4 or 8 bytes, others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        for (i, word) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * i as u64;
            let Some(vector) = self.vectors.get((at / ENTRY) as usize) else { return };
            let mut vector = Self::lock(vector);
            let field = (at % ENTRY / 4) as usize;
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            vector.state.entry[field] = if field == 3 { value & VECTOR_MASKED } else { value };
            self.update(&mut vector);
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize + i).saturating_mul(8);
            *byte = self
                .vectors
                .iter()
                .skip(first)
                .take(8)
                .enumerate()
                .fold(0, |bits, (bit, vector)| bits | u8::from(Self::lock(vector).state.pending) << bit);
        }
    }

    /// Back to the state of power-on.
    pub fn reset(&self) {
        self.control.store(0, Ordering::Release);
        for vector in &self.vectors {
            let mut vector = Self::lock(vector);
            vector.state = VectorState { entry: [0, 0, 0, VECTOR_MASKED], pending: false };
            self.update(&mut vector);
        }
    }

    /// The state as a value.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let vectors = self.vectors.iter().map(|vector| Self::lock(vector).state).collect();
        MsixState { control: self.control.load(Ordering::Acquire), vectors }
    }

    /// Takes over a state; `false`, and nothing changes, if it has another number of vectors.
    #[must_use]
    pub fn restore(&self, state: &MsixState) -> bool {
        if state.vectors.len() != self.vectors.len() {
            return false;
        }
        let control = state.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        self.control.store(control, Ordering::Release);
        for (vector, state) in self.vectors.iter().zip(&state.vectors) {
            let mut vector = Self::lock(vector);
            vector.state = *state;
            vector.state.entry[3] &= VECTOR_MASKED;
            self.update(&mut vector);
        }
        true
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}
