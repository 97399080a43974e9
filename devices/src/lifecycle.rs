//! What the machine may ask of every device. The state machine is drawn in `docs/devices.md`.
//!
//! ```text
//!            start                 stop (drains)
//!  built ───────────▶ running ◀──────────────▶ stopped ──save──▶ DeviceState
//!    ▲                   │        start            │
//!    └────── reset ──────┘                         └──restore──▶ stopped
//! ```

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A device's guest-visible state as a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Which device: stable over releases, as `virtio-blk` or `serial`.
    pub kind: String,
    /// The layout of `data`; a device restores the versions that it knows and refuses others.
    pub version: u32,
    /// The state itself.
    pub data: serde_json::Value,
}

impl DeviceState {
    /// The state `value` of a device.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it cannot be written as JSON (a map with keys that are not text).
    pub fn of<T: Serialize>(kind: &'static str, version: u32, value: &T) -> Result<Self, Error> {
        let data = serde_json::to_value(value).map_err(|e| Error::Invalid { kind, why: e.to_string() })?;
        Ok(Self { kind: kind.to_owned(), version, data })
    }

    /// The value behind the state, if it is one of `kind` and `version`.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::Invalid`].
    pub fn value<T: DeserializeOwned>(&self, kind: &'static str, version: u32) -> Result<T, Error> {
        if self.kind != kind || self.version != version {
            return Err(Error::Foreign { expected: kind, found: self.kind.clone(), version: self.version });
        }
        T::deserialize(&self.data).map_err(|e| Error::Invalid { kind, why: e.to_string() })
    }
}

/// A lifecycle call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state is of another device or version.
    #[error("The state is of {found}, version {version}; this device is {expected}")]
    Foreign {
        /// The device that was asked.
        expected: &'static str,
        /// The kind in the state.
        found: String,
        /// The version in the state.
        version: u32,
    },
    /// The state contradicts itself or the device's configuration.
    #[error("The state of {kind} is not valid: {why}")]
    Invalid {
        /// The device that was asked.
        kind: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The device could not do it.
    #[error("{kind} failed to {what}")]
    Device {
        /// The device that was asked.
        kind: &'static str,
        /// What it was asked to do.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl Error {
    /// An [`Error::Invalid`].
    #[must_use]
    pub fn invalid(kind: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { kind, why: why.into() }
    }
}

/// A device that can stop, drain, save its state, restore it and start.
///
/// vCPUs do not run while any of these is called, but other threads of the machine do.
pub trait Lifecycle: Send + Sync {
    /// Which device: the `kind` of its state.
    fn kind(&self) -> &'static str;

    /// Begins or goes on to work. A device in its initial state has nothing to do here.
    ///
    /// # Errors
    /// A back end cannot be started.
    fn start(&self) -> Result<(), Error>;

    /// Stops touching guest memory and raising interrupts. Requests in flight are finished first and
    /// their results are visible to the guest; those that do not finish within the device's patience
    /// (their disk's PC is away) stay unanswered, belong to the state, and are carried out again by
    /// [`start`](Self::start). Idempotent.
    ///
    /// # Errors
    /// A request cannot be finished.
    fn stop(&self) -> Result<(), Error>;

    /// The guest-visible state. Only while stopped.
    ///
    /// # Errors
    /// The state cannot be read.
    fn save(&self) -> Result<DeviceState, Error>;

    /// Takes over a saved state. Only while stopped or new; a device that refuses is unchanged.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::Invalid`].
    fn restore(&self, state: &DeviceState) -> Result<(), Error>;

    /// Back to the state of power-on, as at a machine reset. Requests in flight are finished or
    /// given up first; none touches guest memory afterwards.
    ///
    /// # Errors
    /// A request in flight can be neither finished nor given up.
    fn reset(&self) -> Result<(), Error>;

    /// The machine ends and nothing else will be called: threads end, and what the device holds elsewhere, as
    /// the lease of a volume, is given back. Only while stopped.
    fn end(&self) {}
}
