//! Skeleton.
/// A guest.
pub struct Guest;
