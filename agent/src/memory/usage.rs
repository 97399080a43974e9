//! How many pages a lease holds, and how many it may.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// No quota is larger: both numbers change as one.
pub(super) const MOST: u64 = u32::MAX as u64;

/// The pages held in the lower half, the quota in the upper one.
#[derive(Debug)]
pub(super) struct Usage(AtomicU64);

impl Usage {
    /// Neither is above [`MOST`].
    pub(super) fn new(used: u64, quota: u64) -> Self {
        debug_assert!(used <= MOST && quota <= MOST);
        Self(AtomicU64::new(quota << 32 | used))
    }

    pub(super) fn used(&self) -> u64 {
        self.0.load(SeqCst) & MOST
    }

    pub(super) fn quota(&self) -> u64 {
        self.0.load(SeqCst) >> 32
    }

    /// Counts `pages` more, if the quota allows it.
    pub(super) fn add(&self, pages: u64) -> bool {
        let more = |now: u64| {
            let used = (now & MOST).checked_add(pages)?;
            (used <= now >> 32).then(|| now + pages)
        };
        pages == 0 || self.0.fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Counts `pages` fewer: no more than were added.
    pub(super) fn sub(&self, pages: u64) {
        let before = self.0.fetch_sub(pages, SeqCst);
        debug_assert!(before & MOST >= pages, "what is given up was held");
    }

    /// Sets the quota, unless more pages are held. `Err`: how many.
    pub(super) fn resize(&self, quota: u64) -> Result<(), u64> {
        let set = |now: u64| (now & MOST <= quota).then_some(quota << 32 | now & MOST);
        self.0.fetch_update(SeqCst, SeqCst, set).map(drop).map_err(|now| now & MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_up_to_the_quota_and_the_quota_never_falls_below_them() {
        let usage = Usage::new(0, 10);
        assert!(usage.add(7) && !usage.add(4) && usage.add(3) && usage.add(0) && !usage.add(1));
        assert_eq!(usage.resize(9), Err(10));
        usage.sub(4);
        assert_eq!((usage.resize(6), usage.used(), usage.quota()), (Ok(()), 6, 6));
        assert_eq!((usage.resize(MOST), usage.quota()), (Ok(()), MOST));
        assert!(!usage.add(MOST) && usage.add(MOST - 6) && !usage.add(u64::MAX));
        assert_eq!(usage.used(), MOST);
    }
}
