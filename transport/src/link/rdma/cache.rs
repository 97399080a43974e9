//! Registrations are dear and lock memory: regions that are used again and again keep theirs, up to a bound.

use std::sync::Arc;

use crate::buffer::Region;

/// Regions and what they were registered as, the latest used last.
pub(crate) struct Cache<R> {
    entries: Vec<Entry<R>>,
    bytes: usize,
    most: usize,
}

struct Entry<R> {
    region: Arc<Region>,
    registration: R,
    /// Counts uses, to find the one that was used longest ago.
    used: u64,
}

impl<R> Cache<R> {
    /// Keeps up to `most` bytes registered.
    pub(crate) fn new(most: usize) -> Self {
        Self { entries: Vec::new(), bytes: 0, most }
    }

    /// The registration of `region`, made by `register` if there is none. Where it would cross the bound,
    /// regions that nobody holds any more are given up, those used longest ago first. `None`: all that is
    /// registered is in use, or `register` refuses.
    pub(crate) fn get(
        &mut self,
        region: &Arc<Region>,
        register: impl FnOnce(&Region) -> Option<R>,
    ) -> Option<&R> {
        let used = self.entries.iter().map(|entry| entry.used).max().unwrap_or(0) + 1;
        let found = self.entries.iter().position(|entry| Arc::ptr_eq(&entry.region, region));
        let at = match found {
            Some(at) => at,
            None => {
                while self.bytes.saturating_add(region.len()) > self.most {
                    self.evict()?;
                }
                let registration = register(region)?;
                self.bytes += region.len();
                self.entries.push(Entry { region: region.clone(), registration, used });
                self.entries.len() - 1
            }
        };
        let entry = self.entries.get_mut(at)?;
        entry.used = used;
        Some(&entry.registration)
    }

    /// Gives up the region used longest ago of those that only the cache holds: no buffer lies in it, so no
    /// operation under way does.
    fn evict(&mut self) -> Option<()> {
        let idle = self.entries.iter().enumerate().filter(|(_, entry)| Arc::strong_count(&entry.region) == 1);
        let (at, _) = idle.min_by_key(|(_, entry)| entry.used)?;
        let entry = self.entries.swap_remove(at);
        self.bytes -= entry.region.len();
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;

    fn region() -> Arc<Region> {
        Buffer::zeroed(4096).to_region().expect("one segment")
    }

    #[test]
    fn a_region_is_registered_once_and_the_bound_gives_up_the_longest_unused() {
        let mut cache = Cache::new(3 * 4096);
        let regions: Vec<_> = (0..3).map(|_| region()).collect();
        for (at, region) in regions.iter().enumerate() {
            assert_eq!(cache.get(region, |_| Some(at)), Some(&at));
        }
        assert_eq!(cache.get(&regions[0], |_| panic!("it is there")), Some(&0));
        let other = region();
        assert_eq!(cache.get(&other, |_| Some(9)), None, "all are in use");
        let mut regions = regions.into_iter();
        let (first, _, _) = (regions.next().expect("three"), regions.next(), regions.next());
        assert_eq!(cache.get(&other, |_| Some(9)), Some(&9), "the second made room");
        assert_eq!(cache.get(&first, |_| panic!("it was used later")), Some(&0));
        assert_eq!(cache.get(&region(), |_| None::<usize>), None, "the device refused");
        assert!(cache.bytes <= 3 * 4096);
    }
}
