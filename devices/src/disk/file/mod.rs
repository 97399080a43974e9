//! Raw image files and block devices of this PC.
//!
//! An [`Image`] is opened, locked and measured once and may be driven by several rings; a [`FileDisk`]
//! drives one on one ring.

mod aligned;
mod drive;
mod image;
mod sys;

pub use drive::FileDisk;
pub use image::{Direct, Image, OpenError, Options};

#[cfg(test)]
mod file_test;
